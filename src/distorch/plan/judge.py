"""What says which of several plans is the fastest, and the search that keeps it. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from distorch.plan.blocks import Block
from distorch.plan.plan import Placement, Plan, Ring

__all__ = ["FEW_BLOCKS", "Best", "Judge", "assemble"]

FEW_BLOCKS = 64  # a model of no more is searched to the end
_MANY_VISITS = 6000  # of blocks, in all the plans that are judged of a larger one
_ROUNDING = 1 + 1e-10


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """Says how many seconds a step of a plan takes, so that the best of several can be chosen.

    ``least_seconds`` is what no plan goes below; ``reserve_bytes`` are what the compute device
    needs beside weights and ring (activations). Where the judge is a simulator of the runtime's
    schedule, ``block_seconds`` say how long each block computes; then few plans need be played.
    """

    seconds: Callable[[Plan], float]
    least_seconds: float = 0.0
    reserve_bytes: int = 0
    block_seconds: Sequence[float] = ()


class Best:
    """The fastest plan so far, the first of equals."""

    def __init__(self, judge: Judge, num_blocks: int) -> None:
        self.plan: Plan | None = None
        self._judge = judge
        self._seconds = float("inf")
        self._visits_left = float(_MANY_VISITS) if num_blocks > FEW_BLOCKS else float("inf")

    def may_lose_to(self, least_seconds: float) -> bool:
        """Whether a plan that takes so long at the least could be faster than all so far."""
        return least_seconds * _ROUNDING < self._seconds

    def offer(self, plan: Plan) -> None:
        """Judge a plan, and keep it if it is faster."""
        seconds = self._judge.seconds(plan)
        if seconds * _ROUNDING < self._seconds:
            self.plan, self._seconds = plan, seconds
        self.spend(len(plan.streamed_order))

    def spend(self, visits: float) -> None:
        """Count work, that a search among very many plans ends."""
        self._visits_left -= visits

    @property
    def is_final(self) -> bool:
        """Whether nothing can beat it, or enough was tried."""
        return self._visits_left < 0 or not self.may_lose_to(self._judge.least_seconds)


def assemble(
    blocks: Sequence[Block],
    line: str,
    compute: str,
    tiers: Mapping[int, str],
    ring: Ring,
    notes: tuple[str, ...] = (),
) -> Plan:
    """Return the plan that streams the blocks of ``tiers`` from there, and keeps all others."""
    placements = tuple(
        Placement(block=block, tier=tiers[index], kind="streamed")
        if index in tiers
        else Placement(block=block, tier=compute, kind="resident")
        for index, block in enumerate(blocks)
    )
    return Plan(compute=compute, allocation=line, placements=placements, ring=ring, notes=notes)
