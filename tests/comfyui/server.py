"""A running ComfyUI, as the tests talk to it."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.comfyui.graphs import Graph

_RUN_SECONDS = 180.0


class Refused(Exception):  # noqa: N818 (an answer of the server)
    """ComfyUI refused a workflow, or it failed while it ran; ``answer`` is what was said."""

    def __init__(self, answer: Any) -> None:
        super().__init__(json.dumps(answer)[:4000])
        self.answer = answer


class Server:
    """A running ComfyUI and its base folder."""

    def __init__(self, base: Path, port: int) -> None:
        self.base = base
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:  # noqa: S310 (our own URL)
            return json.load(answer)

    def post(self, path: str, body: Any) -> Any:
        request = urllib.request.Request(  # noqa: S310 (our own URL)
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 (our own URL)
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            raise Refused(json.loads(error.read())) from error

    def queue(self, graph: Graph) -> str:
        return str(self.post("/prompt", {"prompt": graph})["prompt_id"])

    def wait(self, prompt: str) -> dict[str, Any]:
        """Return the history of a prompt that has ended; a failure raises `Refused`."""
        until = time.monotonic() + _RUN_SECONDS
        while time.monotonic() < until:
            history = self.get(f"/history/{prompt}").get(prompt)
            if history is not None and history["status"]["status_str"] == "success":
                return dict(history)
            if history is not None and history["status"]["status_str"] == "error":
                raise Refused(history["status"]["messages"])
            time.sleep(0.1)
        raise AssertionError(f"prompt {prompt} did not end")

    def run(self, graph: Graph) -> dict[str, Any]:
        return self.wait(self.queue(graph))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Read what a saver of the helper pack wrote."""
        return load_file(self.base / "output" / f"{name}.safetensors")

    def same(self, ours: str, core: str) -> None:
        """Assert that two savers wrote the same bits, and numbers."""
        left, right = self.tensors(ours), self.tensors(core)
        assert left.keys() == right.keys()
        for name, value in left.items():
            assert torch.equal(value, right[name]), name
            assert bool(torch.isfinite(value.float()).all()), name

    def json(self, name: str) -> Any:
        return json.loads((self.base / "output" / f"{name}.json").read_text(encoding="utf-8"))

    @property
    def log(self) -> str:
        return (self.base / "server.log").read_text(encoding="utf-8", errors="replace")
