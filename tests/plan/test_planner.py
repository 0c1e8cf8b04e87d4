"""The planner: every block placed once, within the line's amounts, evenly, always the same."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import groupby

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from distorch.allocation import Allocation
from distorch.errors import AllocationError
from distorch.machine import Machine, Tier
from distorch.plan.blocks import SECTOR_BYTES, Block, whole_sectors
from distorch.plan.plan import Plan
from distorch.plan.planner import make_plan
from distorch.plan.sharing import num_groups
from tests.plan_strategies import KIB, MIB, block_lists, equal_blocks, planned, plans, roomy
from tests.strategies import allocations_on, machines

Case = tuple[tuple[Block, ...], Allocation, Machine, Plan]


def _visitors(plan: Plan) -> list[Block]:
    return [plan.placements[index].block for index in plan.streamed_order]


def _nesting(blocks: list[Block]) -> int:
    """How many other blocks are held where most are: those of the module and of all around it."""
    modules = [block.module for block in blocks if block.module is not None]

    def is_around(outer: str, inner: str) -> bool:
        return outer in {"", inner} or inner.startswith(f"{outer}.")

    counts = (sum(is_around(outer, inner) for outer in modules) for inner in modules)
    return max(counts, default=1) - 1


@given(planned())
def test_every_block_is_placed_once_in_the_order_given(case: Case) -> None:
    blocks, _, _, plan = case
    assert tuple(placement.block for placement in plan.placements) == blocks
    for placement in plan.placements:
        assert (placement.kind == "resident") == (placement.tier == plan.compute)


@given(planned())
def test_no_tier_holds_more_than_its_share_but_the_last_donor(case: Case) -> None:
    blocks, allocation, machine, plan = case
    resolved = allocation.resolve(sum(block.nbytes for block in blocks), machine)
    shares = dict(resolved.bytes_by_tier)
    donors = [name for name, share in shares.items() if share and name != resolved.compute]
    held = plan.bytes_by_tier
    over = {name for name, nbytes in held.items() if nbytes > shares.get(name, 0)}
    rest = {entry.device for entry in allocation.entries if entry.rest} & set(donors)
    assert over <= (rest or set(donors[-1:]))
    assert held[plan.compute] <= shares.get(plan.compute, 0)


@given(planned())
def test_a_donor_takes_more_only_where_no_other_had_room_for_a_block(case: Case) -> None:
    blocks, allocation, machine, plan = case
    resolved = allocation.resolve(sum(block.nbytes for block in blocks), machine)
    left = {name: share - plan.bytes_by_tier.get(name, 0) for name, share in resolved.bytes_by_tier}
    streamed = [p.block.nbytes for p in plan.placements if p.kind == "streamed"]
    if streamed:
        assert left.pop(plan.compute, 0) < min(streamed)
    if any(nbytes < 0 for nbytes in left.values()):
        assert all(nbytes < max(streamed) for nbytes in left.values())
    noted = any("more than its share" in note for note in plan.notes)
    rest = {entry.device for entry in allocation.entries if entry.rest}  # has no share to exceed
    assert noted == any(nbytes < 0 for name, nbytes in left.items() if name not in rest)


@given(block_lists(), st.integers(0, 64 * MIB))
def test_an_explicit_amount_is_the_most_while_another_donor_takes_the_rest(
    blocks: tuple[Block, ...], amount: int
) -> None:
    line = Allocation.parse(f"cpu,0b;disk,*;disk:/mnt/a,{amount}b")
    plan = make_plan(blocks, line, roomy("cpu", "disk"))
    assert plan.bytes_by_tier.get("disk:/mnt/a", 0) <= amount


@given(st.data())
def test_no_tier_holds_more_than_the_machine_has_free(data: st.DataObject) -> None:
    blocks = data.draw(block_lists(max_bytes=200 * KIB))
    machine = data.draw(machines(max_bytes=2 * sum(block.nbytes for block in blocks)))
    assume(machine.tiers)
    try:
        plan = make_plan(blocks, data.draw(allocations_on(machine)), machine)
    except AllocationError:
        return
    for name, nbytes in plan.bytes_by_tier.items():
        assert nbytes <= machine.tier(name).free_bytes


def test_a_last_donor_without_room_for_the_rounding_is_refused_or_given_less() -> None:
    tiers = (
        Tier(name="cuda:0", capacity_bytes=3 * MIB // 2, free_bytes=3 * MIB // 2),
        Tier(name="cpu", capacity_bytes=64 * MIB, free_bytes=64 * MIB),
    )
    line = Allocation.parse("cpu,1.5mb;cuda:0,1.5mb")
    try:
        plan = make_plan(equal_blocks(3, MIB), line, Machine(name="tight", tiers=tiers))
    except AllocationError:
        return
    assert plan.bytes_by_tier["cuda:0"] <= tiers[0].free_bytes


def test_the_ring_and_what_rests_fit_the_compute_device() -> None:
    cpu = Tier(name="cpu", capacity_bytes=100 * MIB, free_bytes=100 * MIB)
    disk = Tier(name="disk", capacity_bytes=1 << 40, free_bytes=1 << 40)
    machine = Machine(name="small", tiers=(cpu, disk))
    blocks = equal_blocks(4, 60 * MIB)
    try:
        plan = make_plan(blocks, Allocation.parse("cpu,90mb;disk,*"), machine)
    except AllocationError:
        return
    assert plan.bytes_by_tier["cpu"] + plan.ring.nbytes <= cpu.free_bytes


@given(planned())
def test_the_ring_has_two_slots_more_than_may_be_held_around_a_block(case: Case) -> None:
    plan = case[3]
    visitors = _visitors(plan)
    if not visitors:
        assert plan.ring.nbytes == 0
        return
    assert plan.ring.num_slots >= 2 + _nesting(visitors)
    largest_bytes = max(block.nbytes for block in visitors)
    assert plan.ring.slot_bytes % SECTOR_BYTES == 0
    # room for the whole sectors of the largest block, wherever in a sector it begins
    assert plan.ring.slot_bytes >= whole_sectors(SECTOR_BYTES - 1 + largest_bytes)
    if plan.ring.slot_bytes >= largest_bytes + 2 * SECTOR_BYTES:  # a little more, for a reason
        bare_bytes = max(plan.visitor_bytes.values())
        order, sizes = plan.streamed_order, plan.visitor_bytes
        assert plan.ring.slot_bytes <= bare_bytes * 65 / 64
        assert num_groups(order, sizes, plan.ring.slot_bytes) < num_groups(order, sizes, bare_bytes)


@given(planned(), st.integers(0, 400 * MIB))
def test_the_ring_keeps_the_bound_it_is_given_or_says_what_it_needs(
    case: Case, ring_bytes: int
) -> None:
    blocks, allocation, machine, free = case
    try:
        plan = make_plan(blocks, allocation, machine, ring_bytes=ring_bytes)
    except AllocationError as error:
        assert ring_bytes < (2 + _nesting(_visitors(free))) * free.ring.slot_bytes
        needed = error.hint.partition('ring="')[2].partition('b"')[0]
        plan = make_plan(blocks, allocation, machine, ring_bytes=int(needed))
        ring_bytes = int(needed)
    assert plan.ring.nbytes <= ring_bytes
    assert plan.placements == free.placements


@given(planned())
def test_the_same_input_gives_the_same_plan(case: Case) -> None:
    blocks, allocation, machine, plan = case
    assert make_plan(list(blocks), Allocation.parse(str(allocation)), machine) == plan


@example(29, 3, MIB - 64)
@given(st.integers(1, 60), st.integers(0, 60), st.integers(0, MIB - 64))
def test_equal_streamed_blocks_come_in_runs_as_short_as_their_number_allows(
    num: int, num_resident: int, over_bytes: int
) -> None:
    budget = min(num_resident, num) * MIB + over_bytes
    line = Allocation.parse(f"cpu,{budget}b;disk,*")
    plan = make_plan(equal_blocks(num, MIB), line, roomy("cpu", "disk"))
    kinds = [placement.kind for placement in plan.placements]
    resident = kinds.count("resident")
    assert resident == min(num_resident, num)
    if resident:
        first = kinds.index("resident")
        circle = kinds[first:] + kinds[:first]  # the next step follows at once
        runs = [len(list(run)) for kind, run in groupby(circle) if kind == "streamed"]
        assert max(runs, default=0) <= math.ceil((num - resident) / resident) + 1


@given(st.integers(2, 60), st.integers(1, 59), st.integers(1, 59))
def test_equal_blocks_are_dealt_to_donors_in_turn(num: int, one: int, two: int) -> None:
    assume(one + two <= num)
    rest = num - one - two
    line = Allocation.parse(f"cpu,{rest}mb;cuda:0,{one}mb;disk,{two}mb")
    plan = make_plan(equal_blocks(num, MIB), line, roomy("cuda:0", "cpu", "disk"))
    dealt = [placement.tier for placement in plan.placements if placement.kind == "streamed"]
    assert (dealt.count("cuda:0"), dealt.count("disk")) == (one, two)
    for end in range(1, len(dealt) + 1):  # at every point, each holds its share of what was dealt
        assert abs(dealt[:end].count("disk") - end * two / (one + two)) <= 1


@given(block_lists(), st.integers(0, 64 * MIB), st.integers(0, 8 * MIB))
def test_more_budget_never_holds_less_where_blocks_are_equal(
    blocks: tuple[Block, ...], budget: int, more: int
) -> None:
    machine = roomy("cpu", "disk")
    equal = equal_blocks(len(blocks), MIB)
    small, large = (
        make_plan(equal, Allocation.parse(f"cpu,{amount}b;disk,*"), machine)
        for amount in (budget, budget + more)
    )
    assert large.streamed_bytes <= small.streamed_bytes


@given(planned())
def test_nothing_that_would_still_fit_is_left_to_stream(case: Case) -> None:
    blocks, allocation, machine, plan = case
    resolved = allocation.resolve(sum(block.nbytes for block in blocks), machine)
    left_bytes = resolved.bytes_on(plan.compute) - plan.bytes_by_tier[plan.compute]
    assert all(p.block.nbytes > left_bytes for p in plan.placements if p.kind == "streamed")


@given(plans())
def test_rows_that_are_looked_up_rest_here_only_when_nothing_else_wants_the_room(
    plan: Plan,
) -> None:
    if any(p.block.looked_up and p.kind == "resident" for p in plan.placements):
        visitors = _visitors(plan)
        looked_up = sum(
            p.block.nbytes for p in plan.placements if p.block.looked_up and p.kind == "resident"
        )
        assert all(block.nbytes > looked_up for block in visitors) or not visitors


def test_tiny_blocks_stay_first() -> None:
    large = equal_blocks(8, MIB)
    tiny = [
        replace(block, name=f"t{block.name}", module=f"t{block.module}")
        for block in equal_blocks(8, KIB)
    ]
    mixed = [block for pair in zip(large, tiny, strict=True) for block in pair]
    plan = make_plan(mixed, Allocation.parse("cpu,2mb;disk,*"), roomy("cpu", "disk"))
    kinds = {p.block.name: p.kind for p in plan.placements}
    assert {kinds[block.name] for block in tiny} == {"resident"}


def test_a_compute_device_that_the_line_does_not_name_holds_nothing_at_rest() -> None:
    line = Allocation.parse("cpu,*")
    plan = make_plan(equal_blocks(3, MIB), line, roomy("cuda:0", "cpu"), compute="cuda:0")
    assert plan.bytes_by_tier == {"cuda:0": 0, "cpu": 3 * MIB}


@pytest.mark.parametrize("line", ["auto", "cpu,*", "cpu,0b;disk,*", "cpu,50%;disk,50%"])
def test_a_model_without_weights_has_a_plan(line: str) -> None:
    plan = make_plan((), Allocation.parse(line), roomy("cpu", "disk"))
    assert (plan.model_bytes, plan.ring.nbytes) == (0, 0)


def test_an_outer_module_that_the_root_holds_counts_as_one() -> None:
    root, inner = equal_blocks(2, MIB)
    root = replace(root, name="", module="")
    line = Allocation.parse("cpu,0b;disk,*")
    with pytest.raises(AllocationError, match="3 slots"):
        make_plan((root, inner), line, roomy("cpu", "disk"), ring_bytes=2 * MIB)
