"""Ways to run a model under a cap: resident, ours, and two schemes of others in plain torch.

The plain ones are as good as their scheme can be: pinned memory, one flat copy a block, buffers
that are allocated once, no work for the processor that the scheme does not ask for. Whatever the
scheme, small weights (norms, biases) stay on the device.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import distorch
from distorch.allocation import Allocation
from distorch.integrations.attach import Handle
from distorch.integrations.request import Request
from distorch.machine import Machine, Tier
from distorch.plan.blocks import Block
from distorch.plan.plan import Placement, Plan
from distorch.plan.planner import make_plan
from distorch.plan.rings import usual_ring
from distorch.plan.search import TINY_BYTES
from distorch.tiers import Source, Store
from distorch.tiers.accelerator import AcceleratorTier
from distorch.tiers.disk import DiskTier
from distorch.tiers.host import HostTier
from distorch.tiers.memory import view_bytes
from distorch.tiers.pinned import Pins
from distorch.tiers.sources import MemorySource
from gpu.device import Device, Figures
from gpu.model import Model, Span

_SMALL_BYTES = 16 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A model, a device, and the room for weights there, rings and buffers included."""

    model: Model
    device: Device
    room_bytes: int


@dataclass(slots=True, kw_only=True)
class Running:
    """A module that is ready to run, and what it says of itself."""

    module: Callable[..., Any]
    streamed_bytes: int
    figures: Figures = field(default_factory=dict)
    stats: Callable[[], Figures] = dict
    moved: Callable[[], int] | None = None
    """Bytes moved since the beginning, where that is counted; else each pass moves the same."""


Contender = Callable[[Job], Any]
"""Makes a context manager that yields a `Running`."""


class Lent(HostTier):
    """Blocks that lie in pinned memory already: nothing is allocated or copied to begin."""

    def __init__(self, name: str, model: Model) -> None:
        super().__init__(name)
        self._model = model

    def put(self, block: Block, source: Source) -> None:  # noqa: ARG002  it lies here already
        """Note where a block lies."""
        self._blocks[block.name] = self._model.block_memory[block.name]
        self.nbytes += block.nbytes

    def direct(self, block: Block) -> Tensor | None:
        """Return the block's flat bytes if they are pinned."""
        memory = self._blocks[block.name]
        return memory if self._model.is_pinned else None


@contextmanager
def resident(job: Job) -> Iterator[Running]:
    """All weights on the device: the reference for bits and for C."""
    yield Running(module=job.model.module(job.device.torch), streamed_bytes=0)


def machine_for(job: Job, folder: Path | None = None) -> Machine:
    """This machine, with a device that has room for the job's weights; its disk is a folder's."""
    here, device = Machine.here(folder), job.device
    host = here.tier("cpu")  # the model is in it already
    free_bytes = min(host.capacity_bytes, host.free_bytes + job.model.nbytes)
    tier = Tier(name=device.name, capacity_bytes=device.total_bytes, free_bytes=job.room_bytes)
    return here.replace_tier(replace(host, free_bytes=free_bytes)).replace_tier(tier)


def fitting_plan(
    job: Job,
    *,
    donors: str = "cpu,*",
    ring_bytes: int | None = None,
    folder: Path | None = None,
) -> Plan:
    """The plan that keeps as much on the device as there is room for, beside its ring."""
    machine = machine_for(job, folder)
    visitors = [block for block in job.model.blocks if not block.looked_up]
    ring = usual_ring(visitors, ring_bytes).nbytes
    best: Plan | None = None
    for _ in range(2):  # what does not visit makes the ring smaller than it might have been
        budget = max(0, job.room_bytes - ring)
        line = Allocation.parse(f"{job.device.name},{budget}b;{donors}")
        plan = make_plan(job.model.blocks, line, machine, ring_bytes=ring_bytes)
        held = plan.bytes_by_tier[job.device.name] + plan.ring.nbytes
        if best is None or held <= job.room_bytes:
            best = plan
        ring = plan.ring.nbytes
    assert best is not None, "two were tried"
    return best


def prefix_plan(job: Job, plan: Plan) -> Plan:
    """The same budget and ring, but the blocks that come first are those that stay."""
    budget = plan.bytes_by_tier[job.device.name]
    tiny = {p.block.name for p in plan.placements if p.block.nbytes <= TINY_BYTES}
    left = budget - sum(p.block.nbytes for p in plan.placements if p.block.name in tiny)
    full = False
    placements = []
    for placed in plan.placements:
        block = placed.block
        stays = block.name in tiny
        if not stays and not full and not block.looked_up:
            full = block.nbytes > left
            stays = not full
            left -= 0 if full else block.nbytes
        tier, kind = (job.device.name, "resident") if stays else ("cpu", "streamed")
        placements.append(Placement(block=block, tier=tier, kind=kind))  # type: ignore[arg-type]
    visitors = [p.block for p in placements if p.kind == "streamed" and not p.block.looked_up]
    return replace(plan, placements=tuple(placements), ring=usual_ring(visitors))


@contextmanager
def ours(
    job: Job,
    *,
    ring_share: float = 0.0,
    prefix: bool = False,
    donors: str = "cpu,*",
    folder: Path | None = None,
) -> Iterator[Running]:
    """Our plan and executor, on pinned memory that lies ready.

    ``ring_share`` of the room becomes the ring, where that is more than usual; what does not stay
    rests with ``donors``.
    """
    ring_bytes = None
    if ring_share:
        visitors = [block for block in job.model.blocks if not block.looked_up]
        ring_bytes = max(round(ring_share * job.room_bytes), usual_ring(visitors).nbytes)
    plan = fitting_plan(job, donors=donors, ring_bytes=ring_bytes, folder=folder)
    if prefix:
        plan = prefix_plan(job, plan)
    model = job.model

    def stores(plan: Plan, pins: Pins, _kept: Collection[str]) -> dict[str, Store]:
        here = [placed.block for placed in plan.placements if placed.kind == "resident"]
        found: dict[str, Store] = {
            job.device.name: AcceleratorTier(job.device.name, here, pins),
            "cpu": Lent("cpu", model),
        }
        for name in plan.bytes_by_tier:
            if name.startswith("disk"):
                found[name] = DiskTier(name, folder or Path(tempfile.gettempdir()))
        return found

    module = model.module() if model.stored is None else model.empty()
    source = None
    if model.stored is not None:
        source = MemorySource({name: view_bytes(model.raw(name)) for name in model.spans})
    handle = Handle(module, model.tree(module), source, stores)
    handle.bind(Request(allocation=plan), machine_for(job, folder), None)
    yield _running(module, handle)


@contextmanager
def ours_as_shipped(job: Job) -> Iterator[Running]:
    """`distorch.distribute` as users call it: it allocates and pins memory of its own."""
    budget = fitting_plan(job).bytes_by_tier[job.device.name]
    module = job.model.module()
    line = f"{job.device.name},{budget}b;cpu,*"
    handle = distorch.distribute(module, line, machine=machine_for(job))
    yield _running(module, handle)


def _running(module: nn.Module, handle: Handle) -> Running:
    plan = handle.plan

    def stats() -> Figures:
        found = handle.stats()
        return {
            "steps": found.num_steps,
            "seconds": found.step_seconds,
            "waited_seconds": found.waited_seconds,
            "transfer_seconds": found.transfer_seconds,
            "unplanned": found.num_unplanned,
        }

    figures = {
        "line": plan.allocation,
        "resident_bytes": plan.bytes_by_tier[plan.compute],
        "bytes_by_tier": plan.bytes_by_tier,
        "planned_bytes": plan.streamed_bytes,
        "ring": [plan.ring.num_slots, plan.ring.slot_bytes],
        "blocks_streamed": len(plan.streamed_order),
    }
    return Running(
        module=module,
        streamed_bytes=plan.streamed_bytes,
        figures=figures,
        stats=stats,
        moved=lambda: handle.stats().streamed_bytes,
    )


def _is_small(span: Span) -> bool:
    """Whether a weight stays on the device whatever the scheme: a norm, a bias."""
    return len(span.part.shape) < 2 or span.part.nbytes <= _SMALL_BYTES


class _Weights:
    """Which weights of a module stay on the device, and how the others are pointed at."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.module = job.model.empty()
        self._tree = job.model.tree(self.module)
        self.resident_bytes = 0

    def names_of(self, wanted: Callable[[str], bool]) -> list[str]:
        """Names of large weights, in the model's order."""
        return [
            name
            for name, span in self.job.model.spans.items()
            if not _is_small(span) and wanted(name)
        ]

    def nbytes(self, names: Collection[str]) -> int:
        return sum(self.job.model.spans[name].part.nbytes for name in names)

    def point(self, name: str, tensor: Tensor) -> None:
        for owner, attribute in self._tree.weights[name].users:
            owner._parameters[attribute] = tensor  # type: ignore[assignment]  # may be lazy

    def keep(self, names: Collection[str]) -> None:
        """Bring some weights, and all small ones, to the device for good."""
        model = self.job.model
        for name, span in model.spans.items():
            if name in names or _is_small(span):
                self.point(name, model.weight(name, model.raw(name).to(self.job.device.torch)))
                self.resident_bytes += span.part.nbytes

    def within(self, names: Collection[str], budget: int) -> list[str]:
        """The first of ``names`` that a budget holds."""
        kept = []
        for name in names:
            budget -= self.nbytes([name])
            if budget < 0:
                break
            kept.append(name)
        return kept


@contextmanager
def copy_at_use(job: Job) -> Iterator[Running]:
    """The original's scheme: a layer's weights are copied when it runs, and freed after.

    On the stream that computes, so nothing has to wait for them but the layer itself. What there
    is room for stays on the device.
    """
    weights = _Weights(job)
    model, device = job.model, job.device.torch
    looked_up = {p.tensor for block in model.blocks if block.looked_up for p in block.parts}
    names = sorted(weights.names_of(lambda _: True), key=lambda name: name not in looked_up)
    largest = max(weights.nbytes([name]) for name in names)
    kept = weights.within(names, job.room_bytes - 2 * largest)
    weights.keep(kept)
    nothing = torch.empty(0, device=device)
    modules = dict(weights.module.named_modules())
    streamed = [name for name in names if name not in kept]
    for name in streamed:

        def before(_module: nn.Module, _args: Any, name: str = name) -> None:
            raw = torch.empty_like(model.raw(name), device=device)
            raw.copy_(model.raw(name), non_blocking=True)
            weights.point(name, model.weight(name, raw))

        def after(_module: nn.Module, _args: Any, _output: Any, name: str = name) -> None:
            weights.point(name, nothing)

        owner = modules[name.rpartition(".")[0]]
        owner.register_forward_pre_hook(before)
        owner.register_forward_hook(after)
    yield Running(
        module=weights.module,
        streamed_bytes=weights.nbytes(streamed),
        figures={"resident_bytes": weights.resident_bytes},
    )


@contextmanager
def one_ahead(job: Job, *, prefix: bool = False) -> Iterator[Running]:
    """Group offload's scheme: while a block computes the next one is copied; the host waits.

    With ``prefix`` the first blocks stay, as many as there is room for; without, none does. Two
    buffers take turns, each block is one flat copy, and the last block's turn fetches the first.
    """
    weights = _Weights(job)
    model = job.model
    names = [group for group in model.groups if group]
    size = max(len(model.groups[group]) for group in names)
    outside = weights.names_of(lambda name: not model.group_of(name))
    budget = job.room_bytes - 2 * size - weights.nbytes(outside)
    kept: list[str] = []
    for group in names if prefix else ():
        budget -= len(model.groups[group])
        if budget < 0:
            break
        kept.append(group)
    weights.keep({*outside, *weights.names_of(lambda name: model.group_of(name) in kept)})
    streamed = [group for group in names if group not in kept]
    ahead = _Ahead(weights, streamed, size)
    modules = dict(weights.module.named_modules())
    for number, group in enumerate(streamed):
        modules[group].register_forward_pre_hook(partial(ahead.enter, number))
    yield Running(
        module=weights.module,
        streamed_bytes=sum(len(model.groups[group]) for group in streamed),
        figures={"resident_bytes": weights.resident_bytes},
    )


class _Ahead:
    """Two buffers on the device, and a stream on which blocks come into them in turn."""

    def __init__(self, weights: _Weights, groups: list[str], size: int) -> None:
        self._weights, self._groups = weights, groups
        self._device = weights.job.device
        self._stream = self._device.stream()
        count = 2 if groups else 0
        self._buffers = [
            torch.empty(size, dtype=torch.uint8, device=self._device.torch) for _ in range(count)
        ]
        self._turn = 0
        self._coming: int | None = None
        self._views: dict[tuple[int, int], list[tuple[str, Tensor]]] = {}

    def enter(self, number: int, _module: nn.Module, _args: Any) -> None:
        """Wait for the block that is about to compute, then send for the next."""
        if self._coming != number:
            self._fetch(number)
        self._stream.synchronize()
        for name, tensor in self._of(number, self._turn):
            self._weights.point(name, tensor)
        self._device.current_stream().synchronize()  # the block before is done with its buffer
        self._turn = 1 - self._turn
        self._fetch((number + 1) % len(self._groups))

    def _fetch(self, number: int) -> None:
        memory = self._weights.job.model.groups[self._groups[number]]
        with self._device.on(self._stream):
            self._buffers[self._turn][: len(memory)].copy_(memory, non_blocking=True)
        self._coming = number

    def _of(self, number: int, turn: int) -> list[tuple[str, Tensor]]:
        """The weights of a block as views of a buffer; made once for each of the two."""
        if (number, turn) not in self._views:
            model, group = self._weights.job.model, self._groups[number]
            self._views[number, turn] = [
                (name, model.weight(name, self._buffers[turn][at : at + span.part.nbytes]))
                for name, span in model.spans.items()
                if span.group == group and not _is_small(span)
                for at in (span.offset,)
            ]
        return self._views[number, turn]
