"""Packed blocks to floating point, into a buffer that is reused.

Fresh pages cost five times what reused ones do, so each thread keeps one scratch buffer, as large
as the largest weight it has decoded.
"""

from __future__ import annotations

import threading
from functools import cache

import torch
from torch import Tensor

from distorch.quant.block_formats import BLOCK_FORMATS, BlockFormat
from distorch.quant.native import Kernel, kernel

__all__ = ["dequantize", "scratch"]

_TILE_BLOCKS = 32768  # torch decodes through temporaries: small ones stay in the cache
_DEVICE_TILE_BLOCKS = 1 << 17  # on a device, launches cost more than temporaries
_PROBE_BLOCKS = 256


class _Scratch(threading.local):
    buffer: Tensor | None = None


_scratch = _Scratch()


def scratch(num_elements: int) -> Tensor:
    """Return this thread's float32 scratch of ``num_elements``; the next call hands it out again.

    A graph that saved the previous contents for backward will refuse to run, not use wrong bytes.
    """
    buffer = _scratch.buffer
    if buffer is None or buffer.numel() < num_elements:
        with torch.inference_mode(mode=False):
            buffer = _scratch.buffer = torch.empty(num_elements, dtype=torch.float32, device="cpu")
    torch.autograd.graph.increment_version(buffer)
    return buffer[:num_elements]


def dequantize(packed: Tensor, form: type[BlockFormat], out: Tensor) -> Tensor:
    """Decode contiguous uint8 ``packed`` blocks into ``out`` (float32, contiguous) and return it.

    >>> blocks = torch.zeros(34, dtype=torch.uint8); blocks[1] = 0x3C; blocks[2] = 7   # scale 1.0
    >>> dequantize(blocks, BLOCK_FORMATS["Q8_0"], torch.empty(32))[:2]
    tensor([7., 0.])
    """
    if packed.device.type == "cpu":
        _decode_on_host(packed, form.name, out)
    elif packed.device.type == "vgpu":
        torch.ops.distorch.decode(packed, form.name, out)  # its streams queue what torch calls
    else:
        _decode_by_torch(packed, form, out)
    return out


def _decode_on_host(packed: Tensor, name: str, out: Tensor) -> None:
    form, native = BLOCK_FORMATS[name], _trusted_kernel(name)
    if native is None:
        _decode_by_torch(packed, form, out)
    else:
        native(packed.data_ptr(), out.data_ptr(), packed.numel() // form.nbytes)


def _decode_by_torch(packed: Tensor, form: type[BlockFormat], out: Tensor) -> None:
    num_blocks = packed.numel() // form.nbytes
    blocks, decoded = packed.view(num_blocks, form.nbytes), out.view(num_blocks, form.elements)
    size = _TILE_BLOCKS if packed.device.type == "cpu" else _DEVICE_TILE_BLOCKS
    for first in range(0, num_blocks, size):
        tile = slice(first, first + size)
        decoded[tile] = form.decode(blocks[tile])


torch.library.define("distorch::decode", "(Tensor packed, str form, Tensor(a!) out) -> ()")
torch.library.impl("distorch::decode", "CPU", _decode_on_host)


@cache
def _trusted_kernel(name: str) -> Kernel | None:
    """The native kernel, if on this machine it agrees with the torch decoder bit for bit."""
    native, form = kernel(name), BLOCK_FORMATS[name]
    if native is None:
        return None
    with torch.inference_mode(mode=False), torch.device("cpu"):
        ramp = torch.arange(_PROBE_BLOCKS * form.nbytes, dtype=torch.int64) * 37 % 256
        blocks = ramp.to(torch.uint8).view(_PROBE_BLOCKS, form.nbytes)
        decoded = torch.empty(_PROBE_BLOCKS, form.elements, dtype=torch.float32)
        native(blocks.data_ptr(), decoded.data_ptr(), _PROBE_BLOCKS)
        expected = form.decode(blocks).contiguous()
        same = decoded.view(torch.int32) == expected.view(torch.int32)
        both_nan = decoded.isnan() & expected.isnan()  # a scale may be one, of any payload
    return native if bool((same | both_nan).all()) else None
