"""What a real ComfyUI says of the nodes, against the recorded table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.comfyui.server import Server

pytestmark = pytest.mark.slow

_RECORDED = Path(__file__).parents[1] / "integrations" / "comfyui" / "recorded.json"


def test_every_recorded_node_is_listed_with_its_inputs(server: Server) -> None:
    listed = server.get("/object_info")
    for key, recorded in json.loads(_RECORDED.read_text(encoding="utf-8")).items():
        found = listed[key]
        assert found["category"] == recorded["category"], key
        assert list(found["output"]) == recorded["output"], key
        for group in ("required", "optional"):
            inputs = found["input"].get(group, {})
            ours = [name for name in inputs if name in recorded["inputs"]]
            assert ours == [n for n, i in recorded["inputs"].items() if i["group"] == group], key
            for name in ours:
                _check_input(inputs[name], recorded["inputs"][name], f"{key}.{name}")


def _check_input(found: Any, recorded: dict[str, Any], where: str) -> None:
    kind, *options = found
    options = options[0] if options else {}
    if recorded["type"] == "COMBO":
        assert isinstance(kind, list) or kind == "COMBO", where
    else:
        assert kind == recorded["type"], where
    for name, value in recorded.items():
        if name in {"default", "min", "max", "step"}:
            assert options[name] == value, where


def test_every_input_of_ours_has_a_tooltip_and_every_node_a_name(server: Server) -> None:
    listed = server.get("/object_info")
    for key, recorded in json.loads(_RECORDED.read_text(encoding="utf-8")).items():
        assert listed[key]["display_name"] != key
        assert listed[key]["description"]
        for name, recorded_input in recorded["inputs"].items():
            if recorded_input.get("kit"):
                group = listed[key]["input"][recorded_input["group"]]
                assert group[name][1]["tooltip"], f"{key}.{name}"
