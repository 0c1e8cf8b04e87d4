"""Cuts a model into blocks: pure, from names, shapes and the module tree.

A *bracketed* block is what one module needs: it is brought when the module's forward begins and
may go when that ends. Norms and biases are apart from the large weights, since they can stay. A
*free* block is a run of rows of one weight, brought when an operation uses those rows; weights that
are looked up or shared by several modules, and those of very many rows, are free.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

__all__ = [
    "ALIGNMENT_BYTES",
    "CPU_ALIGNMENT_BYTES",
    "SECTOR_BYTES",
    "Block",
    "Node",
    "Part",
    "TensorSpec",
    "aligned",
    "cut",
    "whole_sectors",
]

# A weight at another address can change the last bit of a matrix product: CPUs' libraries look at
# 64 bytes, and cuBLAS, when it chooses an algorithm, at up to 256.
ALIGNMENT_BYTES = 256
CPU_ALIGNMENT_BYTES = 64
SECTOR_BYTES = 4096  # what a disk reads at least: many say 512, and no disk or memory more

_TARGET_BYTES = 8 << 20  # large enough for a disk's full speed, small enough to spread finely
_ROWS = 8192  # rows of one run: a product over fewer may add in another order (docs/exactness.md)
_ROW_MULTIPLE = 512  # runs that threads divide as they divide the whole weight
_SMALL_BYTES = 64 << 10  # norms and biases: kept apart, since a visit would cost them its latency


def aligned(nbytes: int) -> int:
    """Round up to the next multiple of 256 bytes.

    >>> aligned(65)
    256
    """
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def whole_sectors(nbytes: int) -> int:
    """Round up to the next multiple of a disk's sector.

    >>> whole_sectors(4097)
    8192
    """
    return -(-nbytes // SECTOR_BYTES) * SECTOR_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One weight as it is stored: ``dtype`` may be a block format; ``nbytes`` are the stored bytes.

    ``free`` asks for free blocks (a weight of several modules); ``looked_up`` says that single rows
    are all that is read of it (an embedding); ``whole`` forbids cutting by rows.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    free: bool = False
    looked_up: bool = False
    whole: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A module: its own weights, its children, and whether its forward brackets their use.

    ``atomic`` keeps it in one block whatever its size: its forward uses its children's weights
    without calling them.
    """

    name: str
    tensors: tuple[TensorSpec, ...] = ()
    children: tuple[Node, ...] = ()
    callable: bool = True
    atomic: bool = False

    def walk(self) -> Iterator[Node]:
        """Yield this node and all below it, in order."""
        yield self
        for child in self.children:
            yield from child.walk()


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Rows ``first_row`` to ``first_row + shape[0]`` of the weight ``tensor``, as stored."""

    tensor: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    first_row: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """The smallest thing that is placed: one flat run of bytes, every part 256-byte aligned.

    ``module`` is the module that brackets it, or None for a free block. A ``looked_up`` block never
    visits the ring: single rows are read from where it rests.
    """

    name: str
    parts: tuple[Part, ...]
    module: str | None
    looked_up: bool = False
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        """Sum the parts, each rounded up to its alignment."""
        object.__setattr__(self, "nbytes", sum(aligned(part.nbytes) for part in self.parts))

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each part begins inside the block, in bytes."""
        return (0, *accumulate(aligned(part.nbytes) for part in self.parts))[: len(self.parts)]

    @property
    def slot_bytes(self) -> int:
        """Room for the block in whole sectors, wherever it begins in the first."""
        return whole_sectors(self.nbytes) + SECTOR_BYTES


def cut(root: Node, *, target_bytes: int = _TARGET_BYTES) -> tuple[Block, ...]:
    """Cut the model into blocks, in the order of its definition.

    Small modules stay together up to ``target_bytes``; a weight of many rows is cut into runs of
    about 8,192. The cut depends on the model alone, never on the budget, so that every placement
    computes the same products.

    >>> weight = TensorSpec(name="w", dtype="F32", shape=(4, 4), nbytes=64)
    >>> [block.name for block in cut(Node(name="layer", tensors=(weight,)))]
    ['layer']
    """
    free = {spec.name for node in root.walk() for spec in node.tensors if _is_free(spec)}
    return tuple(_cut(root, target_bytes, free, set()))


def _cut(node: Node, target_bytes: int, free: set[str], seen: set[str]) -> Iterator[Block]:
    total = sum(
        aligned(spec.nbytes)
        for inner in node.walk()
        for spec in inner.tensors
        if spec.name not in free | seen
    )
    if node.callable and (total <= target_bytes or node.atomic or not node.children):
        specs = [spec for inner in node.walk() for spec in inner.tensors]
        yield from _blocks(node, specs, free, seen)
        return
    own = free if node.callable else free | {spec.name for spec in node.tensors if spec.nbytes}
    yield from _blocks(node, node.tensors, own, seen)
    for child in node.children:
        yield from _cut(child, target_bytes, free, seen)


def _blocks(
    node: Node, specs: Iterable[TensorSpec], free: set[str], seen: set[str]
) -> Iterator[Block]:
    parts = []
    for spec in specs:
        if spec.name in seen:
            continue
        seen.add(spec.name)
        if spec.name in free:
            yield from _row_runs(spec)
        elif spec.nbytes:
            parts.append(
                Part(tensor=spec.name, dtype=spec.dtype, shape=spec.shape, nbytes=spec.nbytes)
            )
    large = tuple(part for part in parts if part.nbytes > _SMALL_BYTES)
    small = tuple(part for part in parts if part.nbytes <= _SMALL_BYTES)
    if small:
        name = f"{node.name} (small)" if large else node.name
        yield Block(name=name, parts=small, module=node.name)
    if large:
        yield Block(name=node.name, parts=large, module=node.name)


def _is_free(spec: TensorSpec) -> bool:
    rows = spec.shape[0] if spec.shape else 0
    return bool(spec.nbytes) and (spec.free or (_can_cut(spec) and rows >= 2 * _ROWS))


def _can_cut(spec: TensorSpec) -> bool:
    return len(spec.shape) == 2 and not spec.whole  # noqa: PLR2004  a matrix


def _row_runs(spec: TensorSpec) -> Iterator[Block]:
    rows = spec.shape[0] if spec.shape else 1
    runs = max(1, rows // _ROWS) if _can_cut(spec) else 1
    units = rows // _ROW_MULTIPLE  # dealt evenly: a short last run would add in another order
    firsts = [units * run // runs * _ROW_MULTIPLE for run in range(runs)]
    row_bytes = spec.nbytes // max(rows, 1)
    for first, end in pairwise([*firsts, rows]):
        count = end - first
        part = Part(
            tensor=spec.name,
            dtype=spec.dtype,
            shape=(count, *spec.shape[1:]) if runs > 1 else spec.shape,
            nbytes=count * row_bytes if runs > 1 else spec.nbytes,
            first_row=first,
        )
        name = f"{spec.name}[{first}:{first + count}]" if runs > 1 else spec.name
        yield Block(name=name, parts=(part,), module=None, looked_up=spec.looked_up)
