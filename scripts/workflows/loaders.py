"""The example workflows of the loader nodes: ComfyUI's own loaders, with devices."""

from __future__ import annotations

from workflows.flow import Flow, Node
from workflows.parts import SPLIT, flux_parts, image, save_image, save_video, vae_on_second_card

__all__ = ["FLOWS"]


def _first_steps() -> Flow:
    f = Flow(
        "01 first steps, z-image on two cards",
        "**First steps.** The diffusion model goes to `cuda:0`, the text encoder to `cuda:1`. "
        "With one card, set both to `cuda:0` or the text encoder to `cpu`.",
    )
    unet = f("UNETLoaderMultiGPU", unet_name="z_image_turbo_bf16.safetensors", device="cuda:0")
    clip = f(
        "CLIPLoaderMultiGPU",
        clip_name="qwen_3_4b.safetensors",
        type="lumina2",
        device="cuda:1",
    )
    latent = f("EmptySD3LatentImage", width=1280, height=720)
    text = "a lighthouse on a cliff at dusk, waves below, warm light in the window"
    image(f, unet, clip, f("VAELoader", vae_name="ae.safetensors"), latent, text, steps=8)
    return f


def _flux() -> Flow:
    f = Flow(
        "02 flux, each part its device",
        "**Parts on devices.** The model computes on `cuda:0`, the text encoders on the host, "
        "the VAE on `cuda:1`. Nothing is split: every part is whole where it is.",
    )
    unet, clip, vae = flux_parts(f)
    text = "a small robot waters tomatoes in a greenhouse, morning light"
    image(f, unet, clip, vae, f("EmptySD3LatentImage"), text, guidance=3.5)
    return f


def _sd15() -> Flow:
    f = Flow(
        "03 sd 1.5, a checkpoint on the second card",
        "**A whole checkpoint on `cuda:1`.** The first card stays free for something else.",
    )
    loaded = f(
        "CheckpointLoaderSimpleMultiGPU",
        ckpt_name="sd1.5-real-dream.safetensors",
        device="cuda:1",
    )
    latent = f("EmptyLatentImage", width=512, height=512)
    text = "portrait of an old fisherman, harbour behind, overcast"
    image(f, loaded, loaded[1], loaded[2], latent, text, cfg=7.0, scheduler="normal")
    return f


def _sdxl() -> Flow:
    f = Flow(
        "04 sdxl, each part of a checkpoint its device",
        "**One file, three devices.** UNet on `cuda:0`, CLIP on the host, VAE on `cuda:1`.",
    )
    loaded = f(
        "CheckpointLoaderAdvancedMultiGPU",
        ckpt_name="Juggernaut-XL_v9.safetensors",
        unet_device="cuda:0",
        clip_device="cpu",
        vae_device="cuda:1",
    )
    text = "a tram on a rainy street, reflections, evening"
    latent = f("EmptyLatentImage")
    image(f, loaded, loaded[1], loaded[2], latent, text, cfg=6.0, sampler_name="dpmpp_2m")
    return f


def _ltxv() -> Flow:
    f = Flow(
        "05 ltx-video, weights rest on the second card",
        "**The second card as a store.** 5 GiB of the model rest on `cuda:1` and stream to "
        "`cuda:0`, which computes; the text encoder runs on `cuda:1`.",
    )
    loaded = f(
        "CheckpointLoaderSimpleDisTorch2MultiGPU",
        ckpt_name="ltx-video-2b-v0.9.5.safetensors",
        virtual_vram_gb=5.0,
        **SPLIT | {"donor_device": "cuda:1"},
    )
    clip = f(
        "CLIPLoaderMultiGPU",
        clip_name="t5xxl_fp16.safetensors",
        type="ltxv",
        device="cuda:1",
    )
    positive = f("CLIPTextEncode", text="a fox walks through fresh snow, slow pan", clip=clip)
    negative = f("CLIPTextEncode", text="jitter, distortion", clip=clip)
    both = f("LTXVConditioning", positive=positive, negative=negative)
    latent = f("EmptyLTXVLatentVideo", width=768, height=512, length=97)
    sampled = f(
        "KSampler",
        model=loaded,
        positive=both,
        negative=both[1],
        latent_image=latent,
        steps=30,
        cfg=3.0,
    )
    save_video(f, sampled, loaded[2])
    return f


def _mochi() -> Flow:
    f = Flow(
        "06 mochi, a checkpoint split by part",
        "**Each part its split.** 5 GiB of the UNet rest in RAM and compute on `cuda:0`; 2 GiB of "
        "the text encoder rest in RAM and compute on `cuda:1`, where the VAE is too.",
    )
    loaded = f(
        "CheckpointLoaderAdvancedDisTorch2MultiGPU",
        ckpt_name="mochi_preview_fp8_scaled.safetensors",
        unet_compute_device="cuda:0",
        unet_virtual_vram_gb=5.0,
        unet_donor_device="cpu",
        clip_compute_device="cuda:1",
        clip_virtual_vram_gb=2.0,
        clip_donor_device="cpu",
        vae_device="cuda:1",
    )
    positive = f("CLIPTextEncode", text="steam rises from a cup, close up", clip=loaded[1])
    sampled = f(
        "KSampler",
        model=loaded,
        positive=positive,
        negative=f("CLIPTextEncode", text="", clip=loaded[1]),
        latent_image=f("EmptyMochiLatentVideo", width=848, height=480),
        steps=30,
        cfg=4.5,
    )
    save_video(f, sampled, loaded[2])
    return f


def _qwen_parts(f: Flow, file: str, virtual_vram_gb: float) -> tuple[Node, Node, Node]:
    """Add loaders for a model of the Qwen-Image family, split over a card and the host."""
    unet = f(
        "UNETLoaderDisTorch2MultiGPU", unet_name=file, virtual_vram_gb=virtual_vram_gb, **SPLIT
    )
    clip = f(
        "CLIPLoaderDisTorch2MultiGPU",
        clip_name="qwen_2.5_vl_7b_fp8_scaled.safetensors",
        type="qwen_image",
        device="cuda:1",
        virtual_vram_gb=3.9,
        donor_device="cpu",
        eject_models=False,
    )
    return unet, clip, vae_on_second_card(f, "qwen_image_vae.safetensors")


def _qwen_image() -> Flow:
    f = Flow(
        "07 qwen-image, model and text encoder split",
        "**Both large parts split.** 14 GiB of the model and 3.9 GiB of the text encoder rest in "
        "RAM; they compute on a card each.",
    )
    unet, clip, vae = _qwen_parts(f, "qwen_image_fp8_e4m3fn.safetensors", 14.0)
    latent = f("EmptySD3LatentImage", width=1328, height=1328)
    text = "a chalkboard menu that reads 'soup of the day', cosy cafe"
    model = f("ModelSamplingAuraFlow", model=unet)
    image(f, model, clip, vae, latent, text, cfg=2.5)
    return f


def _qwen_edit() -> Flow:
    f = Flow(
        "08 qwen-image-edit 2509, split",
        "**An edit model.** 7 GiB of it rest in RAM. Choose a picture in Load Image.",
    )
    unet, clip, vae = _qwen_parts(f, "qwen_image_edit_2509_fp8_e4m3fn.safetensors", 7.0)
    source = f("LoadImage")
    encode = {"clip": clip, "vae": vae, "image1": source}
    sampled = f(
        "KSampler",
        model=f("ModelSamplingAuraFlow", model=unet, shift=3.0),
        positive=f("TextEncodeQwenImageEditPlus", prompt="make it winter", **encode),
        negative=f("TextEncodeQwenImageEditPlus", prompt="", **encode),
        latent_image=f("VAEEncode", pixels=source, vae=vae),
        steps=20,
        cfg=2.5,
    )
    save_image(f, sampled, vae)
    return f


FLOWS = (_first_steps, _flux, _sd15, _sdxl, _ltxv, _mochi, _qwen_image, _qwen_edit)
