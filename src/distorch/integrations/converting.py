"""Weights brought into another format as they are read."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from distorch.formats import TensorInfo
from distorch.integrations.resting import TORCH_DTYPES
from distorch.quant.block_formats import block_format
from distorch.quant.dequantize import dequantize, scratch
from distorch.quant.quantize import encoder
from distorch.quant.scale import Scale
from distorch.tiers.converted import Conversion

__all__ = ["conversion"]

_log = logging.getLogger("distorch")


def conversion(stored: TensorInfo, dtype: str, scale: Scale | None = None) -> Conversion:
    """Return what brings the rows of a tensor into ``dtype``, by way of float32.

    Values that are no numbers, or too large for ``dtype``, are warned of once.

    Raises:
        ModelError: weights cannot be stored so.
        MissingExtraError: packing them needs a package that is not installed.
    """
    form, encode = block_format(stored.dtype, stored.name), encoder(dtype)
    columns = stored.shape[-1]
    largest = torch.finfo(TORCH_DTYPES.get(dtype, torch.float32)).max
    warned = False

    def convert(raw: memoryview, rows: slice, out: memoryview) -> None:
        nonlocal warned
        weights = scratch((rows.stop - rows.start) * columns).view(-1, columns)
        dequantize(torch.frombuffer(raw, dtype=torch.uint8), form, weights)
        if scale is not None:
            scale.rows(rows).multiply(weights)
        peak = _peak(weights)
        if not warned and not peak <= largest:
            warned = True
            _log.warning("%s holds weights (%s) that %s cannot hold", stored.name, peak, dtype)
        torch.frombuffer(out, dtype=torch.uint8).copy_(encode(weights))

    return Conversion(stored, convert)


def _peak(weights: Tensor) -> float:
    """The largest absolute value; not a number if one is none."""
    low, high = weights.aminmax()
    return float(torch.maximum(-low, high))
