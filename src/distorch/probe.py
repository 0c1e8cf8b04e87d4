"""Measures this machine: its disk, its memory, how fast devices compute, and the links between.

A speed here is the median of some repetitions, after one that is not counted, and of the ways that
a model's run takes: two threads past the page cache from the disk, pinned copies to accelerators.
Other ways are measured too, to be shown beside them.
"""

from __future__ import annotations

import mmap
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from platformdirs import user_cache_path

from distorch._probe_accelerators import Read, accelerators, find_links, wait_for
from distorch.errors import StorageError
from distorch.machine import Compute, Link, Machine, Tier
from distorch.tiers.file_reader import FileReader, drop_from_cache

__all__ = ["FULL", "QUICK", "Effort", "Probed", "Reading", "probe"]

_MIB: Final = 1 << 20
_PIECE_BYTES: Final = 16 * _MIB
_NUM_READERS: Final = 2  # as many as a model's run has
_NUM_SMALL: Final = 32
_SMALL_BYTES: Final = 4096
_MIN_TIMES: Final = 3
_PATIENCE_SECONDS: Final = 5.0  # with a slow disk, one repetition has to do

Progress = Callable[[str, int, int], None]
"""What is being done, and how many bytes of how many; of 0 where that is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is moved and multiplied: bytes of the file and of a copy, the shape of a product.

    A measurement is repeated for ``seconds`` at least.

    >>> QUICK.file_bytes < FULL.file_bytes
    True
    """

    file_bytes: int
    copy_bytes: int
    rows: int
    width: int
    seconds: float


FULL: Final = Effort(
    file_bytes=512 * _MIB, copy_bytes=256 * _MIB, rows=512, width=4096, seconds=0.5
)
QUICK: Final = Effort(
    file_bytes=128 * _MIB, copy_bytes=64 * _MIB, rows=256, width=2048, seconds=0.1
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One thing that was measured: so much of a unit (``B``, ``FLOP``) per second.

    >>> Reading(what="disk, past the page cache", per_second=2.5e9, unit="B").unit
    'B'
    """

    what: str
    per_second: float
    unit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """A machine with its speeds, and all that was measured."""

    machine: Machine
    readings: tuple[Reading, ...]


def _silent(what: str, done_bytes: int, total_bytes: int) -> None:
    del what, done_bytes, total_bytes


def probe(
    disk: Path | None = None, *, effort: Effort = FULL, progress: Progress = _silent
) -> Probed:
    """Measure this machine, and the disk that holds the folder ``disk``.

    A file of ``effort.file_bytes`` is written there and removed. By default the folder is that of
    the user's cache.

    Raises:
        StorageError: the folder is not there, or has no room.

    >>> tiny = Effort(file_bytes=2**20, copy_bytes=2**20, rows=8, width=64, seconds=0)
    >>> probe(effort=tiny).machine.link("disk", "cpu").bytes_per_second > 0
    True
    """
    folder = _folder(disk)
    readings: list[Reading] = []

    def read(what: str, bytes_per_second: float) -> float:
        readings.append(Reading(what=what, per_second=bytes_per_second, unit="B"))
        return bytes_per_second

    with _file(folder, effort.file_bytes, progress) as path:
        progress("reading it back", 0, 0)
        from_disk = _disk_link(path, effort, read)
    progress("copying in memory", 0, 0)
    read("cpu, copied in memory", _host_copy_speed(effort))
    cards = accelerators()
    computes = []
    for device in ("cpu", *(card.name for card in cards)):
        progress(f"computing on {device}", 0, 0)
        computes.append(_compute(device, effort))
        readings += _rates(computes[-1])
    progress("copying between devices", 0, 0)
    timed = partial(median_seconds, at_least=effort.seconds)
    links, buses = find_links([card.name for card in cards], effort.copy_bytes, timed, read)
    machine = replace(
        _with_cards(Machine.detect(folder), cards),
        links=(from_disk, *links),
        computes=tuple(computes),
        buses=buses,
    )
    return Probed(machine=machine, readings=tuple(readings))


def _rates(compute: Compute) -> list[Reading]:
    one_row = f"{compute.device}, weights multiplied with one row"
    return [
        Reading(what=one_row, per_second=compute.bytes_per_second, unit="B"),
        *(
            Reading(what=f"{compute.device}, product in {dtype}", per_second=rate, unit="FLOP")
            for dtype, rate in compute.flops_per_second.items()
        ),
    ]


def _with_cards(machine: Machine, cards: Sequence[Tier]) -> Machine:
    """Add the cards that torch sees and the driver's library, which may be missing, does not."""
    known = {tier.name for tier in machine.tiers}
    return replace(machine, tiers=(*(x for x in cards if x.name not in known), *machine.tiers))


def median_seconds(
    job: Callable[[], object],
    *,
    before: Callable[[], object] | None = None,
    at_least: float = 0.0,
) -> float:
    """Return the median seconds of a job, each after ``before``; the first is not counted.

    >>> 0.001 < median_seconds(lambda: time.sleep(0.002)) < 0.1
    True
    """
    times: list[float] = []
    while len(times) <= _MIN_TIMES or sum(times) < at_least:
        if before is not None:
            before()
        began = time.perf_counter()
        job()
        times.append(time.perf_counter() - began)
        if len(times) > 1 and sum(times) > max(at_least, _PATIENCE_SECONDS):
            break
    return statistics.median(times[1:])


def _folder(disk: Path | None) -> Path:
    """Return the folder to write to, which is made if it is our own."""
    folder = disk if disk is not None else user_cache_path("distorch")
    try:
        if disk is None:
            folder.mkdir(parents=True, exist_ok=True)
        if folder.is_dir():
            return folder
    except OSError as error:
        raise _no_file(folder, error.strerror or str(error)) from error
    raise _no_file(folder, "it is not a folder")


def _no_file(folder: Path, found: str) -> StorageError:
    return StorageError(
        f"a file to measure the disk cannot be written to {folder}: {found}",
        hint="a folder with room, on the disk that holds your models: distorch probe --disk FOLDER",
    )


@contextmanager
def _file(folder: Path, nbytes: int, progress: Progress) -> Iterator[Path]:
    """Write a file of random bytes, which cannot be compressed, and remove it afterwards."""
    generator = np.random.default_rng(0)
    try:
        free_bytes = shutil.disk_usage(folder).free
        if free_bytes < nbytes:
            found = f"it takes {nbytes / 2**30:.2f} GiB, and {free_bytes / 2**30:.2f} GiB are free"
            raise _no_file(folder, found)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".distorch-probe-") as file:
            for done_bytes in range(0, nbytes, _PIECE_BYTES):
                file.write(generator.bytes(min(_PIECE_BYTES, nbytes - done_bytes)))
                progress("writing a file to the disk", done_bytes, nbytes)
            file.flush()
            os.fsync(file.fileno())
            yield Path(file.name)
    except StorageError:
        raise
    except OSError as error:
        raise _no_file(folder, error.strerror or str(error)) from error


def _disk_link(path: Path, effort: Effort, read: Read) -> Link:
    """Measure the disk under a file: past the page cache, and through it, cold and warm."""
    nbytes = path.stat().st_size
    timed = partial(median_seconds, at_least=effort.seconds)
    drop = partial(drop_from_cache, path)
    reader = FileReader(path)
    try:
        drop()
        past = nbytes / timed(partial(_read_past_cache, reader, nbytes), before=drop)
        offsets = random.Random(0).choices(range(0, nbytes, _SMALL_BYTES), k=_NUM_SMALL)  # noqa: S311
        drop()
        latency = statistics.median(_small_read_seconds(reader, offset) for offset in offsets)
    finally:
        reader.close()
    cold = nbytes / timed(partial(_read_plainly, path), before=drop)
    warm = nbytes / timed(partial(_read_plainly, path))
    read("disk -> cpu, past the page cache", past)
    read("disk -> cpu, through the page cache", cold)
    read("disk -> cpu, from the page cache", warm)
    return Link(source="disk", target="cpu", bytes_per_second=past, latency_seconds=latency)


def _read_past_cache(reader: FileReader, nbytes: int) -> None:
    """Read a whole file as a model's run does: some threads, piece by piece into the same place."""

    def read_every(first: int) -> None:
        memory = memoryview(mmap.mmap(-1, _PIECE_BYTES))  # begins with a page, as direct reads want
        for offset in range(first * _PIECE_BYTES, nbytes, _NUM_READERS * _PIECE_BYTES):
            reader.read([(offset, memory[: min(_PIECE_BYTES, nbytes - offset)])])

    with ThreadPoolExecutor(_NUM_READERS) as threads:
        list(threads.map(read_every, range(_NUM_READERS)))


def _read_plainly(path: Path) -> None:
    memory = bytearray(_PIECE_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(memory):
            pass


def _small_read_seconds(reader: FileReader, offset: int) -> float:
    memory = memoryview(bytearray(_SMALL_BYTES))
    began = time.perf_counter()
    reader.read_small(offset, memory)
    return time.perf_counter() - began


def _host_copy_speed(effort: Effort) -> float:
    source = np.ones(effort.copy_bytes, np.uint8)
    target = np.zeros_like(source)
    return effort.copy_bytes / median_seconds(
        partial(np.copyto, target, source), at_least=effort.seconds
    )


def _compute(device: str, effort: Effort) -> Compute:
    """Measure products of many rows, which compute, and of one row, which read the weights."""
    import torch  # noqa: PLC0415  (only a probe needs it)

    scale = 1 if device == "cpu" else 8  # small products do not fill an accelerator

    def seconds(rows: int, height: int, width: int, dtype: torch.dtype) -> float:
        weight = torch.rand(height, width, dtype=dtype, device=device)
        inputs = torch.rand(rows, width, dtype=dtype, device=device)

        def multiply() -> None:
            for _ in range(scale):
                torch.nn.functional.linear(inputs, weight)
            wait_for([device])

        return median_seconds(multiply, at_least=effort.seconds) / scale

    width, rows = effort.width, effort.rows * scale
    flops = 2 * rows * width * width
    dtypes = {"BF16": torch.bfloat16, "F32": torch.float32}
    height = max(1, effort.copy_bytes // (4 * width))
    return Compute(
        device=device,
        flops_per_second={
            name: flops / seconds(rows, width, width, dtype) for name, dtype in dtypes.items()
        },
        bytes_per_second=4 * height * width / seconds(1, height, width, torch.float32),
    )
