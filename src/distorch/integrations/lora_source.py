"""Where a LoRA comes from: a file or tensors, copied into memory of ours and looked through."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distorch.errors import FormatError
from distorch.formats import Checkpoint, open_checkpoint
from distorch.formats.adapter_file import AdapterFile, describe_adapters, read_config
from distorch.integrations.resting import TORCH_DTYPES
from distorch.tiers.memory import allocate, view_bytes

__all__ = ["LoraSource", "OpenedLora", "open_lora", "some"]

LoraSource = str | os.PathLike[str] | Mapping[str, Tensor]
"""A safetensors file, a directory with one, or tensors by name."""

_NUM_NAMED = 3


@dataclass(frozen=True, slots=True)
class OpenedLora:
    """The tensors of a LoRA, what they add to which module, and what to call it."""

    name: str
    tensors: Mapping[str, Tensor]
    found: AdapterFile


def open_lora(source: LoraSource) -> OpenedLora:
    """Read a LoRA; one whose numbers are not all finite is warned about.

    Raises:
        StorageError: there is no such file.
        FormatError: it is not a LoRA, or not a whole one.
    """
    config: Mapping[str, object] = {}
    if isinstance(source, Mapping):
        name, tensors = "lora", {key: _copied(key, tensor) for key, tensor in source.items()}
    else:
        with open_checkpoint(source) as checkpoint:
            if checkpoint.format != "safetensors":
                raise FormatError(f"{checkpoint.path} is a GGUF file", hint="a safetensors file")
            name, tensors = (
                str(checkpoint.path),
                {key: _read(checkpoint, key) for key in checkpoint},
            )
            config = read_config(checkpoint.path, checkpoint.metadata)

    def number(key: str) -> float:
        if tensors[key].numel() != 1:
            raise FormatError(f"{key!r} has the shape {tuple(tensors[key].shape)}, not one number")
        return float(tensors[key])

    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    try:
        found = describe_adapters(shapes, number, config)
    except FormatError as error:
        raise FormatError(f"{name}: {error.problem}", hint=error.hint) from error
    bad = [key for key, tensor in tensors.items() if not _is_finite(tensor)]
    if bad:
        problem = f"{name}: {len(bad)} tensors hold NaN or infinity: {some(bad)}"
        warnings.warn(problem, stacklevel=4)
    return OpenedLora(name, tensors, found)


def some(names: Sequence[str]) -> str:
    """Name a few of many.

    >>> some(["a", "b", "c", "d", "e"])
    "'a', 'b', 'c' and 2 more"
    """
    shown = ", ".join(repr(name) for name in names[:_NUM_NAMED])
    more = len(names) - _NUM_NAMED
    return f"{shown} and {more} more" if more > 0 else shown


def _copied(name: str, tensor: object) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise FormatError(f"{name!r} is a {type(tensor).__name__}, not a tensor")
    with torch.inference_mode(mode=False):  # a tensor that was made in it cannot be placed
        return tensor.detach().to("cpu", copy=True).contiguous()


def _read(checkpoint: Checkpoint, name: str) -> Tensor:
    info = checkpoint[name]
    if info.dtype not in TORCH_DTYPES:
        raise FormatError(
            f"{checkpoint.path}: {name!r} is stored as {info.dtype}, which torch does not have",
            hint="save the LoRA in F16, BF16 or F32",
        )
    raw = allocate(info.nbytes)
    if info.nbytes:
        view_bytes(raw)[:] = checkpoint.view(name)
    return raw.view(TORCH_DTYPES[info.dtype]).view(info.shape)


def _is_finite(tensor: Tensor) -> bool:
    whole = tensor.float() if tensor.itemsize == 1 else tensor  # eight bits have no such test
    return bool(torch.isfinite(whole).all())
