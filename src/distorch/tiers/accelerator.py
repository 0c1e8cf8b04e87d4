"""An accelerator's memory: CUDA, ROCm, XPU or the virtual GPU, all through `torch.accelerator`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from distorch.errors import AllocationError, ExecutorError
from distorch.plan.blocks import Block
from distorch.plan.plan import gib
from distorch.tiers import Copied, Delivery, Source, destinations
from distorch.tiers.memory import view_bytes
from distorch.tiers.pinned import Pins
from distorch.tiers.slabs import Slabs

__all__ = ["AcceleratorTier", "reserve"]


def reserve(device: torch.device, nbytes: int) -> Tensor:
    """Return ``nbytes`` of uint8 on a device.

    Raises:
        AllocationError: it has no room for them.

    >>> reserve(torch.device("cpu"), 8).shape
    torch.Size([8])
    """
    try:
        with torch.inference_mode(mode=False):
            return torch.empty(nbytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        raise AllocationError(
            f"{device} has no room for {gib(nbytes)} more: {_line(error)}",
            hint=f"a smaller amount for {device}, or close what else uses it",
        ) from error
    except RuntimeError as error:
        raise _broken(str(device), error) from error


@contextmanager
def _told(device: str) -> Iterator[None]:
    """Say which device has failed, in an error of ours."""
    try:
        yield
    except RuntimeError as error:
        raise _broken(device, error) from error


def _broken(device: str, error: RuntimeError) -> ExecutorError:
    return ExecutorError(f"{device} has failed: {_line(error)}", hint=f"a line without {device}")


def _line(error: RuntimeError) -> str:
    return str(error).partition("\n")[0]


class AcceleratorTier(Copied):
    """Blocks at rest in an accelerator's memory, as stored: on the one that computes, or a donor.

    ``blocks`` are those that will come. Each is read into pinned memory and copied from there; the
    copy has ended when `put` returns, so that every stream may use it.
    """

    def __init__(self, name: str, blocks: Sequence[Block], pins: Pins) -> None:
        self.name = name
        self.nbytes = 0
        self._device = torch.device(name)
        self._slabs = Slabs(blocks, lambda nbytes: reserve(self._device, nbytes))
        self._pins = pins
        self._largest_bytes = max((block.nbytes for block in blocks), default=0)
        self._staging: Tensor | None = None
        self._blocks: dict[str, Tensor] = {}

    def adopt(self, block: Block) -> None:
        """Count a block that rests on the device already, in tensors of its module's own."""
        self.nbytes += block.nbytes

    def put(self, block: Block, source: Source) -> None:
        """Bring a block to rest here.

        Raises:
            AllocationError: the device is full.
        """
        memory = self._slabs.place(block)
        if self._staging is None:
            self._staging = self._pins.allocate(self._largest_bytes)
        staged = self._staging[: block.nbytes]
        source.read(destinations(block, view_bytes(staged)))
        with _told(self.name):
            memory.copy_(staged)
        self._blocks[block.name] = memory
        self.nbytes += block.nbytes

    def settle(self) -> None:
        """Let go of what only loading needs."""
        if self._staging is not None:
            self._pins.free(self._staging)
            self._staging = None

    def memory(self, block: Block) -> Tensor:
        """Return the block's flat bytes (not a copy)."""
        return self._blocks[block.name]

    def direct(self, block: Block) -> Tensor:
        """Return the block's flat bytes: devices copy from each other by themselves."""
        return self._blocks[block.name]

    def read(self, wanted: Sequence[Delivery]) -> None:
        """Copy blocks into their slots in host memory, and wait for them."""
        with _told(self.name):
            for block, slot in wanted:
                target = torch.frombuffer(slot, dtype=torch.uint8)[: block.nbytes]
                target.copy_(self._blocks[block.name])

    def read_rows(self, block: Block, rows: Sequence[int], out: memoryview) -> None:
        """Copy single rows of a block's only part into host memory."""
        if not rows:
            return
        part = block.parts[0]
        table = self._blocks[block.name][: part.nbytes].view(part.shape[0], -1)
        with _told(self.name):
            chosen = table.index_select(0, torch.tensor(rows, device=self._device))
            torch.frombuffer(out, dtype=torch.uint8).view(len(rows), -1).copy_(chosen)

    def close(self) -> None:
        """Free all blocks."""
        self.settle()
        self._blocks.clear()
        self._slabs.clear()
        self.nbytes = 0
