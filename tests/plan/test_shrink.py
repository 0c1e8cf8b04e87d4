"""A plan that has to do with less room on its compute device."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from distorch.allocation import Allocation
from distorch.machine import Machine, Tier
from distorch.plan.blocks import Block, Part
from distorch.plan.plan import Plan
from distorch.plan.planner import make_plan
from distorch.plan.rings import least_ring
from distorch.plan.shrink import shrunk

MIB = 1 << 20
NAMES = ("cuda:0", "cuda:1", "cpu", "disk")
MACHINE = Machine(
    name="two cards",
    tiers=tuple(Tier(name=name, capacity_bytes=1 << 40, free_bytes=1 << 40) for name in NAMES),
)
ALL_FREE = dict.fromkeys(NAMES, 1 << 40)
LINES = (
    "cuda:0,*",
    "cuda:0,50%;cpu,*",
    "cuda:0,*;cuda:1,20%",
    "cuda:0,30%;cuda:1,40%;disk,30%",
    "cuda:0,20mb;cuda:1,*;cpu,5mb",
)


def planned(line: str, sizes: list[int]) -> Plan:
    parts = [
        Part(tensor=f"w{number}", dtype="U8", shape=(size,), nbytes=size)
        for number, size in enumerate(sizes)
    ]
    blocks = [Block(name=part.tensor, parts=(part,), module=part.tensor) for part in parts]
    return make_plan(blocks, Allocation.parse(line), MACHINE)


plans = st.builds(
    planned, st.sampled_from(LINES), st.lists(st.integers(1, 8 * MIB), min_size=1, max_size=40)
)


@given(plan=plans, room=st.integers(0, 200 * MIB), free=st.integers(0, 100 * MIB))
@example(plan=planned("cuda:0,30%;cuda:1,40%;disk,30%", [1, 1, 1]), room=0, free=0)
def test_a_plan_fits_the_room_or_is_the_smallest(plan: Plan, room: int, free: int) -> None:
    less = shrunk(plan, room, dict.fromkeys(NAMES, free))
    if less.held_bytes > room:
        visitors = [placed.block for placed in plan.placements]
        assert less.held_bytes == min(plan.held_bytes, least_ring(visitors).nbytes)
    if plan.held_bytes <= room:
        assert less == plan
    for before, after in zip(plan.placements, less.placements, strict=True):
        assert before.block == after.block
        assert after.tier == before.tier or before.kind == "resident"
        assert after.kind == ("resident" if after.tier == plan.compute else "streamed")
    for name, nbytes in less.bytes_by_tier.items():
        if name not in {"cpu", plan.compute}:
            assert nbytes - plan.bytes_by_tier.get(name, 0) <= free


@given(plan=plans, room=st.integers(0, 200 * MIB))
def test_more_room_keeps_no_less(plan: Plan, room: int) -> None:
    less = shrunk(plan, room, ALL_FREE)
    slot = max(placed.block.slot_bytes for placed in plan.placements)
    left = room - less.held_bytes
    streamed = [placed.block.nbytes for placed in less.placements if placed.kind == "streamed"]
    if less != plan and less.bytes_by_tier[less.compute]:
        assert left <= max(streamed) + 5 * slot, "no more room is left than one change can take"


def test_what_leaves_goes_where_the_line_rests_the_remainder() -> None:
    less = shrunk(planned("cuda:0,20mb;cuda:1,*;cpu,5mb", [MIB] * 40), 10 * MIB, ALL_FREE)
    before = planned("cuda:0,20mb;cuda:1,*;cpu,5mb", [MIB] * 40)
    assert less.bytes_by_tier["cpu"] == before.bytes_by_tier["cpu"]
    assert less.bytes_by_tier["cuda:1"] > before.bytes_by_tier["cuda:1"]


def test_without_a_remainder_donors_share_what_leaves() -> None:
    less = shrunk(planned("cuda:0,30%;cuda:1,40%;disk,30%", [MIB] * 100), 8 * MIB, ALL_FREE)
    moved = 30 * MIB - less.bytes_by_tier["cuda:0"]
    assert abs(less.bytes_by_tier["cuda:1"] - 40 * MIB - moved * 4 / 7) <= MIB
    assert abs(less.bytes_by_tier["disk"] - 30 * MIB - moved * 3 / 7) <= MIB


def test_what_no_donor_has_room_for_goes_to_the_host() -> None:
    line = "cuda:0,*;cuda:1,20mb"
    less = shrunk(planned(line, [MIB] * 60), 10 * MIB, {"cuda:1": 3 * MIB})
    assert less.bytes_by_tier["cuda:1"] == 23 * MIB
    assert less.bytes_by_tier["cpu"] == (37 * MIB - less.bytes_by_tier["cuda:0"])
