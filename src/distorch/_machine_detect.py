"""What the operating system and the driver say about this machine, as it is now.

Each fact is read in a small function of its own, which answers "nothing known" where there is
nothing to read. `distorch.machine.Machine.detect` is the public door. It imports no torch, so that
``distorch plan`` answers at once.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil  # type: ignore[import-untyped,unused-ignore]

from distorch._machine_accelerators import Memory, read_accelerators

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["Memory", "read_memories"]


def read_memories(disk: Path | None = None) -> dict[str, Memory]:
    """Read every memory of this machine: accelerators first, then the host, then a disk.

    ``disk`` is any path on the file system meant, by default the temporary directory.

    >>> list(read_memories())[-2:]
    ['cpu', 'disk']
    """
    memories = read_accelerators()
    memories["cpu"] = _within(_host_memory(), _cgroup_limits(Path("/")))
    memories["disk"] = _disk_space(disk or Path(tempfile.gettempdir()))
    return memories


def _host_memory() -> Memory:
    """Read the physical memory, and what is available of it without swapping."""
    memory = psutil.virtual_memory()
    return Memory(int(memory.total), int(memory.available))


def _within(memory: Memory, limits: Iterable[Memory]) -> Memory:
    """Return what is left of ``memory`` inside every one of ``limits``."""
    everything = [memory, *limits]
    capacity_bytes = min(limit.capacity_bytes for limit in everything)
    free_bytes = min(limit.free_bytes for limit in everything)
    return Memory(capacity_bytes, max(0, min(free_bytes, capacity_bytes)))


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


def _cgroup_limits(root: Path) -> list[Memory]:
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
        limits.append(Memory(limit_bytes, limit_bytes - max(0, usage_bytes - cache_bytes)))
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


def _disk_space(path: Path) -> Memory:
    """Read the file system that holds ``path``, which need not exist yet."""
    for folder in (path.absolute(), *path.absolute().parents):
        with contextlib.suppress(OSError):
            usage = shutil.disk_usage(folder)
            return Memory(usage.total, usage.free)
    return Memory(0, 0)
