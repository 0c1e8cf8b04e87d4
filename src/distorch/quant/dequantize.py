"""Packed blocks to floating point, into a buffer that is reused.

Fresh pages cost five times what reused ones do, so each thread keeps one scratch buffer, as large
as the largest weight it has decoded.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

from distorch.quant.block_formats import BLOCK_FORMATS, BlockFormat
from distorch.quant.choice import GPUS, agrees, gpu_decoder, is_fused
from distorch.quant.native import Kernel, kernel

__all__ = ["decoder_of", "decoders_of", "dequantize", "scratch"]

_TILE_ELEMENTS = 1 << 20  # torch decodes through temporaries: small ones stay in the cache
_DEVICE_TILE_ELEMENTS = 1 << 25  # on a device, launches cost more than temporaries


class _Scratch(threading.local):
    buffer: Tensor | None = None


_scratch = _Scratch()


def scratch(num_elements: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return this thread's scratch for ``num_elements``; the next call hands it out again.

    A graph that saved the previous contents for backward will refuse to run, not use wrong bytes.
    """
    num_bytes = num_elements * dtype.itemsize
    buffer = _scratch.buffer
    if buffer is None or buffer.numel() < num_bytes:
        with torch.inference_mode(mode=False):
            buffer = _scratch.buffer = torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
    torch.autograd.graph.increment_version(buffer)
    return buffer[:num_bytes].view(dtype)


def dequantize(packed: Tensor, form: type[BlockFormat], out: Tensor) -> Tensor:
    """Decode contiguous uint8 ``packed`` blocks into ``out`` (contiguous) and return it.

    ``out`` is floating point of any width: what is narrower than float32 is rounded from it once,
    to the nearest, ties to even, as torch does.

    >>> blocks = torch.zeros(34, dtype=torch.uint8); blocks[1] = 0x3C; blocks[2] = 7   # scale 1.0
    >>> dequantize(blocks, BLOCK_FORMATS["Q8_0"], torch.empty(32))[:2]
    tensor([7., 0.])
    """
    if packed.device.type == "cpu":
        _decode_on_host(packed, form.name, out)
    elif packed.device.type in GPUS | {"vgpu"}:
        torch.ops.distorch.decode(packed, form.name, out)  # vgpu's streams queue what torch calls
    else:
        _decode_by_torch(packed, form, out)
    return out


def decoder_of(
    form: type[BlockFormat], device: torch.device | str, dtype: torch.dtype = torch.float32
) -> str:
    """Name what decodes a format on a device: a kernel or ``torch``, which is slower.

    >>> decoder_of(BLOCK_FORMATS["IQ2_S"], "cpu")
    'torch'
    """
    place = torch.device(device)
    if place.type in GPUS and gpu_decoder(form.name, place, dtype) is not None:
        fused = is_fused(form.name, place, dtype)
        return "Triton kernel, fused for few rows" if fused else "Triton kernel"
    on_host = place.type in {"cpu", "vgpu"}
    return "C kernel" if on_host and _trusted_kernel(form.name, dtype) else "torch"


def decoders_of(
    stored: Iterable[str], device: torch.device | str, dtype: torch.dtype
) -> dict[str, str]:
    """Name what decodes each packed format among ``stored``: one of fewer than 16 bits a weight.

    >>> decoders_of(["IQ2_S", "F32"], "cpu", torch.float32)
    {'IQ2_S': 'torch'}
    """
    forms = (BLOCK_FORMATS[name] for name in sorted({*stored} & BLOCK_FORMATS.keys()))
    packed = (form for form in forms if 8 * form.nbytes < 16 * form.elements)
    return {form.name: decoder_of(form, device, dtype) for form in packed}


def _decode_on_host(packed: Tensor, name: str, out: Tensor) -> None:
    form, native = BLOCK_FORMATS[name], _trusted_kernel(name, out.dtype)
    if native is None:
        _decode_by_torch(packed, form, out)
    else:
        native(packed.data_ptr(), out.data_ptr(), packed.numel() // form.nbytes)


def _decode_on_gpu(packed: Tensor, name: str, out: Tensor) -> None:
    decode = gpu_decoder(name, packed.device, out.dtype)
    if decode is None:
        _decode_by_torch(packed, BLOCK_FORMATS[name], out)
    else:
        decode(packed, out)


def _decode_by_torch(packed: Tensor, form: type[BlockFormat], out: Tensor) -> None:
    num_blocks = packed.numel() // form.nbytes
    blocks, decoded = packed.view(num_blocks, form.nbytes), out.view(num_blocks, form.elements)
    elements = _TILE_ELEMENTS if packed.device.type == "cpu" else _DEVICE_TILE_ELEMENTS
    size = elements // form.elements
    for first in range(0, num_blocks, size):
        tile = slice(first, first + size)
        decoded[tile] = form.decode(blocks[tile])


torch.library.define("distorch::decode", "(Tensor packed, str form, Tensor(a!) out) -> ()")
torch.library.impl("distorch::decode", "CPU", _decode_on_host)
for _device_type in GPUS:
    torch.library.impl("distorch::decode", _device_type.upper(), _decode_on_gpu)
torch.library.register_fake("distorch::decode", lambda *_: None)  # torch.compile: it only writes


@cache
def _trusted_kernel(name: str, dtype: torch.dtype) -> Kernel | None:
    """The native kernel, if on this machine it agrees with the torch decoder bit for bit."""
    native, form = kernel(name, dtype), BLOCK_FORMATS[name]
    if native is None:
        return None

    def decode(packed: Tensor, out: Tensor) -> None:
        native(packed.data_ptr(), out.data_ptr(), packed.numel() // form.nbytes)

    return native if agrees(decode, form, "cpu", dtype) else None
