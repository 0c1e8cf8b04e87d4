"""Floating point to packed blocks, in the bits of ggml's own quantisers."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import gguf
import torch
from torch import Tensor

from distorch.errors import MissingExtraError, ModelError
from distorch.formats import DTYPES

__all__ = ["Encode", "encoder"]

_DENSE = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}

Encode = Callable[[Tensor], Tensor]
"""Stores a contiguous float32 matrix, whose rows are whole blocks, as flat uint8."""


def encoder(name: str) -> Encode:
    """Return what stores weights in a dtype: a cast to a dense one, or packing in blocks.

    Raises:
        ModelError: weights cannot be stored so.
        MissingExtraError: packing them needs libgguf, which is not installed.

    >>> encoder("F8_E4M3")(torch.tensor([[1.0, -1.0]]))
    tensor([ 56, 184], dtype=torch.uint8)
    """
    if (dtype := _DENSE.get(name)) is not None:
        return lambda weights: weights.to(dtype).view(torch.uint8).view(-1)
    if name not in gguf.GGMLQuantizationType.__members__:
        raise ModelError(f"weights cannot be stored as {name} here", hint='"Q8_0", or "fp8_e4m3fn"')
    kind = gguf.GGMLQuantizationType[name]
    try:
        libgguf = import_module("libgguf")
    except ImportError as error:
        return _by_numpy(kind, error)
    if not libgguf.row_size(kind, DTYPES[name].block_elements):
        raise ModelError(f"libgguf cannot pack weights as {name}", hint='"Q4_K", or "Q8_0"')
    if libgguf.quantize_requires_imatrix(kind):
        raise ModelError(
            f"{name} needs a measurement of which weights matter, which is not known here",
            hint='"IQ2_S", or "Q2_K"',
        )
    return lambda weights: torch.from_numpy(
        libgguf.quantize_rows(weights.numpy(), kind).reshape(-1).view("u1")
    )


def _by_numpy(kind: gguf.GGMLQuantizationType, error: ImportError) -> Encode:
    """Pack by gguf itself: the same bits, for the formats that it can write."""
    try:
        gguf.quants.quantize(torch.zeros(1, 256).numpy(), kind)
    except NotImplementedError:
        raise MissingExtraError(
            f"packing weights as {kind.name} needs libgguf, which is not installed",
            hint='pip install "distorch[convert]"',
        ) from error
    return lambda weights: torch.from_numpy(
        gguf.quants.quantize(weights.numpy(), kind).reshape(-1).view("u1")
    )
