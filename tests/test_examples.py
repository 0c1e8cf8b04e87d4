"""Every example runs with its tiny model, says what it saved, and is listed."""

from __future__ import annotations

import gc
import os
import re
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
SHARED = {"shared", "tiny"}
NAMES = sorted({path.stem for path in FOLDER.glob("*.py")} - SHARED)
ON_CARDS = [name for name in NAMES if "two_cards()" in (FOLDER / f"{name}.py").read_text("utf-8")]
SAVES_NOTHING = {"auto", "fp8"}  # all fits; a tiny model in fp8 is smaller than its ring


def _run(name: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.chdir(folder)
    patch.syspath_prepend(str(FOLDER))
    patch.setattr(sys, "argv", [f"{name}.py"])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    gc.collect()


def _check(name: str, out: str) -> None:
    found = re.search(r"^saved: ([\d.]+) MiB \(\d+%\); [\d.]+ s$", out, re.MULTILINE)
    assert found, out
    assert (float(found[1]) > 0) == (name not in SAVES_NOTHING)
    for path in re.findall(r"^wrote (.+)$", out, re.MULTILINE):
        assert Path(path).stat().st_size > 0


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ON_CARDS])
def test_it_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(name, tmp_path, monkeypatch)
    _check(name, capsys.readouterr().out)


@pytest.mark.vgpu
@pytest.mark.skipif("DISTORCH_VGPU" not in os.environ, reason="needs DISTORCH_VGPU=2gb,2gb,2gb")
@pytest.mark.parametrize("name", ON_CARDS)
def test_it_runs_on_virtual_cards(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(name, tmp_path, monkeypatch)
    out = capsys.readouterr().out
    _check(name, out)
    assert "vgpu:0" in out


def test_those_on_cards_are_found() -> None:
    assert ON_CARDS == ["several_donors", "text_encoder_on_second_card", "vae_on_another_device"]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_short_and_says_the_real_command(name: str) -> None:
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    doc = text.split('"""')[1]
    assert f"    python examples/{name}.py --" in doc
    assert "Expect" in doc or name == "qwen_image_edit"


def test_all_are_listed() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[(\w+)\.py\]\((\w+)\.py\) \|", text, re.MULTILINE)
    assert sorted(rows) == [(name, name) for name in NAMES]
    assert len(NAMES) >= 16
