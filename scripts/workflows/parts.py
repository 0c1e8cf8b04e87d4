"""What several example workflows have in common."""

from __future__ import annotations

from workflows.flow import Flow, Node, Value

__all__ = [
    "SPLIT",
    "flux_encoders",
    "flux_parts",
    "image",
    "save_image",
    "save_video",
    "vae_on_second_card",
]

SPLIT: dict[str, Value] = {"compute_device": "cuda:0", "donor_device": "cpu", "eject_models": True}


def flux_encoders(
    f: Flow, kind: str, t5: str = "t5xxl_fp8_e4m3fn.safetensors", **options: str
) -> Node:
    """Add a loader of Flux' text encoders, of a kind."""
    return f(kind, clip_name1=t5, clip_name2="clip_l.safetensors", type="flux", **options)


def vae_on_second_card(f: Flow, name: str) -> Node:
    """Add the loader of a VAE."""
    return f("VAELoaderMultiGPU", vae_name=name, device="cuda:1")


def flux_parts(f: Flow) -> tuple[Node, Node, Node]:
    """Add loaders for Flux: the model on a card, text encoders on the host, VAE on a card."""
    unet = f(
        "UNETLoaderMultiGPU",
        unet_name="flux1-dev-fp8.safetensors",
        weight_dtype="fp8_e4m3fn",
        device="cuda:0",
    )
    clip = flux_encoders(f, "DualCLIPLoaderMultiGPU", device="cpu")
    return unet, clip, vae_on_second_card(f, "ae.safetensors")


def image(
    f: Flow, model: Node, clip: Node, vae: Node, latent: Node, text: str | Node, **sampler: Value
) -> None:
    """Add what comes after the loaders of an image model."""
    positive = f("CLIPTextEncode", text=text, clip=clip)
    if "guidance" in sampler:
        guidance = sampler.pop("guidance")
        positive = f("FluxGuidance", conditioning=positive, guidance=guidance)
    negative = (
        f("ConditioningZeroOut", conditioning=positive)
        if sampler.get("cfg", 1.0) == 1.0
        else f("CLIPTextEncode", text="blurry, low quality", clip=clip)
    )
    given: dict[str, Value] = {"positive": positive, "negative": negative, "latent_image": latent}
    save_image(f, f("KSampler", model=model, **given, **sampler), vae)


def save_image(f: Flow, sampled: Node, vae: Node) -> None:
    """Add what turns a sampler's output into a picture's file."""
    f("SaveImage", images=f("VAEDecode", samples=sampled, vae=vae))


def save_video(f: Flow, sampled: Node, vae: Node, fps: float = 24.0) -> None:
    """Add what turns a sampler's output into a video's file."""
    frames = f("VAEDecode", samples=sampled, vae=vae)
    f("SaveVideo", video=f("CreateVideo", images=frames, fps=fps))
