"""What the benchmarks share: medians, turns, the page cache, and memory under a hard cap."""

from __future__ import annotations

import ctypes
import gc
import json
import mmap
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import psutil
import torch

from distorch.integrations.attach import Handle
from distorch.tiers.file_reader import drop_from_cache

T = TypeVar("T")
Figures = dict[str, Any]
"""What a benchmark found, as JSON."""

_CGROUP = Path("/sys/fs/cgroup")
_JOIN = 'echo $$ > "$0" && exec "$@"'  # a shell enters the group, then becomes the command
_STAYS = 0.05  # the share of a file that may stay cached although it was dropped
_POLL_SECONDS = 0.01
_SETTLE_SECONDS = 0.2  # a ring that is still filling, or a disk that is still writing, ends


@dataclass(frozen=True, slots=True)
class Quartiles:
    """The median of some rounds, and the quartiles around it."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Summarise ``values``; a single one is its own quartiles."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper)

    def text(self, digits: int = 2, scale: float = 1) -> str:
        """Write ``median (lower-upper)``."""
        median, lower, upper = (value * scale for value in (self.median, self.lower, self.upper))
        return f"{median:.{digits}f} ({lower:.{digits}f}-{upper:.{digits}f})"

    @property
    def figures(self) -> Figures:
        """As JSON."""
        return {"median": self.median, "quartiles": [self.lower, self.upper]}


def seconds_of(job: Callable[[], object]) -> float:
    """Run ``job`` once, on the clock."""
    began = time.perf_counter()
    job()
    return time.perf_counter() - began


def best_of(times: int, job: Callable[[], object]) -> float:
    """Return the seconds of the fastest of several runs."""
    return min(seconds_of(job) for _ in range(times))


def in_turn(items: Sequence[T], round_number: int) -> list[T]:
    """Return all items, another one first in each round: no one always follows the same one."""
    first = round_number % len(items)
    return [*items[first:], *items[:first]]


def settle() -> None:
    """Let what the last contender began come to its end, off the clock."""
    time.sleep(_SETTLE_SECONDS)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch compute with ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine_line() -> str:
    """Describe the machine in a line."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gib = psutil.virtual_memory().total / (1 << 30)
    cores = len(psutil.Process().cpu_affinity() or []) or psutil.cpu_count()
    return (
        f"{names[0] if names else 'CPU'}, {cores} cores, {gib:.0f} GiB, torch {torch.__version__}"
    )


def walk_seconds(handle: Handle, num_walks: int) -> float:
    """X: the seconds that a step's bytes take to arrive, read as ever but with nobody computing."""
    executor = handle._executor  # noqa: SLF001  users have no reason to walk
    assert executor is not None, "the handle was not removed"
    began = time.perf_counter()
    for _ in range(num_walks):
        for block in executor.order:
            executor.release(executor.acquire(block))
    return (time.perf_counter() - began) / num_walks


def read_through(path: Path) -> None:
    """Bring a file into the page cache."""
    with path.open("rb", buffering=0) as file:
        while file.read(16 << 20):
            pass


def forget(paths: Sequence[Path]) -> None:
    """Drop files from the page cache, and see that they are gone, but for a few pages.

    The system keeps what is mapped or not yet written, so a benchmark that forgot to unmap or to
    sync must not pass for a cold one. Mapping a block maps some pages beside it too: those stay.
    """
    gc.collect()  # a map may wait in a cycle
    for path in paths:
        drop_from_cache(path)
        left, size = cached_bytes(path), path.stat().st_size
        assert left <= _STAYS * size, (
            f"{left} of {size} bytes of {path} stay cached: is another process using it?"
        )


@contextmanager
def read_ahead(path: Path, kib: int) -> Iterator[str]:
    """Let the system read so far ahead on the disk under ``path``; 0 leaves it as it is.

    Mapped files are read by it alone. Yields a line that says what it is. Another process puts it
    back when our end of a pipe closes: so it is put back however we end.
    """
    file = _read_ahead_file(path)
    if file is None:
        yield "the disk's read-ahead is not known"
        return
    own = file.read_text().strip()
    restore = subprocess.Popen(
        ["/bin/sh", "-c", 'read _; echo "$0" > "$1"', own, str(file)],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for us
    )
    try:
        with suppress(OSError):  # only root may
            file.write_text(str(kib or own))
        now = file.read_text().strip()
        failed = "" if now == str(kib or own) else f"; {kib} cannot be set here"
        yield f"read-ahead {now} KiB (the machine's own: {own}{failed})"
    finally:
        restore.communicate()


def _read_ahead_file(path: Path) -> Path | None:
    """Where the system keeps it; a partition has its disk's."""
    device = path.stat().st_dev
    folder = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    files = (at / "queue" / "read_ahead_kb" for at in (folder, folder.parent))
    return next((file for file in files if file.exists()), None)


def write_out(paths: Sequence[Path]) -> None:
    """See files written to disk: only clean pages can be dropped."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def cached_bytes(path: Path) -> int:
    """Count the bytes of a file that the page cache holds."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        num_pages = -(-len(mapped) // mmap.PAGESIZE)
        found = np.zeros(num_pages, np.uint8)
        view = np.frombuffer(mapped, np.uint8)
        address = ctypes.c_void_p(view.ctypes.data)
        size = ctypes.c_size_t(len(mapped))
        failed = ctypes.CDLL(None, use_errno=True).mincore(
            address, size, found.ctypes.data_as(ctypes.c_char_p)
        )
        del view  # or the map could not be closed
    assert not failed, os.strerror(ctypes.get_errno())
    return int((found & 1).sum()) * mmap.PAGESIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryGroups:
    """Where control groups of our own can be made, and what their files are called.

    The two versions of Linux' control groups say the same under different names.
    """

    parent: Path
    limit: str
    peak: str

    @classmethod
    def find(cls) -> tuple[Self | None, str]:
        """Return where groups with a memory limit can be made, or None and the reason."""
        if not hasattr(os, "geteuid") or os.geteuid() != 0:
            return None, "a hard memory cap needs a control group, and that needs root"
        limit_v1 = _CGROUP / "memory" / "memory.limit_in_bytes"
        if limit_v1.exists():
            found = cls(
                parent=_own_folder(),
                limit=limit_v1.name,
                peak="memory.max_usage_in_bytes",
            )
        elif (_CGROUP / "cgroup.controllers").exists():
            found = cls(parent=_CGROUP, limit="memory.max", peak="memory.peak")
            with suppress(OSError):  # on already, or we shall see below
                (_CGROUP / "cgroup.subtree_control").write_text("+memory")
        else:
            return None, f"no control groups are mounted at {_CGROUP}"
        try:
            with found.group() as folder:
                if not (folder / found.limit).exists():
                    return None, f"the groups in {found.parent} have no memory limit"
        except OSError as error:
            return None, f"no control group can be made in {found.parent}: {error.strerror}"
        return found, ""

    @contextmanager
    def group(self) -> Iterator[Path]:
        """Make a group, and remove it after."""
        folder = Path(tempfile.mkdtemp(prefix="distorch-bench-", dir=self.parent))
        try:
            yield folder
        finally:
            folder.rmdir()

    def run(self, command: Sequence[str], cap_bytes: int | None) -> CappedRun:
        """Run a command in a group of its own, entered before it does anything."""
        with self.group() as folder:
            if cap_bytes is not None:
                (folder / self.limit).write_text(str(cap_bytes))
                with suppress(OSError):  # no such file where the system does not count swap
                    (folder / "memory.swap.max").write_text("0")
            found = CappedRun.measured(self.joining(folder, command))
            peak = folder / self.peak
            peak_bytes = int(peak.read_text()) if peak.exists() else found.peak_bytes
            return replace(found, peak_bytes=peak_bytes)

    @staticmethod
    def joining(folder: Path, command: Sequence[str]) -> list[str]:
        """Return a command that enters a group before it does anything else."""
        return ["sh", "-c", _JOIN, str(folder / "cgroup.procs"), *command]


@dataclass(frozen=True, slots=True, kw_only=True)
class CappedRun:
    """What a command printed as its last line, and the memory it took.

    ``peak_bytes`` counts all of the group, its page cache too, or without a group all that the
    process had mapped; ``peak_anonymous_bytes`` what it could not do without.
    """

    figures: Figures | None
    returncode: int
    peak_bytes: int
    peak_anonymous_bytes: int

    @classmethod
    def measured(cls, command: Sequence[str]) -> Self:
        """Run a command and watch the memory of its process."""
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            peaks = _watch(process)
            output = process.communicate()[0]
        finally:
            process.kill()  # after Ctrl-C; its group goes when it is empty
            process.wait()
        return cls(
            figures=json.loads(output.splitlines()[-1]) if process.returncode == 0 else None,
            returncode=process.returncode,
            peak_bytes=peaks["VmRSS"],
            peak_anonymous_bytes=peaks["RssAnon"],
        )


def _own_folder() -> Path:
    """The folder of this process's memory group, version 1: a limit on us binds what we start."""
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        folder = _CGROUP / "memory" / path.lstrip("/")
        if "memory" in controllers.split(",") and folder.exists():
            return folder
    return _CGROUP / "memory"


def _watch(process: subprocess.Popen[str]) -> dict[str, int]:
    """Wait for a process; return the most memory it was seen with: mapped, and anonymous."""
    status = Path(f"/proc/{process.pid}/status")
    peaks = {"VmRSS": 0, "RssAnon": 0}
    while process.poll() is None:
        with suppress(OSError):
            for line in status.read_text(encoding="utf-8").splitlines():
                name, _, value = line.partition(":")
                if name in peaks:
                    peaks[name] = max(peaks[name], int(value.split()[0]) << 10)
        time.sleep(_POLL_SECONDS)
    return peaks
