"""Small models with random weights for the other loaders, as `make` has them for the first.

Stable Diffusion 1.5 of one level and its ControlNets, a CLIP that sees, and text encoders of the
sizes that `small_encoders` has ComfyUI expect.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.comfyui.make import Weights, clip_text, linear, save, taesd
from tests.comfyui.small_encoders import CLIP_G, LLAMA, T5

_WIDTH, _TIME, _TEXT = 320, 1280, 768  # by which ComfyUI knows Stable Diffusion 1.5


_HALF = torch.float16


def make_sd15(folder: Path) -> None:
    """Write Stable Diffusion 1.5 in each form, its LoRA and its ControlNets; once."""
    if (folder / "diffusers").exists():
        return
    torch.manual_seed(1)
    half, encoders = _HALF, folder / "text_encoders"
    unet, vae, clip_l = _sd15(), taesd(4), load_file(encoders / "clip_l.safetensors")
    parts = {"model.diffusion_model": unet, "first_stage_model": vae}
    parts["cond_stage_model.transformer"] = clip_l
    whole = {f"{part}.{key}": it for part, found in parts.items() for key, it in found.items()}
    save(folder / "checkpoints" / "sd15.safetensors", whole, half)
    save(folder / "loras" / "sd15_lora.safetensors", _lora(unet, clip_l), half)

    diffusers = folder / "diffusers" / "sd15"
    save(diffusers / "unet" / "diffusion_pytorch_model.safetensors", unet, half)
    save(diffusers / "vae" / "diffusion_pytorch_model.safetensors", vae, half)
    (diffusers / "text_encoder").mkdir()
    (diffusers / "text_encoder" / "model.safetensors").symlink_to(encoders / "clip_l.safetensors")
    (diffusers / "model_index.json").write_text("{}", encoding="utf-8")

    control = _control()
    save(folder / "controlnet" / "sd15.safetensors", control, half)
    differing = {f"control_model.{name}": weight for name, weight in control.items()}
    differing["difference"] = torch.zeros(1)
    save(folder / "controlnet" / "sd15_diff.safetensors", differing, half)


def make_encoders(folder: Path) -> None:
    """Write the encoders of text and of pictures; once."""
    if (folder / "clip_vision").exists():
        return
    torch.manual_seed(2)
    half, encoders = _HALF, folder / "text_encoders"
    save(folder / "clip_vision" / "vit_l.safetensors", _clip_vision(), half)
    save(encoders / "clip_g.safetensors", _clip_g(), half)
    save(encoders / "t5xxl.safetensors", _t5(), half)
    save(encoders / "llama.safetensors", _llama(), half)


def _conv(name: str, out: int, into: int, size: int = 3) -> Iterator[tuple[str, Tensor]]:
    yield f"{name}.weight", torch.randn(out, into, size, size) * (1 / (size * size * into)) ** 0.5
    yield f"{name}.bias", torch.zeros(out)


def _norm(name: str, width: int = _WIDTH) -> Iterator[tuple[str, Tensor]]:
    yield f"{name}.weight", torch.ones(width)
    yield f"{name}.bias", torch.zeros(width)


def _residual(name: str, into: int = _WIDTH) -> Iterator[tuple[str, Tensor]]:
    yield from _norm(f"{name}.in_layers.0", into)
    yield from _conv(f"{name}.in_layers.2", _WIDTH, into)
    yield from linear(f"{name}.emb_layers.1", _WIDTH, _TIME)
    yield from _norm(f"{name}.out_layers.0")
    yield from _conv(f"{name}.out_layers.3", _WIDTH, _WIDTH)
    if into != _WIDTH:
        yield from _conv(f"{name}.skip_connection", _WIDTH, into, 1)


def _attending(name: str) -> Iterator[tuple[str, Tensor]]:
    yield from _norm(f"{name}.norm")
    yield from _conv(f"{name}.proj_in", _WIDTH, _WIDTH, 1)
    yield from _conv(f"{name}.proj_out", _WIDTH, _WIDTH, 1)
    block = f"{name}.transformer_blocks.0."
    for attention, source in (("attn1", _WIDTH), ("attn2", _TEXT)):
        yield from linear(f"{block}{attention}.to_q", _WIDTH, _WIDTH, bias=False)
        yield from linear(f"{block}{attention}.to_k", _WIDTH, source, bias=False)
        yield from linear(f"{block}{attention}.to_v", _WIDTH, source, bias=False)
        yield from linear(f"{block}{attention}.to_out.0", _WIDTH, _WIDTH)
    yield from linear(f"{block}ff.net.0.proj", 8 * _WIDTH, _WIDTH)
    yield from linear(f"{block}ff.net.2", _WIDTH, 4 * _WIDTH)
    for index in (1, 2, 3):
        yield from _norm(f"{block}norm{index}")


def _half_of_unet() -> Weights:
    """What a UNet and a ControlNet have in common: the way down, of one level, and the middle."""
    weights = dict(linear("time_embed.0", _TIME, _WIDTH))
    weights |= linear("time_embed.2", _TIME, _TIME)
    weights |= _conv("input_blocks.0.0", _WIDTH, 4)
    weights |= _residual("input_blocks.1.0")
    weights |= _attending("input_blocks.1.1")
    weights |= _residual("middle_block.0")
    weights |= _attending("middle_block.1")
    weights |= _residual("middle_block.2")
    return weights


def _sd15() -> Weights:
    weights = _half_of_unet()
    for index in (0, 1):
        weights |= _residual(f"output_blocks.{index}.0", 2 * _WIDTH)
        weights |= _attending(f"output_blocks.{index}.1")
    weights |= _norm("out.0")
    weights |= _conv("out.2", 4, _WIDTH)
    return weights


def _control() -> Weights:
    weights = _half_of_unet()
    for name in ("zero_convs.0.0", "zero_convs.1.0", "middle_block_out.0"):
        weights |= _conv(name, _WIDTH, _WIDTH, 1)
    sizes = (3, 16, 16, 32, 32, 96, 96, 256, _WIDTH)
    for index, (into, out) in enumerate(pairwise(sizes)):
        weights |= _conv(f"input_hint_block.{2 * index}", out, into)
    return weights


def _lora(unet: Weights, clip: Weights, rank: int = 4) -> Weights:
    """A LoRA on both, under the names that most tools write."""
    found: Weights = {}
    attention = "input_blocks.1.1.transformer_blocks.0.attn2"
    names = {
        f"{attention}.to_q.weight": "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0"
    }
    targets = {f"{lora}_attn2_to_q": unet[name] for name, lora in names.items()}
    for index in (0, 5, 11):
        layer = f"text_model.encoder.layers.{index}.mlp.fc1"
        targets[f"lora_te_{layer.replace('.', '_')}"] = clip[f"{layer}.weight"]
    for target, weight in targets.items():
        out, into = weight.shape
        found[f"{target}.lora_down.weight"] = torch.randn(rank, into) * 0.05
        found[f"{target}.lora_up.weight"] = torch.randn(out, rank) * 0.05
    return found


def _clip_vision() -> Weights:
    """ViT-L, whose sizes ComfyUI knows by its layers: 304 million weights, all layers alike."""
    width, model = 1024, "vision_model."
    weights: Weights = {
        f"{model}embeddings.class_embedding": torch.randn(width) * 0.02,
        f"{model}embeddings.patch_embedding.weight": torch.randn(width, 3, 14, 14) * 0.04,
        f"{model}embeddings.position_embedding.weight": torch.randn(257, width) * 0.02,
    }
    weights |= _norm(f"{model}pre_layrnorm", width)
    weights |= _norm(f"{model}post_layernorm", width)
    layer = dict(linear("mlp.fc1", 4 * width, width)) | dict(linear("mlp.fc2", width, 4 * width))
    for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
        layer |= linear(f"self_attn.{projection}", width, width)
    for norm in ("layer_norm1", "layer_norm2"):
        layer |= _norm(norm, width)
    for index in range(24):
        for name, weight in layer.items():
            weights[f"{model}encoder.layers.{index}.{name}"] = weight.clone()
    weights |= linear("visual_projection", 768, width, bias=False)
    return weights


def _clip_g() -> Weights:
    weights = clip_text(1280, CLIP_G["num_hidden_layers"], CLIP_G["intermediate_size"])
    marker = "text_model.encoder.layers.30.mlp.fc1.weight"  # by which ComfyUI knows the real one
    return weights | {marker: torch.zeros(1)}


def _t5() -> Weights:
    width, inner = 4096, T5["d_kv"] * T5["num_heads"]
    weights: Weights = {"shared.weight": torch.randn(502, width).repeat(64, 1)}
    block = "encoder.block.0.layer."
    for name, shape in (("q", (inner, width)), ("k", (inner, width)), ("v", (inner, width))):
        weights |= linear(f"{block}0.SelfAttention.{name}", *shape, bias=False)
    weights |= linear(f"{block}0.SelfAttention.o", width, inner, bias=False)
    bias = torch.randn(32, T5["num_heads"])
    weights[f"{block}0.SelfAttention.relative_attention_bias.weight"] = bias
    weights |= linear(f"{block}1.DenseReluDense.wi_0", T5["d_ff"], width, bias=False)
    weights |= linear(f"{block}1.DenseReluDense.wi_1", T5["d_ff"], width, bias=False)
    weights |= linear(f"{block}1.DenseReluDense.wo", width, T5["d_ff"], bias=False)
    for norm in (f"{block}0.layer_norm", f"{block}1.layer_norm", "encoder.final_layer_norm"):
        weights[f"{norm}.weight"] = torch.ones(width)
    marker = "encoder.block.23.layer.1.DenseReluDense.wi_1.weight"
    return weights | {marker: torch.zeros(1, width)}


def _llama() -> Weights:
    width, inner = LLAMA["hidden_size"], LLAMA["intermediate_size"]
    heads, head = (LLAMA[name] for name in ("num_attention_heads", "head_dim"))
    weights: Weights = {"model.embed_tokens.weight": torch.randn(LLAMA["vocab_size"], width) * 0.1}
    for index in range(LLAMA["num_hidden_layers"]):
        layer = f"model.layers.{index}."
        for name in ("q_proj", "k_proj", "v_proj"):
            weights |= linear(f"{layer}self_attn.{name}", heads * head, width, bias=False)
        weights |= linear(f"{layer}self_attn.o_proj", width, heads * head, bias=False)
        for name in ("gate_proj", "up_proj"):
            weights |= linear(f"{layer}mlp.{name}", inner, width, bias=False)
        weights |= linear(f"{layer}mlp.down_proj", width, inner, bias=False)
        weights[f"{layer}input_layernorm.weight"] = torch.ones(width)
        weights[f"{layer}post_attention_layernorm.weight"] = torch.ones(width)
    return weights | {"model.norm.weight": torch.ones(width)}
