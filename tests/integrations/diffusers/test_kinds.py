"""Pipelines of several kinds: what diffusers does with them works on distributed ones, too."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import distorch
from distorch.convert import convert
from distorch.errors import ModelError
from examples import tiny

SIZE = 32
LINES = ["cpu,8mb;disk,*", "cpu,0b;disk,*"]
KINDS: dict[str, dict[str, Any]] = {
    "flux": {"prompt": ["a fox", "a hen"], "negative_prompt": "snow", "true_cfg_scale": 2.0},
    "qwen_image": {"prompt": tiny.PROMPT, "negative_prompt": "snow"},
    "wan": {"prompt": tiny.PROMPT, "negative_prompt": "snow", "num_frames": 5},
    "wan_i2v": {"prompt": tiny.PROMPT, "num_frames": 5, "image": Image.new("RGB", (SIZE, SIZE))},
    "wan_two_experts": {"prompt": tiny.PROMPT, "num_frames": 5},
}


def draw(pipe: Any, **asked: Any) -> np.ndarray[Any, Any]:
    """Make pictures, or a video."""
    pipe.set_progress_bar_config(disable=True)
    made = pipe(
        height=SIZE,
        width=SIZE,
        num_inference_steps=2,
        output_type="np",
        generator=torch.Generator().manual_seed(1),
        max_sequence_length=16,
        **asked,
    )
    return np.asarray(made.frames if "frames" in made else made.images)


def plain(path: Path) -> Any:
    return diffusers.DiffusionPipeline.from_pretrained(path, local_files_only=True)


@contextmanager
def distributed(path: Path, line: str) -> Iterator[Any]:
    pipe = distorch.load(path, line)
    yield pipe
    distorch.handle_of(pipe).remove()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_bits(kind: str) -> None:
    path, asked = tiny.pipeline(kind), KINDS[kind]
    expected = draw(plain(path), **asked)
    for line in LINES:
        with distributed(path, line) as pipe:
            for _ in range(2):
                assert np.array_equal(draw(pipe, **asked), expected), line


@pytest.mark.parametrize("kind", KINDS)
def test_no_model_is_loaded_beside_the_distributed_one(kind: str) -> None:
    with distributed(tiny.pipeline(kind), LINES[0]) as pipe:
        models = {name for name, it in pipe.components.items() if isinstance(it, torch.nn.Module)}
        handles = distorch.handle_of(pipe)
        assert set(handles) == models
        assert all(distorch.handle_of(getattr(pipe, name)) is handles[name] for name in models)


def test_both_experts_run() -> None:
    with distributed(tiny.pipeline("wan_two_experts"), LINES[0]) as pipe:
        draw(pipe, **KINDS["wan_two_experts"])
        steps = {name: each.stats().num_steps for name, each in distorch.handle_of(pipe).items()}
        assert steps["transformer"] == steps["transformer_2"] == 2  # cond and uncond, one step each


def test_a_callback_sees_and_changes_each_step() -> None:
    path, seen = tiny.pipeline("flux"), []

    def halve(_pipe: Any, step: int, _time: Any, found: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return {"latents": found["latents"] / 2}

    expected = draw(plain(path), prompt=tiny.PROMPT, callback_on_step_end=halve)
    with distributed(path, LINES[0]) as pipe:
        found = draw(pipe, prompt=tiny.PROMPT, callback_on_step_end=halve)
    assert seen == [0, 1, 0, 1]
    assert np.array_equal(found, expected)


def test_another_scheduler_may_be_put_in() -> None:
    path = tiny.pipeline("wan")
    drawn = []
    with distributed(path, LINES[0]) as pipe:
        for each in (plain(path), pipe):
            scheduler = diffusers.UniPCMultistepScheduler.from_config(
                each.scheduler.config, prediction_type="flow_prediction", use_flow_sigmas=True
            )
            each.scheduler = scheduler
            drawn.append(draw(each, **KINDS["wan"]))
    expected, found = drawn
    assert np.array_equal(found, expected)


def test_diffusers_loads_loras_into_a_distributed_pipeline() -> None:
    path = tiny.pipeline("flux")
    target = "transformer.transformer_blocks.0.attn.to_q"
    torch.manual_seed(1)
    lora = {
        f"{target}.lora_A.weight": torch.randn(4, 256),
        f"{target}.lora_B.weight": torch.randn(256, 4),
    }
    before = plain(path)
    without = draw(before, prompt=tiny.PROMPT)
    before.load_lora_weights(lora)
    expected = draw(before, prompt=tiny.PROMPT)
    assert not np.array_equal(expected, without)
    with distributed(path, LINES[0]) as pipe:
        pipe.load_lora_weights(lora)
        assert np.array_equal(draw(pipe, prompt=tiny.PROMPT), expected)
        pipe.unload_lora_weights()
        assert np.array_equal(draw(pipe, prompt=tiny.PROMPT), without)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The transformer of the tiny FLUX in a GGUF file."""
    path = tmp_path_factory.mktemp("packed") / "flux-Q8_0.gguf"
    convert(tiny.pipeline("flux") / "transformer", path, "Q8_0")
    return path


def test_a_model_may_come_from_a_file_of_its_own(packed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny.pipeline("flux"), tmp_path / "flux")
    shutil.rmtree(folder / "transformer")
    drawn = []
    for line in ("cpu,*", *LINES):
        pipe = distorch.load(folder, line, files={"transformer": packed})
        handle = distorch.handle_of(pipe)
        assert handle["transformer"].plan.model_bytes < 0.4 * sum(
            weight.numel() * 4 for weight in pipe.transformer.parameters()
        )
        drawn.append(draw(pipe, prompt=tiny.PROMPT))
        handle.remove()
    assert all(np.array_equal(each, drawn[0]) for each in drawn)


def test_a_file_for_no_model_is_an_error(packed: Path) -> None:
    with pytest.raises(ModelError, match="has no model 'transformr'"):
        distorch.load(tiny.pipeline("flux"), "cpu,*", files={"transformr": packed})
    with pytest.raises(ModelError, match="is a single model"):
        distorch.load(packed, "cpu,*", files={"transformer": packed})


def test_a_model_that_is_distributed_already_is_named(packed: Path) -> None:
    pipe = plain(tiny.pipeline("flux"))
    pipe.transformer = distorch.load(packed, "cpu,4mb;disk,*")
    with pytest.raises(ModelError, match="transformer is distributed already"):
        distorch.distribute(pipe, "cpu,8mb;disk,*")
    assert not hasattr(pipe.vae, "_distorch_handle")
    distorch.handle_of(pipe.transformer).remove()


def test_a_model_under_two_names_is_distributed_once() -> None:
    path = tiny.pipeline("flux")
    pipe = plain(path)
    expected = draw(pipe, prompt=tiny.PROMPT)
    pipe.register_modules(image_encoder=pipe.text_encoder)
    handle = distorch.distribute(pipe, LINES[0])
    assert {"text_encoder", "image_encoder"} & set(handle) == {"text_encoder"}
    assert np.array_equal(draw(pipe, prompt=tiny.PROMPT), expected)
    handle.remove()
