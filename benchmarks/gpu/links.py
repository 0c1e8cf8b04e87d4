"""What the links carry, measured before anything else: host and device both ways, and the disk."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from distorch.tiers.file_reader import FileReader, drop_from_cache
from distorch.tiers.memory import allocate_pages, view_bytes
from distorch.tiers.pinned import Pins
from gpu.arena import Arena, first_line
from gpu.cases import Clock, Speeds
from gpu.device import Device, Figures

_MIB = 1 << 20
_WRITE_BYTES = 8 * _MIB
_THREADS = (1, 2, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is moved to measure a link."""

    copied_bytes: int = 4 << 30
    chunk_mib: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    pageable_bytes: int = 1 << 30
    file_bytes: int = 4 << 30
    matrix: int = 8192
    products: int = 128


TINY = Sizes(
    copied_bytes=16 * _MIB,
    chunk_mib=(1, 4),
    pageable_bytes=4 * _MIB,
    file_bytes=16 * _MIB,
    matrix=64,
    products=4,
)


def measure_links(
    device: Device, arena: Arena, folder: Path | None, sizes: Sizes, clock: Clock
) -> tuple[Figures, Speeds]:
    """Measure every link; one that fails is reported, and counts as unknown."""
    found: Figures = {}
    sizes = replace(sizes, copied_bytes=min(sizes.copied_bytes, arena.most_bytes))

    def note(name: str, job: Callable[[], object]) -> None:
        try:
            found[name] = job()
        except Exception as error:  # noqa: BLE001  one link that cannot be measured stops nothing
            found[name] = {"failed": first_line(error)}
        clock.say(f"  {name}: {_text(found[name])}")
        device.tidy()

    arena.reset()
    note("pinning", lambda: _pinning(device, arena, sizes))
    arena.reset()
    memory = arena.place(sizes.copied_bytes)
    some = torch.randint(256, (16 * _MIB,), dtype=torch.uint8)  # a disk may squeeze zeros
    for piece in memory.split(len(some)):
        piece.copy_(some[: len(piece)])
    note("pinned to device", lambda: _chunks(device, memory, sizes))
    note("beside a matrix product", lambda: _beside(device, memory, sizes))
    note("device to pinned", lambda: _back(device, memory, sizes))
    note("pageable to device", lambda: _pageable(device, sizes))
    if sizes.file_bytes:
        note("disk", lambda: _disk(folder, memory, sizes))
    copied = [found[name] for name in ("pinned to device", "beside a matrix product")]
    link = max((v for f in copied for v in f.values() if isinstance(v, float)), default=0.0)
    from_disk = found.get("disk", {})
    disk = max(from_disk.get(f"read, {n} threads", 0.0) for n in _THREADS)
    write = from_disk.get("written", 0.0)
    return found, Speeds(link=link, disk=disk, disk_write=write)


def _text(figures: Figures) -> str:
    """Speeds in GB/s, the rest as it is."""
    return ", ".join(
        f"{name} {value / 1e9:.2f} GB/s" if isinstance(value, float) and value > 1e5
        else f"{name} {value:.3g}" if isinstance(value, float)
        else f"{name} {value}"
        for name, value in figures.items()
    )  # fmt: skip


def _pinning(device: Device, arena: Arena, sizes: Sizes) -> Figures:
    """How fast pages are touched, by all cores, and then registered; and without touching first."""
    arena.place(sizes.copied_bytes)
    pins = Pins(device.kind)
    began = time.perf_counter()
    memory = pins.allocate(sizes.pageable_bytes)
    seconds = time.perf_counter() - began
    pinned = pins.has(memory)
    pins.free(memory)
    return {
        "how": arena.how,
        "touched": arena.nbytes / max(arena.touch_seconds, 1e-9),
        "registered": arena.nbytes / max(arena.pin_seconds, 1e-9),
        "untouched, by Pins": sizes.pageable_bytes / seconds if pinned else "refused",
    }


def _copies(device: Device, memory: Tensor, chunk_bytes: int, *, back: bool = False) -> float:
    """Bytes per second of copies of a chunk after another, asked for without waiting."""
    there = torch.empty(2 * chunk_bytes, dtype=torch.uint8, device=device.torch).split(chunk_bytes)

    def copy() -> None:
        for number, chunk in enumerate(memory.split(chunk_bytes)):
            place = there[number % 2][: len(chunk)]
            one, other = (chunk, place) if back else (place, chunk)
            one.copy_(other, non_blocking=True)

    device.seconds(copy)  # what is done once
    return len(memory) / min(device.seconds(copy) for _ in range(3))


def _chunks(device: Device, memory: Tensor, sizes: Sizes) -> Figures:
    return {f"{mib} MiB": _copies(device, memory, mib * _MIB) for mib in sizes.chunk_mib}


def _back(device: Device, memory: Tensor, sizes: Sizes) -> Figures:
    chunk = sizes.chunk_mib[-1] * _MIB
    return {f"{sizes.chunk_mib[-1]} MiB": _copies(device, memory, chunk, back=True)}


def _pageable(device: Device, sizes: Sizes) -> Figures:
    memory = torch.ones(sizes.pageable_bytes, dtype=torch.uint8)
    chosen = {min(size, sizes.chunk_mib[-1]) for size in (1, 16, 64)}
    return {f"{mib} MiB": _copies(device, memory, mib * _MIB) for mib in sorted(chosen)}


def _beside(device: Device, memory: Tensor, sizes: Sizes) -> Figures:
    """Copies on a stream of their own while matrices are multiplied; what each costs the other."""
    chunk = min(64, sizes.chunk_mib[-1]) * _MIB
    place = torch.empty(chunk, dtype=torch.uint8, device=device.torch)
    shape = sizes.matrix, sizes.matrix
    a, b = (torch.randn(shape, device=device.torch).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    stream = device.stream()

    def multiply() -> None:
        for _ in range(sizes.products):
            torch.mm(a, b, out=out)

    def copy() -> None:
        with device.on(stream):
            for piece in memory.split(chunk):
                place[: len(piece)].copy_(piece, non_blocking=True)

    device.seconds(multiply)
    alone = min(device.seconds(multiply) for _ in range(3))
    device.synchronize()
    began = time.perf_counter()
    copy()
    multiply()
    stream.synchronize()
    copied = time.perf_counter() - began
    device.synchronize()
    both = time.perf_counter() - began
    return {
        f"{chunk // _MIB} MiB": len(memory) / copied,
        "TFLOP/s alone": 2 * sizes.products * sizes.matrix**3 / alone / 1e12,
        "product, times its own": both / alone if both > copied else 1.0,
        "products outlast copies": both > copied * 1.01,
    }


def _disk(folder: Path | None, memory: Tensor, sizes: Sizes) -> Figures:
    """Write a file and read it past the page cache, with several readers."""
    with tempfile.TemporaryDirectory(prefix="distorch-bench-", dir=folder) as name:
        path = Path(name) / "weights"
        size = min(sizes.file_bytes, len(memory))
        found: Figures = {"folder": str(Path(name).parent), "direct": _is_direct(path)}
        bytes_out = view_bytes(memory[:size])
        began = time.perf_counter()
        with path.open("wb", buffering=0) as file:
            for first in range(0, size, _WRITE_BYTES):
                file.write(bytes_out[first : first + _WRITE_BYTES])
            os.fsync(file.fileno())
        found["written"] = size / (time.perf_counter() - began)
        for count in _THREADS:
            drop_from_cache(path)
            found[f"read, {count} threads"] = _read(path, size, count)
    return found


def _read(path: Path, size: int, count: int) -> float:
    reader = FileReader(path)
    buffers = [allocate_pages(_WRITE_BYTES).zero_() for _ in range(count)]
    firsts = iter(range(0, size - _WRITE_BYTES + 1, _WRITE_BYTES))
    lock, done = threading.Lock(), [0] * count

    def work(number: int) -> None:
        out = view_bytes(buffers[number])
        while True:
            with lock:
                first = next(firsts, None)
            if first is None:
                return
            reader.read([(first, out)])
            done[number] += len(out)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    reader.close()
    return sum(done) / seconds


def _is_direct(path: Path) -> bool:
    """Whether files here can be read past the page cache."""
    path.touch()
    with suppress(OSError, AttributeError):
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
        return True
    return False
