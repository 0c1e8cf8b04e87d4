"""Loaders of GGUF files under the class keys that saved workflows name; the reading is our own."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import folder_paths
import nodes as comfyui

from distorch.errors import MissingExtraError
from distorch.integrations.comfyui.in_comfy.loaders import Loader, node_class
from distorch.integrations.comfyui.table import GGUF_ROWS

__all__ = ["nodes"]

_DTYPES = (["default", "target", "float32", "float16", "bfloat16"], {"default": "default"})
_NUM_FILES = {"CLIPLoader": 1, "DualCLIPLoader": 2, "TripleCLIPLoader": 3, "QuadrupleCLIPLoader": 4}
_TYPES = {3: "sd3", 4: "hidream"}  # what three and four text encoders stand for


class GGUFModelLoader(Loader):
    """A loader of a diffusion model."""

    @classmethod
    def base_inputs(cls) -> Mapping[str, Any]:
        """Return the file, and for the advanced ones the dtypes."""
        inputs: dict[str, Any] = {"unet_name": (folder_paths.get_filename_list("unet_gguf"),)}
        if cls.row.base.endswith("Advanced"):
            inputs |= {
                "dequant_dtype": _DTYPES,
                "patch_dtype": _DTYPES,
                "patch_on_device": ("BOOLEAN", {"default": False}),
            }
        return {"required": inputs}

    def run_base(self, values: dict[str, Any], compute: str) -> tuple[Any, ...]:
        """Load the model that the file holds."""
        path = folder_paths.get_full_path_or_raise("unet_gguf", values.pop("unet_name"))
        return (_reader().load_model(path, **values),)


class GGUFClipLoader(Loader):
    """A loader of one text encoder, or of several that work together."""

    @classmethod
    def base_inputs(cls) -> Mapping[str, Any]:
        """Return the files, which may be of any kind, and what they stand for."""
        core = cls.row.base.removesuffix("GGUF")
        count = _NUM_FILES[core]
        names = (_clip_names(),)
        inputs: dict[str, Any] = (
            {"clip_name": names}
            if count == 1
            else {f"clip_name{index}": names for index in range(1, count + 1)}
        )
        if count not in _TYPES:
            inputs["type"] = comfyui.NODE_CLASS_MAPPINGS[core].INPUT_TYPES()["required"]["type"]
        return {"required": inputs}

    def run_base(self, values: dict[str, Any], compute: str) -> tuple[Any, ...]:
        """Load the text encoders of the files."""
        names = [value for name, value in values.items() if name.startswith("clip_name")]
        kind = values.get("type") or _TYPES[len(names)]
        return (_reader().load_clip([_clip_path(name) for name in names], kind),)


def _reader() -> Any:
    """The module that reads GGUF files, when one is read."""
    try:
        return import_module("distorch.integrations.comfyui.in_comfy.gguf_loader")
    except ImportError as error:
        raise MissingExtraError(
            f"GGUF files cannot be read: {error}", hint="pip install gguf"
        ) from error


def _clip_names() -> list[str]:
    names = folder_paths.get_filename_list("text_encoders")
    return sorted({*names, *folder_paths.get_filename_list("clip_gguf")})


def _clip_path(name: str) -> str:
    kind = "clip_gguf" if name.lower().endswith(".gguf") else "text_encoders"
    path: str = folder_paths.get_full_path_or_raise(kind, name)
    return path


def _register_folders() -> None:
    """Tell ComfyUI which files are GGUF, as the pack ComfyUI-GGUF does where it is installed."""
    known = folder_paths.folder_names_and_paths
    for kind, folder, legacy in (
        ("unet_gguf", "diffusion_models", "unet"),
        ("clip_gguf", "text_encoders", "clip"),
    ):
        paths = list(known[folder][0])
        paths += [path for path in known.get(legacy, ([],))[0] if path not in paths]
        seen = known.get(kind, ([], set()))[0]
        known[kind] = ([*seen, *(path for path in paths if path not in seen)], {".gguf"})


def nodes() -> dict[str, type]:
    """Return these nodes by their class keys."""
    _register_folders()
    found: dict[str, type] = {}
    for row in GGUF_ROWS:
        is_clip = "CLIP" in row.base
        kind = GGUFClipLoader if is_clip else GGUFModelLoader
        found[row.key] = node_class(row, kind, ("CLIP" if is_clip else "MODEL",))
    return found
