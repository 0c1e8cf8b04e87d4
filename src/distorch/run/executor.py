"""Brings blocks to the compute device just before they are needed.

Two verbs: ``acquire(block) -> Lease`` and ``release(lease)``. Reader threads follow the schedule
and fill the ring's slots; the compute thread sleeps on a condition only when a block it needs has
not arrived. Nothing is allocated after the start.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distorch.errors import DistorchError, ExecutorError
from distorch.plan.plan import Placement, Plan
from distorch.run.schedule import Fetch, Schedule
from distorch.tiers import Lying, Store
from distorch.tiers.host import HostTier, allocate, view_bytes

__all__ = ["Executor", "Lease", "Stats"]

_NUM_READERS = 2


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to use a block's bytes until it is released.

    ``slot`` is None for a block that visits no slot. ``lying`` has its parts where they lie, if
    they are used there rather than in ``memory``; leases with equal ``where`` have the same bytes.
    """

    placement: Placement
    memory: Tensor
    slot: int | None = None
    lying: Lying = ()

    @property
    def where(self) -> int | None:
        """What tells apart the places that the bytes of this block can be in."""
        return -1 if self.lying else self.slot

    def part(self, index: int) -> Tensor:
        """Return one part's bytes, flat uint8, not a copy."""
        if self.lying:
            return torch.frombuffer(self.lying[index], dtype=torch.uint8)
        block = self.placement.block
        offset = block.offsets[index]
        return self.memory[offset : offset + block.parts[index].nbytes]


@dataclass(slots=True, kw_only=True)
class Stats:
    """What happened so far: bytes, seconds, counts.

    ``transfer_seconds`` is the time in which at least one reader was reading; ``waited_seconds``
    the time compute stood still for it. ``streamed_bytes`` were moved, ``cached_bytes`` used where
    the system's page cache held them. ``num_unplanned`` counts reads that no schedule foresaw.
    """

    num_steps: int = 0
    step_seconds: float = 0.0
    num_visits: int = 0
    num_unplanned: int = 0
    streamed_bytes: int = 0
    cached_bytes: int = 0
    transfer_seconds: float = 0.0
    waited_seconds: float = 0.0

    @property
    def transfer_hidden(self) -> float:
        """The share of the transfer time that compute did not wait for, from 0 to 1."""
        if not self.transfer_seconds:
            return 1.0
        return max(0.0, 1 - self.waited_seconds / self.transfer_seconds)

    @property
    def link_bytes_per_second(self) -> float:
        """Bytes per second while something was being read."""
        return self.streamed_bytes / self.transfer_seconds if self.transfer_seconds else 0.0

    @property
    def efficiency(self) -> float:
        """E: the larger of compute and transfer time, over the time the steps took."""
        if not self.step_seconds:
            return 1.0
        compute = self.step_seconds - self.waited_seconds
        return min(1.0, max(compute, self.transfer_seconds) / self.step_seconds)


@dataclass(slots=True)
class _Core:
    """What the reader threads see. It does not know the executor, so that one can be forgotten."""

    plan: Plan
    stores: Mapping[str, Store]
    schedule: Schedule
    slots: list[memoryview]
    stats: Stats = field(default_factory=Stats)
    changed: threading.Condition = field(default_factory=threading.Condition)
    error: tuple[int, BaseException] | None = None
    closed: bool = False
    fetches: deque[Fetch] = field(default_factory=deque)
    num_reading: int = 0
    reading_since: float = 0.0
    threads: list[threading.Thread] = field(default_factory=list)
    lying: list[bool] = field(default_factory=list)


class Executor:
    """Serves the blocks of one plan to one compute thread.

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

    def __init__(self, plan: Plan, stores: Mapping[str, Store]) -> None:
        self.plan = plan
        self.ring = allocate(plan.ring.nbytes)
        size = plan.ring.slot_bytes
        self._slots = [self.ring[i * size : (i + 1) * size] for i in range(plan.ring.num_slots)]
        self._resident = stores[plan.compute]
        planned = plan.bytes_by_tier[plan.compute]
        assert self._resident.nbytes <= planned, "more rests on the compute device than planned"
        self._core = _Core(
            plan=plan,
            stores=stores,
            schedule=Schedule(order=plan.streamed_order, num_slots=plan.ring.num_slots),
            slots=[view_bytes(slot) for slot in self._slots],
            lying=[False] * plan.ring.num_slots,
        )
        self._finalizer = weakref.finalize(self, _close, self._core)
        self._step_began: float | None = None

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
        placement = self.plan.placements[block]
        if placement.kind == "resident":
            assert isinstance(self._resident, HostTier), "resident blocks rest in host memory"
            return Lease(placement, self._resident.memory(placement.block))
        if placement.block.looked_up:
            return self._read_once(placement)
        core = self._core
        with core.changed:
            slot = core.schedule.acquire(block)
            if slot is None:
                slot = self._wait_for(block)
            core.stats.num_visits += 1
        # A graph that saved this slot's earlier contents must not run backward on other bytes.
        torch.autograd.graph.increment_version(self.ring)
        # Mapping is done by the thread that computes: a reader that works takes a core from it.
        lying = core.stores[placement.tier].view(placement.block) if core.lying[slot] else ()
        return Lease(placement, self._slots[slot], slot, lying)

    def release(self, lease: Lease) -> None:
        """Give a lease back: its slot may be written again."""
        if lease.lying:
            self._core.stores[lease.placement.tier].forget(lease.placement.block)
        if lease.slot is None:
            return
        with self._core.changed:
            self._core.schedule.release(lease.slot)
            _dispatch(self._core)

    def read_rows(self, block: int, rows: list[int], out: Tensor) -> None:
        """Copy single rows of a free block into ``out``, uint8 of shape ``(len(rows), row_bytes)``."""
        placement = self.plan.placements[block]
        store = self._core.stores[placement.tier]
        store.read_rows(placement.block, rows, view_bytes(out))

    def begin_step(self) -> None:
        """Say that a forward pass begins."""
        self._step_began = time.perf_counter()
        with self._core.changed:
            self._core.schedule.begin_step()

    def end_step(self, *, complete: bool) -> None:
        """Say that it has ended; only a complete one teaches the order."""
        if self._step_began is None:
            return
        with self._core.changed:
            self._core.schedule.end_step(complete=complete)
            if complete:
                self._core.stats.num_steps += 1
                self._core.stats.step_seconds += time.perf_counter() - self._step_began
        self._step_began = None

    def stats(self) -> Stats:
        """Return the counters, live."""
        return self._core.stats

    def close(self) -> None:
        """Stop the readers and let go of every block, slot and file."""
        self._finalizer()
        self._slots = []
        self.ring = allocate(0)

    def _wait_for(self, block: int) -> int:
        """Sleep until the block has arrived (the condition is held)."""
        core = self._core
        began = time.perf_counter()
        while True:
            _start_readers(core)
            if core.closed:
                raise ExecutorError("the model is no longer distributed", hint="distribute it again")
            if core.error is not None:
                failed, error = core.error
                core.error = None
                core.changed.notify_all()
                raise _failure(core, failed, error) from error
            slot = core.schedule.acquire(block)
            if slot is None and _dispatch(core):
                slot = core.schedule.acquire(block)
            if slot is not None:
                core.stats.waited_seconds += time.perf_counter() - began
                return slot
            if core.schedule.is_stuck:
                raise ExecutorError(
                    f"all {len(core.slots)} slots of the ring are held at once, and another block "
                    "is needed",
                    hint="a larger ring, or more weights at rest",
                )
            core.changed.wait()

    def _read_once(self, placement: Placement) -> Lease:
        """Read a block that no schedule brings into memory of its own."""
        memory = allocate(placement.block.nbytes)
        store = self._core.stores[placement.tier]
        store.read(placement.block, view_bytes(memory))
        self._core.stats.num_unplanned += 1
        return Lease(placement, memory)


def _failure(core: _Core, block: int, error: BaseException) -> DistorchError:
    name = core.plan.placements[block].block.name
    hint = error.hint if isinstance(error, DistorchError) else ""
    problem = error.problem if isinstance(error, DistorchError) else repr(error)
    return ExecutorError(f"block {name} could not be read: {problem}", hint=hint)


def _start_readers(core: _Core) -> None:
    """Start the reader threads, once, when a block is first waited for (the condition is held)."""
    if core.threads or core.closed:
        return
    for number in range(_NUM_READERS):
        thread = threading.Thread(
            target=_read_blocks, args=(core,), name=f"distorch-reader-{number}", daemon=True
        )
        core.threads.append(thread)
        thread.start()


def _dispatch(core: _Core) -> bool:
    """Do what the schedule wants next (the condition is held); True if a block came at once.

    A block that lies ready needs no reader: to wake one would take a core from the compute.
    """
    came = False
    while core.error is None and (fetch := core.schedule.next_fetch()) is not None:
        placement = core.plan.placements[fetch.block]
        core.lying[fetch.slot] = core.stores[placement.tier].lies_ready(placement.block)
        if core.lying[fetch.slot]:
            core.schedule.arrived(fetch.slot)
            core.stats.cached_bytes += placement.block.nbytes
            came = True
        else:
            core.fetches.append(fetch)
            core.changed.notify()
    return came


def _read_blocks(core: _Core) -> None:
    """A reader's life: take the next fetch, read, say so."""
    while (fetch := _next(core)) is not None:
        placement = core.plan.placements[fetch.block]
        error: BaseException | None = None
        try:
            core.stores[placement.tier].read(placement.block, core.slots[fetch.slot])
        except BaseException as caught:  # noqa: BLE001  it is raised where the block is needed
            error = caught
        _done(core, fetch, placement.block.nbytes, error)


def _next(core: _Core) -> Fetch | None:
    """Sleep until there is something to read; None when the executor has closed."""
    with core.changed:
        core.changed.wait_for(lambda: core.fetches or core.closed)
        if core.closed:
            return None
        if core.num_reading == 0:
            core.reading_since = time.perf_counter()
        core.num_reading += 1
        return core.fetches.popleft()


def _done(core: _Core, fetch: Fetch, nbytes: int, error: BaseException | None) -> None:
    with core.changed:
        core.num_reading -= 1
        if core.num_reading == 0:
            core.stats.transfer_seconds += time.perf_counter() - core.reading_since
        if error is None:
            core.schedule.arrived(fetch.slot)
            core.stats.streamed_bytes += nbytes
        else:
            core.schedule.failed(fetch.slot)
            core.error = (fetch.block, error)
        _dispatch(core)
        core.changed.notify_all()


def _close(core: _Core) -> None:
    """Stop the readers, then close the stores (also run when an executor is forgotten)."""
    with core.changed:
        core.closed = True
        core.changed.notify_all()
    for thread in core.threads:
        if thread is not threading.current_thread():
            thread.join()
    for store in core.stores.values():
        store.close()
    core.slots.clear()
