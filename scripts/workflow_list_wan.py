"""The example workflows of Wan: ComfyUI's own nodes, and WanVideoWrapper's."""
# ruff: noqa: INP001, ANN401  (a script's data; a flow is whoever describes)

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["wan_flows"]

_HIGH = "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors"
_LOW = "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors"
_T5 = "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
_LIGHT = "wan2.2_t2v_lightx2v_4steps_lora_v1.1_{}_noise.safetensors"


def wan_flows(make: Callable[[str, str], Any]) -> Iterator[Any]:
    """Describe each workflow with ``make(name, note)``."""
    for describe in (_no_ram, _image_lora, _two_donors, _block_swap, _control_lora, _i2v_gguf):
        yield describe(make)


def _pair(f: Any, high: dict[str, Any], low: dict[str, Any], *, lora: bool) -> tuple[Any, Any]:
    """Add the models for high and for low noise, each with its LoRA if asked."""
    split = {"compute_device": "cuda:0", "eject_models": True}
    found = []
    for name, file, options in (("high", _HIGH, high), ("low", _LOW, low)):
        model = f("UNETLoaderDisTorch2MultiGPU", unet_name=file, **split | options)
        if lora:
            model = f("LoraLoaderModelOnly", model=model, lora_name=_LIGHT.format(name))
        found.append(f("ModelSamplingSD3", model=model, shift=5.0 if lora else 8.0))
    return found[0], found[1]


def _two_passes(f: Any, models: tuple[Any, Any], latent: Any, text: str, *, steps: int) -> Any:
    """Add two samplers that hand over half way; return the last."""
    clip = f("CLIPLoaderMultiGPU", clip_name=_T5, type="wan", device="cuda:1")
    cfg = 1.0 if steps < 10 else 3.5  # noqa: PLR2004  (a distilled model needs no guidance)
    given = {
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


def _video(f: Any, sampled: Any, vae: Any, fps: float = 16.0) -> None:
    frames = f("VAEDecode", samples=sampled, vae=vae)
    f("SaveVideo", video=f("CreateVideo", images=frames, fps=fps))


def _no_ram(make: Any) -> Any:
    f = make(
        "13 wan 2.2, two models, no RAM",
        "**Only cards.** 9 GiB of each of the two models rest on `cuda:1`, none in RAM.",
    )
    lent = {"virtual_vram_gb": 9.0, "donor_device": "cuda:1"}
    latent = f("EmptyHunyuanLatentVideo", width=1280, height=704, length=57)
    text = "a train crosses a viaduct in fog, seen from above"
    sampled = _two_passes(f, _pair(f, lent, lent, lora=False), latent, text, steps=20)
    _video(f, sampled, f("VAELoaderMultiGPU", vae_name="wan_2.1_vae.safetensors", device="cuda:1"))
    return f


def _image_lora(make: Any) -> Any:
    f = make(
        "14 wan 2.2 as an image model, lora, RAM",
        "**LoRA and RAM.** 9 GiB of each model rest in RAM. The LoRA is applied as weights are "
        "used: changing its strength moves none of them.",
    )
    lent = {"virtual_vram_gb": 9.0, "donor_device": "cpu"}
    latent = f("EmptyHunyuanLatentVideo", width=1536, height=1536, length=1)
    text = "a watchmaker at her bench, tools, window light"
    sampled = _two_passes(f, _pair(f, lent, lent, lora=True), latent, text, steps=8)
    vae = f(
        "VAELoaderDisTorch2MultiGPU",
        vae_name="wan_2.1_vae.safetensors",
        compute_device="cuda:0",
        virtual_vram_gb=0.0,
        donor_device="cpu",
    )
    f("SaveImage", images=f("VAEDecode", samples=sampled, vae=vae))
    return f


def _two_donors(make: Any) -> Any:
    f = make(
        "15 wan 2.2 video, two different donors",
        "**A donor each.** 13 GiB of the first model rest on `cuda:1`, 13 GiB of the second in "
        "RAM.",
    )
    high = {"virtual_vram_gb": 13.0, "donor_device": "cuda:1"}
    low = {"virtual_vram_gb": 13.0, "donor_device": "cpu"}
    latent = f("EmptyHunyuanLatentVideo", width=768, height=768, length=81)
    text = "a dancer turns on an empty stage, one spotlight"
    sampled = _two_passes(f, _pair(f, high, low, lora=True), latent, text, steps=4)
    _video(f, sampled, f("VAELoaderMultiGPU", vae_name="wan_2.1_vae.safetensors", device="cuda:1"))
    return f


def _wan_text(f: Any, text: str, **options: Any) -> Any:
    encoder = f(
        "LoadWanVideoT5TextEncoderMultiGPU",
        model_name="umt5-xxl-enc-bf16.safetensors",
        device="cuda:1",
        **options,
    )
    return f(
        "WanVideoTextEncodeMultiGPU",
        positive_prompt=text,
        negative_prompt="still image, low quality",
        t5=encoder,
        load_device=encoder[1],
    )


def _wan_decode(f: Any, sampled: Any, vae: Any) -> None:
    frames = f("WanVideoDecodeMultiGPU", vae=vae, load_device=vae[1], samples=sampled)
    f("SaveVideo", video=f("CreateVideo", images=frames, fps=16.0))


def _block_swap(make: Any) -> Any:
    f = make(
        "16 wanvideowrapper text to video, blocks swapped to a card",
        "**Block swap.** 21 blocks of the wrapper's model wait on `cuda:1`. Needs "
        "ComfyUI-WanVideoWrapper.",
    )
    swap = f("WanVideoBlockSwapMultiGPU", blocks_to_swap=21, swap_device="cuda:1")
    model = f(
        "WanVideoModelLoaderMultiGPU",
        model="Wan2_1-T2V-14B_fp8_e5m2.safetensors",
        quantization="fp8_e5m2",
        compute_device="cuda:0",
        block_swap_args=swap,
    )
    vae = f(
        "WanVideoVAELoaderMultiGPU",
        model_name="Wan2_1_VAE_bf16.safetensors",
        load_device="cuda:1",
    )
    sampled = f(
        "WanVideoSamplerMultiGPU",
        model=model,
        compute_device=model[1],
        image_embeds=f("WanVideoEmptyEmbeds"),
        text_embeds=_wan_text(f, "a heron lifts off from a misty lake"),
    )
    _wan_decode(f, sampled, vae)
    return f


def _control_lora(make: Any) -> Any:
    f = make(
        "17 wanvideowrapper 1.3b, control lora",
        "**Control by a LoRA.** A picture guides the 1.3B model through a control LoRA. Needs "
        "ComfyUI-WanVideoWrapper.",
    )
    model = f(
        "WanVideoModelLoaderMultiGPU",
        model="Wan2_1-T2V-1_3B_bf16.safetensors",
        compute_device="cuda:0",
        lora=f("WanVideoLoraSelect", lora="wan2.1-1.3b-control-lora-tile-v1.0.safetensors"),
    )
    vae = f(
        "WanVideoVAELoaderMultiGPU",
        model_name="Wan2_1_VAE_bf16.safetensors",
        load_device="cuda:1",
    )
    latents = f("WanVideoEncodeMultiGPU", vae=vae, load_device=vae[1], image=f("LoadImage"))
    control = f("WanVideoControlEmbeds", latents=latents)
    sampled = f(
        "WanVideoSamplerMultiGPU",
        model=model,
        compute_device=model[1],
        image_embeds=f("WanVideoEmptyEmbeds", control_embeds=control),
        text_embeds=_wan_text(f, "a street market in the rain", quantization="fp8_e4m3fn"),
    )
    _wan_decode(f, sampled, vae)
    return f


def _i2v_gguf(make: Any) -> Any:
    f = make(
        "18 wanvideowrapper 2.2 image to video, gguf",
        "**GGUF in the wrapper.** All 40 blocks of both Q5_K_M models wait on `cuda:1`, each with "
        "a Lightning LoRA. Needs ComfyUI-WanVideoWrapper.",
    )
    swap = f("WanVideoBlockSwapMultiGPU", blocks_to_swap=40, swap_device="cuda:1")
    models = [
        f(
            "WanVideoModelLoaderMultiGPU",
            model=f"Wan2.2-I2V-A14B-{name}Noise-Q5_K_M.gguf",
            compute_device="cuda:0",
            block_swap_args=swap,
            lora=f(
                "WanVideoLoraSelect", lora=f"Wan2.2-Lightning_I2V-A14B-4steps-{name}.safetensors"
            ),
        )
        for name in ("High", "Low")
    ]
    vae = f(
        "WanVideoVAELoaderMultiGPU",
        model_name="Wan2_1_VAE_bf16.safetensors",
        load_device="cuda:1",
    )
    embeds = f(
        "WanVideoImageToVideoEncodeMultiGPU",
        vae=vae,
        load_device=vae[1],
        start_image=f("LoadImage"),
    )
    text = _wan_text(f, "the camera moves closer, leaves stir")
    sampled: Any = None
    for model in models:
        more = {} if sampled is None else {"samples": sampled, "denoise_strength": 0.5}
        sampled = f(
            "WanVideoSamplerMultiGPU",
            model=model,
            compute_device=model[1],
            image_embeds=embeds,
            text_embeds=text,
            steps=4,
            cfg=1.0,
            scheduler="dpm++_sde",
            **more,
        )
    _wan_decode(f, sampled, vae)
    return f
