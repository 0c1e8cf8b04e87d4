"""Puts what a loader returns where it shall be: whole on one device, or spread as a request says.

Each thing that ComfyUI hands from node to node owns a patcher somewhere. It is copied, and the copy
gets a patcher of its own; what came in stays as it was.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import comfy.model_management
import torch

from distorch.integrations.comfyui.in_comfy.classic import classic
from distorch.integrations.comfyui.in_comfy.patcher import adopt
from distorch.integrations.request import Request

__all__ = ["Placer", "eject_models", "loaded_patchers", "on_device", "placed", "spread"]

Placer = Callable[[Any], Any]  # from a patcher to one that places its model

_log = logging.getLogger("distorch")


def on_device(name: str, offload: str | None = None) -> Placer:
    """Return what puts a model whole on one device, with ComfyUI's own way of loading it."""
    waiting = None if offload is None else torch.device(offload)
    return partial(_move, device=torch.device(name), offload=waiting)


def spread(request: Request) -> Placer:
    """Return what rests a model's weights in several memories."""
    return partial(_spread, request=request)


def placed(kind: str, thing: Any, place: Placer) -> Any:
    """Return ``thing``, an output of type ``kind``, with its model placed.

    What has no model of its own, such as a part that the checkpoint lacks, is returned as it is.
    """
    if thing is None or kind not in _KINDS:
        return thing
    return _KINDS[kind](thing, place)


def eject_models() -> None:
    """Unload every model that ComfyUI has loaded, on all devices."""
    for device in {patcher.load_device for patcher in loaded_patchers()}:
        comfy.model_management.free_memory(1e30, device)


def loaded_patchers() -> list[Any]:
    """Return the owner of each model that ComfyUI has loaded; it lists a forgotten one as None."""
    found = comfy.model_management.loaded_models()
    return [patcher for patcher in found if patcher is not None]


def _move(patcher: Any, *, device: torch.device, offload: torch.device | None) -> Any:
    if patcher.load_device == device and offload is None:
        return patcher
    before = patcher.load_device
    twin = classic(patcher).clone()
    twin.load_device = device
    if offload is not None or device.type == "cpu":
        twin.offload_device = offload or device
    return _suited(twin, before)


def _spread(patcher: Any, *, request: Request) -> Any:
    return _suited(adopt(patcher, request), patcher.load_device)


def _suited(patcher: Any, before: torch.device) -> Any:
    """Let a model compute in a dtype that its device has, if it is of another kind than before."""
    if patcher.load_device.type == before.type or not hasattr(patcher.model, "manual_cast_dtype"):
        return patcher
    dtype = comfy.model_management.unet_manual_cast(patcher.model_dtype(), patcher.load_device)
    if dtype is not None:
        patcher.set_model_compute_dtype(dtype)
    return patcher


def _model(patcher: Any, place: Placer) -> Any:
    return place(patcher)


def _clip(clip: Any, place: Placer) -> Any:
    twin = clip.clone()
    twin.patcher = place(clip.patcher)
    twin.cond_stage_model = twin.patcher.model
    return twin


def _vae(vae: Any, place: Placer) -> Any:
    if getattr(vae, "patcher", None) is None:  # stands for a VAE that the checkpoint lacks
        return vae
    twin = copy.copy(vae)
    twin.patcher = place(vae.patcher)
    twin.first_stage_model = twin.patcher.model
    twin.device = twin.patcher.load_device
    return twin


def _clip_vision(vision: Any, place: Placer) -> Any:
    twin = copy.copy(vision)
    twin.patcher = place(vision.patcher)
    twin.model = twin.patcher.model
    twin.load_device = twin.patcher.load_device
    return twin


def _control_net(control: Any, place: Placer) -> Any:
    wrapped = getattr(control, "control_model_wrapped", None)
    if wrapped is None:
        name = type(control).__name__
        _log.warning("a %s has no weights that can be placed: ComfyUI loads it as usual", name)
        return control
    twin = control.copy()
    twin.control_model_wrapped = place(wrapped)
    twin.control_model = twin.control_model_wrapped.model
    twin.load_device = twin.control_model_wrapped.load_device
    return twin


_KINDS: dict[str, Callable[[Any, Placer], Any]] = {
    "MODEL": _model,
    "CLIP": _clip,
    "VAE": _vae,
    "CLIP_VISION": _clip_vision,
    "CONTROL_NET": _control_net,
}
