"""What several example workflows have in common."""
# ruff: noqa: INP001, ANN401  (a script's data; a flow is whoever describes)

from __future__ import annotations

from typing import Any

__all__ = ["image"]


def image(f: Any, model: Any, clip: Any, vae: Any, latent: Any, text: str, **sampler: Any) -> Any:
    """Add what comes after the loaders of an image model; return the sampler."""
    positive = f("CLIPTextEncode", text=text, clip=clip)
    if "guidance" in sampler:
        guidance = sampler.pop("guidance")
        positive = f("FluxGuidance", conditioning=positive, guidance=guidance)
    negative = (
        f("ConditioningZeroOut", conditioning=positive)
        if sampler.get("cfg", 1.0) == 1.0
        else f("CLIPTextEncode", text="blurry, low quality", clip=clip)
    )
    sampled = f(
        "KSampler",
        model=model,
        positive=positive,
        negative=negative,
        latent_image=latent,
        **sampler,
    )
    f("SaveImage", images=f("VAEDecode", samples=sampled, vae=vae))
    return sampled
