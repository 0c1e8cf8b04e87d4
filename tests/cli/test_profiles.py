"""Profiles that are made once and found again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distorch.cli import profiles
from distorch.cli.profiles import model_profile
from distorch.errors import ModelError
from distorch.plan.blocks import Block, Part
from distorch.plan.cost import Profile
from tests.cli.make import SOURCE


class Maker:
    """Stands for the profiler: counts how often it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, name: str, **options: Any) -> Profile:
        self.asked.append((name, options))
        number = len(self.asked)
        part = Part(tensor="w", dtype="U8", shape=(number,), nbytes=number)
        block = Block(name="w", parts=(part,), module="w")
        return Profile(name=name, blocks=(block,), flops=(number,), activation_bytes=number)


@pytest.fixture
def maker(monkeypatch: pytest.MonkeyPatch) -> Maker:
    made = Maker()
    monkeypatch.setattr("distorch.integrations.families.profile_family", made)
    return made


def test_a_profile_is_made_once_and_found_again(maker: Maker, tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there"
    first = model_profile("wan-14b", size="640x640", frames=5, format="q4_k", folder=folder)
    again = model_profile("wan-14b", size="640x640", frames=5, format="Q4_K", folder=folder)
    assert first == again
    assert len(maker.asked) == 1
    assert [path.suffix for path in folder.iterdir()] == [".json"]


def test_it_is_kept_in_the_users_cache(
    maker: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(profiles, "user_cache_path", lambda name: tmp_path / name)
    model_profile("wan-14b")
    model_profile("wan-14b")
    assert len(maker.asked) == 1
    assert len(list((tmp_path / "distorch" / "profiles").iterdir())) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"name": "qwen-image"},
        {"size": "512x512"},
        {"frames": 5},
        {"tokens": 7},
        {"batch": 2},
        {"format": "Q8_0"},
    ],
)
def test_every_option_has_a_profile_of_its_own(
    maker: Maker, tmp_path: Path, other: dict[str, Any]
) -> None:
    asked: dict[str, Any] = {"name": "wan-14b", "folder": tmp_path}
    model_profile(**asked)
    model_profile(**(asked | other))
    model_profile(**asked)
    assert len(maker.asked) == 2


def test_another_version_of_a_package_makes_it_again(
    maker: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_profile("wan-14b", folder=tmp_path)
    monkeypatch.setattr(profiles, "version", lambda _: "99")
    model_profile("wan-14b", folder=tmp_path)
    assert len(maker.asked) == 2


@pytest.mark.parametrize("inner", ["", "transformer"])
def test_another_configuration_in_the_same_directory_makes_it_again(
    maker: Maker, tmp_path: Path, inner: str
) -> None:
    config = tmp_path / "model" / inner / "config.json"
    config.parent.mkdir(parents=True)
    for text in ("{}", "{}", '{"num_layers": 2}'):
        config.write_text(text)
        model_profile(str(tmp_path / "model"), folder=tmp_path / "kept")
    assert len(maker.asked) == 2


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b"[]", b'{"version": 0}', None])
def test_a_damaged_file_is_made_again(maker: Maker, tmp_path: Path, damage: bytes | None) -> None:
    model_profile("wan-14b", folder=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-9] if damage is None else damage)
    made = model_profile("wan-14b", folder=tmp_path)
    assert len(maker.asked) == 2
    assert model_profile("wan-14b", folder=tmp_path) == made


def test_a_profile_that_cannot_be_kept_is_returned_all_the_same(
    maker: Maker, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    assert model_profile("wan-14b", folder=tmp_path / "file").flops == (1,)
    assert len(maker.asked) == 1


def test_a_wrong_format_is_refused_before_anything_is_imported(
    maker: Maker, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="is no format"):
        model_profile("wan-14b", format="Q4_K_M", folder=tmp_path)
    assert maker.asked == []


@pytest.mark.usefixtures("maker")
def test_a_kept_profile_is_read_without_torch(tmp_path: Path) -> None:
    model_profile("wan-14b", folder=tmp_path)
    code = (
        "import sys, json, pathlib; from distorch.cli.profiles import model_profile;"
        f"profile = model_profile('wan-14b', folder=pathlib.Path({str(tmp_path)!r}));"
        "print(json.dumps([profile.name, sorted({'torch', 'diffusers'} & {*sys.modules})]))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(SOURCE)}
    )
    assert json.loads(done.stdout) == ["wan-14b", []]
