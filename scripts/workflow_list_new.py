"""The example workflows of the new nodes."""
# ruff: noqa: INP001, ANN401  (a script's data; a flow is whoever describes)

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["new_flows"]

_UNET = {"unet_name": "flux1-dev-fp8.safetensors"}
_LORA = "flux_realism_lora.safetensors"


def new_flows(make: Callable[[str, str], Any]) -> Iterator[Any]:
    """Describe each workflow with ``make(name, note)``."""
    for describe in (_place, _auto, _preview, _report, _donors, _lora, _everything):
        yield describe(make)


def _parts(f: Any) -> tuple[Any, Any]:
    """Add the text encoders and the VAE of Flux."""
    clip = f(
        "DualCLIPLoader",
        clip_name1="t5xxl_fp8_e4m3fn.safetensors",
        clip_name2="clip_l.safetensors",
    )
    return clip, f("VAELoader", vae_name="ae.safetensors")


def _paint(f: Any, model: Any, clip: Any, vae: Any, text: str) -> Any:
    """Add the rest of a Flux workflow; return the sampler."""
    encoded = f("CLIPTextEncode", text=text, clip=clip)
    sampled = f(
        "KSampler",
        model=model,
        positive=f("FluxGuidance", conditioning=encoded),
        negative=f("ConditioningZeroOut", conditioning=encoded),
        latent_image=f("EmptySD3LatentImage"),
    )
    f("SaveImage", images=f("VAEDecode", samples=sampled, vae=vae))
    return sampled


def _place(make: Any) -> Any:
    f = make(
        "19 place a model that is loaded",
        "**Place Model** goes behind any loader: 4 GiB of the weights rest on `cuda:0`, the rest "
        "streams from RAM. Changing the line does not load the file again.",
    )
    model = f(
        "DistorchPlaceModel",
        model=f("UNETLoader", **_UNET),
        allocation="cuda:0,4gb;cpu,*",
    )
    _paint(f, model, *_parts(f), "a stone bridge in autumn")
    return f


def _auto(make: Any) -> Any:
    f = make(
        "20 keep memory free",
        "**Place Model, Keep Memory Free** leaves 6 GiB of the card free of weights, and says "
        "which line it came to.",
    )
    auto = f("DistorchAuto", model=f("UNETLoader", **_UNET), keep_free_gb=6.0)
    f("PreviewAny", source=auto[1])
    _paint(f, auto, *_parts(f), "a library with tall windows")
    return f


def _preview(make: Any) -> Any:
    f = make(
        "21 preview a plan",
        "**Preview Plan** shows, before anything runs, what would rest where. Nothing moves.",
    )
    model = f("UNETLoader", **_UNET)
    for line in ("cuda:0,4gb;cpu,*", "cuda:0,30%;cuda:1,*"):
        plan = f("DistorchPlan", model=model, allocation=line)
        f("PreviewAny", source=plan)
        f("PreviewImage", images=plan[1])
    return f


def _report(make: Any) -> Any:
    f = make(
        "22 memory and stall report",
        "**Report** waits for the sampler and says how many bytes were streamed and how long "
        "computing stood still for them.",
    )
    model = f(
        "DistorchPlaceModel",
        model=f("UNETLoader", **_UNET),
        allocation="cuda:0,4gb;cpu,*",
    )
    sampled = _paint(f, model, *_parts(f), "a harbour at sunrise")
    f("PreviewAny", source=f("DistorchReport", model=model, after=sampled))
    return f


def _donors(make: Any) -> Any:
    f = make(
        "23 several donors by name",
        "**Several donors.** 30 % of the weights rest on the card that computes, 40 % on the "
        "second card, the rest in RAM; all links work at once.",
    )
    model = f(
        "UNETLoaderDisTorch2MultiGPU",
        **_UNET,
        compute_device="cuda:0",
        expert_mode_allocations="cuda:0,30%;cuda:1,40%;cpu,*",
    )
    _paint(f, model, *_parts(f), "a beekeeper among lavender")
    return f


def _lora(make: Any) -> Any:
    f = make(
        "24 lora before and after placing",
        "**LoRA anywhere.** One LoRA before Place Model and one behind it. Change a strength: no "
        "weight is loaded again.",
    )
    first = f(
        "LoraLoaderModelOnly",
        model=f("UNETLoader", **_UNET),
        lora_name=_LORA,
        strength_model=0.8,
    )
    placed = f("DistorchPlaceModel", model=first, allocation="cuda:0,4gb;cpu,*")
    second = f(
        "LoraLoaderModelOnly",
        model=placed,
        lora_name="flux_detail_lora.safetensors",
        strength_model=0.5,
    )
    _paint(f, second, *_parts(f), "a mountain hut, first snow")
    return f


def _everything(make: Any) -> Any:
    f = make(
        "25 place model, clip, vae and controlnet",
        "**Everything placed.** The text encoder rests on disk and computes on the card; the "
        "ControlNet computes where the model does.",
    )
    clip, vae = _parts(f)
    model = f(
        "DistorchPlaceModel",
        model=f("UNETLoader", **_UNET),
        allocation="cuda:0,4gb;cpu,*",
    )
    clip = f("DistorchPlaceCLIP", clip=clip, allocation="cuda:0,1gb;disk,*")
    vae = f("DistorchPlaceVAE", vae=vae, allocation="cuda:0,*")
    control = f(
        "DistorchPlaceControlNet",
        control_net=f("ControlNetLoader", control_net_name="flux_canny.safetensors"),
        allocation="cuda:0,1gb;cpu,*",
    )
    encoded = f("CLIPTextEncode", text="a glass house in a forest", clip=clip)
    both = f(
        "ControlNetApplyAdvanced",
        positive=f("FluxGuidance", conditioning=encoded),
        negative=f("ConditioningZeroOut", conditioning=encoded),
        control_net=control,
        image=f("LoadImage"),
        strength=0.7,
        vae=vae,
    )
    sampled = f(
        "KSampler",
        model=model,
        positive=both,
        negative=both[1],
        latent_image=f("EmptySD3LatentImage"),
    )
    f("SaveImage", images=f("VAEDecode", samples=sampled, vae=vae))
    return f
