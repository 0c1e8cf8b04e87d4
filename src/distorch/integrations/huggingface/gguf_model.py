"""A GGUF file as a transformers model: configuration, names, and the few tensors kept otherwise."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, GenerationConfig, PretrainedConfig
from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

from distorch.errors import FormatError, ModelError
from distorch.formats import Checkpoint, TensorInfo
from distorch.integrations.huggingface.classes import model_class
from distorch.integrations.huggingface.skeleton import Built, build_empty, match
from distorch.tiers.sources import Amend

__all__ = ["build"]

_LAYER = re.compile(r"(?:enc\.)?blk\.(\d+)\.")
_COMPUTED = {"rope_freqs.weight"}  # tensors that transformers computes from the configuration

_Rule = tuple[str, Callable[[PretrainedConfig, TensorInfo], Amend]]


def build(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Built:
    """Build the model of a GGUF file, on the meta device, to compute in ``dtype``.

    Raises:
        ModelError: the architecture or a tensor is not one that can be loaded.
    """
    architecture = str(checkpoint.metadata.get("general.architecture", ""))
    if architecture not in _RULES:
        raise ModelError(
            f"{checkpoint.path} is of the architecture {architecture!r}, not one loaded yet",
            hint=f"a model of one of these: {', '.join(sorted(_RULES))}",
        )
    _check_layers(checkpoint, architecture)
    config = _config(checkpoint)
    model = build_empty(model_class(config), config, dtype)
    if model.can_generate():
        model.generation_config = GenerationConfig.from_model_config(config)
    names = get_gguf_hf_weights_map(model, TensorProcessor())
    infos = {names.get(name, name): info for name, info in checkpoint.items()}
    infos = match(model, infos, checkpoint.path, ignored=_COMPUTED)
    amend = {
        model_name: rule(config, infos[model_name])
        for gguf_name, model_name in names.items()
        for pattern, rule in _RULES[architecture]
        if model_name in infos and re.search(pattern, gguf_name)
    }
    return Built(model=model, infos=infos, amend=amend)


def _config(checkpoint: Checkpoint) -> PretrainedConfig:
    """Let transformers read the configuration from a small copy of the header.

    Its reader walks every element of the vocabulary (seconds) and maps the file as it is; the copy
    has the scalars and the tensors' names only, taken from a header that was checked.
    """
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "header.gguf"
        _write_small(checkpoint, small)
        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(
                folder, gguf_file=small.name, local_files_only=True
            )
        except Exception as error:
            raise ModelError(
                f"transformers cannot read the configuration in {checkpoint.path}: {error}",
                hint="the file may be damaged, or too new for the transformers that is installed",
            ) from error
    config.vocab_size = checkpoint["token_embd.weight"].shape[0]  # not every architecture maps it
    return config


def _check_layers(checkpoint: Checkpoint, architecture: str) -> None:
    """Refuse a number of layers that the tensors deny: a model of 2**31 layers takes for ever."""
    if len(getattr(checkpoint.get("token_embd.weight"), "shape", ())) != 2:  # noqa: PLR2004
        raise FormatError(
            f"{checkpoint.path} has no token_embd.weight", hint="a whole language model's file"
        )
    said = checkpoint.metadata.get(f"{architecture}.block_count")
    found = {layer[1] for name in checkpoint if (layer := _LAYER.match(name))}
    if said != len(found):
        raise FormatError(
            f"{checkpoint.path} says it has {said} layers, and holds {len(found)}",
            hint="the file is damaged or is a part of one; download it again",
        )


def _write_small(checkpoint: Checkpoint, path: Path) -> None:
    architecture = str(checkpoint.metadata["general.architecture"])
    writer = gguf.GGUFWriter(path, architecture)
    for key in checkpoint.metadata:
        if key.startswith("tokenizer.ggml.") and not key.endswith("_token_id"):
            continue  # the vocabulary
        value: Any = checkpoint.metadata[key]
        if key in {"general.architecture", "general.alignment", "general.name"}:
            continue  # the writer's own
        if isinstance(value, (bool, int, float, str)):
            writer.add_key_value(key, value, _value_type(value))
        elif len(value) and not isinstance(value[0], (list, tuple)):
            writer.add_array(key, list(value))
    writer.add_name(_name(checkpoint))
    if f"{architecture}.vocab_size" not in checkpoint.metadata:
        writer.add_vocab_size(checkpoint["token_embd.weight"].shape[0])
    for name in checkpoint:
        writer.add_tensor(name, np.zeros(1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name(checkpoint: Checkpoint) -> str:
    """The model's name, by which transformers tells UMT5 from T5; there, each layer has biases."""
    name = str(checkpoint.metadata.get("general.name", ""))
    is_umt5 = "enc.blk.1.attn_rel_b.weight" in checkpoint
    return "umt5" if is_umt5 and "umt5" not in name.lower() else name


def _value_type(value: bool | float | str) -> gguf.GGUFValueType:  # noqa: FBT001  any scalar
    if isinstance(value, bool):
        return gguf.GGUFValueType.BOOL
    if isinstance(value, int):
        return gguf.GGUFValueType.INT64 if value < 0 else gguf.GGUFValueType.UINT64
    return gguf.GGUFValueType.STRING if isinstance(value, str) else gguf.GGUFValueType.FLOAT64


def _minus_one(_config: PretrainedConfig, info: TensorInfo) -> Amend:
    """Gemma's and Nemotron's norms multiply by 1 + w; llama.cpp keeps the sum."""
    _check_f32(info)

    def amend(memory: memoryview) -> None:
        values = np.frombuffer(memory, np.float32)
        np.subtract(values, np.float32(1), out=values)

    return amend


def _log_of_minus(_config: PretrainedConfig, info: TensorInfo) -> Amend:
    """Mamba's decays are -exp(w); llama.cpp keeps the decay."""
    _check_f32(info)

    def amend(memory: memoryview) -> None:
        values = np.frombuffer(memory, np.float32)
        np.log(-values, out=values)

    return amend


def _check_f32(info: TensorInfo) -> None:
    if info.dtype != "F32":
        raise FormatError(f"{info.name} is {info.dtype}, not F32", hint="convert the model again")


def _heads(attribute: str) -> Callable[[PretrainedConfig, TensorInfo], Amend]:
    """llama.cpp interleaves the two halves of each head's rows; transformers keeps them apart."""

    def rule(config: PretrainedConfig, info: TensorInfo) -> Amend:
        num_heads = getattr(config, attribute, None) or config.num_attention_heads
        first = info.shape[0] // max(2 * num_heads, 1)
        return _regrouped(info, (num_heads, first, 2))

    return rule


def _fused(config: PretrainedConfig, info: TensorInfo) -> Amend:
    """llama.cpp keeps all heads' queries, then keys, then values; Bloom's go head by head."""
    return _regrouped(info, (1, 3, config.num_attention_heads))


def _regrouped(info: TensorInfo, axes: tuple[int, int, int]) -> Amend:
    """Cut the rows of a weight into three axes and the rest, and swap the second and the third.

    Rows are moved as stored: a block of a packed format never crosses a row.
    """
    rows = info.shape[0]
    if math.prod(axes) < 1 or rows % math.prod(axes):
        raise FormatError(
            f"{info.name} has {rows} rows, which {axes[0] * axes[-1]} heads cannot share",
            hint="convert the model again",
        )

    def amend(memory: memoryview) -> None:
        values = np.frombuffer(memory, np.uint8)
        values[:] = values.reshape(*axes, -1).swapaxes(1, 2).reshape(-1)

    return amend


_GEMMA: tuple[_Rule, ...] = ((r"norm\.weight$", _minus_one),)
_LLAMA: tuple[_Rule, ...] = (
    (r"\.attn_q\.(weight|bias)$", _heads("num_attention_heads")),
    (r"\.attn_k\.(weight|bias)$", _heads("num_key_value_heads")),
)
_RULES: Mapping[str, tuple[_Rule, ...]] = {
    "bloom": ((r"\.attn_qkv\.(weight|bias)$", _fused),),
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "llama": _LLAMA,
    "mamba": ((r"\.ssm_a$", _log_of_minus),),
    "nemotron": _GEMMA,
    "phi3": (),
    "qwen2": (),
    "qwen3": (),
    "stablelm": (),
    "starcoder2": (),
    "t5encoder": (),
}
"""Architectures whose tensors are loaded as they lie, but for these. From llama.cpp's converter
(convert_hf_to_gguf.py); transformers' own tensor processors undo the same changes."""
