"""`auto` by a judge: what stays, and how the other blocks are dealt to donors. Pure.

What is tried does not depend on how fast the links are, only the order in which it is tried does:
sets that stay, rings, and shares of donors in fixed steps (`search.share_steps`). A faster link
makes none of them slower, so the fastest of all is never slower either. Plans whose least time is
no less than the best so far are passed over, which changes nothing.

Of models of more than 64 blocks not all is tried: blocks are dealt by speed, or to one donor, and
the search ends after some work. There a faster link can be predicted slower, by one block's share.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import zip_longest

from distorch.errors import MachineError
from distorch.machine import Machine
from distorch.plan.blocks import Block
from distorch.plan.cost import lanes
from distorch.plan.judge import FEW_BLOCKS, Best, Judge, assemble
from distorch.plan.pace import Pace
from distorch.plan.plan import Plan, Ring
from distorch.plan.rings import rings, usual_ring
from distorch.plan.search import deal, least_dealt, resident_sets, share_steps, shares_by_speed

__all__ = ["auto_plan"]

_MANY_SHARES = 200  # tried of a set of blocks: 199 steps for two donors, 18 for three
_FEWER_SHARES = 32  # where donors meet on a lane, so that most of them must be played
_LIKELY = 4  # of them, that every set of blocks is tried with before any is searched
_PACE_VISITS = 1 / 32  # what a visit costs in the recurrence, by what it costs when it is played


def auto_plan(
    blocks: Sequence[Block],
    machine: Machine,
    device: str,
    ring_bytes: int | None,
    judge: Judge,
) -> Plan | None:
    """Return the fastest plan that fits what is free; None if none does."""
    budget_bytes = machine.tier(device).usable_bytes - judge.reserve_bytes
    if sum(block.nbytes for block in blocks) <= budget_bytes:
        return assemble(blocks, "auto", device, {}, Ring())
    search = _Search.of(blocks, machine, device, judge)
    left = []
    for choice in search.choices(budget_bytes, ring_bytes) if search.ways else ():
        if search.best.may_lose_to(choice.least_seconds):
            search.deal(choice, search.likely_shares(choice))
            left.append(choice)
        if search.best.is_final:
            return search.best.plan
    if len(blocks) <= FEW_BLOCKS:
        for choice in sorted(left, key=lambda choice: choice.least_seconds):
            search.deal(choice, search.all_shares(choice))
    return search.best.plan


@dataclass(frozen=True, slots=True)
class _Choice:
    """A ring, and the sizes of blocks that do not stay; no way to deal them is below a time."""

    ring: Ring
    sizes: Mapping[int, int]
    least_seconds: float


@dataclass(frozen=True, slots=True)
class _Search:
    """What does not change from one set of resident blocks to the next."""

    blocks: Sequence[Block]
    device: str
    rooms: Mapping[str, int]
    disks: frozenset[str]
    ways: Mapping[str, Mapping[str, float]]
    pace: Pace
    best: Best

    @classmethod
    def of(cls, blocks: Sequence[Block], machine: Machine, device: str, judge: Judge) -> _Search:
        """Look up the donors; a memory without a link to the device is none."""
        ways: dict[str, Mapping[str, float]] = {}
        for tier in machine.tiers:
            if tier.name != device:
                with suppress(MachineError):
                    ways[tier.name] = lanes(machine, tier.name, device)
        rooms = {name: machine.tier(name).usable_bytes for name in ways}
        disks = frozenset(tier.name for tier in machine.tiers if tier.is_disk)
        seconds = judge.block_seconds or [0.0] * len(blocks)
        pace = Pace(blocks, seconds, machine, device, ways)
        return cls(blocks, device, rooms, disks, ways, pace, Best(judge, len(blocks)))

    def choices(self, budget_bytes: int, ring_bytes: int | None) -> Iterator[_Choice]:
        """What stays beside each ring, the likeliest of each ring first."""
        visitors = [block for block in self.blocks if not block.looked_up]
        tried = [*rings(visitors, ring_bytes, several=True)]
        sets = [resident_sets(self.blocks, budget_bytes - ring.nbytes) for ring in tried]
        for residents in zip_longest(*sets):
            for most, resident in zip(tried, residents, strict=True):
                if resident is not None:
                    yield self._choice(resident, most.num_slots)

    def _choice(self, resident: frozenset[int], most_slots: int) -> _Choice:
        sizes = {i: block.nbytes for i, block in enumerate(self.blocks) if i not in resident}
        moved = [self.blocks[i] for i in sizes if not self.blocks[i].looked_up]
        ring = replace(usual_ring(moved), num_slots=min(most_slots, len(moved)))
        self.best.spend(len(moved) * _PACE_VISITS)
        return _Choice(ring, sizes, self.pace.at_best(sizes, ring))

    def deal(self, choice: _Choice, ways: Iterable[Mapping[str, int]]) -> None:
        """Judge ways to share the blocks among donors."""
        done = set()
        for shares in ways:
            if not self.best.may_lose_to(self._least_seconds(shares, choice.sizes)):
                continue
            tiers = deal(choice.sizes, shares, self.rooms)
            if tiers is None or (dealt := tuple(tiers.values())) in done:
                continue
            done.add(dealt)
            self.best.spend(len(tiers) * _PACE_VISITS)
            if self.best.may_lose_to(self.pace.of(tiers, choice.ring)):
                self.best.offer(assemble(self.blocks, "auto", self.device, tiers, choice.ring))
            if self.best.is_final:
                return

    def likely_shares(self, choice: _Choice) -> Iterator[Mapping[str, int]]:
        """As speeds ask for, or all from one donor; of few blocks, the nearest of all shares."""
        if len(self.blocks) <= FEW_BLOCKS:
            yield from self.all_shares(choice)[:_LIKELY]
            return
        rooms = {name: self.rooms[name] for name in sorted(self.rooms, key=self._slowness)}
        by_speed = shares_by_speed([*choice.sizes.values()], rooms, self.ways)
        yield from () if by_speed is None else (by_speed,)
        yield from ({name: 1} for name in rooms)

    def all_shares(self, choice: _Choice) -> list[dict[str, int]]:
        """All steps, those first that keep the busiest lane busy for the shortest."""
        num_lanes = sum(map(len, self.ways.values()))
        have_own = num_lanes == len({lane for way in self.ways.values() for lane in way})
        most = _MANY_SHARES if have_own else _FEWER_SHARES
        steps = share_steps([*choice.sizes.values()], self.rooms, most)
        return sorted(steps, key=self._busy_seconds)

    def _slowness(self, name: str) -> tuple[bool, float]:
        return name in self.disks, -min(self.ways[name].values())

    def _busy_seconds(self, shares: Mapping[str, int]) -> tuple[float, float]:
        """How long the busiest lane is busy, and all of them, by what each byte takes."""
        busy: defaultdict[str, float] = defaultdict(float)
        for name, share in shares.items():
            for lane, bytes_per_second in self.ways[name].items():
                busy[lane] += share / bytes_per_second
        return max(busy.values(), default=0.0), sum(busy.values())

    def _least_seconds(self, shares: Mapping[str, int], sizes: Mapping[int, int]) -> float:
        """What no step goes below in which blocks are dealt so."""
        looked_up = sum(nbytes for i, nbytes in sizes.items() if self.blocks[i].looked_up)
        dealt = least_dealt(sizes, shares, self.rooms)
        return max((dealt[name] - looked_up) / min(self.ways[name].values()) for name in shares)
