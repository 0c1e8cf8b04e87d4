"""Previews: what they show of latents, that nothing else changes, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import distorch
from distorch.errors import ModelError
from distorch.integrations.diffusers.asked import Picture
from distorch.integrations.diffusers.drawing import draw
from distorch.integrations.diffusers.preview import Preview, finished, grid, painted
from examples import tiny

FRAMES, ROWS, COLUMNS, CHANNELS = 3, 4, 6, 5
KINDS = {"flux": None, "qwen_image": None, "wan": 5, "wan_two_experts": 5}
preview: Any = import_module("distorch.integrations.diffusers.preview")


def _latents() -> Tensor:
    """Two videos by frames, rows, columns, channels; no value stands twice."""
    count = 2 * FRAMES * ROWS * COLUMNS * CHANNELS
    return torch.arange(count).view(2, FRAMES, ROWS, COLUMNS, CHANNELS)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels, rows, columns": lambda it: it[:, 1].movedim(-1, 1),
    "channels, frames, rows, columns": lambda it: it.movedim(-1, 1),
    "frames, channels, rows, columns": lambda it: it.movedim(-1, 2),
    "frames, rows, columns, channels": lambda it: it,
    "tokens": lambda it: it.flatten(1, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_middle_frame_is_found_in_every_layout(layout: str) -> None:
    expected = _latents()[0, 1].float()
    found = grid(LAYOUTS[layout](_latents()), CHANNELS, COLUMNS / ROWS, FRAMES)
    assert torch.equal(found, expected)


def test_tokens_of_a_size_that_nobody_told_make_a_picture_of_its_shape() -> None:
    tokens = torch.zeros(1, 39 * 52, 2)
    assert grid(tokens, None, 4 / 3, 1).shape == (39, 52, 2)
    assert grid(tokens, None, 1.31, 5).shape == (39, 52, 2), "near it, and five do not divide it"
    assert grid(torch.zeros(1, 37, 2), None, 1, 1).shape[2] == 2


@pytest.mark.filterwarnings("ignore:__array__")  # diffusers' own way with numpy
@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler"])
def test_the_line_through_two_steps_leads_to_the_picture(name: str) -> None:
    """A model that knows the picture: from the second step on, the preview shows it."""
    scheduler: Any = getattr(diffusers, name)()
    scheduler.set_timesteps(8)
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 1, 4, 8, 8)
    flow = name.startswith("Flow")
    latents = noise if flow else clean + noise * scheduler.sigmas[0]
    before = None
    for number, time in enumerate(scheduler.timesteps):
        said = noise - clean if flow else noise
        latents = scheduler.step(said, time, latents).prev_sample
        now = float(scheduler.sigmas[scheduler.step_index]), latents
        if number:
            torch.testing.assert_close(finished(before, now), clean, atol=1e-3, rtol=1e-3)
        else:
            assert finished(before, now) is latents
        before = now


def test_what_differs_is_seen_and_nothing_makes_it_fail() -> None:
    torch.manual_seed(0)
    latents = torch.randn(8, 8, 16) / 10
    latents[:, 4:] += torch.randn(16)
    seen = np.asarray(painted(latents).convert("L")).astype(float)
    assert abs(seen[:, :96].mean() - seen[:, 160:].mean()) > 64
    assert seen.shape == (256, 256)
    assert np.array_equal(seen, np.asarray(painted(latents).convert("L")))
    for odd in (
        torch.full((4, 4, 8), torch.nan),
        torch.full((4, 4, 8), torch.inf),
        torch.randn(4, 6, 1),
        torch.zeros(1, 1, 4),
    ):
        assert painted(odd).mode == "RGB"


@pytest.mark.parametrize("kind", KINDS)
def test_a_preview_changes_no_bit_and_moves_no_weight(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preview, "_SECONDS", 0)
    asked = Picture(prompt=tiny.PROMPT, size=(64, 128), steps=3, frames=KINDS[kind])
    drawn, moved, seen = [], [], []

    def look(*_: int) -> None:
        if (tmp_path / "preview.png").exists():
            with Image.open(tmp_path / "preview.png") as image:
                seen.append((image.width / image.height, image.tobytes()))

    for path in (None, tmp_path / "preview.png"):
        pipe = distorch.load(tiny.pipeline(kind), "cpu,8mb;disk,*")
        handle = distorch.handle_of(pipe)
        drawn.append([np.asarray(frame) for frame in draw(pipe, asked, look, path)])
        moved.append({name: (it.moved_bytes, it.stats()) for name, it in handle.items()})
        handle.remove()
    assert np.array_equal(drawn[0], drawn[1])
    look()
    assert len(seen) == len({pixels for _, pixels in seen}) == 3, "another picture after each step"
    assert {aspect for aspect, _ in seen} == {0.5}
    assert [path.name for path in tmp_path.iterdir()] == ["preview.png"]
    for name, (moved_bytes, stats) in moved[0].items():
        assert moved[1][name][0] == moved_bytes
        assert moved[1][name][1].num_steps == stats.num_steps
        assert moved[1][name][1].num_visits == stats.num_visits


def test_it_is_not_written_again_at_once(tmp_path: Path) -> None:
    pipe: Any = tiny.flux()
    takes = signature(type(pipe).__call__).parameters
    shown = Preview(tmp_path / "preview.png", pipe, {}, takes)
    shown.show(pipe, torch.randn(1, 16, 16))
    before = (tmp_path / "preview.png").stat().st_ino
    shown.show(pipe, torch.randn(1, 16, 16))
    assert (tmp_path / "preview.png").stat().st_ino == before


def test_a_pipeline_that_shows_no_latents_is_named(tmp_path: Path) -> None:
    pipe = diffusers.DDPMPipeline(unet=None, scheduler=diffusers.DDPMScheduler())
    with pytest.raises(ModelError, match="DDPMPipeline does not show its latents") as caught:
        Preview(tmp_path / "preview.png", pipe, {}, {})
    assert caught.value.hint == "the same without --preview"
