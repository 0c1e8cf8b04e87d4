"""Placements by a judge: never worse with more memory or faster links, nor than simple ones."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from distorch.allocation import Allocation
from distorch.errors import AllocationError
from distorch.machine import Machine
from distorch.plan.cost import Profile, block_seconds, bound
from distorch.plan.plan import Placement, Plan
from distorch.plan.planner import make_plan
from distorch.plan.search import (
    deal,
    least_dealt,
    resident_sets,
    share_steps,
    shares_by_speed,
    spread,
)
from distorch.simulate import predict, simulate
from tests.cost_strategies import (
    GIB,
    MIB,
    judge_of,
    machine_of,
    profile_of,
    profiles,
    speeds,
)

ROUNDING = 1 + 1e-9
UNEVEN = profile_of([n * MIB for n in (28, 28, 32, 32, 32, 28, 32, 28, 28)], [0.023] * 9)
CLOSE = 1e-6  # bytes, of sums of fractions
INSTANT = 1e-9  # seconds: rounding of sums, where the whole step takes next to nothing


def planned(profile: Profile, line: str, machine: Machine) -> Plan:
    """Plan with a judge."""
    seconds = block_seconds(profile, machine.compute("cuda:0"))
    judge = replace(judge_of(profile, machine), block_seconds=seconds)
    return make_plan(profile.blocks, Allocation.parse(line), machine, judge=judge)


def predicted(profile: Profile, line: str, machine: Machine) -> float:
    """Seconds a step of the plan that the planner chooses."""
    return predict(planned(profile, line, machine), profile, machine).predicted_seconds


def placed(plan: Plan, resident: set[int], donor: str) -> Plan:
    """The same plan with other blocks kept, and all others on one donor."""
    return replace(
        plan,
        placements=tuple(
            Placement(block=placement.block, tier=plan.compute, kind="resident")
            if index in resident
            else Placement(block=placement.block, tier=donor, kind="streamed")
            for index, placement in enumerate(plan.placements)
        ),
    )


@settings(max_examples=500, deadline=None)
@given(profiles(), st.integers(0, 640), speeds)
def test_a_judged_line_places_every_block_once_within_its_amounts(
    profile: Profile, budget_mib: int, speed: float
) -> None:
    machine = machine_of({"cpu": speed})
    plan = planned(profile, f"cuda:0,{budget_mib}mb;cpu,*", machine)
    assert tuple(placement.block for placement in plan.placements) == profile.blocks
    assert plan.bytes_by_tier["cuda:0"] <= budget_mib * MIB
    assert planned(profile, f"cuda:0,{budget_mib}mb;cpu,*", machine) == plan


@settings(max_examples=500, deadline=None)
@given(profiles(), st.integers(0, 700), st.integers(0, 700), speeds, speeds)
def test_auto_keeps_weights_ring_and_activations_within_what_is_free(
    profile: Profile, room_mib: int, activations_mib: int, host: float, peer: float
) -> None:
    profile = replace(profile, activation_bytes=activations_mib * MIB)
    machine = machine_of(
        {"cuda:1": peer, "cpu": host}, free={"cuda:0": room_mib * MIB, "cuda:1": 200 * MIB}
    )
    try:
        plan = planned(profile, "auto", machine)
    except AllocationError as error:
        assert "activations" in error.problem and error.hint  # noqa: PT017, PT018
        return
    held = plan.bytes_by_tier
    beside = plan.ring.nbytes + profile.activation_bytes
    assert held["cuda:0"] + beside <= machine.tier("cuda:0").free_bytes
    assert held.get("cuda:1", 0) <= machine.tier("cuda:1").free_bytes
    assert sum(held.values()) == profile.model_bytes


@settings(max_examples=500, deadline=None)
@given(profiles(), st.integers(0, 640), st.integers(0, 640), speeds)
def test_more_budget_never_predicts_slower(
    profile: Profile, less: int, more: int, speed: float
) -> None:
    less, more = sorted((less, more))
    machine = machine_of({"cpu": speed})
    slow = predicted(profile, f"cuda:0,{less}mb;cpu,*", machine)
    fast = predicted(profile, f"cuda:0,{more}mb;cpu,*", machine)
    assert fast <= slow * ROUNDING + INSTANT


@settings(max_examples=500, deadline=None)
@given(profiles(), st.integers(0, 640), speeds, speeds)
def test_a_faster_link_never_predicts_slower(
    profile: Profile, budget_mib: int, one: float, other: float
) -> None:
    line = f"cuda:0,{budget_mib}mb;cpu,*"
    slow = predicted(profile, line, machine_of({"cpu": min(one, other)}))
    fast = predicted(profile, line, machine_of({"cpu": max(one, other)}))
    assert fast <= slow * ROUNDING + INSTANT


@settings(max_examples=500, deadline=None)
@given(profiles(), st.integers(32, 640), st.integers(32, 640), speeds, speeds, st.booleans())
def test_more_budget_never_predicts_slower_with_two_donors(
    profile: Profile,
    one: int,
    other: int,
    host: float,
    peer: float,
    shared: bool,  # noqa: FBT001
) -> None:
    slow, fast = (
        by_auto(profile, {"cuda:1": peer, "cpu": host}, room_mib, shared=shared)
        for room_mib in sorted((one, other))
    )
    assert fast <= slow * ROUNDING + INSTANT


@settings(max_examples=500, deadline=None)
@example(profile_of([24 * MIB] * 4, [0.013] * 4), 66, 256.0 * MIB, 304.0 * MIB, 448.0 * MIB, False)  # noqa: FBT003
@example(UNEVEN, 81, 656.0 * MIB, 880.0 * MIB, 208.0 * MIB, False)  # noqa: FBT003
@given(profiles(), st.integers(32, 640), speeds, speeds, speeds, st.booleans())
def test_a_faster_link_never_predicts_slower_with_two_donors(
    profile: Profile,
    room_mib: int,
    one: float,
    other: float,
    second: float,
    shared: bool,  # noqa: FBT001
) -> None:
    slow, fast = (
        by_auto(profile, {"cuda:1": first, "cpu": second}, room_mib, shared=shared)
        for first in sorted((one, other))
    )
    assert fast <= slow * ROUNDING + INSTANT


def by_auto(profile: Profile, donors: dict[str, float], room_mib: int, *, shared: bool) -> float:
    """Seconds a step by ``auto``, with little room on the second GPU, perhaps all on one bus."""
    free = {"cuda:0": room_mib * MIB, "cuda:1": 200 * MIB}
    machine = machine_of(donors, free=free, bus="pcie" if shared else "")
    try:
        return predicted(profile, "auto", machine)
    except AllocationError:
        return float("inf")


@settings(max_examples=500, deadline=None)
@example(profile_of([n * MIB for n in (1, 7, 2, 1, 1, 7)], [0.0] * 6), 3, 16.0 * MIB)
@given(profiles(), st.integers(0, 640), speeds)
def test_a_line_is_never_worse_than_contiguous_nor_than_evenly_spaced(
    profile: Profile, budget_mib: int, speed: float
) -> None:
    machine = machine_of({"cpu": speed})
    seconds = block_seconds(profile, machine.compute("cuda:0"))
    plan = planned(profile, f"cuda:0,{budget_mib}mb;cpu,*", machine)
    ours = simulate(plan, seconds, machine).step_seconds
    everything = range(len(profile.blocks))
    for resident in (_prefix(profile, budget_mib * MIB), _even(profile, budget_mib * MIB)):
        if len(resident) < len(everything):
            other = placed(plan, resident, "cpu")
            assert ours <= simulate(other, seconds, machine).step_seconds * ROUNDING + INSTANT


@settings(max_examples=500, deadline=None)
@given(profiles(), st.integers(64, 700), speeds, speeds)
def test_auto_is_never_worse_than_contiguous_nor_than_evenly_spaced_on_the_host(
    profile: Profile, room_mib: int, host: float, peer: float
) -> None:
    machine = machine_of({"cpu": host, "cuda:1": peer}, free={"cuda:0": room_mib * MIB})
    try:
        plan = planned(profile, "auto", machine)
    except AllocationError:
        assume(False)  # noqa: FBT003  hypothesis' own word
        return
    seconds = block_seconds(profile, machine.compute("cuda:0"))
    ours = simulate(plan, seconds, machine).step_seconds
    budget = room_mib * MIB * 9 // 10 - plan.ring.nbytes
    for resident in (_prefix(profile, budget), _even(profile, budget)):
        if len(resident) < len(profile.blocks) and plan.ring.num_slots > 1:
            other = placed(plan, resident, "cpu")
            assert ours <= simulate(other, seconds, machine).step_seconds * ROUNDING + INSTANT


def _prefix(profile: Profile, budget_bytes: int) -> set[int]:
    """What others keep: the first blocks, as many as fit."""
    kept = set()
    for index, block in enumerate(profile.blocks):
        budget_bytes -= block.nbytes
        if budget_bytes < 0:
            break
        kept.add(index)
    return kept


def _even(profile: Profile, budget_bytes: int) -> set[int]:
    """An even spread of the whole model, at the densest level that fits: one for each block."""
    num = len(profile.blocks)
    for level in range(num, 0, -1):
        found = spread(profile.blocks, range(num), profile.model_bytes * level // num)
        if sum(profile.blocks[index].nbytes for index in found) <= budget_bytes:
            return set(found)
    return set()


@settings(max_examples=500, deadline=None)
@given(profiles(), st.integers(0, 700), speeds, speeds, st.booleans())
def test_nothing_is_predicted_below_its_bound(
    profile: Profile,
    room_mib: int,
    host: float,
    peer: float,
    shared: bool,  # noqa: FBT001
) -> None:
    bus = "pcie" if shared else ""
    free = {"cuda:0": room_mib * MIB}
    machine = machine_of({"cuda:1": peer, "cpu": host}, free=free, bus=bus)
    try:
        plan = planned(profile, "auto", machine)
    except AllocationError:
        assume(False)  # noqa: FBT003  hypothesis' own word
        return
    seconds = block_seconds(profile, machine.compute("cuda:0"))
    least = bound(plan, seconds, machine)[0]
    assert simulate(plan, seconds, machine).step_seconds >= least / ROUNDING - INSTANT
    assert predict(plan, profile, machine).predicted_seconds >= least


@settings(max_examples=500, deadline=None)
@given(st.integers(12, 60), speeds, speeds)
def test_two_donors_on_links_of_their_own_approach_the_sum_of_their_speeds(
    num: int, one: float, other: float
) -> None:
    assume(max(one, other) <= 4 * min(one, other))
    profile = profile_of([8 * MIB] * num, [0.0] * num)
    free = {"cuda:0": 64 * MIB}
    both = planned(profile, "auto", machine_of({"cuda:1": one, "cpu": other}, free=free))
    machine = machine_of({"cuda:1": one, "cpu": other}, free=free)
    seconds = predict(both, profile, machine).predicted_seconds
    sum_of_speeds = both.streamed_bytes / (one + other)
    assert seconds <= sum_of_speeds * (1 + 6 / num) + 8 * MIB / min(one, other)


@settings(max_examples=500, deadline=None)
@given(st.integers(12, 40), speeds)
def test_two_donors_on_one_bus_are_no_faster_than_the_bus(num: int, speed: float) -> None:
    profile = profile_of([8 * MIB] * num, [0.0] * num)
    free = {"cuda:0": 64 * MIB}
    machine = machine_of({"cuda:1": speed, "cpu": speed}, free=free, bus="pcie")
    plan = planned(profile, "auto", machine)
    assert (
        predict(plan, profile, machine).predicted_seconds >= plan.streamed_bytes / speed / ROUNDING
    )


@given(profiles(), st.integers(0, 700 * MIB))
def test_resident_sets_fit_and_grow_with_the_budget(profile: Profile, budget: int) -> None:
    blocks = profile.blocks
    found = list(resident_sets(blocks, budget))
    assert len(set(found)) == len(found)
    for resident in found:
        assert sum(blocks[index].nbytes for index in resident) <= budget
    larger = list(resident_sets(blocks, budget + 64 * MIB))
    for resident in found:
        assert any(resident <= other for other in larger)


@given(profiles(), st.lists(st.integers(0, 300), min_size=1, max_size=4), st.data())
def test_shares_fit_their_rooms_and_blocks_are_dealt_once(
    profile: Profile, rooms_mib: list[int], data: st.DataObject
) -> None:
    rooms = {f"donor{number}": mib * MIB for number, mib in enumerate(rooms_mib)}
    ways = {name: {name: data.draw(speeds)} for name in rooms}
    sizes = {index: block.nbytes for index, block in enumerate(profile.blocks)}
    shares = shares_by_speed([*sizes.values()], rooms, ways)
    if shares is None:
        assert sum(sizes.values()) > max(rooms.values())
        return
    assert sum(shares.values()) == sum(sizes.values())
    assert all(shares[name] <= rooms[name] for name in rooms)
    tiers = deal(sizes, shares, rooms)
    if tiers is not None:
        assert list(tiers) == list(sizes)
        for name, room in rooms.items():
            assert sum(sizes[i] for i, tier in tiers.items() if tier == name) <= room


@given(
    st.lists(st.integers(0, 64), min_size=1, max_size=60),
    st.lists(st.integers(0, 4000), min_size=1, max_size=4),
    st.sampled_from((1, 32, 200)),
)
def test_shares_in_steps_fit_their_rooms_and_blocks_dealt_by_them_reach_the_least(
    sizes_list: list[int], rooms_list: list[int], most: int
) -> None:
    sizes, rooms = dict(enumerate(sizes_list)), {f"d{n}": r for n, r in enumerate(rooms_list)}
    found = share_steps(sizes_list, rooms, most)
    assert len(found) <= max(most, len(rooms))
    for shares in found:
        assert all(shares[name] <= rooms[name] for name in rooms)
        assert 0 <= sum(sizes_list) - sum(shares.values()) < len(rooms)
        least = least_dealt(sizes, shares, rooms)
        tiers = deal(sizes, shares, rooms)
        for name in rooms if tiers is not None else ():
            held = sum(sizes[index] for index, tier in (tiers or {}).items() if tier == name)
            assert held >= least[name] - CLOSE


def test_a_disk_behind_the_host_is_used_only_where_the_host_has_no_room() -> None:
    lanes = {
        "cpu": {"cpu->cuda:0": 25e9},
        "disk": {"disk->cpu": 7e9, "cpu->cuda:0": 25e9},
    }
    shares = shares_by_speed([GIB] * 8, {"cpu": 5 * GIB, "disk": 99 * GIB}, lanes)
    assert shares == {"cpu": 5 * GIB, "disk": 3 * GIB}


def test_a_large_model_over_many_donors_is_planned_soon() -> None:
    num = 2000
    profile = profile_of([8 * MIB] * num, [1e-4] * num)
    donors = {f"cuda:{number}": 1e9 * number for number in (1, 2, 3)} | {"cpu": 25e9}
    machine = machine_of(donors, free={"cuda:0": 4 * GIB, "cuda:1": 2 * GIB, "cuda:2": 2 * GIB})
    judged: list[Plan] = []
    seconds = block_seconds(profile, machine.compute("cuda:0"))
    judge = replace(judge_of(profile, machine), block_seconds=seconds)

    def count(plan: Plan) -> float:
        judged.append(plan)
        return judge.seconds(plan)

    make_plan(
        profile.blocks, Allocation.parse("auto"), machine, judge=replace(judge, seconds=count)
    )
    assert len(judged) <= 4  # each takes about a tenth of a second


@settings(max_examples=500, deadline=None)
@given(profiles(), st.integers(0, 640), speeds)
def test_beside_a_line_the_ring_stays_small(
    profile: Profile, budget_mib: int, speed: float
) -> None:
    line = f"cuda:0,{budget_mib}mb;cpu,*"
    usual = make_plan(profile.blocks, Allocation.parse(line), machine_of({"cpu": speed})).ring
    plan = planned(profile, line, machine_of({"cpu": speed}))
    largest_usual = max(usual.num_slots, 4) * plan.ring.slot_bytes
    assert plan.ring.nbytes <= max(largest_usual, profile.model_bytes // 8)
