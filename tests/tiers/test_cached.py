"""A cache on the device that computes: what it gives up comes again, with the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distorch.plan.blocks import Block, Part
from distorch.tiers.cached import CachedTier
from distorch.tiers.disk import DiskTier
from distorch.tiers.host import HostTier
from distorch.tiers.memory import view_bytes
from distorch.tiers.pinned import Pins
from distorch.tiers.sources import MemorySource

_SIZES = [3, 300, 40 << 20, 30 << 20, 5, 70 << 20, 1]


def _blocks(sizes: list[int]) -> tuple[list[Block], MemorySource]:
    parts = [Part(tensor=f"w{i}", dtype="U8", shape=(n,), nbytes=n) for i, n in enumerate(sizes)]
    blocks = [Block(name=part.tensor, parts=(part,), module=part.tensor) for part in parts]
    weights = {f"w{i}": memoryview(bytes([i + 1]) * n) for i, n in enumerate(sizes)}
    return blocks, MemorySource(weights)


def _is_whole(tier: CachedTier, block: Block, number: int) -> bool:
    found = bytes(view_bytes(tier.memory(block)[: block.parts[0].nbytes]))
    return found == bytes([number + 1]) * block.parts[0].nbytes


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_what_was_given_up_comes_again(kind: str, tmp_path: Path) -> None:
    blocks, source = _blocks(_SIZES)
    home = HostTier("cpu") if kind == "host" else DiskTier("disk", tmp_path)
    for block in blocks:
        home.put(block, source)
    tier = CachedTier("cpu", [(block, home) for block in blocks], Pins("cpu"))
    total = sum(block.nbytes for block in blocks)
    assert (tier.bring(), tier.nbytes, tier.bring()) == (total, total, 0)
    freed = tier.give_up(1)
    assert 0 < freed < total
    assert tier.nbytes == total - freed
    assert tier.bring() == freed, "what stayed is not moved"
    assert all(_is_whole(tier, block, number) for number, block in enumerate(blocks))
    assert tier.give_up(total + 1) == total
    home.close()


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=20),
    asked=st.lists(st.integers(0, 50_000), max_size=8),
)
def test_no_more_is_given_up_than_is_there_and_enough_if_it_is(
    sizes: list[int], asked: list[int]
) -> None:
    blocks, source = _blocks(sizes)
    home = HostTier("cpu")
    for block in blocks:
        home.put(block, source)
    tier = CachedTier("cpu", [(block, home) for block in blocks], Pins("cpu"))
    total = sum(block.nbytes for block in blocks)
    for nbytes in asked:
        tier.bring()
        freed = tier.give_up(nbytes)
        assert min(nbytes, total) <= freed <= total
        assert tier.nbytes == total - freed
