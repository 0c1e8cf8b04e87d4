"""A memory that moves nothing: for tests, and with a clock, the simulator's."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from distorch.plan.blocks import Block
from distorch.tiers import Copied, Delivery, Source

__all__ = ["NullTier"]


class NullTier(Copied):
    """Takes blocks and gives them back empty, as slowly as a link of a set speed would.

    ``bytes_per_second`` is the link's speed (None: instant) and ``wait`` what passes the time: the
    default sleeps, a simulator's advances its clock.

    >>> say = lambda seconds: print(f"{seconds:.3f} s")
    >>> tier = NullTier("disk", bytes_per_second=1e9, wait=say)
    >>> from distorch.plan.blocks import Part
    >>> part = Part(tensor="w", dtype="U8", shape=(1 << 20,), nbytes=1 << 20)
    >>> tier.read([(Block(name="w", parts=(part,), module="w"), memoryview(b""))])
    0.001 s
    """

    def __init__(
        self,
        name: str,
        *,
        bytes_per_second: float | None = None,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self.name = name
        self.nbytes = 0
        self.reads: list[str] = []
        self._bytes_per_second = bytes_per_second
        self._wait = wait

    def put(self, block: Block, source: Source) -> None:  # noqa: ARG002  nothing is read
        """Count a block."""
        self.nbytes += block.nbytes

    def read(self, wanted: Sequence[Delivery]) -> None:
        """Note what is read, write nothing, and let its time pass."""
        for block, _ in wanted:
            self.reads.append(block.name)
            if self._bytes_per_second:
                self._wait(block.nbytes / self._bytes_per_second)

    def read_rows(self, block: Block, rows: Sequence[int], out: memoryview) -> None:
        """Note a look-up."""

    def close(self) -> None:
        """Forget the blocks."""
        self.nbytes = 0
