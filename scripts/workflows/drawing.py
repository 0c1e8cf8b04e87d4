"""Lays out a workflow for ComfyUI's page, and draws it as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["draw", "place"]

_WIDTH, _LINE, _GAP_X, _GAP_Y = 330, 22, 90, 50
_TEXT_LINES = 5
_PAPER, _BOX, _OURS, _NOTE, _INK, _QUIET = (
    "#ffffff",
    "#f1f3f5",
    "#d9ecf7",
    "#fff8d6",
    "#222222",
    "#6b6b6b",
)
_LINKS = {
    "MODEL": "#8a63d2",
    "CLIP": "#c9a400",
    "VAE": "#d64545",
    "LATENT": "#d6559b",
    "IMAGE": "#2f7fd6",
    "CONDITIONING": "#d68a2f",
}


def place(nodes: list[dict[str, Any]], links: list[list[Any]]) -> None:
    """Give every node a place: a column for each step from the loaders, and a size."""
    by_id = {node["id"]: node for node in nodes}
    column = dict.fromkeys(by_id, 0)
    for _ in nodes:
        for _, source, _, target, *_ in links:
            column[target] = max(column[target], column[source] + 1)
    tops: dict[int, int] = {}
    for order, node in enumerate(sorted(nodes, key=lambda node: column[node["id"]])):
        node["order"] = order
        at = column[node["id"]]
        lines = len(node["inputs"]) + sum(map(_lines, node["widgets_values"]))
        height = _LINE * max(lines, len(node["outputs"]), 1) + 30
        node["pos"] = [40 + at * (_WIDTH + _GAP_X), tops.get(at, 40)]
        node["size"] = [_WIDTH, height]
        tops[at] = tops.get(at, 40) + height + _GAP_Y


def _lines(value: object) -> int:
    return _TEXT_LINES if isinstance(value, str) and len(value) > 40 else 1  # noqa: PLR2004 (wraps)


def draw(graph: dict[str, Any], names: dict[int, list[str]], path: Path) -> None:
    """Write a picture of a workflow; ``names`` are the widgets of each node."""
    nodes = {node["id"]: node for node in graph["nodes"]}
    right = max(node["pos"][0] + node["size"][0] for node in nodes.values()) + 40
    bottom = max(node["pos"][1] + node["size"][1] for node in nodes.values()) + 40
    picture = Image.new("RGB", (int(right), int(bottom)), _PAPER)
    pen = ImageDraw.Draw(picture)
    for _, source, slot, target, entry, kind in graph["links"]:
        start = _socket(nodes[source], slot, is_output=True)
        end = _socket(nodes[target], entry, is_output=False)
        pen.line([start, end], fill=_LINKS.get(kind, _QUIET), width=2)
    for node in nodes.values():
        _box(pen, node, names[node["id"]])
    picture.quantize(32).save(path, optimize=True)


def _socket(node: dict[str, Any], slot: int, *, is_output: bool) -> tuple[int, int]:
    x, y = node["pos"]
    return int(x + node["size"][0] * is_output), int(y + 28 + _LINE * slot + _LINE // 2)


def _box(pen: ImageDraw.ImageDraw, node: dict[str, Any], names: list[str]) -> None:
    (x, y), (width, height) = node["pos"], node["size"]
    kind = node["type"]
    ours = kind.endswith("MultiGPU") or kind.startswith("Distorch")
    fill = _NOTE if kind == "MarkdownNote" else _OURS if ours else _BOX
    pen.rounded_rectangle((x, y, x + width, y + height), 8, fill=fill, outline="#b0b0b0")
    title = node.get("title", kind)
    pen.text((x + 10, y + 6), title[:44], fill=_INK, font=ImageFont.load_default(14))
    small, line = ImageFont.load_default(12), y + 28
    for output in range(len(node["outputs"])):
        text = node["outputs"][output]["name"]
        at = line + _LINE * output + 4
        pen.text((x + width - 8, at), text[:22], fill=_QUIET, font=small, anchor="ra")
    for entry in node["inputs"]:
        pen.text((x + 10, line + 4), entry["name"][:24], fill=_QUIET, font=small)
        line += _LINE
    for name, value in zip(names, node["widgets_values"], strict=True):
        text = f"{name}: {value}" if name else str(value)
        for part in range(_lines(value)):
            pen.text((x + 10, line + 4), text[part * 50 : part * 50 + 50], fill=_INK, font=small)
            line += _LINE
