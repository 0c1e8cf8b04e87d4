"""What a step is given: more of it costs more, and what it costs is counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from distorch.integrations.families import profile_family
from tests.integrations.configurations import SMALL, attention_flops, llama, saved, small

pytest.importorskip("transformers", reason="builds transformers' models")


@pytest.mark.parametrize("class_name", SMALL)
def test_twice_the_batch_is_twice_the_flops(tmp_path: Path, class_name: str) -> None:
    model = small(tmp_path, class_name)
    one, two = (profile_family(model, size="128x64", tokens=16, batch=n) for n in (1, 2))
    assert two.total_flops == 2 * one.total_flops
    assert one.activation_bytes < two.activation_bytes <= 2 * one.activation_bytes
    assert two.blocks == one.blocks
    assert " batch 2 " in two.name


@pytest.mark.parametrize("class_name", SMALL)
def test_more_pixels_or_text_never_cost_less(tmp_path: Path, class_name: str) -> None:
    # Z-Image fills both up to 32 tokens
    steps = [("64x64", 8), ("128x128", 8), ("128x128", 64)]
    found = [profile_family(small(tmp_path, class_name), size=size, tokens=n) for size, n in steps]
    assert [profile.total_flops for profile in found] == sorted(
        {profile.total_flops for profile in found}
    )


def test_a_wan_that_starts_from_an_image_is_given_one(tmp_path: Path) -> None:
    config = SMALL["WanTransformer3DModel"] | {
        "_class_name": "WanTransformer3DModel",
        "in_channels": 36,
        "image_dim": 64,
        "added_kv_proj_dim": 256,
    }
    without = config | {"image_dim": None, "added_kv_proj_dim": None}
    from_image, from_text = (
        profile_family(saved(tmp_path, each), size="64x64", frames=5) for each in (config, without)
    )
    keys_and_values = 2 * (2 * 2 * 257 * 256 * 256)  # of the image's tokens, in two layers
    assert from_image.total_flops > from_text.total_flops + keys_and_values


def test_a_prompt_and_a_step_of_generation(tmp_path: Path) -> None:
    """A weight costs two operations a token; the head is asked for the last token's logits."""
    model = llama(tmp_path)
    prompt, step = profile_family(model, tokens=100), profile_family(model, tokens=1)
    layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128
    head = 64 * 1000
    assert step.total_flops == 2 * (2 * layer + head) + attention_flops(1, 1, 64, 2)
    assert prompt.total_flops == (2 * (100 * 2 * layer + head) + attention_flops(100, 100, 64, 2))
    assert prompt.blocks == step.blocks
    assert (prompt.name, step.name) == ("llama 100 tokens bf16", "llama 1 tokens bf16")
    assert profile_family(model, tokens=100, batch=2).total_flops == 2 * prompt.total_flops


def test_the_cache_of_a_prompt_counts_as_activations(tmp_path: Path) -> None:
    few, many = (profile_family(llama(tmp_path), tokens=n).activation_bytes for n in (1000, 2000))
    assert many - few >= 1000 * 2 * 2 * 32 * 2  # keys and values, two layers of 32, bf16
