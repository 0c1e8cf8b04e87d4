"""ComfyUI: nodes that load models with their weights distributed. Imported by ComfyUI only."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any

from distorch import vgpu
from distorch.integrations.comfyui.table import titles

__all__ = ["display_names", "nodes"]

_log = logging.getLogger("distorch")


def nodes() -> dict[str, type]:
    """Return every node of the pack by its class key, as this ComfyUI can have them.

    Raises:
        ImportError: what the loaders need is not installed.
    """
    vgpu.autoload()  # where the environment asks for them, virtual cards are in the nodes' lists
    found: dict[str, type] = {}
    for module in ("loaders", "own_loaders", "gguf_nodes"):
        found |= _of(module, "nodes")()
    found |= _spared("wrappers", "nodes", "the nodes over other packs are missing")
    found |= _spared("new_nodes", "NODES", "the new nodes are missing")
    _spared("routes", "register", "the panel has nothing to show")
    return found


def display_names() -> dict[str, str]:
    """Return what ComfyUI shows for the class keys."""
    new = _spared("new_nodes", "DISPLAY_NAMES", "the new nodes have no names")
    return titles() | new


def _of(module: str, name: str) -> Any:
    return getattr(import_module(f"{__name__}.in_comfy.{module}"), name)


def _spared(module: str, name: str, loss: str) -> dict[str, Any]:
    """Return what a module has or makes; a failure costs that much and is said in a line."""
    try:
        found = _of(module, name)
        return dict((found() if callable(found) else found) or {})
    except Exception as error:  # noqa: BLE001 (ComfyUI starts, whatever happens here)
        line = " ".join(str(error).split())
        _log.warning("DisTorch: %s: %s: %s", loss, type(error).__name__, line)
        return {}
