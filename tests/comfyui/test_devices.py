"""Virtual graphics cards inside a real ComfyUI: each counts what lands on it."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from tests.comfyui.cards import (
    LINE,
    PLENTY,
    core,
    empty,
    give_room,
    lined,
    live,
    new_seed,
    on_cards,
    ours,
)
from tests.comfyui.graphs import (
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
from tests.comfyui.needs import need_node, tree_of
from tests.comfyui.server import Refused, Server

pytestmark = pytest.mark.slow

MIB = 1 << 20


@pytest.fixture(params=["flux", "wan"])
def model(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue("flux") if request.param == "flux" else request.param)


@pytest.mark.parametrize(
    ("kit", "shares"),
    [
        ({"expert_mode_allocations": LINE}, (0.3, 0.4, 0)),
        ({"expert_mode_allocations": "vgpu:0,0%;vgpu:1,50%;vgpu:2,50%"}, (0, 0.5, 0.5)),
        ({"expert_mode_allocations": "vgpu:0,0.5mb;vgpu:1,*"}, (0, 1, 0)),
        ({"virtual_vram_gb": 0.006, "donor_device": "vgpu:1"}, (None, None, 0)),
        ({"virtual_vram_gb": 0.0}, (1, 0, 0)),
    ],
)
def test_bytes_land_where_the_line_says(
    here: Server, model: str, kit: dict[str, Any], shares: tuple[float | None, ...]
) -> None:
    seed = new_seed()
    here.run(core(model, "core", seed))
    whole = live(here)[0]
    empty(here)
    here.run(ours(model, "ours", seed, **kit))
    here.same("ours", "core")
    cards, planned = on_cards(here, "ours")
    assert abs(sum(planned.values()) - whole) < whole / 100
    block = cards[0] - planned["vgpu:0"]  # the ring has room for some of the largest
    lent = round(0.006 * 1024 * MIB)
    wanted = [lent if share is None else share * whole for share in shares][1:]
    for found, share in zip(cards[1:], wanted, strict=True):
        assert abs(found - min(share, whole)) <= block / 2 + whole / 100
    assert (block > 0) == (planned["vgpu:0"] < sum(planned.values()))
    empty(here)


def leave_no_room(here: Server) -> None:
    """Have ComfyUI stream: with room for all it rounds the weights that a LoRA has changed."""
    if "max(128 * 1024 * 1024" in tree_of("model_management.py")[1]:
        pytest.skip("this ComfyUI loads 128 MiB in any case")
    give_room(here, 0)


def test_a_lora_has_the_bits_of_comfyuis_own_streaming(here: Server, model: str) -> None:
    seed = new_seed()
    leave_no_room(here)
    here.run(with_lora(core(model, "core", seed), model, 0.5))
    empty(here)
    give_room(here, PLENTY)
    for strength in (1.0, 0.5):
        here.run(with_lora(lined(model, "ours", seed), model, strength))
    here.same("ours", "core")
    on_cards(here, "ours")


def test_a_lora_on_a_checkpoint_has_the_bits_of_comfyuis_own_streaming(here: Server) -> None:
    make_sd15(here.base / "models")
    leave_no_room(here)
    plain = node("CheckpointLoaderSimple", ckpt_name="sd15.safetensors")
    here.run(painted(plain, "none"))
    here.run(painted(plain, "core", lora=0.7))
    empty(here)
    give_room(here, PLENTY)
    for strength in (1.0, 0.7):
        here.run(painted(split_checkpoint("vgpu:0", LINE), "ours", lora=strength))
    here.same("ours", "core")
    assert not torch.equal(here.tensors("ours")["pixels"], here.tensors("none")["pixels"])
    assert live(here)[1] > MIB


def test_models_that_alternate_leave_nothing_of_each_other(here: Server, model: str) -> None:
    for _ in range(3):
        seed = new_seed()
        here.run(core(model, "core", seed))
        here.run(lined(model, "ours", seed))
        here.same("ours", "core")
        on_cards(here, "ours")
        here.run(core("other", "core", seed))
        here.run(lined("other", "ours", seed, "vgpu:0,0b;vgpu:1,*"))
        here.same("ours", "core")
        on_cards(here, "ours")


def test_a_run_that_is_cancelled_leaves_nothing(here: Server) -> None:
    graph = lined("wan", "long", new_seed())
    graph["sampled"]["inputs"]["steps"] = 2000
    prompt = here.queue(graph)
    time.sleep(3)
    here.post("/interrupt", {})
    with pytest.raises(Refused, match="interrupted"):
        here.wait(prompt)
    empty(here)


def test_a_text_encoder_and_a_vae_on_other_cards(here: Server) -> None:
    clip = {"clip_name": "clip_l.safetensors", "type": "stable_diffusion"}
    here.run(encoded({"clip": node("CLIPLoader", **clip)}, "core_clip"))
    here.run(decoded({"vae": node("VAELoader", vae_name="taef1.safetensors")}, "core_vae"))
    empty(here)
    line = {"device": "vgpu:1", "expert_mode_allocations": "vgpu:1,50%;vgpu:2,*"}
    here.run(encoded({"clip": node("CLIPLoaderDisTorch2MultiGPU", **clip, **line)}, "ours_clip"))
    here.same("ours_clip", "core_clip")
    cards = live(here)
    assert cards[0] == 0
    assert cards[1] > 50 * MIB < cards[2]
    empty(here)
    where = {"compute_device": "vgpu:2", "expert_mode_allocations": "vgpu:2,50%;vgpu:1,*"}
    vae = node("VAELoaderDisTorch2MultiGPU", vae_name="taef1.safetensors", **where)
    here.run(decoded({"vae": vae}, "ours_vae"))
    here.same("ours_vae", "core_vae")
    cards = live(here)
    assert cards[0] == 0
    assert cards[1] > MIB < cards[2]
    empty(here)


def test_the_parts_of_a_checkpoint_on_their_cards(here: Server, flux: str) -> None:
    seed = new_seed()
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
        unet_expert_mode_allocations=LINE,
    )
    here.run(placement(sampled({"model": loader}, "ours", seed=seed), "where_ours"))
    here.same("ours", "core")
    on_cards(here, "ours")


@pytest.mark.parametrize("device", ["gpu:1", "cpu"])
def test_a_node_of_comfyuis_sends_a_placed_model_elsewhere(here: Server, device: str) -> None:
    need_node(here, "SelectModelDevice")
    seed = new_seed()
    graphs = {"core": core("wan", "core", seed), "ours": lined("wan", "ours", seed)}
    for graph in graphs.values():
        graph["loaded"] = graph["model"]
        graph["model"] = node("SelectModelDevice", model=["loaded", 0], device=device)
        here.run(graph)
    if device == "cpu":  # where 0.33 does not round a file's weights to the model's dtype
        one, other = (here.tensors(name)["samples"] for name in graphs)
        assert torch.allclose(one, other, atol=1e-5)
    else:
        here.same("ours", "core")
    where = here.json("where_ours")
    assert where["class"].startswith("Distributed")
    assert where["device"] == ("cpu" if device == "cpu" else "vgpu:1")
    assert where["bytes"]
    empty(here)


@pytest.mark.parametrize("device", ["gpu:1", "cpu"])
def test_a_node_of_comfyuis_sends_a_placed_text_encoder_elsewhere(
    here: Server, device: str
) -> None:
    need_node(here, "SelectCLIPDevice")
    clip = {"clip_name": "clip_l.safetensors", "type": "stable_diffusion"}
    line = {"device": "vgpu:0", "expert_mode_allocations": "vgpu:0,30%;vgpu:2,*"}
    loaders = {
        "core": node("CLIPLoader", **clip),
        "ours": node("CLIPLoaderDisTorch2MultiGPU", **clip, **line),
    }
    for name, loader in loaders.items():
        sent = node("SelectCLIPDevice", clip=["loaded", 0], device=device)
        here.run(encoded({"loaded": loader, "clip": sent}, name))
        if name == "core":
            empty(here)
    here.same("ours", "core")
    cards = live(here)
    assert cards[0] > 50 * MIB < cards[2], "the line is kept"
    assert (cards[1] > 0) == (device != "cpu"), "it computes where it was sent"
    empty(here)
