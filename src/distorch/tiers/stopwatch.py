"""Seconds that a device spends between two points of its streams, read without stopping it."""

from __future__ import annotations

import threading
from collections import deque

import torch

__all__ = ["Stopwatch"]


class Stopwatch:
    """Adds up times between pairs of events; a pair counts once the device has passed it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._pool: list[torch.Event] = []
        self._pending: deque[tuple[torch.Event, torch.Event]] = deque()
        self._seconds = 0.0

    def begin(self, stream: torch.Stream) -> torch.Event:
        """Note where a stream is."""
        with self._lock:
            event = self._pool.pop() if self._pool else self._new()
        event.record(stream)
        return event

    def end(self, began: torch.Event, stream: torch.Stream) -> None:
        """Note where a stream is now, and count the time between."""
        ended = self.begin(stream)
        with self._lock:
            self._pending.append((began, ended))
            self._collect()

    def seconds(self) -> float:
        """Return the sum of all pairs that the device has passed."""
        with self._lock:
            self._collect()
            return self._seconds

    def _collect(self) -> None:
        while self._pending and self._pending[0][1].query():
            began, ended = self._pending.popleft()
            self._seconds += began.elapsed_time(ended) / 1e3
            self._pool += (began, ended)

    def _new(self) -> torch.Event:
        return torch.Event(device=self._device, enable_timing=True)
