"""Transfers on a free clock: donors send at once, and share the links and buses they meet on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from distorch.machine import Machine
from distorch.plan.cost import lanes

__all__ = ["Transfer", "Transfers"]


@dataclass(slots=True)
class Transfer:
    """A block under way: ``left_bytes`` to go, after ``left_seconds`` of latency."""

    tier: str
    block: int
    left_bytes: float
    left_seconds: float = 0.0
    began: float = 0.0


@dataclass(slots=True)
class _Donor:
    """One donor's queue; its first transfer is under way."""

    lanes: dict[str, float]
    latency_seconds: float
    queue: deque[Transfer] = field(default_factory=deque)
    bytes_per_second: float = 0.0


class Transfers:
    """All donors sending at once, each lane's speed shared by those on it."""

    def __init__(self, machine: Machine, compute: str) -> None:
        self._machine = machine
        self._compute = compute
        self._donors: dict[str, _Donor] = {}
        self._clock = 0.0

    def fresh(self) -> Transfers:
        """The same links, with nothing under way."""
        return Transfers(self._machine, self._compute)

    def send(self, transfer: Transfer, now: float) -> None:
        """Queue a transfer at its donor."""
        donor = self._donors.get(transfer.tier)
        if donor is None:
            route = self._machine.route(transfer.tier, self._compute)
            donor = self._donors[transfer.tier] = _Donor(
                lanes(self._machine, transfer.tier, self._compute),
                sum(link.latency_seconds for link in route),
            )
        self._let_pass(now)
        donor.queue.append(transfer)
        if len(donor.queue) == 1:
            self._begin(donor)

    def arrivals(self, until: float) -> Iterator[tuple[float, Transfer]]:
        """Yield what arrives up to a time, in order."""
        while (found := self._first()) is not None and found[0] <= until:
            yield self._finish(*found)
        self._let_pass(until)

    def next_arrival(self) -> tuple[float, Transfer]:
        """Wait for the next arrival."""
        found = self._first()
        assert found is not None, "something is under way"
        return self._finish(*found)

    def _first(self) -> tuple[float, _Donor] | None:
        found: tuple[float, _Donor] | None = None
        for donor in self._donors.values():
            if donor.queue:
                head = donor.queue[0]
                at = self._clock + head.left_seconds + head.left_bytes / donor.bytes_per_second
                if found is None or at < found[0]:
                    found = at, donor
        return found

    def _finish(self, at: float, donor: _Donor) -> tuple[float, Transfer]:
        self._let_pass(at)
        transfer = donor.queue.popleft()
        self._begin(donor)
        return at, transfer

    def _begin(self, donor: _Donor) -> None:
        """Start a donor's next transfer, if it has one, and share the lanes anew."""
        if donor.queue:
            donor.queue[0].began = self._clock
            donor.queue[0].left_seconds = donor.latency_seconds
        busy = [other for other in self._donors.values() if other.queue]
        for other in busy:
            other.bytes_per_second = min(
                speed / sum(lane in each.lanes for each in busy)
                for lane, speed in other.lanes.items()
            )

    def _let_pass(self, now: float) -> None:
        passed = now - self._clock
        if passed <= 0:
            return
        for donor in self._donors.values():
            if donor.queue:
                head = donor.queue[0]
                moving = max(0.0, passed - head.left_seconds)
                head.left_seconds = max(0.0, head.left_seconds - passed)
                head.left_bytes = max(0.0, head.left_bytes - moving * donor.bytes_per_second)
        self._clock = now
