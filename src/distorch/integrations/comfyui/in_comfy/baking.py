"""LoRA that is applied to weights where they rest, since no function of the layer can apply it."""

from __future__ import annotations

from typing import Any

import comfy.lora
import comfy.utils
from torch import nn

__all__ = ["baked_keys", "bakes_anew"]


def baked_keys(patcher: Any) -> list[str]:
    """Return the names of weights with a LoRA whose layers take no functions.

    A layer with others inside it is left out (its own modulation, in Wan): ComfyUI skips it too.
    """
    return [key for key in patcher.patches if _takes_no_function(patcher.model, key)]


def bakes_anew(patcher: Any) -> bool:
    """Say whether a LoRA has come that changes weights at rest: those that are placed come back."""
    if patcher.model.current_weight_patches_uuid == patcher.patches_uuid:
        return False
    return bool(baked_keys(patcher)) or any(_reshapes(patcher, key) for key in patcher.patches)


def _takes_no_function(model: nn.Module, key: str) -> bool:
    path, _, name = key.rpartition(".")
    owner = model.get_submodule(path)
    if name in {"weight", "bias"} and hasattr(owner, "comfy_cast_weights"):
        return False
    return len(list(owner.parameters())) == len(list(owner.parameters(recurse=False)))


def _reshapes(patcher: Any, key: str) -> bool:
    """Say whether a LoRA changes a weight's shape; newer versions then apply it at rest."""
    shape_of = getattr(comfy.lora, "calculate_shape", None)  # older ones have no such function
    weight = comfy.utils.get_attr(patcher.model, key)
    return shape_of is not None and shape_of(patcher.patches[key], weight, key) != weight.shape
