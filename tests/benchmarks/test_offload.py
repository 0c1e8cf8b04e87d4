"""The benchmark of a transformer on disk: all give the same bits. No time is asserted."""

from __future__ import annotations

import gc
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")

SCALE = "tiny"
WITHOUT_ROOT = "a hard memory cap needs a control group, and that needs root"


@pytest.fixture
def offload() -> ModuleType:
    found = import_module("offload")
    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(1 << 20))
        file.flush()
        found.write_out([Path(file.name)])
        try:
            found.forget([Path(file.name)])
        except AssertionError:
            pytest.skip("temporary files are in memory here: none is cold")
    return found


@pytest.fixture
def run(offload: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Any]]:
    """The benchmark without root, at a shape of 2 MiB, in this process: another one has its own."""

    def measured(command: Sequence[str]) -> SimpleNamespace:
        scale, folder, num_rounds = command[-3:]
        with torch.no_grad():
            figures = offload._measure(scale, Path(folder), int(num_rounds), None)
        return SimpleNamespace(figures=figures, returncode=0)

    import_module("diffusers").FluxTransformer2DModel  # noqa: B018  it is imported when it is named
    shape = {"num_attention_heads": 1, "num_layers": 1, "num_single_layers": 2}
    monkeypatch.setattr(offload, "_SHAPES", {SCALE: shape})
    monkeypatch.setattr(offload, "_MOST_TOKENS", 32)
    monkeypatch.setattr(offload.MemoryGroups, "find", lambda: (None, WITHOUT_ROOT))
    monkeypatch.setattr(offload.CappedRun, "measured", measured)
    monkeypatch.setattr(offload, "settle", lambda: None)
    gc.collect()
    gc.freeze()  # or what the libraries have would be looked at after every contender
    yield lambda: offload.run(num_rounds=2, read_ahead_kib=0)[SCALE]
    gc.unfreeze()


def rows(report: str) -> dict[str, str]:
    """Return the last cell of each contender's row: whether its bits are equal."""
    return dict(re.findall(r"^(\w+) +\d.* (yes|NO) *$", report, re.MULTILINE))


def test_all_have_the_bits_of_the_model_in_memory_and_a_row(
    run: Callable[[], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    found = run()
    report = capsys.readouterr().out
    assert {"ours", "accelerate", "diffusers"} <= set(found["equal"])
    assert all(found["equal"].values())
    assert rows(report) == dict.fromkeys(found["equal"], "yes")
    assert len(found["rounds"]) == 2
    for seconds in found["rounds"]:
        assert {"reading", *found["equal"]} <= set(seconds)
    assert found["cap_bytes"] is None
    assert WITHOUT_ROOT in report


def test_other_bits_are_told_of(
    run: Callable[[], Any],
    offload: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usual = offload.diffusers_offload

    def wrong(model: torch.nn.Module, folder: Path) -> Any:
        with torch.no_grad():
            model.get_parameter("proj_out.bias").add_(1)
        return usual(model, folder)

    monkeypatch.setattr(offload, "diffusers_offload", wrong)
    assert run()["equal"] == {"ours": True, "accelerate": True, "diffusers": False}
    assert rows(capsys.readouterr().out)["diffusers"] == "NO"


@pytest.mark.slow
def test_under_a_cap_they_run_in_a_process_of_their_own(
    offload: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    if offload.MemoryGroups.find()[0] is None:
        pytest.skip(offload.MemoryGroups.find()[1])
    monkeypatch.setattr(offload, "_SHAPES", {SCALE: offload._SHAPES[SCALE]})
    found = offload.run(num_rounds=1, read_ahead_kib=0)[SCALE]
    assert found["cap_bytes"] > found["model_bytes"] / 2
    assert all(found["equal"].values())
