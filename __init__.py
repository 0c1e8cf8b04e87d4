"""The entry for ComfyUI, which imports a custom node pack by its folder.

Nothing here can stop ComfyUI from starting: what is missing is said in one line.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any


def _nodes() -> tuple[dict[str, type], dict[str, str]]:
    """The pack's nodes and their names, from ``distorch`` as installed or as cloned here."""
    sys.path.append(str(Path(__file__).parent / "src"))
    try:
        from distorch.integrations.comfyui import display_names, nodes  # noqa: PLC0415

        return nodes(), display_names()
    except ImportError as error:
        here = Path(__file__).parent / "requirements.txt"
        line = "DisTorch has no nodes: %s; try: %s -m pip install -r %s"
        logging.getLogger("distorch").error(line, error, sys.executable, here)  # noqa: TRY400
        return {}, {}


NODE_CLASS_MAPPINGS: dict[str, Any]
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str]
NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = _nodes() if "comfy" in sys.modules else ({}, {})
WEB_DIRECTORY = "web"
__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
