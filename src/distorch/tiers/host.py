"""Host RAM: blocks rest in 64-byte aligned memory, pinned where a device copies from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from distorch.plan.blocks import Block
from distorch.tiers import Copied, Delivery, Source, destinations
from distorch.tiers.memory import allocate, allocate_pages, view_bytes
from distorch.tiers.pinned import Pins
from distorch.tiers.slabs import Slabs

__all__ = ["HostTier"]

_LARGE_BYTES = 1 << 20  # in pages of its own: what malloc is given back, it may keep for ever


class HostTier(Copied):
    """Blocks at rest in host RAM, as stored.

    With ``pins``, the ``blocks`` that are to come rest in slabs of pinned memory, from which an
    accelerator copies by itself; without, each has a buffer of its own.

    >>> from distorch.plan.blocks import Part
    >>> from distorch.tiers.sources import MemorySource
    >>> part = Part(tensor="w", dtype="U8", shape=(3,), nbytes=3)
    >>> block, tier = Block(name="w", parts=(part,), module="w"), HostTier("cpu")
    >>> tier.put(block, MemorySource({"w": memoryview(b"abc")}))
    >>> bytes(tier.memory(block)[:3].tolist())
    b'abc'
    """

    def __init__(self, name: str, blocks: Iterable[Block] = (), pins: Pins | None = None) -> None:
        self.name = name
        self.nbytes = 0
        self._pins = pins
        self._slabs = None if pins is None else Slabs(blocks, pins.allocate)
        self._blocks: dict[str, Tensor] = {}

    def adopt(self, block: Block) -> None:
        """Count a block that rests in host memory already, in tensors of its module's own."""
        self.nbytes += block.nbytes

    def put(self, block: Block, source: Source) -> None:
        """Read a block straight into its place."""
        memory = self._allocate(block)
        source.read(destinations(block, view_bytes(memory)))
        self._blocks[block.name] = memory
        self.nbytes += block.nbytes

    def memory(self, block: Block) -> Tensor:
        """Return the block's flat bytes (not a copy)."""
        return self._blocks[block.name]

    def direct(self, block: Block) -> Tensor | None:
        """Return the block's flat bytes if they are pinned."""
        memory = self._blocks[block.name]
        return memory if self._pins is not None and self._pins.has(memory) else None

    def read(self, wanted: Sequence[Delivery]) -> None:
        """Copy blocks into their slots."""
        for block, slot in wanted:
            target = torch.frombuffer(slot, dtype=torch.uint8)[: block.nbytes]
            target.copy_(self._blocks[block.name])

    def read_rows(self, block: Block, rows: Sequence[int], out: memoryview) -> None:
        """Copy single rows of a block's only part."""
        if not rows:
            return
        part = block.parts[0]
        table = self._blocks[block.name][: part.nbytes].view(part.shape[0], -1)
        chosen = torch.frombuffer(out, dtype=torch.uint8).view(len(rows), -1)
        torch.index_select(table, 0, torch.tensor(rows), out=chosen)

    def close(self) -> None:
        """Free all blocks."""
        self._blocks.clear()
        if self._slabs is not None and self._pins is not None:
            for slab in self._slabs.clear():
                self._pins.free(slab)
        self.nbytes = 0

    def _allocate(self, block: Block) -> Tensor:
        if self._slabs is not None:
            return self._slabs.place(block)
        return (allocate if block.nbytes < _LARGE_BYTES else allocate_pages)(block.nbytes)
