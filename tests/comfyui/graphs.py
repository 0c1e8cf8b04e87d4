"""Workflows of the tests, in the form that ComfyUI's server takes."""

from __future__ import annotations

from typing import Any

Graph = dict[str, dict[str, Any]]


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def sampled(
    model: Graph, name: str, *, latent: str = "flux", steps: int = 2, seed: int = 42
) -> Graph:
    """Sample with the model that node ``model`` gives; the latent goes to a file."""
    width, pooled = (768, 768) if latent == "flux" else (4096, 0)
    empty = (
        node("EmptySD3LatentImage", width=128, height=128, batch_size=1)
        if latent == "flux"
        else node("EmptyHunyuanLatentVideo", width=64, height=64, length=5, batch_size=1)
    )
    return {
        **model,
        "positive": node("RandomConditioning", width=width, pooled=pooled, seed=1),
        "negative": node("RandomConditioning", width=width, pooled=pooled, seed=2),
        "empty": empty,
        "sampled": node(
            "KSampler",
            model=["model", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["empty", 0],
            seed=seed,
            steps=steps,
            cfg=2.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        ),
        "saved": node("SaveSamples", it=["sampled", 0], name=name),
    }


def placement(graph: Graph, name: str) -> Graph:
    """Write down where the model rests, too."""
    saver = node("SavePlacement", model=["model", 0], after=["sampled", 0], name=name)
    return {**graph, "placement": saver}


def with_lora(graph: Graph, name: str, strength: float) -> Graph:
    """Put a LoRA between the loader and the rest."""
    lora = node(
        "LoraLoaderModelOnly",
        model=["loaded", 0],
        lora_name=f"{name}_lora.safetensors",
        strength_model=strength,
    )
    return {**graph, "loaded": graph["model"], "model": lora}


def decoded(vae: Graph, name: str) -> Graph:
    """Decode a latent of zeros; ``vae`` has a node of that name."""
    return {
        **vae,
        "empty": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        "pixels": node("VAEDecode", samples=["empty", 0], vae=["vae", 0]),
        "saved": node("SavePixels", it=["pixels", 0], name=name),
    }


def encoded(clip: Graph, name: str, text: str = "a cat in a hat") -> Graph:
    """Encode a text; ``clip`` has a node of that name."""
    return {
        **clip,
        "text": node("CLIPTextEncode", text=text, clip=["clip", 0]),
        "saved": node("SaveConditioning", it=["text", 0], name=name),
    }
