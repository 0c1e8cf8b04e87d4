"""The loaders beside the usual ones in a real ComfyUI: what ComfyUI's own give, from each place."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.comfyui.graphs import Graph, encoded, node
from tests.comfyui.make_other import make_encoders, make_sd15
from tests.comfyui.server import Server

pytestmark = pytest.mark.slow

_LINE = "cpu,1mb;disk,*"
_CHECKPOINT = {"ckpt_name": "sd15.safetensors"}
_CLIPS = ("clip_l", "clip_g", "t5xxl", "llama")


@pytest.fixture(scope="module")
def models(server: Server) -> Server:
    make_sd15(server.base / "models")
    make_encoders(server.base / "models")
    return server


def _same(server: Server, ours: str, core: str) -> None:
    left, right = server.tensors(ours), server.tensors(core)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name
        assert bool(torch.isfinite(value.float()).all()), name


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
        _same(models, "ours_clips", "core_clips")


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
        _same(models, "ours_vision", "core_vision")


def _painted(loader: dict[str, Any], name: str, **control: Any) -> Graph:
    """Encode, sample and decode with a loader of all three; ``control`` is a ControlNet's node."""
    found = {
        "model": loader,
        "text": node("CLIPTextEncode", text="a cat", clip=["model", 1]),
        "empty": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "sampled": node(
            "KSampler",
            model=["model", 0],
            positive=["text", 0],
            negative=["text", 0],
            latent_image=["empty", 0],
            seed=3,
            steps=2,
            cfg=2.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        ),
        "pixels": node("VAEDecode", samples=["sampled", 0], vae=["model", 2]),
        "saved": node("SavePixels", it=["pixels", 0], name=name),
    }
    if control:
        found |= control
        found["picture"] = node("EmptyImage", width=64, height=64, batch_size=1, color=0x4080C0)
        found["guided"] = node(
            "ControlNetApplyAdvanced",
            positive=["text", 0],
            negative=["text", 0],
            control_net=["control", 0],
            image=["picture", 0],
            strength=1.0,
            start_percent=0.0,
            end_percent=1.0,
        )
        found["sampled"]["inputs"] |= {"positive": ["guided", 0], "negative": ["guided", 1]}
    return found


@pytest.mark.parametrize(
    ("base", "inputs"),
    [("CheckpointLoaderSimple", _CHECKPOINT), ("DiffusersLoader", {"model_path": "sd15"})],
)
def test_a_loader_of_all_parts(models: Server, base: str, inputs: dict[str, str]) -> None:
    models.run(_painted(node(base, **inputs), "core_all"))
    for loader in (_split(base, **inputs), _whole(base, **inputs)):
        models.run(_painted(loader, "ours_all"))
        _same(models, "ours_all", "core_all")


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
    models.run(_painted(core, "plain"))
    models.run(_painted(core, "core_guided", control=node(base, **inputs)))
    pictures = [models.tensors(name)["pixels"] for name in ("plain", "core_guided")]
    assert not torch.equal(*pictures), "it guides"
    for model, control in (
        (core, _split(base, **inputs)),
        (core, _whole(base, **inputs)),
        (placed, _split(base, eject_models=False, **inputs)),
        (placed, node(base, **inputs)),
    ):
        models.run(_painted(model, "ours_guided", control=control))
        _same(models, "ours_guided", "core_guided")
