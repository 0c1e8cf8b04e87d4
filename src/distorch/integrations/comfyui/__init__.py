"""ComfyUI: nodes that load models with their weights distributed. Imported by ComfyUI only."""

from __future__ import annotations

__all__ = ["display_names", "nodes"]


def nodes() -> dict[str, type]:
    """Return every node of the pack by its class key, as this ComfyUI can have them."""
    return {}


def display_names() -> dict[str, str]:
    """Return what ComfyUI shows for the class keys that are new."""
    return {}
