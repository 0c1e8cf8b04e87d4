"""Decides where each block rests: pure, deterministic, in whole bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import zip_longest

from distorch.allocation import Allocation, Resolved
from distorch.errors import AllocationError, MachineError
from distorch.machine import Machine
from distorch.plan.blocks import Block
from distorch.plan.cost import lanes
from distorch.plan.plan import Placement, Plan, Ring, gib
from distorch.plan.rings import rings, usual_ring
from distorch.plan.search import TINY_BYTES, deal, resident_sets, shares_by_speed, spread

__all__ = ["Judge", "check_room", "make_plan"]

_ROUNDING = 1 + 1e-9
_RING_PART = 8  # beside a line's amount, a ring may take one part in so many of the model
_MANY_VISITS = 6000  # of blocks, in all the plans that are judged: a second, about


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """Says how many seconds a step of a plan takes, so that the best of several can be chosen.

    ``least_seconds`` is what no plan goes below; ``reserve_bytes`` are what the compute device
    needs beside weights and ring (activations).
    """

    seconds: Callable[[Plan], float]
    least_seconds: float = 0.0
    reserve_bytes: int = 0


def make_plan(
    blocks: Sequence[Block],
    allocation: Allocation,
    machine: Machine,
    *,
    compute: str | None = None,
    ring_bytes: int | None = None,
    judge: Judge | None = None,
) -> Plan:
    """Place every block of a model as ``allocation`` says, streamed ones spread evenly.

    ``ring_bytes`` bounds the ring; by default it has four slots of the largest streamed block, or
    three where that is large, and one for each block that is held while others visit. With a
    ``judge``, several placements and rings are tried, and the fastest is returned; ``auto`` then
    gives each donor bytes in proportion to the speed of its links.

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
    job = _Job(tuple(blocks), allocation, machine, ring_bytes, judge)
    if allocation.mode == "auto" and judge is not None:
        plan = _best(job.auto(compute), judge)
        if plan is None:
            raise job.too_small(compute)
    else:
        model_bytes = sum(block.nbytes for block in blocks)
        resolved = allocation.resolve(model_bytes, machine, compute)
        made = job.by_line(resolved)
        plan = next(made) if judge is None else _best(made, judge)
        assert plan is not None, "a line that resolves has a plan"
    check_room(plan, machine, judge.reserve_bytes if judge else 0)
    return plan


def _best(plans: Iterable[Plan], judge: Judge) -> Plan | None:
    """Return the fastest, the first of equals; stop at one that nothing can beat."""
    best, best_seconds, visits = None, float("inf"), 0
    for plan in plans:
        seconds = judge.seconds(plan)
        if seconds < best_seconds:
            best, best_seconds = plan, seconds
        visits += len(plan.streamed_order)
        if seconds <= judge.least_seconds * _ROUNDING or visits > _MANY_VISITS:
            break
    return best


@dataclass(frozen=True, slots=True)
class _Job:
    """What is to be placed, and how; its methods yield plans, the likeliest first."""

    blocks: tuple[Block, ...]
    allocation: Allocation
    machine: Machine
    ring_bytes: int | None
    judge: Judge | None

    def by_line(self, resolved: Resolved) -> Iterator[Plan]:
        """Plans that a line of amounts allows."""
        budget_bytes = resolved.bytes_on(resolved.compute)
        room_bytes = self.machine.tier(resolved.compute).usable_bytes - self._reserve_bytes
        most_bytes = min(room_bytes - budget_bytes, self._model_bytes // _RING_PART)
        rest = next((entry.device for entry in self.allocation.entries if entry.rest), None)
        sets: Iterable[Iterable[int]] = [_resident(self.blocks, budget_bytes)]
        if self.judge is not None:
            sets = resident_sets(self.blocks, budget_bytes)
        for resident in sets:
            kept = set(resident)
            streamed = [index for index in range(len(self.blocks)) if index not in kept]
            tiers, notes = _deal(self.blocks, streamed, resolved, rest)
            visitors = [
                self.blocks[index] for index in streamed if not self.blocks[index].looked_up
            ]
            tried = rings(visitors, self.ring_bytes, several=self.judge is not None)
            for number, ring in enumerate(tried):
                if not number or ring.nbytes <= most_bytes:
                    yield self._plan(resolved.compute, tiers, ring, resolved.notes + notes)

    def auto(self, compute: str | None) -> Iterator[Plan]:
        """Plans that fit what is free, donors chosen by the speed of their links."""
        device = self.allocation.resolve(0, self.machine, compute).compute
        budget_bytes = self.machine.tier(device).usable_bytes - self._reserve_bytes
        if self._model_bytes <= budget_bytes:
            yield self._plan(device, {}, Ring())
            return
        ways = self._ways(device)
        donors = [tier for tier in self.machine.tiers if tier.name in ways]
        donors.sort(key=lambda tier: (tier.is_disk, -min(ways[tier.name].values())))
        rooms = {tier.name: tier.usable_bytes for tier in donors}
        visitors = [block for block in self.blocks if not block.looked_up]
        tried = [*rings(visitors, self.ring_bytes, several=self.judge is not None)]
        sets = [resident_sets(self.blocks, budget_bytes - ring.nbytes) for ring in tried]
        for residents in zip_longest(*sets):  # the likeliest of each ring first
            for most, resident in zip(tried, residents, strict=True):
                for tiers in () if resident is None else self._deals(resident, rooms, ways):
                    moved = [self.blocks[i] for i in tiers if not self.blocks[i].looked_up]
                    ring = replace(usual_ring(moved), num_slots=min(most.num_slots, len(moved)))
                    yield self._plan(device, tiers, ring)

    def _ways(self, device: str) -> dict[str, Mapping[str, float]]:
        """What the bytes of each donor cross; a memory without a link to the device is none."""
        ways: dict[str, Mapping[str, float]] = {}
        for tier in self.machine.tiers:
            if tier.name != device:
                with suppress(MachineError):
                    ways[tier.name] = lanes(self.machine, tier.name, device)
        return ways

    def _deals(
        self,
        resident: Collection[int],
        rooms: Mapping[str, int],
        ways: Mapping[str, Mapping[str, float]],
    ) -> Iterator[dict[int, str]]:
        """Ways to deal what does not stay: over all links at once, or all of it to one donor."""
        sizes = {i: block.nbytes for i, block in enumerate(self.blocks) if i not in resident}
        shares = shares_by_speed([*sizes.values()], rooms, ways)
        if shares is not None:
            tiers = deal(sizes, shares, rooms)
            if tiers is not None:
                yield tiers
        for name, room_bytes in rooms.items() if len(rooms) > 1 else ():
            if sum(sizes.values()) <= room_bytes:
                yield dict.fromkeys(sizes, name)
                return

    def too_small(self, compute: str | None) -> AllocationError:
        """Say what is missing on a machine that cannot hold the model."""
        device = self.allocation.resolve(0, self.machine, compute).compute
        rooms = {tier.name: tier.usable_bytes for tier in self.machine.tiers}
        rooms[device] = max(0, rooms[device] - self._reserve_bytes)
        listed = ", ".join(f"{gib(room)} on {name}" for name, room in rooms.items())
        return AllocationError(
            f"the model needs {gib(self._model_bytes)}, and activations {gib(self._reserve_bytes)} "
            f"on {device}; machine '{self.machine.name}' has room for {listed}",
            hint=f"at most {gib(sum(rooms.values()))} of weights fit: a smaller format, a smaller "
            "size, or more memory",
        )

    @property
    def _model_bytes(self) -> int:
        return sum(block.nbytes for block in self.blocks)

    @property
    def _reserve_bytes(self) -> int:
        return self.judge.reserve_bytes if self.judge else 0

    def _plan(
        self, compute: str, tiers: dict[int, str], ring: Ring, notes: tuple[str, ...] = ()
    ) -> Plan:
        placements = tuple(
            Placement(block=block, tier=tiers[index], kind="streamed")
            if index in tiers
            else Placement(block=block, tier=compute, kind="resident")
            for index, block in enumerate(self.blocks)
        )
        return Plan(
            compute=compute,
            allocation=str(self.allocation),
            placements=placements,
            ring=ring,
            notes=notes,
        )


def check_room(plan: Plan, machine: Machine, reserve_bytes: int = 0) -> None:
    """Refuse what whole blocks, the ring and activations add to a line that fitted."""
    beside_bytes = plan.ring.nbytes + reserve_bytes
    held: Counter[str] = Counter({machine.tier(plan.compute).name: beside_bytes})
    for name, nbytes in plan.bytes_by_tier.items():
        tier = machine.tier(name)
        held[tier.name] += nbytes
        over_bytes = held[tier.name] - tier.free_bytes
        if over_bytes > 0:
            what = "whole blocks"
            if name == plan.compute:
                what = "its weights and the ring"
                what += ", and activations," if reserve_bytes else ""
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
        if blocks[index].nbytes <= TINY_BYTES:
            keep(index)
    candidates = [index for index in visited if index not in chosen]
    fitting = sum(blocks[index].nbytes for index in spread(blocks, candidates, left_bytes))
    for index in spread(blocks, candidates, fitting):  # what cannot be used would skew the spread
        keep(index)
    for index in (*visited, *range(len(blocks))):  # what rounding left over, then looked-up rows
        keep(index)
    return chosen


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
