"""The loaders beside the usual ones in a real ComfyUI: what ComfyUI's own give, from each place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.comfyui.graphs import Graph, encoded, node, painted, split_checkpoint
from tests.comfyui.make_other import make_encoders, make_sd15
from tests.comfyui.server import Server
from tests.comfyui.test_gguf import write_gguf

pytestmark = pytest.mark.slow

_LINE = "cpu,1mb;disk,*"
_CHECKPOINT = {"ckpt_name": "sd15.safetensors"}
_CLIPS = ("clip_l", "clip_g", "t5xxl", "llama")


@pytest.fixture(scope="module")
def models(server: Server) -> Server:
    make_sd15(server.base / "models")
    make_encoders(server.base / "models")
    return server


def _split(base: str, device: str = "compute_device", **inputs: Any) -> dict[str, Any]:
    """The node that splits what ``base`` loads."""
    inputs |= {device: "cpu", "expert_mode_allocations": _LINE}
    return node(f"{base}DisTorch2MultiGPU", **inputs)


def _whole(base: str, **inputs: Any) -> dict[str, Any]:
    return node(f"{base}MultiGPU", device="cpu", **inputs)


@pytest.mark.parametrize(("count", "base"), [(3, "TripleCLIPLoader"), (4, "QuadrupleCLIPLoader")])
def test_three_and_four_text_encoders(models: Server, count: int, base: str) -> None:
    names = {f"clip_name{i}": f"{it}.safetensors" for i, it in enumerate(_CLIPS[:count], 1)}
    models.run(encoded({"clip": node(base, **names)}, "core_clips"))
    for loader in (_split(base, "device", **names), _whole(base, **names)):
        models.run(encoded({"clip": loader}, "ours_clips"))
        models.same("ours_clips", "core_clips")


def test_clip_vision(models: Server) -> None:
    def graph(loader: dict[str, Any], name: str) -> Graph:
        picture = node("EmptyImage", width=64, height=64, batch_size=1, color=0x4080C0)
        seen = node(
            "CLIPVisionEncode", clip_vision=["vision", 0], image=["picture", 0], crop="none"
        )
        saved = node("SaveVision", it=["seen", 0], name=name)
        return {"vision": loader, "picture": picture, "seen": seen, "saved": saved}

    names, base = {"clip_name": "vit_l.safetensors"}, "CLIPVisionLoader"
    models.run(graph(node(base, **names), "core_vision"))
    for loader in (_split(base, "device", **names), _whole(base, **names)):
        models.run(graph(loader, "ours_vision"))
        models.same("ours_vision", "core_vision")


@pytest.mark.parametrize(
    ("base", "inputs"),
    [("CheckpointLoaderSimple", _CHECKPOINT), ("DiffusersLoader", {"model_path": "sd15"})],
)
def test_a_loader_of_all_parts(models: Server, base: str, inputs: dict[str, str]) -> None:
    models.run(painted(node(base, **inputs), "core_all"))
    for loader in (_split(base, **inputs), _whole(base, **inputs)):
        models.run(painted(loader, "ours_all"))
        models.same("ours_all", "core_all")


@pytest.mark.parametrize(
    ("base", "inputs"),
    [
        ("ControlNetLoader", {"control_net_name": "sd15.safetensors"}),
        (
            "DiffControlNetLoader",
            {"control_net_name": "sd15_diff.safetensors", "model": ["model", 0]},
        ),
    ],
)
def test_a_control_net_guides_a_model_that_is_placed_or_not(
    models: Server, base: str, inputs: dict[str, Any]
) -> None:
    core = node("CheckpointLoaderSimple", **_CHECKPOINT)
    placed = _split("CheckpointLoaderSimple", **_CHECKPOINT)
    models.run(painted(core, "plain"))
    models.run(painted(core, "core_guided", control=node(base, **inputs)))
    pictures = [models.tensors(name)["pixels"] for name in ("plain", "core_guided")]
    assert not torch.equal(*pictures), "it guides"
    for model, control in (
        (core, _split(base, **inputs)),
        (core, _whole(base, **inputs)),
        (placed, _split(base, eject_models=False, **inputs)),
        (placed, node(base, **inputs)),
    ):
        models.run(painted(model, "ours_guided", control=control))
        models.same("ours_guided", "core_guided")


@pytest.fixture(scope="module")
def packed(models: Server) -> Server:
    """The server, with T5 in GGUF, and what its weights stand for beside it."""
    folder = models.base / "models" / "text_encoders"
    weights = load_file(folder / "t5xxl.safetensors")
    save_file(
        write_gguf(folder / "t5xxl.gguf", weights, "Q8_0", "t5"), folder / "dense.safetensors"
    )
    return models


@pytest.mark.parametrize(("count", "base"), [(3, "TripleCLIPLoader"), (4, "QuadrupleCLIPLoader")])
def test_one_of_several_text_encoders_in_gguf(packed: Server, count: int, base: str) -> None:
    names = {f"clip_name{i}": f"{it}.safetensors" for i, it in enumerate(_CLIPS[:count], 1)}
    dense, ours = names | {"clip_name3": "dense.safetensors"}, names | {"clip_name3": "t5xxl.gguf"}
    packed.run(encoded({"clip": node(base, **dense)}, "core_gguf"))
    packed.run(encoded({"clip": _whole(f"{base}GGUF", **ours)}, "resident"))
    packed.run(encoded({"clip": _split(f"{base}GGUF", "device", **ours)}, "spilled"))
    packed.same("spilled", "resident")
    for name, value in packed.tensors("core_gguf").items():  # it rounds the dense weights
        assert torch.allclose(packed.tensors("resident")[name], value, atol=0.01)


def test_a_lora_on_a_checkpoint_is_the_same_bits_from_every_place(models: Server) -> None:
    """On the CPU ComfyUI's own loader rounds what a LoRA has changed: `test_devices` compares."""
    models.run(painted(node("CheckpointLoaderSimple", **_CHECKPOINT), "plain"))
    found = []
    for line in (_LINE, "cpu,50%;disk,*", "cpu,*"):
        models.run(painted(split_checkpoint("cpu", line), "ours_lora", lora=0.7))
        found.append(models.tensors("ours_lora")["pixels"])
    assert all(torch.equal(each, found[0]) for each in found)
    assert not torch.equal(found[0], models.tensors("plain")["pixels"])
