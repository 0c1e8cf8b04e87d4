"""The compiled half: built from ``csrc`` with the headers in torch's wheel, called by ctypes."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from distorch.compiler import build_library, find_compiler
from distorch.errors import MachineError

__all__ = ["SpanStruct", "call", "library", "load", "set_installed", "why_not"]

_BUILD_SECONDS = 600
_MAIN = "vgpu.cpp"


class SpanStruct(ctypes.Structure):
    """``Span`` of ``trace.h``: keep both in step."""

    _fields_ = (
        ("begin", ctypes.c_double),
        ("end", ctypes.c_double),
        ("nbytes", ctypes.c_uint64),
        ("device", ctypes.c_int32),
        ("stream", ctypes.c_int32),
        ("source", ctypes.c_int32),
        ("target", ctypes.c_int32),
        ("operation", ctypes.c_char * 64),
    )


_int, _bytes, _double, _pointer, _text = (
    ctypes.c_int,
    ctypes.c_uint64,
    ctypes.c_double,
    ctypes.c_void_p,
    ctypes.c_char_p,
)
_count = ctypes.POINTER(ctypes.c_uint64)

# These return what went wrong as a text, or nothing.
_CHECKED: dict[str, tuple[Any, ...]] = {
    "init": (_int,),
    "set_capacity": (_int, _bytes),
    "set_link": (_int, _int, _double, _text),
    "set_bus": (_text, _double),
    "clear_links": (),
    "configure": (
        _int,
        _int,
        _double,
        _bytes,
        _double,
        _int,
        _bytes,
        ctypes.POINTER(ctypes.c_int),
        _int,
    ),
    "synchronize_all": (),
    "reset": (),
    "lose": (_int,),
    "register": (_pointer, _bytes),
    "unregister": (_pointer,),
    "host_access": (_pointer, _bytes, _int),
    "counter": (_text, _int, _count),
    "link_counter": (_int, _int, _count, _count),
}
_PLAIN: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "num_devices": (_int, ()),
    "is_forked": (_int, ()),
    "is_refused": (_int, (_int, _int)),
    "races": (_text, ()),
    "trace": (None, (_int,)),
    "trace_size": (_bytes, ()),
    "trace_copy": (None, (ctypes.POINTER(SpanStruct), _bytes)),
    "shutdown": (None, ()),
}


def why_not() -> str:
    """Return why the virtual GPU cannot be built here, in one line; "" where it can.

    >>> len(why_not().splitlines()) <= 1
    True
    """
    try:
        find_compiler("c++")
        _include()
    except MachineError as error:
        return error.problem
    return ""


def _include() -> Path:
    """Return the folder of torch's headers, without importing torch."""
    spec = find_spec("torch")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / "include" / "ATen").is_dir():
            return Path(folder) / "include"
    raise MachineError("torch's C++ headers are not here", hint="a wheel from pytorch.org has them")


def _torch_version() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:
        return "unknown"


def _build() -> Path:
    include = _include()
    folder = files("distorch.vgpu") / "csrc"
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith((".h", ".cpp")))
    names.sort(key=lambda name: name != _MAIN)  # the one that is compiled comes first
    return build_library(
        "vgpu",
        {name: (folder / name).read_bytes() for name in names},
        language="c++",
        flags=(
            "-std=c++20",
            "-O2",
            "-fvisibility=hidden",
            f"-I{include}",
            f"-L{include.parent / 'lib'}",
            "-lc10",
            "-ltorch_cpu",
        ),
        depends_on=_torch_version(),
        timeout_seconds=_BUILD_SECONDS,
    )


@cache
def load() -> ctypes.CDLL:
    """Build and load the library: from here on the process has the backend, still without devices.

    Raises:
        MachineError: there is no compiler, or no headers.
        ExecutorError: it cannot be compiled.
    """
    loaded = ctypes.CDLL(os.fspath(_build()))
    for name, arguments in _CHECKED.items():
        function = getattr(loaded, f"vgpu_{name}")
        function.argtypes, function.restype = arguments, _text
    for name, (result, arguments) in _PLAIN.items():
        function = getattr(loaded, f"vgpu_{name}")
        function.argtypes, function.restype = arguments, result
    return loaded


_installed: list[ctypes.CDLL] = []


def library() -> ctypes.CDLL:
    """Return the library of the virtual GPU that is installed.

    Raises:
        MachineError: none is.
    """
    if not _installed:
        problem = "the virtual GPU is not installed"
        raise MachineError(problem, hint='distorch.vgpu.install("12gb"); or DISTORCH_VGPU=12gb')
    return _installed[0]


def set_installed(loaded: ctypes.CDLL) -> None:
    """Make a library that has devices the one that everything here uses."""
    _installed.append(loaded)


def call(name: str, *arguments: object) -> None:
    """Call a function that says what went wrong.

    Raises:
        RuntimeError: something did.
    """
    text: bytes | None = getattr(library(), f"vgpu_{name}")(*arguments)
    if text is not None:
        raise RuntimeError(text.decode(errors="replace"))
