"""Uses the bytes of a file where they lie when the system holds them in its page cache already.

Copying them would take a core from the compute. A range that is cached is mapped, given out, and
unmapped soon after it is released, with its neighbours: the pages stay the system's own, to keep or
to drop, and the process has those of the blocks in use, and 8 MiB or a block more. A page that is
dropped meanwhile is read again by the system: slower, never wrong.

``mincore`` tells what is cached. ``RWF_NOWAIT`` would too, but a read that it refuses starts the
kernel's read-ahead all the same (measured, Linux 6.18, ext4: 8 MiB refused, 8 MiB in the cache).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["PageCache"]

_PAGE = mmap.PAGESIZE
_PROBE_BYTES = 1 << 20
_BATCH_BYTES = 8 << 20  # unmapped at once: each time, every core that computes is interrupted
_MADV_POPULATE_READ = 22  # Linux 5.14; not named in Python's mmap
_MAP_NORESERVE = 0x4000  # Linux; not named in Python's mmap before 3.13


class PageCache:
    """The cached parts of one file. Where the system does not tell what is cached, nothing is.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "weights"
    ...     _ = path.write_bytes(bytes(range(100)))
    ...     cache = PageCache(path)
    ...     not cache.has(10, 3) or cache.view(10, 3).tolist() == [10, 11, 12]
    True
    """

    def __init__(self, path: Path) -> None:
        self._map: mmap.mmap | None = None
        self._bytes = memoryview(b"")
        self._address = 0
        self._unused = (0, 0)
        if not _tells(path):
            return
        with suppress(OSError, ValueError), path.open("rb") as file:  # empty, or no address space
            # Private and writable: torch has no read-only tensors, and a write that a user makes to
            # a weight stays in this process. Without reserve, its size is not held against us.
            self._map = mmap.mmap(
                file.fileno(),
                0,
                flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
            self._address = np.frombuffer(self._map, np.uint8).ctypes.data
            self._bytes = memoryview(self._map)

    def has(self, offset: int, nbytes: int) -> bool:
        """Ask whether the system holds a range now: its last page, and one in every MiB.

        To ask for all pages takes longer than to use them. One that is missing all the same is
        read when it is touched.
        """
        return all(map(self._has_page, self._probes(offset, nbytes)))

    def has_most(self, offset: int, nbytes: int) -> bool:
        """Ask whether it holds more than half of the pages that `has` asks for."""
        found = [self._has_page(place) for place in self._probes(offset, nbytes)]
        return 2 * sum(found) > len(found)

    def _probes(self, offset: int, nbytes: int) -> Sequence[int]:
        """The places to ask at; -1, which nothing holds, for a range that is not in the file."""
        end = offset + nbytes
        if self._map is None or not nbytes or end > len(self._bytes):
            return (-1,)
        return (end - 1, *range(offset, end, _PROBE_BYTES))

    def _has_page(self, offset: int) -> bool:
        if offset < 0:
            return False
        found, page = ctypes.c_ubyte(), offset // _PAGE * _PAGE
        return not _mincore()(self._address + page, 1, ctypes.byref(found)) and found.value == 1

    def populate(self, offset: int, nbytes: int) -> None:
        """Map a range at once, rather than page by page when it is touched."""
        if self._map is not None:
            start = offset // _PAGE * _PAGE
            with suppress(OSError):  # an older system
                self._map.madvise(_MADV_POPULATE_READ, start, offset + nbytes - start)

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Return a range of the file in place; what is written to it never reaches the file."""
        return self._bytes[offset : offset + nbytes]

    def forget(self, offset: int, nbytes: int) -> None:
        """Unmap a range, soon; its pages stay in the page cache, and a view of it stays valid.

        Neighbours are unmapped together, when they are 8 MiB or another place is forgotten.
        """
        begin, end = self._unused
        if offset - end not in range(_PAGE) or end - begin >= _BATCH_BYTES:
            self._unmap(begin, end)
            begin = offset
        self._unused = (begin, offset + nbytes)

    def _unmap(self, begin: int, end: int) -> None:
        if self._map is not None and begin < end:
            start = begin // _PAGE * _PAGE
            self._map.madvise(mmap.MADV_DONTNEED, start, end - start)

    def close(self) -> None:
        """Let go of the map: it goes with the last view of it."""
        self._map, self._bytes = None, memoryview(b"")


@cache
def _mincore() -> Any:  # noqa: ANN401  (a function of the C library)
    function = ctypes.PyDLL(None).mincore  # too short to let go of the interpreter for
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    return function


def _tells(path: Path) -> bool:
    """Whether ``mincore`` says the truth about a file: only to those who might write it."""
    if sys.platform != "linux":
        return False
    try:
        _mincore()
        return path.stat().st_uid == os.geteuid() or os.access(path, os.W_OK)
    except (OSError, AttributeError):
        return False
