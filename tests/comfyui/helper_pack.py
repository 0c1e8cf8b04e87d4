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
        return {"tokens": tokens, "pooled": extra["pooled_output"]}


class SavePixels(_Saver):
    KIND = "IMAGE"

    def tensors(self, it: Any) -> dict[str, torch.Tensor]:
        return {"pixels": it}


class SaveSamples(_Saver):
    KIND = "LATENT"

    def tensors(self, it: Any) -> dict[str, torch.Tensor]:
        return {"samples": it["samples"]}


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


NODE_CLASS_MAPPINGS = {
    cls.__name__: cls
    for cls in (RandomConditioning, SaveConditioning, SavePixels, SaveSamples, SavePlacement)
}
