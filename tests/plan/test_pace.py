"""The recurrence: what the simulator plays where links are not shared, and never more."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distorch.machine import Machine
from distorch.plan.cost import Profile, block_seconds
from distorch.plan.pace import Pace
from distorch.plan.plan import Placement, Plan, Ring
from distorch.simulate import simulate
from tests.cost_strategies import MIB, machine_of, profiles, speeds

INSTANT = 1e-9
CLOSE = 1e-9
DONORS = ("cuda:1", "cpu", "cuda:2")


def placed(profile: Profile, tiers: dict[int, str], num_slots: int) -> Plan:
    """Stream these blocks, each from its donor."""
    placements = tuple(
        Placement(block=block, tier=tiers[index], kind="streamed")
        if index in tiers
        else Placement(block=block, tier="cuda:0", kind="resident")
        for index, block in enumerate(profile.blocks)
    )
    ring = Ring(num_slots=num_slots, slot_bytes=32 * MIB)
    return Plan(compute="cuda:0", allocation="by hand", placements=placements, ring=ring)


def played(profile: Profile, plan: Plan, machine: Machine) -> float:
    """Seconds of a step that the simulator plays."""
    return simulate(plan, block_seconds(profile, machine.compute("cuda:0")), machine).step_seconds


def busy(
    profile: Profile, tiers: dict[int, str], ways: dict[str, float], latency: float
) -> list[float]:
    """Seconds that each donor sends in a step."""
    return [
        sum(
            latency + profile.blocks[index].nbytes / speed
            for index, tier in tiers.items()
            if tier == name
        )
        for name, speed in ways.items()
    ]


@st.composite
def streamed(draw: st.DrawFn) -> tuple[Profile, dict[int, str], int, dict[str, float]]:
    """A model, donors of its blocks, a number of slots, and speeds."""
    profile = draw(profiles())
    ways = {name: draw(speeds) for name in DONORS[: draw(st.integers(1, 3))]}
    place = st.sampled_from([None, *ways])
    tiers = {
        index: name for index in range(len(profile.blocks)) if (name := draw(place)) is not None
    }
    return profile, tiers, draw(st.integers(2, 8)), ways


Case = tuple[Profile, dict[int, str], int, dict[str, float]]


@settings(max_examples=500, deadline=None)
@given(streamed(), st.sampled_from((0.0, 0.003)))
def test_on_links_of_their_own_it_says_what_the_simulator_plays(case: Case, latency: float) -> None:
    profile, tiers, num_slots, ways = case
    machine = machine_of(ways, latency_seconds=latency)
    seconds = block_seconds(profile, machine.compute("cuda:0"))
    plan = placed(profile, tiers, num_slots)
    found = Pace(profile.blocks, seconds, machine, "cuda:0", ways).of(tiers, plan.ring)
    exact = played(profile, plan, machine)
    assert found <= exact * (1 + CLOSE) + INSTANT
    late = max(sum(seconds), *busy(profile, tiers, ways, latency), 0.0)  # of steps that repeat late
    assert any(found == pytest.approx(each, rel=CLOSE, abs=INSTANT) for each in (exact, late))


@settings(max_examples=500, deadline=None)
@given(streamed())
def test_it_is_never_above_the_simulator_where_a_bus_is_shared(case: Case) -> None:
    profile, tiers, num_slots, ways = case
    machine = machine_of(ways, bus="pcie")
    seconds = block_seconds(profile, machine.compute("cuda:0"))
    pace = Pace(profile.blocks, seconds, machine, "cuda:0", ways)
    plan = placed(profile, tiers, num_slots)
    exact = played(profile, plan, machine)
    for least in (pace.of(tiers, plan.ring), pace.at_best(tiers, plan.ring)):
        assert least <= exact * (1 + 1e-6) + INSTANT


@settings(max_examples=500, deadline=None)
@given(streamed(), st.data(), st.sampled_from((0.0, 0.003)))
def test_a_faster_link_never_slows_a_plan_whose_donors_share_none(
    case: Case, data: st.DataObject, latency: float
) -> None:
    profile, tiers, num_slots, ways = case
    plan = placed(profile, tiers, num_slots)
    faster = {name: max(speed, data.draw(speeds)) for name, speed in ways.items()}
    slow, fast = (
        played(profile, plan, machine_of(each, latency_seconds=latency)) for each in (ways, faster)
    )
    assert fast <= slow * (1 + CLOSE) + INSTANT
