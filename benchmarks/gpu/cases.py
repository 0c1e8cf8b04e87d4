"""What is to be measured: cases, who runs them, and the time that is left."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from gpu.contenders import Contender
from gpu.shapes import Shape


class Clock:
    """How much of the time that was given is left; every line that is printed says what went by."""

    def __init__(self, minutes: float) -> None:
        self.began = time.perf_counter()
        self._end = self.began + 60 * minutes

    @property
    def passed(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self.began

    @property
    def left(self) -> float:
        """Seconds until the end; never less than nothing."""
        return max(0.0, self._end - time.perf_counter())

    def say(self, text: str) -> None:
        """Print a line at once."""
        print(f"[{self.passed:6.1f} s] {text}", flush=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """What the links carry, in bytes per second, as measured in this run; 0: not known."""

    link: float = 0.0
    disk: float = 0.0
    disk_write: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A contender of a case; with a cap of its own, or what else a table should say of it."""

    name: str
    run: Contender
    cap_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model and who runs it.

    ``cap_bytes`` is all of the device that torch may have; where it is 0, that is what passes need
    and ``room_share`` of the model.
    """

    label: str
    shape: Shape
    form: str = "BF16"
    entries: Sequence[Entry]
    cap_bytes: int = 0
    room_share: float = 0.5
