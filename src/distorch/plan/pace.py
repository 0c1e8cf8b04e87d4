"""The least time of a step by a recurrence: a hundredth of what playing it takes. Pure.

The ring's schedule is a fixed order: the copies of blocks that share a slot begin when the visits
that had the slot before are over, and the copy before them at the same donor; a block's compute
begins when it has arrived, and the visit before it is over. Where each donor has links of its own
that is all there is to a step, and the time is the simulator's. Where donors meet on a link or a
bus each is taken to have it alone, so that no step is faster.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from distorch.machine import Machine
from distorch.plan.blocks import Block
from distorch.plan.cost import lanes
from distorch.plan.plan import Ring
from distorch.plan.sharing import seats

__all__ = ["Pace"]

_MANY_STEPS = 200  # by then steps repeat, but for very few plans
_ALIKE = 1e-12  # of a step


class _Visit(NamedTuple):
    """A block's turn in a step; ``renews`` says that it is the first of those that share a slot."""

    copy_seconds: float
    donor: int
    seconds_before: float
    seconds: float
    renews: bool


@dataclass(frozen=True, slots=True)
class _Way:
    """What a donor's bytes cross, and how fast they do."""

    lanes: Mapping[str, float]
    bytes_per_second: float
    latency_seconds: float


class Pace:
    """The least seconds of steps of a model, whose blocks compute for ``seconds`` each."""

    def __init__(
        self,
        blocks: Sequence[Block],
        seconds: Sequence[float],
        machine: Machine,
        compute: str,
        donors: Iterable[str],
    ) -> None:
        self._blocks = blocks
        self._seconds = seconds
        self._compute_seconds = sum(seconds)
        self._ways = {name: _way(machine, name, compute) for name in donors}
        self._all_bytes_per_second = _together(self._ways.values())

    def of(self, tiers: Mapping[int, str], ring: Ring) -> float:
        """Return the least seconds of a step with these blocks streamed, each from its donor."""
        numbers = {name: number for number, name in enumerate(dict.fromkeys(tiers.values()))}
        copies: dict[int, tuple[float, int]] = {}
        busy: defaultdict[str, float] = defaultdict(float)
        for index, name in tiers.items():
            way, nbytes = self._ways[name], self._blocks[index].nbytes
            if self._blocks[index].looked_up:
                continue
            copies[index] = way.latency_seconds + nbytes / way.bytes_per_second, numbers[name]
            for lane, bytes_per_second in way.lanes.items():
                busy[lane] += nbytes / bytes_per_second
        return self._seconds_of(copies, ring, max(busy.values(), default=0.0))

    def at_best(self, streamed: Iterable[int], ring: Ring) -> float:
        """Return what no way to deal these blocks goes below: all donors as one, of all speeds."""
        copies = {
            index: (self._blocks[index].nbytes / self._all_bytes_per_second, 0)
            for index in streamed
            if not self._blocks[index].looked_up
        }
        return self._seconds_of(copies, ring, 0.0)

    def _seconds_of(
        self, copies: Mapping[int, tuple[float, int]], ring: Ring, busiest: float
    ) -> float:
        sizes = {index: self._blocks[index].slot_bytes for index in copies}
        seated = seats(sorted(copies), sizes, ring.slot_bytes)
        if max((seat.group for seat in seated.values()), default=-1) < ring.num_slots:
            return self._compute_seconds  # each keeps its place: nothing moves any more
        visits: list[_Visit] = []
        before = 0.0
        for index, seconds in enumerate(self._seconds):
            if index in copies:
                visits.append(_Visit(*copies[index], before, seconds, not seated[index].begin))
                before = 0.0
            else:
                before += seconds
        num_donors = 1 + max(visit.donor for visit in visits)
        return max(_repeated(visits, before, ring.num_slots, num_donors), busiest)


def _repeated(visits: Sequence[_Visit], last: float, num_slots: int, num_donors: int) -> float:
    """Return the seconds of steps that repeat; those of compute, or of a donor, if none soon do."""
    free, over, slot, clock = [0.0] * num_donors, [0.0] * num_slots, 0, 0.0
    room, past = 0.0, list[tuple[float, list[float]]]()
    for _ in range(_MANY_STEPS):
        for copy, donor, before, own, renews in visits:
            if renews:
                slot = slot + 1 if slot + 1 < num_slots else 0
                room = over[slot]
            free[donor] = max(free[donor], room) + copy
            clock = over[slot] = max(clock + before, free[donor]) + own
        clock += last
        state = [moment - clock for moment in (*free, *over[slot + 1 :], *over[: slot + 1])]
        near = _ALIKE * clock
        for number in range(len(past) - 1, -1, -1):
            then, like = past[number]
            if all(abs(one - other) <= near for one, other in zip(state, like, strict=True)):
                return (clock - then) / (len(past) - number)
        past.append((clock, state))
    sums = [0.0] * num_donors
    for visit in visits:
        sums[visit.donor] += visit.copy_seconds
    return max(*sums, last + sum(visit.seconds_before + visit.seconds for visit in visits))


def _way(machine: Machine, source: str, target: str) -> _Way:
    found = lanes(machine, source, target)
    latency = sum(link.latency_seconds for link in machine.route(source, target))
    return _Way(found, min(found.values()), latency)


def _together(ways: Iterable[_Way]) -> float:
    """All that can arrive in a second: the donors' speeds, and no more than a lane of them all."""
    ways = list(ways)
    total = sum(way.bytes_per_second for way in ways)
    common = set.intersection(*(set(way.lanes) for way in ways)) if ways else set()
    return min([total, *(way.lanes[lane] for way in ways for lane in common)])
