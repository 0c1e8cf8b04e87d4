"""Builds and loads ``kernels.c``: dequantisation on the CPU at the speed of memory.

Measured (Intel Xeon with AVX-512, 2026-11, ``make bench ARGS="--only dequantize"``, one thread) for
Q8_0, Q4_K, Q5_K, Q6_K and FP8: 5.3-6.7 G weights/s into float32, against 2.9-5.1 for plain C,
1.2-5.6 for libgguf's wheel, 0.3-1.2 for eager torch and 0.3-0.4 for gguf-py. It is built once with
the machine's own C compiler into the user's cache; where there is none, or the result disagrees
with the torch decoder by one bit, torch decodes: slower, never wrong.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from distorch.compiler import build_library
from distorch.errors import DistorchError

__all__ = ["kernel"]

_log = logging.getLogger("distorch")
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fopenmp")
_SOURCES = ("kernels.c", "block_kernels.h")
_BUILD_SECONDS = 60

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as kernels.c counts them

Kernel = Callable[[int, int, int], None]


def kernel(name: str, dtype: torch.dtype = torch.float32) -> Kernel | None:
    """Return ``f(source address, out address, number of blocks)`` for a block format, or None.

    The addresses are of packed blocks and of numbers of ``dtype``; the call releases the GIL and
    shares torch's OpenMP threads. None means that torch has to decode this format here.
    """
    library = _library() if dtype in _KINDS else None
    function: Any = getattr(library, f"distorch_{name.lower()}", None) if library else None
    if function is None:
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
    function.restype = None
    kind = _KINDS[dtype]

    def decode(source: int, out: int, num_blocks: int) -> None:
        function(source, out, num_blocks, kind)

    return decode


@cache
def _library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(os.fspath(_build()))
    except (OSError, DistorchError) as error:
        _log.warning("no native dequantisation here (%s): torch decodes instead, slower", error)
        return None


def _build() -> Path:
    here = files("distorch.quant")
    return build_library(
        "kernels",
        {name: here.joinpath(name).read_bytes() for name in _SOURCES},
        language="c",
        flags=_FLAGS,
        depends_on=_cpu(),
        timeout_seconds=_BUILD_SECONDS,
    )


def _cpu() -> str:
    """What ``-march=native`` depends on, so that a shared home never serves the wrong machine."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
    return next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
