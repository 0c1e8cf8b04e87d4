"""What runs on accelerators is tested on virtual ones, which tell what races and what leaks.

`DISTORCH_VGPU=2gb,2gb,2gb pytest tests/accelerator` gives the process its devices; without them
these tests are skipped.
"""

from __future__ import annotations

import functools
import gc
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from distorch import vgpu
from distorch.integrations import planning
from distorch.plan.blocks import cut
from distorch.tiers import Delivery, Destination
from distorch.tiers.disk import DiskTier
from distorch.tiers.host import HostTier
from distorch.tiers.sources import MemorySource

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

_NUM_DEVICES = 3
_NEEDED = f"DISTORCH_VGPU={','.join(['2gb'] * _NUM_DEVICES)} pytest tests/accelerator"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.vgpu)


_failed = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash[_failed] = item.stash.get(_failed, False) or call.excinfo is not None
    return report


@pytest.fixture(autouse=True)
def _devices(request: pytest.FixtureRequest) -> Iterator[None]:
    """Start with fresh devices; end with nothing left on them, in pinned memory, or running."""
    if not os.environ.get("DISTORCH_VGPU"):
        pytest.skip(f"needs virtual GPUs: {_NEEDED}")
    vgpu.install()
    if len(vgpu.counters().devices) < _NUM_DEVICES:
        pytest.skip(f"needs three virtual GPUs: {_NEEDED}")
    vgpu.reset()
    torch.manual_seed(0)
    if left() != NOTHING:
        gc.collect()  # what a test before has left when it failed
    before = left()
    yield
    if left() != before:
        gc.collect()
    after, num_races = left(), vgpu.counters().num_races
    vgpu.reset()
    if not request.node.stash.get(_failed, False):  # else its traceback holds what it made
        assert after == before, "something is left"
        assert num_races == 0, "memory was freed too early"


NOTHING = [0] * _NUM_DEVICES, 0, list[str]()


def left() -> tuple[list[int], int, list[str]]:
    """Bytes on each device, bytes pinned, and readers that run."""
    found = vgpu.counters()
    readers = [each.name for each in threading.enumerate() if each.name.startswith("distorch")]
    return [device.live_bytes for device in found.devices], found.pinned_bytes, readers


@pytest.fixture(autouse=True)
def _many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models have many blocks too."""
    monkeypatch.setattr(planning, "cut", functools.partial(cut, target_bytes=1))


@pytest.fixture(autouse=True)
def _told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The race detector is told what the host writes where copies may still read."""

    def tell(memory: memoryview) -> None:
        vgpu.host_access(torch.frombuffer(memory, dtype=torch.uint8), write=True)

    def read_from(tier: type[DiskTier | HostTier]) -> None:
        real = tier.read

        def read(self: DiskTier | HostTier, wanted: Sequence[Delivery]) -> None:
            for _, slot in wanted:
                tell(slot)
            real(self, wanted)  # type: ignore[arg-type]

        monkeypatch.setattr(tier, "read", read)

    read_from(DiskTier)
    read_from(HostTier)
    real = MemorySource.read

    def read(self: MemorySource, wanted: Sequence[Destination]) -> None:
        for _, memory in wanted:
            tell(memory)
        real(self, wanted)

    monkeypatch.setattr(MemorySource, "read", read)
