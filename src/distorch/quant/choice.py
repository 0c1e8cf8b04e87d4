"""Who decodes and multiplies packed weights on a GPU: a Triton kernel that has shown its bits.

A kernel is used only after it has agreed, on this device, with the torch decoder: bit for bit, or,
where it adds, within what rounding allows. Where Triton is missing, does not compile, or differs,
torch does the work and one line of the log says so. What is chosen depends on the format, the
dtype, the number of rows and the device, never on where a weight rests.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, Final

import torch
from torch import Tensor

from distorch.quant.block_formats import BLOCK_FORMATS, BlockFormat

__all__ = ["GPUS", "Decode", "agrees", "few_rows", "gpu_decoder", "is_fused"]

GPUS: Final = frozenset({"cuda", "xpu"})  # ROCm calls itself cuda
_DTYPES: Final = frozenset({torch.float32, torch.bfloat16, torch.float16})
_PROBE_BLOCKS = 256
_PROBE_ELEMENTS = 1 << 13
_PROBE_OUTPUTS, _PROBE_COLUMNS, _PROBE_ROWS = 40, 1024, 3

Decode = Callable[[Tensor, Tensor], object]
"""Decodes packed blocks into memory for them."""

_log = logging.getLogger("distorch")


def agrees(
    decode: Decode, form: type[BlockFormat], device: torch.device | str, dtype: torch.dtype
) -> bool:
    """Whether ``decode`` gives the bits of the torch decoder for random blocks, rounded once."""
    with torch.inference_mode(mode=False), torch.device("cpu"):
        blocks = _blocks(form, max(_PROBE_BLOCKS, _PROBE_ELEMENTS // form.elements))
        expected = form.decode(blocks).to(dtype)
        out = torch.empty(expected.shape, dtype=dtype, device=device)
        decode(blocks.to(device).view(-1), out.view(-1))
        found = out.cpu()
        as_bits = torch.int32 if dtype == torch.float32 else torch.int16
        both_nan = found.isnan() & expected.isnan()  # a scale may be one, of any payload
        return bool(((found.view(as_bits) == expected.view(as_bits)) | both_nan).all())


@cache
def gpu_decoder(name: str, device: torch.device, dtype: torch.dtype) -> Decode | None:
    """Return the Triton kernel for a format on a device, if it agrees with torch."""
    kernels, form = _kernels() if device.type in GPUS else None, BLOCK_FORMATS[name]
    if kernels is None or dtype not in _DTYPES or name not in kernels.FORMATS:
        return None

    def decode(packed: Tensor, out: Tensor) -> None:
        with _current(packed.device):
            kernels.decode(packed, form, out)

    found = _asked(f"Triton's decoding of {name}", lambda: agrees(decode, form, device, dtype))
    return decode if found else None


def few_rows(
    x: Tensor, packed: Tensor, form: type[BlockFormat], bias: Tensor | None
) -> Tensor | None:
    """Return ``x @ weight.T + bias``, decoded on the way; None where that is left to others."""
    columns = x.shape[-1]
    if not is_fused(form.name, x.device, x.dtype) or not columns:
        return None
    kernels, rows = _kernels(), x.reshape(-1, columns)
    if kernels is None or not 0 < len(rows) <= kernels.MAX_ROWS or columns % form.elements:
        return None
    with _current(x.device):
        y: Tensor = kernels.linear(rows, packed, form, bias)
    return y.view(*x.shape[:-1], y.shape[-1])


@cache
def is_fused(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a weight and few rows are multiplied by one kernel that decodes as it goes.

    Only where ``DISTORCH_FUSED=1`` asks for it: no GPU has shown yet where it is faster, and a
    choice by a clock could fall out otherwise in the next process, with other bits.
    """
    if device.type not in GPUS or os.environ.get("DISTORCH_FUSED") != "1":
        return False
    if gpu_decoder(name, device, dtype) is None:
        return False
    return _asked(f"Triton's product with {name}", lambda: _multiplies(name, device, dtype))


def _multiplies(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the product of random numbers is off by no more than sums in float32 may be."""
    form = BLOCK_FORMATS[name]
    with torch.inference_mode(mode=False), torch.device("cpu"):
        num_blocks = _PROBE_OUTPUTS * _PROBE_COLUMNS // form.elements
        packed = _blocks(form, num_blocks) & 0xBF  # no number is 2 or more in such bytes, or NaN
        weight = form.decode(packed).to(dtype).double().view(_PROBE_OUTPUTS, _PROBE_COLUMNS)
        x = torch.linspace(-1, 1, _PROBE_ROWS * _PROBE_COLUMNS).view(_PROBE_ROWS, -1).to(dtype)
        with _current(device):
            y = _kernels().linear(x.to(device), packed.to(device).view(-1), form, None).cpu()
        exact, size = x.double() @ weight.T, x.double().abs() @ weight.abs().T
        bound = _PROBE_COLUMNS * 2.0**-24 * size + torch.finfo(dtype).eps * exact.abs()
        return bool(((y.double() - exact).abs() <= bound).all())


def _blocks(form: type[BlockFormat], num_blocks: int) -> Tensor:
    """Blocks of bytes that are always the same, and look random."""
    mixed = torch.arange(num_blocks * form.nbytes, dtype=torch.int64) * 2654435761 >> 13
    return (mixed & 255).to(torch.uint8).view(num_blocks, form.nbytes)


def _asked(what: str, question: Callable[[], bool]) -> bool:
    """Answer a question to a kernel; one that fails or disagrees is named in the log."""
    try:
        if question():
            return True
        why = "other bits than torch's"
    except Exception as error:  # noqa: BLE001  a compiler of any make may stumble over anything
        why = f"{type(error).__name__}: {error}".partition("\n")[0]
    _log.warning("%s is not used here (%s): torch instead, slower", what, why)
    return False


@cache
def _kernels() -> Any:
    """The module of kernels, or None where there is no Triton."""
    try:
        return import_module("distorch.quant.triton_kernels")
    except ImportError as error:
        _log.warning("no Triton here (%s): torch decodes instead, slower", error)
        return None


def _current(device: torch.device) -> Any:
    """Make a device the current one: Triton launches there, on its current stream."""
    return torch.get_device_module(device).device(device)
