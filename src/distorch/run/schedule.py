"""Which block comes into which slot, and when: pure, no thread, no torch, no clock.

The schedule knows the order of a step's visits. Ahead of the compute, it wants the next blocks of
that order, as many as the ring has room for, and gives up a slot only when its block is not among
them: the block needed last goes first (Belady's rule over the window that the ring can hold). The
order is a circle, so the end of one step already wants the start of the next.

The executor runs it with threads and memories, the simulator with a clock and none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice

__all__ = ["Fetch", "Schedule", "Slot"]


@dataclass(slots=True)
class Slot:
    """One place of the ring: which block it holds or awaits, and who uses it."""

    block: int | None = None
    arrived: bool = False
    num_leases: int = 0

    @property
    def is_busy(self) -> bool:
        """Whether a copy is writing it or a lease is reading it."""
        return self.num_leases > 0 or (self.block is not None and not self.arrived)


@dataclass(frozen=True, slots=True)
class Fetch:
    """An instruction: bring ``block`` into ``slot``."""

    block: int
    slot: int


class Schedule:
    """The state of the ring, and what should happen next.

    >>> schedule = Schedule(order=[10, 11, 12], num_slots=2)
    >>> schedule.next_fetch(), schedule.next_fetch(), schedule.next_fetch()
    (Fetch(block=10, slot=0), Fetch(block=11, slot=1), None)
    >>> schedule.arrived(0); slot = schedule.acquire(10); schedule.release(slot)
    >>> schedule.next_fetch()
    Fetch(block=12, slot=0)
    """

    def __init__(self, *, order: Sequence[int], num_slots: int) -> None:
        self.slots = [Slot() for _ in range(num_slots)]
        self._urgent: int | None = None
        self._failed: set[int] = set()  # not tried again before somebody needs them
        self._step: list[int] | None = None
        self._set_order(order)

    @property
    def order(self) -> tuple[int, ...]:
        """The visits of one step, as last seen (or as the plan guessed before the first)."""
        return self._order

    @property
    def urgent(self) -> int | None:
        """The block that compute waits for now."""
        return self._urgent

    def begin_step(self) -> None:
        """Say that a step begins; its visits are recorded."""
        self._step = []

    def end_step(self, *, complete: bool) -> None:
        """Say that it has ended: a complete step's visits are the order of the next."""
        seen, self._step = self._step, None
        if complete and seen and tuple(seen) != self._order:
            self._set_order(seen)
        if not complete:
            self._cursor = 0

    def acquire(self, block: int) -> int | None:
        """Lease ``block``: its slot if it has arrived, None if it is on its way (ask again)."""
        slot = self._find(block)
        if slot is None or not self.slots[slot].arrived:
            self._urgent = block
            self._failed.discard(block)
            self._advance_to(block)
            return None
        self._urgent = None
        if self._advance_to(block):
            self._cursor = (self._cursor + 1) % len(self._order)
        if self._step is not None:
            self._step.append(block)
        self.slots[slot].num_leases += 1
        return slot

    def release(self, slot: int) -> None:
        """Give a lease back."""
        assert self.slots[slot].num_leases > 0, "a lease is given back once"
        self.slots[slot].num_leases -= 1

    def arrived(self, slot: int) -> None:
        """Say that a fetch has ended well."""
        self.slots[slot].arrived = True

    def failed(self, slot: int) -> None:
        """Say that a fetch has failed: its slot is empty, its block waits until needed."""
        block = self.slots[slot].block
        assert block is not None, "a fetch was under way"
        self._failed.add(block)
        if block == self._urgent:
            self._urgent = None
        self.slots[slot] = Slot()

    def next_fetch(self) -> Fetch | None:
        """Return the next copy to start, or None while there is nothing to do or no room."""
        wanted = self._wanted()
        held = {slot.block for slot in self.slots}
        missing = next((block for block in wanted if block not in held), None)
        if missing is None:
            return None
        slot = self._room(wanted, evict=missing == self._urgent)
        if slot is None:
            return None
        self.slots[slot] = Slot(block=missing)
        return Fetch(missing, slot)

    @property
    def is_stuck(self) -> bool:
        """Whether every slot is leased, so that nothing else can ever arrive."""
        return all(slot.num_leases for slot in self.slots)

    def _wanted(self) -> list[int]:
        """The next distinct blocks that no lease holds, as many as there are slots for them."""
        leased = [slot.block for slot in self.slots if slot.num_leases]
        room = len(self.slots) - len(leased)
        wanted = [] if self._urgent is None or not room else [self._urgent]
        for block in chain(islice(self._order, self._cursor, None), self._order):
            if len(wanted) >= room:
                break
            if block not in wanted and block not in leased and block not in self._failed:
                wanted.append(block)
        return wanted

    def _room(self, wanted: Sequence[int], *, evict: bool) -> int | None:
        """A slot to write: an empty one, one whose block is not wanted, or, in need, the last."""
        idle = [index for index, slot in enumerate(self.slots) if not slot.is_busy]
        if not idle:
            return None
        rank = {block: place for place, block in enumerate(wanted)}

        def distance(index: int) -> int:
            block = self.slots[index].block
            return len(wanted) + 1 if block is None else rank.get(block, len(wanted))

        best = max(idle, key=lambda index: (distance(index), -index))
        return best if evict or distance(best) >= len(wanted) else None

    def _advance_to(self, block: int) -> bool:
        """Move to the next visit of ``block``; a block that is not in the order moves nothing."""
        places = self._places.get(block)
        if places:
            size = len(self._order)
            self._cursor = min(places, key=lambda place: (place - self._cursor) % size)
        return bool(places)

    def _find(self, block: int) -> int | None:
        return next((i for i, slot in enumerate(self.slots) if slot.block == block), None)

    def _set_order(self, order: Sequence[int]) -> None:
        self._order = tuple(order)
        self._cursor = 0
        self._places: dict[int, list[int]] = {}
        for place, block in enumerate(self._order):
            self._places.setdefault(block, []).append(place)
