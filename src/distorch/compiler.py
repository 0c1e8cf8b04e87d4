"""Builds C and C++ with the machine's own compiler, once, into the user's cache.

A library is kept under a key of its sources, the command and what else it depends on, so a new
version never meets an old build; it is built beside and renamed, so another process sees all of it
or nothing.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from platformdirs import user_cache_path

from distorch.errors import ExecutorError, MachineError

__all__ = ["build_library", "find_compiler"]

Language = Literal["c", "c++"]

_COMPILERS: Mapping[Language, tuple[str, tuple[str, ...]]] = {
    "c": ("CC", ("cc", "gcc", "clang")),
    "c++": ("CXX", ("c++", "g++", "clang++")),
}


def find_compiler(language: Language) -> str:
    """Return the command of the C or C++ compiler: ``$CC`` or ``$CXX``, else the system's.

    Raises:
        MachineError: there is none.
    """
    variable, names = _COMPILERS[language]
    found = os.environ.get(variable) or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        name = language.upper()
        problem = (
            f"there is no {name} compiler here: none of {', '.join(names)}, and no ${variable}"
        )
        raise MachineError(problem, hint="install one: apt install build-essential")
    return found


def build_library(
    name: str,
    sources: Mapping[str, bytes],
    *,
    language: Language,
    flags: Sequence[str],
    depends_on: str = "",
    timeout_seconds: float,
) -> Path:
    """Build a shared library from source files, or find the one built before; return its path.

    Args:
        name: What it is called in the cache, before the key.
        sources: File names and contents; the first is compiled, it may include the others.
        language: ``"c"`` or ``"c++"``.
        flags: For compiling and, at the end of the command, linking.
        depends_on: What else the result depends on: the CPU, a version of torch.
        timeout_seconds: How long the compiler may take.

    Raises:
        MachineError: there is no compiler.
        ExecutorError: it fails; the message has its first error.
    """
    compiler = find_compiler(language)
    key = hashlib.sha256(repr((compiler, flags, depends_on, sorted(sources.items()))).encode())
    folder = user_cache_path("distorch", ensure_exists=True)
    target = folder / f"{name}-{key.hexdigest()[:16]}.so"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=folder) as workplace:
        for file_name, content in sources.items():
            (Path(workplace) / file_name).write_bytes(content)
        built = Path(workplace) / "built.so"
        command = [
            *shlex.split(compiler),
            next(iter(sources)),
            "-shared",
            "-fPIC",
            "-o",
            built.name,
            *flags,
        ]
        _compile(name, command, workplace, timeout_seconds)
        built.replace(target)
    return target


def _compile(name: str, command: Sequence[str], folder: str, timeout_seconds: float) -> None:
    try:
        done = subprocess.run(  # noqa: S603 (our own sources, the user's compiler)
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ExecutorError(f"{name} cannot be compiled: {error}") from error
    if done.returncode:
        lines = done.stderr.splitlines()
        first = next(
            (line for line in lines if "error" in line), lines[0] if lines else "no reason"
        )
        problem = f"{name} cannot be compiled: {command[0]} says {first.strip()}"
        raise ExecutorError(problem, hint="another compiler, by CC or CXX")
