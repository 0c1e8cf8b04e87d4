"""What rests in host RAM is in memory that the system gets back."""

from __future__ import annotations

import psutil

from distorch.tiers.host import HostTier
from tests.plan_strategies import equal_blocks, memory_source

MIB = 1 << 20


def test_what_no_longer_rests_here_is_free_for_others() -> None:
    """Not only for this process: rest that moves to disk makes room on the machine."""
    blocks = equal_blocks(60, 4 * MIB)
    zeros = bytes(4 * MIB)
    source = memory_source({block.parts[0].tensor: zeros for block in blocks})
    process = psutil.Process()
    before = process.memory_info().rss
    for _ in range(3):
        tier = HostTier("cpu")
        for block in blocks:
            tier.put(block, source)
        assert process.memory_info().rss > before + 200 * MIB
        tier.close()
        assert process.memory_info().rss < before + 20 * MIB
