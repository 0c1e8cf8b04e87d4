"""The native kernels give the torch decoder's bits in every dtype; else torch decodes."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from distorch.quant import dequantize as dequantize_module
from distorch.quant import native
from distorch.quant.block_formats import BLOCK_FORMATS
from distorch.quant.dequantize import decoder_of, decoders_of, dequantize, scratch
from tests.quant.make import (
    DENSE,
    ORACLE,
    PACKED,
    oracle,
    quantised_rows,
    random_blocks,
    same_bits,
    sound_blocks,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

KERNELS = [  # what people use; all else is torch's
    *("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I8", "MXFP4", "IQ4_NL", "IQ4_XS"),
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SOURCES = Path(native.__file__).parent


@pytest.fixture
def fresh_trust() -> Iterator[None]:
    """Forget which kernels were found trustworthy, before and after."""
    dequantize_module._trusted_kernel.cache_clear()
    yield
    dequantize_module._trusted_kernel.cache_clear()


def by_kernel(name: str, packed: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    kernel = native.kernel(name, dtype)
    if kernel is None:
        pytest.skip("no native kernels here: there is no C compiler")
    form = BLOCK_FORMATS[name]
    num_blocks = packed.numel() // form.nbytes
    guard = 64
    out = torch.full((num_blocks * form.elements + guard,), 7.0, dtype=dtype)
    kernel(packed.data_ptr(), out.data_ptr(), num_blocks)
    assert bool((out[-guard:] == 7.0).all()), "the kernel wrote past its end"
    return out[:-guard]


def in_one_go(name: str, packed: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    form = BLOCK_FORMATS[name]
    num_blocks = packed.numel() // form.nbytes
    return dequantize(packed, form, torch.empty(num_blocks * form.elements, dtype=dtype))


def by_torch(name: str, packed: Tensor) -> Tensor:
    form = BLOCK_FORMATS[name]
    return form.decode(packed.view(-1, form.nbytes))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_blocks", [0, 1, 3, 63, 64, 65, 513, 2049])
@pytest.mark.parametrize("name", KERNELS)
def test_the_native_kernel_gives_the_torch_decoders_bits(
    name: str, num_blocks: int, dtype: torch.dtype
) -> None:
    for make in (random_blocks, sound_blocks):
        blocks = torch.from_numpy(make(name, num_blocks, seed=num_blocks))
        found = by_kernel(name, blocks, dtype)
        assert found.numel() == num_blocks * BLOCK_FORMATS[name].elements
        if num_blocks:
            assert same_bits(found, by_torch(name, blocks).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in KERNELS if name in PACKED])
def test_the_native_kernel_agrees_on_quantised_weights(name: str, dtype: torch.dtype) -> None:
    blocks = quantised_rows(name)
    found = by_kernel(name, torch.from_numpy(blocks), dtype)
    assert same_bits(found, oracle(name, blocks).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ORACLE)
def test_every_format_is_rounded_once_from_the_oracles_float32(
    name: str, dtype: torch.dtype
) -> None:
    for blocks in (random_blocks(name, 700), sound_blocks(name, 700)):
        found = in_one_go(name, torch.from_numpy(blocks).view(-1), dtype)
        assert same_bits(found, oracle(name, blocks).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["F16", "BF16", "F8_E4M3", "F8_E5M2", "I8"])
def test_every_number_of_a_narrow_format(name: str, dtype: torch.dtype) -> None:
    bits = np.arange(65536, dtype=np.uint16 if BLOCK_FORMATS[name].nbytes == 2 else np.uint8)
    packed = torch.from_numpy(bits.view(np.uint8))
    assert same_bits(by_kernel(name, packed, dtype), by_torch(name, packed).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_numbers_that_are_hard_to_round(dtype: torch.dtype) -> None:
    """Every number of the narrow dtype, halfway to the next one, and a bit to either side."""
    exact = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).float()
    bits = exact.view(torch.int32)
    halfway = 0x8000 if dtype == torch.bfloat16 else 0x1000
    near = [bits + offset for offset in (0, 1, -1, halfway, halfway + 1, halfway - 1)]
    small = torch.arange(0, 1 << 26, 997, dtype=torch.int32) + 0x32000000  # float16's denormals
    values = torch.cat([*near, small, small | -(1 << 31)]).view(torch.uint8)
    assert same_bits(by_kernel("F32", values, dtype), values.view(torch.float32).to(dtype))


def test_a_wider_dtype_is_decoded_too() -> None:
    blocks = sound_blocks("Q4_K", 10)
    found = in_one_go("Q4_K", torch.from_numpy(blocks), torch.float64)
    assert torch.equal(found, oracle("Q4_K", blocks).double())


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_the_kernels_compile_without_a_warning(compiler: str, tmp_path: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} here")
    strict = ["-Wall", "-Wextra", "-Werror", "-c", str(SOURCES / "kernels.c")]
    command = [compiler, *native._FLAGS, *strict, "-o", str(tmp_path / "kernels.o")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_who_decodes_is_told() -> None:
    """The formats that people use have a kernel; the slow path is not a secret."""
    if native.kernel("Q8_0") is None:
        pytest.skip("no native kernels here: there is no C compiler")
    for name, form in BLOCK_FORMATS.items():
        for dtype in DTYPES:
            expected = "C kernel" if name in KERNELS else "torch"
            assert decoder_of(form, "cpu", dtype) == expected, name
        assert decoder_of(form, "cuda:0") == "torch"
        assert decoder_of(form, torch.device("cpu"), torch.float64) == "torch"


def test_torch_decodes_tile_by_tile_what_is_larger_than_a_tile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks = random_blocks("Q5_0", 100)
    monkeypatch.setattr(dequantize_module, "_trusted_kernel", lambda _name, _dtype: None)
    monkeypatch.setattr(dequantize_module, "_TILE_ELEMENTS", 7 * 32)
    assert same_bits(in_one_go("Q5_0", torch.from_numpy(blocks)), oracle("Q5_0", blocks))


@pytest.mark.usefixtures("fresh_trust")
@pytest.mark.parametrize("name", ["Q8_0", "Q5_0", "Q4_K", "Q6_K"])
def test_without_a_compiler_torch_decodes_and_says_so_once(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def nothing() -> None:
        raise OSError("no C compiler")

    monkeypatch.setattr(native, "_build", nothing)
    native._library.cache_clear()
    try:
        blocks = random_blocks(name, 10)
        for dtype in DTYPES:
            found = in_one_go(name, torch.from_numpy(blocks), dtype)
            assert same_bits(found, oracle(name, blocks).to(dtype))
            assert decoder_of(BLOCK_FORMATS[name], "cpu", dtype) == "torch"
        assert len([r for r in caplog.records if "no C compiler" in r.getMessage()]) == 1
    finally:
        native._library.cache_clear()


@pytest.mark.usefixtures("fresh_trust")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in KERNELS if name not in DENSE | {"I8"}])
@pytest.mark.parametrize("wrong_from", [0x00, 0x80, 0xF0])
def test_a_kernel_that_disagrees_on_some_bytes_is_refused(
    name: str, wrong_from: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signed and unsigned bytes differ from 0x80 on: what a compiler could get wrong must show."""
    form = BLOCK_FORMATS[name]

    def wrong(source: int, out: int, num_blocks: int) -> None:
        data = (ctypes.c_uint8 * (num_blocks * form.nbytes)).from_address(source)
        blocks = torch.frombuffer(data, dtype=torch.uint8).view(num_blocks, form.nbytes)
        is_wrong = (blocks[:, 8 : form.nbytes - 4] >= wrong_from).any(dim=1, keepdim=True)
        values = (form.decode(blocks) + is_wrong).to(dtype)
        target = (ctypes.c_uint8 * values.nbytes).from_address(out)
        torch.frombuffer(target, dtype=dtype).copy_(values.reshape(-1))

    monkeypatch.setattr(dequantize_module, "kernel", lambda _name, _dtype: wrong)
    assert dequantize_module._trusted_kernel(name, dtype) is None
    blocks = random_blocks(name, 10)
    found = in_one_go(name, torch.from_numpy(blocks), dtype)
    assert same_bits(found, oracle(name, blocks).to(dtype))


@pytest.mark.parametrize("default", ["torch.float64", "torch.bfloat16", "torch.float16"])
def test_the_kernels_do_not_depend_on_torchs_default_dtype(default: str) -> None:
    """Transformers sets one while it builds; a probe buffer of half the size would be overrun."""
    code = f"""
        import faulthandler, torch
        faulthandler.dump_traceback_later(80, exit=True)
        torch.set_default_dtype({default})
        from distorch.quant import native
        from distorch.quant.block_formats import BLOCK_FORMATS
        from distorch.quant.dequantize import _trusted_kernel, dequantize
        for name, form in BLOCK_FORMATS.items():
            for dtype in (torch.float32, torch.bfloat16):
                is_trusted = _trusted_kernel(name, dtype) is not None
                assert (native.kernel(name, dtype) is not None) == is_trusted, name
            packed = torch.zeros(1000 * form.nbytes, dtype=torch.uint8)
            out = torch.ones(1000 * form.elements, dtype=torch.float32)
            assert not dequantize(packed, form, out).any()
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=100,
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
    assert scratch(200, torch.bfloat16).data_ptr() == first.data_ptr()
    assert scratch(first.untyped_storage().nbytes() // 4 + 1).data_ptr() != first.data_ptr()
    assert (first.dtype, scratch(7, torch.float16).dtype) == (torch.float32, torch.float16)
    assert scratch(7).shape == (7,)


def test_decoders_are_named_for_packed_formats_only() -> None:
    stored = ["Q8_0", "F32", "IQ2_S", "I64", "BF16", "F8_E4M3", "Q8_0"]
    found = decoders_of(stored, "cpu", torch.bfloat16)
    assert list(found) == ["F8_E4M3", "IQ2_S", "Q8_0"]
    assert found == {name: decoder_of(BLOCK_FORMATS[name], "cpu", torch.bfloat16) for name in found}
