"""Every example workflow's nodes are in a real ComfyUI, with inputs of the same names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.comfyui.server import Server

pytestmark = pytest.mark.slow

_FILES = sorted((Path(__file__).parents[2] / "example_workflows").glob("*.json"))
_ON_THE_PAGE = {"MarkdownNote"}
_OF_OTHERS = ("WanVideo", "LoadWanVideo", "Florence2", "DownloadAndLoadFlorence2")


@pytest.mark.parametrize("path", _FILES, ids=lambda path: path.stem)
def test_nodes_are_there(path: Path, server: Server) -> None:
    found = server.get("/object_info")
    for node in json.loads(path.read_text())["nodes"]:
        kind = node["type"]
        if kind in _ON_THE_PAGE or kind.startswith(_OF_OTHERS):
            continue
        groups = found[kind]["input"]
        names = [name for group in groups.values() for name in group]
        for given in node["inputs"]:
            assert given["name"] in names, (kind, given["name"])
        outputs = [output["type"] for output in node["outputs"]]
        assert found[kind]["output"][: len(outputs)] == outputs  # newer versions give more
