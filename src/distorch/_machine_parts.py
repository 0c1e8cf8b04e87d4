"""The parts of a machine: a memory, a path between two, and how fast a device computes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from distorch.errors import MachineError

__all__ = ["Compute", "Link", "Tier", "check_speed", "listed"]

_WIDER = ("BF16", "F16", "F32")  # what stands in for a dtype whose rate is not known


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """One memory of a machine: how much it has, and how much of that is free.

    >>> Tier(name="cuda:0", capacity_bytes=12 * 2**30, free_bytes=11 * 2**30).name
    'cuda:0'
    """

    name: str
    capacity_bytes: int
    free_bytes: int

    def __post_init__(self) -> None:
        """Refuse what no memory can be."""
        if min(self.capacity_bytes, self.free_bytes) < 0:
            problem = f"{self.name} has negative bytes"
            raise MachineError(problem, hint="capacity_bytes and free_bytes are zero or more")

    @property
    def is_disk(self) -> bool:
        """Whether this memory is a file system: it stores weights and cannot compute.

        >>> Tier(name="disk:/mnt/nvme", capacity_bytes=8, free_bytes=4).is_disk
        True
        """
        return self.name.partition(":")[0] == "disk"

    @property
    def usable_bytes(self) -> int:
        """What `auto` uses of the free bytes: all of a disk's, else nine tenths.

        >>> Tier(name="cpu", capacity_bytes=100, free_bytes=50).usable_bytes
        45
        """
        return self.free_bytes if self.is_disk else self.free_bytes * 9 // 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A directed path between two tiers: bytes/s, and the seconds before the first byte.

    Links that name the same ``bus`` share its speed.

    >>> Link(source="cpu", target="cuda:0", bytes_per_second=25e9, bus="pcie:0").latency_seconds
    0.0
    """

    source: str
    target: str
    bytes_per_second: float
    latency_seconds: float = 0.0
    bus: str = ""

    def __post_init__(self) -> None:
        """Refuse what no link can be."""
        name = f"the link {self.source} -> {self.target}"
        check_speed(name, "bytes_per_second", self.bytes_per_second)
        if not 0 <= self.latency_seconds < math.inf:
            problem = f"{name} has latency_seconds {self.latency_seconds!r}"
            raise MachineError(problem, hint="zero or more, and finite: latency_seconds=0.0")
        if self.source == self.target:
            raise MachineError(
                f"{name} leads nowhere", hint="a link has two ends: source='cpu', target='cuda:0'"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """How fast a device computes: sustained FLOP/s by dtype, and its own memory in bytes/s.

    >>> card = Compute(device="cuda:0", flops_per_second={"BF16": 41e12}, bytes_per_second=504e9)
    >>> card.flops("F16")
    41000000000000.0
    """

    device: str
    flops_per_second: Mapping[str, float] = field(hash=False)
    bytes_per_second: float

    def __post_init__(self) -> None:
        """Keep a copy of the rates, and refuse what no device can be."""
        object.__setattr__(self, "flops_per_second", dict(self.flops_per_second))
        check_speed(self.device, "bytes_per_second", self.bytes_per_second)
        for dtype, rate in self.flops_per_second.items():
            check_speed(self.device, f"flops_per_second[{dtype!r}]", rate)

    def flops(self, dtype: str) -> float:
        """Return the FLOP/s of products in ``dtype``: the one multiplied, not the one stored.

        Where its rate is not known, that of BF16, F16 or F32 stands for it, the first known; for
        F32 and F64 nothing does, since all others are faster.

        Raises:
            MachineError: none of them is known.

        >>> card = Compute(device="cpu", flops_per_second={"F32": 1e11}, bytes_per_second=3e10)
        >>> card.flops("F8_E4M3")
        100000000000.0
        """
        known = self.flops_per_second
        for name in (dtype,) if dtype in {"F32", "F64"} else (dtype, *_WIDER):
            if name in known:
                return known[name]
        raise MachineError(
            f"how fast {self.device} multiplies {dtype} is not known, only {listed(known)}",
            hint="distorch probe; or a line in the machine's file: tflops = { F32 = 20.0 }",
        )


def check_speed(name: str, what: str, speed: float) -> None:
    """Refuse a speed that is not a finite number above zero.

    >>> check_speed("cpu -> cuda:0", "bytes_per_second", 24e9)
    """
    if not 0 < speed < math.inf:
        problem = f"{name} has {what} {speed!r}"
        raise MachineError(problem, hint=f"more than zero, and finite: {what} = 25e9")


def listed(names: Iterable[str]) -> str:
    """Write names for a message.

    >>> listed([])
    'none'
    """
    return ", ".join(names) or "none"
