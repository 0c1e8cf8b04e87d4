"""The Triton kernels by Triton's interpreter, which runs their source on tensors of the CPU.

It shows what they compute. How fast that is on a GPU, only a GPU can tell.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from distorch.quant.block_formats import BLOCK_FORMATS
from tests.quant.interpreted import DTYPES, NAMES, by_torch, sound
from tests.quant.make import Bytes, random_blocks, same_bits, sound_blocks, with_halves

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

pytest.importorskip("triton", reason="no Triton here; on Linux: pip install triton")
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")

GUARD = 64


def by_kernel(kernels: Any, name: str, packed: Tensor, dtype: torch.dtype) -> Tensor:
    form = BLOCK_FORMATS[name]
    out = torch.full((packed.numel() // form.nbytes * form.elements + GUARD,), 7.0, dtype=dtype)
    kernels.decode(packed.view(-1), form, out[:-GUARD])
    assert bool((out[-GUARD:] == 7.0).all()), "the kernel wrote past its end"
    return out[:-GUARD]


def test_all_that_people_use_has_a_kernel(kernels: Any) -> None:
    assert list(kernels.FORMATS) == NAMES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_decoding_gives_the_torch_decoders_bits(
    kernels: Any, name: str, dtype: torch.dtype
) -> None:
    """A part of a tile, and tiles and a part; all bytes, and sound ones."""
    for weights in (3840, 8480):
        num_blocks = weights // BLOCK_FORMATS[name].elements
        for make in (random_blocks, sound_blocks):
            packed = torch.from_numpy(make(name, num_blocks, seed=num_blocks))
            found = by_kernel(kernels, name, packed, dtype)
            assert same_bits(found, by_torch(name, packed, dtype)), (num_blocks, make)
    assert by_kernel(kernels, name, torch.empty(0, dtype=torch.uint8), dtype).numel() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES[:5])
def test_scales_that_are_zero_denormal_infinite_or_no_number(
    kernels: Any, name: str, dtype: torch.dtype
) -> None:
    scales = [0, 0x8000, 1, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0xFFFF]
    halves = np.array(scales, np.uint16)
    packed = torch.from_numpy(with_halves(name, random_blocks(name, len(scales)), halves))
    assert same_bits(by_kernel(kernels, name, packed, dtype), by_torch(name, packed, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES[5:])
def test_every_number_of_fp8(kernels: Any, name: str, dtype: torch.dtype) -> None:
    packed = torch.arange(256, dtype=torch.uint8)
    assert same_bits(by_kernel(kernels, name, packed, dtype), by_torch(name, packed, dtype))


def test_blocks_at_an_odd_address_are_moved_first(kernels: Any) -> None:
    """A GPU reads float16 at even addresses only."""
    blocks = sound("Q4_K", 3, 256)
    odd = torch.cat((blocks[:1], blocks))[1:]
    assert odd.data_ptr() % 2 == 1
    assert kernels._even(odd).data_ptr() % 2 == 0
    assert kernels._even(blocks) is blocks
    assert same_bits(
        by_kernel(kernels, "Q4_K", odd, torch.float32), by_torch("Q4_K", blocks, torch.float32)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_product_is_as_near_as_sums_in_float32_can_be(
    kernels: Any, name: str, dtype: torch.dtype
) -> None:
    """Outputs that are no whole tile; columns that are no whole step, where a format has them."""
    form, outputs = BLOCK_FORMATS[name], 37
    columns = {256: 512, 32: 288, 1: 300}[form.elements]
    packed = sound(name, outputs, columns)
    weight = by_torch(name, packed, dtype).view(outputs, columns).double()
    random = torch.Generator().manual_seed(0)
    for rows, bias in ((1, None), (16, torch.randn(outputs, generator=random).to(dtype))):
        x = torch.randn(rows, columns, generator=random).to(dtype)
        y = kernels.linear(x, packed, form, bias)
        assert (y.dtype, y.shape) == (dtype, (rows, outputs))
        added = torch.zeros(outputs) if bias is None else bias
        exact = x.double() @ weight.T + added.double()
        size = x.double().abs() @ weight.abs().T + added.double().abs()
        bound = columns * 2.0**-24 * size + torch.finfo(dtype).eps / 2 * exact.abs() * 1.01
        assert bool(((y.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_read_or_written_past_the_ends(
    kernels: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    touched: list[Bytes] = []

    def noted(usual: Callable[..., Any], mask_at: int) -> Callable[..., Any]:
        def access(builder: Any, *arguments: Any) -> Any:
            mask = arguments[mask_at].data
            touched.append(np.broadcast_to(arguments[0].data, mask.shape)[mask])
            return usual(builder, *arguments)

        return access

    for access, mask_at in (("create_masked_load", 1), ("create_masked_store", 2)):
        usual = getattr(InterpreterBuilder, access)
        monkeypatch.setattr(InterpreterBuilder, access, noted(usual, mask_at))
    form, columns = BLOCK_FORMATS[name], {256: 512, 32: 288, 1: 300}[BLOCK_FORMATS[name].elements]
    packed, x, bias = sound(name, 19, columns), torch.randn(3, columns), torch.randn(19)
    out = torch.empty(19 * columns)
    kernels.decode(packed, form, out)
    y = kernels.linear(x, packed, form, bias)
    ends = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in (packed, x, bias, out, y)]
    addresses = np.concatenate(touched)
    inside = [(first <= addresses) & (addresses < last) for first, last in ends]
    assert np.any(inside, axis=0).all()
    assert all(where.any() for where in inside)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "F8_E4M3"])
def test_a_product_does_not_depend_on_what_is_computed_beside_it(kernels: Any, name: str) -> None:
    """Not on the other rows of the input, nor on which rows of the weight are in a run."""
    form, outputs, columns = BLOCK_FORMATS[name], 48, 512
    packed = sound(name, outputs, columns)
    x = torch.randn(16, columns).bfloat16()
    y = kernels.linear(x, packed, form, None)
    assert torch.equal(kernels.linear(x, packed, form, None), y)
    assert torch.equal(kernels.linear(x[3:5], packed, form, None), y[3:5])
    run = packed[20 * len(packed) // outputs :]
    assert torch.equal(kernels.linear(x, run, form, None), y[:, 20:])
