"""``distorch probe``: a table, a file, and nothing left behind."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from distorch import probe as module
from distorch.machine import Machine
from tests.cli.make import invoke, start
from tests.test_probe import TINY


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A disk, and a place for what is saved, of the test's own."""
    monkeypatch.setattr(module, "QUICK", TINY)
    monkeypatch.setattr("distorch.machine.user_config_path", (tmp_path / "config").joinpath)
    (tmp_path / "disk").mkdir()
    return tmp_path


def test_a_machine_is_measured_printed_and_saved(folder: Path) -> None:
    done = invoke("probe", "--quick", "--disk", folder / "disk")
    assert (done.code, done.err) == (0, "")
    assert "disk -> cpu, past the page cache" in done.out
    assert "TFLOP/s" in done.out
    assert "saved to" in done.out
    saved = Machine.load(Machine.probe_path())
    assert Machine.here().links == saved.links
    assert Machine.here().computes == saved.computes
    assert list((folder / "disk").iterdir()) == []


def test_a_machine_is_json_and_a_file(folder: Path) -> None:
    path = folder / "machine.toml"
    done = invoke("probe", "--quick", "--disk", folder / "disk", "--output", path, "--json")
    assert (done.code, done.err) == (0, "")
    facts = done.json
    machine = Machine.load(path)
    assert facts["saved_to"] == str(path)
    assert [tier["name"] for tier in facts["machine"]["tiers"]] == [t.name for t in machine.tiers]
    link = facts["machine"]["links"][0]
    assert link["bytes_per_second"] == machine.link("disk", "cpu").bytes_per_second
    assert {"what", "per_second", "unit"} == set(facts["readings"][0])
    assert not Machine.probe_path().exists()


def test_what_cannot_be_written_is_said_before_anything_is_measured(folder: Path) -> None:
    done = invoke("probe", "--output", folder)
    assert done.code == 2
    assert "is a folder" in done.err
    done = invoke("probe", "--quick", "--disk", folder / "missing")
    assert done.code == 2
    assert "it is not a folder" in done.err
    assert "try: " in done.err


def test_an_interrupted_probe_leaves_nothing(folder: Path) -> None:
    disk = folder / "disk"
    process = start("probe", "--disk", disk, "--output", folder / "machine.toml")
    deadline = time.monotonic() + 60
    while not list(disk.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "interrupted\n"
    assert list(disk.iterdir()) == []
    assert not (folder / "machine.toml").exists()
