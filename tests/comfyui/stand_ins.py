"""Small models under the names that the example workflows have, and the workflows made as small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import load_file

from tests.comfyui.graphs import Graph, node
from tests.comfyui.test_gguf import write_gguf

_LINE = "cpu,1mb;disk,*"
_SMALL = {
    "width": 64,
    "height": 64,
    "length": 5,
    "steps": 2,
    "start_at_step": 1,
    "end_at_step": 1,
    "keep_free_gb": 0.5,
}
_ALL_STEPS = 10000
_MADE_FROM_LATENTS = {"VAEDecode", "CreateVideo", "SaveVideo", "SaveImage"}


def make_stand_in(base: Path, folder: str, name: str) -> None:
    """Write a small file that ComfyUI can load, unless there is one of that name."""
    path = base / folder / name
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if folder == "input":
        Image.new("RGB", (64, 64), (64, 128, 192)).save(path)
        return
    stem = _stem(folder, name)
    source = base / folder / f"{stem}.safetensors"
    if path.suffix == ".gguf":
        write_gguf(path, load_file(source), "Q8_0", stem)
    else:
        path.symlink_to(source)


def _stem(folder: str, name: str) -> str:
    is_video = name.startswith(("wan", "hunyuan"))
    kind = folder.rpartition("/")[2]
    return {
        "diffusion_models": "wan" if is_video else "flux",
        "loras": "wan_lora" if is_video else "flux_lora",
        "text_encoders": "clip_l",
        "vae": "taef1",
        "checkpoints": "sd15",
        "controlnet": "flux_control",
    }[kind]


def made_small(graph: Graph, cards: str = "") -> Graph:
    """Return the graph for the small models; ``cards`` is the kind of card, if there are any."""
    is_video = any(it["class_type"] == "EmptyHunyuanLatentVideo" for it in graph.values())
    found = {key: _small_node(it, cards) for key, it in graph.items()}
    if not is_video:
        return found
    kept = {key: it for key, it in found.items() if it["class_type"] not in _MADE_FROM_LATENTS}
    for key, it in kept.items():
        if it["class_type"] == "CLIPTextEncode":  # of an encoder that cannot be small
            kept[key] = node("RandomConditioning", width=4096, pooled=0, seed=int(key))
    last = next(it for it in found.values() if it["class_type"] == "VAEDecode")
    return {**kept, "saved": node("SaveSamples", it=last["inputs"]["samples"], name="example")}


def _small_node(it: dict[str, Any], cards: str) -> dict[str, Any]:
    kind = it["class_type"]
    inputs: dict[str, Any] = {}
    for name, value in it["inputs"].items():
        is_an_end = name in {"start_at_step", "end_at_step"} and value in {0, _ALL_STEPS}
        if name in _SMALL and not is_an_end:
            inputs[name] = _SMALL[name]
        elif isinstance(value, str) and value.startswith("cuda:"):
            elsewhere = _LINE if "," in value else "cpu"
            inputs[name] = value.replace("cuda", cards) if cards else elsewhere
        else:
            inputs[name] = value
    if kind.startswith("DualCLIPLoader"):  # of the two, the one that can be small
        for name in ("clip_name1", "clip_name2"):
            del inputs[name]
        inputs |= {"clip_name": "clip_l.safetensors", "type": "stable_diffusion"}
        kind = kind.removeprefix("Dual")
    return {"class_type": kind, "inputs": inputs}
