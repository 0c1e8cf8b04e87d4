"""The compiler that builds what is native here."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest

from distorch import compiler
from distorch.compiler import build_library, find_compiler
from distorch.errors import ExecutorError, MachineError

ANSWER = b'#include "number.h"\nint answer(void) { return NUMBER; }\n'

needs_compiler = pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def folder(name: str, *, ensure_exists: bool) -> Path:
        assert (name, ensure_exists) == ("distorch", True)
        return tmp_path

    monkeypatch.setattr(compiler, "user_cache_path", folder)
    return tmp_path


def build(number: int, *, depends_on: str = "") -> Path:
    return build_library(
        "answer",
        {"answer.c": ANSWER, "number.h": f"#define NUMBER {number}\n".encode()},
        language="c",
        flags=("-O1",),
        depends_on=depends_on,
        timeout_seconds=60,
    )


@needs_compiler
def test_a_library_is_built_once_for_each_of_what_it_depends_on(cache: Path) -> None:
    first = build(42)
    assert ctypes.CDLL(str(first)).answer() == 42
    time = first.stat().st_mtime_ns
    assert build(42) == first
    assert first.stat().st_mtime_ns == time
    assert ctypes.CDLL(str(build(43))).answer() == 43
    assert build(42, depends_on="another version") != first
    assert {path.suffix for path in cache.iterdir()} == {".so"}  # no leftovers


@needs_compiler
def test_what_the_compiler_refuses_is_said_in_its_words(cache: Path) -> None:
    with pytest.raises(ExecutorError, match="error") as caught:
        build_library("bad", {"bad.c": b"int f( {"}, language="c", flags=(), timeout_seconds=60)
    assert "\n" not in caught.value.problem
    assert list(cache.iterdir()) == []


def test_a_compiler_that_cannot_be_started_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(ExecutorError, match="no-such-compiler"):
        build(1)


def test_the_compiler_of_the_environment_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "ccache my-compiler")
    assert find_compiler("c++") == "ccache my-compiler"


def test_no_compiler_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MachineError, match=r"no C\+\+ compiler") as caught:
        find_compiler("c++")
    assert "install" in caught.value.hint
