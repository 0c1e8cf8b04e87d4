"""Where weights come from: the files of a checkpoint, or memory that holds them already."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distorch.tiers import Destination
from distorch.tiers.file_reader import FileReader

if TYPE_CHECKING:
    from distorch.formats import TensorInfo
    from distorch.plan.blocks import Part

__all__ = ["Amend", "FileSource", "MemorySource"]

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
        self._amend = amend or {}
        self._readers: dict[Path, FileReader] = {}
        for info in infos.values():
            if info.path not in self._readers:
                self._readers[info.path] = FileReader(info.path)

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

    def read_rows(self, part: Part, rows: Sequence[int], out: memoryview) -> None:
        """Copy single rows from their file."""
        reader = self._readers[self._infos[part.tensor].path]
        row_bytes = part.nbytes // part.shape[0]
        for place, row in enumerate(rows):
            offset = self._offset(part) + row * row_bytes
            reader.read_small(offset, out[place * row_bytes : (place + 1) * row_bytes])

    def close(self) -> None:
        """Close the files."""
        for reader in self._readers.values():
            reader.close()

    def _offset(self, part: Part) -> int:
        info = self._infos[part.tensor]
        row_bytes = part.nbytes // part.shape[0] if part.first_row else 0
        return info.offset + part.first_row * row_bytes


class MemorySource:
    """Tensors that are in memory already, as flat bytes by name."""

    def __init__(self, memory: Mapping[str, memoryview]) -> None:
        self._memory = memory

    def read(self, wanted: Sequence[Destination]) -> None:
        """Copy each part's bytes."""
        for part, out in wanted:
            start = part.first_row * (part.nbytes // part.shape[0]) if part.first_row else 0
            out[:] = self._memory[part.tensor][start : start + part.nbytes]

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
