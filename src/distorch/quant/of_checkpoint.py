"""One weight of a file, decoded: the public door to every block format."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from difflib import get_close_matches

import torch
from torch import Tensor

from distorch.errors import ModelError
from distorch.formats import Checkpoint, TensorInfo
from distorch.formats.scales import pair_scales
from distorch.quant.block_formats import block_format
from distorch.quant.dequantize import dequantize as decode
from distorch.quant.scale import Scale

__all__ = ["dequantize"]

_MAY_HAVE_A_SCALE = {"F8_E4M3", "F8_E5M2", "I8"}


def dequantize(checkpoint: Checkpoint, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return one weight of an open checkpoint as a dense tensor, whatever it is stored as.

    In float32 a GGUF weight has the bits of ``gguf.quants.dequantize``; where that gives a NaN, so
    does this, of any payload. An 8-bit weight of a safetensors file is multiplied by its scale, if
    the file has one. Any other ``dtype`` is made from float32: rounded once, ties to even.

    Args:
        checkpoint: What ``open_checkpoint`` returned, not closed.
        name: The weight's name in the file.
        dtype: A floating-point dtype of torch.

    Returns:
        A tensor of its own on the CPU, in the shape that torch gives such a weight: outermost
        dimension first. It takes 4 bytes an element in float32, 2 in bfloat16 and float16.

    Raises:
        ModelError: there is no such weight, it is stored as what is no format of weights, or its
            scale has not its shape; the message names the weight and the file.
        StorageError: the file has shrunk, or the checkpoint is closed.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from distorch import open_checkpoint
    >>> header = b'{"w":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}'
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     file = Path(directory, "model.safetensors")
    ...     _ = file.write_bytes(len(header).to_bytes(8, "little") + header + bytes([0x38, 0xC0]))
    ...     with open_checkpoint(file) as checkpoint:
    ...         dequantize(checkpoint, "w", torch.bfloat16)
    tensor([ 1., -2.], dtype=torch.bfloat16)
    """
    tensors: Mapping[str, TensorInfo] = checkpoint
    scales: Mapping[str, TensorInfo] = {}
    if name not in tensors or tensors[name].dtype in _MAY_HAVE_A_SCALE:
        paired = pair_scales(checkpoint)  # which may also name the weight otherwise
        tensors, scales = {**checkpoint, **paired.tensors}, paired.scales
    if name not in tensors:
        close = get_close_matches(name, tensors, n=3, cutoff=0)
        raise ModelError(
            f"there is no weight {name!r:.200} among the {len(checkpoint)} of {checkpoint.path}",
            hint=" or ".join(close) or "another file",
        )
    info = tensors[name]
    if name not in scales:
        return _decoded(checkpoint, info, dtype)
    weight = _decoded(checkpoint, info, torch.float32)
    values = _decoded(checkpoint, scales[name], torch.float32)
    scale = Scale.fit(values, info.shape)
    if scale is None:
        raise ModelError(
            f"{name} in {checkpoint.path} has the shape {list(info.shape)}, "
            f"and {scales[name].name} {list(values.shape)}",
            hint="a file with one scale for each tensor, row or tile",
        )
    scale.multiply(weight.view(info.shape[0] if info.shape else 1, -1))
    return weight.to(dtype)


def _decoded(checkpoint: Checkpoint, info: TensorInfo, dtype: torch.dtype) -> Tensor:
    form = block_format(info.dtype, f"{info.name} in {info.path}")
    if not dtype.is_floating_point or dtype.itemsize == 1:
        raise ModelError(f"{info.name} cannot be decoded to {dtype}", hint="dtype=torch.bfloat16")
    out = torch.empty(info.shape, dtype=dtype, device="cpu")
    stored = checkpoint.view(info.name)
    if not stored.nbytes:
        return out
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable", category=UserWarning)
        packed = torch.frombuffer(stored, dtype=torch.uint8)  # in the file's map, only read
    return decode(packed, form, out)
