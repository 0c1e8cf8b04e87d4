"""What ComfyUI's page makes of a saved workflow: the graph that its server runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tests.comfyui.graphs import Graph

_WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}
_FOLDERS = {
    "unet_name": "models/diffusion_models",
    "clip_name": "models/text_encoders",
    "clip_name1": "models/text_encoders",
    "clip_name2": "models/text_encoders",
    "vae_name": "models/vae",
    "ckpt_name": "models/checkpoints",
    "lora_name": "models/loras",
    "control_net_name": "models/controlnet",
    "image": "input",
}


def graph_of(workflow: Mapping[str, Any], listed: Mapping[str, Any]) -> Graph:
    """Return a saved workflow as a graph; ``listed`` is what the server says of its nodes.

    A node of ComfyUI's own may have got fields since, or lost them: then the defaults apply.

    Raises:
        ValueError: a node of a pack has not as many values saved as it has fields.
    """
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    return {
        str(node["id"]): {
            "class_type": node["type"],
            "inputs": _values(node, listed[node["type"]])
            | {
                given["name"]: sources[given["link"]]
                for given in node["inputs"]
                if given.get("link") is not None
            },
        }
        for node in workflow["nodes"]
        if not is_on_the_page(node["type"])
    }


def _values(node: Mapping[str, Any], kind: Mapping[str, Any]) -> dict[str, Any]:
    names, values = list(_fields(kind)), node["widgets_values"]
    if kind["python_module"].startswith("custom_nodes") and len(names) != len(values):
        raise ValueError(f"{node['type']} has fields {names}, and saved are {values}")
    return {name: value for name, value in zip(names, values, strict=False) if name}


def _fields(kind: Mapping[str, Any]) -> Iterator[str]:
    """The names of a node's fields in their order; one that only the page has is empty."""
    for group in ("required", "optional"):
        for name in kind["input_order"].get(group, ()):
            form, *more = kind["input"][group][name]
            options = more[0] if more else {}
            if not isinstance(form, list) and form not in _WIDGETS:
                continue
            if options.get("forceInput"):
                continue
            yield name
            if options.get("control_after_generate") or name in {"seed", "noise_seed"}:
                yield ""
            if options.get("image_upload"):
                yield ""


def file_names(graph: Graph) -> Iterator[tuple[str, str]]:
    """Yield the folder and the name of each file that a graph reads."""
    for node in graph.values():
        for name, value in node["inputs"].items():
            if name in _FOLDERS and isinstance(value, str):
                yield _FOLDERS[name], value


def is_on_the_page(kind: str) -> bool:
    """Say whether a node is a note, which the server never sees."""
    return kind == "MarkdownNote"
