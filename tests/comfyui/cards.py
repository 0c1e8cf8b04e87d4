"""What the tests ask of a ComfyUI with virtual graphics cards, and run on it.

ComfyUI keeps 0.8 GiB of a card for what is no model, so a card of that size and a little more has
room for the little more.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

from tests.comfyui.graphs import Graph, node, placement, sampled
from tests.comfyui.server import Server

LINE = "vgpu:0,30%;vgpu:1,40%;cpu,30%"
PLENTY = 1000 << 20

_KEPT_BYTES = 858_993_460
_seeds = itertools.count(100)


def new_seed() -> int:
    """Another seed each time: ComfyUI computes again."""
    return next(_seeds)


def give_room(server: Server, nbytes: int) -> None:
    server.post("/vgpu", {"0": _KEPT_BYTES + nbytes})


def live(server: Server) -> list[int]:
    return list(server.get("/vgpu")["live"])


def empty(server: Server) -> None:
    """Let ComfyUI unload everything; nothing may be left on any card."""
    for _ in range(4):  # while a prompt ends, ComfyUI may not hear it
        if any(live(server)):
            server.post("/free", {"unload_models": True, "free_memory": True})
        until = time.monotonic() + 5
        while any(live(server)) and time.monotonic() < until:
            time.sleep(0.1)
    assert not any(live(server)), f"left on the cards: {server.get('/vgpu')}"


def core(name: str, saved: str, seed: int) -> Graph:
    loader = node("UNETLoader", unet_name=f"{name}.safetensors", weight_dtype="default")
    return sampled({"model": loader}, saved, latent=_latent(name), seed=seed)


def ours(name: str, saved: str, seed: int, **kit: Any) -> Graph:
    kit = {"compute_device": "vgpu:0", "eject_models": False, **kit}
    inputs = {"unet_name": f"{name}.safetensors", "weight_dtype": "default", **kit}
    loader = node("UNETLoaderDisTorch2MultiGPU", **inputs)
    graph = sampled({"model": loader}, saved, latent=_latent(name), seed=seed)
    return placement(graph, f"where_{saved}")


def _latent(name: str) -> str:
    return "flux" if name == "flux" else "wan"


def lined(name: str, saved: str, seed: int, line: str = LINE) -> Graph:
    return ours(name, saved, seed, expert_mode_allocations=line)


def on_cards(server: Server, name: str) -> tuple[list[int], dict[str, int]]:
    """What the cards hold, after checking it against ComfyUI's account and the plan of ``name``."""
    planned = server.json(f"where_{name}")["bytes"]
    now = server.get("/vgpu")
    assert now["live"][0] == sum(now["loaded"])
    assert now["live"][1:] == [planned.get("vgpu:1", 0), planned.get("vgpu:2", 0)]
    return now["live"], planned
