"""SGLang keeps the first layers of a model resident: its published timings, and an even spread.

Qwen-Image on one RTX 5090, 60 layers, seconds of denoising with 0, 30 and 34 layers resident:
https://github.com/sgl-project/sglang/pull/31538 ("support resident layers for DiT", prefetch 1).
Two numbers are fitted to the first two of these timings; the third is predicted. Without torch.
"""

from __future__ import annotations

from typing import Any

from distorch.cli.output import show_table
from distorch.machine import Link, Machine, Tier
from distorch.plan.blocks import Block, Part
from distorch.plan.plan import Placement, Plan, Ring
from distorch.plan.search import spread
from distorch.simulate import Overlap, simulate

NUM_LAYERS = 60
PUBLISHED_SECONDS = {0: 56.60, 30: 36.68, 34: 33.97}
"""By the number of resident layers."""

TRANSFER_SECONDS = 0.943
"""A layer's copies in all of a run: 56.60 / 60, since with nothing resident copies hide compute."""

COMPUTE_SECONDS = 0.279
"""A layer's compute in all of a run: 36.68 s are 30 transfers, and 30 layers that hide none.

The third timing alone would give 0.278.
"""

_LAYER_BYTES = 680_000_000 // 64 * 64
_TIER_BYTES = 1 << 40
_RING_SLOTS = 2  # as many as SGLang's prefetch of one layer holds


def run() -> dict[str, Any]:
    """Print SGLang's timings beside the simulated ones."""
    print("SGLang, Qwen-Image on an RTX 5090, seconds of denoising")
    found: dict[str, Any] = {}
    rows = []
    for num_resident, published in PUBLISHED_SECONDS.items():
        prefix = prefix_seconds(num_resident)
        ours = spread_seconds(num_resident)
        found[str(num_resident)] = {"published": published, "prefix": prefix, "spread": ours}
        rows.append(
            (
                f"{num_resident} of {NUM_LAYERS}",
                f"{published:.2f}",
                f"{prefix:.2f}",
                f"{prefix / published - 1:+.1%}",
                f"{ours:.2f}",
                f"{published / ours:.2f}",
            )
        )
    titles = ("resident", "published", "prefix, one ahead", "error", "spread, ring", "speed-up")
    show_table(titles, rows)
    return found


def prefix_seconds(num_resident: int) -> float:
    """Return what a run takes when the first layers stay, and the next one is copied ahead."""
    return _seconds(frozenset(range(num_resident)), "one ahead")


def spread_seconds(num_resident: int) -> float:
    """Return what a run takes when as many layers stay, evenly spread, with our ring."""
    kept = spread(_layers(), range(NUM_LAYERS), num_resident * _LAYER_BYTES)
    return _seconds(frozenset(kept), "ring")


def _seconds(resident: frozenset[int], overlap: Overlap) -> float:
    tiers = tuple(
        Tier(name=name, capacity_bytes=_TIER_BYTES, free_bytes=_TIER_BYTES)
        for name in ("cuda:0", "cpu")
    )
    speed = _LAYER_BYTES / TRANSFER_SECONDS
    link = Link(source="cpu", target="cuda:0", bytes_per_second=speed)
    plan = Plan(
        compute="cuda:0",
        allocation=f"cuda:0,{len(resident) * _LAYER_BYTES}b;cpu,*",
        placements=tuple(
            Placement(block=block, tier="cuda:0", kind="resident")
            if index in resident
            else Placement(block=block, tier="cpu", kind="streamed")
            for index, block in enumerate(_layers())
        ),
        ring=Ring(num_slots=_RING_SLOTS, slot_bytes=_layers()[0].slot_bytes),
    )
    machine = Machine(name="rtx 5090", tiers=tiers, links=(link,))
    return simulate(plan, [COMPUTE_SECONDS] * NUM_LAYERS, machine, overlap=overlap).step_seconds


def _layers() -> tuple[Block, ...]:
    parts = [
        Part(tensor=f"layer{at}", dtype="U8", shape=(_LAYER_BYTES,), nbytes=_LAYER_BYTES)
        for at in range(NUM_LAYERS)
    ]
    return tuple(Block(name=part.tensor, parts=(part,), module=part.tensor) for part in parts)


if __name__ == "__main__":
    run()
