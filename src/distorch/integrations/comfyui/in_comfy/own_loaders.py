"""Loaders whose inputs are our own: a checkpoint part by part, a device to hand on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import nodes as comfyui

from distorch.integrations.comfyui.in_comfy.devices import device_names, validator
from distorch.integrations.comfyui.in_comfy.loaders import run_node
from distorch.integrations.comfyui.in_comfy.outputs import eject_models, on_device, placed, spread
from distorch.integrations.comfyui.kits import check_device, request_of
from distorch.integrations.comfyui.table import advanced_inputs, placed_inputs

__all__ = ["nodes"]

_CHECKPOINT = "CheckpointLoaderSimple"


def _checkpoint_names() -> Any:
    inputs = comfyui.NODE_CLASS_MAPPINGS[_CHECKPOINT].INPUT_TYPES()
    return inputs["required"]["ckpt_name"]


def _load_checkpoint(name: str) -> tuple[Any, ...]:
    return run_node(comfyui.NODE_CLASS_MAPPINGS[_CHECKPOINT], {"ckpt_name": name})


class CheckpointLoaderAdvanced:
    """Loads a checkpoint, each of its parts on a device of its own."""

    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    FUNCTION = "load"
    CATEGORY = "multigpu"
    DESCRIPTION = __doc__
    VALIDATE_INPUTS = classmethod(validator(("unet_device", "clip_device", "vae_device")))

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:  # noqa: N802 (ComfyUI's name)
        """Return the checkpoint and three devices."""
        return advanced_inputs(_checkpoint_names(), device_names())

    def load(
        self, ckpt_name: str, unet_device: str, clip_device: str, vae_device: str
    ) -> tuple[Any, ...]:
        """Load, and put each part where it shall be."""
        here = device_names()
        places = [
            on_device(check_device(it, here)) for it in (unet_device, clip_device, vae_device)
        ]
        found = _load_checkpoint(ckpt_name)
        return tuple(map(placed, self.RETURN_TYPES, found, places))


class CheckpointLoaderAdvancedDisTorch2:
    """Loads a checkpoint; its UNet and its text encoder rest in several memories."""

    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    FUNCTION = "load"
    CATEGORY = "multigpu/distorch_2"
    DESCRIPTION = __doc__
    VALIDATE_INPUTS = classmethod(
        validator(
            (
                "unet_compute_device",
                "unet_donor_device",
                "clip_compute_device",
                "clip_donor_device",
                "vae_device",
            )
        )
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:  # noqa: N802 (ComfyUI's name)
        """Return the checkpoint, and where its parts rest and compute."""
        return placed_inputs(_checkpoint_names(), device_names())

    def load(
        self, ckpt_name: str, vae_device: str, *, eject_models: bool = True, **values: Any
    ) -> tuple[Any, ...]:
        """Load, and place each part as it was asked."""
        here = device_names()
        places = [
            spread(request_of("distorch2", _of("unet_", values), here)),
            spread(request_of("distorch2", _of("clip_", values), here)),
            on_device(check_device(vae_device, here)),
        ]
        if eject_models:
            _eject_models()
        found = _load_checkpoint(ckpt_name)
        return tuple(map(placed, self.RETURN_TYPES, found, places))


_eject_models = eject_models


def _of(part: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of one part's inputs, by the names that they have in a kit."""
    return {
        name.removeprefix(part): value for name, value in values.items() if name.startswith(part)
    }


class DeviceSelector:
    """Names a device for the nodes behind it."""

    RETURN_TYPES = ("MULTIGPUDEVICE",)
    RETURN_NAMES = ("device",)
    FUNCTION = "select"
    CATEGORY = "multigpu"
    DESCRIPTION = __doc__
    VALIDATE_INPUTS = classmethod(validator(("device",)))

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:  # noqa: N802 (ComfyUI's name)
        """Return one device."""
        tooltip = "The device that the nodes behind this one use."
        return {"required": {"device": (device_names(), {"tooltip": tooltip})}}

    def select(self, device: str) -> tuple[str]:
        """Return the device's name."""
        return (check_device(device, device_names()),)


class UNetLoaderLP:
    """Loads a diffusion model as ComfyUI does; kept for the workflows that name it."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"
    CATEGORY = "loaders"
    DESCRIPTION = __doc__

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:  # noqa: N802 (ComfyUI's name)
        """Return the model's file."""
        inputs = comfyui.NODE_CLASS_MAPPINGS["UNETLoader"].INPUT_TYPES()
        return {"required": {"unet_name": inputs["required"]["unet_name"]}}

    def load(self, unet_name: str) -> tuple[Any, ...]:
        """Load."""
        values = {"unet_name": unet_name, "weight_dtype": "default"}
        return run_node(comfyui.NODE_CLASS_MAPPINGS["UNETLoader"], values)


def nodes() -> dict[str, type]:
    """Return these nodes by their class keys."""
    return {
        "CheckpointLoaderAdvancedMultiGPU": CheckpointLoaderAdvanced,
        "CheckpointLoaderAdvancedDisTorch2MultiGPU": CheckpointLoaderAdvancedDisTorch2,
        "DeviceSelectorMultiGPU": DeviceSelector,
        "UNetLoaderLP": UNetLoaderLP,
    }
