"""The room that is left for the cache of keys and values: what generation really takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import distorch
from distorch.errors import AllocationError
from distorch.integrations.huggingface.cache import cache_bytes
from tests.integrations.huggingface.test_architectures import MODELS
from tests.plan_strategies import roomy

MIB = 1 << 20
WITH_CACHE = [name for name in MODELS if name.endswith(("CausalLM", "ConditionalGeneration"))]


def made(name: str) -> Any:
    return getattr(transformers, name)._from_config(MODELS[name], dtype=torch.bfloat16).eval()


def kept_bytes(model: Any, num_tokens: int) -> tuple[int, int]:
    """What the cache holds after so many tokens, and the largest layer of it."""
    ids = torch.arange(num_tokens).view(1, -1) % 200 + 3
    with torch.inference_mode():
        cache = model(ids, use_cache=True).past_key_values
    layers = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]
    return sum(layers), max(layers)


@pytest.mark.parametrize("num_tokens", [5, 40])
@pytest.mark.parametrize("name", [n for n in WITH_CACHE if n != "T5ForConditionalGeneration"])
def test_the_cache_is_as_large_as_foretold(name: str, num_tokens: int) -> None:
    model = made(name)
    held, largest = kept_bytes(model, num_tokens)
    foretold = cache_bytes(model, num_tokens)
    assert held + largest <= foretold <= 1.2 * (held + largest)  # a window keeps a token less


@pytest.mark.parametrize("name", ["T5EncoderModel", "T5ForConditionalGeneration", "BertModel"])
def test_nothing_is_said_of_others(name: str) -> None:
    assert cache_bytes(made(name), 1000) == 0


def test_room_is_left_for_it_and_stays_left(tmp_path: Path) -> None:
    made("LlamaForCausalLM").save_pretrained(tmp_path)
    machine = roomy("cpu", "disk")
    small = machine.replace_tier(replace(machine.tier("cpu"), free_bytes=8 * MIB))
    tokens = 8 * MIB // 1024  # of 384 bytes, and the copy: more than a third of what is free
    model = distorch.load(tmp_path, "auto", machine=small, cache_tokens=tokens)
    handle = distorch.handle_of(model)
    most = 8 * MIB - cache_bytes(model, tokens)
    assert handle.weight_bytes <= most
    with pytest.raises(AllocationError, match=r"are to be left beside the weights on cpu"):
        distorch.load(tmp_path, "auto", machine=small, cache_tokens=100 * tokens)
