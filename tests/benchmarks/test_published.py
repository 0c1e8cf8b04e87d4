"""What others published is reproduced, and ours is never predicted slower. No time is measured."""

from __future__ import annotations

import statistics
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def multigpu() -> ModuleType:
    return import_module("multigpu")


@pytest.fixture(scope="module")
def published() -> ModuleType:
    return import_module("published")


@pytest.fixture(scope="module")
def sglang() -> ModuleType:
    return import_module("sglang_prefix")


def test_every_published_measurement_is_used(multigpu: ModuleType) -> None:
    assert len(multigpu.offloading()) == 93
    assert len(multigpu.published()) == 93 + 24


def test_no_row_offloads_more_than_its_model(multigpu: ModuleType) -> None:
    for row in multigpu.offloading():
        plan = multigpu.original_plan(row)
        layer_bytes = plan.placements[0].block.nbytes
        assert abs(plan.streamed_bytes - row.offloaded_bytes) <= layer_bytes
        assert plan.streamed_bytes <= plan.model_bytes <= row.model_bytes


def test_published_timings_are_reproduced(published: ModuleType) -> None:
    errors = published.errors()
    assert statistics.median(errors) < 0.04
    assert statistics.mean(errors) < 0.07
    assert max(errors) < 0.11


def test_the_bare_formula_does_worse(published: ModuleType, multigpu: ModuleType) -> None:
    bare = published.errors(multigpu.BARE)
    assert statistics.median(bare) > statistics.median(published.errors())
    assert statistics.mean(bare) == pytest.approx(0.084, abs=0.002)


def test_ours_lies_between_the_bound_and_the_original(multigpu: ModuleType) -> None:
    for row in multigpu.offloading()[::7]:
        plan = multigpu.distorch_plan(row)
        crossing = row.passes * plan.streamed_bytes / multigpu.OURS.bytes_per_second(row)
        if plan.ring.num_slots >= len(plan.streamed_order):
            crossing = 0.0
        bound = max(multigpu.base_seconds(row), crossing)
        ours = multigpu.distorch(row, plan)
        assert bound <= ours * (1 + 1e-9)
        assert ours <= 1.05 * bound
        assert multigpu.distorch(row, plan, multigpu.ORIGINAL) <= multigpu.reproduced(row) * 1.01


@pytest.mark.parametrize("num_resident", [0, 30, 34])
def test_sglang_is_reproduced_within_5_percent(sglang: ModuleType, num_resident: int) -> None:
    published = sglang.PUBLISHED_SECONDS[num_resident]
    assert sglang.prefix_seconds(num_resident) == pytest.approx(published, rel=0.05)


@pytest.mark.parametrize("num_resident", [30, 34])
def test_spreading_hides_all_that_a_prefix_does_not(sglang: ModuleType, num_resident: int) -> None:
    transfers = (sglang.NUM_LAYERS - num_resident) * sglang.TRANSFER_SECONDS
    assert sglang.spread_seconds(num_resident) == pytest.approx(transfers, rel=0.001)
    assert sglang.prefix_seconds(num_resident) > 1.25 * transfers


def test_the_chart_is_the_same_picture_each_time(
    published: ModuleType, multigpu: ModuleType, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="the extra distorch[plot] is not installed")
    chart = import_module("published_chart")
    results = [
        published.Result(row=row, base=1.0, reproduced=2.0, schedule=1.5, distorch=1.0)
        for row in multigpu.offloading()
    ]
    for name in ("a.svg", "b.svg"):
        chart.draw(results, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
