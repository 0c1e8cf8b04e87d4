"""The example workflows of Wan 2.2, by ComfyUI's own nodes: two models, one for high noise."""

from __future__ import annotations

from workflows.flow import Flow, Node, Value
from workflows.parts import SPLIT, save_image, save_video, vae_on_second_card

__all__ = ["FLOWS"]

_HIGH = "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors"
_LOW = "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors"
_T5 = "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
_VAE = "wan_2.1_vae.safetensors"
_LIGHT = "wan2.2_t2v_lightx2v_4steps_lora_v1.1_{}_noise.safetensors"


def _pair(
    f: Flow, virtual_vram_gb: float, donors: tuple[str, str], *, lora: bool
) -> tuple[Node, Node]:
    """Add the models for high and for low noise, each with its donor, and its LoRA if asked."""
    found = []
    for noise, file, donor in (("high", _HIGH, donors[0]), ("low", _LOW, donors[1])):
        model = f(
            "UNETLoaderDisTorch2MultiGPU",
            **SPLIT | {"unet_name": file, "donor_device": donor},
            virtual_vram_gb=virtual_vram_gb,
        )
        if lora:
            model = f("LoraLoaderModelOnly", model=model, lora_name=_LIGHT.format(noise))
        found.append(f("ModelSamplingSD3", model=model, shift=5.0 if lora else 8.0))
    return found[0], found[1]


def _two_passes(f: Flow, models: tuple[Node, Node], latent: Node, text: str, *, steps: int) -> Node:
    """Add two samplers that hand over half way; return the last."""
    clip = f("CLIPLoaderMultiGPU", clip_name=_T5, type="wan", device="cuda:1")
    cfg = 1.0 if steps < 10 else 3.5  # noqa: PLR2004  (a distilled model needs no guidance)
    given: dict[str, Value] = {
        "positive": f("CLIPTextEncode", text=text, clip=clip),
        "negative": f("CLIPTextEncode", text="still image, low quality", clip=clip),
        "steps": steps,
        "cfg": cfg,
    }
    high, low = models
    first = f(
        "KSamplerAdvanced",
        model=high,
        latent_image=latent,
        end_at_step=steps // 2,
        return_with_leftover_noise="enable",
        **given,
    )
    return f(
        "KSamplerAdvanced",
        model=low,
        latent_image=first,
        add_noise="disable",
        start_at_step=steps // 2,
        **given,
    )


def _video(f: Flow, models: tuple[Node, Node], latent: Node, text: str, *, steps: int) -> Flow:
    """Add what comes after the models of a video; return the flow."""
    sampled = _two_passes(f, models, latent, text, steps=steps)
    save_video(f, sampled, vae_on_second_card(f, _VAE), fps=16.0)
    return f


def _no_ram() -> Flow:
    f = Flow(
        "13 wan 2.2, two models, no RAM",
        "**Only cards.** 9 GiB of each of the two models rest on `cuda:1`, none in RAM.",
    )
    latent = f("EmptyHunyuanLatentVideo", width=1280, height=704, length=57)
    models = _pair(f, 9.0, ("cuda:1", "cuda:1"), lora=False)
    text = "a train crosses a viaduct in fog, seen from above"
    return _video(f, models, latent, text, steps=20)


def _image_lora() -> Flow:
    f = Flow(
        "14 wan 2.2 as an image model, lora, RAM",
        "**LoRA and RAM.** 9 GiB of each model rest in RAM. The LoRA is applied as weights are "
        "used: changing its strength moves none of them.",
    )
    latent = f("EmptyHunyuanLatentVideo", width=1536, height=1536, length=1)
    text = "a watchmaker at her bench, tools, window light"
    models = _pair(f, 9.0, ("cpu", "cpu"), lora=True)
    sampled = _two_passes(f, models, latent, text, steps=8)
    vae = f(
        "VAELoaderDisTorch2MultiGPU",
        vae_name=_VAE,
        compute_device="cuda:0",
        virtual_vram_gb=0.0,
        donor_device="cpu",
    )
    save_image(f, sampled, vae)
    return f


def _two_donors() -> Flow:
    f = Flow(
        "15 wan 2.2 video, two different donors",
        "**A donor each.** 13 GiB of the first model rest on `cuda:1`, 13 GiB of the second in "
        "RAM.",
    )
    latent = f("EmptyHunyuanLatentVideo", width=768, height=768, length=81)
    models = _pair(f, 13.0, ("cuda:1", "cpu"), lora=True)
    return _video(f, models, latent, "a dancer turns on an empty stage, one spotlight", steps=4)


FLOWS = (_no_ram, _image_lora, _two_donors)
