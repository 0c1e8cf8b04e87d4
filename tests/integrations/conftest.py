"""What tests of distributed modules share."""

from __future__ import annotations

import functools

import pytest

from distorch.machine import Machine, Tier
from distorch.plan.blocks import cut


@pytest.fixture
def machine() -> Machine:
    """A machine whose free memory no other process changes."""
    tiers = (
        Tier(name="cpu", capacity_bytes=1 << 36, free_bytes=1 << 36),
        Tier(name="disk", capacity_bytes=1 << 40, free_bytes=1 << 40),
    )
    return Machine(name="test", tiers=tiers)


@pytest.fixture
def seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture
def many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small models have many blocks too."""
    from distorch.integrations import planning

    monkeypatch.setattr(planning, "cut", functools.partial(cut, target_bytes=1))
