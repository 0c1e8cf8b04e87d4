"""Our plan and executor as contenders: on memory that lies ready, and as users call it."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

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
from gpu.contenders import Job, Running
from gpu.device import Figures
from gpu.model import Model


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


def machine_for(job: Job, folder: Path | None = None) -> Machine:
    """This machine, with a device that has room for the job's weights; its disk is a folder's."""
    here, device = Machine.here(folder), job.device
    host, held = here.tier("cpu"), job.model.nbytes  # the model is in it already
    free_bytes = max(held, min(host.capacity_bytes, host.free_bytes + held))
    host = replace(host, capacity_bytes=max(free_bytes, host.capacity_bytes), free_bytes=free_bytes)
    tier = Tier(name=device.name, capacity_bytes=device.total_bytes, free_bytes=job.room_bytes)
    return here.replace_tier(host).replace_tier(tier)


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
