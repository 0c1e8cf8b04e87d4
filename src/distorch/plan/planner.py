"""Decides where each block rests: pure, deterministic, in whole bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from distorch.allocation import Allocation, Resolved
from distorch.errors import AllocationError
from distorch.machine import Machine
from distorch.plan.blocks import Block
from distorch.plan.plan import Placement, Plan, Ring, gib

__all__ = ["make_plan"]

_TINY_BYTES = 64 << 10  # a visit of these costs its latency, not its bytes: keep them first
_SMALL_SLOT_BYTES = 16 << 20
_SLOTS_IF_SMALL = 4
_SLOTS_IF_LARGE = 3  # one in use, one ready, one on its way
_FEWEST_SLOTS = 2


def make_plan(
    blocks: Sequence[Block],
    allocation: Allocation,
    machine: Machine,
    *,
    compute: str | None = None,
    ring_bytes: int | None = None,
) -> Plan:
    """Place every block of a model as ``allocation`` says, streamed ones spread evenly.

    ``ring_bytes`` bounds the ring; by default it has four slots of the largest streamed block, or
    three where that is large, and one for each block that is held while others visit.

    Raises:
        AllocationError: the line does not fit the machine, or the ring is too small for a block.

    >>> from distorch.machine import Machine, Tier
    >>> from distorch.plan.blocks import Part
    >>> tiers = [Tier(name=n, capacity_bytes=1 << 30, free_bytes=1 << 30) for n in ("cpu", "disk")]
    >>> mib = 1 << 20
    >>> parts = [Part(tensor=f"w{i}", dtype="U8", shape=(mib,), nbytes=mib) for i in range(4)]
    >>> blocks = [Block(name=p.tensor, parts=(p,), module=p.tensor) for p in parts]
    >>> machine = Machine(name="laptop", tiers=tuple(tiers))
    >>> plan = make_plan(blocks, Allocation.parse("cpu,50%;disk,50%"), machine)
    >>> [placement.tier for placement in plan.placements]
    ['disk', 'cpu', 'disk', 'cpu']
    """
    model_bytes = sum(block.nbytes for block in blocks)
    resolved = allocation.resolve(model_bytes, machine, compute)
    resident = _resident(blocks, resolved.bytes_on(resolved.compute))
    streamed = [index for index in range(len(blocks)) if index not in resident]
    rest = next((entry.device for entry in allocation.entries if entry.rest), None)
    tiers, notes = _deal(blocks, streamed, resolved, rest)
    placements = tuple(
        Placement(block=block, tier=tiers[index], kind="streamed")
        if index in tiers
        else Placement(block=block, tier=resolved.compute, kind="resident")
        for index, block in enumerate(blocks)
    )
    plan = Plan(
        compute=resolved.compute,
        allocation=str(allocation),
        placements=placements,
        ring=Ring(),
        notes=resolved.notes + notes,
    )
    visitors = [blocks[index] for index in plan.streamed_order]
    plan = replace(plan, ring=_ring(visitors, ring_bytes))
    _check_room(plan, machine)
    return plan


def _check_room(plan: Plan, machine: Machine) -> None:
    """Refuse what whole blocks and the ring add to a line that fitted."""
    held: Counter[str] = Counter({machine.tier(plan.compute).name: plan.ring.nbytes})
    for name, nbytes in plan.bytes_by_tier.items():
        tier = machine.tier(name)
        held[tier.name] += nbytes
        over_bytes = held[tier.name] - tier.free_bytes
        if over_bytes > 0:
            what = "its weights and the ring" if name == plan.compute else "whole blocks"
            raise AllocationError(
                f"{what} need {gib(over_bytes)} more than {name} has free",
                hint=f"an amount for {name} that is smaller by {over_bytes}b",
            )


def _resident(blocks: Sequence[Block], budget_bytes: int) -> set[int]:
    """Choose what stays: tiny blocks first, then an even spread, rows that are looked up last."""
    chosen: set[int] = set()
    left_bytes = budget_bytes

    def keep(index: int) -> None:
        nonlocal left_bytes
        if index not in chosen and blocks[index].nbytes <= left_bytes:
            chosen.add(index)
            left_bytes -= blocks[index].nbytes

    visited = [index for index, block in enumerate(blocks) if not block.looked_up]
    for index in visited:
        if blocks[index].nbytes <= _TINY_BYTES:
            keep(index)
    candidates = [index for index in visited if index not in chosen]
    fitting = sum(blocks[index].nbytes for index in _spread(blocks, candidates, left_bytes))
    for index in _spread(blocks, candidates, fitting):  # what cannot be used would skew the spread
        keep(index)
    for index in (*visited, *range(len(blocks))):  # what rounding left over, then looked-up rows
        keep(index)
    return chosen


def _spread(blocks: Sequence[Block], candidates: Sequence[int], budget_bytes: int) -> list[int]:
    """Pick candidates so that every run of them holds its share of the budget: an even spread."""
    total = sum(blocks[index].nbytes for index in candidates)
    picked, seen_bytes, picked_bytes = [], 0, 0
    for index in candidates:
        nbytes = blocks[index].nbytes
        seen_bytes += nbytes
        # exact integers: pick when the share due so far covers the block
        if budget_bytes * seen_bytes >= (picked_bytes + nbytes) * total:
            picked.append(index)
            picked_bytes += nbytes
    return picked


def _deal(
    blocks: Sequence[Block], streamed: Sequence[int], resolved: Resolved, rest: str | None
) -> tuple[dict[int, str], tuple[str, ...]]:
    """Deal streamed blocks to the donors in proportion to their bytes, mixed in execution order.

    Blocks are whole, so amounts that sum to the model exactly cannot all be met to the byte: the
    last donor of the line takes the rounding, and a note says so.
    """
    shares = dict(resolved.bytes_by_tier)
    donors = [name for name in shares if name != resolved.compute and shares[name]]
    if not streamed:
        return {}, ()
    if not donors:  # rounding left a block over, and the line names no donor for it
        short = sum(blocks[index].nbytes for index in streamed)
        raise AllocationError(
            f"{gib(short)} of the model have no place on {resolved.compute} and no donor is named",
            hint=f"{resolved.compute},*;disk,0b",
        )
    last = rest if rest in donors else donors[-1]
    tiers: dict[int, str] = {}
    held = dict.fromkeys(donors, 0)
    for index in streamed:
        nbytes = blocks[index].nbytes
        fitting = [name for name in donors if held[name] + nbytes <= shares[name]] or [last]
        tier = min(fitting, key=lambda name: (held[name] + nbytes) / shares[name])
        tiers[index] = tier
        held[tier] += nbytes
    over = held[last] - shares[last]
    note = f"{last} holds {gib(over)} more than its share: blocks are whole"
    return tiers, (note,) if over > 0 and last != rest else ()


def _ring(visitors: Sequence[Block], ring_bytes: int | None) -> Ring:
    """Size the ring: slots of the largest visitor, one more for each block held meanwhile."""
    if not visitors:
        return Ring()
    slot_bytes = max(block.nbytes for block in visitors)
    fewest = _FEWEST_SLOTS + _held_at_once(visitors)
    if ring_bytes is None:
        wanted = _SLOTS_IF_SMALL if slot_bytes <= _SMALL_SLOT_BYTES else _SLOTS_IF_LARGE
        num_slots = wanted + _held_at_once(visitors)
    else:
        num_slots = ring_bytes // slot_bytes
        if num_slots < fewest:
            largest = max(visitors, key=lambda block: block.nbytes)
            raise AllocationError(
                f"a ring of {gib(ring_bytes)} cannot hold {fewest} slots of {gib(slot_bytes)}, "
                f"the largest block ({largest.name})",
                hint=f'ring="{fewest * slot_bytes}b", or more weights at rest',
            )
    return Ring(num_slots=min(num_slots, max(len(visitors), fewest)), slot_bytes=slot_bytes)


def _held_at_once(visitors: Sequence[Block]) -> int:
    """How many more blocks a module may find held: its own other ones, and those around it."""
    counts = Counter(block.module for block in visitors if block.module is not None)
    return max((_held_around(name, counts) for name in counts), default=0)


def _held_around(name: str, counts: Counter[str]) -> int:
    parts = name.split(".")
    around = {".".join(parts[:end]) for end in range(len(parts))}  # "" is the whole model
    return counts[name] - 1 + sum(counts[outer] for outer in around if outer != name)
