"""The probe: what it measures, what it leaves behind, what it makes of two links at once."""

from __future__ import annotations

import contextlib
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distorch import _probe_accelerators as cards
from distorch import probe as module
from distorch.errors import StorageError
from distorch.machine import Compute, Link, Machine, Tier
from distorch.probe import Effort, median_seconds, probe

TINY = Effort(file_bytes=3 << 20, copy_bytes=1 << 20, rows=16, width=64, seconds=0.0)


def test_a_machine_without_accelerators_has_a_disk_and_a_processor(tmp_path: Path) -> None:
    said: list[str] = []
    probed = probe(tmp_path, effort=TINY, progress=lambda what, *_: said.append(what))
    machine = probed.machine
    assert machine.link("disk", "cpu").bytes_per_second > 1e6
    assert 0 < machine.link("disk", "cpu").latency_seconds < 1
    assert machine.compute("cpu").flops("BF16") > 1e6
    assert (
        machine.tier("disk").capacity_bytes == Machine.detect(tmp_path).tier("disk").capacity_bytes
    )
    assert {reading.unit for reading in probed.readings} == {"B", "FLOP"}
    assert all(reading.per_second > 0 for reading in probed.readings)
    assert list(tmp_path.iterdir()) == []
    assert said[0] == "writing a file to the disk"
    assert "computing on cpu" in said
    machine.save(tmp_path / "machine.toml")
    assert Machine.load(tmp_path / "machine.toml") == machine


@pytest.mark.parametrize("stage", ["writing a file to the disk", "reading it back"])
def test_an_interruption_leaves_nothing_behind(tmp_path: Path, stage: str) -> None:
    def interrupt(what: str, *_: int) -> None:
        if what == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        probe(tmp_path, effort=TINY, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(total=10, free=TINY.file_bytes - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StorageError, match=r"0\.00 GiB are free\n  try: .*--disk FOLDER"):
        probe(tmp_path, effort=TINY)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "missing"):
        with pytest.raises(StorageError, match="it is not a folder"):
            probe(path, effort=TINY)


def test_the_first_run_of_a_job_is_not_counted() -> None:
    seconds = iter([0.2, *[0.001] * 50])
    assert median_seconds(lambda: time.sleep(next(seconds))) < 0.1


# --- accelerators, pretended --------------------------------------------------------------------


def _pretended(names: list[str]) -> list[cards.Copy]:
    memory = torch.zeros(1 << 20, dtype=torch.uint8)
    return [
        cards.Copy(source=a, target=b, source_memory=memory, target_memory=memory.clone())
        for a in ("cpu", *names)
        for b in ("cpu", *names)
        if a != b
    ]


@pytest.fixture
def accelerators(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two cards whose memory is the host's."""
    names = ["cuda:0", "cuda:1"]
    found = [Tier(name=name, capacity_bytes=8, free_bytes=4) for name in names]
    monkeypatch.setattr(module, "accelerators", lambda: found)
    monkeypatch.setattr(cards, "_copies", lambda devices, _: _pretended(devices))
    monkeypatch.setattr(torch, "Stream", lambda **_: contextlib.nullcontext())
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda _: None)
    real = module._compute

    def compute(device: str, effort: Effort) -> Compute:
        return replace(real("cpu", effort), device=device)

    monkeypatch.setattr(module, "_compute", compute)
    return names


def test_links_are_measured_alone_and_in_pairs(accelerators: list[str]) -> None:
    read: dict[str, float] = {}

    def note(what: str, speed: float) -> float:
        read[what] = speed
        return speed

    links, _ = cards.find_links(accelerators, 1 << 20, median_seconds, note)
    names = [f"{link.source} -> {link.target}" for link in links]
    assert len(names) == len(set(names)) == 6
    assert {f"{name}, pageable" for name in names if "cpu" in name} <= set(read)
    pairs = {what for what in read if " with " in what}
    assert "cpu -> cuda:0 with cpu -> cuda:1" in pairs
    assert "cpu -> cuda:0 with cuda:1 -> cuda:0" in pairs
    assert not any("cpu -> cuda:0 with cuda:0 -> cpu" in pair for pair in pairs)
    assert len(pairs) == 6


def test_cards_that_the_driver_does_not_show_are_added_first(
    accelerators: list[str], tmp_path: Path
) -> None:
    machine = probe(tmp_path, effort=TINY).machine
    assert [tier.name for tier in machine.tiers] == [*accelerators, "cpu", "disk"]
    assert [compute.device for compute in machine.computes] == ["cpu", *accelerators]
    assert [link.source for link in machine.route("disk", "cuda:0")] == ["disk", "cpu"]


def test_without_an_accelerator_there_are_no_links() -> None:
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    assert cards.accelerators() == []
    assert cards.find_links([], 8, median_seconds, lambda _, speed: speed) == ((), ())


@st.composite
def measured_pairs(draw: st.DrawFn) -> tuple[list[Link], dict[tuple[int, int], float]]:
    speeds = draw(st.lists(st.floats(1e9, 1e11), min_size=1, max_size=6))
    links = [
        Link(source="cpu", target=f"cuda:{at}", bytes_per_second=speed)
        for at, speed in enumerate(speeds)
    ]
    pairs = [(a, b) for b in range(len(links)) for a in range(b)]
    share = st.floats(0.3, 1.1)
    return links, {pair: draw(share) * sum(speeds[at] for at in pair) for pair in pairs}


@given(measured_pairs())
def test_links_that_slow_each_other_down_have_one_bus(
    measured: tuple[list[Link], dict[tuple[int, int], float]],
) -> None:
    links, together = measured
    named, buses = cards.shared_buses(links, together)
    slow = [
        pair
        for pair, speed in together.items()
        if speed < 0.85 * sum(links[at].bytes_per_second for at in pair)
    ]
    for a, b in slow:
        assert named[a].bus == named[b].bus != ""
    alone = set(range(len(links))) - {at for pair in slow for at in pair}
    assert all(named[at].bus == "" for at in alone)
    assert {bus for bus, _ in buses} == {link.bus for link in named} - {""}
    tiers = tuple(Tier(name=f"cuda:{at}", capacity_bytes=8, free_bytes=8) for at in range(6))
    host = Tier(name="cpu", capacity_bytes=8, free_bytes=8)
    Machine(name="box", tiers=(*tiers, host), links=named, buses=buses)


@pytest.mark.cuda
def test_an_accelerator_is_measured(tmp_path: Path) -> None:
    if not torch.accelerator.is_available():
        pytest.skip("no accelerator")
    machine = probe(tmp_path, effort=TINY).machine
    compute = machine.tiers[0].name
    assert machine.link("cpu", compute).bytes_per_second > 1e8
    assert machine.compute(compute).flops("BF16") > 0
