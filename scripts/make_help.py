"""Writes web/docs/: a help page in English and Chinese for each node, from the node tables."""
# ruff: noqa: INP001, RUF001, E501  (a script; Chinese punctuation; one text a line)

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(_ROOT / "src")]

from help_words import ABOUT, BASES, INPUTS, TITLES  # noqa: E402

from distorch.integrations.comfyui import table  # noqa: E402
from distorch.integrations.comfyui.kits import inputs_of  # noqa: E402
from distorch.integrations.comfyui.node_texts import NODE_TEXTS, input_types  # noqa: E402

__all__ = ["pages"]

_DEVICES = ["cpu", "cuda:0"]
_OWN = {
    "CheckpointLoaderAdvancedMultiGPU": "Loads a checkpoint, each of its parts on a device of its own.",
    "CheckpointLoaderAdvancedDisTorch2MultiGPU": "Loads a checkpoint; the weights of its model and "
    "of its text encoder rest in several memories, the VAE is whole on one device.",
    "DeviceSelectorMultiGPU": "Names a device for the nodes behind it.",
    "UNetLoaderLP": "Loads a diffusion model as ComfyUI does. Kept for workflows that name it.",
}
_LINE = {
    "en": "The line: devices in the order of preference, each with an amount, such as "
    "`cuda:0,4gb;cpu,*`, `cuda:0,30%;cuda:1,*`, `cuda:0,0b;disk,*`, or `auto`. The first computes, unless the node has a device of its own for that.",
    "zh": "分配行：按优先顺序列出设备，各带一个数量，例如 `cuda:0,4gb;cpu,*`、`cuda:0,30%;cuda:1,*`、"
    "`cuda:0,0b;disk,*` 或 `auto`。第一个设备计算，除非节点另有选择计算设备的输入。",
}
_HEADS = {
    "en": (
        "Input",
        "Default",
        "What it is",
        "The other inputs are those of ComfyUI's loader, or of the GGUF loader.",
    ),
    "zh": ("输入", "默认值", "含义", "其余输入与 ComfyUI 的加载器（或 GGUF 加载器）相同。"),
}


def pages() -> dict[str, str]:
    """Return every page by its path under ``web/docs``."""
    found: dict[str, str] = {}
    titles = table.titles()
    for row in (*table.ROWS, *table.GGUF_ROWS):
        things = BASES[row.base]
        abouts = [
            text.format(thing=thing) for text, thing in zip(ABOUT[row.kit], things, strict=True)
        ]
        _add(found, row.key, row.title, abouts, inputs_of(row.kit, _DEVICES), is_over_loader=True)
    for key, english in _OWN.items():
        _add(found, key, titles[key], [english, TITLES[key]], _own_inputs(key))
    for key, text in NODE_TEXTS.items():
        inputs = _flat(input_types(text, _DEVICES))
        _add(found, key, text.title, [text.description, TITLES[key]], inputs)
    return found


def _own_inputs(key: str) -> dict[str, Any]:
    names: Any = ([], {"tooltip": "The file."})
    if key == "CheckpointLoaderAdvancedMultiGPU":
        return _flat(table.advanced_inputs(names, _DEVICES))
    if key == "CheckpointLoaderAdvancedDisTorch2MultiGPU":
        return _flat(table.placed_inputs(names, _DEVICES))
    if key == "DeviceSelectorMultiGPU":
        return {"device": (_DEVICES, {"tooltip": "The device that the nodes behind this one use."})}
    return {"unet_name": names}


def _flat(groups: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {name: given for group in groups.values() for name, given in group.items()}


def _add(
    found: dict[str, str],
    key: str,
    title: str,
    abouts: list[str],
    inputs: dict[str, Any],
    *,
    is_over_loader: bool = False,
) -> None:
    """Add a node's pages; ``abouts`` says what it does, in English and in Chinese."""
    tooltips = {name: given[1].get("tooltip", "") for name, given in inputs.items()}
    chinese = {name: INPUTS[name] for name in inputs}
    found[f"{key}.md"] = _page(
        "en", title, abouts[0], inputs, tooltips, is_over_loader=is_over_loader
    )
    found[f"{key}/zh.md"] = _page(
        "zh", title, abouts[1], inputs, chinese, is_over_loader=is_over_loader
    )


def _page(
    language: str,
    title: str,
    about: str,
    inputs: dict[str, Any],
    words: dict[str, str],
    *,
    is_over_loader: bool,
) -> str:
    name, default, meaning, others = _HEADS[language]
    rows = [f"# {title}", "", about, "", f"| {name} | {default} | {meaning} |", "|---|---|---|"]
    for key, (_, options) in inputs.items():
        value = options.get("default", "")
        shown = f"`{value}`" if value != "" else ""
        rows.append(f"| `{key}` | {shown} | {words[key]} |")
    if is_over_loader:
        rows += ["", others]
    if any("alloc" in key for key in inputs):
        rows += ["", _LINE[language]]
    return "\n".join(rows) + "\n"


def main() -> None:
    """Write all of them."""
    for path, text in pages().items():
        target = _ROOT / "web" / "docs" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
