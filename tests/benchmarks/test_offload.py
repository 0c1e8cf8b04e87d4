"""The benchmark of a transformer on disk: all give the same bits. No time is asserted."""

from __future__ import annotations

import io
import json
import re
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")

SCALE = "smallest"
SHAPE = {"num_attention_heads": 1, "num_layers": 1, "num_single_layers": 2}
NAMES = {"ours", "ours, 25 %", "accelerate", "diffusers"}
WITHOUT_ROOT = "a hard memory cap needs a control group, and that needs root"


@pytest.fixture
def offload(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark, at a shape of 2 MiB."""
    found = import_module("offload")
    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(1 << 20))
        file.flush()
        found.write_out([Path(file.name)])
        try:
            found.forget([Path(file.name)])
        except AssertionError:
            pytest.skip("temporary files are in memory here: none is cold")
    monkeypatch.setattr(found, "SHAPES", {SCALE: SHAPE})
    monkeypatch.setattr(found, "settle", lambda: None)
    return found


def rows(report: str) -> dict[str, str]:
    """Return the last cell of each contender's row: whether its bits are equal."""
    return dict(re.findall(r"^(\S.*?)  +\d.* (yes|NO) *$", report, re.MULTILINE))


def test_all_have_the_bits_of_the_model_in_memory_and_a_row(
    offload: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(offload.MemoryGroups, "find", lambda: (None, WITHOUT_ROOT))
    found = offload.run(num_rounds=1, read_ahead_kib=0)[SCALE]
    report = capsys.readouterr().out
    assert rows(report) == dict.fromkeys(NAMES, "yes")
    assert len(found["rounds"]) == 1
    for answers in found["rounds"]:
        assert set(answers) == NAMES | {"reading"}
        assert all(answers[name]["equal"] for name in NAMES)
        assert answers["ours"]["share"] == 1
    assert set(found["cap_bytes"].values()) == {None}
    assert WITHOUT_ROOT in report


@pytest.mark.parametrize("changed", [False, True])
def test_other_bits_are_told_of(
    offload: ModuleType,
    changed: bool,  # noqa: FBT001
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, x = offload.build(SHAPE), offload._input(16)
    model.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        expected = offload.Denoiser(model)(x).contiguous() + changed
        save_file({"x": x, "expected": expected}, tmp_path / "task.safetensors")
        monkeypatch.setattr(sys, "stdin", io.StringIO('"ours"\n'))
        offload._work("ours", tmp_path)
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert answers[0] == "ready"
    assert answers[1]["equal"] is not changed


def test_who_differs_or_is_killed_has_a_row_that_says_so(
    offload: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = {"seconds": 1.0, "equal": True}, {"seconds": 2.0, "equal": False}
    answers: dict[str, dict[str, float] | None]
    answers = {"reading": {"seconds": 0.5}, "ours": good, "ours, 25 %": bad}
    answers |= {"accelerate": None, "diffusers": good}
    found = {"model_bytes": 1, "tokens": 1, "compute_seconds": 0.5, "read_ahead": ""}
    offload._report(SCALE, {**found, "cap_bytes": {}, "rounds": [answers]}, WITHOUT_ROOT)
    report = capsys.readouterr().out
    assert rows(report) == {"ours": "yes", "ours, 25 %": "NO", "diffusers": "yes"}
    assert re.search(r"^accelerate +killed", report, re.MULTILINE)


@pytest.mark.slow
def test_each_library_has_a_cap(offload: ModuleType) -> None:
    if offload.MemoryGroups.find()[0] is None:
        pytest.skip(offload.MemoryGroups.find()[1])
    found = offload.run(num_rounds=1, read_ahead_kib=0)[SCALE]
    assert all(cap > found["model_bytes"] / 2 for cap in found["cap_bytes"].values())
    assert all(answers[name]["equal"] for answers in found["rounds"] for name in NAMES)
