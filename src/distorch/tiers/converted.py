"""A checkpoint's tensors in another form: converted as they are read, some rows at a time."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from distorch.formats import DTYPES, TensorInfo
from distorch.plan.blocks import Part
from distorch.tiers import Copied, Delivery, Destination, Source, destinations

__all__ = ["Conversion", "Convert", "ConvertedSource"]

_CHUNK_ELEMENTS = 1 << 20  # 4 MiB as float32

Convert = Callable[[memoryview, slice, memoryview], None]
"""Turns the bytes of rows as a file stores them, and which rows these are, into those wanted."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """A tensor as a file stores it, and what makes of its rows those that are wanted."""

    stored: TensorInfo
    convert: Convert


class ConvertedSource(Copied):
    """A source whose tensors in ``conversions`` are asked for in another form than it has them in.

    They pass through memory in chunks of whole rows, except those that are ``whole``: what is to be
    done to them after reading needs all of their rows.
    """

    def __init__(
        self, source: Source, conversions: Mapping[str, Conversion], whole: Container[str] = ()
    ) -> None:
        self._source = source
        self._conversions = conversions
        self._whole = whole

    def read(self, wanted: Sequence[Destination]) -> None:
        """Copy each part's bytes, or convert them."""
        self._source.read([each for each in wanted if each[0].tensor not in self._conversions])
        for part, out in wanted:
            if part.tensor in self._conversions:
                self._convert(part, out)

    def read_blocks(self, wanted: Sequence[Delivery]) -> None:
        """Bring each block's parts to their offsets."""
        self.read([part for block, slot in wanted for part in destinations(block, slot)])

    def read_rows(self, part: Part, rows: Sequence[int], out: memoryview) -> None:
        """Copy or convert single rows."""
        row_bytes = part.nbytes // part.shape[0]
        for place, row in enumerate(rows):
            single = Part(
                tensor=part.tensor,
                dtype=part.dtype,
                shape=(1, *part.shape[1:]),
                nbytes=row_bytes,
                first_row=part.first_row + row,
            )
            self.read([(single, out[place * row_bytes : (place + 1) * row_bytes])])

    def close(self) -> None:
        """Let go of the files."""
        self._source.close()

    def _convert(self, part: Part, out: memoryview) -> None:
        """Convert a part; the rows of a stack of matrices are those of all of them."""
        convert = self._conversions[part.tensor].convert
        in_one = prod(part.shape[1:-1])
        first = part.first_row * in_one
        row_bytes = part.nbytes // (part.shape[0] * in_one)
        for rows, raw in self._chunks(part, first, part.shape[0] * in_one):
            begin = (rows.start - first) * row_bytes
            convert(raw, rows, out[begin : begin + (rows.stop - rows.start) * row_bytes])

    def _chunks(self, part: Part, first: int, count: int) -> Iterator[tuple[slice, memoryview]]:
        """Yield runs of rows, and their bytes as stored."""
        columns = part.shape[-1]
        step = max(1, _CHUNK_ELEMENTS // columns)
        stored = self._conversions[part.tensor].stored
        row_bytes = DTYPES[stored.dtype].nbytes((columns,))
        at_once = min(count, count if part.tensor in self._whole else step)
        buffer = memoryview(mmap.mmap(-1, at_once * row_bytes))  # given back to the system whole
        for begin in range(0, count, at_once):
            height = min(at_once, count - begin)
            raw = buffer[: height * row_bytes]
            rows = Part(
                tensor=part.tensor,
                dtype=stored.dtype,
                shape=(height, columns),
                nbytes=len(raw),
                first_row=first + begin,
            )
            self._source.read([(rows, raw)])
            for start in range(0, height, step):
                end = min(start + step, height)
                yield (
                    slice(first + begin + start, first + begin + end),
                    raw[start * row_bytes : end * row_bytes],
                )
