"""What a test needs that not every ComfyUI has; else it is skipped."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.comfyui.graphs import Graph
from tests.comfyui.server import Refused, Server


def tree_of(name: str) -> tuple[Path, str]:
    """Return ComfyUI's folder, and the text of one of its files."""
    tree = os.environ.get("COMFYUI_DIR")
    if not tree or not os.environ.get("COMFYUI_PYTHON"):
        pytest.skip("needs COMFYUI_DIR, a ComfyUI, and COMFYUI_PYTHON, an interpreter that runs it")
    return Path(tree), (Path(tree) / "comfy" / name).read_text(encoding="utf-8")


def need_node(server: Server, kind: str) -> None:
    if kind not in server.get("/object_info"):
        pytest.skip(f"this ComfyUI has no {kind}")


def run_with_flux(server: Server, graph: Graph) -> dict[str, Any]:
    """Run a graph that may have a small flux, which some versions know in its full size only."""
    try:
        return server.run(graph)
    except Refused as refused:
        if not any(words in str(refused) for words in ("size mismatch", "by num_heads")):
            raise
        pytest.skip("this ComfyUI reads no sizes from a flux file, so that none can be tiny")
