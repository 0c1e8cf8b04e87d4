"""What runs a model under a cap: what each is given, what it says of itself; and the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from gpu.device import Device, Figures
from gpu.model import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A model, a device, and the room for weights there, rings and buffers included.

    ``activation_bytes`` is what a pass needs beside the weights; 0: not known.
    """

    model: Model
    device: Device
    room_bytes: int
    activation_bytes: int = 0


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


@contextmanager
def resident(job: Job) -> Iterator[Running]:
    """All weights on the device: the reference for bits and for C."""
    yield Running(module=job.model.module(job.device.torch), streamed_bytes=0)
