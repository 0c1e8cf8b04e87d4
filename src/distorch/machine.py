"""The machine: its memories (tiers), the paths between them (links), and what is free right now.

A `Machine` is a value: the planner, the simulator and the allocation language read it and never
ask the hardware. `Machine.detect` is the one place that does. It imports no torch, so that
``distorch plan`` answers at once, and it reads each fact of the operating system in a small
function of its own, which answers "nothing known" where there is nothing to read.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import re
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil  # type: ignore[import-untyped,unused-ignore]

from distorch.errors import MachineError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = ["Link", "Machine", "Tier"]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A directed path between two tiers. Links that name the same ``bus`` share its speed.

    >>> Link(source="cpu", target="cuda:0", bytes_per_second=25e9, bus="pcie:0").latency_seconds
    0.0
    """

    source: str
    target: str
    bytes_per_second: float
    latency_seconds: float = 0.0
    bus: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The tiers of one machine, those that compute fastest first, and the links between them.

    >>> cpu = Tier(name="cpu", capacity_bytes=64 * 2**30, free_bytes=48 * 2**30)
    >>> Machine(name="laptop", tiers=(cpu,)).tier("cpu").free_bytes // 2**30
    48
    """

    name: str
    tiers: tuple[Tier, ...]
    links: tuple[Link, ...] = ()

    def __post_init__(self) -> None:
        """Refuse two tiers of one name: a name must find exactly one."""
        names = [tier.name for tier in self.tiers]
        if len(set(names)) < len(names):
            problem = f"machine '{self.name}' names a tier twice: {', '.join(names)}"
            raise MachineError(problem, hint="give every tier a name of its own")

    def tier(self, name: str) -> Tier:
        """Return the tier of that name; ``disk:/path`` falls back to ``disk``.

        >>> disk = Tier(name="disk", capacity_bytes=8, free_bytes=4)
        >>> Machine(name="laptop", tiers=(disk,)).tier("disk:/mnt/nvme").name
        'disk'
        """
        by_name = {tier.name: tier for tier in self.tiers}
        found = by_name.get(name)
        if found is None and name.startswith("disk:"):
            found = by_name.get("disk")
        if found is None:
            has = ", ".join(by_name) or "no memory at all"
            problem = f"machine '{self.name}' has no '{name}'"
            raise MachineError(problem, hint=f"a device it has: {has}")
        return found

    def replace_tier(self, tier: Tier) -> Machine:
        """Return this machine with ``tier`` in place of the one of its name, or added last.

        >>> machine = Machine(name="laptop", tiers=())
        >>> machine.replace_tier(Tier(name="disk", capacity_bytes=8, free_bytes=4)).tiers[0].name
        'disk'
        """
        tiers = {old.name: old for old in self.tiers} | {tier.name: tier}
        return replace(self, tiers=tuple(tiers.values()))

    @classmethod
    def detect(cls, disk: Path | None = None) -> Machine:
        """Describe this machine as it is now: NVIDIA cards first, then the host, then a disk.

        ``disk`` is any path on the file system meant, by default the temporary directory.

        >>> [tier.name for tier in Machine.detect().tiers][-2:]
        ['cpu', 'disk']
        """
        memories = {f"cuda:{index}": card for index, card in enumerate(_nvidia_cards())}
        memories["cpu"] = _within(_host_memory(), _cgroup_limits(Path("/")))
        memories["disk"] = _disk_space(disk or Path(tempfile.gettempdir()))
        tiers = (
            Tier(name=name, capacity_bytes=memory.capacity_bytes, free_bytes=memory.free_bytes)
            for name, memory in memories.items()
        )
        return cls(name=platform.node() or "this machine", tiers=tuple(tiers))


class _Memory(NamedTuple):
    """What one reading of one memory says."""

    capacity_bytes: int
    free_bytes: int


def _host_memory() -> _Memory:
    """Read the physical memory, and what is available of it without swapping."""
    memory = psutil.virtual_memory()
    return _Memory(int(memory.total), int(memory.available))


def _within(memory: _Memory, limits: Iterable[_Memory]) -> _Memory:
    """Return what is left of ``memory`` inside every one of ``limits``."""
    everything = [memory, *limits]
    capacity_bytes = min(limit.capacity_bytes for limit in everything)
    free_bytes = min(limit.free_bytes for limit in everything)
    return _Memory(capacity_bytes, max(0, min(free_bytes, capacity_bytes)))


class _CgroupVersion(NamedTuple):
    """Where one version of control groups keeps its numbers."""

    mounts: tuple[str, ...]
    limit: str
    usage: str
    page_cache: tuple[str, ...]


# A hybrid host mounts version 2 beside version 1, under "unified".
_CGROUP_V2 = _CgroupVersion(
    mounts=("sys/fs/cgroup", "sys/fs/cgroup/unified"),
    limit="memory.max",
    usage="memory.current",
    page_cache=("active_file", "inactive_file"),
)
_CGROUP_V1 = _CgroupVersion(
    mounts=("sys/fs/cgroup/memory",),
    limit="memory.limit_in_bytes",
    usage="memory.usage_in_bytes",
    page_cache=("total_active_file", "total_inactive_file"),
)


def _cgroup_limits(root: Path) -> list[_Memory]:
    """Read every memory limit above this process; none where there are no control groups.

    A limit binds everything below it, so the tightest may be that of any ancestor. The page cache
    counts as used although the kernel drops it on demand, so it is added back; "file" in
    memory.stat would count shared memory too, which the kernel cannot drop.
    """
    limits = []
    for version, folder in _cgroup_folders(root):
        limit_bytes = _read_int(folder / version.limit)
        usage_bytes = _read_int(folder / version.usage)
        if limit_bytes is None or usage_bytes is None:
            continue
        stat = _read_counters(folder / "memory.stat")
        cache_bytes = sum(stat.get(key, 0) for key in version.page_cache)
        limits.append(_Memory(limit_bytes, limit_bytes - max(0, usage_bytes - cache_bytes)))
    return limits


def _cgroup_folders(root: Path) -> Iterator[tuple[_CgroupVersion, Path]]:
    """Yield the folder of this process's control group and of all its ancestors.

    A container may see its host's path in /proc while its own group is mounted as the top, so
    folders that do not exist are walked through like any other.
    """
    for line in _read_text(root / "proc/self/cgroup").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0":
            version = _CGROUP_V2
        elif "memory" in controllers.split(","):
            version = _CGROUP_V1
        else:
            continue
        parts = [part for part in path.split("/") if part not in {"", ".", ".."}]
        for mount in version.mounts:
            for depth in range(len(parts), -1, -1):
                yield version, root.joinpath(mount, *parts[:depth])


def _read_text(path: Path) -> str:
    """Read a small file of the kernel; empty where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _read_int(path: Path) -> int | None:
    """Read a number; None where there is none, or where it is the word "max"."""
    text = _read_text(path).strip()
    return int(text) if text.isascii() and text.isdigit() else None


def _read_counters(path: Path) -> dict[str, int]:
    """Read lines of "name number"."""
    pairs = re.findall(r"^(\w+) ([0-9]+)$", _read_text(path), re.MULTILINE)
    return {name: int(number) for name, number in pairs}


def _disk_space(path: Path) -> _Memory:
    """Read the file system that holds ``path``, which need not exist yet."""
    for folder in (path.absolute(), *path.absolute().parents):
        with contextlib.suppress(OSError):
            usage = shutil.disk_usage(folder)
            return _Memory(usage.total, usage.free)
    return _Memory(0, 0)


def _nvidia_cards() -> list[_Memory]:
    """Read the NVIDIA cards in torch's order; none without nvidia-ml-py or a driver."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return []
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return []
    try:
        return _visible_cards(nvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
    except nvml.NVMLError:
        return []
    finally:
        nvml.nvmlShutdown()


def _visible_cards(nvml: Any, visible: str | None) -> list[_Memory]:  # noqa: ANN401
    """Read the cards that CUDA shows this process, in CUDA's order.

    NVML counts every card, while torch's ``cuda:0`` is the first that CUDA_VISIBLE_DEVICES names
    (by index or by the beginning of a UUID); CUDA ignores all from the first name it does not know.
    """
    handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    if visible is not None:
        handles = list(_named_by(visible, handles, [nvml.nvmlDeviceGetUUID(h) for h in handles]))
    readings = [nvml.nvmlDeviceGetMemoryInfo(handle) for handle in handles]
    return [_Memory(int(reading.total), int(reading.free)) for reading in readings]


def _named_by(visible: str, handles: Sequence[Any], uuids: Sequence[str]) -> Iterator[Any]:
    """Yield the handles that a value of CUDA_VISIBLE_DEVICES names, as far as it can be read."""
    for name in (part.strip() for part in visible.split(",")):
        matches = [
            handle
            for index, (handle, uuid) in enumerate(zip(handles, uuids, strict=True))
            if name == str(index) or (name.startswith("GPU-") and uuid.startswith(name))
        ]
        if len(matches) != 1:
            return
        yield matches[0]
