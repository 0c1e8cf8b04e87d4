"""The nodes of others that the example workflows use: inputs in order, with defaults, and outputs.

``name:TYPE=default``; a seed (``!``) is followed by what happens to it after a run, as ComfyUI's
page saves it. Types in capitals that are no widget are links.
"""

from __future__ import annotations

__all__ = ["NODES"]

_SAMPLER = (
    "sampler_name:COMBO=euler scheduler:COMBO=simple positive:CONDITIONING negative:CONDITIONING "
    "latent_image:LATENT"
)
_SIZE = "width:INT=1024 height:INT=1024"
_WAN_TILES = "tile_x:INT=272 tile_y:INT=272 tile_stride_x:INT=144 tile_stride_y:INT=128"

NODES = {
    # ComfyUI
    "KSampler": f"model:MODEL seed:INT!=0 steps:INT=20 cfg:FLOAT=1.0 {_SAMPLER} denoise:FLOAT=1.0"
    " -> LATENT",
    "KSamplerAdvanced": "model:MODEL add_noise:COMBO=enable noise_seed:INT!=0 steps:INT=20"
    f" cfg:FLOAT=1.0 {_SAMPLER} start_at_step:INT=0 end_at_step:INT=10000"
    " return_with_leftover_noise:COMBO=disable -> LATENT",
    "CLIPTextEncode": "text:STRING clip:CLIP -> CONDITIONING",
    "ConditioningZeroOut": "conditioning:CONDITIONING -> CONDITIONING",
    "FluxGuidance": "conditioning:CONDITIONING guidance:FLOAT=3.5 -> CONDITIONING",
    "VAEDecode": "samples:LATENT vae:VAE -> IMAGE",
    "VAEEncode": "pixels:IMAGE vae:VAE -> LATENT",
    "SaveImage": "images:IMAGE filename_prefix:STRING=distorch ->",
    "LoadImage": "image:COMBO=example.png upload:COMBO=image -> IMAGE MASK",
    "CreateVideo": "images:IMAGE fps:FLOAT=24.0 audio:AUDIO -> VIDEO",
    "SaveVideo": "video:VIDEO filename_prefix:STRING=video/distorch format:COMBO=auto"
    " codec:COMBO=auto ->",
    "EmptyLatentImage": f"{_SIZE} batch_size:INT=1 -> LATENT",
    "EmptySD3LatentImage": f"{_SIZE} batch_size:INT=1 -> LATENT",
    "EmptyHunyuanLatentVideo": f"{_SIZE} length:INT=25 batch_size:INT=1 -> LATENT",
    "EmptyMochiLatentVideo": f"{_SIZE} length:INT=25 batch_size:INT=1 -> LATENT",
    "EmptyLTXVLatentVideo": f"{_SIZE} length:INT=97 batch_size:INT=1 -> LATENT",
    "LTXVConditioning": "positive:CONDITIONING negative:CONDITIONING frame_rate:FLOAT=25.0"
    " -> CONDITIONING CONDITIONING",
    "ModelSamplingAuraFlow": "model:MODEL shift:FLOAT=3.1 -> MODEL",
    "ModelSamplingSD3": "model:MODEL shift:FLOAT=8.0 -> MODEL",
    "LoraLoaderModelOnly": "model:MODEL lora_name:COMBO strength_model:FLOAT=1.0 -> MODEL",
    "TextEncodeQwenImageEditPlus": "clip:CLIP prompt:STRING vae:VAE image1:IMAGE image2:IMAGE"
    " image3:IMAGE -> CONDITIONING",
    "ControlNetApplyAdvanced": "positive:CONDITIONING negative:CONDITIONING"
    " control_net:CONTROL_NET image:IMAGE strength:FLOAT=1.0 start_percent:FLOAT=0.0"
    " end_percent:FLOAT=1.0 vae:VAE -> CONDITIONING CONDITIONING",
    "PreviewAny": "source:* ->",
    "PreviewImage": "images:IMAGE ->",
    "UNETLoader": "unet_name:COMBO weight_dtype:COMBO=default -> MODEL",
    "VAELoader": "vae_name:COMBO -> VAE",
    "CLIPLoader": "clip_name:COMBO type:COMBO=stable_diffusion device:COMBO=default -> CLIP",
    "DualCLIPLoader": "clip_name1:COMBO clip_name2:COMBO type:COMBO=flux device:COMBO=default"
    " -> CLIP",
    "CheckpointLoaderSimple": "ckpt_name:COMBO -> MODEL CLIP VAE",
    "ControlNetLoader": "control_net_name:COMBO -> CONTROL_NET",
    # loaders of GGUF files, ours
    "UnetLoaderGGUF": "unet_name:COMBO -> MODEL",
    "DualCLIPLoaderGGUF": "clip_name1:COMBO clip_name2:COMBO type:COMBO=flux -> CLIP",
    "CLIPLoaderGGUF": "clip_name:COMBO type:COMBO=stable_diffusion -> CLIP",
    # ComfyUI-Florence2, and ours over it
    "DownloadAndLoadFlorence2ModelMultiGPU": "model:COMBO precision:COMBO=fp16"
    " attention:COMBO=sdpa lora:PEFTLORA convert_to_safetensors:BOOLEAN=false device:COMBO=cuda:0"
    " offload_device:COMBO=cpu -> FL2MODEL",
    "Florence2Run": "image:IMAGE florence2_model:FL2MODEL text_input:STRING task:COMBO"
    " fill_mask:BOOLEAN=true keep_model_loaded:BOOLEAN=false max_new_tokens:INT=1024"
    " num_beams:INT=3 do_sample:BOOLEAN=true output_mask_select:STRING seed:INT!=1"
    " -> IMAGE MASK STRING JSON",
    # ComfyUI-WanVideoWrapper, and ours over it
    "WanVideoModelLoaderMultiGPU": "model:COMBO base_precision:COMBO=bf16"
    " quantization:COMBO=disabled load_device:COMBO=offload_device compute_device:COMBO=cuda:0"
    " attention_mode:COMBO=sdpa compile_args:WANCOMPILEARGS block_swap_args:BLOCKSWAPARGS"
    " lora:WANVIDLORA vram_management_args:VRAM_MANAGEMENTARGS -> WANVIDEOMODEL MULTIGPUDEVICE",
    "WanVideoBlockSwapMultiGPU": "blocks_to_swap:INT=20 offload_img_emb:BOOLEAN=false"
    " offload_txt_emb:BOOLEAN=false use_non_blocking:BOOLEAN=false vace_blocks_to_swap:INT=0"
    " prefetch_blocks:INT=0 block_swap_debug:BOOLEAN=false swap_device:COMBO=cpu -> BLOCKSWAPARGS",
    "LoadWanVideoT5TextEncoderMultiGPU": "model_name:COMBO precision:COMBO=bf16"
    " device:COMBO=cuda:0 quantization:COMBO=disabled -> WANTEXTENCODER MULTIGPUDEVICE",
    "WanVideoTextEncodeMultiGPU": "positive_prompt:STRING negative_prompt:STRING"
    " t5:WANTEXTENCODER load_device:MULTIGPUDEVICE force_offload:BOOLEAN=true"
    " model_to_offload:WANVIDEOMODEL use_disk_cache:BOOLEAN=false -> WANVIDEOTEXTEMBEDS",
    "WanVideoVAELoaderMultiGPU": "model_name:COMBO load_device:COMBO=cuda:0 precision:COMBO=bf16"
    " -> WANVAE MULTIGPUDEVICE",
    "WanVideoEmptyEmbeds": "width:INT=832 height:INT=480 num_frames:INT=81"
    " control_embeds:WANVIDIMAGE_EMBEDS -> WANVIDIMAGE_EMBEDS",
    "WanVideoControlEmbeds": "latents:LATENT start_percent:FLOAT=0.0 end_percent:FLOAT=1.0"
    " -> WANVIDIMAGE_EMBEDS",
    "WanVideoEncodeMultiGPU": "vae:WANVAE load_device:MULTIGPUDEVICE image:IMAGE"
    f" enable_vae_tiling:BOOLEAN=false {_WAN_TILES} -> LATENT",
    "WanVideoImageToVideoEncodeMultiGPU": "width:INT=832 height:INT=480 num_frames:INT=81"
    " noise_aug_strength:FLOAT=0.0 start_latent_strength:FLOAT=1.0 end_latent_strength:FLOAT=1.0"
    " force_offload:BOOLEAN=true vae:WANVAE load_device:MULTIGPUDEVICE start_image:IMAGE"
    " -> WANVIDIMAGE_EMBEDS",
    "WanVideoLoraSelect": "lora:COMBO strength:FLOAT=1.0 prev_lora:WANVIDLORA -> WANVIDLORA",
    "WanVideoSamplerMultiGPU": "model:WANVIDEOMODEL compute_device:MULTIGPUDEVICE"
    " image_embeds:WANVIDIMAGE_EMBEDS steps:INT=30 cfg:FLOAT=6.0 shift:FLOAT=5.0 seed:INT!=0"
    " force_offload:BOOLEAN=true scheduler:COMBO=unipc riflex_freq_index:INT=0"
    " text_embeds:WANVIDEOTEXTEMBEDS samples:LATENT denoise_strength:FLOAT=1.0 -> LATENT LATENT",
    "WanVideoDecodeMultiGPU": "vae:WANVAE load_device:MULTIGPUDEVICE samples:LATENT"
    f" enable_vae_tiling:BOOLEAN=false {_WAN_TILES} -> IMAGE",
}
