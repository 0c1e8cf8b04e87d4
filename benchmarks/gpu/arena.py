"""Pinned host memory that is made once and lent to one model after another.

To pin tens of gigabytes takes long, mostly for page faults. So pages are touched first, by all
cores, and what one model has left serves the next.
"""

from __future__ import annotations

import time
from contextlib import suppress

import torch
from torch import Tensor

from distorch.tiers.memory import allocate_pages
from distorch.tiers.pinned import Pins
from gpu.device import Device

_ALIGNMENT_BYTES = 4096


class Arena:
    """Slabs of host memory, pinned where that can be had."""

    def __init__(self, device: Device, most_bytes: int, slab_bytes: int) -> None:
        self.most_bytes, self._slab_bytes = most_bytes, slab_bytes
        self.how = ""
        self._kind = device.kind
        self._pins = Pins(device.kind)
        self._slabs: list[Tensor] = []
        self._registered: list[int] = []
        self._slab, self._used = 0, 0
        self.touch_seconds = 0.0
        self.pin_seconds = 0.0

    @property
    def is_pinned(self) -> bool:
        """Whether all of it is pinned."""
        return self.how != "pageable"

    @property
    def nbytes(self) -> int:
        """Bytes in all slabs."""
        return sum(len(slab) for slab in self._slabs)

    def reset(self) -> None:
        """Lend everything anew."""
        self._slab, self._used = 0, 0

    def place(self, nbytes: int) -> Tensor:
        """Lend ``nbytes`` in one piece.

        Raises:
            MemoryError: that is more than was allowed.
        """
        while True:
            if self._slab == len(self._slabs):
                self._grow(max(nbytes, min(self._slab_bytes, self.most_bytes - self.nbytes)))
            memory = self._slabs[self._slab]
            if self._used + nbytes <= len(memory):
                begin = self._used
                self._used += -(-nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
                return memory[begin : begin + nbytes]
            self._slab, self._used = self._slab + 1, 0

    def close(self) -> None:
        """Let go of all of it."""
        _, unregister = self._pins._registration or (None, None)  # noqa: SLF001  it has no name yet
        for address in self._registered:
            with suppress(RuntimeError):
                if unregister is not None:
                    unregister(address)
        self._slabs, self._registered = [], []
        self.reset()

    def _grow(self, nbytes: int) -> None:
        if self.nbytes + nbytes > self.most_bytes:
            allowed = f"{self.most_bytes / 1e9:.0f} GB of host memory are allowed"
            raise MemoryError(f"{allowed}; --host-gb allows more")
        began = time.perf_counter()
        memory = allocate_pages(nbytes).zero_()  # every page is there, faulted by all threads
        self.touch_seconds += time.perf_counter() - began
        began = time.perf_counter()
        self._slabs.append(self._pinned(memory))
        self.pin_seconds += time.perf_counter() - began

    def _pinned(self, memory: Tensor) -> Tensor:
        """Register memory; else have torch allocate it; else leave it pageable, and say so."""
        registration = self._pins._registration  # noqa: SLF001  it has no name yet
        if registration is not None and self.how in {"", "registered"}:
            try:
                registration[0](memory.data_ptr(), len(memory))
            except RuntimeError as error:
                print(f"  registering failed: {first_line(error)}", flush=True)
            else:
                self._registered.append(memory.data_ptr())
                self.how = "registered"
                return memory
        if self.how != "pageable":
            try:
                pinned = torch.empty(len(memory), dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                print(f"  no pinned memory: {first_line(error)}", flush=True)
            else:
                self.how = "torch's pinned allocator"
                return pinned
        self.how = "pageable"
        return memory


def first_line(error: BaseException) -> str:
    """What went wrong, in a line."""
    text = str(error).strip().partition("\n")[0][:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
