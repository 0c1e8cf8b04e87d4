"""Shapes as they are stored: convolutions as rows of 256, the model's shape in the metadata."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

from distorch.errors import FormatError
from distorch.formats import Checkpoint, TensorInfo

__all__ = ["SHAPE_KEY", "folded", "logical_shape"]

SHAPE_KEY: Final = "comfy.gguf.orig_shape."
_FOLD: Final = 256  # elements of a folded row
_FOLD_FROM: Final = 512  # elements, as ComfyUI-GGUF has it


def folded(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return rows of 256 for a shape whose own rows do not pack, where there are enough.

    >>> folded((320, 4, 3, 3)), folded((320, 768))
    ((45, 256), (320, 768))
    """
    size = math.prod(shape)
    odd = len(shape) > 1 and shape[-1] % _FOLD and not size % _FOLD
    return (size // _FOLD, _FOLD) if odd and size >= _FOLD_FROM else shape


def logical_shape(checkpoint: Checkpoint, info: TensorInfo) -> tuple[int, ...]:
    """Return the shape that a tensor has in the model, where a GGUF file stores it folded."""
    given = checkpoint.metadata.get(SHAPE_KEY + info.name)
    if given is None:
        return info.shape
    sizes = given if isinstance(given, Iterable) and not isinstance(given, str) else ()
    shape = tuple(size for size in sizes if isinstance(size, int) and size >= 0)
    if math.prod(shape) != math.prod(info.shape):
        raise FormatError(
            f"{info.name:.100} of shape {info.shape} cannot be of {given!r:.60}",
            hint="download the file again, or convert the model again",
        )
    return shape
