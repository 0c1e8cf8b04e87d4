"""Says what a step will cost before it runs: the runtime's own schedule, on a clock that is free.

`Schedule` decides what comes when, here as in the executor; only the transfers are played. Each
donor sends its blocks one after another over the links to the compute device; transfers that meet
on a link or a bus share its speed. What is simulated is a step in the middle of many: the ring is
warm, and the end of a step already brings the start of the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from distorch.allocation import Allocation
from distorch.errors import AllocationError
from distorch.machine import Machine
from distorch.plan.blocks import Block
from distorch.plan.cost import Profile, block_seconds, bound, steady_bytes
from distorch.plan.plan import Plan, Prediction, gib
from distorch.plan.planner import Judge, make_plan
from distorch.run.schedule import Schedule
from distorch.transfers import Transfer, Transfers

__all__ = [
    "Overlap",
    "Span",
    "Timeline",
    "best_plan",
    "judge_of_links",
    "predict",
    "simulate",
    "timeline",
]

Overlap = Literal["ring", "one ahead", "none"]
"""How copies meet compute: ours; the next block only, from scratch each step; or not at all."""

_MANY_VISITS = 4000  # of blocks; by then steps repeat, but for very few plans
_FEWEST_STEPS = 4
_ALIKE = 1e-10  # of a second, or of a block: moments that differ by no more are the same
_Moment = tuple[frozenset[int], tuple[int, ...], tuple[float, ...]]
"""Which blocks are here; which are under way; what is left of each: latency, part of its bytes."""


@dataclass(frozen=True, slots=True)
class Span:
    """Something that lasted: ``lane`` is ``compute``, ``wait``, or the donor that sent a block."""

    lane: str
    block: int
    begin: float
    end: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """One step in the middle of many, in seconds from its begin.

    ``spans`` of donors may begin before 0: the ring is filled ahead.
    """

    step_seconds: float
    waited_seconds: float
    spans: tuple[Span, ...] = ()


def predict(plan: Plan, profile: Profile, machine: Machine) -> Prediction:
    """Return what a step of ``profile`` costs as ``plan`` places it on ``machine``.

    Raises:
        MachineError: the machine does not say how fast the device computes, or a donor's link is.
    """
    seconds = block_seconds(profile, machine.compute(plan.compute))
    found = simulate(plan, seconds, machine)
    bound_seconds, limited_by = bound(plan, seconds, machine)
    moved = steady_bytes(plan)
    held = plan.bytes_by_tier
    on_host = plan.compute == "cpu"
    stages = any(machine.tier(name).is_disk for name in moved)
    return Prediction(
        machine=machine.name,
        predicted_seconds=max(found.step_seconds, bound_seconds),  # sums round
        bound_seconds=bound_seconds,
        compute_seconds=sum(seconds),
        limited_by=limited_by,
        streamed_bytes_by_link={f"{name}->{plan.compute}": count for name, count in moved.items()},
        host_ram_bytes=held.get("cpu", 0)
        + (plan.ring.nbytes if on_host or stages else 0)
        + (profile.activation_bytes if on_host else 0),
        activation_bytes=profile.activation_bytes,
        flops=profile.total_flops,
    )


def best_plan(
    profile: Profile,
    allocation: Allocation,
    machine: Machine,
    *,
    compute: str | None = None,
    ring_bytes: int | None = None,
) -> Plan:
    """Return the plan that is predicted fastest of those that ``allocation`` allows.

    Raises:
        AllocationError: none fits the machine.
        MachineError: the machine does not say how fast a device or a link is.
    """
    device = compute or allocation.resolve(0, machine).compute
    seconds = block_seconds(profile, machine.compute(device))
    judge = Judge(
        seconds=lambda plan: simulate(plan, seconds, machine).step_seconds,
        least_seconds=sum(seconds),
        reserve_bytes=profile.activation_bytes,
        block_seconds=seconds,
    )
    plan = make_plan(
        profile.blocks, allocation, machine, compute=compute, ring_bytes=ring_bytes, judge=judge
    )
    found = predict(plan, profile, machine)
    _check_host(found, machine)
    return replace(plan, prediction=found)


def judge_of_links(blocks: Sequence[Block], machine: Machine) -> Judge:
    """Return what judges plans by their copies alone: for a model whose operations are not known.

    >>> judge_of_links((), Machine.load("2x-rtx3090-nvlink")).least_seconds
    0.0
    """
    seconds = (0.0,) * len(blocks)
    return Judge(
        seconds=lambda plan: simulate(plan, seconds, machine).step_seconds, block_seconds=seconds
    )


def _check_host(found: Prediction, machine: Machine) -> None:
    """Refuse what weights and all that passes through host RAM add to more than is free there."""
    free_bytes = next((tier.free_bytes for tier in machine.tiers if tier.name == "cpu"), None)
    if free_bytes is not None and found.host_ram_bytes > free_bytes:
        raise AllocationError(
            f"{gib(found.host_ram_bytes)} of host RAM are needed, weights and what is on its way, "
            f"and {gib(free_bytes)} are free",
            hint=f"an amount for cpu that is smaller by {found.host_ram_bytes - free_bytes}b",
        )


def timeline(plan: Plan, profile: Profile, machine: Machine) -> Timeline:
    """Return one step of ``profile`` as ``plan`` places it on ``machine``, with its spans."""
    seconds = block_seconds(profile, machine.compute(plan.compute))
    return simulate(plan, seconds, machine, trace=True)


def simulate(
    plan: Plan,
    seconds: Sequence[float],
    machine: Machine,
    *,
    overlap: Overlap = "ring",
    trace: bool = False,
) -> Timeline:
    """Play steps of ``plan``, whose blocks compute for ``seconds`` each, and return one of them.

    ``overlap`` plays how others copy: ``"none"`` copies each block when it is needed, as
    ComfyUI-MultiGPU does; ``"one ahead"`` brings the next block while one computes, and begins
    each step with nothing, as group offloading does. ``trace`` keeps the spans.

    Raises:
        MachineError: a donor has no link to the compute device.

    >>> from distorch.machine import Link, Machine, Tier
    >>> from distorch.plan.blocks import Block, Part
    >>> from distorch.plan.plan import Placement, Ring
    >>> tiers = tuple(Tier(name=n, capacity_bytes=99, free_bytes=99) for n in ("cuda:0", "cpu"))
    >>> link = Link(source="cpu", target="cuda:0", bytes_per_second=256.0)
    >>> machine = Machine(name="slow", tiers=tiers, links=(link,))
    >>> parts = [Part(tensor=f"w{i}", dtype="U8", shape=(256,), nbytes=256) for i in range(4)]
    >>> blocks = [Block(name=part.tensor, parts=(part,), module=part.tensor) for part in parts]
    >>> placed = tuple(Placement(block=b, tier="cpu", kind="streamed") for b in blocks)
    >>> ring = Ring(num_slots=2, slot_bytes=256)
    >>> plan = Plan(compute="cuda:0", allocation="cuda:0,0b;cpu,*", placements=placed, ring=ring)
    >>> [simulate(plan, [1.0] * 4, machine, overlap=how).step_seconds for how in ("ring", "none")]
    [4.0, 8.0]
    """
    run = _Run(plan, seconds, Transfers(machine, plan.compute), overlap)
    step_seconds, waited_seconds = _repeated(run, len(plan.streamed_order))
    began, run.trace = run.clock, trace
    for _ in range(_FEWEST_STEPS if trace else 0):
        run.step()
    shown = (
        replace(span, begin=span.begin - began, end=span.end - began)
        for span in run.spans
        if began < span.end and span.begin < began + step_seconds
    )
    return Timeline(
        step_seconds=step_seconds,
        waited_seconds=waited_seconds,
        spans=tuple(sorted(shown, key=lambda span: (span.lane, span.begin))),
    )


def _repeated(run: _Run, num_visits: int) -> tuple[float, float]:
    """Play until a step ends as an earlier one did: the steps between repeat for ever.

    Return the seconds that such a step takes, and those that it waits, on average. Steps that do
    not repeat soon (of very many blocks, or where two limits are all but equal) are averaged.
    """
    past: list[tuple[float, float]] = []
    moments: list[_Moment] = []
    since = None
    while since is None and len(past) < max(_FEWEST_STEPS, _MANY_VISITS // max(num_visits, 1)):
        run.step()
        now = run.moment()
        since = next((n for n, moment in enumerate(moments) if _are_alike(moment, now)), None)
        moments.append(now)
        past.append((run.clock, run.waited))
    since = len(past) // 2 - 1 if since is None else since
    steps = len(past) - 1 - since
    return (run.clock - past[since][0]) / steps, (run.waited - past[since][1]) / steps


def _are_alike(one: _Moment, other: _Moment) -> bool:
    same = one[:2] == other[:2]
    return same and all(abs(a - b) <= _ALIKE for a, b in zip(one[2], other[2], strict=True))


class _Run:
    """One compute thread, as the executor serves it."""

    def __init__(
        self, plan: Plan, seconds: Sequence[float], transfers: Transfers, overlap: Overlap
    ) -> None:
        self.clock = 0.0
        self.waited = 0.0
        self.trace = False
        self.spans: list[Span] = []
        self._under_way: dict[int, Transfer] = {}
        self._plan = plan
        self._transfers = transfers
        self._overlap = overlap
        self._schedule = self._fresh()
        visitors = set(plan.streamed_order)
        self._visits = [(i, i in visitors, each) for i, each in enumerate(seconds)]
        self._merged = _merged(self._visits)

    def _fresh(self) -> Schedule:
        if self._overlap == "none":
            return Schedule(order=(), num_slots=1)
        if self._overlap == "one ahead":
            return Schedule(order=self._plan.streamed_order, num_slots=2)
        return Schedule.of(self._plan)

    def step(self) -> None:
        """Run all blocks once."""
        if self._overlap == "one ahead":
            self._schedule, self._transfers = self._fresh(), self._transfers.fresh()
            self._under_way.clear()
        self._schedule.begin_step()
        for index, visits, seconds in self._visits if self.trace else self._merged:
            if visits:
                self._acquire(index)
            self._pass("compute", index, self.clock + seconds)
            if visits:
                self._schedule.release(index)
                self._dispatch()
        self._schedule.end_step(complete=True)

    def moment(self) -> _Moment:
        """Say how things stand."""
        placements = self._plan.placements
        left: list[float] = []
        for index, each in self._under_way.items():
            left += each.left_seconds, each.left_bytes / max(placements[index].block.nbytes, 1)
        return self._schedule.here, tuple(self._under_way), tuple(left)

    def _acquire(self, index: int) -> None:
        began = self.clock
        while self._schedule.acquire(index) is None:
            self._dispatch()
            at, arrived = self._transfers.next_arrival()
            self._arrive(at, arrived)
            self.clock = at
        if self.clock > began:
            self.waited += self.clock - began
            self._note("wait", index, began, self.clock)

    def _pass(self, lane: str, index: int, until: float) -> None:
        """Let time pass; what arrives meanwhile may make room for more."""
        began = self.clock
        for at, arrived in self._transfers.arrivals(until):
            self._arrive(at, arrived)
        self.clock = until
        self._note(lane, index, began, until)

    def _arrive(self, at: float, arrived: Transfer) -> None:
        del self._under_way[arrived.block]
        self._schedule.arrived(arrived.block)
        self._note(arrived.tier, arrived.block, arrived.began, at)

    def _dispatch(self) -> None:
        while (fetch := self._schedule.next_fetch()) is not None:
            placement = self._plan.placements[fetch.block]
            transfer = Transfer(placement.tier, fetch.block, placement.block.nbytes)
            self._under_way[fetch.block] = transfer
            self._transfers.send(transfer, self.clock)

    def _note(self, lane: str, block: int, begin: float, end: float) -> None:
        if self.trace and end > begin:
            self.spans.append(Span(lane, block, begin, end))


def _merged(visits: Sequence[tuple[int, bool, float]]) -> list[tuple[int, bool, float]]:
    """The same step, with blocks that rest side by side as one."""
    merged: list[tuple[int, bool, float]] = []
    for index, visiting, seconds in visits:
        if merged and not visiting and not merged[-1][1]:
            merged[-1] = (merged[-1][0], False, merged[-1][2] + seconds)
        else:
            merged.append((index, visiting, seconds))
    return merged
