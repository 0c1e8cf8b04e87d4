"""The accelerators' part of `distorch.probe`: copies over each link, alone and two at once.

torch is asked through `torch.accelerator`; without an accelerator there is nothing to measure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, permutations
from typing import TYPE_CHECKING, Final

from distorch import vgpu
from distorch._machine_accelerators import read_accelerators, virtual
from distorch.machine import Link, Tier

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Copy", "Read", "accelerators", "find_links", "shared_buses", "wait_for"]

_SMALL_BYTES: Final = 4096
_SHARED: Final = 0.85  # two links that reach less of the sum of their speeds share a bus

Read = Callable[[str, float], float]
"""Note what was measured, and its bytes/s, which are returned."""

Timed = Callable[[Callable[[], object]], float]
"""Return the seconds of a job."""


def accelerators() -> list[Tier]:
    """Return the accelerators that torch can use, as the memories that they are.

    >>> [tier.name for tier in accelerators() if tier.name == "cpu"]
    []
    """
    import torch  # noqa: PLC0415  (only a probe needs it)

    if virtual() is not None:
        vgpu.install()
    kind = torch.accelerator.current_accelerator(check_available=True)
    return [
        Tier(name=name, capacity_bytes=memory.capacity_bytes, free_bytes=memory.free_bytes)
        for name, memory in read_accelerators().items()
        if kind is not None and name.startswith(kind.type)
    ]


def wait_for(devices: Iterable[str]) -> None:
    """Wait until accelerators have done what they were given; ``cpu`` has no queue.

    >>> wait_for(["cpu"])
    """
    import torch  # noqa: PLC0415  (only a probe needs it)

    for device in set(devices) - {"cpu"}:
        torch.accelerator.synchronize(device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """Bytes of one device, and the place on another that they are copied to.

    >>> import torch
    >>> ends = {"source_memory": torch.ones(4), "target_memory": torch.zeros(4)}
    >>> Copy(source="cpu", target="cpu", **ends).seconds() > 0
    True
    """

    source: str
    target: str
    source_memory: Tensor
    target_memory: Tensor

    @property
    def name(self) -> str:
        """How tables call this copy."""
        return f"{self.source} -> {self.target}"

    def start(self, times: int = 1) -> None:
        """Queue the copy in streams of its own, so that it waits for no other."""
        import torch  # noqa: PLC0415  (only a probe needs it)

        with ExitStack() as streams:
            for device in {self.source, self.target} - {"cpu"}:
                streams.enter_context(torch.Stream(device=device))
            for _ in range(times):
                self.target_memory.copy_(self.source_memory, non_blocking=True)

    def seconds(self) -> float:
        """Copy once, and wait."""
        began = time.perf_counter()
        self.start()
        wait_for([self.source, self.target])
        return time.perf_counter() - began

    def small(self) -> Copy:
        """Return the copy of the first bytes only."""
        ends = self.source_memory[:_SMALL_BYTES], self.target_memory[:_SMALL_BYTES]
        return replace(self, source_memory=ends[0], target_memory=ends[1])


def find_links(
    devices: Sequence[str], nbytes: int, timed: Timed, read: Read
) -> tuple[tuple[Link, ...], tuple[tuple[str, float], ...]]:
    """Measure the links between the host and devices: each alone, then two that meet at once.

    Returns the links and the buses that some of them share. Pageable copies are read, and shown.
    """
    copies = _copies(devices, nbytes)
    links = []
    for copy in copies:
        speed = read(f"{copy.name}{_pinned(copy)}", nbytes / timed(copy.seconds))
        latency = timed(copy.small().seconds)
        link = Link(
            source=copy.source,
            target=copy.target,
            bytes_per_second=speed,
            latency_seconds=max(0.0, latency - _SMALL_BYTES / speed),
        )
        links.append(link)
    for copy in _pageable(copies):
        read(f"{copy.name}, pageable", nbytes / timed(copy.seconds))
    together = {}
    for first, second in combinations(range(len(links)), 2):
        if _meet(links[first], links[second]):
            pair = [(copies[at], links[at]) for at in (first, second)]
            names = f"{copies[first].name} with {copies[second].name}"
            together[first, second] = read(names, _speed_together(pair, timed))
    return shared_buses(links, together)


def _pinned(copy: Copy) -> str:
    return ", pinned" if "cpu" in {copy.source, copy.target} else ""


def _copies(devices: Sequence[str], nbytes: int) -> list[Copy]:
    """Make the copies between all that there is; they share the places on a device."""
    import torch  # noqa: PLC0415  (only a probe needs it)

    if not devices:
        return []
    empty = partial(torch.empty, nbytes, dtype=torch.uint8)
    pinned = {"pin_memory": True}
    ends = {
        name: tuple(empty(**pinned) if name == "cpu" else empty(device=name) for _ in range(2))
        for name in ("cpu", *devices)
    }
    return [
        Copy(source=a, target=b, source_memory=ends[a][0], target_memory=ends[b][1])
        for a, b in permutations(ends, 2)
    ]


def _pageable(copies: Sequence[Copy]) -> list[Copy]:
    """Return those with the host again, with memory of it that is not pinned."""
    import torch  # noqa: PLC0415  (only a probe needs it)

    found = []
    for copy in copies:
        if copy.source == "cpu":
            found.append(replace(copy, source_memory=torch.ones_like(copy.source_memory)))
        elif copy.target == "cpu":
            found.append(replace(copy, target_memory=torch.ones_like(copy.target_memory)))
    return found


def _meet(first: Link, second: Link) -> bool:
    """Whether two links begin at one memory or end in one: a run may use both at once."""
    return first.source == second.source or first.target == second.target


def _speed_together(pair: Sequence[tuple[Copy, Link]], timed: Timed) -> float:
    """Return the bytes/s of two copies at once; the faster is repeated while the other lasts."""
    slower = min(link.bytes_per_second for _, link in pair)
    counts = [round(2 * link.bytes_per_second / slower) for _, link in pair]

    def job() -> None:
        for (copy, _), count in zip(pair, counts, strict=True):
            copy.start(count)
        wait_for(end for copy, _ in pair for end in (copy.source, copy.target))

    nbytes = sum(
        count * copy.source_memory.numel() for (copy, _), count in zip(pair, counts, strict=True)
    )
    return nbytes / timed(job)


def shared_buses(
    links: Sequence[Link], together: Mapping[tuple[int, int], float]
) -> tuple[tuple[Link, ...], tuple[tuple[str, float], ...]]:
    """Name the bus of links that slow each other down; ``together`` has the bytes/s of pairs.

    A link that shares with two others has one bus with both, of the best speed that a pair of them
    reached.

    >>> ways = [Link(source="cpu", target=f"cuda:{i}", bytes_per_second=25e9) for i in range(3)]
    >>> links, buses = shared_buses(ways, {(0, 1): 26e9, (0, 2): 50e9, (1, 2): 49e9})
    >>> [link.bus for link in links], buses
    (['bus0', 'bus0', ''], (('bus0', 26000000000.0),))
    """
    groups: list[set[int]] = []
    speeds: list[float] = []
    for (first, second), speed in together.items():
        alone = links[first].bytes_per_second + links[second].bytes_per_second
        if speed >= _SHARED * alone:
            continue
        group = {first, second}
        for other in [g for g in groups if g & group]:
            at = groups.index(other)
            groups.pop(at)
            group, speed = group | other, max(speed, speeds.pop(at))  # noqa: PLW2901
        groups.append(group)
        speeds.append(speed)
    names = {at: f"bus{number}" for number, group in enumerate(groups) for at in group}
    named = tuple(replace(link, bus=names.get(at, "")) for at, link in enumerate(links))
    return named, tuple((f"bus{number}", speed) for number, speed in enumerate(speeds))
