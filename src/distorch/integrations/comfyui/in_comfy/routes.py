"""What the browser asks the server: what a line comes to, and where the weights are now.

Both routes only read. They name devices and models, never a folder or a file of the server.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import folder_paths
from aiohttp import web  # type: ignore[import-not-found,unused-ignore]  # ComfyUI's server
from server import PromptServer

from distorch.errors import DistorchError, MachineError, ModelError
from distorch.integrations.attach import Handle
from distorch.integrations.comfyui.in_comfy.outputs import loaded_patchers
from distorch.integrations.comfyui.in_comfy.patcher import handle_in
from distorch.integrations.comfyui.preview import (
    MAX_CHARACTERS,
    Json,
    Question,
    error_of,
    kind_of,
    links_of,
    memories_of,
    preview,
)
from distorch.machine import Machine

__all__ = ["register"]

_MAX_BODY_BYTES = 2**16
_MAX_FILES = 8
_FOLDERS = (
    "diffusion_models",
    "checkpoints",
    "text_encoders",
    "vae",
    "vae_approx",
    "clip_vision",
    "controlnet",
)


def register() -> None:
    """Add the routes to ComfyUI's server, which has not started yet."""
    routes = PromptServer.instance.routes
    routes.post("/distorch/preview")(_answer_preview)
    routes.get("/distorch/status")(_answer_status)


async def _answer_preview(request: web.Request) -> web.Response:
    """Answer what a node's inputs come to; a line that does not read is an answer too."""
    try:
        if (request.content_length or 0) > _MAX_BODY_BYTES:
            raise DistorchError("the question is too long", hint='{"text": "cpu,*"}')
        data = json.loads(await request.text())
        question = Question.read(data)
        files = _files(data)
    except DistorchError as error:
        return _refusal(error)
    except (ValueError, RecursionError):
        return _refusal(DistorchError("the question is not JSON", hint='{"text": "cpu,*"}'))
    return web.json_response(await asyncio.to_thread(_preview, question, files))


def _refusal(error: DistorchError) -> web.Response:
    return web.json_response({"error": error_of(error)}, status=400)


async def _answer_status(_request: web.Request) -> web.Response:
    """Answer each memory's bytes, the links, and every model that is distributed now."""
    return web.json_response(await asyncio.to_thread(_status))


def _preview(question: Question, files: Sequence[str]) -> Json:
    if question.model_bytes is None and files:
        question = replace(question, model_bytes=_bytes_of(files))
    return preview(question, _machine())


def _status() -> Json:
    machine = _machine()
    handles: dict[int, Json] = {}
    for patcher in loaded_patchers():
        handle = handle_in(patcher)
        if handle is not None and (model := _model(type(patcher.model).__name__, handle)):
            handles[id(handle)] = model
    return {
        "devices": memories_of(machine),
        "links": links_of(machine),
        "models": list(handles.values()),
    }


def _machine() -> Machine:
    """This machine now, without its name; and without its speeds where they cannot be read."""
    try:
        found = Machine.here()
    except MachineError:
        found = Machine.detect()
    return replace(found, name="here")


def _model(name: str, handle: Handle) -> Json | None:
    """What one distributed model does, or None where it was let go of meanwhile."""
    try:
        stats = handle.stats()
    except ModelError:
        return None
    plan = handle.plan
    tiers = plan.bytes_by_tier
    steps = stats.step_seconds
    return {
        "name": name,
        "allocation": re.sub(r"disk:[^,;]*", "disk", plan.allocation),
        "compute": plan.compute,
        "model_bytes": plan.model_bytes,
        "plan": [
            {
                "device": tier.partition(":")[0] if kind_of(tier) == "disk" else tier,
                "kind": kind_of(tier),
                "bytes": nbytes,
                "share": nbytes / plan.model_bytes if plan.model_bytes else 0.0,
                "num_blocks": sum(placed.tier == tier for placed in plan.placements),
            }
            for tier, nbytes in tiers.items()
        ],
        "ring_bytes": plan.ring.nbytes,
        "num_steps": stats.num_steps,
        "step_seconds": steps,
        "streamed_bytes": stats.streamed_bytes,
        "link_bytes_per_second": stats.link_bytes_per_second,
        "stall_share": min(1.0, stats.waited_seconds / steps) if steps else 0.0,
        "efficiency": stats.efficiency,
    }


def _files(data: Any) -> list[str]:
    """The names of model files that a node shows, as they stand in its inputs.

    Raises:
        DistorchError: they are no such names.
    """
    files = data.get("files") or []
    fine = isinstance(files, list) and len(files) <= _MAX_FILES
    if not fine or not all(isinstance(name, str) and len(name) <= MAX_CHARACTERS for name in files):
        problem = f"files is not a list of at most {_MAX_FILES} names"
        raise DistorchError(problem, hint='"files": ["model.safetensors"]')
    return files


def _bytes_of(files: Sequence[str]) -> int | None:
    """The bytes of model files by the names that ComfyUI lists; None if one is not known."""
    total = 0
    for name in files:
        paths = (_path_of(folder, name) for folder in _FOLDERS)
        path = next((path for path in paths if path is not None), None)
        if path is None:
            return None
        total += path.stat().st_size
    return total or None


def _path_of(folder: str, name: str) -> Path | None:
    """Where a model of a folder is; ComfyUI itself keeps names from leaving the folder."""
    try:
        found = folder_paths.get_full_path(folder, name)
    except (OSError, ValueError, KeyError):
        return None
    return Path(found) if found else None
