"""Virtual graphics cards inside a real ComfyUI: what lands on each is counted by the card itself.

ComfyUI keeps 0.8 GiB of a card for what is no model, so a card of that size and a little more has
room for the little more.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
import torch

from tests.comfyui.graphs import (
    Graph,
    decoded,
    encoded,
    node,
    painted,
    placement,
    sampled,
    split_checkpoint,
    with_lora,
)
from tests.comfyui.make_other import make_sd15
from tests.comfyui.server import Refused, Server

pytestmark = pytest.mark.slow

MIB = 1 << 20
_KEPT_BYTES = 858_993_460
_PLENTY = 1000 * MIB
_seeds = itertools.count(100)  # another seed each time: ComfyUI computes again
_LINE = "vgpu:0,30%;vgpu:1,40%;cpu,30%"


@pytest.fixture(params=["cards", "dynamic_cards"])
def here(request: pytest.FixtureRequest) -> Server:
    """A server with empty cards: ComfyUI's own memory manager, and DynamicVRAM."""
    server: Server = request.getfixturevalue(request.param)
    give_room(server, _PLENTY)
    empty(server)
    return server


@pytest.fixture
def flux(here: Server) -> str:
    try:
        here.run(core("flux", "known", next(_seeds)))
    except Refused as refused:
        if "size mismatch" not in str(refused):
            raise
        pytest.skip("this ComfyUI reads no sizes from a flux file, so that none can be tiny")
    empty(here)
    return "flux"


@pytest.fixture(params=["flux", "wan"])
def model(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue("flux") if request.param == "flux" else request.param)


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


def lined(name: str, saved: str, seed: int, line: str = _LINE) -> Graph:
    return ours(name, saved, seed, expert_mode_allocations=line)


def same(server: Server, left: str, right: str) -> None:
    one, other = server.tensors(left), server.tensors(right)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
        assert bool(torch.isfinite(value.float()).all()), name


def on_cards(server: Server, name: str) -> tuple[list[int], dict[str, int]]:
    """What the cards hold, after checking it against ComfyUI's account and the plan of ``name``."""
    planned = server.json(f"where_{name}")["bytes"]
    now = server.get("/vgpu")
    assert now["live"][0] == sum(loaded for loaded, _ in now["loaded"])
    assert now["live"][1:] == [planned.get("vgpu:1", 0), planned.get("vgpu:2", 0)]
    return now["live"], planned


@pytest.mark.parametrize(
    ("kit", "shares"),
    [
        ({"expert_mode_allocations": _LINE}, (0.3, 0.4, 0)),
        ({"expert_mode_allocations": "vgpu:0,0%;vgpu:1,50%;vgpu:2,50%"}, (0, 0.5, 0.5)),
        ({"expert_mode_allocations": "vgpu:0,0.5mb;vgpu:1,*"}, (0, 1, 0)),
        ({"virtual_vram_gb": 0.006, "donor_device": "vgpu:1"}, (None, None, 0)),
        ({"virtual_vram_gb": 0.0}, (1, 0, 0)),
    ],
)
def test_bytes_land_where_the_line_says(
    here: Server, model: str, kit: dict[str, Any], shares: tuple[float | None, ...]
) -> None:
    seed = next(_seeds)
    here.run(core(model, "core", seed))
    whole = live(here)[0]
    empty(here)
    here.run(ours(model, "ours", seed, **kit))
    same(here, "ours", "core")
    cards, planned = on_cards(here, "ours")
    assert abs(sum(planned.values()) - whole) < whole / 100
    block = cards[0] - planned["vgpu:0"]  # the ring has room for some of the largest
    lent = round(0.006 * 1024 * MIB)
    wanted = [lent if share is None else share * whole for share in shares][1:]
    for found, share in zip(cards[1:], wanted, strict=True):
        assert abs(found - min(share, whole)) <= block / 2 + whole / 100
    assert (block > 0) == (planned["vgpu:0"] < sum(planned.values()))
    empty(here)


def test_a_lora_has_the_bits_of_comfyuis_own_streaming(here: Server, model: str) -> None:
    seed = next(_seeds)
    give_room(here, 0)  # with room for all, ComfyUI rounds the weights that it has changed
    here.run(with_lora(core(model, "core", seed), model, 0.5))
    empty(here)
    give_room(here, _PLENTY)
    for strength in (1.0, 0.5):
        here.run(with_lora(lined(model, "ours", seed), model, strength))
    same(here, "ours", "core")
    on_cards(here, "ours")


def test_a_lora_on_a_checkpoint_has_the_bits_of_comfyuis_own_streaming(here: Server) -> None:
    make_sd15(here.base / "models")
    give_room(here, 0)
    plain = node("CheckpointLoaderSimple", ckpt_name="sd15.safetensors")
    here.run(painted(plain, "none"))
    here.run(painted(plain, "core", lora=0.7))
    empty(here)
    give_room(here, _PLENTY)
    for strength in (1.0, 0.7):
        here.run(painted(split_checkpoint("vgpu:0", _LINE), "ours", lora=strength))
    same(here, "ours", "core")
    assert not torch.equal(here.tensors("ours")["pixels"], here.tensors("none")["pixels"])
    assert live(here)[1] > MIB


def test_models_that_alternate_leave_nothing_of_each_other(here: Server, model: str) -> None:
    for _ in range(3):
        seed = next(_seeds)
        here.run(core(model, "core", seed))
        here.run(lined(model, "ours", seed))
        same(here, "ours", "core")
        on_cards(here, "ours")
        here.run(core("other", "core", seed))
        here.run(lined("other", "ours", seed, "vgpu:0,0b;vgpu:1,*"))
        same(here, "ours", "core")
        on_cards(here, "ours")


def test_a_run_that_is_cancelled_leaves_nothing(here: Server) -> None:
    graph = lined("wan", "long", next(_seeds))
    graph["sampled"]["inputs"]["steps"] = 2000
    prompt = here.queue(graph)
    time.sleep(3)
    here.post("/interrupt", {})
    with pytest.raises(Refused, match="interrupted"):
        here.wait(prompt)
    empty(here)


def test_a_model_keeps_within_the_room_that_comfyui_has(here: Server, flux: str) -> None:
    model = flux  # the largest block of this wan is half of it
    asked = lined(model, "ours", next(_seeds))
    here.run(asked)
    whole = live(here)[0]
    for part in (0.9, 0.75, 0.65):
        seed, room = next(_seeds), int(whole * part)
        if part != 0.75:  # once it is on the card already, and gives up some
            empty(here)
        give_room(here, room)
        here.run(lined(model, "ours", seed))
        assert 0 < live(here)[0] <= room
        on_cards(here, "ours")
    give_room(here, _PLENTY)
    here.run(core(model, "core", seed))
    same(here, "ours", "core")
    assert "ComfyUI has room for" in here.log


def test_it_goes_back_to_the_line_when_there_is_room_again(here: Server, flux: str) -> None:
    model = flux
    here.run(lined(model, "ours", next(_seeds)))
    cards, planned = on_cards(here, "ours")
    give_room(here, cards[0] - 1)
    here.run(lined(model, "ours", next(_seeds)))
    assert 0 < live(here)[0] < cards[0]
    give_room(here, _PLENTY)
    here.run(lined(model, "ours", next(_seeds)))
    assert live(here) == cards
    assert on_cards(here, "ours")[1] == planned


def test_two_models_share_a_small_card(here: Server, flux: str) -> None:
    def both(seed: int) -> Graph:
        graphs = {
            "a": lined(flux, "a", seed),
            "b": lined(flux, "b", seed, "vgpu:0,40%;vgpu:2,*"),
        }
        return {
            f"{prefix}{key}": {**each, "inputs": _prefixed(prefix, each["inputs"])}
            for prefix, graph in graphs.items()
            for key, each in graph.items()
        }

    seed = next(_seeds)
    here.run(both(seed))
    together = live(here)[0]
    empty(here)
    room = together * 3 // 4
    give_room(here, room)
    for seed in (next(_seeds), next(_seeds)):
        here.run(both(seed))
        now = here.get("/vgpu")
        assert now["live"][0] == sum(loaded for loaded, _ in now["loaded"]) <= room
    give_room(here, _PLENTY)
    here.run(core(flux, "core", seed))
    same(here, "a", "core")
    same(here, "b", "core")


def _prefixed(prefix: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """Let a node's links lead to the nodes of its own graph."""
    return {
        key: [f"{prefix}{value[0]}", value[1]] if isinstance(value, list) else value
        for key, value in inputs.items()
    }


def test_a_text_encoder_and_a_vae_on_other_cards(here: Server) -> None:
    clip = {"clip_name": "clip_l.safetensors", "type": "stable_diffusion"}
    here.run(encoded({"clip": node("CLIPLoader", **clip)}, "core_clip"))
    here.run(decoded({"vae": node("VAELoader", vae_name="taef1.safetensors")}, "core_vae"))
    empty(here)
    line = {"device": "vgpu:1", "expert_mode_allocations": "vgpu:1,50%;vgpu:2,*"}
    here.run(encoded({"clip": node("CLIPLoaderDisTorch2MultiGPU", **clip, **line)}, "ours_clip"))
    same(here, "ours_clip", "core_clip")
    cards = live(here)
    assert cards[0] == 0
    assert cards[1] > 50 * MIB < cards[2]
    empty(here)
    where = {"compute_device": "vgpu:2", "expert_mode_allocations": "vgpu:2,50%;vgpu:1,*"}
    vae = node("VAELoaderDisTorch2MultiGPU", vae_name="taef1.safetensors", **where)
    here.run(decoded({"vae": vae}, "ours_vae"))
    same(here, "ours_vae", "core_vae")
    cards = live(here)
    assert cards[0] == 0
    assert cards[1] > MIB < cards[2]
    empty(here)


def test_the_parts_of_a_checkpoint_on_their_cards(here: Server, flux: str) -> None:
    seed = next(_seeds)
    here.run(core(flux, "core", seed))
    empty(here)
    loader = node(
        "CheckpointLoaderAdvancedDisTorch2MultiGPU",
        ckpt_name="flux.safetensors",
        unet_compute_device="vgpu:0",
        unet_virtual_vram_gb=0.0,
        unet_donor_device="cpu",
        clip_compute_device="cpu",
        clip_virtual_vram_gb=0.0,
        clip_donor_device="cpu",
        vae_device="vgpu:2",
        unet_expert_mode_allocations=_LINE,
    )
    here.run(placement(sampled({"model": loader}, "ours", seed=seed), "where_ours"))
    same(here, "ours", "core")
    on_cards(here, "ours")


@pytest.mark.parametrize("device", ["gpu:1", "cpu"])
def test_a_node_of_comfyuis_sends_a_placed_model_elsewhere(here: Server, device: str) -> None:
    try:
        kinds = here.get("/object_info/SelectModelDevice")
    except OSError:
        kinds = {}
    if not kinds:
        pytest.skip("this ComfyUI has no such node")
    seed = next(_seeds)
    graphs = {"core": core("wan", "core", seed), "ours": lined("wan", "ours", seed)}
    for graph in graphs.values():
        graph["loaded"] = graph["model"]
        graph["model"] = node("SelectModelDevice", model=["loaded", 0], device=device)
        here.run(graph)
    same(here, "ours", "core")
    where = here.json("where_ours")
    assert where["class"].startswith("Distributed")
    assert where["device"] == ("cpu" if device == "cpu" else "vgpu:1")
    assert where["bytes"]
    empty(here)
