"""The example workflows of other node packs: ComfyUI-Florence2 and ComfyUI-WanVideoWrapper."""

from __future__ import annotations

from workflows.flow import Flow, Node, Value
from workflows.parts import flux_parts, image

__all__ = ["FLOWS"]


def _florence() -> Flow:
    f = Flow(
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
    unet, clip, vae = flux_parts(f)
    image(f, unet, clip, vae, f("EmptySD3LatentImage"), caption[2], guidance=3.5)
    return f


def _wan_text(f: Flow, text: str, **options: str) -> Node:
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


def _wan_sample(f: Flow, model: Node, embeds: Node, text: Node, **options: Value) -> Node:
    return f(
        "WanVideoSamplerMultiGPU",
        model=model,
        compute_device=model[1],
        image_embeds=embeds,
        text_embeds=text,
        **options,
    )


def _wan_vae(f: Flow) -> Node:
    return f(
        "WanVideoVAELoaderMultiGPU",
        model_name="Wan2_1_VAE_bf16.safetensors",
        load_device="cuda:1",
    )


def _wan_decode(f: Flow, sampled: Node, vae: Node) -> None:
    frames = f("WanVideoDecodeMultiGPU", vae=vae, load_device=vae[1], samples=sampled)
    f("SaveVideo", video=f("CreateVideo", images=frames, fps=16.0))


def _block_swap() -> Flow:
    f = Flow(
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
    vae = _wan_vae(f)
    embeds = f("WanVideoEmptyEmbeds")
    text = _wan_text(f, "a heron lifts off from a misty lake")
    sampled = _wan_sample(f, model, embeds, text)
    _wan_decode(f, sampled, vae)
    return f


def _control_lora() -> Flow:
    f = Flow(
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
    vae = _wan_vae(f)
    latents = f("WanVideoEncodeMultiGPU", vae=vae, load_device=vae[1], image=f("LoadImage"))
    control = f("WanVideoControlEmbeds", latents=latents)
    embeds = f("WanVideoEmptyEmbeds", control_embeds=control)
    text = _wan_text(f, "a street market in the rain", quantization="fp8_e4m3fn")
    sampled = _wan_sample(f, model, embeds, text)
    _wan_decode(f, sampled, vae)
    return f


def _lightning_model(f: Flow, noise: str, swap: Node) -> Node:
    lora = f"Wan2.2-Lightning_I2V-A14B-4steps-{noise}.safetensors"
    return f(
        "WanVideoModelLoaderMultiGPU",
        model=f"Wan2.2-I2V-A14B-{noise}Noise-Q5_K_M.gguf",
        compute_device="cuda:0",
        block_swap_args=swap,
        lora=f("WanVideoLoraSelect", lora=lora),
    )


def _i2v_gguf() -> Flow:
    f = Flow(
        "18 wanvideowrapper 2.2 image to video, gguf",
        "**GGUF in the wrapper.** All 40 blocks of both Q5_K_M models wait on `cuda:1`, each with "
        "a Lightning LoRA. Needs ComfyUI-WanVideoWrapper.",
    )
    swap = f("WanVideoBlockSwapMultiGPU", blocks_to_swap=40, swap_device="cuda:1")
    high, low = _lightning_model(f, "High", swap), _lightning_model(f, "Low", swap)
    vae = _wan_vae(f)
    embeds = f(
        "WanVideoImageToVideoEncodeMultiGPU",
        vae=vae,
        load_device=vae[1],
        start_image=f("LoadImage"),
    )
    text = _wan_text(f, "the camera moves closer, leaves stir")
    few: dict[str, Value] = {"steps": 4, "cfg": 1.0, "scheduler": "dpm++_sde"}
    first = _wan_sample(f, high, embeds, text, **few)
    sampled = _wan_sample(f, low, embeds, text, **few, samples=first, denoise_strength=0.5)
    _wan_decode(f, sampled, vae)
    return f


FLOWS = (_florence, _block_swap, _control_lora, _i2v_gguf)
