"""What a step asks of a machine: seconds, bounds, and a text that gives a profile back."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distorch.errors import FormatError
from distorch.machine import Compute, Link, Machine
from distorch.plan.blocks import Block, Part
from distorch.plan.cost import Profile, block_seconds, bound, lane_seconds, lanes, steady_bytes
from distorch.plan.plan import Placement, Plan, Ring
from distorch.plan.sharing import num_groups
from tests.cost_strategies import MIB, machine_of, profile_of, profiles

CARD = Compute(device="cuda:0", flops_per_second={"BF16": 1e12}, bytes_per_second=1e9)


def one_block(dtype: str, nbytes: int, flops: int, *, looked_up: bool = False) -> Profile:
    """A profile of one matrix of 64 x 64."""
    part = Part(tensor="w", dtype=dtype, shape=(64, 64), nbytes=nbytes)
    block = Block(name="w", parts=(part,), module="w", looked_up=looked_up)
    return Profile(name="one", blocks=(block,), flops=(flops,), activation_bytes=0)


@given(profiles())
def test_a_profile_comes_back_from_its_text(profile: Profile) -> None:
    assert Profile.from_json(profile.to_json()) == profile


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"flops": []},
        {"flops": [-1]},
        {"blocks": [{}]},
        {"blocks": 3},
        {"unknown": 1},
    ],
)
def test_a_text_that_is_no_profile_is_refused(change: dict[str, object]) -> None:
    text = json.dumps(json.loads(one_block("BF16", 8192, 1).to_json()) | change)
    with pytest.raises(FormatError):
        Profile.from_json(text)


def test_a_block_takes_the_longer_of_its_operations_and_its_bytes() -> None:
    assert block_seconds(one_block("BF16", 8192, 10**12), CARD) == (1.0,)
    assert block_seconds(one_block("BF16", 8192, 0), CARD) == (8192 / 1e9,)
    assert block_seconds(one_block("BF16", 8192, 0, looked_up=True), CARD) == (0.0,)


def test_packed_weights_are_decoded_before_they_are_multiplied() -> None:
    dense, packed = one_block("BF16", 8192, 10**12), one_block("Q8_0", 4352, 10**12)
    more = block_seconds(packed, CARD)[0] - block_seconds(dense, CARD)[0]
    assert more == pytest.approx((4352 + 2 * 64 * 64) / (0.8 * 1e9))
    narrow = one_block("F8_E4M3", 4096, 0)
    assert block_seconds(narrow, CARD)[0] > 4096 / 1e9


def _streamed(profile: Profile, tiers: list[str], num_slots: int = 2) -> Plan:
    placements = tuple(
        Placement(block=block, tier=tier, kind="streamed")
        for block, tier in zip(profile.blocks, tiers, strict=True)
    )
    slot_bytes = max(block.nbytes for block in profile.blocks)
    ring = Ring(num_slots=num_slots, slot_bytes=slot_bytes)
    return Plan(compute="cuda:0", allocation="", placements=placements, ring=ring)


def test_the_bound_is_the_busiest_of_compute_links_and_buses() -> None:
    profile = profile_of([MIB] * 4, [0.25] * 4)
    plan = _streamed(profile, ["cpu", "cuda:1", "cpu", "cpu"])
    seconds = [0.25] * 4
    fast = machine_of({"cpu": 100.0 * MIB, "cuda:1": 100.0 * MIB})
    assert bound(plan, seconds, fast) == (1.0, "compute")
    slow = machine_of({"cpu": 1.0 * MIB, "cuda:1": 1.0 * MIB})
    assert bound(plan, seconds, slow) == (3.0, "cpu->cuda:0")
    shared = machine_of({"cpu": 1.0 * MIB, "cuda:1": 1.0 * MIB}, bus="pcie")
    assert bound(plan, seconds, shared) == (4.0, "pcie")
    wide = replace(shared, buses=(("pcie", 2.0 * MIB),))
    assert lane_seconds(plan, wide)["pcie"] == 2.0


def test_what_crosses_two_links_counts_on_both() -> None:
    base = machine_of({"cpu": 4.0 * MIB, "disk": 1.0})
    links = (base.link("cpu", "cuda:0"), Link(source="disk", target="cpu", bytes_per_second=MIB))
    machine = Machine(name="two hops", tiers=base.tiers, links=links, computes=base.computes)
    assert lanes(machine, "disk", "cuda:0") == {"disk->cpu": MIB, "cpu->cuda:0": 4.0 * MIB}


@given(profiles(), st.integers(1, 30))
def test_a_ring_with_room_for_all_moves_nothing(profile: Profile, num_slots: int) -> None:
    plan = _streamed(profile, ["cpu"] * len(profile.blocks), num_slots)
    if num_slots >= num_groups(plan.streamed_order, plan.visitor_bytes, plan.ring.slot_bytes):
        assert steady_bytes(plan) == {}
    else:
        assert steady_bytes(plan) == {"cpu": profile.model_bytes}
