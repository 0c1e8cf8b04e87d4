"""Every example workflow in a real ComfyUI: it has the nodes, takes the graph, and runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.comfyui.graphs import Graph
from tests.comfyui.make_other import make_sd15
from tests.comfyui.needs import run_with_flux
from tests.comfyui.page import file_names, graph_of, is_on_the_page
from tests.comfyui.server import Server
from tests.comfyui.stand_ins import made_small, make_stand_in

pytestmark = pytest.mark.slow

_FILES = sorted((Path(__file__).parents[2] / "example_workflows").glob("*.json"))
_OF_OTHERS = ("WanVideo", "LoadWanVideo", "Florence2", "DownloadAndLoadFlorence2")

_LARGE = {
    "05": "ComfyUI builds LTX-Video of one size only",
    "06": "ComfyUI builds Mochi of one size only",
    "08": "it enlarges its picture to a million pixels",
}

each_example = pytest.mark.parametrize("path", _FILES, ids=lambda path: path.stem)


@each_example
def test_nodes_are_there(path: Path, server: Server) -> None:
    found = server.get("/object_info")
    for node in json.loads(path.read_text())["nodes"]:
        kind = node["type"]
        if is_on_the_page(kind) or kind.startswith(_OF_OTHERS):
            continue
        groups = found[kind]["input"]
        names = [name for group in groups.values() for name in group]
        for given in node["inputs"]:
            assert given["name"] in names, (kind, given["name"])
        outputs = [output["type"] for output in node["outputs"]]
        assert found[kind]["output"][: len(outputs)] == outputs  # newer versions give more


@pytest.fixture(scope="module")
def examples(server: Server) -> Server:
    """The server, with the models that are no stand-ins by themselves."""
    make_sd15(server.base / "models")
    return server


@each_example
def test_the_server_takes_the_graph(path: Path, examples: Server) -> None:
    graph = _graph(path, examples)
    try:
        assert examples.post("/prompt", {"prompt": graph})["node_errors"] == {}
    finally:
        examples.post("/queue", {"clear": True})
        examples.post("/interrupt", {})


@each_example
def test_it_runs_with_small_models(path: Path, examples: Server) -> None:
    if path.name[:2] in _LARGE:
        pytest.skip(_LARGE[path.name[:2]])
    done = run_with_flux(examples, made_small(_graph(path, examples)))
    assert done["status"]["completed"]


@each_example
def test_it_runs_on_cards(path: Path, here: Server) -> None:
    """With the devices that it names, of another kind, and the sizes."""
    if path.name[:2] in _LARGE:
        pytest.skip(_LARGE[path.name[:2]])
    make_sd15(here.base / "models")
    done = run_with_flux(here, made_small(_graph(path, here), "vgpu"))
    assert done["status"]["completed"]


def _graph(path: Path, server: Server) -> Graph:
    """The graph of a workflow, whose files are there; one of another pack's nodes is skipped."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    listed = server.get("/object_info")
    kinds = {node["type"] for node in workflow["nodes"]}
    missing = {kind for kind in kinds if kind not in listed and not is_on_the_page(kind)}
    if missing:
        assert all(kind.startswith(_OF_OTHERS) for kind in missing), missing
        pytest.skip(f"needs the pack that has {', '.join(sorted(missing))}")
    graph = graph_of(workflow, listed)
    for folder, name in file_names(graph):
        make_stand_in(server.base, folder, name)
    return graph
