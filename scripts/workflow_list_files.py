"""The example workflows of GGUF files, the legacy node, and Florence-2."""
# ruff: noqa: INP001, ANN401  (a script's data; a flow is whoever describes)

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from workflow_parts import image

__all__ = ["file_flows"]

_SPLIT = {"compute_device": "cuda:0", "donor_device": "cpu", "eject_models": True}
_FLUX = {"unet_name": "flux1-dev-fp8.safetensors", "weight_dtype": "fp8_e4m3fn"}
_T5 = "t5xxl_fp8_e4m3fn.safetensors"


def file_flows(make: Callable[[str, str], Any]) -> Iterator[Any]:
    """Describe each workflow with ``make(name, note)``."""
    for describe in (_gguf_flux, _gguf_qwen, _hunyuan_legacy, _florence):
        yield describe(make)


def _gguf_flux(make: Any) -> Any:
    f = make(
        "09 gguf flux, each part its device",
        "**GGUF.** The model on `cuda:0`, both text encoders on the host, the VAE on `cuda:1`.",
    )
    unet = f("UnetLoaderGGUFMultiGPU", unet_name="flux1-dev-Q4_K_S.gguf", device="cuda:0")
    clip = f(
        "DualCLIPLoaderGGUFMultiGPU",
        clip_name1="t5-v1_1-xxl-encoder-Q4_K_S.gguf",
        clip_name2="clip_l.safetensors",
        type="flux",
        device="cpu",
    )
    vae = f("VAELoaderMultiGPU", vae_name="ae.safetensors", device="cuda:1")
    text = "a paper boat on a puddle, street lights, shallow focus"
    image(f, unet, clip, vae, f("EmptySD3LatentImage"), text, guidance=3.5)
    return f


def _gguf_qwen(make: Any) -> Any:
    f = make(
        "10 gguf qwen-image, split",
        "**GGUF, split.** 4.2 GiB of the model rest in RAM; the text encoder is on `cuda:1`.",
    )
    unet = f(
        "UnetLoaderGGUFDisTorch2MultiGPU",
        unet_name="qwen-image-Q3_K_S.gguf",
        virtual_vram_gb=4.2,
        **_SPLIT,
    )
    clip = f(
        "CLIPLoaderGGUFMultiGPU",
        clip_name="Qwen2.5-VL-7B-Instruct-Q4_K_S.gguf",
        type="qwen_image",
        device="cuda:1",
    )
    vae = f("VAELoaderMultiGPU", vae_name="qwen_image_vae.safetensors", device="cuda:1")
    latent = f("EmptySD3LatentImage", width=1328, height=1328)
    model = f("ModelSamplingAuraFlow", model=unet)
    image(f, model, clip, vae, latent, "a kite above dunes, wide sky", cfg=2.5)
    return f


def _hunyuan_legacy(make: Any) -> Any:
    f = make(
        "11 hunyuan-video gguf, the legacy node",
        "**Old workflows.** The first DisTorch node and its `use_other_vram` still work. "
        "For a new workflow take the DisTorch2 one.",
    )
    unet = f(
        "UnetLoaderGGUFDisTorchMultiGPU",
        unet_name="hunyuan-video-t2v-720p-Q4_K_S.gguf",
        device="cuda:0",
        virtual_vram_gb=4.0,
        use_other_vram=True,
    )
    clip = f(
        "DualCLIPLoaderMultiGPU",
        clip_name1="clip_l.safetensors",
        clip_name2="llava_llama3_fp8_scaled.safetensors",
        type="hunyuan_video",
        device="cpu",
    )
    vae = f("VAELoaderMultiGPU", vae_name="hunyuan_video_vae_bf16.safetensors", device="cuda:1")
    positive = f("CLIPTextEncode", text="a paper crane folds itself, stop motion", clip=clip)
    sampled = f(
        "KSampler",
        model=f("ModelSamplingSD3", model=unet, shift=7.0),
        positive=f("FluxGuidance", conditioning=positive, guidance=6.0),
        negative=f("ConditioningZeroOut", conditioning=positive),
        latent_image=f("EmptyHunyuanLatentVideo", width=848, height=480, length=73),
    )
    frames = f("VAEDecode", samples=sampled, vae=vae)
    f("SaveVideo", video=f("CreateVideo", images=frames))
    return f


def _florence(make: Any) -> Any:
    f = make(
        "12 florence-2 caption to flux",
        "**A caption becomes a picture.** Florence-2 on `cuda:1` describes what you load; Flux "
        "on `cuda:0` paints it. Needs ComfyUI-Florence2.",
    )
    reader = f(
        "DownloadAndLoadFlorence2ModelMultiGPU",
        model="microsoft/Florence-2-base",
        device="cuda:1",
    )
    caption = f(
        "Florence2Run",
        image=f("LoadImage"),
        florence2_model=reader,
        task="detailed_caption",
    )
    unet = f("UNETLoaderMultiGPU", **_FLUX, device="cuda:0")
    clip = f(
        "DualCLIPLoaderMultiGPU",
        clip_name1=_T5,
        clip_name2="clip_l.safetensors",
        type="flux",
        device="cpu",
    )
    vae = f("VAELoaderMultiGPU", vae_name="ae.safetensors", device="cuda:1")
    image(f, unet, clip, vae, f("EmptySD3LatentImage"), caption[2], guidance=3.5)
    return f
