"""Every example workflow opens: its nodes exist, its links fit, its values are ones they take."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from distorch.allocation import Allocation

_ROOT = Path(__file__).parents[3]
_FILES = sorted((_ROOT / "example_workflows").glob("*.json"))
_ON_THE_PAGE = {"MarkdownNote"}  # nodes that only the browser has
_LINES = ("allocation", "expert_mode_allocations")


@pytest.fixture(scope="module", autouse=True)
def _scripts() -> Iterator[None]:
    """Let the scripts' modules be found as when they run."""
    sys.path.insert(0, str(_ROOT / "scripts"))
    yield
    sys.path.remove(str(_ROOT / "scripts"))


def _widgets(slots: list[Any]) -> list[Any]:
    """The slots that have a value in ``widgets_values``; None follows a seed."""
    found: list[Any] = []
    for slot in slots:
        if slot.is_widget:
            found += [slot, None] if slot.is_seed else [slot]
    return found


def test_there_are_enough() -> None:
    assert len(_FILES) >= 16


@pytest.mark.parametrize("path", _FILES, ids=lambda path: path.stem)
def test_opens(path: Path) -> None:
    slots_of = import_module("workflows.flow").slots_of
    graph = json.loads(path.read_text())
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert graph["version"] == 0.4
    assert path.with_suffix(".png").stat().st_size > 1000
    for node in nodes.values():
        if node["type"] not in _ON_THE_PAGE:
            slots, outputs = slots_of(node["type"])
            _check_inputs(node, slots, outputs)
            _check_values(node, _widgets(slots))
    for link, source, slot, target, entry, kind in graph["links"]:
        output, given = nodes[source]["outputs"][slot], nodes[target]["inputs"][entry]
        assert link in output["links"]
        assert given["link"] == link
        assert output["type"] == kind
        assert given["type"] == "*" or kind in given["type"].split(",")


def _check_inputs(node: dict[str, Any], slots: list[Any], outputs: tuple[str, ...]) -> None:
    types = {slot.name: slot.type for slot in slots}
    assert [output["type"] for output in node["outputs"]] == list(outputs)
    for given in node["inputs"]:
        assert types[given["name"]] == given["type"]


def _check_values(node: dict[str, Any], slots: list[Any]) -> None:
    values = node["widgets_values"]
    assert len(values) == len(slots)
    for slot, value in zip(slots, values, strict=True):
        if slot is None:
            assert value in {"fixed", "increment", "decrement", "randomize"}
            continue
        kinds: dict[str, Any] = {"INT": int, "FLOAT": (int, float), "BOOLEAN": bool}
        assert isinstance(value, kinds.get(slot.type, str)), (node["type"], slot.name, value)
        assert slot.type != "INT" or not isinstance(value, bool)
        if slot.name in _LINES and value:
            line = Allocation.parse(value)
            assert Allocation.parse(str(line)) == line
            assert str(line) == value


def test_are_as_the_script_writes_them(tmp_path: Path) -> None:
    for flow in import_module("workflows").flows():
        flow.write(tmp_path)
    written = {path.name: path.read_text() for path in tmp_path.glob("*.json")}
    assert written == {path.name: path.read_text() for path in _FILES}


def test_every_new_node_is_shown() -> None:
    from distorch.integrations.comfyui.node_texts import NODE_TEXTS

    shown = {node["type"] for path in _FILES for node in json.loads(path.read_text())["nodes"]}
    assert shown >= set(NODE_TEXTS)


def test_every_new_input_says_what_it_is() -> None:
    from distorch.integrations.comfyui.node_texts import NODE_TEXTS, input_types

    for text in NODE_TEXTS.values():
        for group in input_types(text, ["cpu"]).values():
            assert all(len(options[1]["tooltip"]) > 20 for options in group.values())


def test_help_pages_are_as_the_script_writes_them() -> None:
    pages = import_module("make_help").pages()
    folder = _ROOT / "web" / "docs"
    found = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.md")}
    assert found == pages
