"""The example workflows of the nodes that place what any loader has loaded."""

from __future__ import annotations

from workflows.flow import Flow, Node
from workflows.parts import flux_encoders, save_image

__all__ = ["FLOWS"]

_UNET = {"unet_name": "flux1-dev-fp8.safetensors"}
_LINE = "cuda:0,4gb;cpu,*"


def _parts(f: Flow) -> tuple[Node, Node]:
    """Add the text encoders and the VAE of Flux."""
    clip = flux_encoders(f, "DualCLIPLoader")
    return clip, f("VAELoader", vae_name="ae.safetensors")


def _placed(f: Flow) -> Node:
    """Add Flux, a part of it at rest on the card."""
    return f("DistorchPlaceModel", model=f("UNETLoader", **_UNET), allocation=_LINE)


def _paint(f: Flow, model: Node, clip: Node, vae: Node, text: str) -> Node:
    """Add the rest of a Flux workflow; return the sampler."""
    encoded = f("CLIPTextEncode", text=text, clip=clip)
    sampled = f(
        "KSampler",
        model=model,
        positive=f("FluxGuidance", conditioning=encoded),
        negative=f("ConditioningZeroOut", conditioning=encoded),
        latent_image=f("EmptySD3LatentImage"),
    )
    save_image(f, sampled, vae)
    return sampled


def _place() -> Flow:
    f = Flow(
        "19 place a model that is loaded",
        "**Place Model** goes behind any loader: 4 GiB of the weights rest on `cuda:0`, the rest "
        "streams from RAM. Changing the line does not load the file again.",
    )
    model = _placed(f)
    _paint(f, model, *_parts(f), "a stone bridge in autumn")
    return f


def _auto() -> Flow:
    f = Flow(
        "20 keep memory free",
        "**Place Model, Keep Memory Free** leaves 6 GiB of the card free of weights, and says "
        "which line it came to.",
    )
    auto = f("DistorchAuto", model=f("UNETLoader", **_UNET), keep_free_gb=6.0)
    f("PreviewAny", source=auto[1])
    _paint(f, auto, *_parts(f), "a library with tall windows")
    return f


def _preview() -> Flow:
    f = Flow(
        "21 preview a plan",
        "**Preview Plan** shows, before anything runs, what would rest where. Nothing moves.",
    )
    model = f("UNETLoader", **_UNET)
    for line in ("cuda:0,4gb;cpu,*", "cuda:0,30%;cuda:1,*"):
        plan = f("DistorchPlan", model=model, allocation=line)
        f("PreviewAny", source=plan)
        f("PreviewImage", images=plan[1])
    return f


def _report() -> Flow:
    f = Flow(
        "22 memory and stall report",
        "**Report** waits for the sampler and says how many bytes were streamed and how long "
        "computing stood still for them.",
    )
    model = _placed(f)
    sampled = _paint(f, model, *_parts(f), "a harbour at sunrise")
    f("PreviewAny", source=f("DistorchReport", model=model, after=sampled))
    return f


def _donors() -> Flow:
    f = Flow(
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


def _lora() -> Flow:
    f = Flow(
        "24 lora before and after placing",
        "**LoRA anywhere.** One LoRA before Place Model and one behind it. Change a strength: no "
        "weight is loaded again.",
    )
    first = f(
        "LoraLoaderModelOnly",
        model=f("UNETLoader", **_UNET),
        lora_name="flux_realism_lora.safetensors",
        strength_model=0.8,
    )
    placed = f("DistorchPlaceModel", model=first, allocation=_LINE)
    second = f(
        "LoraLoaderModelOnly",
        model=placed,
        lora_name="flux_detail_lora.safetensors",
        strength_model=0.5,
    )
    _paint(f, second, *_parts(f), "a mountain hut, first snow")
    return f


def _everything() -> Flow:
    f = Flow(
        "25 place model, clip, vae and controlnet",
        "**Everything placed.** The text encoder rests on disk and computes on the card; the "
        "ControlNet computes where the model does.",
    )
    clip, vae = _parts(f)
    model = _placed(f)
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
    save_image(f, sampled, vae)
    return f


FLOWS = (_place, _auto, _preview, _report, _donors, _lora, _everything)
