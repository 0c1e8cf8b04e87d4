"""A LoRA whose layer cannot apply it at use, on a model that is placed already."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.comfyui.server import Server

pytestmark = pytest.mark.slow


def test_a_lora_that_is_applied_at_rest_has_cores_bits(server: Server) -> None:
    tree, python = os.environ["COMFYUI_DIR"], os.environ["COMFYUI_PYTHON"]
    done = subprocess.run(
        [python, Path(__file__).with_name("patches_script.py"), tree, server.base / "models"],
        cwd=server.base,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
