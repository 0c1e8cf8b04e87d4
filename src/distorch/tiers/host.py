"""Host RAM: one 64-byte aligned buffer for each block that rests here."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from distorch.plan.blocks import Block
from distorch.tiers import Copied, Source, destinations

__all__ = ["HostTier", "allocate", "allocate_pages", "view_bytes"]


def allocate(nbytes: int) -> Tensor:
    """Return ``nbytes`` of uint8 in host memory; torch aligns them to 64 bytes.

    >>> allocate(10).data_ptr() % 64
    0
    """
    with torch.inference_mode(mode=False):
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")


def allocate_pages(nbytes: int) -> Tensor:
    """Return ``nbytes`` of uint8 that begin with a page, as direct reads want them.

    The pages are huge where there are such: a disk writes to few large ones faster than to many.

    >>> allocate_pages(10).data_ptr() % 4096
    0
    """
    if not nbytes:
        return allocate(0)
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANON} if hasattr(mmap, "MAP_PRIVATE") else {}
    pages = mmap.mmap(-1, nbytes, **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system that was built without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    with torch.inference_mode(mode=False):
        return torch.frombuffer(pages, dtype=torch.uint8)


def view_bytes(memory: Tensor) -> memoryview:
    """Return the writable bytes of a contiguous CPU tensor of any dtype."""
    flat = memory.detach().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]  # an array is a buffer


class HostTier(Copied):
    """Blocks at rest in host RAM, as stored.

    >>> from distorch.plan.blocks import Part
    >>> from distorch.tiers.sources import MemorySource
    >>> part = Part(tensor="w", dtype="U8", shape=(3,), nbytes=3)
    >>> block, tier = Block(name="w", parts=(part,), module="w"), HostTier("cpu")
    >>> tier.put(block, MemorySource({"w": memoryview(b"abc")}))
    >>> bytes(tier.memory(block)[:3].tolist())
    b'abc'
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.nbytes = 0
        self._blocks: dict[str, Tensor] = {}

    def adopt(self, block: Block) -> None:
        """Count a block that rests in host memory already, in tensors of its module's own."""
        self.nbytes += block.nbytes

    def put(self, block: Block, source: Source) -> None:
        """Read a block straight into its place."""
        memory = allocate(block.nbytes)
        source.read(destinations(block, view_bytes(memory)))
        self._blocks[block.name] = memory
        self.nbytes += block.nbytes

    def memory(self, block: Block) -> Tensor:
        """Return the block's flat bytes (not a copy)."""
        return self._blocks[block.name]

    def read(self, block: Block, slot: memoryview) -> None:
        """Copy a block into a slot."""
        torch.frombuffer(slot, dtype=torch.uint8)[: block.nbytes].copy_(self._blocks[block.name])

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
        self.nbytes = 0
