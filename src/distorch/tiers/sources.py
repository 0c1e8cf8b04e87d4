"""Where weights come from: the files of a checkpoint, or memory that holds them already."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from distorch.formats import DTYPES, TensorInfo
from distorch.plan.blocks import CPU_ALIGNMENT_BYTES, SECTOR_BYTES, Block, Part, whole_sectors
from distorch.tiers import Copied, Delivery, Destination, Lying, destinations
from distorch.tiers.file_reader import FileReader

__all__ = ["Amend", "FileSource", "MemorySource"]

_GAP_BYTES = 4096
_SMALL_BYTES = 64 << 10

_Span = tuple[Path, int, int]
"""A file, an offset in it, and bytes from there on."""

Amend = Callable[[memoryview], None]
"""Changes a tensor's bytes in place, from how a file keeps it to how the model wants it."""


class FileSource:
    """The tensors of a checkpoint, read in place.

    ``infos`` maps a model's tensor names to where their bytes lie. ``amend`` holds, for the few
    tensors that a file keeps in another form than the model wants, what to do after reading.
    """

    def __init__(
        self, infos: Mapping[str, TensorInfo], amend: Mapping[str, Amend] | None = None
    ) -> None:
        self._infos = infos
        self._alignment_bytes = CPU_ALIGNMENT_BYTES
        self._amend = amend or {}
        self._readers: dict[Path, FileReader] = {}
        self._spans: dict[str, Sequence[_Span]] = {}
        self._layouts: dict[str, tuple[Sequence[int], _Span | None]] = {}
        try:
            for info in infos.values():
                if info.path not in self._readers:
                    self._readers[info.path] = FileReader(info.path)
        except BaseException:
            self.close()
            raise

    def align_to(self, nbytes: int) -> None:
        """Say how dense parts have to be aligned in a slot: what lies otherwise is copied."""
        self._alignment_bytes = nbytes
        self._spans.clear()
        self._layouts.clear()

    def read(self, wanted: Sequence[Destination]) -> None:
        """Copy each part's bytes from its file: neighbours in one read."""
        for path, reader in self._readers.items():
            segments = [
                (self._offset(part), out)
                for part, out in wanted
                if self._infos[part.tensor].path == path
            ]
            if segments:
                reader.read(segments)
        for part, out in wanted:
            if part.tensor in self._amend:
                self._amend[part.tensor](out)

    def offsets(self, block: Block) -> Sequence[int]:
        """Where `read_blocks` puts each part."""
        return self._layout(block)[0]

    def read_blocks(self, wanted: Sequence[Delivery]) -> None:
        """Fill slots; a block that is one run of a file comes as the disk has it, in sectors."""
        apart: list[Destination] = []
        for block, slot in wanted:
            _, span = self._layout(block)
            if span is None:
                apart += destinations(block, slot)
                continue
            path, start, size = span
            assert len(slot) >= size, "a block fits the slot it is read into"
            reader = self._readers[path]
            reader.read([(start, slot[: min(whole_sectors(size), reader.nbytes - start)])])
        self.read(apart)

    def read_rows(self, part: Part, rows: Sequence[int], out: memoryview) -> None:
        """Copy single rows from their file."""
        assert part.tensor not in self._amend, "what is amended is read whole"
        reader = self._readers[self._infos[part.tensor].path]
        row_bytes = part.nbytes // part.shape[0]
        for place, row in enumerate(rows):
            offset = self._offset(part) + row * row_bytes
            reader.read_small(offset, out[place * row_bytes : (place + 1) * row_bytes])

    def lies_ready(self, block: Block) -> bool:
        """Whether a block is in the page cache and may be used as it lies there.

        Small parts are not worth a map; amended ones are not what the file holds; dense ones must
        be aligned, since they go into matrix products as they are.
        """
        spans = self._spans_of(block)
        return bool(spans) and all(
            self._readers[path].cache.has(at, size) for path, at, size in spans
        )

    def view(self, block: Block) -> Lying:
        """Map a block that lies ready."""
        for path, at, size in self._spans_of(block):
            self._readers[path].cache.populate(at, size)
        return [
            self._readers[self._infos[part.tensor].path].cache.view(self._offset(part), part.nbytes)
            for part in block.parts
        ]

    def forget(self, block: Block) -> None:
        """Unmap them."""
        for path, at, size in self._spans_of(block):
            self._readers[path].cache.forget(at, size)

    def _layout(self, block: Block) -> tuple[Sequence[int], _Span | None]:
        """Where a slot has the parts, and the run of a file that fills it (None: part by part).

        Such a run keeps its place in the sector it begins in, so that no byte has to move.
        """
        if block.name not in self._layouts:
            layout: tuple[Sequence[int], _Span | None] = block.offsets, None
            if len(spans := self._spans_of(block)) == 1:
                path, at, size = spans[0]
                lead = at % SECTOR_BYTES
                if lead + size <= block.slot_bytes:
                    offsets = [self._offset(part) - at + lead for part in block.parts]
                    layout = offsets, (path, at - lead, lead + size)
            self._layouts[block.name] = layout
        return self._layouts[block.name]

    def _spans_of(self, block: Block) -> Sequence[_Span]:
        """The runs of a file that hold a block; none if it cannot be used there."""
        if block.name not in self._spans:
            usable = all(self._usable(part) for part in block.parts)
            spans: list[_Span] = []
            for part in sorted(block.parts, key=self._offset) if usable else ():
                path, at = self._infos[part.tensor].path, self._offset(part)
                last = spans[-1] if spans else (path, -_GAP_BYTES - 1, 0)
                if last[0] == path and 0 <= at - (last[1] + last[2]) <= _GAP_BYTES:
                    spans[-1] = (path, last[1], at + part.nbytes - last[1])
                else:
                    spans.append((path, at, part.nbytes))
            self._spans[block.name] = spans
        return self._spans[block.name]

    def _usable(self, part: Part) -> bool:
        if part.nbytes < _SMALL_BYTES or part.tensor in self._amend:
            return False
        dense = DTYPES[part.dtype].block_elements == 1
        return not dense or self._offset(part) % self._alignment_bytes == 0

    def close(self) -> None:
        """Close the files."""
        for reader in self._readers.values():
            reader.close()

    def _offset(self, part: Part) -> int:
        info = self._infos[part.tensor]
        row_bytes = part.nbytes // part.shape[0] if part.first_row else 0
        return info.offset + part.first_row * row_bytes


class MemorySource(Copied):
    """Tensors that are in memory already, as flat bytes by name."""

    def __init__(self, memory: Mapping[str, memoryview]) -> None:
        self._memory = memory

    def read(self, wanted: Sequence[Destination]) -> None:
        """Copy each part's bytes."""
        for part, out in wanted:
            start = part.first_row * (part.nbytes // part.shape[0]) if part.first_row else 0
            found = self._memory[part.tensor][start : start + part.nbytes]
            # numpy lets go of the interpreter while it copies; a slice of a memoryview does not
            np.frombuffer(out, np.uint8)[:] = np.frombuffer(found, np.uint8)

    def read_blocks(self, wanted: Sequence[Delivery]) -> None:
        """Copy each block's parts to their offsets."""
        self.read([part for block, slot in wanted for part in destinations(block, slot)])

    def read_rows(self, part: Part, rows: Sequence[int], out: memoryview) -> None:
        """Copy single rows."""
        row_bytes = part.nbytes // part.shape[0]
        for place, row in enumerate(rows):
            start = (part.first_row + row) * row_bytes
            out[place * row_bytes : (place + 1) * row_bytes] = self._memory[part.tensor][
                start : start + row_bytes
            ]

    def close(self) -> None:
        """Let go of the memory."""
        self._memory = {}
