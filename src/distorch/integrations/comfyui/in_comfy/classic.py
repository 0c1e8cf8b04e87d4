"""A model that ComfyUI streams by itself (DynamicVRAM) becomes one that waits to be placed."""

from __future__ import annotations

from typing import Any

import comfy.model_management
from torch import nn

__all__ = ["classic", "settle"]


def classic(patcher: Any) -> Any:
    """Return a patcher for the same model that leaves its weights where they are put.

    One that is dynamic asks its loader for the model again, which costs little: the file is mapped,
    not read. Where it has no such loader, its own model is taken, with weights of the dtypes that
    the model was built for.
    """
    if not getattr(patcher, "is_dynamic", bool)():
        return patcher
    if patcher.cached_patcher_init is None:
        twin = patcher.clone(
            disable_dynamic=True, model_override=patcher.get_clone_model_override()
        )
    else:
        twin = _reloaded(patcher)
    settle(twin.model)
    return twin


def _reloaded(patcher: Any) -> Any:
    """Return a patcher as this one, for a model that its loader makes anew."""
    load, arguments, *place = patcher.cached_patcher_init
    found = load(*arguments, disable_dynamic=True)
    for index in place:
        found = found[index]
    comfy.model_management.unload_model_and_clones(found)  # a small text encoder is loaded at once
    twin = patcher.clone(disable_dynamic=True, model_override=found.get_clone_model_override())
    twin.parent = None  # the dynamic one and its model can go
    return twin


def settle(model: nn.Module) -> None:
    """Give weights that were taken from the file as they are the dtypes of their layers."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            wanted = getattr(module, f"{name}_comfy_model_dtype", None)
            plain = weight is not None and type(weight.data).__module__.startswith("torch")
            if weight is not None and plain and wanted is not None and weight.dtype != wanted:
                weight.data = weight.data.to(wanted)
