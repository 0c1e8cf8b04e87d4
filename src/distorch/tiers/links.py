"""How a block crosses from where it rests to a slot on an accelerator.

A link has a stream of its own on the device that computes, on which its blocks arrive one after
another. What a device can copy by itself is only asked for: no thread waits. What it cannot is
read into pinned memory by a reader's thread, and goes on from there.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from distorch.plan.blocks import Block
from distorch.tiers import Store
from distorch.tiers.memory import view_bytes
from distorch.tiers.pinned import Pins
from distorch.tiers.stopwatch import Stopwatch

__all__ = ["Link", "can_reach", "open_link"]

_NUM_STAGED = 3  # one for each of two readers, and one that is still being copied from
_NUM_RELAYED = 2  # one is filled while the other is emptied
_RELAYED_BYTES = 8 << 20  # large enough for full speed, small enough to overlap


def open_link(source: str, device: torch.device, pins: Pins, slot_bytes: int) -> Link:
    """Return the way from the tier ``source`` to ``device``, for blocks of ``slot_bytes`` at most.

    Between devices that cannot reach each other it leads through the host.
    """
    if source.split(":", maxsplit=1)[0] in {"cpu", "disk"}:
        return Link(device, pins, slot_bytes)
    donor = torch.device(source)
    if can_reach(device, donor):
        return _PeerLink(device, pins, slot_bytes, donor)
    return _RelayedLink(device, pins, slot_bytes, donor)


def can_reach(target: torch.device, source: torch.device) -> bool:
    """Whether ``target`` copies from ``source`` without the host between."""
    ask = getattr(torch.get_device_module(target), "can_device_access_peer", None)
    return ask is None or bool(ask(target.index, source.index))


@dataclass(slots=True)
class _Staged:
    """Pinned memory on the way, and when the copy from it has ended."""

    memory: Tensor
    drained: torch.Event


class Link:
    """The way from host memory, pinned or not, and from disk."""

    def __init__(self, device: torch.device, pins: Pins, slot_bytes: int) -> None:
        self.stream = torch.Stream(device=device)
        self._device = device
        self._pins = pins
        self._slot_bytes = slot_bytes
        self._watch = Stopwatch(device)
        self._staged: list[_Staged] = []
        self._num_staged = 0
        self._lock = threading.Lock()

    def send(
        self, memory: Tensor, slot: Tensor, after: Sequence[torch.Event], ready: torch.Event
    ) -> None:
        """Queue the copy of ``memory`` into ``slot``: after some events, and then comes another."""
        for event in after:
            self.stream.wait_event(event)
        began = self._watch.begin(self.stream)
        self._copy(memory, slot)
        self._watch.end(began, self.stream)
        ready.record(self.stream)

    def bring(
        self,
        store: Store,
        block: Block,
        slot: Tensor,
        after: Sequence[torch.Event],
        ready: torch.Event,
    ) -> None:
        """Read a block on this thread, then send it; returns before it has arrived."""
        staged = self._borrow()
        try:
            staged.drained.synchronize()
            size = min(block.slot_bytes, len(slot))
            store.read([(block, view_bytes(staged.memory)[:size])])
            self.send(staged.memory[:size], slot[:size], after, ready)
            staged.drained.record(self.stream)
        finally:
            with self._lock:
                self._staged.append(staged)

    def seconds(self) -> float:
        """Return the seconds that the copies which have ended took."""
        return self._watch.seconds()

    def wait(self) -> None:
        """Wait for what is on its way, whatever has failed on another."""
        with suppress(RuntimeError):
            self.stream.synchronize()

    def close(self) -> None:
        """Free what blocks pass through, of which nothing is on its way any more."""
        self._free([staged.memory for staged in self._staged])
        self._staged.clear()

    def _copy(self, memory: Tensor, slot: Tensor) -> None:
        with self.stream:
            slot.copy_(memory, non_blocking=True)

    def _free(self, buffers: Sequence[Tensor]) -> None:
        for memory in buffers:
            self._pins.free(memory)

    def _borrow(self) -> _Staged:
        """Take staging memory; the oldest is the likeliest to be copied from no more."""
        with self._lock:
            fresh = self._num_staged < _NUM_STAGED
            self._num_staged += fresh
            staged = None if fresh else self._staged.pop(0)
        if staged is None:
            memory = self._pins.allocate(self._slot_bytes)
            return _Staged(memory, torch.Event(device=self._device))
        return staged


class _PeerLink(Link):
    """The way from another device that this one can reach."""

    def __init__(
        self, device: torch.device, pins: Pins, slot_bytes: int, donor: torch.device
    ) -> None:
        super().__init__(device, pins, slot_bytes)
        self._source = torch.Stream(device=donor)

    def _copy(self, memory: Tensor, slot: Tensor) -> None:
        # Such a copy runs on the donor's current stream, and meets the device's before and after.
        with self._source, self.stream:
            slot.copy_(memory, non_blocking=True)

    def wait(self) -> None:
        super().wait()
        with suppress(RuntimeError):  # it may be in the midst of a copy to a device that is gone
            self._source.synchronize()


class _RelayedLink(_PeerLink):
    """The way from a device that this one cannot reach: through two buffers in host memory."""

    def __init__(
        self, device: torch.device, pins: Pins, slot_bytes: int, donor: torch.device
    ) -> None:
        super().__init__(device, pins, slot_bytes, donor)
        size = min(slot_bytes, _RELAYED_BYTES)
        self._buffers = [
            (_Staged(pins.allocate(size), torch.Event(device=device)), torch.Event(device=donor))
            for _ in range(_NUM_RELAYED)
        ]

    def _copy(self, memory: Tensor, slot: Tensor) -> None:
        pieces = zip(memory.split(_RELAYED_BYTES), slot.split(_RELAYED_BYTES), strict=True)
        for piece, place in pieces:
            staged, filled = self._buffers[0]
            self._buffers.reverse()
            passing = staged.memory[: len(piece)]
            self._source.wait_event(staged.drained)
            with self._source:
                passing.copy_(piece, non_blocking=True)
            filled.record(self._source)
            self.stream.wait_event(filled)
            with self.stream:
                place.copy_(passing, non_blocking=True)
            staged.drained.record(self.stream)

    def close(self) -> None:
        super().close()
        self._free([staged.memory for staged, _ in self._buffers])
        self._buffers.clear()
