"""The new nodes inside a real ComfyUI: the same bits, and the bytes really streamed."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from tests.comfyui.graphs import Graph, decoded, encoded, node, sampled
from tests.comfyui.needs import run_with_flux
from tests.comfyui.server import Refused, Server

pytestmark = pytest.mark.slow

_LINE = "cpu,1mb;disk,*"
_PARTS = {
    "DistorchPlaceModel": "model",
    "DistorchPlaceCLIP": "clip",
    "DistorchPlaceVAE": "vae",
}


def _place(kind: str, name: str, line: str = _LINE) -> dict[str, Any]:
    return node(kind, **{_PARTS[kind]: [name, 0]}, allocation=line, compute="auto", ring="")


def _lora(name: str, model: str, strength: float) -> dict[str, Any]:
    file = f"{model}_lora.safetensors"
    return node("LoraLoaderModelOnly", model=[name, 0], lora_name=file, strength_model=strength)


def _run(server: Server, parts: Graph, name: str, model: str) -> dict[str, Any]:
    """Sample with the node ``model`` of ``parts``, and report on it."""
    file = node("UNETLoader", unet_name=f"{model}.safetensors", weight_dtype="default")
    latent = "flux" if model == "flux" else "wan"
    graph = sampled({"file": file, **parts}, name, latent=latent)
    graph["report"] = node("DistorchReport", model=["model", 0], after=["sampled", 0])
    return server.run(graph)


def _streamed_mib(history: dict[str, Any]) -> float:
    """What the report says was streamed."""
    (text,) = history["outputs"]["report"]["text"]
    found = re.search(r"streamed so far +([0-9.]+) (MiB|GiB|B)", text)
    assert found is not None, text
    return float(found[1]) * {"B": 2**-20, "MiB": 1, "GiB": 1024}[found[2]]


def _equal(server: Server, one: str, other: str) -> bool:
    left, right = server.tensors(one), server.tensors(other)
    return all(torch.equal(left[name], right[name]) for name in left | right)


@pytest.fixture(scope="module", params=["flux", "wan"])
def core(server: Server, request: pytest.FixtureRequest) -> str:
    """The name of a model that ComfyUI has sampled with, plain and with a LoRA; then by halves."""
    model = str(request.param)
    file = node("UNETLoader", unet_name=f"{model}.safetensors", weight_dtype="default")
    latent = "flux" if model == "flux" else "wan"
    run_with_flux(server, sampled({"model": file}, f"new_{model}", latent=latent))
    for strength in (1.0, 0.5):
        graph = {"file": file, "model": _lora("file", model, strength)}
        server.run(sampled(graph, f"new_{model}_{strength}", latent=latent))
    return model


def test_placed_model(server: Server, core: str) -> None:
    placed = {"model": _place("DistorchPlaceModel", "file")}
    history = _run(server, placed, "new_placed", core)
    assert _equal(server, "new_placed", f"new_{core}")
    assert _streamed_mib(history) > 1


def test_lora_after_and_its_strength(server: Server, core: str) -> None:
    streamed = [0.0]
    for strength in (1.0, 0.5):
        parts = {
            "placed": _place("DistorchPlaceModel", "file"),
            "model": _lora("placed", core, strength),
        }
        history = _run(server, parts, "new_after", core)
        assert _equal(server, "new_after", f"new_{core}_{strength}")
        streamed.append(_streamed_mib(history))
    assert streamed[2] > streamed[1] > 0  # it goes on: no weight was placed again


def test_lora_before(server: Server, core: str) -> None:
    parts = {
        "adapted": _lora("file", core, 1.0),
        "model": _place("DistorchPlaceModel", "adapted"),
    }
    _run(server, parts, "new_before", core)
    assert _equal(server, "new_before", f"new_{core}_1.0")


def test_branch_that_is_not_placed(server: Server, core: str) -> None:
    _run(server, {"model": _place("DistorchPlaceModel", "file")}, "new_placed", core)
    _run_plain = {"model": _lora("file", core, 1.0)}
    file = node("UNETLoader", unet_name=f"{core}.safetensors", weight_dtype="default")
    latent = "flux" if core == "flux" else "wan"
    server.run(sampled({"file": file, **_run_plain}, "new_mixed", latent=latent))
    assert _equal(server, "new_mixed", f"new_{core}_1.0")


def test_another_line_is_followed(server: Server, core: str) -> None:
    for line in ("cpu,25%;disk,*", "disk,*", "cpu,*"):
        wanted = "cpu,0b;disk,*" if line == "disk,*" else line
        parts = {"model": _place("DistorchPlaceModel", "file", wanted)}
        history = _run(server, parts, "new_line", core)
        assert wanted in history["outputs"]["report"]["text"][0]
        assert _equal(server, "new_line", f"new_{core}")


def test_auto(server: Server, core: str) -> None:
    parts = {
        "model": node("DistorchAuto", model=["file", 0], keep_free_gb=0.1),
        "line": node("PreviewAny", source=["model", 1]),
    }
    history = _run(server, parts, "new_auto", core)
    assert history["outputs"]["line"]["text"][0].startswith("cpu,")
    assert _equal(server, "new_auto", f"new_{core}")


def test_plan_moves_nothing(server: Server, core: str) -> None:
    other = "fp8_e5m2" if core == "wan" else "fp8_e4m3fn"  # so that the file is loaded anew
    file = node("UNETLoader", unet_name=f"{core}.safetensors", weight_dtype=other)
    plan = node("DistorchPlan", model=["file", 0], allocation=_LINE)
    picture = node("PreviewImage", images=["plan", 1])
    history = server.run({"file": file, "plan": plan, "picture": picture})
    assert "disk (streamed)" in history["outputs"]["plan"]["text"][0]
    assert history["outputs"]["plan"]["images"]
    assert history["outputs"]["picture"]["images"]


def test_placed_vae(server: Server) -> None:
    loaded = node("VAELoader", vae_name="taef1.safetensors")
    server.run(decoded({"vae": loaded}, "new_core_vae"))
    placed = _place("DistorchPlaceVAE", "file", "cpu,10%;disk,*")
    server.run(decoded({"file": loaded, "vae": placed}, "new_vae"))
    assert _equal(server, "new_vae", "new_core_vae")


def test_placed_clip(server: Server) -> None:
    loaded = node("CLIPLoader", clip_name="clip_l.safetensors", type="stable_diffusion")
    server.run(encoded({"clip": loaded}, "new_core_clip"))
    graph = encoded({"file": loaded, "clip": _place("DistorchPlaceCLIP", "file")}, "new_clip")
    graph["report"] = node("DistorchReport", model=["clip", 0], after=["text", 0])
    assert _streamed_mib(server.run(graph)) > 1
    assert _equal(server, "new_clip", "new_core_clip")


def test_wrong_line_is_shown_with_a_caret(server: Server, core: str) -> None:
    with pytest.raises(Refused, match=r"\^"):
        _run(server, {"model": _place("DistorchPlaceModel", "file", "cpu,1mbb")}, "no", core)


def test_every_new_node_is_listed(server: Server) -> None:
    found = server.get("/object_info")
    for key in ("DistorchPlaceControlNet", *_PARTS, "DistorchAuto", "DistorchPlan"):
        assert found[key]["category"] == "DisTorch"
        assert found[key]["display_name"] != key
