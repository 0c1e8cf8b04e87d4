"""Tiny models with random weights, of the real classes: what the examples run without a download.

Each is a few dozen MB, saved as the libraries save it, and made once for a process. What it draws
is noise; how it is placed and moved is what a real one would see.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPVisionConfig, T5Config, UMT5Config

PROMPT = "a fox in the snow"


def pipeline(name: str) -> Path:
    """Save a pipeline in a folder of its own: flux, qwen_image, wan, wan_i2v or wan_two_experts."""
    return _saved(_PIPELINES[name])


def language_model() -> Path:
    """Save a Llama whose tokens are characters."""
    return _saved(_llama)


def nothing() -> Path:
    """Save nothing: the example makes its model itself."""
    return Path()


def flux_lora() -> dict[str, torch.Tensor]:
    """Return a LoRA of rank 4 for the tiny FLUX."""
    torch.manual_seed(1)
    target = "transformer.transformer_blocks.0.attn.to_q"
    return {
        f"{target}.lora_A.weight": torch.randn(4, 256),
        f"{target}.lora_B.weight": torch.randn(256, 4),
    }


@cache
def _saved(make: Callable[[], Any]) -> Path:
    folder = tempfile.TemporaryDirectory(prefix="distorch-tiny-")
    _KEPT.append(folder)
    torch.manual_seed(0)
    for part in _parts(make()):
        part.save_pretrained(folder.name)
    return Path(folder.name)


_KEPT: list[Any] = []  # folders that go when the process ends


def _parts(made: Any) -> tuple[Any, ...]:
    return made if isinstance(made, tuple) else (made,)


def flux() -> Any:
    """FLUX.1: a transformer of 29 MB, CLIP, T5 and a VAE."""
    clip = CLIPTextConfig(
        vocab_size=514, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, projection_dim=64, bos_token_id=512, eos_token_id=513,
    )  # fmt: skip
    t5 = T5Config(d_model=256, d_ff=512, num_layers=4, num_heads=4, d_kv=64, vocab_size=98)
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=diffusers.AutoencoderKL(
            block_out_channels=(32, 64), layers_per_block=1, latent_channels=4, norm_num_groups=8,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            shift_factor=0.1, scaling_factor=1.0,
        ),
        text_encoder=transformers.CLIPTextModel(clip),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=transformers.T5EncoderModel(t5),
        tokenizer_2=_t5_tokenizer(),
        transformer=diffusers.FluxTransformer2DModel(
            num_layers=2, num_single_layers=2, attention_head_dim=128, num_attention_heads=2,
            joint_attention_dim=256, pooled_projection_dim=64, in_channels=16, guidance_embeds=True,
        ),
    )  # fmt: skip


def qwen_image() -> Any:
    """Qwen-Image: a transformer of 43 MB, Qwen2.5-VL and a VAE."""
    return diffusers.QwenImagePipeline(**_qwen_parts())


def qwen_image_edit() -> Any:
    """Qwen-Image-Edit, in memory: what reads its pictures cannot be saved without torchvision."""
    parts = _qwen_parts()
    return diffusers.QwenImageEditPipeline(**parts, processor=_Processor(parts["tokenizer"]))


def _qwen_parts() -> dict[str, Any]:
    transformer = diffusers.QwenImageTransformer2DModel(
        num_layers=4, attention_head_dim=128, num_attention_heads=2, joint_attention_dim=256,
        in_channels=16, out_channels=4,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 2, 2, 2], num_res_blocks=1,
        temperal_downsample=[False, False, True, True], latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )  # fmt: skip
    text = {
        "vocab_size": 264, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2,
        "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default"},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2,
        "out_hidden_size": 256,
    }  # fmt: skip
    tokenizer = _qwen_tokenizer()
    tokens = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in _VISION_TOKENS.items()
    }
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    return {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
        "vae": vae,
        "text_encoder": transformers.Qwen2_5_VLForConditionalGeneration(config),
        "tokenizer": tokenizer,
        "transformer": transformer,
    }


def wan() -> Any:
    """Wan 2.1, text to video: a transformer of 21 MB, UMT5 and a VAE."""
    return diffusers.WanPipeline(**_wan_parts(), transformer=_wan_transformer())


def wan_i2v() -> Any:
    """Wan 2.1, image to video: an image encoder besides."""
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        image_size=32, patch_size=8,
    )  # fmt: skip
    return diffusers.WanImageToVideoPipeline(
        **_wan_parts(),
        image_encoder=transformers.CLIPVisionModel(vision),
        image_processor=transformers.CLIPImageProcessor(size=32, crop_size=32),
        transformer=_wan_transformer(in_channels=36, image_dim=64, added_kv_proj_dim=256),
    )


def wan_two_experts() -> Any:
    """Wan 2.2: one transformer for the noisy steps, one for the others."""
    transformers_ = {"transformer": _wan_transformer(), "transformer_2": _wan_transformer()}
    return diffusers.WanPipeline(**_wan_parts(), **transformers_, boundary_ratio=0.9)


def _wan_parts() -> dict[str, Any]:
    umt5 = UMT5Config(d_model=256, d_ff=512, num_layers=2, num_heads=4, d_kv=64, vocab_size=98)
    return {
        "tokenizer": _t5_tokenizer(),
        "text_encoder": transformers.UMT5EncoderModel(umt5),
        "vae": diffusers.AutoencoderKLWan(base_dim=8, dim_mult=[1, 1, 2, 2], num_res_blocks=1),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
    }


def _wan_transformer(**more: Any) -> Any:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=128, text_dim=256, ffn_dim=1024, num_layers=4,
        **more,
    )  # fmt: skip


def _llama() -> tuple[Any, Any]:
    tokenizer = _qwen_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=1024, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).bfloat16(), tokenizer


_VISION_TOKENS = {
    "vision_start": "vision_start",
    "vision_end": "vision_end",
    "image": "image_pad",
    "video": "video_pad",
}


def _letters() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _clip_tokenizer() -> Any:
    letters = _letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def _t5_tokenizer() -> Any:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -2.0), ("\N{LOWER ONE EIGHTH BLOCK}", -2.0)]
    pieces += [(chr(code), -3.0) for code in range(33, 127)]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0)


def _qwen_tokenizer() -> Any:
    vocab = {letter: number for number, letter in enumerate(_letters())}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocab, merges=[])
    marks = ["im_start", "im_end", *_VISION_TOKENS.values()]
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in marks]})
    return tokenizer


class _Processor:
    """Does for one picture what Qwen2.5-VL's processor does, without its need of torchvision."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.image_processor = transformers.Qwen2VLImageProcessor(max_pixels=56 * 56)

    def __call__(self, text: list[str], images: Any, **asked: Any) -> Any:
        mark = "<|image_pad|>"
        seen = self.image_processor(images=images, return_tensors="pt")
        count = int(seen["image_grid_thw"][0].prod()) // self.image_processor.merge_size**2
        tokens = self.tokenizer([each.replace(mark, mark * count) for each in text], **asked)
        return transformers.BatchFeature({**tokens, **seen})


_PIPELINES: dict[str, Callable[[], Any]] = {
    "flux": flux,
    "qwen_image": qwen_image,
    "wan": wan,
    "wan_i2v": wan_i2v,
    "wan_two_experts": wan_two_experts,
}
