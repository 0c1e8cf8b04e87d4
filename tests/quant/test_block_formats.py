"""Every block format means what ``gguf.quants`` says, by torch and by the native kernel."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING, cast

import gguf
import libgguf
import numpy as np
import pytest
import torch

from distorch.errors import ModelError
from distorch.quant import dequantize as dequantize_module
from distorch.quant import native
from distorch.quant.block_formats import BLOCK_FORMATS, block_format
from distorch.quant.dequantize import dequantize, scratch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

SCALES_AT = {"Q8_0": (0,), "Q5_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}  # float16s of each block
GGML = sorted(  # gguf.quants, the oracle, decodes no F64
    name
    for name in BLOCK_FORMATS
    if name in gguf.GGMLQuantizationType.__members__ and name != "F64"
)
PACKED = sorted(SCALES_AT)
NUM_BLOCKS = 700  # several OpenMP tiles of the K formats, and a remainder


@pytest.fixture
def fresh_trust() -> Iterator[None]:
    """Forget which kernels were found trustworthy, before and after."""
    dequantize_module._trusted_kernel.cache_clear()
    yield
    dequantize_module._trusted_kernel.cache_clear()


def random_blocks(name: str, num_blocks: int, seed: int = 0) -> np.ndarray:
    """Random bytes, every value of every byte, but for scales: those are finite float16s."""
    rng = np.random.default_rng(seed)
    form = BLOCK_FORMATS[name]
    blocks = rng.integers(0, 256, (num_blocks, form.nbytes), dtype=np.uint8)
    for at in SCALES_AT.get(name, ()):
        exponent_not_all_ones = blocks[:, at + 1] & 0x7C != 0x7C
        blocks[:, at + 1] = np.where(exponent_not_all_ones, blocks[:, at + 1], 0xBB)
    return blocks


def quantised_rows(name: str) -> np.ndarray:
    """Rows as a converter writes them: normal numbers, zeros, one large outlier, tiny ones."""
    rng = np.random.default_rng(1)
    rows = rng.normal(0, 0.05, (40, 1024)).astype(np.float32)
    rows[3] = 0
    rows[5, 17] = 900.0
    rows[7] *= 1e-8
    kind = gguf.GGMLQuantizationType[name]
    if name in {"F32", "F16", "BF16", "Q8_0", "Q5_0"}:
        return gguf.quants.quantize(rows, kind)
    return cast("np.ndarray", libgguf.quantize_rows(rows, kind))


def oracle(name: str, blocks: np.ndarray) -> Tensor:
    kind = gguf.GGMLQuantizationType[name]
    with np.errstate(all="ignore"):
        values = gguf.quants.dequantize(blocks.reshape(1, -1), kind)
    return torch.from_numpy(np.ascontiguousarray(values)).view(-1)


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Bit for bit, the sign of zero included; one NaN is as good as another."""
    found, expected = found.reshape(-1), expected.reshape(-1)
    both_nan = found.isnan() & expected.isnan()
    return bool(((found.view(torch.int32) == expected.view(torch.int32)) | both_nan).all())


def by_torch(name: str, packed: Tensor) -> Tensor:
    form = BLOCK_FORMATS[name]
    return form.decode(packed.view(-1, form.nbytes))


def by_kernel(name: str, packed: Tensor) -> Tensor:
    kernel = native.kernel(name)
    if kernel is None:
        pytest.skip("no native kernels here: there is no C compiler")
    form = BLOCK_FORMATS[name]
    num_blocks = packed.numel() // form.nbytes
    guard = 64
    out = torch.full((num_blocks * form.elements + guard,), 7.0, dtype=torch.float32)
    kernel(packed.data_ptr(), out.data_ptr(), num_blocks)
    assert bool((out[-guard:] == 7.0).all()), "the kernel wrote past its end"
    return out[:-guard]


def in_one_go(name: str, packed: Tensor) -> Tensor:
    form = BLOCK_FORMATS[name]
    num_blocks = packed.numel() // form.nbytes
    return dequantize(packed, form, torch.empty(num_blocks * form.elements, dtype=torch.float32))


@pytest.mark.parametrize("decode", [by_torch, in_one_go])
@pytest.mark.parametrize("name", GGML)
def test_random_bytes_decode_to_the_oracles_bits(
    name: str, decode: Callable[[str, Tensor], Tensor]
) -> None:
    blocks = random_blocks(name, NUM_BLOCKS)
    assert same_bits(decode(name, torch.from_numpy(blocks)), oracle(name, blocks))


@pytest.mark.parametrize("decode", [by_torch, in_one_go])
@pytest.mark.parametrize("name", GGML)
def test_quantised_weights_decode_to_the_oracles_bits(
    name: str, decode: Callable[[str, Tensor], Tensor]
) -> None:
    blocks = quantised_rows(name).view(np.uint8)
    assert same_bits(decode(name, torch.from_numpy(blocks.reshape(-1))), oracle(name, blocks))


@pytest.mark.parametrize("num_blocks", [0, 1, 3, 63, 64, 65, 513, 2049])
@pytest.mark.parametrize("name", PACKED)
def test_the_native_kernel_gives_the_oracles_bits(name: str, num_blocks: int) -> None:
    blocks = random_blocks(name, num_blocks, seed=num_blocks)
    found = by_kernel(name, torch.from_numpy(blocks))
    assert found.numel() == num_blocks * BLOCK_FORMATS[name].elements
    if num_blocks:
        assert same_bits(found, oracle(name, blocks))


@pytest.mark.parametrize("name", PACKED)
def test_the_native_kernel_agrees_on_quantised_weights(name: str) -> None:
    blocks = quantised_rows(name)
    assert same_bits(by_kernel(name, torch.from_numpy(blocks)), oracle(name, blocks))


@pytest.mark.parametrize(("name", "mantissa"), [("F8_E4M3", 3), ("F8_E5M2", 2)])
def test_eight_bit_floats_mean_what_their_standard_says(name: str, mantissa: int) -> None:
    """Sign, exponent, mantissa; E4M3 has no infinity, and one NaN of each sign."""
    bias = 7 if mantissa == 3 else 15
    found = by_torch(name, torch.arange(256, dtype=torch.uint8).view(-1, 1)).view(-1)
    for byte in range(256):
        exponent, fraction = (byte & 0x7F) >> mantissa, byte & ((1 << mantissa) - 1)
        special = byte & 0x7F == 0x7F if mantissa == 3 else exponent == 31
        if special:
            assert not found[byte].isfinite()
            continue
        power = max(exponent, 1) - bias
        value = (bool(exponent) + fraction / (1 << mantissa)) * 2.0**power
        assert found[byte].item() == (-value if byte & 0x80 else value)


def test_torch_decodes_tile_by_tile_what_is_larger_than_a_tile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks = random_blocks("Q5_0", 100)
    monkeypatch.setattr(dequantize_module, "_trusted_kernel", lambda _name: None)
    for name in [n for n in vars(dequantize_module) if n.startswith("_TILE")]:
        monkeypatch.setattr(dequantize_module, name, 7 * 32)
    assert same_bits(in_one_go("Q5_0", torch.from_numpy(blocks)), oracle("Q5_0", blocks))


@pytest.mark.usefixtures("fresh_trust")
@pytest.mark.parametrize("name", PACKED)
def test_without_a_compiler_torch_decodes_and_says_so_once(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def nothing() -> None:
        raise OSError("no C compiler")

    monkeypatch.setattr(native, "_build", nothing)
    native._library.cache_clear()
    try:
        blocks = random_blocks(name, 10)
        for _ in range(2):
            found = in_one_go(name, torch.from_numpy(blocks))
            assert same_bits(found, oracle(name, blocks))
        assert dequantize_module._trusted_kernel(name) is None
        assert len([r for r in caplog.records if "no C compiler" in r.getMessage()]) == 1
    finally:
        native._library.cache_clear()


@pytest.mark.usefixtures("fresh_trust")
@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("wrong_from", [0x00, 0x80, 0xF0])
def test_a_kernel_that_disagrees_on_some_bytes_is_refused(
    name: str, wrong_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signed and unsigned bytes differ from 0x80 on: what a compiler could get wrong must show."""
    form = BLOCK_FORMATS[name]

    def wrong(source: int, out: int, num_blocks: int) -> None:
        data = (ctypes.c_uint8 * (num_blocks * form.nbytes)).from_address(source)
        blocks = torch.frombuffer(data, dtype=torch.uint8).view(num_blocks, form.nbytes)
        last = form.nbytes - 1 if name != "Q6_K" else 207  # not a scale's byte
        middle = blocks[:, 2 if name == "Q8_0" else 8 : last]
        is_wrong = (middle >= wrong_from).any(dim=1, keepdim=True)
        values = form.decode(blocks) + is_wrong
        target = (ctypes.c_float * values.numel()).from_address(out)
        torch.frombuffer(target, dtype=torch.float32).copy_(values.reshape(-1))

    monkeypatch.setattr(dequantize_module, "kernel", lambda _name: wrong)
    assert dequantize_module._trusted_kernel(name) is None
    blocks = random_blocks(name, 10)
    assert same_bits(in_one_go(name, torch.from_numpy(blocks)), oracle(name, blocks))


@pytest.mark.parametrize("default", ["torch.float64", "torch.bfloat16", "torch.float16"])
def test_the_kernels_do_not_depend_on_torchs_default_dtype(default: str) -> None:
    """Transformers sets one while it builds; a probe buffer of half the size would be overrun."""
    code = f"""
        import faulthandler, torch
        faulthandler.dump_traceback_later(40, exit=True)
        torch.set_default_dtype({default})
        from distorch.quant import native
        from distorch.quant.block_formats import BLOCK_FORMATS
        from distorch.quant.dequantize import _trusted_kernel, dequantize
        for name in {PACKED}:
            form = BLOCK_FORMATS[name]
            assert (native.kernel(name) is None) == (_trusted_kernel(name) is None), name
            packed = torch.zeros(1000 * form.nbytes, dtype=torch.uint8)
            out = torch.ones(1000 * form.elements, dtype=torch.float32)
            assert not dequantize(packed, form, out).any()
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]


def test_buffers_of_the_cpu_are_on_the_cpu_whatever_torchs_default_device_is() -> None:
    """`torch.set_default_device("cuda")` must not hand a CUDA address to a CPU kernel."""
    buffer = dequantize_module._scratch.buffer
    dequantize_module._scratch.buffer = None
    try:
        with torch.device("meta"):
            assert scratch(8).device.type == "cpu"
    finally:
        dequantize_module._scratch.buffer = buffer


def test_scratch_is_handed_out_again_and_grows() -> None:
    first = scratch(100)
    assert scratch(100).data_ptr() == first.data_ptr()
    assert scratch(first.untyped_storage().nbytes() // 4 + 1).data_ptr() != first.data_ptr()
    assert first.dtype == torch.float32
    assert scratch(7).shape == (7,)


def test_an_unknown_format_names_those_that_are_known() -> None:
    with pytest.raises(ModelError, match="IQ2_XXS") as caught:
        block_format("IQ2_XXS")
    assert all(name in caught.value.hint for name in BLOCK_FORMATS)
    assert caught.value.exit_code == 2


def test_block_sizes_are_ggmls() -> None:
    for name in GGML:
        sizes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
        assert (BLOCK_FORMATS[name].elements, BLOCK_FORMATS[name].nbytes) == sizes
