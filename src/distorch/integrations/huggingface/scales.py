"""Reads the scales of a checkpoint's weights, and refuses what cannot be understood."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import torch

from distorch.errors import FormatError, ModelError
from distorch.formats import Checkpoint, TensorInfo
from distorch.formats.scales import Scaled
from distorch.integrations.resting import TORCH_DTYPES
from distorch.quant.scale import Scale

__all__ = ["read_scales"]

_log = logging.getLogger("distorch")
_SCALED = {"F8_E4M3", "F8_E5M2", "I8", "F16", "BF16", "F32"}
_SCALES = {"F16", "BF16", "F32"}
_COMFYUI = {"float8_e4m3fn", "float8_e5m2", "int8_tensorwise", "int8_blockwise"}
_HINT = "a file of fp8 or int8 weights with one scale for each tensor, row or tile"


def read_scales(
    checkpoint: Checkpoint, scaled: Scaled, tile: tuple[int, int] | None = None
) -> dict[str, Scale]:
    """Return the scale of each weight that has one; ``tile`` is the configuration's, if it has one.

    Scales that make a weight useless (zero, infinite, not a number) are warned of.

    Raises:
        ModelError: a scale has not the shape of its weight, or the weight is stored in an
            unknown way.
        FormatError: what a file says of its own weights cannot be read.
    """
    for name, form in _descriptions(checkpoint, scaled):
        if form not in _COMFYUI:
            raise ModelError(f"{name} is stored as {form!r}, which is not read yet", hint=_HINT)
    scales = {}
    odd = []
    for name, info in scaled.scales.items():
        weight = scaled.tensors[name]
        if weight.dtype not in _SCALED or info.dtype not in _SCALES:
            raise ModelError(
                f"{name} is stored as {weight.dtype} with a scale in {info.dtype}, which is not "
                "read yet",
                hint=_HINT,
            )
        raw = torch.frombuffer(bytearray(checkpoint.view(info.name)), dtype=torch.uint8)
        values = raw.view(TORCH_DTYPES[info.dtype]).view(info.shape)
        scale = Scale.fit(values, weight.shape, tile) if tile else Scale.fit(values, weight.shape)
        if scale is None:
            raise ModelError(_misfit(weight, info), hint=_HINT)
        scales[name] = scale
        if not bool((values.isfinite() & (values != 0)).all()):
            odd.append(info.name)
    if odd:
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        _log.warning("%s%s is zero, infinite or not a number in places", odd[0], more)
    return scales


def _misfit(weight: TensorInfo, scale: TensorInfo) -> str:
    return (
        f"{scale.name} of shape {list(scale.shape)} does not fit {weight.name} of shape "
        f"{list(weight.shape)}"
    )


def _descriptions(checkpoint: Checkpoint, scaled: Scaled) -> Iterator[tuple[str, str]]:
    """Names of weights, and of the layouts that ComfyUI's files say they have."""
    for name, info in scaled.descriptions.items():
        said = _json(bytes(checkpoint.view(info.name)), info.name)
        yield name, str(said.get("format"))
    text = checkpoint.metadata.get("_quantization_metadata")
    if isinstance(text, str):
        layers = _json(text, "_quantization_metadata").get("layers")
        for name, said in layers.items() if isinstance(layers, dict) else ():
            yield name, str(said.get("format") if isinstance(said, dict) else said)


def _json(text: str | bytes, name: str) -> dict[str, object]:
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{name} is not JSON: {error}", hint="download the file again") from error
    return said if isinstance(said, dict) else {}
