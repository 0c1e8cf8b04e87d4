"""The nodes that saved workflows name, against a recorded table, without ComfyUI.

``recorded.json`` has of each class key the inputs in their order, types, defaults and limits, the
outputs and the category. ``device`` stands for a default that is the first accelerator.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from distorch.integrations.comfyui.packs import PACK_ROWS, Wrapped, wrapped_inputs
from distorch.integrations.comfyui.table import (
    GGUF_ROWS,
    OWN_TITLES,
    ROWS,
    Row,
    advanced_inputs,
    merged,
    placed_inputs,
    titles,
)

ROOT = Path(__file__).parents[3]
DEVICES = ["cpu", "cuda:0", "cuda:1"]
RECORDED: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("recorded.json").read_text(encoding="utf-8")
)
FILES = (["one.safetensors", "two.safetensors"], {"tooltip": "a file"})
OWN_DEVICE = (["default", "cpu"], {"advanced": True})


def _core(row: Row) -> dict[str, Any]:
    """What the loader below asks for by itself: the recorded inputs that no kit adds."""
    inputs = RECORDED[row.key]["inputs"]
    own = {name: FILES for name, recorded in inputs.items() if not recorded.get("kit")}
    has_device = row.base in {"CLIPLoader", "DualCLIPLoader"}
    return {"required": own} | ({"optional": {"device": OWN_DEVICE}} if has_device else {})


def _agrees(found: dict[str, dict[str, Any]], recorded: dict[str, Any]) -> None:
    for group in ("required", "optional"):
        names = [name for name, it in recorded.items() if it["group"] == group]
        assert list(found.get(group, {})) == names
    for name, it in recorded.items():
        if it.get("kit"):
            _input_agrees(found[it["group"]][name], it)


def _input_agrees(found: Any, recorded: dict[str, Any]) -> None:
    kind, options = found
    assert (kind == DEVICES) if recorded["type"] == "COMBO" else (kind == recorded["type"])
    for limit in ("min", "max", "step"):
        assert options.get(limit) == recorded.get(limit)
    default = "cuda:0" if "device" in recorded else recorded.get("default")
    if default is not None:
        assert options["default"] == default
    assert options["tooltip"]


@pytest.mark.parametrize("row", [*ROWS, *GGUF_ROWS], ids=lambda row: row.key)
def test_a_loader_has_the_inputs_that_workflows_name(row: Row) -> None:
    _agrees(merged(_core(row), row.kit, DEVICES), RECORDED[row.key]["inputs"])
    assert row.category == RECORDED[row.key]["category"]


def test_the_checkpoint_loaders_of_our_own_have_them() -> None:
    plain = RECORDED["CheckpointLoaderAdvancedMultiGPU"]["inputs"]
    _agrees(advanced_inputs(FILES, DEVICES), plain)
    split = RECORDED["CheckpointLoaderAdvancedDisTorch2MultiGPU"]["inputs"]
    _agrees(placed_inputs(FILES, DEVICES), split)


def test_every_recorded_key_is_there_and_no_other() -> None:
    keys = [row.key for row in (*ROWS, *GGUF_ROWS)] + list(OWN_TITLES)
    assert sorted(keys) == sorted(RECORDED)


def test_no_two_nodes_are_called_the_same() -> None:
    keys = [*RECORDED, *(row.key for row in PACK_ROWS)]
    assert sorted(titles()) == sorted(keys)
    assert len(set(titles().values())) == len(keys)


@pytest.mark.parametrize("row", PACK_ROWS, ids=lambda row: row.key)
def test_a_node_over_another_packs_has_its_inputs_and_a_device_at_the_end(row: Wrapped) -> None:
    own: dict[str, Any] = dict.fromkeys(row.stands_for, OWN_DEVICE)
    base = {"required": {"model": FILES}, "optional": own}
    found = wrapped_inputs(base, row, DEVICES)
    *_, last = found[row.group]
    assert last == ("offload_device" if row.waits_elsewhere else row.device)
    assert not {*row.stands_for} - {row.device} & {*found["required"], *found.get("optional", {})}
    assert own.keys() == {*row.stands_for}
    kind, options = found[row.group][row.device]
    assert kind == ("MULTIGPUDEVICE" if row.is_handed_on else DEVICES)
    assert options["tooltip"]


def test_a_loaders_own_inputs_are_left_as_they_were() -> None:
    base = {"required": {"clip_name": FILES}, "optional": {"device": OWN_DEVICE}}
    merged(base, "distorch2_clip", DEVICES)
    assert base["optional"] == {"device": OWN_DEVICE}


def test_comfyui_installs_what_the_package_needs_but_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    asked = [line for line in lines if not line.startswith("#")]
    needed = [it for it in project["dependencies"] if not it.startswith("torch")]
    assert asked == needed
