"""The compute device's memory as a cache of blocks whose home is another tier."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distorch.plan.blocks import Block
from distorch.tiers import Copied, Delivery, Source, Store
from distorch.tiers.accelerator import reserve
from distorch.tiers.memory import view_bytes
from distorch.tiers.pinned import Pins

__all__ = ["CachedTier"]

_SLAB_BYTES = 64 << 20  # given up at once: large enough that an allocator wastes little


class CachedTier(Copied):
    """Blocks in the memory of the device that computes, for as long as nobody else needs it.

    Each of ``homes`` is a block and the store that it can be read from at any time. They lie in
    slabs of about 64 MiB, which come and go as a whole.

    >>> from distorch.plan.blocks import Part
    >>> from distorch.tiers.host import HostTier
    >>> from distorch.tiers.sources import MemorySource
    >>> part = Part(tensor="w", dtype="U8", shape=(3,), nbytes=3)
    >>> block, home = Block(name="w", parts=(part,), module="w"), HostTier("cpu")
    >>> home.put(block, MemorySource({"w": memoryview(b"abc")}))
    >>> tier = CachedTier("cpu", [(block, home)], Pins("cpu"))
    >>> tier.bring(), bytes(tier.memory(block)[:3].tolist()), tier.give_up(1), tier.nbytes
    (256, b'abc', 256, 0)
    """

    def __init__(self, name: str, homes: Sequence[tuple[Block, Store]], pins: Pins) -> None:
        self.name = name
        self._device = torch.device(name)
        self._pins = pins
        self._slabs = _cut(homes)
        self._memory: dict[int, Tensor] = {}
        self._homes = {block.name: home for block, home in homes}
        self._places = {
            block.name: (number, begin)
            for number, slab in enumerate(self._slabs)
            for block, _, begin in slab
        }

    @property
    def nbytes(self) -> int:
        """Bytes that are here now."""
        return sum(memory.numel() for memory in self._memory.values())

    @property
    def missing_bytes(self) -> int:
        """Bytes that `bring` would bring."""
        return sum(_nbytes(slab) for slab in self._slabs) - self.nbytes

    def put(self, block: Block, source: Source) -> None:
        """Blocks come by `bring`."""
        raise NotImplementedError(block, source)

    def bring(self) -> int:
        """Bring what is not here; return the bytes that were moved.

        Raises:
            AllocationError: the device has no room.
            StorageError: a block cannot be read from its home.
        """
        moved_bytes = 0
        for number, slab in enumerate(self._slabs):
            if number not in self._memory:
                memory = reserve(self._device, _nbytes(slab))
                for block, home, begin in slab:
                    self._fetch(block, home, memory[begin : begin + block.nbytes])
                self._memory[number] = memory
                moved_bytes += memory.numel()
        if self._device.type != "cpu" and moved_bytes:
            torch.accelerator.synchronize(self._device)  # every stream may use them now
        return moved_bytes

    def give_up(self, nbytes: int) -> int:
        """Free slabs, the last first, until so many bytes are free; return how many are."""
        freed_bytes = 0
        for number in sorted(self._memory, reverse=True):
            if freed_bytes >= nbytes:
                break
            freed_bytes += self._memory.pop(number).numel()
        return freed_bytes

    def memory(self, block: Block) -> Tensor:
        """Return the flat bytes of a block that is here (not a copy)."""
        number, begin = self._places[block.name]
        return self._memory[number][begin : begin + block.nbytes]

    def offsets(self, block: Block) -> Sequence[int]:
        """Where `read` puts each part."""
        return self._homes[block.name].offsets(block)

    def read(self, wanted: Sequence[Delivery]) -> None:
        """Read blocks from their homes."""
        for block, slot in wanted:
            self._homes[block.name].read([(block, slot)])

    def read_rows(self, block: Block, rows: Sequence[int], out: memoryview) -> None:
        """Read single rows of a block from its home."""
        self._homes[block.name].read_rows(block, rows, out)

    def close(self) -> None:
        """Free all of it."""
        self._memory.clear()

    def _fetch(self, block: Block, home: Store, here: Tensor) -> None:
        """Copy a block from its home: by the device itself where it can, else through the host."""
        raw = home.direct(block)
        if raw is not None:
            here.copy_(raw, non_blocking=True)
            return
        staged = self._pins.allocate(block.slot_bytes)
        try:
            home.read([(block, view_bytes(staged))])
            for part, there, begin in zip(
                block.parts, home.offsets(block), block.offsets, strict=True
            ):
                here[begin : begin + part.nbytes] = staged[there : there + part.nbytes]
        finally:
            self._pins.free(staged)


_Slab = list[tuple[Block, Store, int]]
"""Blocks, their homes, and where each begins."""


def _cut(homes: Sequence[tuple[Block, Store]]) -> list[_Slab]:
    slabs: list[_Slab] = []
    for block, home in homes:
        begin = _nbytes(slabs[-1]) if slabs else 0
        if not slabs or (begin and begin + block.nbytes > _SLAB_BYTES):
            slabs.append([])
            begin = 0
        slabs[-1].append((block, home, begin))
    return slabs


def _nbytes(slab: _Slab) -> int:
    return slab[-1][2] + slab[-1][0].nbytes if slab else 0
