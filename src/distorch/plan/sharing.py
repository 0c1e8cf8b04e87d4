"""Which streamed blocks share a slot of the ring: pure.

A slot is as large as the largest block that visits. Smaller ones that are visited one after another
share one, as many as fit, so that the same memory looks further ahead. Who shares with whom follows
from the order alone, never from how fast anything is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Seat", "num_groups", "seats"]


@dataclass(frozen=True, slots=True)
class Seat:
    """A block's place in whichever slot its group has, ``begin`` bytes from the slot's first."""

    group: int
    begin: int = 0


def seats(order: Sequence[int], sizes: Mapping[int, int], slot_bytes: int) -> dict[int, Seat]:
    """Give each block of the order a seat; one without a size has a slot to itself.

    So has one that is visited several times in a step, or its neighbours would come with it as
    often.

    >>> for block, seat in seats([7, 8, 9], {7: 40, 8: 60, 9: 50}, slot_bytes=100).items():
    ...     print(block, seat)
    7 Seat(group=0, begin=0)
    8 Seat(group=0, begin=40)
    9 Seat(group=1, begin=0)
    """
    found: dict[int, Seat] = {}
    group, end, is_full = -1, 0, True
    for block, visits in Counter(order).items():
        shares = visits == 1 and block in sizes
        size = sizes[block] if shares else slot_bytes
        if is_full or not shares or end + size > slot_bytes:
            group, end = group + 1, 0
        found[block] = Seat(group, end)
        end, is_full = end + size, not shares
    return found


def num_groups(order: Sequence[int], sizes: Mapping[int, int], slot_bytes: int) -> int:
    """Return how many slots hold all blocks of the order at once.

    >>> num_groups([7, 8, 9], {7: 40, 8: 60, 9: 50}, slot_bytes=100)
    2
    """
    return 1 + max((seat.group for seat in seats(order, sizes, slot_bytes).values()), default=-1)
