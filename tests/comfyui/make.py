"""Tiny models with random weights, of shapes that ComfyUI's loaders take for real ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

Weights = dict[str, Tensor]

_HEAD = 128  # what flux and wan divide their width by


def make_models(folder: Path) -> None:
    """Write every model of the tests into ComfyUI's folders."""
    torch.manual_seed(0)
    flux, wan, other, vae = _flux(256), _wan(256), _wan(128), taesd()
    bf16 = torch.bfloat16
    save(folder / "diffusion_models" / "flux.safetensors", flux, bf16)
    save(folder / "diffusion_models" / "wan.safetensors", wan, bf16)
    save(folder / "diffusion_models" / "other.safetensors", other, bf16)
    save(folder / "vae" / "taef1.safetensors", vae, torch.float32)
    save(folder / "text_encoders" / "clip_l.safetensors", clip_text(), torch.float16)
    save(folder / "loras" / "flux_lora.safetensors", _lora(flux), torch.float16)
    save(folder / "loras" / "wan_lora.safetensors", _lora(wan), torch.float16)
    save(folder / "controlnet" / "flux_control.safetensors", _flux_control(256), bf16)
    checkpoint = {f"model.diffusion_model.{name}": weight for name, weight in flux.items()}
    checkpoint |= {f"vae.{name}": weight for name, weight in vae.items()}
    save(folder / "checkpoints" / "flux.safetensors", checkpoint, bf16)


def save(path: Path, weights: Weights, dtype: torch.dtype) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.to(dtype).contiguous() for name, weight in weights.items()}, path)


def linear(name: str, out: int, into: int, *, bias: bool = True) -> Iterator[tuple[str, Tensor]]:
    yield f"{name}.weight", torch.randn(out, into) * 0.02
    if bias:
        yield f"{name}.bias", torch.randn(out) * 0.01


def _flux_double(width: int, index: int) -> Iterator[tuple[str, Tensor]]:
    for stream in ("img", "txt"):
        block = f"double_blocks.{index}.{stream}_"
        yield from linear(f"{block}mod.lin", 6 * width, width)
        yield from linear(f"{block}attn.qkv", 3 * width, width)
        yield from linear(f"{block}attn.proj", width, width)
        yield from linear(f"{block}mlp.0", 4 * width, width)
        yield from linear(f"{block}mlp.2", width, 4 * width)
        for norm in ("query_norm", "key_norm"):
            yield f"{block}attn.norm.{norm}.scale", torch.ones(_HEAD)


def _flux_ends(width: int) -> Iterator[tuple[str, Tensor]]:
    yield from linear("img_in", width, 64)
    yield from linear("txt_in", width, 768)
    for name, size in (("time_in", 256), ("vector_in", 768)):
        yield from linear(f"{name}.in_layer", width, size)
        yield from linear(f"{name}.out_layer", width, width)


def _flux(width: int, doubles: int = 2, singles: int = 3) -> Weights:
    weights = dict(_flux_ends(width))
    for index in range(doubles):
        weights |= _flux_double(width, index)
    for index in range(singles):
        block = f"single_blocks.{index}."
        weights |= linear(f"{block}linear1", 7 * width, width)
        weights |= linear(f"{block}linear2", width, 5 * width)
        weights |= linear(f"{block}modulation.lin", 3 * width, width)
        for norm in ("query_norm", "key_norm"):
            weights[f"{block}norm.{norm}.scale"] = torch.ones(_HEAD)
    weights |= linear("final_layer.linear", 64, width)
    weights |= linear("final_layer.adaLN_modulation.1", 2 * width, width)
    return weights


def _flux_control(width: int) -> Weights:
    """A ControlNet for flux, of the kind that takes a picture as its hint."""
    weights = dict(_flux_ends(width))
    weights |= _flux_double(width, 0)
    weights |= linear("pos_embed_input", width, 64)
    weights |= linear("controlnet_blocks.0", width, width)
    for index in range(8):
        weights[f"input_hint_block.{2 * index}.weight"] = torch.randn(16, 16 if index else 3, 3, 3)
        weights[f"input_hint_block.{2 * index}.bias"] = torch.zeros(16)
    return weights


def _wan(width: int, layers: int = 3) -> Weights:
    weights: Weights = {
        "patch_embedding.weight": torch.randn(width, 16, 1, 2, 2) * 0.02,
        "patch_embedding.bias": torch.zeros(width),
        "head.modulation": torch.randn(1, 2, width) * 0.02,
    }
    weights |= linear("text_embedding.0", width, 4096)
    weights |= linear("text_embedding.2", width, width)
    weights |= linear("time_embedding.0", width, 256)
    weights |= linear("time_embedding.2", width, width)
    weights |= linear("time_projection.1", 6 * width, width)
    weights |= linear("head.head", 64, width)
    for index in range(layers):
        block = f"blocks.{index}."
        weights[f"{block}modulation"] = torch.randn(1, 6, width) * 0.02
        for attention in ("self_attn", "cross_attn"):
            for projection in "qkvo":
                weights |= linear(f"{block}{attention}.{projection}", width, width)
            for norm in "qk":
                weights[f"{block}{attention}.norm_{norm}.weight"] = torch.ones(width)
        weights[f"{block}norm3.weight"] = torch.ones(width)
        weights[f"{block}norm3.bias"] = torch.zeros(width)
        weights |= linear(f"{block}ffn.0", 2 * width, width)
        weights |= linear(f"{block}ffn.2", width, 2 * width)
    return weights


def taesd(channels: int = 16) -> Weights:
    weights: Weights = {"vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)}

    def conv(name: str, out: int, into: int, *, bias: bool = True) -> None:
        weights[f"{name}.weight"] = torch.randn(out, into, 3, 3) * (2 / (9 * into)) ** 0.5
        if bias:
            weights[f"{name}.bias"] = torch.zeros(out)

    def stack(part: str, blocks: tuple[int, ...], plain: tuple[int, ...]) -> None:
        for index in blocks:
            for step in (0, 2, 4):
                conv(f"taesd_{part}.{index}.conv.{step}", 64, 64)
        for index in plain:
            conv(f"taesd_{part}.{index}", 64, 64, bias=False)

    stack("encoder", (1, 3, 4, 5, 7, 8, 9, 11, 12, 13), (2, 6, 10))
    stack("decoder", (3, 4, 5, 8, 9, 10, 13, 14, 15, 18), (7, 12, 17))
    conv("taesd_encoder.0", 64, 3)
    conv("taesd_encoder.14", channels, 64)
    conv("taesd_decoder.1", 64, channels)
    conv("taesd_decoder.19", 3, 64)
    return weights


def clip_text(width: int = 768, layers: int = 12, inner: int = 3072) -> Weights:
    """CLIP-L, whose sizes ComfyUI does not read from the file: 123 million weights; or another."""
    model = "text_model."
    weights: Weights = {
        f"{model}embeddings.token_embedding.weight": torch.randn(49408, width) * 0.02,
        f"{model}embeddings.position_embedding.weight": torch.randn(77, width) * 0.01,
    }
    norms = [f"{model}final_layer_norm"]
    for index in range(layers):
        layer = f"{model}encoder.layers.{index}."
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            weights |= linear(f"{layer}self_attn.{projection}", width, width)
        weights |= linear(f"{layer}mlp.fc1", inner, width)
        weights |= linear(f"{layer}mlp.fc2", width, inner)
        norms += [f"{layer}layer_norm1", f"{layer}layer_norm2"]
    for norm in norms:
        weights[f"{norm}.weight"] = torch.ones(width)
        weights[f"{norm}.bias"] = torch.zeros(width)
    weights |= linear("text_projection", width, width, bias=False)
    return weights


def _lora(weights: Weights, rank: int = 4) -> Weights:
    """A LoRA for every third matrix, under names that ComfyUI knows for any model."""
    found: Weights = {}
    matrices = [name for name, weight in weights.items() if weight.ndim == 2]
    for name in matrices[::3]:
        target = f"diffusion_model.{name.removesuffix('.weight')}"
        out, into = weights[name].shape
        found[f"{target}.lora_A.weight"] = torch.randn(rank, into) * 0.05
        found[f"{target}.lora_B.weight"] = torch.randn(out, rank) * 0.05
    return found
