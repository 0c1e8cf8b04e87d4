"""What the inputs of saved workflows mean, in a real ComfyUI."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.comfyui.cards import empty, live
from tests.comfyui.graphs import Graph, Node, node, placement, sampled
from tests.comfyui.server import Refused, Server
from tests.comfyui.test_gguf import write_gguf
from tests.comfyui.test_other_loaders import models  # noqa: F401 (a fixture)

pytestmark = pytest.mark.slow

_KEY = "UNETLoaderDisTorch2MultiGPU"
_FILE = {"unet_name": "wan.safetensors", "weight_dtype": "default"}
_KIT = {
    "compute_device": "cpu",
    "virtual_vram_gb": 4.0,
    "donor_device": "cpu",
    "expert_mode_allocations": "",
    "eject_models": True,
}
_MIB = 2**20
_SEEDS = itertools.count(100)


def _placed(server: Server, loader: dict[str, Any]) -> dict[str, int]:
    """Sample with a loader; return where the weights were."""
    server.run(placement(sampled({"model": loader}, "saved", latent="wan"), "where"))
    return dict(server.json("where").get("bytes", {}))


def _legacy(server: Server, **kit: Any) -> Node:
    folder = server.base / "models" / "diffusion_models"
    if not (folder / "legacy.gguf").exists():
        write_gguf(folder / "legacy.gguf", load_file(folder / "wan.safetensors"), "Q8_0", "wan")
    return node("UnetLoaderGGUFDisTorchMultiGPU", unet_name="legacy.gguf", **kit)


@pytest.mark.parametrize(
    ("other_vram", "lender"),
    [({"use_other_vram": True}, "vgpu:1"), ({"use_other_vram": False}, "cpu"), ({}, "cpu")],
)
def test_other_cards_lend_first_if_the_user_meant_them(
    here: Server, other_vram: dict[str, bool], lender: str
) -> None:
    where = _placed(here, _legacy(here, device="vgpu:0", virtual_vram_gb=0.003, **other_vram))
    assert where.keys() == {"vgpu:0", lender}
    assert live(here)[1:] == [where.get("vgpu:1", 0), 0]


def test_memory_lends_what_other_cards_have_not(here: Server) -> None:
    sizes = here.get("/vgpu")["capacity"]
    here.post("/vgpu", {"1": 3 * _MIB, "2": 1})
    try:
        kit: dict[str, Any] = {"virtual_vram_gb": 4.0, "use_other_vram": True}
        where = _placed(here, _legacy(here, device="vgpu:0", **kit))
        assert 0 < where["vgpu:1"] <= 3 * _MIB
        assert where["cpu"] > _MIB
        assert live(here)[1:] == [where["vgpu:1"], 0]
    finally:
        empty(here)
        here.post("/vgpu", dict(enumerate(sizes)))


@pytest.mark.parametrize("eject", [True, False])
def test_an_ejected_model_leaves_its_card(
    here: Server,
    eject: bool,  # noqa: FBT001 (ComfyUI's form)
) -> None:
    kit = _KIT | {"expert_mode_allocations": ["line", 0], "eject_models": eject}
    assert bool(_loaded_after(here, _KEY, {**_FILE, **kit})) != eject
    assert (live(here)[0] > _MIB) != eject


def _loaded_after(server: Server, key: str, inputs: dict[str, Any]) -> list[str]:
    """Which models are loaded when a loader has run that comes after a sampler of another's."""
    first = node("UNETLoader", unet_name="other.safetensors", weight_dtype="default")
    seed = next(_SEEDS)  # else ComfyUI remembers the latent, and does not load for it
    graph: Graph = sampled({"model": first}, "first", latent="wan", seed=seed)
    graph["line"] = node("TextAfter", after=["sampled", 0], text="cpu,1mb;disk,*")
    graph["second"] = node(key, **inputs)
    graph["loaded"] = node("SaveLoaded", after=["second", 0], name="loaded")
    server.run(graph)
    return list(server.json("loaded"))


@pytest.mark.parametrize(("eject", "stay"), [(True, 0), (False, 1), (None, 0)])
def test_others_are_ejected_if_the_loader_says_so_or_nothing(
    server: Server,
    eject: bool | None,  # noqa: FBT001 (ComfyUI's form)
    stay: int,
) -> None:
    inputs = {**_FILE, **_KIT, "expert_mode_allocations": ["line", 0], "eject_models": eject}
    given = {name: value for name, value in inputs.items() if value is not None}
    assert _loaded_after(server, _KEY, given).count("WAN21") == stay


@pytest.mark.parametrize(("eject", "stay"), [(True, 0), (False, 1)])
def test_a_checkpoint_ejects_others_too(
    models: Server,  # noqa: F811
    eject: bool,  # noqa: FBT001 (ComfyUI's form)
    stay: int,
) -> None:
    inputs: dict[str, Any] = {"ckpt_name": "sd15.safetensors", "eject_models": eject}
    for part in ("unet", "clip"):
        inputs |= {f"{part}_compute_device": "cpu", f"{part}_donor_device": "cpu"}
        inputs[f"{part}_virtual_vram_gb"] = 0.0
    inputs |= {"vae_device": "cpu", "unet_expert_mode_allocations": ["line", 0]}
    key = "CheckpointLoaderAdvancedDisTorch2MultiGPU"
    assert _loaded_after(models, key, inputs).count("WAN21") == stay


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [
        ("cpu,2mb;disk,*", 0.1, 2.0),
        ("cpu,2mb;disk,1gb", 0.1, 2.0),
        ("cpu,0.9;disk,0.9", 15.0, 16.0),
        ("cpu,40%;disk,60%", 2.0, 6.2),
        ("cpu,0b;disk,*", 0.0, 0.0),
    ],
)
def test_an_expert_text_in_each_form(server: Server, text: str, least: float, most: float) -> None:
    where = _placed(server, node(_KEY, **_FILE, **_KIT | {"expert_mode_allocations": text}))
    assert least <= where.get("cpu", 0) / _MIB <= most, where
    whole = _placed(server, node(_KEY, **_FILE, **_KIT))
    assert sum(where.values()) == sum(whole.values())


def test_star_takes_what_is_left(server: Server) -> None:
    def in_memory(text: str) -> int:
        where = _placed(server, node(_KEY, **_FILE, **_KIT | {"expert_mode_allocations": text}))
        return where["cpu"]

    assert in_memory("cpu,1mb*;disk,2mb") > 8 * _MIB > in_memory("cpu,1mb;disk,*")


@pytest.mark.parametrize("name", list(_KIT))
def test_an_input_that_is_left_out_has_its_default(server: Server, name: str) -> None:
    listed = server.get("/object_info")[_KEY]["input"]["optional"]
    default = listed[name][1]["default"]
    line = (
        {} if name == "expert_mode_allocations" else {"expert_mode_allocations": "cpu,40%;disk,*"}
    )
    given = _KIT | line | {name: default}
    less = {other: value for other, value in given.items() if other != name}
    assert _placed(server, node(_KEY, **_FILE, **less)) == _placed(
        server, node(_KEY, **_FILE, **given)
    )


@pytest.mark.parametrize("use_other_vram", [True, False])
def test_the_legacy_node_without_another_card_keeps_all(
    server: Server,
    use_other_vram: bool,  # noqa: FBT001 (ComfyUI's form)
) -> None:
    kit: dict[str, Any] = {"virtual_vram_gb": 4.0, "use_other_vram": use_other_vram}
    legacy = _legacy(server, device="cpu", **kit)
    plain = node("UnetLoaderGGUFMultiGPU", unet_name="legacy.gguf", device="cpu")
    assert set(_placed(server, legacy)) == {"cpu"}
    ours = server.tensors("saved")["samples"]
    _placed(server, plain)
    assert torch.equal(ours, server.tensors("saved")["samples"])


@pytest.mark.parametrize(
    ("key", "file", "kit"),
    [
        (_KEY, _FILE, {"compute_device": "cpu", "donor_device": "cuda:7"}),
        (_KEY, _FILE, {"compute_device": "cuda:7"}),
        ("UNETLoaderMultiGPU", _FILE, {"device": "cuda:7"}),
        (_KEY, _FILE, {"compute_device": "cpu", "expert_mode_allocations": "cpu,1mb;cuda:7,*"}),
    ],
)
def test_a_device_of_another_machine_is_a_clear_error(
    server: Server, key: str, file: dict[str, str], kit: dict[str, str]
) -> None:
    with pytest.raises(Refused, match="cuda:7") as caught:
        _placed(server, node(key, **file, **kit))
    (error,) = (more for kind, more in caught.value.answer if kind == "execution_error")
    assert error["exception_type"].rpartition(".")[2] in {"MachineError", "AllocationError"}
