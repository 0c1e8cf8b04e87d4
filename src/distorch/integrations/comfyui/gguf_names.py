"""How GGUF files name their tensors, and how ComfyUI's text encoders do."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Final

from distorch.errors import FormatError, ModelError
from distorch.formats import TensorInfo

__all__ = ["encoder_names", "head_counts", "is_language_model", "norms_are_shifted", "shapes"]

_SHAPE_KEY: Final = "comfy.gguf.orig_shape."

_T5: Final = {
    "token_embd": "shared",
    "enc.output_norm": "encoder.final_layer_norm",
}
_T5_LAYER: Final = {
    "attn_norm": "layer.0.layer_norm",
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "ffn_norm": "layer.1.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
}
_DECODER: Final = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_DECODER_LAYER: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_LAYER: Final = {
    **_DECODER_LAYER,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

_ENCODERS: Final[Mapping[str, tuple[Mapping[str, str], Mapping[str, str], str]]] = {
    **dict.fromkeys(("t5", "t5encoder"), (_T5, _T5_LAYER, "encoder.block")),
    **dict.fromkeys(
        ("llama", "qwen2", "qwen2vl", "qwen3", "qwen3vl"),
        (_DECODER, _DECODER_LAYER, "model.layers"),
    ),
    **dict.fromkeys(("gemma2", "gemma3"), (_DECODER, _GEMMA_LAYER, "model.layers")),
}
"""Architecture -> names outside the layers, names inside a layer, what a layer is called."""

_LAYER: Final = re.compile(r"(?:enc\.)?blk\.(\d+)\.(.+)")
_COMPUTED: Final = frozenset({"rope_freqs"})  # what ComfyUI computes by itself


def shapes(
    tensors: Mapping[str, TensorInfo], metadata: Mapping[str, object]
) -> dict[str, tuple[int, ...]]:
    """Return each tensor's shape, where it was stored flat the one it has in the model.

    Raises:
        FormatError: a shape that the file gives does not fit the tensor.

    >>> from pathlib import Path
    >>> conv = TensorInfo("conv", "F16", (2, 36), 0, 144, Path("a.gguf"))
    >>> shapes({"conv": conv}, {"comfy.gguf.orig_shape.conv": [2, 4, 3, 3]})
    {'conv': (2, 4, 3, 3)}
    """
    found = {}
    for name, info in tensors.items():
        shape, given = info.shape, metadata.get(_SHAPE_KEY + name)
        if given is not None:
            sizes = given if isinstance(given, Iterable) and not isinstance(given, str) else ()
            shape = tuple(size for size in sizes if isinstance(size, int) and size >= 0)
            if math.prod(shape) != math.prod(info.shape):
                raise FormatError(
                    f"{info.path}: {name} of shape {info.shape} cannot be of {given!r:.60}",
                    hint="download the file again, or convert the model again",
                )
        found[name] = shape
    return found


def is_language_model(metadata: Mapping[str, object]) -> bool:
    """Whether a file holds a text encoder by itself, by its architecture.

    >>> is_language_model({"general.architecture": "t5"})
    True
    >>> is_language_model({"general.architecture": "flux"})
    False
    """
    return metadata.get("general.architecture") in _ENCODERS


def encoder_names(architecture: str, names: Iterable[str]) -> dict[str, str]:
    """Return ComfyUI's name for each tensor of a text encoder that it has; others are left out.

    A file that uses ComfyUI's own names keeps them.

    Raises:
        ModelError: the names are of an architecture that is not known.

    >>> encoder_names("t5", ["enc.blk.3.attn_q.weight", "rope_freqs.weight"])
    {'enc.blk.3.attn_q.weight': 'encoder.block.3.layer.0.SelfAttention.q.weight'}
    >>> encoder_names("qwen3", ["token_embd.weight"])
    {'token_embd.weight': 'model.embed_tokens.weight'}
    """
    names = list(names)
    if architecture not in _ENCODERS:
        if any(_LAYER.match(name) for name in names):
            raise ModelError(
                f"a text encoder of the architecture {architecture!r} cannot be loaded from GGUF",
                hint=f"one of these: {', '.join(sorted(_ENCODERS))}; or a safetensors file",
            )
        return {name: name for name in names}
    outside, inside, layer = _ENCODERS[architecture]
    if inside is _T5_LAYER and not any(".ffn_gate." in name for name in names):
        inside = {**inside, "ffn_up": "layer.1.DenseReluDense.wi"}  # the first T5 has no gate
    found = {}
    for name in names:
        match = _LAYER.fullmatch(name)
        stem, _, kind = (match[2] if match else name).rpartition(".")
        ours = (inside if match else outside).get(stem)
        if ours is not None:
            found[name] = f"{layer}.{match[1]}.{ours}.{kind}" if match else f"{ours}.{kind}"
        elif stem not in _COMPUTED:
            found[name] = name  # ComfyUI says that it has no use for it
    return found


def head_counts(metadata: Mapping[str, object]) -> dict[str, int]:
    """Return the number of heads whose rows llama.cpp keeps in another order, by ending of a name.

    >>> head_counts({"general.architecture": "llama", "llama.attention.head_count": 8})
    {'attn_q.weight': 8, 'attn_k.weight': 8}
    >>> head_counts({"general.architecture": "t5"})
    {}
    """
    if metadata.get("general.architecture") != "llama":
        return {}
    heads = metadata.get("llama.attention.head_count")
    pairs = metadata.get("llama.attention.head_count_kv", heads)
    if not (isinstance(heads, int) and isinstance(pairs, int) and min(heads, pairs) > 0):
        raise FormatError(
            "llama.attention.head_count is not a number of heads",
            hint="convert the model again with a current llama.cpp",
        )
    return {"attn_q.weight": heads, "attn_k.weight": pairs}


def norms_are_shifted(metadata: Mapping[str, object]) -> bool:
    """Whether the file's norms are those of the model plus one, as llama.cpp keeps Gemma's."""
    return metadata.get("general.architecture") in {"gemma2", "gemma3"}
