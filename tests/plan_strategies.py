"""What the tests of plan, run and tiers share: strategies of trees, blocks and plans; bytes."""

from __future__ import annotations

import math
import random
from itertools import count
from typing import TYPE_CHECKING

from hypothesis import assume
from hypothesis import strategies as st

from distorch.errors import AllocationError
from distorch.machine import Machine, Tier
from distorch.plan.blocks import Block, Node, Part, TensorSpec
from distorch.plan.plan import Placement, Plan, Ring
from distorch.plan.planner import make_plan
from distorch.tiers.sources import MemorySource
from tests.strategies import allocations_on

if TYPE_CHECKING:
    from collections.abc import Sequence

    from distorch.allocation import Allocation

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
RUN_ROWS = 8192  # a weight of twice as many rows is cut; no run has fewer
_ITEM_BYTES = {"F32": 4, "BF16": 2, "U8": 1}


def _shapes() -> st.SearchStrategy[tuple[int, ...]]:
    small = st.lists(st.integers(0, 40), max_size=3).map(tuple)
    wide = st.tuples(st.integers(1, 4096), st.integers(1, 4096))
    rows = st.tuples(st.integers(1, 5 * RUN_ROWS), st.integers(1, 8))
    return st.one_of(small, wide, rows, st.tuples(st.integers(2, 400), st.integers(1, 99)))


@st.composite
def specs(draw: st.DrawFn, name: str) -> TensorSpec:
    """Weights of every rank: some tiny or empty, some of very many rows."""
    shape, dtype = draw(_shapes()), draw(st.sampled_from(sorted(_ITEM_BYTES)))
    free = draw(st.booleans())
    return TensorSpec(
        name=name,
        dtype=dtype,
        shape=shape,
        nbytes=math.prod(shape) * _ITEM_BYTES[dtype],
        free=free,
        looked_up=free and draw(st.booleans()),
        whole=draw(st.booleans()),
    )


@st.composite
def trees(draw: st.DrawFn) -> Node:
    """Modules in modules, as torch nests them; a few weights are shared by several."""
    known: list[TensorSpec] = []
    numbers = count()

    def tensors(prefix: str, most: int) -> tuple[TensorSpec, ...]:
        found = []
        for place in range(draw(st.integers(0, most))):
            if known and draw(st.integers(0, 4)) == 0:
                found.append(draw(st.sampled_from(known)))
            else:
                known.append(draw(specs(f"{prefix}.w{place}" if prefix else f"w{place}")))
                found.append(known[-1])
        return tuple(found)

    def node(prefix: str, depth: int) -> Node:
        num_children = draw(st.integers(0, 3)) if depth else 0
        names = [f"{prefix}.m{next(numbers)}".lstrip(".") for _ in range(num_children)]
        return Node(
            name=prefix,
            tensors=tensors(prefix, 3),
            children=tuple(node(name, depth - 1) for name in names),
            callable=not prefix or draw(st.integers(0, 4)) > 0,
            atomic=draw(st.integers(0, 5)) == 0,
        )

    return node("", 3)


@st.composite
def block_lists(draw: st.DrawFn, max_bytes: int = 32 * MIB) -> tuple[Block, ...]:
    """Blocks of a model, in order: bracketed ones, one in another too, free and looked-up ones."""
    blocks: list[Block] = []
    tiny, large = st.integers(1, 100 * KIB), st.integers(1, max_bytes)
    for number in range(draw(st.integers(0, 12))):
        nbytes = draw(st.one_of(tiny, large))
        kind = draw(st.sampled_from(["own", "own", "same", "free", "looked_up"]))
        outers = [block.module for block in blocks if block.module is not None]
        outer = draw(st.sampled_from(outers)) if outers else ""
        name = f"{outer}.m{number}" if outer and draw(st.booleans()) else f"m{number}"
        part = Part(tensor=f"{name}.w", dtype="U8", shape=(nbytes,), nbytes=nbytes)
        module = name if kind == "own" else outer or None if kind == "same" else None
        looked_up = kind == "looked_up"
        blocks.append(Block(name=name, parts=(part,), module=module, looked_up=looked_up))
    return tuple(blocks)


def equal_blocks(num: int, nbytes: int, prefix: str = "m") -> tuple[Block, ...]:
    """Blocks of one size, side by side."""
    parts = [
        Part(tensor=f"{prefix}{number}.w", dtype="U8", shape=(nbytes,), nbytes=nbytes)
        for number in range(num)
    ]
    return tuple(
        Block(name=f"{prefix}{number}", parts=(part,), module=f"{prefix}{number}")
        for number, part in enumerate(parts)
    )


def roomy(*names: str) -> Machine:
    """Return a machine on which everything fits."""
    tiers = (Tier(name=name, capacity_bytes=64 * GIB, free_bytes=64 * GIB) for name in names)
    return Machine(name="roomy", tiers=tuple(tiers))


@st.composite
def planned(draw: st.DrawFn) -> tuple[tuple[Block, ...], Allocation, Machine, Plan]:
    """Return blocks, a line, a machine with room, and the plan made of them."""
    blocks = draw(block_lists())
    machine = roomy(*draw(st.sampled_from([("cpu", "disk"), ("cuda:0", "cuda:1", "cpu", "disk")])))
    allocation = draw(allocations_on(machine))
    try:
        plan = make_plan(blocks, allocation, machine)
    except AllocationError:
        assume(False)  # noqa: FBT003  hypothesis' own word
        raise
    return blocks, allocation, machine, plan


def plans() -> st.SearchStrategy[Plan]:
    """Plans that the planner makes."""
    return planned().map(lambda case: case[3])


def many_parts(num: int, *, seed: int = 0, most_bytes: int = 3000) -> tuple[Block, ...]:
    """Blocks of one to four parts of odd sizes, each a matrix of bytes."""
    rng = random.Random(seed)  # noqa: S311  sizes, not secrets
    blocks = []
    for number in range(num):
        parts = []
        for place in range(rng.randint(1, 4)):
            rows, cols = rng.randint(1, 20), rng.randint(1, max(1, most_bytes // 20))
            name = f"m{number}.w{place}"
            parts.append(Part(tensor=name, dtype="U8", shape=(rows, cols), nbytes=rows * cols))
        blocks.append(Block(name=f"m{number}", parts=tuple(parts), module=f"m{number}"))
    return tuple(blocks)


def contents(blocks: Sequence[Block], *, seed: int = 0) -> dict[str, bytes]:
    """Random bytes for each tensor of the blocks, all rows of it."""
    rng = random.Random(seed)  # noqa: S311  weights, not secrets
    sizes: dict[str, int] = {}
    for block in blocks:
        for part in block.parts:
            begin = part.first_row * (part.nbytes // part.shape[0])
            sizes[part.tensor] = max(sizes.get(part.tensor, 0), begin + part.nbytes)
    return {name: rng.randbytes(size) for name, size in sizes.items()}


def memory_source(data: dict[str, bytes]) -> MemorySource:
    """Return a source of these bytes."""
    return MemorySource({name: memoryview(value) for name, value in data.items()})


def streaming_plan(
    blocks: Sequence[Block], *, num_slots: int, donor: str = "disk", resident: Sequence[int] = ()
) -> Plan:
    """Plan by hand: all blocks on ``donor`` but the resident ones, and a ring of so many slots."""
    placements = tuple(
        Placement(block=block, tier="cpu", kind="resident")
        if index in resident
        else Placement(block=block, tier=donor, kind="streamed")
        for index, block in enumerate(blocks)
    )
    slot_bytes = max(block.slot_bytes for block in blocks)
    return Plan(
        compute="cpu",
        allocation=f"cpu,0b;{donor},*",
        placements=placements,
        ring=Ring(num_slots=num_slots, slot_bytes=slot_bytes),
    )
