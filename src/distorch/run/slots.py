"""The slots of the ring, on the host or on an accelerator: how they are filled, used and reused.

On the host a reader's thread fills a place in a slot, and that is all. On an accelerator the
thread that computes runs ahead of the device: a place is "filled" when its copy was queued, and
"left" when the compute that reads it was. Events keep the device in order: a copy waits for all
that its slot has held before to have come and to have been read, and compute for the copy.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from distorch.errors import ExecutorError
from distorch.plan.blocks import Block
from distorch.plan.plan import Ring
from distorch.run.schedule import Place
from distorch.tiers import Store
from distorch.tiers.accelerator import reserve
from distorch.tiers.links import Link, open_link
from distorch.tiers.memory import allocate_pages, view_bytes
from distorch.tiers.pinned import Pins
from distorch.tiers.stopwatch import Stopwatch

__all__ = ["DeviceSlots", "HostSlots", "Slots", "open_slots"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Seconds on a device: of whole steps, of waits in them, and of the busiest link's copies."""

    step_seconds: float
    waited_seconds: float
    transfer_seconds: float


class Slots(Protocol):
    """Memory that streamed blocks visit, in equal slots; small ones share a slot."""

    memory: Tensor
    """All of it, flat."""

    together_bytes: int
    """As much `fill` is best given at once, of neighbours in a slot."""

    def renew(self, slot: int) -> None:
        """Say that nobody needs what a slot has held, and other blocks will come."""

    def lies_ready(self, store: Store, block: Block) -> bool:
        """Whether the block can be used where it rests, without a copy."""

    def send(self, store: Store, block: Block, place: Place) -> bool:
        """Queue the copy of a block to a place without waiting; False: a thread must `fill` it."""

    def fill(self, store: Store, wanted: Sequence[tuple[Block, Place]]) -> None:
        """Bring blocks to their places; called from a reader's thread."""

    def approach(self) -> None:
        """Say that compute is about to need a block, and may have to wait for it."""

    def enter(self, place: Place) -> None:
        """Say that what is computed from now on reads the block there."""

    def leave(self, place: Place) -> None:
        """Say that all that reads the block there has been asked for."""

    def begin_step(self) -> None:
        """Say that a forward pass begins."""

    def end_step(self, *, complete: bool) -> None:
        """Say that it has ended."""

    def times(self) -> Times | None:
        """What a device says that its steps took; None: the host's own clock knows."""

    def wait(self) -> None:
        """Wait for what is computed, on every stream, and for what is on its way."""

    def close(self) -> None:
        """Wait, and free the memory."""


def open_slots(ring: Ring, compute: str, pins: Pins) -> Slots:
    """Allocate the slots of a ring on the device that computes.

    Raises:
        AllocationError: the device has no room for them.

    >>> open_slots(Ring(num_slots=2, slot_bytes=4096), "cpu", Pins("cpu")).memory.shape
    torch.Size([8192])
    """
    if compute == "cpu":
        return HostSlots(ring)
    return DeviceSlots(ring, torch.device(compute), pins)


class HostSlots:
    """Slots in host memory."""

    together_bytes = 8 << 20  # small neighbours come in one read, large ones by themselves

    def __init__(self, ring: Ring) -> None:
        self.memory = allocate_pages(ring.nbytes)
        self._bytes = view_bytes(self.memory)

    def renew(self, slot: int) -> None:
        """What was computed on the host is done."""

    def lies_ready(self, store: Store, block: Block) -> bool:
        """Whether the page cache has the block as it is wanted."""
        return store.lies_ready(block)

    def send(self, store: Store, block: Block, place: Place) -> bool:  # noqa: ARG002
        """The host copies with a thread of its own."""
        return False

    def fill(self, store: Store, wanted: Sequence[tuple[Block, Place]]) -> None:
        """Read blocks to their places."""
        store.read(
            [
                (block, self._bytes[place.begin : place.begin + block.slot_bytes])
                for block, place in wanted
            ]
        )

    def approach(self) -> None:
        """Who waits on the host notes it there."""

    def enter(self, place: Place) -> None:
        """What is computed on the host is computed now."""

    def leave(self, place: Place) -> None:
        """What was computed on the host is done."""

    def begin_step(self) -> None:
        """The host's clock runs in the executor."""

    def end_step(self, *, complete: bool) -> None:
        """The host's clock runs in the executor."""

    def times(self) -> None:
        """The host's own clock knows."""

    def wait(self) -> None:
        """What was computed on the host is done."""

    def close(self) -> None:
        """Free the memory."""
        self._bytes = memoryview(b"")
        self.memory = self.memory.new_empty(0)


@dataclass(slots=True)
class _Turn:
    """What a slot has held since it was last renewed, as events.

    Copies into it wait for those of ``before``. ``ready`` tells, by the place, when each copy has
    ended, and ``free`` when the last reader has, which is on the stream ``user``.
    """

    free: torch.Event
    before: tuple[torch.Event, ...]
    ready: dict[int, torch.Event] = field(default_factory=dict)
    user: torch.Stream | None = None

    def next(self, free: torch.Event) -> _Turn:
        """Begin another: after the copies and readers of this one, if it had any."""
        return _Turn(free, (*self.ready.values(), self.free) if self.ready else self.before)


class DeviceSlots:
    """Slots on an accelerator."""

    together_bytes = 0  # each block passes through memory of its own

    def __init__(self, ring: Ring, device: torch.device, pins: Pins) -> None:
        self.memory = reserve(device, ring.nbytes)
        self._ring = ring
        self._device = device
        self._pins = pins
        begin = torch.Event(device=device)  # the memory may be what a kernel has just let go of
        begin.record(self._stream())
        self._turns = [_Turn(torch.Event(device=device), (begin,)) for _ in range(ring.num_slots)]
        self._links: dict[str, Link] = {}
        self._capturing = getattr(
            torch.get_device_module(device), "is_current_stream_capturing", lambda: False
        )
        self._steps, self._waits = Stopwatch(device), Stopwatch(device)
        self._step_began: torch.Event | None = None
        self._approached: torch.Event | None = None
        self._lock = threading.Lock()

    def renew(self, slot: int) -> None:
        """Let the copies that come wait for all that the slot has seen."""
        self._turns[slot] = self._turns[slot].next(torch.Event(device=self._device))

    def lies_ready(self, store: Store, block: Block) -> bool:  # noqa: ARG002
        """Nothing on the host is used where it lies."""
        return False

    def send(self, store: Store, block: Block, place: Place) -> bool:
        """Queue a copy that the device does by itself, on the stream of the donor's link."""
        memory = store.direct(block)
        if memory is None:
            return False
        turn, ready = self._turns[place.slot], torch.Event(device=self._device)
        self._link(store).send(memory, self._at(place, len(memory)), turn.before, ready)
        turn.ready[place.begin] = ready
        return True

    def fill(self, store: Store, wanted: Sequence[tuple[Block, Place]]) -> None:
        """Read blocks into pinned memory, and send them from there."""
        for block, place in wanted:
            turn, ready = self._turns[place.slot], torch.Event(device=self._device)
            target = self._at(place, block.slot_bytes)
            self._link(store).bring(store, block, target, turn.before, ready)
            turn.ready[place.begin] = ready

    def approach(self) -> None:
        """Note when the current stream has done all before, and could go on.

        Raises:
            ExecutorError: a graph is being captured.
        """
        if self._capturing():
            raise ExecutorError(
                "a streamed block cannot be used while a graph is captured: it will lie elsewhere",
                hint="capture modules whose weights rest on the device",
            )
        self._approached = self._waits.begin(self._stream())

    def enter(self, place: Place) -> None:
        """Let the current stream wait until the block has arrived."""
        stream = self._stream()
        stream.wait_event(self._turns[place.slot].ready[place.begin])
        if self._approached is not None:
            self._waits.end(self._approached, stream)
            self._approached = None

    def leave(self, place: Place) -> None:
        """Note where the current stream is: who writes the slot next waits for that."""
        stream, turn = self._stream(), self._turns[place.slot]
        if turn.user is not None and turn.user != stream:
            stream.wait_event(turn.free)  # an event has room for one stream: this one
        turn.free.record(stream)
        turn.user = stream

    def begin_step(self) -> None:
        """Note when the current stream gets to this step."""
        self._step_began = self._steps.begin(self._stream())

    def end_step(self, *, complete: bool) -> None:
        """Note when it is done with it; an interrupted one does not count."""
        if complete and self._step_began is not None:
            self._steps.end(self._step_began, self._stream())
        self._step_began = None

    def times(self) -> Times:
        """Return what the device has passed so far."""
        return Times(
            step_seconds=self._steps.seconds(),
            waited_seconds=self._waits.seconds(),
            transfer_seconds=max((link.seconds() for link in self._open_links()), default=0.0),
        )

    def wait(self) -> None:
        """Wait for the device; one that is gone has nothing to wait for."""
        with suppress(RuntimeError):
            torch.accelerator.synchronize(self._device)
        for link in self._open_links():
            link.wait()

    def close(self) -> None:
        """Wait, and free the memory."""
        self.wait()  # also for streams of the caller's, which read what rests on the device
        for link in self._open_links():
            link.close()
        self._links.clear()
        self.memory = torch.empty(0, dtype=torch.uint8)

    def _at(self, place: Place, nbytes: int) -> Tensor:
        return self.memory[place.begin : place.begin + nbytes]

    def _stream(self) -> torch.Stream:
        return torch.accelerator.current_stream(self._device)

    def _open_links(self) -> list[Link]:
        with self._lock:  # a reader may open another one
            return [*self._links.values()]

    def _link(self, store: Store) -> Link:
        """The way from a donor, opened when it is first used."""
        with self._lock:
            link = self._links.get(store.name)
            if link is None:
                link = open_link(store.name, self._device, self._pins, self._ring.slot_bytes)
                self._links[store.name] = link
            return link
