"""A workflow while it is described, and the file that ComfyUI's page opens."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distorch.integrations.comfyui.kits import inputs_of
from distorch.integrations.comfyui.node_texts import NODE_TEXTS, input_types
from distorch.integrations.comfyui.table import (
    GGUF_ROWS,
    ROWS,
    advanced_inputs,
    placed_inputs,
)
from workflows.drawing import draw, place
from workflows.nodes import NODES

__all__ = ["Flow", "Node", "Slot", "Value", "slots_of"]

_DEVICES = ["cpu", "cuda:0", "cuda:1"]
_WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
_CHECKPOINT = ("MODEL", "CLIP", "VAE")


@dataclass(frozen=True, slots=True)
class Slot:
    """One input of a node: a link, or a widget with its default."""

    name: str
    type: str
    default: Any = None
    is_seed: bool = False

    @property
    def is_widget(self) -> bool:
        """Whether the page shows a field for it."""
        return self.type in _WIDGETS


def slots_of(kind: str) -> tuple[list[Slot], tuple[str, ...]]:
    """Return a node's inputs, in the order of the page, and the types of its outputs."""
    if kind in NODES:
        return _read(NODES[kind])
    if kind in NODE_TEXTS:
        made = input_types(NODE_TEXTS[kind], _DEVICES)
        return _given(made), tuple(output.type for output in NODE_TEXTS[kind].outputs)
    if kind == "CheckpointLoaderAdvancedMultiGPU":
        return _given(advanced_inputs(([],), _DEVICES)), _CHECKPOINT
    if kind == "CheckpointLoaderAdvancedDisTorch2MultiGPU":
        return _given(placed_inputs(([],), _DEVICES)), _CHECKPOINT
    (row,) = [row for row in (*ROWS, *GGUF_ROWS) if row.key == kind]
    base, outputs = _read(NODES[row.base])
    kit = _given({"optional": inputs_of(row.kit, _DEVICES)})
    return [slot for slot in base if slot.name != "device"] + kit, outputs


def _read(text: str) -> tuple[list[Slot], tuple[str, ...]]:
    inputs, _, outputs = text.partition("->")
    return [_slot(word) for word in inputs.split()], tuple(outputs.split())


def _slot(word: str) -> Slot:
    name, _, rest = word.partition(":")
    kind, _, text = rest.partition("=")
    plain = kind.rstrip("!")
    if plain in {"INT", "FLOAT", "BOOLEAN"}:
        return Slot(name, plain, json.loads(text), is_seed=kind.endswith("!"))
    return Slot(name, plain, text)


def _given(groups: dict[str, dict[str, Any]]) -> list[Slot]:
    """Read inputs as ComfyUI has them."""
    found = []
    for group in groups.values():
        for name, (kind, *options) in group.items():
            default = options[0].get("default", "") if options else ""
            found.append(Slot(name, kind if isinstance(kind, str) else "COMBO", default))
    return found


@dataclass(frozen=True, slots=True)
class Node:
    """A node of a flow; ``node[1]`` is its second output."""

    number: int
    slot: int = 0

    def __getitem__(self, slot: int) -> Node:
        return Node(self.number, slot)


Value = str | float | bool | Node  # what an input is given


@dataclass(slots=True)
class Flow:
    """A workflow while it is described: call it with a node's class and its inputs."""

    name: str
    note: str
    nodes: list[dict[str, Any]] = field(default_factory=list)
    links: list[list[Any]] = field(default_factory=list)
    names: dict[int, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Begin with the note that says what the workflow shows."""
        self._add("MarkdownNote", [self.note], [""], [], ())

    def __call__(self, kind: str, **values: Value) -> Node:
        """Add a node; an input that is not given has its default, or no link."""
        slots, outputs = slots_of(kind)
        unknown = set(values) - {slot.name for slot in slots}
        assert not unknown, f"{kind} has no {unknown}"
        widgets: list[Any] = []
        names: list[str] = []
        inputs: list[dict[str, Any]] = []
        number = len(self.nodes) + 1
        for slot in slots:
            value = values.get(slot.name, slot.default)
            if isinstance(value, Node):
                inputs.append(self._linked(slot, value, number, len(inputs)))
                value = slot.default  # what the field shows while it is linked
            if slot.is_widget:
                widgets += [value, "fixed"] if slot.is_seed else [value]
                names += [slot.name, "after a run"] if slot.is_seed else [slot.name]
            elif slot.name not in values:
                inputs.append({"name": slot.name, "type": slot.type, "link": None})
        self._add(kind, widgets, names, inputs, outputs)
        return Node(number)

    def _linked(self, slot: Slot, value: Node, number: int, entry: int) -> dict[str, Any]:
        output = self.nodes[value.number - 1]["outputs"][value.slot]
        kind, link = output["type"], len(self.links) + 1
        assert slot.type in {kind, "*", "STRING"} or kind in slot.type.split(","), slot
        output["links"].append(link)
        self.links.append([link, value.number, value.slot, number, entry, kind])
        linked = {"name": slot.name, "type": slot.type, "link": link}
        return linked | ({"widget": {"name": slot.name}} if slot.is_widget else {})

    def _add(
        self,
        kind: str,
        widgets: list[Any],
        names: list[str],
        inputs: list[Any],
        outputs: tuple[str, ...],
    ) -> None:
        number = len(self.nodes) + 1
        made = [
            {"name": name, "type": name, "links": [], "slot_index": slot}
            for slot, name in enumerate(outputs)
        ]
        self.names[number] = names
        self.nodes.append(
            {
                "id": number,
                "type": kind,
                "pos": [0, 0],
                "size": [0, 0],
                "flags": {},
                "order": 0,
                "mode": 0,
                "inputs": inputs,
                "outputs": made,
                "properties": {"Node name for S&R": kind},
                "widgets_values": widgets,
            }
        )

    def write(self, folder: Path) -> None:
        """Write the workflow and its picture."""
        place(self.nodes, self.links)
        graph = {
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": self.nodes,
            "links": self.links,
            "groups": [],
            "config": {},
            "extra": {},
            "version": 0.4,
        }
        text = json.dumps(graph, indent=1, ensure_ascii=False) + "\n"
        name = re.sub(r"[^a-z0-9.]+", "-", self.name)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
        draw(graph, self.names, folder / f"{name}.png")
