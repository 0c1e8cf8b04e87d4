"""Few allocations of exact size for many blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from distorch.plan.blocks import Block

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Slabs"]

_SLAB_BYTES = 256 << 20  # so that a progress bar moves while slabs are allocated and pinned


class Slabs:
    """A place for each of ``blocks``, in slabs that ``allocate`` makes when they are first used.

    A caching allocator rounds what it is asked for, and to pin memory costs a call: few slabs keep
    both small. No block lies in two; each begins at a multiple of 256 bytes of its slab.

    >>> from distorch.plan.blocks import Part
    >>> part = Part(tensor="w", dtype="U8", shape=(3,), nbytes=3)
    >>> block = Block(name="w", parts=(part,), module="w")
    >>> slabs = Slabs([block], allocate=bytearray)
    >>> len(slabs.place(block))
    256
    """

    def __init__(self, blocks: Iterable[Block], allocate: Callable[[int], Tensor]) -> None:
        self._allocate = allocate
        self._sizes: list[int] = []
        self._begins: dict[str, tuple[int, int]] = {}
        self._memory: dict[int, Tensor] = {}
        for block in blocks:
            last = self._sizes[-1] if self._sizes else 0
            if not self._sizes or (last and last + block.nbytes > _SLAB_BYTES):
                self._sizes.append(0)
            self._begins[block.name] = len(self._sizes) - 1, self._sizes[-1]
            self._sizes[-1] += block.nbytes

    def place(self, block: Block) -> Tensor:
        """Return the block's flat bytes, whatever is in them."""
        slab, begin = self._begins[block.name]
        if slab not in self._memory:
            self._memory[slab] = self._allocate(self._sizes[slab])
        return self._memory[slab][begin : begin + block.nbytes]

    def clear(self) -> list[Tensor]:
        """Forget all slabs, and return them."""
        memory, self._memory = [*self._memory.values()], {}
        return memory
