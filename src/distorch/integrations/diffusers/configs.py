"""What the shapes of a model's tensors say of its configuration; diffusers' defaults say the rest.

Names are those of diffusers' classes. A file alone has no configuration; what its shapes do not
tell (how a head's rotary embedding is divided) is as in the models that were published.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isqrt, prod
from typing import Any, Final

__all__ = ["CONFIGS", "ZERO_CONDITION_MARKER", "Shapes"]

ZERO_CONDITION_MARKER: Final = "__index_timestep_zero__"
"""A tensor without meaning in ComfyUI's files of Qwen-Image-Edit 2511, which says how it works."""

Shapes = Mapping[str, tuple[int, ...]]
Config = dict[str, Any]


def _count(shapes: Shapes, prefix: str) -> int:
    """How many numbered modules stand below a name."""
    start = f"{prefix}."
    return len({name[len(start) :].split(".")[0] for name in shapes if name.startswith(start)})


def _heads(shapes: Shapes, norm: str, width: int) -> Config:
    """Heads, from the size of the norm of one."""
    head = shapes[norm][0]
    return {"attention_head_dim": head, "num_attention_heads": width // head}


def _flux(shapes: Shapes) -> Config:
    width, channels = shapes["x_embedder.weight"]
    return _heads(shapes, "transformer_blocks.0.attn.norm_q.weight", width) | {
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0],
        "num_layers": _count(shapes, "transformer_blocks"),
        "num_single_layers": _count(shapes, "single_transformer_blocks"),
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
    }


def _flux2(shapes: Shapes) -> Config:
    width, channels = shapes["x_embedder.weight"]
    embedder = "time_guidance_embed"
    return _heads(shapes, "transformer_blocks.0.attn.norm_q.weight", width) | {
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0],
        "num_layers": _count(shapes, "transformer_blocks"),
        "num_single_layers": _count(shapes, "single_transformer_blocks"),
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "timestep_guidance_channels": shapes[f"{embedder}.timestep_embedder.linear_1.weight"][1],
        "mlp_ratio": shapes["transformer_blocks.0.ff.linear_out.weight"][1] / width,
        "guidance_embeds": f"{embedder}.guidance_embedder.linear_1.weight" in shapes,
    }


def _qwen_image(shapes: Shapes) -> Config:
    width, channels = shapes["img_in.weight"]
    patch = 2
    layered = "time_text_embed.addition_t_embedding.weight" in shapes
    return _heads(shapes, "transformer_blocks.0.attn.norm_q.weight", width) | {
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // patch**2,
        "num_layers": _count(shapes, "transformer_blocks"),
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "zero_cond_t": ZERO_CONDITION_MARKER in shapes,
        "use_additional_t_cond": layered,
        "use_layer3d_rope": layered,
    }


def _wan(shapes: Shapes) -> Config:
    width, channels, *patch = shapes["patch_embedding.weight"]
    head = 128  # of every published size
    image = "condition_embedder.image_embedder"
    return {
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "patch_size": tuple(patch),
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // prod(patch),
        "num_layers": _count(shapes, "blocks"),
        "text_dim": shapes["condition_embedder.text_embedder.linear_1.weight"][1],
        "freq_dim": shapes["condition_embedder.time_embedder.linear_1.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.net.0.proj.weight"][0],
        "cross_attn_norm": "blocks.0.norm2.weight" in shapes,
        "image_dim": shapes.get(f"{image}.norm1.weight", (None,))[0],
        "added_kv_proj_dim": shapes.get("blocks.0.attn2.add_k_proj.weight", (0, None))[1],
        "pos_embed_seq_len": shapes.get(f"{image}.pos_embed", (None, 0))[-2],
    }


def _z_image(shapes: Shapes) -> Config:
    patch = 2
    width, channels = shapes[f"all_x_embedder.{patch}-1.weight"]
    layer = "layers.0.attention"
    head = shapes[f"{layer}.norm_q.weight"][0]
    return {
        "dim": width,
        "in_channels": channels // patch**2,
        "n_layers": _count(shapes, "layers"),
        "n_refiner_layers": _count(shapes, "noise_refiner"),
        "n_heads": width // head,
        "n_kv_heads": shapes[f"{layer}.to_k.weight"][0] // head,
        "cap_feat_dim": shapes["cap_embedder.1.weight"][1],
        "siglip_feat_dim": shapes.get("siglip_embedder.1.weight", (0, None))[1],
    }


def _sd3(shapes: Shapes) -> Config:
    width, channels, patch, _ = shapes["pos_embed.proj.weight"]
    head = 64  # of every published size
    blocks = _count(shapes, "transformer_blocks")
    dual = [n for n in range(blocks) if f"transformer_blocks.{n}.attn2.to_q.weight" in shapes]
    return {
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // patch**2,
        "num_layers": blocks,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "caption_projection_dim": shapes["context_embedder.weight"][0],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "pos_embed_max_size": isqrt(shapes["pos_embed.pos_embed"][-2]),
        "dual_attention_layers": tuple(dual),
        "qk_norm": "rms_norm" if "transformer_blocks.0.attn.norm_q.weight" in shapes else None,
    }


def _ltx(shapes: Shapes) -> Config:
    width, channels = shapes["proj_in.weight"]
    heads = 32  # of every published size
    return {
        "attention_head_dim": width // heads,
        "num_attention_heads": heads,
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0],
        "num_layers": _count(shapes, "transformer_blocks"),
        "cross_attention_dim": shapes["transformer_blocks.0.attn2.to_k.weight"][1],
        "caption_channels": shapes["caption_projection.linear_1.weight"][1],
    }


def _hunyuan_video(shapes: Shapes) -> Config:
    width, channels, *patch = shapes["x_embedder.proj.weight"]
    refiner = "context_embedder.token_refiner.refiner_blocks"
    out_channels = shapes["proj_out.weight"][0] // prod(patch)
    return _heads(shapes, "transformer_blocks.0.attn.norm_q.weight", width) | {
        "in_channels": channels,
        "out_channels": out_channels,
        "patch_size_t": patch[0],
        "patch_size": patch[1],
        "num_layers": _count(shapes, "transformer_blocks"),
        "num_single_layers": _count(shapes, "single_transformer_blocks"),
        "num_refiner_layers": _count(shapes, refiner),
        "mlp_ratio": shapes["transformer_blocks.0.ff.net.0.proj.weight"][0] / width,
        "text_embed_dim": shapes["context_embedder.proj_in.weight"][1],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        # beside the noise come the channels of an image, and a mask
        "image_condition_type": "latent_concat" if channels > out_channels else None,
    }


CONFIGS: Final[Mapping[str, Callable[[Shapes], Config]]] = {
    "FluxTransformer2DModel": _flux,
    "Flux2Transformer2DModel": _flux2,
    "QwenImageTransformer2DModel": _qwen_image,
    "WanTransformer3DModel": _wan,
    "ZImageTransformer2DModel": _z_image,
    "SD3Transformer2DModel": _sd3,
    "LTXVideoTransformer3DModel": _ltx,
    "HunyuanVideoTransformer3DModel": _hunyuan_video,
}
"""By class: its configuration, from the shapes of its tensors by diffusers' names."""
