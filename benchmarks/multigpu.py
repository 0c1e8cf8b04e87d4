"""What ComfyUI-MultiGPU published: its rows, its scheme as our simulator plays it, and ours.

The original copies each layer when it is needed, and computes nothing meanwhile. So an iteration
takes the model's own time with nothing offloaded, and the time of the copies. `Copies` says what
slows them below the published speed of their link; nothing is fitted to a timing. Without torch.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from distorch.allocation import Allocation
from distorch.machine import Link, Machine, Tier
from distorch.plan.blocks import ALIGNMENT_BYTES, Block, Part
from distorch.plan.plan import Placement, Plan, Ring
from distorch.plan.planner import Judge, make_plan
from distorch.simulate import simulate

_DATA = Path(__file__).parent / "data"

_GIB = 1 << 30
"""A published GB: FLUX.1's 11.90 G weights in bf16, 23.8e9 bytes, are "22.17 GB" there.

Speeds are in it too: over NVLink the bf16 model's bytes would else outrun their link, by 9 %.
"""

_PAGEABLE = 0.77
"""Of a link's speed from pinned memory, what pageable memory reaches: 18.42 of 23.85 GB/s.

16 MiB at a time, RTX 4090, PCIe 4.0 x16: https://github.com/NVlabs/cuda-oxide/pull/976
"""

_LINEAR_LAYERS = {
    "qwen-image": 60 * 14 + 6,
    "flux1": 19 * 10 + 38 * 3 + 10,
    "wan2.2-t2v-14b": 40 * 10 + 6,  # as the original counts them in its log
}
"""What the original copies at a time: linear layers, here all of one size and one time."""

_OTHER_BASE = {"qwen-image-bf16": "qwen-image-fp8"}
"""Whose zero-offload time is used where there is none: 38 GB never fitted a card of 24.

Both compute in bf16, since an RTX 3090 has no fp8.
"""

CARD_BYTES = 24 * _GIB  # an RTX 3090
_DONOR_BYTES = 64 * _GIB
_RING_SLOTS = 4  # the planner takes no more


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A published measurement: seconds per iteration, of one or two passes."""

    model: str
    model_bytes: int
    passes: int
    offloaded_bytes: int
    link: str
    seconds: float

    @property
    def donor(self) -> str:
        """The tier that weights come from."""
        return "cpu" if self.link.endswith("-cpu") else "cuda:1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Copies:
    """What makes a copy slower than its link was published to be.

    ``fp8_as_bf16``: from a GPU, torch converts a weight on the GPU where it rests, so that twice
    the bytes cross (PyTorch, ATen/native/cuda/Copy.cu: "for GPU-GPU transfers conversions are
    performed on the source device"). From the host they cross as stored.

    ``pageable``: the original's weights in host memory are not pinned.

    ``staged``: GeForce cards have no peer access but over NVLink, so a layer goes up to host memory
    and down again (CUDA C++ Programming Guide, "Peer-to-Peer Memory Copy"). That one way follows
    the other is our reading. Each is as fast as the host's own published copies for as many lanes.
    """

    fp8_as_bf16: bool = False
    pageable: bool = False
    staged: bool = False

    def bytes_per_second(self, row: Row) -> float:
        """Return how many bytes, as stored, cross in a second."""
        speed = speeds()[row.link]
        if row.donor == "cpu":
            return speed * _PAGEABLE if self.pageable else speed
        pcie = re.match(r"pcie3x(\d+)", row.link)
        if self.staged and pcie:
            down = speeds()["pcie3x8-cpu"]
            up = down * int(pcie[1]) / 8
            speed = min(speed, 1 / (1 / up + 1 / down))
        return speed / 2 if self.fp8_as_bf16 and row.model.endswith("fp8") else speed


BARE = Copies()
ORIGINAL = Copies(fp8_as_bf16=True, pageable=True, staged=True)
OURS = Copies(staged=True)  # pinned, and weights cross as they are stored


@cache
def speeds() -> dict[str, float]:
    """Return the published bytes per second of each link."""
    with (_DATA / "published_links.csv").open(encoding="utf-8", newline="") as file:
        return {line["donor_link"]: float(line["gb_per_s"]) * _GIB for line in csv.DictReader(file)}


@cache
def published() -> tuple[Row, ...]:
    """Return all published measurements, those with nothing offloaded too."""
    with (_DATA / "published_benchmarks.csv").open(encoding="utf-8", newline="") as file:
        return tuple(
            Row(
                model=line["model"],
                model_bytes=int(float(line["model_gb"]) * _GIB),
                passes=int(line["passes_per_iteration"]),
                offloaded_bytes=int(float(line["offloaded_gb"]) * _GIB),
                link=line["donor_link"],
                seconds=float(line["seconds_per_iteration"]),
            )
            for line in csv.DictReader(file)
        )


def offloading() -> list[Row]:
    """Return the measurements with something offloaded."""
    return [row for row in published() if row.offloaded_bytes]


def base_seconds(row: Row) -> float:
    """Return the seconds of the same model and machine with nothing offloaded."""
    found = {(at.model, at.link): at.seconds for at in published() if not at.offloaded_bytes}
    return found[_OTHER_BASE.get(row.model, row.model), row.link]


def layers(row: Row) -> tuple[Block, ...]:
    """Return the model's layers."""
    count = next(count for name, count in _LINEAR_LAYERS.items() if row.model.startswith(name))
    nbytes = row.model_bytes // count // ALIGNMENT_BYTES * ALIGNMENT_BYTES
    parts = [
        Part(tensor=f"layer{at}", dtype="U8", shape=(nbytes,), nbytes=nbytes) for at in range(count)
    ]
    return tuple(Block(name=part.tensor, parts=(part,), module=part.tensor) for part in parts)


def machine(row: Row, copies: Copies) -> Machine:
    """Return the card, its donor, and the link between them."""
    tiers = (("cuda:0", CARD_BYTES), (row.donor, _DONOR_BYTES))
    return Machine(
        name=row.link,
        tiers=tuple(Tier(name=name, capacity_bytes=size, free_bytes=size) for name, size in tiers),
        links=(
            Link(
                source=row.donor,
                target="cuda:0",
                bytes_per_second=copies.bytes_per_second(row),
            ),
        ),
    )


def original_plan(row: Row) -> Plan:
    """Return what the original does: the last layers rest on the donor."""
    blocks = layers(row)
    first = len(blocks) - round(row.offloaded_bytes / blocks[0].nbytes)
    return Plan(
        compute="cuda:0",
        allocation=f"{row.donor},{row.offloaded_bytes}b",
        placements=tuple(
            Placement(block=block, tier=row.donor, kind="streamed")
            if index >= first
            else Placement(block=block, tier="cuda:0", kind="resident")
            for index, block in enumerate(blocks)
        ),
        ring=Ring(num_slots=1, slot_bytes=blocks[0].slot_bytes),
    )


def _pass_seconds(row: Row) -> list[float]:
    count = len(layers(row))
    return [base_seconds(row) / row.passes / count] * count


def reproduced(row: Row, copies: Copies = ORIGINAL) -> float:
    """Return the seconds per iteration that the simulator gives for the original's scheme."""
    played = simulate(original_plan(row), _pass_seconds(row), machine(row, copies), overlap="none")
    return played.step_seconds * row.passes


def distorch_plan(row: Row) -> Plan:
    """Return our own plan in the same memory: of what rests there, the ring takes its part."""
    blocks, seconds, there = layers(row), _pass_seconds(row), machine(row, OURS)
    ring_bytes = _RING_SLOTS * blocks[0].slot_bytes
    resident_bytes = max(0, row.model_bytes - row.offloaded_bytes - ring_bytes)
    judge = Judge(
        seconds=lambda plan: simulate(plan, seconds, there).step_seconds,
        least_seconds=sum(seconds),
    )
    line = Allocation.parse(f"cuda:0,{resident_bytes}b;{row.donor},*")
    return make_plan(blocks, line, there, judge=judge)


def distorch(row: Row, plan: Plan, copies: Copies = OURS) -> float:
    """Return the seconds per iteration that our own plan and schedule are predicted to take."""
    return simulate(plan, _pass_seconds(row), machine(row, copies)).step_seconds * row.passes


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A published row, and what our simulator says of it; seconds per iteration.

    ``schedule`` is our plan and schedule with the original's copies, ``distorch`` with our own:
    pinned memory, weights as they are stored.
    """

    row: Row
    base: float
    reproduced: float
    schedule: float
    distorch: float

    @property
    def error(self) -> float:
        """How far off the reproduction is, relative to what was published."""
        return self.reproduced / self.row.seconds - 1

    @property
    def speedup(self) -> float:
        """How many times as fast as published ours is predicted to be."""
        return self.row.seconds / self.distorch


def result(row: Row) -> Result:
    """Play a row three times."""
    plan = distorch_plan(row)
    return Result(
        row=row,
        base=base_seconds(row),
        reproduced=reproduced(row),
        schedule=distorch(row, plan, ORIGINAL),
        distorch=distorch(row, plan),
    )
