"""Workflows of the tests, in the form that ComfyUI's server takes."""

from __future__ import annotations

from typing import Any

Node = dict[str, Any]
Graph = dict[str, Node]


def node(kind: str, **inputs: Any) -> Node:
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
        "sampled": _sampler("model", "positive", "negative", seed, steps, "simple"),
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


def painted(loader: Node, name: str, *, control: Node | None = None, lora: float = 0) -> Graph:
    """Encode, sample and decode with a loader of all three parts.

    ``control`` is the node of a ControlNet; ``lora`` the strength of one on the first two parts.
    """
    found = {
        "model": loader,
        "lora": _lora_of_both(lora),
        "text": node("CLIPTextEncode", text="a cat", clip=["lora", 1]),
        "empty": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "sampled": _sampler("lora", "text", "text", 3, 2, "normal"),
        "pixels": node("VAEDecode", samples=["sampled", 0], vae=["model", 2]),
        "saved": node("SavePixels", it=["pixels", 0], name=name),
    }
    if control is not None:
        found |= {"control": control, **guided("text", 64)}
        found["sampled"]["inputs"] |= {"positive": ["guided", 0], "negative": ["guided", 1]}
    return found


def guided(text: str, size: int) -> Graph:
    """Guide the conditioning that node ``text`` gives by the ControlNet of node ``control``."""
    return {
        "picture": node("EmptyImage", width=size, height=size, batch_size=1, color=0x4080C0),
        "guided": node(
            "ControlNetApplyAdvanced",
            positive=[text, 0],
            negative=[text, 0],
            control_net=["control", 0],
            image=["picture", 0],
            strength=1.0,
            start_percent=0.0,
            end_percent=1.0,
        ),
    }


def split_checkpoint(device: str, line: str) -> Node:
    """The loader of Stable Diffusion 1.5 whose model and text encoder both rest by ``line``."""
    inputs: dict[str, Any] = {"ckpt_name": "sd15.safetensors", "vae_device": device}
    for part in ("unet", "clip"):
        inputs |= {
            f"{part}_compute_device": device,
            f"{part}_virtual_vram_gb": 0.0,
            f"{part}_donor_device": "cpu",
            f"{part}_expert_mode_allocations": line,
        }
    return node("CheckpointLoaderAdvancedDisTorch2MultiGPU", **inputs)


def _sampler(
    model: str, positive: str, negative: str, seed: int, steps: int, scheduler: str
) -> Node:
    return node(
        "KSampler",
        model=[model, 0],
        positive=[positive, 0],
        negative=[negative, 0],
        latent_image=["empty", 0],
        seed=seed,
        steps=steps,
        cfg=2.0,
        sampler_name="euler",
        scheduler=scheduler,
        denoise=1.0,
    )


def _lora_of_both(strength: float) -> Node:
    return node(
        "LoraLoader",
        model=["model", 0],
        clip=["model", 1],
        lora_name="sd15_lora.safetensors",
        strength_model=strength,
        strength_clip=strength,
    )
