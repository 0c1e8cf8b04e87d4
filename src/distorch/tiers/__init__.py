"""How bytes rest and move: one contract, one file for each kind of memory.

A source says where a weight's bytes come from when a model is loaded; a store is one tier while a
model runs. Both speak of parts and of writable memory, never of tensors, modules or plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from distorch.plan.blocks import Block, Part

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Copied", "Delivery", "Destination", "Lying", "Source", "Store", "destinations"]

Destination = tuple[Part, memoryview]
"""A part, and the writable bytes it goes to (exactly ``part.nbytes`` of them)."""

Delivery = tuple[Block, memoryview]
"""A block, and the slot of ``block.slot_bytes`` or more that it goes to.

What is in the slot beside the parts may be anything.
"""

Lying = Sequence[memoryview]
"""For each part of a block, its bytes where they lie."""


class Source(Protocol):
    """Where the weights come from: the files of a checkpoint, or a module in memory."""

    def read(self, wanted: Sequence[Destination]) -> None:
        """Copy each part's bytes to its destination; called from several threads at once."""

    def offsets(self, block: Block) -> Sequence[int]:
        """Where `read_blocks` puts each part; always the same for a block."""

    def read_blocks(self, wanted: Sequence[Delivery]) -> None:
        """Copy blocks into their slots: neighbours in one read."""

    def read_rows(self, part: Part, rows: Sequence[int], out: memoryview) -> None:
        """Copy single rows of a part, counted from the part's first, one after another."""

    def lies_ready(self, block: Block) -> bool:
        """Whether a block can be used where it lies, at once and without a copy."""

    def view(self, block: Block) -> Lying:
        """The parts of a block that lies ready, where they lie; not to be written to."""

    def forget(self, block: Block) -> None:
        """Say that a viewed block is not in use any more."""

    def close(self) -> None:
        """Let go of files and memory."""


class Store(Protocol):
    """One tier while a model runs."""

    @property
    def name(self) -> str:
        """The tier's name in plans and lines: ``cpu``, ``disk``."""

    @property
    def nbytes(self) -> int:
        """Bytes at rest here."""

    def put(self, block: Block, source: Source) -> None:
        """Bring a block to rest here."""

    def direct(self, block: Block) -> Tensor | None:
        """Return the block's flat bytes if an accelerator can copy them by itself, else None."""

    def offsets(self, block: Block) -> Sequence[int]:
        """Where each part is in a slot that `read` or a copy has filled; the same for ever."""

    def read(self, wanted: Sequence[Delivery]) -> None:
        """Copy blocks into their slots; called from reader threads."""

    def lies_ready(self, block: Block) -> bool:
        """Whether the block can be used where it lies, at once and without a copy."""

    def view(self, block: Block) -> Lying:
        """The parts of a block that lies ready, where they lie; not to be written to."""

    def forget(self, block: Block) -> None:
        """Say that a viewed block is not in use any more."""

    def read_rows(self, block: Block, rows: Sequence[int], out: memoryview) -> None:
        """Copy single rows of a block's only part, one after another, into ``out``."""

    def close(self) -> None:
        """Let go of everything that rests here."""


class Copied:
    """What nothing is used in where it lies: blocks are copied from it, as they are laid out."""

    def offsets(self, block: Block) -> Sequence[int]:
        """Each part goes to its own offset."""
        return block.offsets

    def direct(self, block: Block) -> Tensor | None:  # noqa: ARG002  a thread has to read it
        """No accelerator reaches it."""
        return None

    def lies_ready(self, block: Block) -> bool:  # noqa: ARG002  it is copied
        """Nothing is used where it lies."""
        return False

    def view(self, block: Block) -> Lying:
        """Nothing is used where it lies."""
        raise NotImplementedError(block)

    def forget(self, block: Block) -> None:
        """Nothing is used where it lies."""


def destinations(block: Block, memory: memoryview) -> list[Destination]:
    """Pair each part of a block with its bytes in the block's memory."""
    assert len(memory) >= block.nbytes, "a block fits the memory it is read into"
    return [
        (part, memory[offset : offset + part.nbytes])
        for part, offset in zip(block.parts, block.offsets, strict=True)
    ]
