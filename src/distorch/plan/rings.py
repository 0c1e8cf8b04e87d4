"""Sizes the ring that streamed blocks visit: pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from distorch.errors import AllocationError
from distorch.plan.blocks import SECTOR_BYTES, Block
from distorch.plan.plan import Ring, gib
from distorch.plan.sharing import num_groups

__all__ = ["least_ring", "rings", "roomy_ring", "usual_ring"]

_SMALL_BYTES = 16 << 20
_SLOTS_IF_SMALL = 4
_SLOTS_IF_LARGE = 3  # one in use, one ready, one on its way
_FEWEST_SLOTS = 2
_MORE = 64  # a slot may be larger than the largest block by one part in so many
_SLOTS_TRIED = (8, 16, 2, 3, 4)
_ROOMY_BYTES, _ROOMY_PART = 1 << 30, 8


def rings(visitors: Sequence[Block], ring_bytes: int | None, *, several: bool) -> Iterator[Ring]:
    """Yield the usual ring; then, if ``several`` may be tried and none is asked for, others.

    Many slots help where compute is uneven, few where memory is short.
    """
    usual = usual_ring(visitors, ring_bytes)
    yield usual
    if several and visitors and ring_bytes is None:
        more = _held_at_once(visitors)
        most = max(_num_groups(visitors, usual.slot_bytes), _FEWEST_SLOTS)
        for num_slots in _SLOTS_TRIED:
            ring = replace(usual, num_slots=min(num_slots + more, most))
            if ring != usual:
                yield ring


def roomy_ring(visitors: Sequence[Block], room_bytes: int) -> Ring:
    """Return the ring for a fast device: more slots than usual where there is room.

    A link that is faster than some layers and slower than others works ahead through the first.
    It gets to a GiB, and no more than one part in eight of what visits.
    """
    usual = usual_ring(visitors)
    if not visitors:
        return usual
    visiting_bytes = sum(block.nbytes for block in visitors)
    num_slots = min(room_bytes, _ROOMY_BYTES, visiting_bytes // _ROOMY_PART) // usual.slot_bytes
    return replace(usual, num_slots=max(usual.num_slots, num_slots))


def usual_ring(visitors: Sequence[Block], ring_bytes: int | None = None) -> Ring:
    """Size the ring: slots for the largest visitor, one more for each block held meanwhile."""
    if not visitors:
        return Ring()
    largest = max(visitors, key=lambda block: block.nbytes)
    least = least_ring(visitors)
    fewest, slot_bytes = least.num_slots, _wide_enough(visitors, least.slot_bytes)
    if ring_bytes is None:
        wanted = _SLOTS_IF_SMALL if largest.nbytes <= _SMALL_BYTES else _SLOTS_IF_LARGE
        num_slots = wanted + _held_at_once(visitors)
    else:
        if ring_bytes < fewest * slot_bytes:
            slot_bytes = least.slot_bytes
        num_slots = ring_bytes // slot_bytes
        if num_slots < fewest:
            raise AllocationError(
                f"a ring of {gib(ring_bytes)} cannot hold {fewest} slots of {gib(slot_bytes)} "
                f"for the largest block ({largest.name})",
                hint=f'ring="{fewest * slot_bytes}b", or more weights at rest',
            )
    most = max(_num_groups(visitors, slot_bytes), fewest)
    return Ring(num_slots=min(num_slots, most), slot_bytes=slot_bytes)


def least_ring(visitors: Sequence[Block]) -> Ring:
    """Return the smallest ring: one block in use, one on its way, and those held meanwhile."""
    if not visitors:
        return Ring()
    slot_bytes = max(block.slot_bytes for block in visitors)
    return Ring(num_slots=_FEWEST_SLOTS + _held_at_once(visitors), slot_bytes=slot_bytes)


def _wide_enough(visitors: Sequence[Block], slot_bytes: int) -> int:
    """A little more, if more blocks share a slot then: four quarters of the largest, and norms."""
    wide_bytes = slot_bytes + slot_bytes // _MORE // SECTOR_BYTES * SECTOR_BYTES
    fewer = _num_groups(visitors, wide_bytes) < _num_groups(visitors, slot_bytes)
    return wide_bytes if fewer else slot_bytes


def _num_groups(visitors: Sequence[Block], slot_bytes: int) -> int:
    sizes = {number: block.slot_bytes for number, block in enumerate(visitors)}
    return num_groups(range(len(visitors)), sizes, slot_bytes)


def _held_at_once(visitors: Sequence[Block]) -> int:
    """How many more blocks a module may find held: its own other ones, and those around it."""
    counts = Counter(block.module for block in visitors if block.module is not None)
    return max((_held_around(name, counts) for name in counts), default=0)


def _held_around(name: str, counts: Counter[str]) -> int:
    parts = name.split(".")
    around = {".".join(parts[:end]) for end in range(len(parts))}  # "" is the whole model
    return counts[name] - 1 + sum(counts[outer] for outer in around if outer != name)
