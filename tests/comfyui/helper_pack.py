"""A pack of nodes that the tests bring: random conditioning, and files to compare bit by bit.

It runs inside ComfyUI.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import folder_paths
import torch
from safetensors.torch import save_file


class RandomConditioning:
    """Conditioning without a text encoder."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        return {"required": {name: ("INT", {"max": 2**31}) for name in ("width", "pooled", "seed")}}

    def run(self, width: int, pooled: int, seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randn(1, 16, width, generator=generator)
        extra = {"pooled_output": torch.randn(1, pooled, generator=generator)} if pooled else {}
        return ([[tokens, extra]],)


class _Saver:
    RETURN_TYPES: tuple[str, ...] = ()
    FUNCTION = "run"
    OUTPUT_NODE = True
    KIND = ""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        return {"required": {"it": (cls.KIND,), "name": ("STRING", {})}}

    def run(self, it: Any, name: str) -> Any:
        path = Path(folder_paths.get_output_directory()) / f"{name}.safetensors"
        save_file({key: value.contiguous() for key, value in self.tensors(it).items()}, path)
        return {}

    def tensors(self, it: Any) -> dict[str, torch.Tensor]:
        raise NotImplementedError


class SaveConditioning(_Saver):
    KIND = "CONDITIONING"

    def tensors(self, it: Any) -> dict[str, torch.Tensor]:
        (tokens, extra), *_ = it
        found = {"tokens": tokens, "pooled": extra["pooled_output"]}
        return {name: each for name, each in found.items() if each is not None}


class SavePixels(_Saver):
    KIND = "IMAGE"

    def tensors(self, it: Any) -> dict[str, torch.Tensor]:
        return {"pixels": it}


class SaveSamples(_Saver):
    KIND = "LATENT"

    def tensors(self, it: Any) -> dict[str, torch.Tensor]:
        return {"samples": it["samples"]}


class SaveVision(_Saver):
    KIND = "CLIP_VISION_OUTPUT"

    def tensors(self, it: Any) -> dict[str, torch.Tensor]:
        names = ("last_hidden_state", "image_embeds", "penultimate_hidden_states")
        return {name: it[name] for name in names}


class TextAfter:
    """A text that waits for a latent, so that a loader comes after a sampler."""

    RETURN_TYPES = ("STRING",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        return {"required": {"after": ("LATENT",), "text": ("STRING", {})}}

    def run(self, after: Any, text: str) -> Any:  # noqa: ARG002 (it only comes first)
        return (text,)


class SaveLoaded:
    """Writes which models ComfyUI has loaded when a loader has run."""

    RETURN_TYPES: tuple[str, ...] = ()
    FUNCTION = "run"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        return {"required": {"after": ("MODEL",), "name": ("STRING", {})}}

    def run(self, after: Any, name: str) -> Any:  # noqa: ARG002 (it only comes first)
        import comfy.model_management

        held = [it for it in comfy.model_management.loaded_models() if it is not None]
        loaded = [type(it.model).__name__ for it in held]
        path = Path(folder_paths.get_output_directory()) / f"{name}.json"
        path.write_text(json.dumps(loaded), encoding="utf-8")
        return {}


class SavePlacement:
    """Writes where a model rests, after the latent is there; and how often it was placed."""

    RETURN_TYPES: tuple[str, ...] = ()
    FUNCTION = "run"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        return {"required": {"model": ("MODEL",), "after": ("LATENT",), "name": ("STRING", {})}}

    def run(self, model: Any, after: Any, name: str) -> Any:  # noqa: ARG002 (it only comes first)
        from distorch.integrations.comfyui.in_comfy.patcher import handle_in

        handle = handle_in(model)
        found: dict[str, Any] = {"class": type(model).__name__, "device": str(model.load_device)}
        if handle is not None:
            found |= {
                "bytes": dict(handle.plan.bytes_by_tier),
                "id": id(handle),
                "steps": handle.stats().num_steps,
            }
        path = Path(folder_paths.get_output_directory()) / f"{name}.json"
        path.write_text(json.dumps(found), encoding="utf-8")
        return {}


class LTXVLoader:
    """Stands for a loader of another pack, whose outputs ComfyUI knows."""

    RETURN_TYPES = ("MODEL", "VAE")
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        return {"required": {"ckpt_name": ("STRING", {}), "dtype": (["bfloat16", "float32"],)}}

    def run(self, ckpt_name: str, dtype: str) -> Any:  # noqa: ARG002 (as the pack has it)
        import comfy.sd

        path = folder_paths.get_full_path_or_raise("diffusion_models", ckpt_name)
        return comfy.sd.load_diffusion_model(path), None


class LoadWanVideoT5TextEncoder:
    """Stands for a loader of another pack, which has a word of its own for where it loads."""

    RETURN_TYPES = ("WANTEXTENCODER",)
    RETURN_NAMES = ("wan_t5_model",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        places = (["main_device", "offload_device"], {"default": "offload_device"})
        return {"required": {"model_name": ("STRING", {})}, "optional": {"load_device": places}}

    def run(self, model_name: str, load_device: str = "neither") -> Any:
        return (f"{model_name} {load_device}",)


class SaveWords:
    """Writes a text encoder of another pack, here a text, and the device that was handed on."""

    RETURN_TYPES: tuple[str, ...] = ()
    FUNCTION = "run"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        kinds = {"it": "WANTEXTENCODER", "device": "MULTIGPUDEVICE", "name": "STRING"}
        return {"required": {name: (kind,) for name, kind in kinds.items()}}

    def run(self, it: str, device: str, name: str) -> Any:
        path = Path(folder_paths.get_output_directory()) / f"{name}.json"
        path.write_text(json.dumps([it, device]), encoding="utf-8")
        return {}


NODE_CLASS_MAPPINGS = {
    cls.__name__: cls
    for cls in (
        RandomConditioning,
        SaveConditioning,
        SavePixels,
        SaveSamples,
        SaveVision,
        TextAfter,
        SaveLoaded,
        SavePlacement,
        LTXVLoader,
        LoadWanVideoT5TextEncoder,
        SaveWords,
    )
}
