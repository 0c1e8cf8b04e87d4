"""Lets the tests see and set the memory of the virtual cards, over ComfyUI's own server."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import torch
from aiohttp import web  # type: ignore[import-not-found,unused-ignore]  # ComfyUI's server
from server import PromptServer

from distorch import vgpu

NODE_CLASS_MAPPINGS: dict[str, Any] = {}


def all_devices(exclude_current: bool = False) -> list[torch.device]:  # noqa: FBT001, FBT002 (as ComfyUI has it)
    """The cards; ComfyUI itself lists those of the kinds that it knows."""
    first = comfy.model_management.get_torch_device()
    count = torch.get_device_module("vgpu").device_count()
    devices = [torch.device("vgpu", index) for index in range(count)]
    return [device for device in devices if not (exclude_current and device == first)]


comfy.model_management.get_all_torch_devices = all_devices


async def bytes_now(_request: Any) -> Any:
    """What each card holds and can hold, and what ComfyUI says that each of its models holds."""
    devices = vgpu.counters().devices
    held = [it for it in comfy.model_management.loaded_models() if it is not None]
    return web.json_response(
        {
            "live": [device.live_bytes for device in devices],
            "capacity": [device.capacity_bytes for device in devices],
            "loaded": [patcher.loaded_size() for patcher in held],
        }
    )


async def set_capacity(request: Any) -> Any:
    """Give a card another size."""
    for index, nbytes in (await request.json()).items():
        vgpu.set_capacity(int(index), nbytes)
    return web.json_response({})


PromptServer.instance.routes.get("/vgpu")(bytes_now)
PromptServer.instance.routes.post("/vgpu")(set_capacity)
