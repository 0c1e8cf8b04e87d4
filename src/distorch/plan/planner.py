"""Decides where each block rests: pure, deterministic, in whole bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from distorch.allocation import Allocation, Resolved
from distorch.errors import AllocationError
from distorch.machine import Machine
from distorch.plan.auto import auto_plan
from distorch.plan.blocks import Block
from distorch.plan.judge import Best, Judge, assemble
from distorch.plan.plan import Plan, gib
from distorch.plan.rings import rings, roomy_ring
from distorch.plan.search import TINY_BYTES, resident_sets, spread

__all__ = ["Judge", "check_room", "choose_resident", "make_plan"]

_RING_PART = 8  # beside a line's amount, a ring may take one part in so many of the model


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
    gives donors the bytes that make the step shortest.

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
        device = allocation.resolve(0, machine, compute).compute
        plan = auto_plan(blocks, machine, device, ring_bytes, judge)
        if plan is None:
            raise job.too_small(device)
    else:
        model_bytes = sum(block.nbytes for block in blocks)
        resolved = allocation.resolve(model_bytes, machine, compute)
        made = job.by_line(resolved)
        plan = next(made) if judge is None else _fastest(made, judge, len(blocks))
        assert plan is not None, "a line that resolves has a plan"
    check_room(plan, machine, judge.reserve_bytes if judge else 0)
    return plan


def _fastest(plans: Iterable[Plan], judge: Judge, num_blocks: int) -> Plan | None:
    """Return the fastest; stop at one that nothing can beat."""
    best = Best(judge, num_blocks)
    for plan in plans:
        best.offer(plan)
        if best.is_final:
            break
    return best.plan


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
        sets: Iterable[Iterable[int]] = [choose_resident(self.blocks, budget_bytes)]
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
            if self.judge is None and self.ring_bytes is None and resolved.compute != "cpu":
                tried = iter([roomy_ring(visitors, room_bytes - budget_bytes)])
            for number, ring in enumerate(tried):
                if not number or ring.nbytes <= most_bytes:
                    line, notes_of_all = str(self.allocation), resolved.notes + notes
                    yield assemble(self.blocks, line, resolved.compute, tiers, ring, notes_of_all)

    def too_small(self, device: str) -> AllocationError:
        """Say what is missing on a machine that cannot hold the model."""
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


def choose_resident(blocks: Sequence[Block], budget_bytes: int) -> set[int]:
    """Choose which stay: tiny blocks first, then an even spread, rows that are looked up last."""
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
