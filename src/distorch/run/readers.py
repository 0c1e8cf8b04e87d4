"""Fills the ring: does what the schedule says, and tells it what has arrived.

What a device can copy by itself is queued there and then. For the rest there are threads, two for
each donor, so that no donor waits for another.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace

from distorch.errors import DistorchError, ExecutorError
from distorch.plan.blocks import Block
from distorch.plan.plan import Plan
from distorch.run.schedule import Fetch, Place, Schedule
from distorch.run.slots import Slots
from distorch.run.stats import Stats
from distorch.tiers import Store

__all__ = ["Readers"]

_NUM_READERS = 2


class Readers:
    """Serves one compute thread from the stores of a plan, through the slots of its ring.

    It does not know the executor, so that one can be forgotten and collected while readers sleep.
    A donor's threads start when it is first read from, and end with `close`.
    """

    def __init__(
        self, plan: Plan, stores: Mapping[str, Store], slots: Slots, *, keep_stores: bool = False
    ) -> None:
        self._plan = plan
        self._stores = stores
        self._to_close = () if keep_stores else tuple(stores.values())
        self._slots = slots
        self._schedule = Schedule.of(plan)
        self._lying: set[int] = set()  # blocks that are used where they lie, not in their place
        self._fetches: dict[str, deque[Fetch]] = {}
        self._errors: dict[int, BaseException] = {}
        self._threads: list[threading.Thread] = []
        self._closed = False
        self._ended_by: threading.Thread | None = None
        self._num_reading = 0
        self._reading_since = 0.0
        self._stats = Stats()
        lock = threading.RLock()  # a collection inside it may close this very object
        self._arrived = threading.Condition(lock)
        self._work = threading.Condition(lock)

    @property
    def order(self) -> tuple[int, ...]:
        """The visits of one step, as last seen."""
        return self._schedule.order

    def stats(self) -> Stats:
        """Return the counters so far."""
        with self._arrived:
            stats = replace(self._stats)
            if self._num_reading:  # two busy readers may never be idle at once
                stats.transfer_seconds += time.perf_counter() - self._reading_since
        times = self._slots.times()
        if times is not None:
            stats.step_seconds = times.step_seconds
            stats.waited_seconds = times.waited_seconds
            stats.transfer_seconds = max(stats.transfer_seconds, times.transfer_seconds)
        return stats

    def take(self, block: int) -> tuple[Place, bool]:
        """Wait for a block and lease it: its place, and whether it lies ready instead of there.

        Raises:
            ExecutorError: it cannot be read, all slots are held, or `close` was called.
        """
        with self._arrived:
            self.check_open()
            self._errors.pop(block, None)  # a prefetch that failed is tried again now
            place = self._schedule.acquire(block)
            if place is None:
                place = self._wait_for(block)
            self._stats.num_visits += 1
            return place, block in self._lying

    def give_back(self, block: int) -> None:
        """End a lease; what the freed slot lets come begins to come."""
        with self._arrived:
            self._schedule.release(block)
            self._dispatch()

    def begin_step(self) -> None:
        """Say that a forward pass begins."""
        with self._arrived:
            self._schedule.begin_step()

    def end_step(self, seconds: float | None) -> None:
        """Say that it has ended, after so many seconds; None for one that was abandoned."""
        with self._arrived:
            self._schedule.end_step(complete=seconds is not None)
            self._dispatch()  # the order may be another now
            if seconds is not None:
                self._stats.num_steps += 1
                self._stats.step_seconds += seconds

    def count_unplanned(self) -> None:
        """Count a read that went past the schedule."""
        self._stats.num_unplanned += 1

    def check_open(self) -> None:
        """Raise ExecutorError after `close`."""
        if self._closed:
            raise ExecutorError("the model is no longer distributed", hint="distribute it again")

    def close(self) -> None:
        """End the threads, then close the stores, unless they are kept."""
        with self._arrived:
            if self._closed:
                return
            self._closed = True
            self._work.notify_all()
            self._arrived.notify_all()
        if threading.current_thread() in self._threads:
            # A reader's garbage collection brought us here: it cannot wait for itself, so it
            # finishes when it has left its loop.
            self._ended_by = threading.current_thread()
        else:
            self._finish()

    def _finish(self) -> None:
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        self._slots.close()
        for store in self._to_close:
            store.close()

    def _wait_for(self, block: int) -> Place:
        """Sleep until the block has arrived (the lock is held)."""
        began = time.perf_counter()
        while True:
            self.check_open()
            error = self._errors.pop(block, None)
            if error is not None:
                raise self.failure(block, error) from error
            self._dispatch()
            place = self._schedule.acquire(block)
            if place is not None:
                self._stats.waited_seconds += time.perf_counter() - began
                return place
            if self._schedule.is_stuck:
                raise ExecutorError(
                    f"all {self._plan.ring.num_slots} slots of the ring are held at once, and "
                    "another block is needed",
                    hint="a larger ring, or more weights at rest",
                )
            if block not in self._errors:
                self._arrived.wait()

    def failure(self, block: int, error: BaseException) -> ExecutorError:
        """Say which block could not be brought, and why."""
        name = self._plan.placements[block].block.name
        problem, hint = repr(error), ""
        if isinstance(error, DistorchError):
            problem, hint = error.problem, error.hint
        return ExecutorError(f"block {name} could not be read: {problem}", hint=hint)

    def _dispatch(self) -> None:
        """Begin what the schedule wants next (the lock is held).

        A block that lies ready needs no reader: to wake one would take a core from the compute.
        """
        while not self._closed and (fetch := self._schedule.next_fetch()) is not None:
            placement = self._plan.placements[fetch.block]
            store = self._stores[placement.tier]
            if fetch.renews:
                self._slots.renew(fetch.place.slot)
            self._lying.discard(fetch.block)
            if self._slots.lies_ready(store, placement.block):
                self._lying.add(fetch.block)
                self._schedule.arrived(fetch.block)
                self._stats.cached_bytes += placement.block.nbytes
            elif self._send(fetch, store, placement.block):
                self._schedule.arrived(fetch.block)
                self._stats.streamed_bytes += placement.block.nbytes

    def _send(self, fetch: Fetch, store: Store, block: Block) -> bool:
        """Let a device bring a block, or a reader; whether it is as good as there (lock held)."""
        try:
            if self._slots.send(store, block, fetch.place):
                return True
        except Exception as error:  # noqa: BLE001  it is raised where the block is needed
            self._schedule.failed(fetch.block)
            self._errors[fetch.block] = error
            return False
        queue = self._queue_of(store)
        (queue.appendleft if fetch.block == self._schedule.urgent else queue.append)(fetch)
        self._work.notify_all()
        return False

    def _queue_of(self, store: Store) -> deque[Fetch]:
        """What is to be read from a store; with the first comes the time to start its threads."""
        queue = self._fetches.get(store.name)
        if queue is None:
            queue = self._fetches[store.name] = deque()
            for number in range(_NUM_READERS):
                name = f"distorch-reader-{store.name}-{number}"
                args = store, queue
                thread = threading.Thread(
                    target=self._read_blocks, args=args, name=name, daemon=True
                )
                thread.start()
                self._threads.append(thread)
        return queue

    def _read_blocks(self, store: Store, queue: deque[Fetch]) -> None:
        """A reader's life: take what is next, read, say so."""
        while fetches := self._next(queue):
            self._done(fetches, self._read(store, fetches))
        if self._ended_by is threading.current_thread():
            self._finish()

    def _next(self, queue: deque[Fetch]) -> list[Fetch]:
        """Sleep until there is something to read, with small neighbours; none when all is over."""
        with self._work:
            self._work.wait_for(lambda: queue or self._closed)
            if self._closed:
                return []
            if self._num_reading == 0:
                self._reading_since = time.perf_counter()
            self._num_reading += 1
            fetches = [queue.popleft()]
            left_bytes = self._slots.together_bytes - self._block(fetches[0]).nbytes
            while queue and queue[0].place.slot == fetches[0].place.slot:
                left_bytes -= self._block(queue[0]).nbytes
                if left_bytes < 0:
                    break
                fetches.append(queue.popleft())
            return fetches

    def _read(self, store: Store, fetches: Sequence[Fetch]) -> dict[int, BaseException]:
        """Bring blocks to their places; return what keeps some from coming."""
        try:
            self._slots.fill(store, [(self._block(fetch), fetch.place) for fetch in fetches])
        except BaseException as error:  # noqa: BLE001  it is raised where the block is needed
            if len(fetches) == 1:
                return {fetches[0].block: error}
            errors = [self._read(store, [fetch]) for fetch in fetches]  # each for itself
            return {block: error for found in errors for block, error in found.items()}
        return {}

    def _done(self, fetches: Sequence[Fetch], errors: Mapping[int, BaseException]) -> None:
        with self._arrived:
            self._num_reading -= 1
            if self._num_reading == 0:
                self._stats.transfer_seconds += time.perf_counter() - self._reading_since
            for fetch in fetches:
                if fetch.block in errors:
                    self._schedule.failed(fetch.block)
                    self._errors[fetch.block] = errors[fetch.block]
                else:
                    self._schedule.arrived(fetch.block)
                    self._stats.streamed_bytes += self._block(fetch).nbytes
            self._dispatch()
            self._arrived.notify_all()

    def _block(self, fetch: Fetch) -> Block:
        return self._plan.placements[fetch.block].block
