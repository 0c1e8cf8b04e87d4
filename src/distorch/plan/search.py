"""Ways to place a model: which blocks stay, and which donor gets which of the others. Pure.

Each candidate keeps another set of blocks on the compute device. Sets are nested: what a smaller
budget could choose, a larger one can choose too, with more blocks beside it. So more memory is
never predicted slower. The candidates: even spreads of every density that fits, each filled up
with the blocks that lie farthest from those that stay; and the contiguous prefix that others keep.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import comb

from distorch.plan.blocks import Block

__all__ = [
    "TINY_BYTES",
    "deal",
    "least_dealt",
    "resident_sets",
    "share_steps",
    "shares_by_speed",
    "spread",
]

_GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, fall ever farther from each other
TINY_BYTES = 64 << 10  # a visit of these costs its latency, not its bytes: keep them first
_LEVELS = 24  # densities tried: all of them for models of so many blocks


def resident_sets(blocks: Sequence[Block], budget_bytes: int) -> Iterator[frozenset[int]]:
    """Yield sets of blocks that fit ``budget_bytes`` of the compute device, the likeliest first."""
    if budget_bytes < 0:
        return
    tiny = [i for i, block in enumerate(blocks) if not block.looked_up and _is_tiny(block)]
    rest = [i for i, block in enumerate(blocks) if not block.looked_up and not _is_tiny(block)]
    looked_up = [i for i, block in enumerate(blocks) if block.looked_up]
    far = _far_apart(blocks, rest)
    prefix = _fitting(blocks, [*tiny, *rest, *looked_up], budget_bytes)
    seen: set[frozenset[int]] = set()
    for first in _densities(blocks, rest, budget_bytes):
        chosen = set(first)
        order = [*tiny, *first, *(index for index in far if index not in chosen), *looked_up]
        found = _fitting(blocks, order, budget_bytes)
        if chosen <= found:
            yield from (kept for kept in dict.fromkeys((found, prefix)) if kept not in seen)
            seen |= {found, prefix}


def _is_tiny(block: Block) -> bool:
    return block.nbytes <= TINY_BYTES


def _densities(
    blocks: Sequence[Block], rest: Sequence[int], budget_bytes: int
) -> Iterator[list[int]]:
    """Even spreads of ``rest``, the densest that fits first; nothing at all is the last."""
    num, total = len(rest), sum(blocks[index].nbytes for index in rest)
    step = max(1, num // _LEVELS)
    largest = max((blocks[index].nbytes for index in rest), default=0)  # a spread may lack as much
    highest = min(num, (budget_bytes + largest) * num // max(1, total) + 1)
    for level in range(highest // step * step, 0, -step):
        first = spread(blocks, rest, total * level // num)
        if first and sum(blocks[index].nbytes for index in first) <= budget_bytes:
            yield first
    yield []


def spread(blocks: Sequence[Block], candidates: Sequence[int], budget_bytes: int) -> list[int]:
    """Pick candidates so that every run of them holds its share of the budget: an even spread."""
    total = sum(blocks[index].nbytes for index in candidates)
    picked, seen_bytes, picked_bytes = [], 0, 0
    for index in candidates:
        nbytes = blocks[index].nbytes
        seen_bytes += nbytes
        # exact integers: pick when the share due so far covers the block
        if budget_bytes * seen_bytes >= (picked_bytes + nbytes) * total:
            picked.append(index)
            picked_bytes += nbytes
    return picked


def _far_apart(blocks: Sequence[Block], indices: Sequence[int]) -> list[int]:
    """Order blocks so that the first few of the list, however few, lie far apart in the model."""
    total = sum(blocks[index].nbytes for index in indices)
    middles, seen_bytes = [], 0
    for index in indices:
        middles.append((2 * seen_bytes + blocks[index].nbytes) / (2 * total))
        seen_bytes += blocks[index].nbytes
    left = list(zip(middles, indices, strict=True))
    order = []
    for turn in range(len(indices)):
        place = bisect_left(left, ((turn + 1) * _GOLDEN % 1.0, -1))
        order.append(left.pop(place % len(left))[1])
    return order


def _fitting(blocks: Sequence[Block], order: Iterable[int], budget_bytes: int) -> frozenset[int]:
    """The longest beginning of ``order`` that fits."""
    found = []
    for index in order:
        budget_bytes -= blocks[index].nbytes
        if budget_bytes < 0:
            break
        found.append(index)
    return frozenset(found)


def shares_by_speed(
    sizes: Sequence[int], rooms: Mapping[str, int], lanes: Mapping[str, Mapping[str, float]]
) -> dict[str, int] | None:
    """Return how many bytes each donor gets so that the busiest link or bus is done earliest.

    Links that run side by side get bytes in proportion to their speeds; those that share a bus
    get no more than it carries. Where it makes no difference, the first donor is preferred. None
    where there is no room.
    """
    busy: defaultdict[str, float] = defaultdict(float)
    shares = dict.fromkeys(rooms, 0)
    for nbytes in sorted(sizes, reverse=True):
        able = [name for name in rooms if shares[name] + nbytes <= rooms[name]]
        if not able:
            return None
        best = min(able, key=lambda name: max(busy[i] + nbytes / v for i, v in lanes[name].items()))
        shares[best] += nbytes
        for lane, bytes_per_second in lanes[best].items():
            busy[lane] += nbytes / bytes_per_second
    return shares


def share_steps(sizes: Sequence[int], rooms: Mapping[str, int], most: int) -> list[dict[str, int]]:
    """Return ways to share bytes among donors in equal steps: the same whatever their speeds.

    A donor without room for its share gets what it has room for, and the others the rest in
    proportion. There are about ``most`` ways at the most, and fewer for a few blocks.

    >>> share_steps([50] * 4, {"cuda:1": 60, "cpu": 999}, 5)
    [{'cuda:1': 0, 'cpu': 200}, {'cuda:1': 50, 'cpu': 150}, {'cuda:1': 60, 'cpu': 140}]
    """
    steps = 1
    while steps < 8 * len(sizes) and comb(steps + len(rooms), len(rooms) - 1) <= most:
        steps += 1
    ways: list[tuple[int, ...]] = [()]
    for _ in [*rooms][1:]:
        ways = [(*way, step) for way in ways for step in range(steps - sum(way) + 1)]
    found = (
        _within(sum(sizes), dict(zip(rooms, (*way, steps - sum(way)), strict=True)), rooms)
        for way in ways
    )
    return [dict(shares) for shares in dict.fromkeys(tuple(each.items()) for each in found if each)]


def _within(
    nbytes: int, parts: Mapping[str, int], rooms: Mapping[str, int]
) -> dict[str, int] | None:
    """Share bytes by parts, no donor's more than its room; None where there is no room."""
    shares = dict.fromkeys(parts, 0)
    open_parts = {name: part for name, part in parts.items() if part}
    while open_parts:
        left, total = nbytes - sum(shares.values()), sum(open_parts.values())
        full = [name for name, part in open_parts.items() if left * part > rooms[name] * total]
        if not full:
            return shares | {name: left * part // total for name, part in open_parts.items()}
        shares |= {name: rooms[name] for name in full}
        open_parts = {name: part for name, part in open_parts.items() if name not in full}
    return shares if sum(shares.values()) == nbytes else None


def least_dealt(
    sizes: Mapping[int, int], shares: Mapping[str, int], rooms: Mapping[str, int]
) -> dict[str, float]:
    """Return the bytes that each donor gets at the least when `deal` deals so.

    A block goes to a donor only if no other with room for it would then be further behind its
    share. So in the end none is more than its part of the largest block behind, unless it is full.
    """
    total, parts = sum(sizes.values()), max(1, sum(shares.values()))
    largest = max(sizes.values(), default=0)
    return {
        name: min((total * share - largest * (parts - share)) / parts, float(rooms[name] - largest))
        for name, share in shares.items()
    }


def deal(
    sizes: Mapping[int, int], shares: Mapping[str, int], rooms: Mapping[str, int]
) -> dict[int, str] | None:
    """Deal blocks in their order so that every run of them holds each donor's share of it.

    ``sizes`` are bytes by block. None where what is left of a block fits no donor's room.
    """
    held = {name: 0 for name, share in shares.items() if share}
    tiers = {}
    for index, nbytes in sizes.items():
        able = [name for name in held if held[name] + nbytes <= rooms[name]]
        if not able:
            return None
        tiers[index] = min(able, key=lambda name: (held[name] + nbytes) / shares[name])
        held[tiers[index]] += nbytes
    return tiers
