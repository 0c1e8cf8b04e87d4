"""Pipelines on devices: the CPU's bits, within the budget, with models on devices of their own."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest

import distorch
from distorch import vgpu
from tests.integrations.diffusers.make import flux_pipeline, picture

_MIB = 1 << 20
_SCHEDULER_BYTES = 4096
_ACTIVATION_BYTES = 2 * _MIB


@pytest.fixture(scope="module")
def expected() -> np.ndarray[Any, Any]:
    return picture(flux_pipeline())


@pytest.mark.parametrize(
    "line",
    [
        "vgpu:0,*",
        "vgpu:0,16mb;cpu,*",
        "vgpu:0,8mb;vgpu:1,12mb;cpu,*",
        "vgpu:0,1mb;cpu,8mb;disk,*",
        "vgpu:0,25%;vgpu:1,50%;cpu,25%",
    ],
)
def test_pictures_are_the_cpus_and_nothing_is_left(line: str, expected: Any) -> None:
    pipe = flux_pipeline()
    handle = distorch.distribute(pipe, line)
    for _ in range(2):
        assert np.array_equal(picture(pipe), expected)
    held = handle.weight_bytes["vgpu:0"]
    assert held <= (handle.budget_bytes or 1 << 30)
    handle.remove()
    gc.collect()
    left = [device.live_bytes for device in vgpu.counters().devices]
    assert left[0] <= _SCHEDULER_BYTES, "the scheduler keeps its few numbers where it computed"
    assert left[1:] == [0, 0]
    assert np.array_equal(picture(pipe), expected)


def test_a_text_encoder_computes_on_a_device_of_its_own(expected: Any) -> None:
    pipe = flux_pipeline()
    lines = {"text_encoder_2": "vgpu:1,4mb;cpu,*", "text_encoder": "cpu,*", "vae": "vgpu:2,*"}
    handle = distorch.distribute(pipe, "vgpu:0,20mb;cpu,*", components=lines)
    assert str(pipe._execution_device) == "vgpu:0"
    assert np.array_equal(picture(pipe), expected)
    assert {each.plan.compute for each in handle.values()} == {"cpu", "vgpu:0", "vgpu:1", "vgpu:2"}
    handle.remove()


def test_turns_keep_the_device_within_the_budget() -> None:
    pipe = flux_pipeline()
    handle = distorch.distribute(pipe, "vgpu:0,16mb;cpu,*")
    budget_bytes = handle.budget_bytes
    assert budget_bytes is not None
    for _ in range(2):
        picture(pipe)
    assert vgpu.counters().devices[0].peak_bytes <= budget_bytes + _ACTIVATION_BYTES
    handle.remove()
