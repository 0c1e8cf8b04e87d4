"""Reads ranges of a file into given memory without filling the page cache.

Past it with ``O_DIRECT`` where that works; else through it, with the pages dropped afterwards. What
is in the page cache already is copied from there. (``RWF_DONTCACHE`` of Linux 6.14 would do all
three in one call, but with several readers it left most of a file in the cache here; measured on
Linux 6.18, ext4, 2026-11.)
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from distorch.errors import StorageError
from distorch.plan.blocks import SECTOR_BYTES, whole_sectors
from distorch.tiers.page_cache import PageCache

__all__ = ["FileReader", "drop_from_cache"]

_BOUNCE_BYTES = 4 << 20  # one read to be copied; larger ones leave the processor's cache
_GAP_BYTES = 4096  # padding between neighbours that is cheaper to read than to seek over
_MAX_BUFFERS = 512  # of one preadv; POSIX allows 1,024 on Linux
_MAX_CALL_BYTES = 8 << 20  # a reader that is told to stop should not be deep in a long call
_FOLIO_BYTES = 256 << 10  # the system caches in pieces of up to this, and drops whole ones only

Segment = tuple[int, memoryview]


class _Thread(threading.local):
    """Each thread's page-aligned buffer for direct reads, shared by all files it reads."""

    bounce: memoryview | None = None


_thread = _Thread()


class FileReader:
    """Reads one file from several threads; ``close()`` it, or forget it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "weights"
    ...     _ = path.write_bytes(bytes(range(100)))
    ...     reader = FileReader(path)
    ...     out = bytearray(4)
    ...     reader.read([(10, memoryview(out)[:2]), (50, memoryview(out)[2:])])
    ...     reader.close()
    >>> list(out)
    [10, 11, 50, 51]
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        handles: list[int] = []
        self._close_handles = weakref.finalize(self, _close_all, handles)
        try:
            handles.append(os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0)))
            handles.append(os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0)))
        except OSError as error:
            self._close_handles()
            raise StorageError(
                f"{path} cannot be opened: {error.strerror}", hint="check the path and its rights"
            ) from error
        self._fd, self._row_fd = handles
        self.nbytes = os.fstat(self._fd).st_size
        _advise(self._row_fd, "POSIX_FADV_RANDOM")
        self._direct_fd = _open_direct(path)
        if self._direct_fd >= 0:
            handles.append(self._direct_fd)
        self.cache = PageCache(path)
        self._seek_lock = threading.Lock()
        self._is_direct = self._direct_fd >= 0

    def read(self, segments: Sequence[Segment]) -> None:
        """Fill each segment's memory from its offset in the file.

        Raises:
            StorageError: the file ends early or cannot be read.
        """
        for offset, buffers in _runs(segments):
            # A gap in what the system has cached is filled, or it would be read for ever.
            cached = self.cache.has_most(offset, sum(map(len, buffers)))
            self._fill(self._read_plain if cached else self._read_past_cache, offset, buffers)

    def read_small(self, offset: int, out: memoryview) -> None:
        """Fill ``out`` from a place nothing else near is wanted from: no read-ahead."""
        self._fill(self._read_row, offset, [out])

    def close(self) -> None:
        """Close the file's handles."""
        self._close_handles()
        self.cache.close()

    def _fill(
        self,
        way: Callable[[int, Sequence[memoryview]], int],
        offset: int,
        buffers: Sequence[memoryview],
    ) -> None:
        """Read until the buffers are full; one call may read less."""
        left = list(buffers)
        while left:
            try:
                count = way(offset, left)
            except OSError as error:
                raise StorageError(
                    f"{self.path} cannot be read: {error.strerror or error}",
                    hint="check the disk; the file must stay as it was while the model runs",
                ) from error
            if not count:
                raise StorageError(
                    f"{self.path} ends at {offset} bytes, before its weights do",
                    hint="download the file again; it must stay as it was while the model runs",
                )
            offset += count
            left = _after(left, count)

    def _read_past_cache(self, offset: int, buffers: Sequence[memoryview]) -> int:
        return (self._read_direct if self._is_direct else self._read_and_drop)(offset, buffers)

    def _read_direct(self, offset: int, buffers: Sequence[memoryview]) -> int:
        """Read straight into memory that lies as the file's sectors do; any other by a copy."""
        try:
            if size := _sectors(offset, buffers[0]):
                return os.preadv(self._direct_fd, [buffers[0][:size]], offset)
            return self._read_and_copy(offset, buffers)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._is_direct = False  # a file system that opens, but does not read, direct
            return self._read_and_drop(offset, buffers)

    def _read_and_copy(self, offset: int, buffers: Sequence[memoryview]) -> int:
        """Read into the thread's aligned buffer, and copy from there."""
        if _thread.bounce is None:
            _thread.bounce = memoryview(mmap.mmap(-1, _BOUNCE_BYTES))
        bounce = _thread.bounce
        start = offset // SECTOR_BYTES * SECTOR_BYTES
        wanted = min(sum(map(len, buffers)) + offset - start, _BOUNCE_BYTES)
        count = os.preadv(self._direct_fd, [bounce[: whole_sectors(wanted)]], start)
        done = offset - start
        for buffer in buffers:
            size = max(0, min(len(buffer), count - done))
            # numpy lets go of the interpreter while it copies; a slice of a memoryview does not
            np.frombuffer(buffer, np.uint8)[:size] = np.frombuffer(bounce, np.uint8, size, done)
            done += size
        return max(0, done - (offset - start))

    def _read_and_drop(self, offset: int, buffers: Sequence[memoryview]) -> int:
        count = self._read_plain(offset, buffers)
        begin = max(0, offset - _FOLIO_BYTES)
        _advise(self._fd, "POSIX_FADV_DONTNEED", begin, offset + count + _FOLIO_BYTES - begin)
        return count

    def _read_plain(self, offset: int, buffers: Sequence[memoryview]) -> int:
        return self._read_at(self._fd, offset, _first_bytes(buffers))

    def _read_row(self, offset: int, buffers: Sequence[memoryview]) -> int:
        return self._read_at(self._row_fd, offset, buffers)

    def _read_at(self, fd: int, offset: int, buffers: Sequence[memoryview]) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(fd, buffers, offset)
        with self._seek_lock:  # a system without positioned reads
            os.lseek(fd, offset, os.SEEK_SET)
            data = os.read(fd, min(len(buffers[0]), _MAX_CALL_BYTES))
        buffers[0][: len(data)] = data
        return len(data)


def drop_from_cache(path: Path) -> None:
    """Ask the system to forget what it has cached of a file (for benchmarks; clean pages only)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        _advise(fd, "POSIX_FADV_DONTNEED")
    finally:
        os.close(fd)


def _close_all(handles: list[int]) -> None:
    while handles:
        os.close(handles.pop())


def _open_direct(path: Path) -> int:
    flag = getattr(os, "O_DIRECT", None)
    if flag is None or not hasattr(os, "preadv"):
        return -1
    try:
        return os.open(path, os.O_RDONLY | flag)
    except OSError:
        return -1


def _sectors(offset: int, memory: memoryview) -> int:
    """How many bytes a direct read may put into memory at once: whole sectors, or none."""
    address = np.frombuffer(memory, np.uint8).ctypes.data
    if offset % SECTOR_BYTES or address % SECTOR_BYTES:
        return 0
    return min(len(memory), _MAX_CALL_BYTES) // SECTOR_BYTES * SECTOR_BYTES


def _advise(fd: int, advice: str, offset: int = 0, nbytes: int = 0) -> None:
    """Call ``posix_fadvise`` where there is one."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, nbytes, getattr(os, advice))


def _runs(segments: Sequence[Segment]) -> Iterator[tuple[int, list[memoryview]]]:
    """Join segments that lie side by side in the file, so that each run is one read."""
    junk = memoryview(bytearray(_GAP_BYTES))
    start, end = 0, -1
    buffers: list[memoryview] = []
    for offset, memory in sorted(segments, key=lambda segment: segment[0]):
        if not len(memory):
            continue
        gap = offset - end
        if buffers and 0 <= gap <= _GAP_BYTES and len(buffers) < _MAX_BUFFERS - 1:
            buffers += [junk[:gap], memory] if gap else [memory]
        else:
            if buffers:
                yield start, buffers
            start, buffers = offset, [memory]
        end = offset + len(memory)
    if buffers:
        yield start, buffers


def _first_bytes(buffers: Sequence[memoryview]) -> list[memoryview]:
    """As many of the buffers as one call should fill."""
    left, chosen = _MAX_CALL_BYTES, []
    for buffer in buffers:
        if left <= 0:
            break
        chosen.append(buffer[:left])
        left -= len(buffer)
    return chosen


def _after(buffers: list[memoryview], count: int) -> list[memoryview]:
    """The buffers that are left when their first ``count`` bytes are full."""
    for index, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *buffers[index + 1 :]]
        count -= len(buffer)
    return []
