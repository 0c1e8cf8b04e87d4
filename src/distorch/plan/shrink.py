"""Fits a plan into less room on the device that computes: pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace

from distorch.allocation import Allocation
from distorch.plan.plan import Placement, Plan, Ring
from distorch.plan.planner import choose_resident
from distorch.plan.rings import least_ring, usual_ring

__all__ = ["shrunk"]


def shrunk(plan: Plan, room_bytes: int, free_bytes: Mapping[str, int]) -> Plan:
    """Return the plan with weights at rest and ring within ``room_bytes`` of the compute device.

    Some of the blocks that rest there move to donors, the others stay where they are. They go to
    the donor that takes the line's remainder; without one to the line's donors, in proportion to
    what they have; and to the host's memory where no other has room. ``free_bytes`` says what each
    donor has beside the plan. A ring has two slots at the least: with less room than that, it is
    the smallest of these plans.

    >>> from distorch.plan.blocks import Block, Part
    >>> mib = 1 << 20
    >>> parts = [Part(tensor=f"w{i}", dtype="U8", shape=(mib,), nbytes=mib) for i in range(9)]
    >>> blocks = [Block(name=part.tensor, parts=(part,), module=part.tensor) for part in parts]
    >>> placed = tuple(Placement(block=b, tier="cuda:0", kind="resident") for b in blocks)
    >>> plan = Plan(compute="cuda:0", allocation="cuda:0,*", placements=placed, ring=Ring())
    >>> shrunk(plan, 8 * mib, {}).bytes_by_tier
    {'cuda:0': 3145728, 'cpu': 6291456}
    """
    tried = [plan]
    for fewest in (False, True):
        if tried[-1].held_bytes > room_bytes:
            tried.append(_within(plan, room_bytes, free_bytes, fewest=fewest))
    fits = tried[-1].held_bytes <= room_bytes
    return tried[-1] if fits else min(tried, key=lambda each: each.held_bytes)


def _within(plan: Plan, room_bytes: int, free_bytes: Mapping[str, int], *, fewest: bool) -> Plan:
    """Let blocks go until the others and their ring fit, or none is left."""
    staying = [i for i, placed in enumerate(plan.placements) if placed.kind == "resident"]
    found, budget_bytes = _moved(plan, staying, free_bytes, fewest=fewest), room_bytes
    while found.held_bytes > room_bytes and staying:
        blocks = [plan.placements[index].block for index in staying]
        staying = [staying[number] for number in sorted(choose_resident(blocks, budget_bytes))]
        found = _moved(plan, staying, free_bytes, fewest=fewest)
        budget_bytes = found.bytes_by_tier[plan.compute] + room_bytes - found.held_bytes
    return found


def _moved(
    plan: Plan, staying: Collection[int], free_bytes: Mapping[str, int], *, fewest: bool
) -> Plan:
    """Move what rests on the compute device, but for ``staying``, to the donors."""
    shares, given, kept = _shares(plan), Counter[str](), set(staying)
    placements = []
    for index, placed in enumerate(plan.placements):
        if placed.kind == "streamed" or index in kept:
            placements.append(placed)
            continue
        nbytes = placed.block.nbytes
        able = [name for name in shares if given[name] + nbytes <= free_bytes.get(name, 0)]
        tier = min(able, key=lambda name: (given[name] + nbytes) / shares[name], default="cpu")
        given[tier] += nbytes
        placements.append(Placement(block=placed.block, tier=tier, kind="streamed"))
    moved = replace(plan, placements=tuple(placements), prediction=None)
    return replace(moved, ring=_ring(moved, fewest=fewest))


def _shares(plan: Plan) -> dict[str, int]:
    """In which proportion the donors take what leaves the compute device."""
    entries = Allocation.parse(plan.allocation).entries
    rest = next((entry.device for entry in entries if entry.rest), plan.compute)
    if rest != plan.compute:
        return {rest: 1}
    return {
        name: nbytes
        for name, nbytes in plan.bytes_by_tier.items()
        if name != plan.compute and nbytes
    }


def _ring(plan: Plan, *, fewest: bool) -> Ring:
    """Size the ring anew: slots for what visits now, no more of them than before."""
    visitors = [plan.placements[index].block for index in plan.streamed_order]
    least, usual = least_ring(visitors), usual_ring(visitors)
    if fewest:
        return least
    num_slots = min(usual.num_slots, plan.ring.num_slots or usual.num_slots)
    return replace(usual, num_slots=max(least.num_slots, num_slots))
