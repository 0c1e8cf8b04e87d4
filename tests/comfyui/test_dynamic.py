"""Models that ComfyUI would stream by itself are placed as any others."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.comfyui.server import Server

pytestmark = pytest.mark.slow


def test_what_dynamic_vram_loads_is_placed_with_the_same_bits(server: Server) -> None:
    tree, python = os.environ["COMFYUI_DIR"], os.environ["COMFYUI_PYTHON"]
    source = (Path(tree) / "comfy" / "model_patcher.py").read_text(encoding="utf-8")
    if "disable_dynamic" not in source:
        pytest.skip("this ComfyUI has no DynamicVRAM")
    script = Path(__file__).with_name("dynamic_script.py")
    done = subprocess.run(
        [python, script, tree, server.base / "models"],
        cwd=server.base,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
