"""A real ComfyUI, started once for these tests; without one they are skipped.

COMFYUI_DIR is its folder, COMFYUI_PYTHON an interpreter that can run it. It gets a base folder of
its own, with tiny models, this repository as a pack, and the nodes of ``helper_pack.py``.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.comfyui.make import make_models
from tests.comfyui.server import Server

_ROOT = Path(__file__).parents[2]
_START_SECONDS = 180.0


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    tree, python = os.environ.get("COMFYUI_DIR"), os.environ.get("COMFYUI_PYTHON")
    if not tree or not python:
        pytest.skip("needs COMFYUI_DIR, a ComfyUI, and COMFYUI_PYTHON, an interpreter that runs it")
    base = tmp_path_factory.mktemp("comfyui")
    for folder in ("custom_nodes", "models", "input", "output", "temp", "user"):
        (base / folder).mkdir()
    (base / "custom_nodes" / "distorch").symlink_to(_ROOT)
    shutil.copy(Path(__file__).with_name("helper_pack.py"), base / "custom_nodes")
    make_models(base / "models")
    (Path(tree) / "user").mkdir(exist_ok=True)  # older versions keep their database there
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    yield from _running(tree, python, base, port)


def _running(tree: str, python: str, base: Path, port: int) -> Iterator[Server]:
    command = [python, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port)]
    command += ["--disable-auto-launch", "--base-directory", str(base)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    environment.pop("PYTHONPATH", None)
    with (base / "server.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, cwd=tree, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        found = Server(base, port)
        try:
            _await(found, process)
            yield found
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _await(server: Server, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + _START_SECONDS
    while time.monotonic() < until:
        if process.poll() is not None:
            break
        try:
            server.get("/system_stats")
        except OSError:
            time.sleep(0.3)
        else:
            return
    pytest.fail(f"ComfyUI did not start:\n{server.log[-3000:]}")
