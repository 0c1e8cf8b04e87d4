"""The simulator: it plays the runtime's schedule, and knows how long it must take."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distorch.allocation import Allocation
from distorch.errors import AllocationError, MachineError
from distorch.machine import Link, Machine
from distorch.plan.cost import Profile, block_seconds
from distorch.plan.plan import Placement, Plan, Ring
from distorch.simulate import Timeline, best_plan, predict, simulate
from tests.cost_strategies import MIB, machine_of, profile_of, profiles, speeds

CLOSE = 1e-9


def streamed(profile: Profile, *, num_slots: int, resident: set[int] | None = None) -> Plan:
    """All on the host but the resident blocks."""
    placements = tuple(
        Placement(block=block, tier="cuda:0", kind="resident")
        if index in (resident or set())
        else Placement(block=block, tier="cpu", kind="streamed")
        for index, block in enumerate(profile.blocks)
    )
    slot_bytes = max(block.nbytes for block in profile.blocks)
    ring = Ring(num_slots=num_slots, slot_bytes=slot_bytes)
    return Plan(compute="cuda:0", allocation="by hand", placements=placements, ring=ring)


def played(profile: Profile, plan: Plan, machine: Machine, **how: object) -> Timeline:
    """Simulate with the profile's own seconds."""
    seconds = block_seconds(profile, machine.compute("cuda:0"))
    return simulate(plan, seconds, machine, **how)  # type: ignore[arg-type]


@given(profiles(), speeds)
def test_without_overlap_a_step_is_the_sum_of_its_copies_and_its_compute(
    profile: Profile, speed: float
) -> None:
    machine = machine_of({"cpu": speed})
    plan = streamed(profile, num_slots=2)
    found = played(profile, plan, machine, overlap="none").step_seconds
    compute = sum(block_seconds(profile, machine.compute("cuda:0")))
    copies = profile.model_bytes / speed if len(profile.blocks) > 1 else 0  # a single one stays
    assert found == pytest.approx(compute + copies, rel=CLOSE, abs=1e-12)


@given(profiles(), speeds, st.integers(2, 6))
def test_our_schedule_is_never_slower_than_one_ahead_nor_that_than_none(
    profile: Profile, speed: float, num_slots: int
) -> None:
    machine = machine_of({"cpu": speed})
    plan = streamed(profile, num_slots=num_slots)
    ours, one_ahead, none = (
        played(profile, plan, machine, overlap=how).step_seconds
        for how in ("ring", "one ahead", "none")
    )
    assert ours <= one_ahead * (1 + CLOSE)
    if len(profile.blocks) > 1:
        assert one_ahead <= none * (1 + CLOSE)


@given(profiles(), speeds, st.integers(2, 4), st.floats(0, 1e-3))
def test_equal_blocks_stream_at_the_bound(
    profile: Profile, speed: float, num_slots: int, latency: float
) -> None:
    num = len(profile.blocks) + num_slots
    block_time = 8 * MIB / speed + latency
    machine = machine_of({"cpu": speed}, latency_seconds=latency)
    for each in (0.0, block_time / 3, block_time * 2):
        equal = profile_of([8 * MIB] * num, [each] * num)
        found = played(equal, streamed(equal, num_slots=num_slots), machine).step_seconds
        assert found == pytest.approx(num * max(block_time, each), rel=1e-6)


@given(profiles(), speeds, st.integers(2, 5))
def test_spans_of_a_lane_do_not_overlap_and_fill_the_step(
    profile: Profile, speed: float, num_slots: int
) -> None:
    machine = machine_of({"cpu": speed})
    found = played(profile, streamed(profile, num_slots=num_slots), machine, trace=True)
    busy = 0.0
    for lane in {span.lane for span in found.spans}:
        spans = [span for span in found.spans if span.lane == lane]
        for one, next_one in pairwise(spans):
            assert one.end <= next_one.begin + 1e-9
        if lane in {"compute", "wait"}:
            step = found.step_seconds
            busy += sum(min(step, span.end) - max(0.0, span.begin) for span in spans)
    assert busy == pytest.approx(found.step_seconds, rel=1e-6, abs=1e-9)


def test_a_step_is_one_of_those_that_repeat_not_one_that_still_has_a_head_start() -> None:
    sizes = [8 * MIB] * 4 + [80 * MIB]
    profile = profile_of(sizes, [0.0, 0.0, 0.0, 0.0, 0.01])
    machine = machine_of({"cpu": 100.0 * MIB})
    plan = streamed(profile, num_slots=4)
    plan = replace(plan, ring=Ring(num_slots=4, slot_bytes=8 * MIB))  # nobody shares a slot
    assert played(profile, plan, machine).step_seconds == pytest.approx(112 / 100, rel=CLOSE)


def test_small_blocks_share_a_slot_and_so_the_ring_looks_further_ahead() -> None:
    sizes = [64 * MIB] + [9 * MIB] * 4
    profile = profile_of(sizes * 3, [0.0, 0.25, 0.25, 0.25, 0.25] * 3)
    machine = machine_of({"cpu": 100.0 * MIB})
    shared = streamed(profile, num_slots=3)
    alone = replace(shared, ring=Ring(num_slots=3, slot_bytes=9 * MIB))  # a slot for each
    ours, without = (played(profile, plan, machine).step_seconds for plan in (shared, alone))
    assert ours == pytest.approx(3 * 1.0, rel=CLOSE)  # copies and compute take as long
    assert without > 1.1 * ours


def test_a_ring_that_holds_all_visitors_moves_nothing_after_the_first_step() -> None:
    profile = profile_of([MIB] * 3, [0.5] * 3)
    machine = machine_of({"cpu": 1.0 * MIB})
    plan = streamed(profile, num_slots=3)
    assert played(profile, plan, machine).step_seconds == pytest.approx(1.5)
    assert predict(plan, profile, machine).streamed_bytes_by_link == {}


def test_a_disk_is_reached_through_the_host_at_the_slower_of_two_links() -> None:
    profile = profile_of([MIB] * 8, [0.0] * 8)
    host = machine_of({"cpu": 4.0 * MIB, "disk": 1.0})
    links = (host.link("cpu", "cuda:0"), Link(source="disk", target="cpu", bytes_per_second=MIB))
    machine = Machine(name="two hops", tiers=host.tiers, links=links, computes=host.computes)
    plan = streamed(profile, num_slots=2)
    placements = tuple(
        Placement(block=block, tier="disk", kind="streamed") for block in profile.blocks
    )
    from_disk = Plan(compute="cuda:0", allocation="", placements=placements, ring=plan.ring)
    found = predict(from_disk, profile, machine)
    assert found.predicted_seconds == pytest.approx(8.0)
    assert found.limited_by == "disk->cpu"
    assert found.host_ram_bytes == plan.ring.nbytes  # what a disk sends rests a moment in RAM


def test_what_a_prediction_says_of_memory() -> None:
    profile = profile_of([MIB] * 8, [0.001] * 8, activation_bytes=7)
    found = predict(
        streamed(profile, num_slots=2, resident={0, 4}), profile, machine_of({"cpu": 1e9})
    )
    assert found.host_ram_bytes == 6 * MIB
    assert found.activation_bytes == 7
    assert found.streamed_bytes_by_link == {"cpu->cuda:0": 6 * MIB}
    assert found.flops == profile.total_flops


def test_a_donor_without_a_link_is_refused() -> None:
    profile = profile_of([MIB] * 4, [0.0] * 4)
    machine = machine_of({"cpu": 1e9})
    alone = Machine(name="alone", tiers=machine.tiers, computes=machine.computes)
    with pytest.raises(MachineError):
        played(profile, streamed(profile, num_slots=2), alone)


def test_host_memory_must_hold_its_weights_and_what_is_on_its_way_from_disk() -> None:
    profile = profile_of([MIB] * 8, [0.0] * 8)
    free = {"cuda:0": 1 << 40, "cpu": 6 * MIB, "disk": 1 << 40}
    base = machine_of({"cpu": 1e9, "disk": 1e9}, free=free)
    links = (base.link("cpu", "cuda:0"), Link(source="disk", target="cpu", bytes_per_second=1e9))
    machine = replace(base, links=links)
    line = Allocation.parse("cuda:0,0b;cpu,4mb;disk,*")
    with pytest.raises(AllocationError, match="host RAM"):
        best_plan(profile, line, machine)
    found = best_plan(profile, Allocation.parse("cuda:0,0b;cpu,1mb;disk,*"), machine).prediction
    assert found is not None
    assert found.host_ram_bytes <= 6 * MIB
