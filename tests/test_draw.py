"""Pictures: whole files that say what the plan says, whatever its names are."""

from __future__ import annotations

import builtins
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distorch.allocation import Allocation
from distorch.draw import SweepPoint, check_picture, draw_plan, draw_sweep
from distorch.draw.bars import Bar, merged
from distorch.draw.strip import strip_rows
from distorch.errors import FormatError, MissingExtraError, StorageError
from distorch.machine import Compute, Link, Machine, Tier
from distorch.plan.blocks import Block, Part
from distorch.plan.cost import Profile, block_seconds
from distorch.plan.plan import Placement, Plan
from distorch.simulate import Timeline, best_plan, simulate

pytest.importorskip("matplotlib", reason='needs pip install "distorch[plot]"')

MIB = 1 << 20
SUFFIXES = ("png", "svg", "html")
HOSTILE = "<script>alert(1)</script> & $\\frac{1}{2}$ \x1b[2J \x00 \ud800 模型"
DONORS = {"cuda:1": 12e9, "cpu": 25e9, "disk": 6e9}


def _machine() -> Machine:
    tiers = tuple(
        Tier(name=name, capacity_bytes=64 << 30, free_bytes=64 << 30)
        for name in ("cuda:0", *DONORS)
    )
    links = tuple(
        Link(source=name, target="cuda:0", bytes_per_second=speed) for name, speed in DONORS.items()
    )
    card = Compute(device="cuda:0", flops_per_second={"BF16": 1e13}, bytes_per_second=5e11)
    return Machine(name="made up", tiers=tiers, links=links, computes=(card,))


def _profile(num: int) -> Profile:
    parts = [Part(tensor=f"w{i}", dtype="BF16", shape=(MIB,), nbytes=2 * MIB) for i in range(num)]
    blocks = tuple(Block(name=part.tensor, parts=(part,), module=part.tensor) for part in parts)
    return Profile(name="x", blocks=blocks, flops=(10**9,) * num, activation_bytes=MIB)


def _planned(num: int = 60, line: str = "cuda:0,30%;cuda:1,20%;cpu,20%;disk,*") -> tuple[Any, Any]:
    machine, profile = _machine(), _profile(num)
    plan = best_plan(profile, Allocation.parse(line), machine)
    seconds = block_seconds(profile, machine.compute("cuda:0"))
    return plan, simulate(plan, seconds, machine, trace=True)


def _texts(path: Path) -> str:
    text = path.read_text(encoding="utf-8").removeprefix("<!DOCTYPE html>\n")
    return " ".join(ET.fromstring(text).itertext())  # noqa: S314  we wrote it just now


def _check(path: Path) -> None:
    if path.suffix == ".png":
        from PIL import Image

        with Image.open(path) as image:
            image.load()
            assert min(image.size) > 200
    else:
        assert _texts(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("num", [1, 60, 700])
def test_the_file_is_valid_and_alone_and_the_same_each_time(
    tmp_path: Path, suffix: str, num: int
) -> None:
    plan, timeline = _planned(num)
    path = tmp_path / f"plan.{suffix}"
    draw_plan(plan, timeline, path)
    _check(path)
    first = path.read_bytes()
    draw_plan(plan, timeline, path)
    assert path.read_bytes() == first
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", ["svg", "html"])
def test_every_tier_and_the_ring_are_in_the_legend(tmp_path: Path, suffix: str) -> None:
    plan, timeline = _planned()
    path = tmp_path / f"plan.{suffix}"
    draw_plan(plan, timeline, path)
    texts = _texts(path)
    for tier in plan.bytes_by_tier:
        assert f"{tier}: " in texts
    for donor in DONORS:
        assert f"{donor} → cuda:0" in texts
    for word in ("ring on cuda:0: ", "computes", "waits for weights", "bound: ", "predicted"):
        assert word in texts


def test_without_a_timeline_or_a_prediction_there_is_a_strip(tmp_path: Path) -> None:
    plan, timeline = _planned()
    path = tmp_path / "plan.svg"
    for bare, time in ((plan, None), (replace(plan, prediction=None), timeline)):
        draw_plan(bare, time, path)
        assert "cuda:1: " in _texts(path)


def test_a_plan_of_nothing_is_drawn(tmp_path: Path) -> None:
    plan, _ = _planned()
    empty = replace(plan, placements=(), prediction=None)
    draw_plan(empty, Timeline(step_seconds=0.0, waited_seconds=0.0), tmp_path / "plan.png")
    _check(tmp_path / "plan.png")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_names_of_strangers_do_no_harm(tmp_path: Path, suffix: str) -> None:
    plan, timeline = _planned()
    strange = f"disk:{HOSTILE}"
    placements = tuple(
        Placement(block=p.block, tier=strange if p.tier == "disk" else p.tier, kind=p.kind)
        for p in plan.placements
    )
    spans = tuple(
        replace(span, lane=strange) if span.lane == "disk" else span for span in timeline.spans
    )
    plan = replace(
        plan,
        placements=placements,
        allocation=HOSTILE,
        notes=(HOSTILE,),
        prediction=replace(plan.prediction, machine=HOSTILE, limited_by=HOSTILE),
    )
    path = tmp_path / f"plan.{suffix}"
    draw_plan(plan, replace(timeline, spans=spans), path)
    _check(path)
    if suffix != "png":
        text = path.read_text(encoding="utf-8")
        assert "<script" not in text
        assert "\x1b" not in text
        assert HOSTILE[:25] in _texts(path)


def test_a_page_needs_nothing_beside_it(tmp_path: Path) -> None:
    plan, timeline = _planned()
    draw_plan(plan, timeline, tmp_path / "plan.html")
    text = (tmp_path / "plan.html").read_text(encoding="utf-8")
    for outside in ("src=", "@import", "<link", "<image", "<script"):
        assert outside not in text
    for name, value in plan.table():
        assert name in _texts(tmp_path / "plan.html")
        assert value in _texts(tmp_path / "plan.html")


def test_merging_neighbours_keeps_every_byte() -> None:
    plan, _ = _planned(700)
    assert isinstance(plan, Plan)
    rows = strip_rows(plan)
    for tier, nbytes in plan.bytes_by_tier.items():
        whole = sum(bar.length for row in rows for bar in row if bar.lane == tier)
        width = plan.model_bytes / len(rows)
        seen = sum(bar.length for row in rows for bar in merged(row, width) if bar.lane == tier)
        assert whole == pytest.approx(nbytes)
        assert seen == pytest.approx(nbytes)


def test_what_does_not_touch_is_not_joined() -> None:
    bars = [Bar("cpu", 0, 1), Bar("cpu", 2, 3)]
    assert list(merged(bars, 4000)) == bars


def test_another_suffix_says_which_there_are(tmp_path: Path) -> None:
    plan, timeline = _planned()
    with pytest.raises(FormatError, match=r"\.png, \.svg or \.html"):
        draw_plan(plan, timeline, tmp_path / "plan.pdf")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="is not a folder"):
        check_picture(tmp_path / "none" / "plan.png")


def test_a_file_that_cannot_take_its_place_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "plan.png").mkdir()
    plan, timeline = _planned()
    with pytest.raises(StorageError, match=r"cannot be written to .*plan\.png"):
        draw_plan(plan, timeline, tmp_path / "plan.png")
    assert [found.name for found in tmp_path.iterdir()] == ["plan.png"]


def test_without_matplotlib_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(
        name: str,
        names: Mapping[str, object] | None = None,
        local: Mapping[str, object] | None = None,
        wanted: Sequence[str] = (),
        level: int = 0,
    ) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(f"No module named {name!r}")
        return real(name, names, local, wanted, level)

    monkeypatch.setattr(builtins, "__import__", without)
    plan, timeline = _planned()
    with pytest.raises(MissingExtraError, match=r'pip install "distorch\[plot\]"'):
        draw_plan(plan, timeline, tmp_path / "plan.png")


def _points(donor: str, *, measured: bool, slow: float = 1.0) -> list[SweepPoint]:
    return [
        SweepPoint(
            donor=donor,
            offloaded_bytes=number << 30,
            bound_seconds=slow * (1 + number),
            predicted_seconds=None if measured else slow * (1.1 + number),
            measured_seconds=slow * (1.2 + number) if measured or number % 2 else None,
        )
        for number in range(5)
    ]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("slow", [1.0, 100.0])
def test_a_sweep_has_a_line_for_each_donor(tmp_path: Path, suffix: str, slow: float) -> None:
    path = tmp_path / f"sweep.{suffix}"
    points = [
        *_points("cpu", measured=False),
        *_points("cpu + cuda:1", measured=False),
        *_points("disk", measured=True, slow=slow),
    ]
    draw_sweep(points, path, title=HOSTILE, subtitle="on <a box>", compute_seconds=0.5)
    _check(path)
    if suffix != "png":
        texts = _texts(path)
        for word in ("cpu", "cpu + cuda:1", "disk, measured", "compute alone: 500 ms", "bound"):
            assert word in texts


def test_a_sweep_of_nothing_is_drawn(tmp_path: Path) -> None:
    draw_sweep([], tmp_path / "sweep.png", title="nothing fits")
    _check(tmp_path / "sweep.png")
