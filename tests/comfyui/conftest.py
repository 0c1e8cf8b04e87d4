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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.comfyui.cards import (
    PLENTY,
    core,
    empty,
    give_room,
    new_seed,
)
from tests.comfyui.make import make_models
from tests.comfyui.needs import run_with_flux, tree_of
from tests.comfyui.server import Server

_ROOT = Path(__file__).parents[2]
_START_SECONDS = 180.0
_CARDS = "3gb,3gb,3gb"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with started(tmp_path_factory.mktemp("comfyui"), ["--cpu"]) as found:
        yield found


@pytest.fixture(scope="session")
def cards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with three virtual graphics cards, the first of them ComfyUI's."""
    with started(tmp_path_factory.mktemp("cards"), *_with_cards()) as found:
        yield found


@pytest.fixture(scope="session")
def dynamic_cards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The same with DynamicVRAM."""
    _, source = tree_of("model_patcher.py")
    if "disable_dynamic" not in source:
        pytest.skip("this ComfyUI has no DynamicVRAM")
    with started(
        tmp_path_factory.mktemp("dynamic"), *_with_cards("--enable-dynamic-vram")
    ) as found:
        yield found


@pytest.fixture(params=["cards", "dynamic_cards"])
def here(request: pytest.FixtureRequest) -> Server:
    """A server with empty cards: ComfyUI's own memory manager, and DynamicVRAM."""
    server: Server = request.getfixturevalue(request.param)
    give_room(server, PLENTY)
    empty(server)
    return server


@pytest.fixture
def flux(here: Server) -> str:
    run_with_flux(here, core("flux", "known", new_seed()))
    empty(here)
    return "flux"


def _with_cards(*arguments: str) -> tuple[list[str], Mapping[str, str]]:
    """What a server with virtual cards is started with: few bytes are kept for what is no model."""
    known = tree_of("cli_args.py")[1]
    pinless = ["--disable-pinned-memory"] if "--disable-pinned-memory" in known else []
    return [*pinless, "--reserve-vram", "0", *arguments], {"DISTORCH_VGPU": _CARDS}


@contextmanager
def started(
    base: Path, arguments: Sequence[str], environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Run a ComfyUI with a base folder of its own; virtual cards come with a pack."""
    tree, _ = tree_of("cli_args.py")
    for folder in ("custom_nodes", "models", "input", "output", "temp", "user"):
        (base / folder).mkdir()
    (base / "custom_nodes" / "distorch").symlink_to(_ROOT)
    here = Path(__file__).parent
    for pack in ("helper_pack.py", "small_encoders.py"):
        shutil.copy(here / pack, base / "custom_nodes")
    if environment:
        shutil.copytree(here / "device_pack", base / "custom_nodes" / "device_pack")
    make_models(base / "models")
    (tree / "user").mkdir(exist_ok=True)  # older versions keep their database there
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    yield from _running(tree, base, port, arguments, environment or {})


def _running(
    tree: Path, base: Path, port: int, arguments: Sequence[str], environment: Mapping[str, str]
) -> Iterator[Server]:
    command = [os.environ["COMFYUI_PYTHON"], "main.py", "--listen", "127.0.0.1"]
    command += ["--port", str(port), "--disable-auto-launch", "--base-directory", str(base)]
    command += ["--database-url", f"sqlite:///{base / 'user' / 'comfyui.db'}", *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **environment}
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
