"""The benchmarks are scripts beside each other, not a package: they are found as when they run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="package", autouse=True)
def _as_scripts() -> Iterator[None]:
    sys.path.insert(0, str(_FOLDER))
    yield
    sys.path.remove(str(_FOLDER))
