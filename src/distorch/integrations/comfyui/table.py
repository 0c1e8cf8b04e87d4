"""Which nodes there are: class keys that saved workflows name, and what each of them loads.

Most are a loader of ComfyUI's with a kit of inputs added. What a loader asks for by itself is read
from it when ComfyUI asks, so that its newest options are there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distorch.integrations.comfyui.kits import (
    Kit,
    device_input,
    eject_input,
    expert_input,
    gib_input,
    inputs_of,
)
from distorch.integrations.comfyui.packs import PACK_ROWS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "GGUF_ROWS",
    "OWN_TITLES",
    "ROWS",
    "Row",
    "advanced_inputs",
    "merged",
    "placed_inputs",
    "titles",
]

_PLAIN = "multigpu"
_SPLIT = "multigpu/distorch_2"
_LEGACY = "multigpu/legacy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A node: a loader by its class key, and the kit that it gets."""

    key: str
    base: str
    kit: Kit
    category: str
    title: str


# Loaders that ComfyUI has, by class key: the kit that splits them, and what users call them.
_CORE: dict[str, tuple[Kit, str]] = {
    "UNETLoader": ("distorch2", "Load Diffusion Model"),
    "VAELoader": ("distorch2", "Load VAE"),
    "CLIPLoader": ("distorch2_clip", "Load CLIP"),
    "DualCLIPLoader": ("distorch2_clip", "Load Two CLIPs"),
    "TripleCLIPLoader": ("distorch2_clip", "Load Three CLIPs"),
    "QuadrupleCLIPLoader": ("distorch2_clip", "Load Four CLIPs"),
    "CLIPVisionLoader": ("distorch2_clip", "Load CLIP Vision"),
    "CheckpointLoaderSimple": ("distorch2", "Load Checkpoint"),
    "ControlNetLoader": ("distorch2", "Load ControlNet"),
    "DiffControlNetLoader": ("distorch2", "Load ControlNet (diff)"),
    "DiffusersLoader": ("distorch2", "Load Diffusers Folder"),
}

# Loaders of GGUF files, which are our own, by the class key that users know.
_GGUF: dict[str, tuple[Kit, str]] = {
    "UnetLoaderGGUF": ("distorch2", "Load Diffusion Model, GGUF"),
    "UnetLoaderGGUFAdvanced": ("distorch2", "Load Diffusion Model, GGUF Advanced"),
    "CLIPLoaderGGUF": ("distorch2_clip", "Load CLIP, GGUF"),
    "DualCLIPLoaderGGUF": ("distorch2_clip", "Load Two CLIPs, GGUF"),
    "TripleCLIPLoaderGGUF": ("distorch2_clip", "Load Three CLIPs, GGUF"),
    "QuadrupleCLIPLoaderGGUF": ("distorch2_clip", "Load Four CLIPs, GGUF"),
}

OWN_TITLES = {
    "CheckpointLoaderAdvancedMultiGPU": "Load Checkpoint, Each Part Its Device",
    "CheckpointLoaderAdvancedDisTorch2MultiGPU": "Load Checkpoint, Each Part Its Place (DisTorch2)",
    "DeviceSelectorMultiGPU": "Select Device",
    "UNetLoaderLP": "Load Diffusion Model (LP)",
}


def _rows(base: str, kit: Kit, title: str) -> tuple[Row, Row]:
    plain = Row(
        key=f"{base}MultiGPU",
        base=base,
        kit="device",
        category=_PLAIN,
        title=f"{title} (Device)",
    )
    split = Row(
        key=f"{base}DisTorch2MultiGPU",
        base=base,
        kit=kit,
        category=_SPLIT,
        title=f"{title} (DisTorch2)",
    )
    return plain, split


def _legacy(base: str, title: str) -> Row:
    return Row(
        key=f"{base}DisTorchMultiGPU",
        base=base,
        kit="distorch",
        category=_LEGACY if base.startswith("Unet") else _PLAIN,
        title=f"{title} (DisTorch)",
    )


ROWS = tuple(row for base, (kit, title) in _CORE.items() for row in _rows(base, kit, title))
GGUF_ROWS = tuple(
    row
    for base, (kit, title) in _GGUF.items()
    for row in (*_rows(base, kit, title), _legacy(base, title))
)


def merged(base: Mapping[str, Any], kit: Kit, devices: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return a loader's inputs with those of a kit behind them, as optional ones.

    A ``device`` that the loader has by itself gives its place to the kit's.

    >>> base = {"required": {"vae_name": (["a"],)}}
    >>> list(merged(base, "device", ["cpu"])["optional"])
    ['device']
    """
    inputs = {group: dict(members) for group, members in base.items()}
    inputs.setdefault("required", {})
    inputs["optional"] = inputs.get("optional", {}) | inputs_of(kit, devices)
    return inputs


def advanced_inputs(names: Any, devices: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the inputs of the checkpoint loader that gives each part its device."""
    parts = ("unet", "clip", "vae")
    return {
        "required": {
            "ckpt_name": names,
            **{
                f"{part}_device": device_input(devices, f"The device of the {part.upper()}.")
                for part in parts
            },
        }
    }


def placed_inputs(names: Any, devices: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the inputs of the checkpoint loader that splits the UNet and the text encoder."""
    kept = "Kept for saved workflows: a LoRA is always applied at the model's own precision."
    donor = "The memory that lends its space: the host's, or another device's."
    return {
        "required": {
            "ckpt_name": names,
            "unet_compute_device": device_input(devices, "The device where the UNet computes."),
            "unet_virtual_vram_gb": gib_input(),
            "unet_donor_device": device_input(devices, donor, "cpu"),
            "clip_compute_device": device_input(devices, "Where the text encoder runs.", "cpu"),
            "clip_virtual_vram_gb": gib_input(default=2.0),
            "clip_donor_device": device_input(devices, donor, "cpu"),
            "vae_device": device_input(devices, "The device of the VAE."),
        },
        "optional": {
            "unet_expert_mode_allocations": expert_input(),
            "clip_expert_mode_allocations": expert_input(),
            "high_precision_loras": ("BOOLEAN", {"default": True, "tooltip": kept}),
            "eject_models": eject_input(default=True),
        },
    }


def titles() -> dict[str, str]:
    """Return what ComfyUI shows for the class keys of this table.

    >>> titles()["UNETLoaderDisTorch2MultiGPU"]
    'Load Diffusion Model (DisTorch2)'
    """
    found = {row.key: row.title for row in (*ROWS, *GGUF_ROWS)} | OWN_TITLES
    return found | {row.key: row.title for row in PACK_ROWS}
