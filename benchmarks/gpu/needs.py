"""What the benchmarks import besides torch, and what to do where it is missing."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Final

NEEDED: Final[Mapping[str, str]] = {
    "torch": "everything",
    "numpy": "distorch.tiers",
    "psutil": "distorch._machine_detect, for the host's free memory",
    "platformdirs": "distorch.machine, for where a probe's speeds are kept",
    "tomli_w": "distorch._machine_file, for writing them",
}
"""Packages that `import distorch; distorch.distribute(...)` imports, and what for.

safetensors, gguf, rich and typer are not on that path.
"""


def missing() -> list[str]:
    """Return which of them are not installed here."""
    return [name for name in NEEDED if find_spec(name) is None]


def explain(names: list[str]) -> str:
    """Say what is missing and how to bring it to a machine without a network."""
    lines = [f"missing: {name}, which is needed by {NEEDED[name]}" for name in names]
    packages = " ".join(name.replace("_", "-") for name in names)
    lines += [
        "on a machine with a network, with the same version of Python:",
        f"  pip install --no-deps --target deps {packages}",
        "then here, with the folder beside the sources:",
        "  PYTHONPATH=src:deps python benchmarks/gpu/run.py",
    ]
    return "\n".join(lines)
