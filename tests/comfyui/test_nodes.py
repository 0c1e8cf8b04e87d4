"""The nodes inside a real ComfyUI: the same bits as its own loaders give, from every place."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from tests.comfyui.graphs import (
    Graph,
    decoded,
    encoded,
    guided,
    node,
    placement,
    sampled,
    with_lora,
)
from tests.comfyui.needs import run_with_flux
from tests.comfyui.server import Refused, Server

pytestmark = pytest.mark.slow

_LINE = "cpu,1mb;disk,*"
LINES = (_LINE, "cpu,40%;disk,*", "disk,*", "cpu,*")


def _model(name: str, **kit: Any) -> Graph:
    values: dict[str, Any] = {"unet_name": f"{name}.safetensors", "weight_dtype": "default"}
    if not kit:
        return {"model": node("UNETLoader", **values)}
    values |= {"compute_device": "cpu", "eject_models": False}
    return {"model": node("UNETLoaderDisTorch2MultiGPU", **values, **kit)}


def _sampled(model: str, name: str, **more: Any) -> Graph:
    """Sample with one of the models of `make.py`, placed by ``line`` unless that is left out."""
    line = more.pop("line", None)
    graph = _model(model) if line is None else _model(model, expert_mode_allocations=line)
    return sampled(graph, name, latent="flux" if model == "flux" else "wan", **more)


@pytest.fixture(scope="session")
def core(server: Server) -> Server:
    """The server, after ComfyUI's own loaders have written what they compute."""
    server.run(decoded({"vae": node("VAELoader", vae_name="taef1.safetensors")}, "core_vae"))
    clip = node("CLIPLoader", clip_name="clip_l.safetensors", type="stable_diffusion")
    server.run(encoded({"clip": clip}, "core_clip"))
    return server


@pytest.fixture(scope="session", params=["flux", "wan"])
def model(core: Server, request: pytest.FixtureRequest) -> str:
    """A diffusion model that this ComfyUI knows, sampled by its own loader."""
    name = str(request.param)
    if name == "flux":
        run_with_flux(core, _sampled("flux", "core_flux"))
    core.run(_sampled(name, f"core_{name}"))
    for strength in (0.5, 1.0):
        core.run(with_lora(_sampled(name, f"core_{name}_{strength}"), name, strength))
    return name


@pytest.mark.parametrize("line", LINES)
def test_a_diffusion_model_is_the_same_bits_from_every_place(
    core: Server, model: str, line: str
) -> None:
    core.run(placement(_sampled(model, "ours", line=line), "where"))
    core.same("ours", f"core_{model}")
    where = core.json("where")
    assert where["class"].startswith("Distributed")
    assert set(where["bytes"]) <= {"cpu", "disk"}
    assert ("disk" in where["bytes"]) == ("disk" in line)


@pytest.mark.parametrize("line", LINES)
def test_a_text_encoder_is_the_same_bits_from_every_place(core: Server, line: str) -> None:
    clip = node(
        "CLIPLoaderDisTorch2MultiGPU",
        clip_name="clip_l.safetensors",
        type="stable_diffusion",
        device="cpu",
        expert_mode_allocations=line,
    )
    core.run(encoded({"clip": clip}, "ours_clip"))
    core.same("ours_clip", "core_clip")


@pytest.mark.parametrize("line", LINES)
def test_a_vae_is_the_same_bits_from_every_place(core: Server, line: str) -> None:
    vae = node(
        "VAELoaderDisTorch2MultiGPU",
        vae_name="taef1.safetensors",
        compute_device="cpu",
        expert_mode_allocations=line,
    )
    core.run(decoded({"vae": vae}, "ours_vae"))
    core.same("ours_vae", "core_vae")


def test_a_node_with_a_device_only_is_comfyuis_own_loading(core: Server, model: str) -> None:
    graph = _sampled(model, "ours_device")
    graph["model"] = node("UNETLoaderMultiGPU", device="cpu", **graph["model"]["inputs"])
    core.run(placement(graph, "where_device"))
    core.same("ours_device", f"core_{model}")
    assert core.json("where_device") == {"class": "ModelPatcher", "device": "cpu"}


def test_inputs_that_are_left_out_have_their_defaults(core: Server, model: str) -> None:
    graph = _sampled(model, "ours_bare")
    graph["model"]["class_type"] = "UNETLoaderDisTorch2MultiGPU"
    core.run(graph)
    core.same("ours_bare", f"core_{model}")


def test_a_loras_strength_changes_without_a_reload(core: Server, model: str) -> None:
    places = []
    for strength in (0.5, 1.0, 0.5):
        graph = placement(_sampled(model, "ours_lora", line=_LINE), "where_lora")
        core.run(with_lora(graph, model, strength))
        core.same("ours_lora", f"core_{model}_{strength}")
        places.append(core.json("where_lora"))
    assert len({place["id"] for place in places}) == 1, "the weights were placed once"
    steps = [place["steps"] for place in places]
    assert steps == sorted(set(steps))


def test_two_models_alternate(core: Server, model: str) -> None:
    core.run(_sampled("other", "core_other"))
    for turn in range(3):
        seed = 42 if turn else 43  # another seed: ComfyUI computes again
        core.run(_sampled(model, "ours_one", line=_LINE, seed=seed))
        core.run(_sampled("other", "ours_two", line=_LINE, seed=seed))
    core.same("ours_one", f"core_{model}")
    core.same("ours_two", "core_other")


def test_a_run_that_is_cancelled_leaves_nothing_behind(core: Server, model: str) -> None:
    prompt = core.queue(_sampled(model, "ours_long", line=_LINE, steps=2000, seed=7))
    time.sleep(2)
    core.post("/interrupt", {})
    with pytest.raises(Refused, match="interrupted"):
        core.wait(prompt)
    core.run(_sampled(model, "ours_after", line=_LINE))
    core.same("ours_after", f"core_{model}")


def test_a_change_of_the_line_moves_the_weights(core: Server, model: str) -> None:
    shares = []
    for line in (_LINE, "cpu,4mb;disk,*"):
        core.run(placement(_sampled(model, "ours_moved", line=line), "where_moved"))
        core.same("ours_moved", f"core_{model}")
        shares.append(core.json("where_moved")["bytes"]["disk"])
    assert shares[0] > shares[1]


def test_other_models_are_ejected_first(core: Server, model: str) -> None:
    core.run(_sampled("other", "ejected", seed=9))
    graph = _sampled(model, "ours_ejecting", line="cpu,2mb;disk,*")
    graph["model"]["inputs"]["eject_models"] = True
    core.run(graph)
    core.same("ours_ejecting", f"core_{model}")


def test_a_control_net_is_the_same_bits(core: Server) -> None:
    def graph(loader: dict[str, Any], name: str) -> Graph:
        plain = node("RandomConditioning", width=768, pooled=768, seed=1)
        found = _sampled("flux", name) | guided("plain", 128)
        found |= {"control": loader, "plain": plain}
        found["sampled"]["inputs"]["positive"] = ["guided", 0]
        return found

    run_with_flux(core, _sampled("flux", "core_flux"))
    name = "flux_control.safetensors"
    core.run(graph(node("ControlNetLoader", control_net_name=name), "core_control"))
    for line in LINES:
        loader = node(
            "ControlNetLoaderDisTorch2MultiGPU",
            control_net_name=name,
            compute_device="cpu",
            expert_mode_allocations=line,
        )
        core.run(graph(loader, "ours_control"))
        core.same("ours_control", "core_control")
    assert not torch.equal(
        core.tensors("core_control")["samples"], core.tensors("core_flux")["samples"]
    )


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        ("CheckpointLoaderSimpleMultiGPU", {"device": "cpu"}),
        (
            "CheckpointLoaderSimpleDisTorch2MultiGPU",
            {"compute_device": "cpu", "expert_mode_allocations": "cpu,1mb;disk,*"},
        ),
        (
            "CheckpointLoaderAdvancedMultiGPU",
            {"unet_device": "cpu", "clip_device": "cpu", "vae_device": "cpu"},
        ),
        (
            "CheckpointLoaderAdvancedDisTorch2MultiGPU",
            {
                "unet_compute_device": "cpu",
                "unet_virtual_vram_gb": 4.0,
                "unet_donor_device": "cpu",
                "clip_compute_device": "cpu",
                "clip_virtual_vram_gb": 2.0,
                "clip_donor_device": "cpu",
                "vae_device": "cpu",
                "unet_expert_mode_allocations": "cpu,1mb;disk,*",
            },
        ),
    ],
)
def test_a_checkpoint_is_the_same_bits(core: Server, kind: str, inputs: dict[str, Any]) -> None:
    run_with_flux(core, _sampled("flux", "core_flux"))
    name = "flux.safetensors"

    def graphs(loader: dict[str, Any], prefix: str) -> list[Graph]:
        vae = {"model": loader, **decoded({}, f"{prefix}_vae")}
        vae["pixels"]["inputs"]["vae"] = ["model", 2]
        return [sampled({"model": loader}, f"{prefix}_model", latent="flux"), vae]

    for graph in graphs(node("CheckpointLoaderSimple", ckpt_name=name), "core_ckpt"):
        core.run(graph)
    for graph in graphs(node(kind, ckpt_name=name, **inputs), "ours_ckpt"):
        core.run(graph)
    core.same("ours_ckpt_model", "core_ckpt_model")
    core.same("ours_ckpt_vae", "core_ckpt_vae")


def test_a_device_of_another_machine_is_named_when_the_node_runs(core: Server) -> None:
    graph = _sampled("wan", "nothing", line=_LINE)
    graph["model"]["inputs"]["compute_device"] = "cuda:7"
    with pytest.raises(Refused, match=r"asks for 'cuda:7', and this machine has cpu") as caught:
        core.run(graph)
    assert "choose cpu in the node" in str(caught.value)


def test_a_line_with_a_fault_shows_the_place(core: Server) -> None:
    with pytest.raises(Refused, match=r"unknown unit 'gbb'"):
        core.run(_sampled("wan", "nothing", line="cpu,2gbb"))


def test_a_text_that_names_no_device_is_refused_before(core: Server) -> None:
    graph = _sampled("wan", "nothing", line=_LINE)
    graph["model"]["inputs"]["compute_device"] = "the left one"
    with pytest.raises(Refused, match="is no name of a device"):
        core.run(graph)
