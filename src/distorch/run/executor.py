"""Brings blocks to the compute device just before they are needed.

Two verbs: ``acquire(block) -> Lease`` and ``release(lease)``. The compute thread sleeps only when a
block it needs has not arrived; nothing is allocated after the start.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distorch.plan.plan import Placement, Plan
from distorch.run.readers import Readers
from distorch.run.schedule import Place
from distorch.run.slots import open_slots
from distorch.run.stats import Stats
from distorch.tiers import Lying, Store
from distorch.tiers.accelerator import AcceleratorTier
from distorch.tiers.cached import CachedTier
from distorch.tiers.host import HostTier
from distorch.tiers.memory import allocate_pages, view_bytes
from distorch.tiers.pinned import Pins

__all__ = ["Executor", "Lease"]


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to use a block's bytes until it is released.

    ``offsets`` say where its parts are in ``memory``, from its ``place`` on. A block that visits no
    slot has none, and no ``index``. ``lying`` has its parts where they lie, if they are used there
    rather than in ``memory``; leases with equal ``where`` have the same bytes.
    """

    placement: Placement
    memory: Tensor
    offsets: Sequence[int]
    index: int | None = None
    place: Place | None = None
    lying: Lying = ()

    @property
    def where(self) -> int | None:
        """What tells apart the places that this block's bytes can be in; None: somewhere new."""
        if self.lying:
            return -1
        if self.placement.kind == "resident":
            return -2
        return None if self.place is None else self.place.begin

    def part(self, index: int) -> Tensor:
        """Return one part's bytes, flat uint8, not a copy."""
        if self.lying:
            return torch.frombuffer(self.lying[index], dtype=torch.uint8)
        offset = self.offsets[index] + (0 if self.place is None else self.place.begin)
        return self.memory[offset : offset + self.placement.block.parts[index].nbytes]


class Executor:
    """Serves the blocks of one plan to one compute thread; ``keep_stores`` leaves them open.

    >>> from distorch.plan.blocks import Block, Part
    >>> from distorch.plan.plan import Placement, Ring
    >>> from distorch.tiers.null import NullTier
    >>> parts = [Part(tensor=f"w{i}", dtype="U8", shape=(64,), nbytes=64) for i in range(3)]
    >>> blocks = [Block(name=part.tensor, parts=(part,), module=part.tensor) for part in parts]
    >>> placed = tuple(Placement(block=b, tier="disk", kind="streamed") for b in blocks)
    >>> ring = Ring(num_slots=2, slot_bytes=64)
    >>> plan = Plan(compute="cpu", allocation="cpu,0b;disk,*", placements=placed, ring=ring)
    >>> executor = Executor(plan, {"disk": NullTier("disk"), "cpu": HostTier("cpu")})
    >>> lease = executor.acquire(1)
    >>> executor.release(lease)
    >>> executor.close()
    """

    def __init__(
        self,
        plan: Plan,
        stores: Mapping[str, Store],
        pins: Pins | None = None,
        *,
        keep_stores: bool = False,
    ) -> None:
        self.plan = plan
        self.device = torch.device(plan.compute)
        self._stores = stores
        resident = stores[plan.compute]
        assert isinstance(resident, HostTier | AcceleratorTier | CachedTier), "they are in memory"
        self._resident = resident
        planned_bytes = plan.bytes_by_tier[plan.compute]
        assert self._resident.nbytes <= planned_bytes, "more rests on the device than planned"
        self._slots = open_slots(plan.ring, plan.compute, pins or Pins(self.device.type))
        self._readers = Readers(plan, stores, self._slots, keep_stores=keep_stores)
        self._finalizer = weakref.finalize(self, self._readers.close)
        self._step_began: float | None = None

    @property
    def ring(self) -> Tensor:
        """The memory of all slots, flat."""
        return self._slots.memory

    @property
    def order(self) -> tuple[int, ...]:
        """The blocks that a step brings, as the last one did or, before the first, as planned."""
        return self._readers.order

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that the compute device holds: at rest, and the ring. It never grows."""
        return self._resident.nbytes + self.ring.numel()

    def acquire(self, block: int) -> Lease:
        """Lease a block: at once where it rests or has arrived, else after it has.

        Raises:
            ExecutorError: its bytes cannot be read, the executor is closed, or every slot of the
                ring is leased.
        """
        self._readers.check_open()
        placement = self.plan.placements[block]
        if placement.kind == "resident":
            memory = self._resident.memory(placement.block)
            return Lease(placement, memory, placement.block.offsets)
        if placement.block.looked_up:
            return self._read_once(block)
        self._slots.approach()
        place, lies_ready = self._readers.take(block)
        # A graph that saved this slot's earlier contents must not run backward on other bytes.
        torch.autograd.graph.increment_version(self.ring)
        try:
            self._slots.enter(place)
            store = self._stores[placement.tier]
            offsets = store.offsets(placement.block)
            lying = store.view(placement.block) if lies_ready else ()
        except BaseException as error:
            self._readers.give_back(block)
            raise self._readers.failure(block, error) from error
        return Lease(placement, self.ring, offsets, block, place, lying)

    def release(self, lease: Lease) -> None:
        """Give a lease back: its slot may be written again."""
        if lease.lying:
            self._stores[lease.placement.tier].forget(lease.placement.block)
        if lease.place is not None and lease.index is not None:
            try:
                self._slots.leave(lease.place)
            finally:  # the device may be gone
                self._readers.give_back(lease.index)

    def read(self, block: int) -> Lease:
        """Bring a block into host memory of its own, past the ring and the device that computes.

        Raises:
            ExecutorError: the executor is closed, or the device it rests on is gone.
            StorageError: the block cannot be read.
        """
        self._readers.check_open()
        placement = self.plan.placements[block]
        memory = allocate_pages(placement.block.slot_bytes)
        store = self._stores[placement.tier]
        store.read([(placement.block, view_bytes(memory))])
        return Lease(placement, memory, store.offsets(placement.block))

    def read_rows(self, block: int, rows: list[int], out: Tensor) -> None:
        """Copy single rows of a free block into ``out``, uint8 of ``(len(rows), row_bytes)``.

        Raises:
            ExecutorError: the executor is closed.
            StorageError: the rows cannot be read.
        """
        self._readers.check_open()
        placement = self.plan.placements[block]
        self._stores[placement.tier].read_rows(placement.block, rows, view_bytes(out))

    def begin_step(self) -> None:
        """Say that a forward pass begins."""
        self._step_began = time.perf_counter()
        self._slots.begin_step()
        self._readers.begin_step()

    def end_step(self, *, complete: bool) -> None:
        """Say that it has ended; only a complete one teaches the order."""
        if self._step_began is not None:
            seconds = time.perf_counter() - self._step_began
            self._slots.end_step(complete=complete)
            self._readers.end_step(seconds if complete else None)
        self._step_began = None

    def stats(self) -> Stats:
        """Return the counters so far."""
        return self._readers.stats()

    def wait(self) -> None:
        """Wait until the device has computed what it was asked to, on every stream."""
        self._slots.wait()

    def close(self) -> None:
        """Stop the readers and let go of every slot, and of blocks and files that are not kept."""
        self._finalizer()

    def _read_once(self, block: int) -> Lease:
        """Read a block that no schedule brings into memory of its own."""
        lease = self.read(block)
        self._readers.count_unplanned()
        return replace(lease, memory=lease.memory.to(self.device))
