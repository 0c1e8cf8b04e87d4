"""Reads ranges of a file into given memory without filling the page cache.

What is already in the page cache is served from there. What is not is read past it, by the first
way that this system has:

1. ``RWF_DONTCACHE`` (Linux 6.14): one buffered read that drops the pages it brought.
2. ``O_DIRECT`` through a small page-aligned buffer.
3. A plain read, and ``POSIX_FADV_DONTNEED`` where that exists.

Measured on this project's machine (2026-11, virtual disk, cold, GB/s): DONTCACHE 1.9-2.2, O_DIRECT
1.5-1.7, plain buffered 1.9.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from distorch.errors import StorageError
from distorch.tiers.page_cache import PageCache

__all__ = ["FileReader", "drop_from_cache"]

_RWF_DONTCACHE = 0x80  # include/uapi/linux/fs.h; not yet named in Python's os
_PAGE = mmap.PAGESIZE
_BOUNCE_BYTES = 4 << 20
_GAP_BYTES = 4096  # padding between neighbours that is cheaper to read than to seek over
_MAX_BUFFERS = 512  # of one preadv; POSIX allows 1,024 on Linux
_MAX_CALL_BYTES = 8 << 20  # a reader that is told to stop should not be deep in a long call

Segment = tuple[int, memoryview]


class FileReader:
    """Reads one file from several threads; ``close()`` it.

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
        try:
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            self._row_fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise StorageError(
                f"{path} cannot be opened: {error.strerror}", hint="check the path and its rights"
            ) from error
        _advise(self._row_fd, "POSIX_FADV_RANDOM")
        self._direct_fd = _open_direct(path)
        self.cache = PageCache(path)
        self._local = threading.local()
        self._seek_lock = threading.Lock()
        self._way: Callable[[int, Sequence[memoryview]], int] = (
            self._read_dontcache if hasattr(os, "preadv") else self._read_plain
        )

    def read(self, segments: Sequence[Segment]) -> None:
        """Fill each segment's memory from its offset in the file.

        Raises:
            StorageError: the file ends early or cannot be read.
        """
        for offset, buffers in _runs(segments):
            self._fill(self._way, offset, buffers)

    def read_small(self, offset: int, out: memoryview) -> None:
        """Fill ``out`` from a place nothing else near is wanted from: no read-ahead."""
        self._fill(self._read_row, offset, [out])

    def close(self) -> None:
        """Close the file's handles."""
        for name in ("_fd", "_row_fd", "_direct_fd"):
            fd = getattr(self, name)
            setattr(self, name, -1)
            if fd >= 0:
                os.close(fd)
        self.cache.close()

    def _fill(
        self,
        way: Callable[[int, Sequence[memoryview]], int],
        offset: int,
        buffers: Sequence[memoryview],
    ) -> None:
        """Call ``way`` until the buffers are full; it may read less than asked."""
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
            if way is not self._read_row:
                way = self._way  # it may have learnt that this system lacks the first way

    def _read_dontcache(self, offset: int, buffers: Sequence[memoryview]) -> int:
        try:
            return os.preadv(self._fd, _first_bytes(buffers), offset, _RWF_DONTCACHE)
        except OSError as error:
            if error.errno not in {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}:
                raise
            self._way = self._read_direct if self._direct_fd >= 0 else self._read_and_drop
            return self._way(offset, buffers)

    def _read_direct(self, offset: int, buffers: Sequence[memoryview]) -> int:
        wanted_bytes = sum(map(len, buffers))
        if self.cache.has(offset, wanted_bytes):
            return os.preadv(self._fd, _first_bytes(buffers), offset)
        bounce = self._bounce()
        start = offset // _PAGE * _PAGE
        try:
            wanted = min(wanted_bytes + offset - start, _BOUNCE_BYTES)
            count = os.preadv(self._direct_fd, [bounce[: -(-wanted // _PAGE) * _PAGE]], start)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._way = self._read_and_drop  # a file system that opens, but does not read, direct
            return self._read_and_drop(offset, buffers)
        done = offset - start
        for buffer in buffers:
            part = bounce[done : min(done + len(buffer), count)]
            buffer[: len(part)] = part
            done += len(part)
        return max(0, done - (offset - start))

    def _read_and_drop(self, offset: int, buffers: Sequence[memoryview]) -> int:
        count = self._read_plain(offset, buffers)
        _advise(self._fd, "POSIX_FADV_DONTNEED", offset, count)
        return count

    def _read_plain(self, offset: int, buffers: Sequence[memoryview]) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._fd, _first_bytes(buffers), offset)
        with self._seek_lock:  # a system without positioned reads
            os.lseek(self._fd, offset, os.SEEK_SET)
            data = os.read(self._fd, min(len(buffers[0]), _MAX_CALL_BYTES))
        buffers[0][: len(data)] = data
        return len(data)

    def _read_row(self, offset: int, buffers: Sequence[memoryview]) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._row_fd, buffers, offset)
        return self._read_plain(offset, buffers)

    def _bounce(self) -> memoryview:
        """Return this thread's page-aligned buffer for direct reads."""
        if not hasattr(self._local, "bounce"):
            self._local.bounce = memoryview(mmap.mmap(-1, _BOUNCE_BYTES))
        bounce: memoryview = self._local.bounce
        return bounce


def drop_from_cache(path: Path) -> None:
    """Ask the system to forget what it has cached of a file (for benchmarks; clean pages only)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        _advise(fd, "POSIX_FADV_DONTNEED")
    finally:
        os.close(fd)


def _open_direct(path: Path) -> int:
    flag = getattr(os, "O_DIRECT", None)
    if flag is None:
        return -1
    try:
        return os.open(path, os.O_RDONLY | flag)
    except OSError:
        return -1


def _advise(fd: int, advice: str, offset: int = 0, nbytes: int = 0) -> None:
    """Call ``posix_fadvise`` where there is one."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, nbytes, getattr(os, advice))


def _runs(segments: Sequence[Segment]) -> Iterator[tuple[int, list[memoryview]]]:
    """Join segments that lie side by side in the file, so that each run is one read."""
    junk = memoryview(bytearray(_GAP_BYTES))
    start, end, buffers = 0, -1, []
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
