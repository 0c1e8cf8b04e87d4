"""File readers on systems that lack something, and what the page cache holds of a file."""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from distorch.tiers.file_reader import FileReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


DONTCACHE = 0x80
REFUSALS = {
    "as it comes": (),
    "flag unknown to the kernel": ("EOPNOTSUPP",),
    "flag invalid": ("EINVAL",),
    "flag unknown to python": ("NotImplementedError",),
    "no direct handle": ("EOPNOTSUPP", "no O_DIRECT"),
    "direct reads invalid": ("EOPNOTSUPP", "EINVAL from O_DIRECT"),
    "no preadv": ("no preadv",),
}
WAYS = [*REFUSALS, "direct", "read and drop", "plain"]


def _refusing(refused: Sequence[str], direct: Callable[[], int]) -> Callable[..., int]:
    """Return an os.preadv as a system has it that lacks what is refused."""
    preadv = os.preadv

    def read(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if flags & DONTCACHE:
            if "NotImplementedError" in refused:
                raise NotImplementedError("preadv2: flags unavailable on this platform")
            for name in ("EOPNOTSUPP", "EINVAL"):
                if name in refused:
                    raise OSError(getattr(errno, name), "refused")
        if fd == direct() and "EINVAL from O_DIRECT" in refused:
            raise OSError(errno.EINVAL, "refused")
        return preadv(fd, buffers, offset, flags)

    return read


@contextmanager
def open_reader(path: Path, way: str) -> Iterator[FileReader]:
    """Open a reader on a system that lacks something, or that is told which way to take."""
    refused = REFUSALS.get(way, ())
    with pytest.MonkeyPatch.context() as patch:
        if "no preadv" in refused:
            patch.delattr(os, "preadv")
        elif refused:
            patch.setattr(os, "preadv", _refusing(refused, lambda: reader._direct_fd))
        if "no O_DIRECT" in refused:
            patch.delattr(os, "O_DIRECT", raising=False)
        with closing(FileReader(path)) as reader:
            if way == "direct":
                if reader._direct_fd < 0:
                    pytest.skip("this file system has no O_DIRECT")
                reader._is_direct = True
            elif way == "read and drop":
                reader._is_direct = False
            elif way == "plain":
                patch.setattr(reader, "_read_past_cache", reader._read_plain)
            yield reader


def read_segments(reader: FileReader, wanted: Sequence[tuple[int, int]]) -> list[bytes]:
    outs = [bytearray(size) for _, size in wanted]
    reader.read([(at, memoryview(out)) for (at, _), out in zip(wanted, outs, strict=True)])
    return [bytes(out) for out in outs]


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("nbytes", ctypes.c_uint64))


class _CacheStat(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in ("cached", "dirty", "writeback", "evicted", "recently_evicted")
    )


def num_cached(path: Path, offset: int = 0, nbytes: int = 0) -> int:
    """Count the pages of a file that are in the page cache (cachestat, Linux 6.5)."""
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("no page cache that can be asked")
    fd, found = os.open(path, os.O_RDONLY), _CacheStat()
    asked = _Range(offset, nbytes)
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.syscall(451, fd, ctypes.byref(asked), ctypes.byref(found), 0)
    os.close(fd)
    if failed:
        pytest.skip(f"no cachestat: {os.strerror(ctypes.get_errno())}")
    return int(found.cached)
