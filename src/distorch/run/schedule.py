"""Which block comes into which slot, and when: pure, no thread, no torch, no clock.

The schedule knows the order of a step's visits. Ahead of the compute, it wants the next blocks of
that order, as many as the ring has room for, and gives up a slot only when none of its blocks is
among them: the block needed last goes first (Belady's rule over the window that the ring can hold).
The order is a circle, so the end of one step already wants the start of the next. Small neighbours
share a slot (`distorch.plan.sharing`), and give it up together.

The executor runs it with threads and memories, the simulator with a clock and none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Self

from distorch.plan.plan import Plan
from distorch.plan.sharing import Seat, seats

__all__ = ["Fetch", "Place", "Schedule"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a block is in the ring: its slot, and its first byte, counted from the ring's."""

    slot: int
    begin: int


@dataclass(frozen=True, slots=True)
class Fetch:
    """An instruction: bring ``block`` to ``place``; ``renews`` says that its slot begins anew.

    What was in such a slot before is not needed any more. Other fetches join what came since.
    """

    block: int
    place: Place
    renews: bool = True


@dataclass(slots=True)
class _Held:
    """A block that has a place: whether it is there yet, and how many use it."""

    place: Place
    arrived: bool = False
    num_leases: int = 0

    @property
    def is_busy(self) -> bool:
        """Whether a copy is writing it or a lease is reading it."""
        return self.num_leases > 0 or not self.arrived


class Schedule:
    """The state of the ring, and what should happen next.

    ``sizes`` are the bytes that blocks take in a slot of ``slot_bytes``; without them each has a
    slot to itself.

    >>> schedule = Schedule(order=[10, 11, 12], num_slots=2)
    >>> [schedule.next_fetch().block, schedule.next_fetch().block, schedule.next_fetch()]
    [10, 11, None]
    >>> schedule.arrived(10); place = schedule.acquire(10); schedule.release(10)
    >>> schedule.next_fetch()
    Fetch(block=12, place=Place(slot=0, begin=0), renews=True)
    """

    def __init__(
        self,
        *,
        order: Sequence[int],
        num_slots: int,
        slot_bytes: int = 0,
        sizes: Mapping[int, int] | None = None,
    ) -> None:
        self._slot_bytes = slot_bytes
        self._sizes = sizes or {}
        self._held: dict[int, _Held] = {}
        self._groups: list[int | None] = [None] * num_slots  # whose blocks a slot takes more of
        self._urgent: int | None = None
        self._failed: set[int] = set()  # not tried again before somebody needs them
        self._step: list[int] | None = None
        self._fetches: deque[Fetch] = deque()  # have a place, and are not begun
        self._is_settled = False  # all that is wanted has a place, until more is wanted
        self._set_order(order)

    @classmethod
    def of(cls, plan: Plan) -> Self:
        """Return the schedule of a plan's ring."""
        return cls(
            order=plan.streamed_order,
            num_slots=plan.ring.num_slots,
            slot_bytes=plan.ring.slot_bytes,
            sizes=plan.visitor_bytes,
        )

    @property
    def order(self) -> tuple[int, ...]:
        """The visits of one step, as last seen (or as the plan guessed before the first)."""
        return self._order

    @property
    def urgent(self) -> int | None:
        """The block that compute waits for now."""
        return self._urgent

    @property
    def here(self) -> frozenset[int]:
        """The blocks that have arrived and are not gone."""
        return frozenset(block for block, held in self._held.items() if held.arrived)

    def begin_step(self) -> None:
        """Say that a step begins; its visits are recorded."""
        self._step = []

    def end_step(self, *, complete: bool) -> None:
        """Say that it has ended: a complete step's visits are the order of the next.

        When an order has come twice, what still lies as an earlier one had it gives up its slot.
        """
        seen, self._step = self._step, None
        self._is_settled = False
        if not complete:
            self._cursor = 0
        elif seen and tuple(seen) != self._order:
            self._set_order(seen)
        elif seen:
            for slot in self._idle_slots():
                if self._groups[slot] is None:
                    self._clear(slot)

    def acquire(self, block: int) -> Place | None:
        """Lease ``block``: its place if it has arrived, None if it is on its way (ask again)."""
        held = self._held.get(block)
        if held is None or not held.arrived:
            self._urgent = block
            self._failed.discard(block)
            self._advance_to(block)
            self._is_settled = False
            return None
        self._urgent = None
        if self._advance_to(block):
            self._cursor = (self._cursor + 1) % len(self._order)
        if self._step is not None:
            self._step.append(block)
        held.num_leases += 1
        return held.place

    def release(self, block: int) -> None:
        """Give a lease back."""
        held = self._held[block]
        assert held.num_leases > 0, "a lease is given back once"
        held.num_leases -= 1
        if not self._goes_on(held.place.slot):
            self._is_settled = False

    def arrived(self, block: int) -> None:
        """Say that a fetch has ended well."""
        self._held[block].arrived = True

    def failed(self, block: int) -> None:
        """Say that a fetch has failed: its place is empty, it waits until needed."""
        del self._held[block]
        self._failed.add(block)
        self._is_settled = False
        if block == self._urgent:
            self._urgent = None

    def next_fetch(self) -> Fetch | None:
        """Return the next copy to start, or None while there is nothing to do or no room."""
        if not self._fetches and not self._is_settled:
            self._look_ahead()
        return self._fetches.popleft() if self._fetches else None

    @property
    def is_stuck(self) -> bool:
        """Whether compute waits for a block that has no place, and every slot is leased."""
        return (
            self._urgent is not None
            and self._urgent not in self._held
            and self._slot_of(self._seats.get(self._urgent)) is None
            and len(self._leased_slots()) == len(self._groups)
        )

    def _look_ahead(self) -> None:
        """Give places to what is wanted and has none, as far as there is room."""
        rank = {block: place for place, block in enumerate(self._wanted())}
        for block in rank:
            if block not in self._held and not self._give_place(block, rank):
                return
        self._is_settled = self._urgent is None

    def _give_place(self, block: int, rank: Mapping[int, int]) -> bool:
        """Give a block a place, beside its neighbours or in a slot that can be given up, if any."""
        seat = self._seats.get(block)
        slot = self._slot_of(seat)
        renews = slot is None
        if slot is None:
            slot = self._room(block, rank)
            if slot is None:
                return False
            self._clear(slot)
            self._groups[slot] = None if seat is None else seat.group
        place = self._place(slot, seat)
        self._held[block] = _Held(place)
        self._fetches.append(Fetch(block, place, renews))
        return True

    def _wanted(self) -> dict[int, None]:
        """The next blocks that no lease holds, of as many groups as the ring has room for."""
        leased = self._leased_slots()
        groups, room = {self._groups[slot] for slot in leased}, len(self._groups) - len(leased)
        wanted: dict[int, None] = {}
        for block in self._coming():
            held, seat = self._held.get(block), self._seats.get(block)
            if block in wanted or block in self._failed or (held and held.num_leases):
                continue
            group = None if seat is None else seat.group
            if group not in groups:
                if not room:
                    break
                room -= 1
                groups.add(group)
            wanted[block] = None
        return wanted

    def _coming(self) -> Iterator[int]:
        """The block that compute waits for, then all in the order of the circle."""
        urgent = () if self._urgent is None else (self._urgent,)
        return chain(urgent, islice(self._order, self._cursor, None), self._order[: self._cursor])

    def _slot_of(self, seat: Seat | None) -> int | None:
        """The slot that takes more blocks of a seat's group."""
        if seat is None or seat.group not in self._groups:
            return None
        return self._groups.index(seat.group)

    def _idle_slots(self) -> list[int]:
        busy = {held.place.slot for held in self._held.values() if held.is_busy}
        return [slot for slot in range(len(self._groups)) if slot not in busy]

    def _leased_slots(self) -> set[int]:
        return {held.place.slot for held in self._held.values() if held.num_leases}

    def _room(self, missing: int, rank: Mapping[int, int]) -> int | None:
        """A slot to write: an empty one, one with nothing that is wanted, or only wanted later."""
        idle = self._idle_slots()
        if not idle:
            return None
        distances = [len(rank) + 1] * len(self._groups)
        for block, held in self._held.items():
            slot = held.place.slot
            distances[slot] = min(distances[slot], rank.get(block, len(rank)))
        best = max(idle, key=lambda slot: (distances[slot], -slot))
        return best if distances[best] > rank[missing] else None

    def _clear(self, slot: int) -> None:
        for block in [block for block, held in self._held.items() if held.place.slot == slot]:
            del self._held[block]

    def _advance_to(self, block: int) -> bool:
        """Move to the next visit of ``block``; a block that is not in the order moves nothing."""
        places = self._places.get(block)
        if places and self._order[self._cursor] != block:
            size = len(self._order)
            self._cursor = min(places, key=lambda place: (place - self._cursor) % size)
            self._is_settled = False
        return bool(places)

    def _goes_on(self, slot: int) -> bool:
        """Whether the next visit is of a slot's group: then no slot can be given up now."""
        group = self._groups[slot]
        return group is not None and group == self._seats[self._order[self._cursor]].group

    def _set_order(self, order: Sequence[int]) -> None:
        self._order = tuple(order)
        self._cursor = 0
        self._places: dict[int, list[int]] = {}
        for place, block in enumerate(self._order):
            self._places.setdefault(block, []).append(place)
        self._seats = seats(self._order, self._sizes, self._slot_bytes)
        groups: list[int | None] = [None] * len(self._groups)
        for slot in range(len(groups)):  # blocks that are here stay where they are
            group = self._group_in(slot)
            groups[slot] = group if group not in groups else None
        self._groups = groups

    def _group_in(self, slot: int) -> int | None:
        """The group whose blocks, and no others, lie in a slot, each in its seat."""
        held = {block: each.place for block, each in self._held.items() if each.place.slot == slot}
        seated = {block: self._seats.get(block) for block in held}
        groups = {None if seat is None else seat.group for seat in seated.values()}
        at_home = all(self._place(slot, seated[block]) == place for block, place in held.items())
        return groups.pop() if len(groups) == 1 and at_home else None

    def _place(self, slot: int, seat: Seat | None) -> Place:
        return Place(slot, slot * self._slot_bytes + (0 if seat is None else seat.begin))
