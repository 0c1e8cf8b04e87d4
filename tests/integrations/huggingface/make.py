"""Random models of real architectures, in GGUF as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import gguf
import libgguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForTextEncoding, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

KINDS = (
    *("Q8_0", "Q4_K", "Q6_K", "Q5_0", "F16", "BF16", "F32"),
    *("Q4_0", "Q5_K", "IQ4_XS", "IQ3_S"),
)
NUM_LAYERS, WIDTH, INNER, VOCABULARY = 2, 256, 512, 320


@dataclass(frozen=True)
class Case:
    """One architecture: its name in GGUF, its configuration, its own keys in the file."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, Any] = field(default_factory=dict)
    vocabulary: int = VOCABULARY
    head: str = "Q8_0"
    epsilon_key: str = "attention.layer_norm_rms_epsilon"
    kind: str = ""  # what transformers calls it
    library: Any = AutoModelForCausalLM

    @property
    def is_tied(self) -> bool:
        return bool(self.config.get("tie_word_embeddings"))


HEADS_64 = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
GEMMA_KEYS = {"attention.key_length": 64, "attention.value_length": 64}
MAMBA_KEYS = {
    "ssm.conv_kernel": 4,
    "ssm.state_size": 16,
    "ssm.time_step_rank": WIDTH // 16,
    "ssm.inner_size": INNER,
}
T5 = HEADS_64 | {"d_ff": INNER, "d_kv": 64, "feed_forward_proj": "gated-gelu"}
T5_KEYS = {"attention.key_length": 64, "attention.relative_buckets_count": 32}
NORM = "attention.layer_norm_epsilon"
CASES = {
    "llama": Case("llama", HEADS_64, {"rope.dimension_count": 64}),
    "llama, tied, 16k tokens": Case(
        "llama",
        HEADS_64 | {"tie_word_embeddings": True},
        {"rope.dimension_count": 64},
        vocabulary=16384 + 64,
    ),
    "llama, untied, 17k tokens": Case(
        "llama", HEADS_64, {"rope.dimension_count": 64}, vocabulary=17408, head="Q6_K"
    ),
    "qwen2": Case("qwen2", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "qwen3": Case("qwen3", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128}),
    "gemma2": Case(
        "gemma2",
        HEADS_64 | {"tie_word_embeddings": True, "sliding_window": 8},
        GEMMA_KEYS | {"attention.sliding_window": 8},
    ),
    "gemma3": Case(
        "gemma3",
        HEADS_64 | {"tie_word_embeddings": True, "sliding_window": 8},
        GEMMA_KEYS | {"attention.sliding_window": 8},
        kind="gemma3_text",
    ),
    "phi3": Case(
        "phi3",
        {"num_attention_heads": 4, "num_key_value_heads": 2},
        {"rope.dimension_count": 64},
        vocabulary=32064,  # transformers' default padding is token 32000
    ),
    "starcoder2": Case(
        "starcoder2",
        {"num_attention_heads": 4, "num_key_value_heads": 2, "use_bias": True},
        epsilon_key=NORM,
    ),
    "nemotron": Case("nemotron", HEADS_64 | {"norm_eps": 1e-6}),
    "stablelm": Case(
        "stablelm", HEADS_64 | {"use_qkv_bias": True, "layer_norm_eps": 1e-6}, epsilon_key=NORM
    ),
    "bloom": Case(
        "bloom",
        HEADS_64 | {"tie_word_embeddings": True, "layer_norm_epsilon": 1e-6},
        epsilon_key=NORM,
    ),
    "mamba": Case("mamba", HEADS_64 | {"state_size": 16, "tie_word_embeddings": True}, MAMBA_KEYS),
    "T5": Case(
        "t5encoder", T5, T5_KEYS, epsilon_key=NORM, kind="t5", library=AutoModelForTextEncoding
    ),
    "UMT5": Case(
        "t5encoder", T5, T5_KEYS, epsilon_key=NORM, kind="umt5", library=AutoModelForTextEncoding
    ),
}
ARCHITECTURES = {kind: arch for arch, kind in gguf.MODEL_ARCH_NAMES.items()}


def write(path: Path, case: Case, change: Callable[[dict[str, Any]], None] | None = None) -> None:
    """Write a random model as llama.cpp's converter would; ``change`` may spoil what is written."""
    torch.manual_seed(1)
    model = random_model(case)
    names = gguf.get_tensor_name_map(ARCHITECTURES[case.name], NUM_LAYERS)
    tensors: dict[str, Any] = {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        bare = name.removeprefix("transformer.") if case.name == "bloom" else name
        gguf_name = names.get_name(bare, (".weight", ".bias"))
        assert gguf_name is not None, name
        weights = as_llama_cpp_keeps_it(case, gguf_name, parameter.detach().numpy())
        has_blocks = weights.ndim == 2 and not weights.shape[1] % WIDTH
        kind = KINDS[number % len(KINDS)] if has_blocks else "F32"
        if gguf_name in {"token_embd.weight", "output.weight"}:
            kind = case.head
        tensors[gguf_name] = (quantised(weights, kind), gguf.GGMLQuantizationType[kind])
    keys: dict[str, Any] = {
        "context_length": 128,
        "block_count": NUM_LAYERS,
        "embedding_length": WIDTH,
        "feed_forward_length": INNER,
        "attention.head_count": case.config["num_attention_heads"],
        "attention.head_count_kv": case.config["num_key_value_heads"],
        case.epsilon_key: 1e-6,
        "rope.freq_base": 10000.0,
    } | case.keys
    content = {
        "architecture": case.name,
        "name": f"a random {case.kind or case.name}",  # transformers tells UMT5 by it
        "keys": keys,
        "tensors": tensors,
    }
    if change is not None:
        change(content)
    write_content(path, content, case.vocabulary)


def random_model(case: Case) -> PreTrainedModel:
    sizes: dict[str, Any] = {
        "vocab_size": case.vocabulary,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": NUM_LAYERS,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }
    config = CONFIG_MAPPING[case.kind or case.name](**sizes | case.config)
    model = case.library.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():  # norms and biases too
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return cast("PreTrainedModel", model)


def as_llama_cpp_keeps_it(case: Case, name: str, weights: np.ndarray) -> np.ndarray:
    if case.name.startswith(("gemma", "nemotron")) and name.endswith("norm.weight"):
        return weights + np.float32(1)
    if name.endswith(".ssm_a"):
        return cast("np.ndarray", -np.exp(weights))
    if case.name == "bloom" and ".attn_qkv." in name:
        heads = weights.reshape(case.config["num_attention_heads"], 3, -1, *weights.shape[1:])
        return heads.swapaxes(0, 1).reshape(weights.shape)
    if "conv" in name and weights.ndim == 3:
        return weights.squeeze(1)
    if case.name == "llama" and (".attn_q." in name or ".attn_k." in name):
        key = "num_attention_heads" if ".attn_q." in name else "num_key_value_heads"
        heads = weights.reshape(case.config[key], 2, -1, *weights.shape[1:])
        return heads.swapaxes(1, 2).reshape(weights.shape)
    return weights


def quantised(weights: np.ndarray, kind: str) -> np.ndarray:
    weights = np.ascontiguousarray(weights, dtype=np.float32)
    by_libgguf = kind.endswith("K") or kind.startswith("IQ")
    quantise = libgguf.quantize_rows if by_libgguf else gguf.quants.quantize
    return cast("np.ndarray", quantise(weights, gguf.GGMLQuantizationType[kind]))


def write_content(path: Path, content: dict[str, Any], vocabulary: int) -> None:
    architecture = content["architecture"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(content["name"])
    for key, value in content["keys"].items():
        kind = gguf.GGUFValueType.FLOAT32 if isinstance(value, float) else gguf.GGUFValueType.UINT32
        writer.add_key_value(f"{architecture}.{key}", value, kind)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{number}" for number in range(vocabulary)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, (data, kind) in content["tensors"].items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
