"""Host memory for bytes: how it is allocated, and seen as bytes."""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor

__all__ = ["allocate", "allocate_pages", "view_bytes"]


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
