"""The bytes on devices, in pinned memory and of the process: as planned, and they do not grow."""

from __future__ import annotations

import gc
import math
from typing import TYPE_CHECKING

import psutil
import pytest
import torch

import distorch
from distorch import vgpu
from tests.accelerator.make import (
    FORMS,
    MACHINE,
    NUM_LAYERS,
    ROWS,
    WIDTH,
    chain,
    distributed,
    examples,
    same,
)

if TYPE_CHECKING:
    from distorch.plan.plan import Plan

DEVICE = "vgpu:0"
MIB = 1 << 20
LINES = [
    "vgpu:0,100%",
    "vgpu:0,0%;cpu,100%",
    "vgpu:0,30%;cpu,30%;disk,40%",
    "vgpu:0,30%;vgpu:1,40%;vgpu:2,30%",
    "vgpu:0,10%;cpu,30%;vgpu:1,30%;disk,30%",
]


def peaks() -> list[int]:
    return [device.peak_bytes for device in vgpu.counters().devices]


def planned(plan: Plan) -> list[int]:
    """Bytes that each device may have of weights: what rests on it, and the ring."""
    held = plan.bytes_by_tier
    ring = [plan.ring.nbytes if name == plan.compute else 0 for name in map(_name, range(3))]
    return [held.get(_name(index), 0) + ring[index] for index in range(3)]


def _name(index: int) -> str:
    return f"vgpu:{index}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("line", LINES)
def test_no_device_ever_holds_more_than_planned_while_loading(line: str, form: str) -> None:
    module, handle = distributed(form, line, compute=DEVICE)
    assert all(peak <= most for peak, most in zip(peaks(), planned(handle.plan), strict=True))
    assert handle.weight_bytes == planned(handle.plan)[0]
    del module
    handle.remove()


@pytest.mark.parametrize("enqueued", [False, True], ids=["eager", "enqueued"])
@pytest.mark.parametrize("line", LINES)
def test_no_device_ever_holds_more_than_planned_beside_activations(
    line: str,
    enqueued: bool,  # noqa: FBT001
) -> None:
    x, expected = examples("bf16")[0]
    module, handle = distributed("bf16", line, compute=DEVICE)
    with vgpu.settings(enqueued=enqueued, delay_seconds=1e-4), torch.inference_mode():
        activations = 4 * ROWS * WIDTH * x.element_size() + 4 * ROWS * x.element_size()
        for _ in range(3):
            assert same(module(x.to(DEVICE)), expected)
        most = planned(handle.plan)
        assert peaks()[0] <= most[0] + activations
        assert peaks()[1:] == most[1:]
    handle.remove()


def test_pinned_memory_holds_what_rests_in_host_memory_and_little_else() -> None:
    module, handle = distributed("bf16", "vgpu:0,20%;cpu,80%", compute=DEVICE)
    assert vgpu.counters().pinned_bytes == handle.plan.bytes_by_tier["cpu"]
    largest = max(placed.block.nbytes for placed in handle.plan.placements)
    assert vgpu.counters().pinned_peak_bytes <= handle.plan.bytes_by_tier["cpu"] + largest
    del module
    handle.remove()


@pytest.mark.parametrize("enqueued", [False, True], ids=["eager", "enqueued"])
def test_a_thousand_steps_leave_no_growth(enqueued: bool) -> None:  # noqa: FBT001
    torch.manual_seed(0)
    module, x = chain(3, 160), torch.randn(1, 160)
    process = psutil.Process()

    def held() -> tuple[list[int], int]:
        torch.accelerator.synchronize(DEVICE)
        gc.collect()
        found = vgpu.counters()
        return [device.live_bytes for device in found.devices], found.pinned_bytes

    with vgpu.settings(enqueued=enqueued), torch.inference_mode():
        expected = module(x)
        handle = distorch.distribute(
            module, "vgpu:0,10%;cpu,30%;vgpu:1,30%;disk,30%", machine=MACHINE
        )
        x = x.to(DEVICE)
        assert same(module(x), expected)
        for step in range(1_100):
            if step == 100:  # every buffer has its size by now
                before, host_bytes = held(), process.memory_info().rss
            module(x)
        assert held() == before
        assert process.memory_info().rss < host_bytes + 8 * MIB
        assert same(module(x), expected)
        handle.remove()


def test_a_ring_bounds_what_streams_through_a_device() -> None:
    bound = 400 << 10
    module, handle = distributed("bf16", "vgpu:0,0b;cpu,*", compute=DEVICE, ring=bound)
    assert handle.plan.bytes_by_tier[DEVICE] == 0
    assert handle.plan.ring.num_slots > 1
    assert peaks()[0] == handle.weight_bytes == handle.plan.ring.nbytes <= bound
    x, expected = examples("bf16")[0]
    with torch.inference_mode():
        assert same(module(x.to(DEVICE)), expected)
    handle.remove()


def test_every_weight_is_in_one_place_only() -> None:
    """The originals are let go of as soon as they rest elsewhere."""
    module, handle = distributed("bf16", "vgpu:0,30%;cpu,70%", compute=DEVICE)
    elements = NUM_LAYERS * (WIDTH * WIDTH + 3 * WIDTH)
    assert sum(math.prod(weight.shape) for weight in module.parameters()) == elements
    assert sum(weight.original.numel() for weight in handle._tree.weights.values()) == 0
    handle.remove()
    assert sum(weight.original.numel() for weight in handle._tree.weights.values()) == elements
