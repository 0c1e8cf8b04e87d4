"""Which tensors of a checkpoint are scales of others: pure, from names.

Files of 8-bit weights hold what each weight is to be multiplied by as a tensor beside it. The names
are those of ComfyUI (``scale_weight``, later ``weight_scale``), of compressed-tensors and
transformers (``weight_scale``; ``weight_scale_inv``, which is multiplied by all the same), and of
torchao (``_weight_qdata`` with ``_weight_scale``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from distorch.formats.dtypes import TensorInfo

__all__ = ["Scaled", "pair_scales"]

_SCALES: Final = ("scale_weight", "weight_scale", "weight_scale_inv", "_weight_scale")
_DESCRIPTION: Final = "comfy_quant"  # JSON, the name of a layout
_OF_ACTIVATIONS: Final = ("scale_input", "input_scale", "output_scale", "k_scale", "v_scale")
_MARKER: Final = "scaled_fp8"  # says that a file of ComfyUI's has scales
_TORCHAO: Final = "_weight_qdata"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled:
    """A checkpoint's tensors without the scales; these by the weight that each is for.

    ``descriptions`` are tensors that say in JSON how a weight is stored; ``unused`` are names of
    tensors that only concern activations.
    """

    tensors: Mapping[str, TensorInfo]
    scales: Mapping[str, TensorInfo] = field(default_factory=dict)
    descriptions: Mapping[str, TensorInfo] = field(default_factory=dict)
    unused: tuple[str, ...] = ()


def pair_scales(tensors: Mapping[str, TensorInfo]) -> Scaled:
    """Tell a checkpoint's weights from their scales.

    >>> from pathlib import Path
    >>> names = ["up.weight", "up.scale_weight", "up.scale_input", "up.bias"]
    >>> found = pair_scales({name: TensorInfo(name, "F32", (), 0, 4, Path("x")) for name in names})
    >>> [*found.tensors], {weight: scale.name for weight, scale in found.scales.items()}
    (['up.weight', 'up.bias'], {'up.weight': 'up.scale_weight'})
    """
    weights: dict[str, TensorInfo] = {}
    scales: dict[str, TensorInfo] = {}
    descriptions: dict[str, TensorInfo] = {}
    unused: list[str] = []
    for name, info in tensors.items():
        module, _, leaf = name.rpartition(".")
        weight = f"{module}.weight" if module else "weight"
        stored = f"{module}.{_TORCHAO}" if module else _TORCHAO
        if leaf == _TORCHAO:
            weights[weight] = info
        elif leaf in _SCALES and (weight in tensors or stored in tensors):
            scales[weight] = info
        elif leaf == _DESCRIPTION:
            descriptions[weight] = info
        elif leaf in _OF_ACTIVATIONS or leaf == _MARKER:
            unused.append(name)
        else:
            weights[name] = info
    if not scales:
        return Scaled(tensors=tensors)
    return Scaled(tensors=weights, scales=scales, descriptions=descriptions, unused=tuple(unused))
