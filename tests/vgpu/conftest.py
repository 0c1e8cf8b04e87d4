"""What needs the virtual GPU runs where DISTORCH_VGPU is set, and begins afresh each time."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from distorch import vgpu
from distorch.vgpu.library import call

NEEDED = "DISTORCH_VGPU=2gb,2gb,2gb pytest tests/vgpu"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("vgpu") and not os.environ.get("DISTORCH_VGPU"):
        pytest.skip(f"needs virtual GPUs: {NEEDED}")


@pytest.fixture(autouse=True)
def _fresh(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("vgpu") is None:
        yield
        return
    vgpu.install()
    vgpu.reset()
    yield
    try:
        call("synchronize_all")  # else an error of a stream would meet the next test
    finally:
        vgpu.reset()


@pytest.fixture(params=["calling thread", "enqueued"])
def enqueued(request: pytest.FixtureRequest) -> bool:
    """Both ways to compute."""
    return bool(request.param == "enqueued")
