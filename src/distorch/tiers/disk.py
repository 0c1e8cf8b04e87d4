"""Disk: blocks are read from where they lie, a checkpoint in place or a file of our own."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from distorch.errors import StorageError
from distorch.plan.blocks import Block, Part, whole_sectors
from distorch.tiers import Copied, Delivery, Destination, Lying, Source, destinations
from distorch.tiers.file_reader import FileReader

__all__ = ["DiskTier"]


class DiskTier:
    """Blocks at rest on disk.

    Without ``folder`` the weights stay in their source's own files, and nothing is written. With
    one, each block that is put here is written once to a file of ours in it, which goes when the
    tier closes (on POSIX it has no name from the start, so that nothing is left after a crash).
    """

    def __init__(self, name: str, folder: Path | None = None) -> None:
        self.name = name
        self.nbytes = 0
        self._spill = None if folder is None else _Spill(folder)
        self._source: Source | None = None

    @property
    def _read_from(self) -> Source:
        assert self._source is not None, "a block is read only after it was put"
        return self._source

    def put(self, block: Block, source: Source) -> None:
        """Note where a block lies, or write it to our own file.

        Raises:
            StorageError: the disk is full or cannot be written.
        """
        if self._spill is None:
            self._source = source
        else:
            self._spill.write(block, source)
            self._source = self._spill
        self.nbytes += block.nbytes

    def direct(self, block: Block) -> None:
        """No accelerator reads files."""

    def offsets(self, block: Block) -> Sequence[int]:
        """Where `read` puts each part."""
        return self._read_from.offsets(block)

    def read(self, wanted: Sequence[Delivery]) -> None:
        """Read blocks past the page cache."""
        self._read_from.read_blocks(wanted)

    def lies_ready(self, block: Block) -> bool:
        """Whether the block is in the page cache, as it is wanted."""
        return self._read_from.lies_ready(block)

    def view(self, block: Block) -> Lying:
        """Map a block's parts in the page cache."""
        return self._read_from.view(block)

    def forget(self, block: Block) -> None:
        """Unmap them."""
        self._read_from.forget(block)

    def read_rows(self, block: Block, rows: Sequence[int], out: memoryview) -> None:
        """Read single rows of a block's only part."""
        self._read_from.read_rows(block.parts[0], rows, out)

    def close(self) -> None:
        """Remove our own file, if there is one."""
        if self._spill is not None:
            self._spill.close()
        self._source, self.nbytes = None, 0


class _Spill(Copied):
    """A file of our own: blocks one after another, in whole sectors; a source to read them back."""

    def __init__(self, folder: Path) -> None:
        try:
            self._fd, name = tempfile.mkstemp(prefix="distorch-", suffix=".weights", dir=folder)
        except OSError as error:
            raise StorageError(
                f"no file can be written in {folder}: {error.strerror}",
                hint='another folder: "cpu,64mb;disk:/path/to/folder,*"',
            ) from error
        self._path = Path(name)
        try:
            self._reader = FileReader(self._path)
        except BaseException:
            os.close(self._fd)
            self._path.unlink(missing_ok=True)
            raise
        self._named = True
        if os.name == "posix":
            self._path.unlink()
            self._named = False
        self._offsets: dict[tuple[str, int], int] = {}
        self._end = 0

    def write(self, block: Block, source: Source) -> None:
        memory = memoryview(bytearray(whole_sectors(block.nbytes)))
        source.read(destinations(block, memory))
        try:
            _write_all(self._fd, memory)
        except OSError as error:
            full = error.errno in {errno.ENOSPC, errno.EDQUOT}
            raise StorageError(
                f"{'the disk is full' if full else error.strerror}, writing {len(memory)} bytes "
                f"to {self._path.parent}",
                hint='a disk with room: "cpu,64mb;disk:/path/to/folder,*"',
            ) from error
        for part, offset in zip(block.parts, block.offsets, strict=True):
            self._offsets[part.tensor, part.first_row] = self._end + offset
        self._end += len(memory)

    def read(self, wanted: Sequence[Destination]) -> None:
        self._reader.read([(self._offsets[p.tensor, p.first_row], out) for p, out in wanted])

    def read_blocks(self, wanted: Sequence[Delivery]) -> None:
        segments = []
        for block, slot in wanted:
            assert len(slot) >= block.nbytes, "a block fits its slot"
            first = block.parts[0]
            start = self._offsets[first.tensor, first.first_row]
            segments.append((start, slot[: whole_sectors(block.nbytes)]))
        self._reader.read(segments)

    def read_rows(self, part: Part, rows: Sequence[int], out: memoryview) -> None:
        start = self._offsets[part.tensor, part.first_row]
        row_bytes = part.nbytes // part.shape[0]
        for place, row in enumerate(rows):
            view = out[place * row_bytes : (place + 1) * row_bytes]
            self._reader.read_small(start + row * row_bytes, view)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._reader.close()
            if self._named:
                self._path.unlink(missing_ok=True)


def _write_all(fd: int, memory: memoryview) -> None:
    """Write, and see it reach the disk, so that no page cache is held by what was spilled."""
    while memory:
        memory = memory[os.write(fd, memory) :]
    if hasattr(os, "fdatasync"):
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
