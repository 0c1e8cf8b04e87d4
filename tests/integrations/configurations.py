"""Configurations of small models, in a directory as ``profile_family`` reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.integrations.diffusers.originals import TINY

SMALL: dict[str, dict[str, Any]] = {
    tiny.class_name: dict(tiny.config) for name, tiny in TINY.items() if name != "wan-2.1-i2v"
}
SMALL["FluxTransformer2DModel"]["num_layers"] = 2
_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def saved(folder: Path, config: object, name: str = "model") -> str:
    """Write a configuration into a directory of its own, and return that."""
    directory = folder / name
    directory.mkdir(parents=True, exist_ok=True)
    text = config if isinstance(config, str) else json.dumps(config)
    (directory / "config.json").write_text(text)
    return str(directory)


def small(folder: Path, class_name: str) -> str:
    """Write the configuration of a small model of diffusers."""
    return saved(folder, {"_class_name": class_name, **SMALL[class_name]}, class_name)


def llama(folder: Path) -> str:
    """Write the configuration of a small language model."""
    return saved(folder, _LLAMA, "llama")


def attention_flops(queries: int, keys: int, width: int, layers: int) -> int:
    return 4 * queries * keys * width * layers
