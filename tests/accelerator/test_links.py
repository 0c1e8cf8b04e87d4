"""Donors deliver at the same time, each its share, and nothing crosses a link twice."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from distorch import vgpu
from distorch.vgpu import Span
from tests.accelerator.make import distributed, examples, same

DEVICE, PEER = "vgpu:0", "vgpu:1"
SPEED = 2e7  # bytes/s: seven milliseconds a block, about
NUM_PASSES = 3
LINES = {
    "cpu and peer": "vgpu:0,0%;cpu,67%;vgpu:1,33%",
    "cpu and disk": "vgpu:0,0%;cpu,50%;disk,50%",
    "two peers": "vgpu:0,0%;vgpu:2,67%;vgpu:1,33%",
}


def arrivals(spans: list[Span]) -> list[Span]:
    """The copies into the device that computes."""
    return [span for span in spans if span.operation == "copy" and span.target == DEVICE]


def seconds_together(one: list[Span], other: list[Span]) -> float:
    return sum(max(0.0, min(a.end, b.end) - max(a.begin, b.begin)) for a in one for b in other)


@pytest.mark.parametrize("bus", [None, 2 * SPEED], ids=["two buses", "one bus"])
@pytest.mark.parametrize("line", ["cpu and peer", "two peers"])
def test_two_donors_deliver_at_the_same_time(line: str, bus: float | None) -> None:
    vgpu.set_bus("shared", bus)
    donors = ("cpu", PEER) if line == "cpu and peer" else ("vgpu:2", PEER)
    for donor, speed in zip(donors, (2 * SPEED, SPEED), strict=True):
        vgpu.set_link(donor, DEVICE, speed, "shared" if bus else None)
    module, handle = distributed("bf16", LINES[line], compute=DEVICE)
    x = examples("bf16")[0][0].to(DEVICE)
    with vgpu.settings(enqueued=True), torch.inference_mode():
        module(x)  # the order is known from here on
        with vgpu.trace() as spans:
            for _ in range(NUM_PASSES):
                module(x)
    came = arrivals(spans)
    fast, slow = ([span for span in came if span.source == donor] for donor in donors)
    assert len(fast) + len(slow) == len(came)
    busy = min(sum(span.seconds for span in each) for each in (fast, slow))
    assert seconds_together(fast, slow) > busy / 2
    handle.remove()


@pytest.mark.parametrize("line", LINES)
def test_a_step_moves_each_streamed_block_once_from_where_it_rests(line: str) -> None:
    module, handle = distributed("bf16", LINES[line], compute=DEVICE)
    plan = handle.plan
    x, expected = examples("bf16")[0]
    x = x.to(DEVICE)
    with torch.inference_mode():
        module(x)
        module(x)
        with vgpu.trace() as spans:
            for _ in range(NUM_PASSES):
                assert same(module(x), expected)
    came = Counter(span.source for span in arrivals(spans))
    rest = Counter("cpu" if each.tier == "disk" else each.tier for each in plan.placements)
    assert came.keys() == rest.keys()
    for source, num_blocks in rest.items():  # the ring holds some of the steps before and after
        assert abs(came[source] - NUM_PASSES * num_blocks) <= plan.ring.num_slots
    handle.remove()


def test_a_donor_copies_beside_what_it_computes_itself() -> None:
    """On a stream of its own: a copy does not wait for what the donor was asked before."""
    module, handle = distributed("bf16", LINES["cpu and peer"], compute=DEVICE)
    x, expected = examples("bf16")[0]
    x = x.to(DEVICE)
    with vgpu.settings(enqueued=True, op_seconds=0.01), torch.inference_mode():
        busy = torch.ones(1, device=PEER)
        with vgpu.trace() as spans:
            for _ in range(100):
                busy.add_(1)
            found = module(x)
        assert same(found, expected)
    last = max(span.end for span in spans if span.device == PEER and span.operation != "copy")
    copies = [span for span in arrivals(spans) if span.source == PEER]
    assert copies
    assert all(span.begin < last for span in copies)
    handle.remove()
