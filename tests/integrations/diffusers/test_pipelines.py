"""Pipelines: the same pictures, within one budget, and nothing moves that still fits."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import distorch
from distorch.errors import AllocationError, ExecutorError, ModelError
from distorch.integrations.diffusers.pipelines import PipelineHandle
from examples import tiny
from tests.integrations.diffusers.make import HEIGHT, NUM_STEPS, WIDTH, flux_pipeline, picture

_MIB = 1 << 20
_ROOM = 64 * _MIB  # more than all models of the tiny pipeline
LINES = ["cpu,*", "cpu,16mb;disk,*", "cpu,1mb;disk,*", "cpu,30%;disk,70%", "cpu,0b;disk,*"]


@pytest.fixture(scope="module")
def expected() -> np.ndarray[Any, Any]:
    return picture(flux_pipeline())


@pytest.fixture
def pipe() -> Iterator[Any]:
    pipe = flux_pipeline()
    yield pipe
    with_handle = pipe.__dict__.get("_distorch_handle")
    if with_handle is not None:
        with_handle.remove()


@pytest.mark.parametrize("line", LINES)
def test_pictures_are_the_same_bits(line: str, pipe: Any, expected: Any) -> None:
    handle = distorch.distribute(pipe, line)
    assert isinstance(handle, PipelineHandle)
    assert list(handle) == ["vae", "text_encoder", "text_encoder_2", "transformer"]
    for _ in range(2):
        assert np.array_equal(picture(pipe), expected)
    handle.remove()
    assert np.array_equal(picture(pipe), expected)
    assert not hasattr(pipe.transformer, "_hf_hook")
    assert all(type(weight) is torch.nn.Parameter for weight in pipe.transformer.parameters())


def test_a_picture_that_is_edited_is_the_same_bits() -> None:
    """Qwen-Image-Edit: the VAE reads the picture, and so does the text encoder, by its eyes."""
    torch.manual_seed(0)
    pipe: Any = tiny.qwen_image_edit()
    expected, other = _edited(pipe, "orange"), _edited(pipe, "blue")
    assert not np.array_equal(expected, other), "the picture matters"
    for line in ("cpu,16mb;disk,*", "cpu,0b;disk,*"):
        handle = distorch.distribute(pipe, line)
        assert isinstance(handle, PipelineHandle)
        assert set(handle) == {"vae", "text_encoder", "transformer"}
        assert np.array_equal(_edited(pipe, "orange"), expected), line
        handle.remove()


def _edited(pipe: Any, colour: str) -> np.ndarray[Any, Any]:
    pipe.set_progress_bar_config(disable=True)
    found: np.ndarray[Any, Any] = pipe(
        image=Image.new("RGB", (64, 64), colour),
        prompt=tiny.PROMPT,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=2,
        max_sequence_length=16,
        output_type="np",
        generator=torch.Generator().manual_seed(1),
    ).images
    return found


def test_a_number_leaves_so_much_to_the_donor(pipe: Any, expected: Any) -> None:
    handle = distorch.distribute(pipe, virtual_vram_gb=20 / 1024, donor="disk", compute="cpu")
    transformer = handle["transformer"].plan
    at_rest = transformer.bytes_by_tier["cpu"]
    total = sum(each.plan.model_bytes for each in handle.values())
    assert total - 20 * _MIB - 4 * _MIB < at_rest <= total - 20 * _MIB
    assert np.array_equal(picture(pipe), expected)


def test_models_never_have_more_than_their_budget(pipe: Any, expected: Any) -> None:
    handle = distorch.distribute(pipe, "cpu,6mb;disk,*")
    assert handle.budget_bytes is not None
    seen: dict[str, int] = {}
    for name in handle:
        module = getattr(pipe, name)
        leaf = next(each for each in module.modules() if isinstance(each, torch.nn.Linear))
        leaf.register_forward_pre_hook(
            lambda *_, name=name: seen.__setitem__(name, handle.weight_bytes["cpu"])
        )
    assert np.array_equal(picture(pipe), expected)
    assert set(seen) >= {"text_encoder", "text_encoder_2", "transformer"}
    assert max(seen.values()) <= handle.budget_bytes
    assert seen["transformer"] >= handle["transformer"].plan.held_bytes


def test_nothing_moves_that_still_fits(pipe: Any) -> None:
    """The two text encoders and the VAE fit beside each other, the transformer beside none."""
    handle = distorch.distribute(pipe, "cpu,24mb;disk,*")
    moved: list[dict[str, int]] = []
    for _ in range(3):
        picture(pipe)
        moved.append({name: each.moved_bytes for name, each in handle.items()})
    assert (
        moved[2]["transformer"] - moved[1]["transformer"] <= handle["transformer"].plan.held_bytes
    )
    handle.remove()
    handle = distorch.distribute(pipe, f"cpu,{_ROOM}b;disk,*")
    assert handle.budget_bytes is None, "all of them fit"


def test_a_model_that_runs_again_is_not_brought_again(pipe: Any) -> None:
    handle = distorch.distribute(pipe, "cpu,16mb;disk,*")
    picture(pipe)
    transformer: Any = handle["transformer"]
    assert transformer.moved_bytes == transformer.plan.bytes_by_tier["cpu"], "once in all its steps"
    assert transformer.stats().num_steps == NUM_STEPS


def test_each_model_may_have_a_line_of_its_own(pipe: Any, expected: Any) -> None:
    lines = {"transformer": "cpu,50%;disk,50%", "text_encoder_2": "cpu,0b;disk,*"}
    handle = distorch.distribute(pipe, "cpu,*", components=lines)
    assert handle["transformer"].plan.bytes_by_tier["disk"] > 0
    assert handle["text_encoder_2"].plan.bytes_by_tier["cpu"] == 0
    assert set(handle["vae"].plan.bytes_by_tier) == {"cpu"}
    assert np.array_equal(picture(pipe), expected)


def test_a_sleeping_models_weights_can_be_read(pipe: Any) -> None:
    before = pipe.text_encoder_2.encoder.final_layer_norm.weight.clone()
    embedding = pipe.text_encoder_2.shared.weight.sum()
    distorch.distribute(pipe, "cpu,4mb;disk,*")
    assert torch.equal(pipe.text_encoder_2.encoder.final_layer_norm.weight + 0, before)
    assert torch.equal(pipe.text_encoder_2.shared.weight.sum(), embedding)


def test_an_error_in_a_step_leaves_a_pipeline_that_works(pipe: Any, expected: Any) -> None:
    distorch.distribute(pipe, "cpu,16mb;disk,*")
    failing = pipe.transformer.single_transformer_blocks[1].register_forward_pre_hook(_fail)
    with pytest.raises(ZeroDivisionError):
        picture(pipe)
    failing.remove()
    assert np.array_equal(picture(pipe), expected)


def _fail(*_: object) -> None:
    raise ZeroDivisionError


def test_a_pipeline_that_is_forgotten_lets_go_of_all(pipe: Any) -> None:
    handle = distorch.distribute(pipe, "cpu,16mb;disk,*")
    picture(pipe)
    homes = [store for each in handle.values() for store in each._homes.values()]
    told = weakref.ref(pipe.transformer)
    names = list(pipe.components)
    for name in names:
        setattr(pipe, name, None)
    pipe.__dict__.pop("_distorch_handle")
    del handle
    gc.collect()
    assert told() is None
    assert all(store.nbytes == 0 for store in homes), "closed"


def test_what_is_wrong_is_said_before_anything_moves(pipe: Any, expected: Any) -> None:
    with pytest.raises(ModelError, match="has no model 'transformr'"):
        distorch.distribute(pipe, "cpu,*", components={"transformr": "cpu,*"})
    with pytest.raises(AllocationError):
        distorch.distribute(pipe, "cpu,2gbb;disk,*")
    distorch.distribute(pipe, "cpu,*")
    with pytest.raises(ModelError, match="distributed already"):
        distorch.distribute(pipe, "cpu,*")
    assert np.array_equal(picture(pipe), expected)
    distorch.handle_of(pipe).remove()


def test_one_of_its_models_is_not_moved_alone(pipe: Any) -> None:
    handle = distorch.distribute(pipe, "cpu,4mb;disk,*")
    with pytest.raises(ModelError, match="shares its memory"):
        handle["transformer"].rebudget("cpu,*")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    flux_pipeline().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("line", ["cpu,16mb;disk,*", "cpu,1mb;disk,*", "cpu,*"])
def test_a_directory_becomes_a_pipeline(line: str, saved: Path, expected: Any) -> None:
    pipe = distorch.load(saved, line)
    pipe.set_progress_bar_config(disable=True)
    handle = distorch.handle_of(pipe)
    assert set(handle) == {"vae", "text_encoder", "text_encoder_2", "transformer"}
    for _ in range(2):
        assert np.array_equal(picture(pipe), expected)
    handle.remove()
    assert np.array_equal(picture(pipe), expected)


def test_a_damaged_directory_is_named(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "copy")
    (folder / "transformer" / "config.json").unlink()
    (folder / "text_encoder_2" / "config.json").unlink()
    with pytest.raises(ModelError, match="text_encoder_2"):
        distorch.load(folder, "cpu,*")
    (folder / "model_index.json").write_text("[1", encoding="utf-8")
    with pytest.raises(ModelError, match="no index of a pipeline"):
        distorch.load(folder, "cpu,*")


def test_components_are_of_a_pipeline(saved: Path) -> None:
    with pytest.raises(ModelError, match="components are of a pipeline"):
        distorch.load(saved / "transformer", "cpu,*", components={"vae": "cpu,*"})
    with pytest.raises(ModelError, match="components are of a pipeline"):
        distorch.distribute(torch.nn.Linear(2, 2), "cpu,*", components={"vae": "cpu,*"})


def test_a_lora_stays_while_its_model_sleeps_and_wakes(pipe: Any, expected: Any) -> None:
    weights = {
        f"transformer.transformer_blocks.0.attn.to_q.lora_{side}.weight": torch.randn(shape)
        for side, shape in (("A", (4, 256)), ("B", (256, 4)))
    }
    handle = distorch.distribute(pipe, "cpu,*")
    handle["transformer"].add_lora(weights)
    changed = picture(pipe)
    assert not np.array_equal(changed, expected)
    handle.remove()
    handle = distorch.distribute(pipe, "cpu,4mb;disk,*")
    lora = handle["transformer"].add_lora(weights)
    for _ in range(2):
        assert np.array_equal(picture(pipe), changed)
    lora.strength = 0
    assert np.array_equal(picture(pipe), expected)


def test_a_model_that_runs_is_not_put_to_sleep(pipe: Any, expected: Any) -> None:
    distorch.distribute(pipe, "cpu,4mb;disk,*")
    ids = torch.arange(8)[None]
    meanwhile = pipe.transformer.transformer_blocks[1].register_forward_pre_hook(
        lambda *_: pipe.text_encoder_2(ids)
    )
    with pytest.raises(ExecutorError, match="in the midst of a pass"):
        picture(pipe)
    meanwhile.remove()
    assert np.array_equal(picture(pipe), expected)
