"""Loads and runs models in ComfyUI's own process, with patchers that say they are dynamic.

Without a GPU ComfyUI has no DynamicVRAM. What it changes for a loader is stood in for here: the
class of the patchers, so that weights are assigned as the file has them, and placing has to ask for
ordinary ones. It prints nothing and exits with 0 if all bits are the same.

usage: dynamic_script.py COMFYUI_DIR MODELS_DIR
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

TREE, MODELS = sys.argv[1], Path(sys.argv[2])
sys.argv = [sys.argv[0], "--cpu"]
sys.path[:0] = [TREE, str(Path(__file__).parents[2] / "src")]

import comfy.options  # noqa: E402 (its place was said just above)

comfy.options.enable_args_parsing()

import comfy.controlnet  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402

from distorch.integrations.comfyui.in_comfy.outputs import on_device, placed, spread  # noqa: E402
from distorch.integrations.comfyui.in_comfy.patcher import handle_in  # noqa: E402
from distorch.integrations.request import Request  # noqa: E402

PLACES = {
    "split": spread(Request(allocation="cpu,1mb;disk,*", compute="cpu")),
    "whole": on_device("cpu", "cpu"),
}


class Dynamic(comfy.model_patcher.ModelPatcher):  # type: ignore[misc]
    """A patcher that says what a dynamic one says, while it has nothing loaded."""

    def is_dynamic(self) -> bool:
        loaded = comfy.model_management.current_loaded_models
        return all(it.model is not self for it in loaded)


def load() -> dict[str, Any]:
    clip = comfy.sd.load_clip([str(MODELS / "text_encoders/clip_l.safetensors")])
    comfy.model_management.unload_all_models()  # ComfyUI loads a text encoder of the CPU at once
    vae = comfy.utils.load_torch_file(str(MODELS / "vae" / "taef1.safetensors"))
    halves = {name: weight.half() for name, weight in vae.items()}  # not the dtype it runs in
    return {
        "MODEL": comfy.sd.load_diffusion_model(str(MODELS / "diffusion_models/wan.safetensors")),
        "CLIP": clip,
        "VAE": comfy.sd.VAE(sd=halves),
        "CONTROL_NET": comfy.controlnet.load_controlnet(
            str(MODELS / "controlnet/flux_control.safetensors")
        ),
    }


def run(things: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Compute something with each; the ControlNet is only loaded."""
    torch.manual_seed(0)
    latent, context = torch.randn(1, 16, 2, 8, 8), torch.randn(1, 16, 4096)
    patcher = things["MODEL"]
    comfy.model_management.load_models_gpu([patcher])
    denoised = patcher.model.apply_model(latent, torch.tensor([0.7]), c_crossattn=context)
    clip = things["CLIP"]
    text = clip.encode_from_tokens(clip.tokenize("a cat"))
    control = things["CONTROL_NET"].copy().get_models()
    comfy.model_management.load_models_gpu(control)
    weights = {name: weight.sum() for name, weight in control[0].model.named_parameters()}
    return {
        "MODEL": denoised,
        "CLIP": text,
        "VAE": things["VAE"].decode(torch.randn(1, 16, 8, 8)),
        "CONTROL_NET": torch.stack([weights[name].float() for name in sorted(weights)]),
    }


def patchers(things: dict[str, Any]) -> list[Any]:
    clip, vae, control = (things[kind] for kind in ("CLIP", "VAE", "CONTROL_NET"))
    return [things["MODEL"], clip.patcher, vae.patcher, control.control_model_wrapped]


@torch.inference_mode()
def main() -> None:
    plain = run(load())
    comfy.model_patcher.CoreModelPatcher = Dynamic
    for name, place in PLACES.items():
        things = {kind: placed(kind, thing, place) for kind, thing in load().items()}
        assert not any(patcher.is_dynamic() for patcher in patchers(things)), name
        found = run(things)
        for kind, value in plain.items():
            assert torch.equal(found[kind], value), (name, kind)
        split = [handle_in(patcher) is not None for patcher in patchers(things)]
        assert split == [name == "split"] * len(split), (name, split)


if __name__ == "__main__":
    main()
