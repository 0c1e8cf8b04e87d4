"""What a test needs that not every ComfyUI has; else it is skipped."""

from __future__ import annotations

import pytest

from tests.comfyui.graphs import Graph
from tests.comfyui.server import Refused, Server


def need_node(server: Server, kind: str) -> None:
    if kind not in server.get("/object_info"):
        pytest.skip(f"this ComfyUI has no {kind}")


def need_flux(server: Server, graph: Graph) -> None:
    """Run a graph with a small flux, which some versions know in its full size only."""
    try:
        server.run(graph)
    except Refused as refused:
        if not any(words in str(refused) for words in ("size mismatch", "by num_heads")):
            raise
        pytest.skip("this ComfyUI reads no sizes from a flux file, so that none can be tiny")
