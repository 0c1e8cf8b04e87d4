"""Writes example_workflows/ from `workflows`: run it after changing a node or a workflow."""
# ruff: noqa: INP001  (a script)

from __future__ import annotations

import sys
from pathlib import Path

_ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(_ROOT / "src")]

from workflows import flows  # noqa: E402


def main() -> None:
    """Write all of them."""
    folder = _ROOT / "example_workflows"
    folder.mkdir(exist_ok=True)
    for flow in flows():
        flow.write(folder)


if __name__ == "__main__":
    main()
