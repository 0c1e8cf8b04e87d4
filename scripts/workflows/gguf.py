"""The example workflows of GGUF files, and of the legacy node."""

from __future__ import annotations

from workflows.flow import Flow
from workflows.parts import SPLIT, flux_encoders, image, save_video, vae_on_second_card

__all__ = ["FLOWS"]


def _flux() -> Flow:
    f = Flow(
        "09 gguf flux, each part its device",
        "**GGUF.** The model on `cuda:0`, both text encoders on the host, the VAE on `cuda:1`.",
    )
    unet = f("UnetLoaderGGUFMultiGPU", unet_name="flux1-dev-Q4_K_S.gguf", device="cuda:0")
    t5 = "t5-v1_1-xxl-encoder-Q4_K_S.gguf"
    clip = flux_encoders(f, "DualCLIPLoaderGGUFMultiGPU", t5, device="cpu")
    vae = vae_on_second_card(f, "ae.safetensors")
    text = "a paper boat on a puddle, street lights, shallow focus"
    image(f, unet, clip, vae, f("EmptySD3LatentImage"), text, guidance=3.5)
    return f


def _qwen_image() -> Flow:
    f = Flow(
        "10 gguf qwen-image, split",
        "**GGUF, split.** 4.2 GiB of the model rest in RAM; the text encoder is on `cuda:1`.",
    )
    unet = f(
        "UnetLoaderGGUFDisTorch2MultiGPU",
        unet_name="qwen-image-Q3_K_S.gguf",
        virtual_vram_gb=4.2,
        **SPLIT,
    )
    clip = f(
        "CLIPLoaderGGUFMultiGPU",
        clip_name="Qwen2.5-VL-7B-Instruct-Q4_K_S.gguf",
        type="qwen_image",
        device="cuda:1",
    )
    vae = vae_on_second_card(f, "qwen_image_vae.safetensors")
    latent = f("EmptySD3LatentImage", width=1328, height=1328)
    model = f("ModelSamplingAuraFlow", model=unet)
    image(f, model, clip, vae, latent, "a kite above dunes, wide sky", cfg=2.5)
    return f


def _hunyuan_legacy() -> Flow:
    f = Flow(
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
    vae = vae_on_second_card(f, "hunyuan_video_vae_bf16.safetensors")
    positive = f("CLIPTextEncode", text="a paper crane folds itself, stop motion", clip=clip)
    sampled = f(
        "KSampler",
        model=f("ModelSamplingSD3", model=unet, shift=7.0),
        positive=f("FluxGuidance", conditioning=positive, guidance=6.0),
        negative=f("ConditioningZeroOut", conditioning=positive),
        latent_image=f("EmptyHunyuanLatentVideo", width=848, height=480, length=73),
    )
    save_video(f, sampled, vae)
    return f


FLOWS = (_flux, _qwen_image, _hunyuan_legacy)
