"""Gives ComfyUI virtual graphics cards before it looks for real ones; a pack of the tests.

ComfyUI asks ``torch.cuda`` for cards, and comfy-aimdo for DynamicVRAM's memory. Here the virtual
GPU answers, so that all of ComfyUI runs as it does with a card. It is started without ``--cpu``.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "distorch" / "src"))

import torch

from distorch import vgpu

_PART_OF_TORCH = ("current_device", "mem_get_info", "get_device_name", "is_bf16_supported")
_signatures = itertools.count(1)


def memory_stats(device: Any = None) -> dict[str, int]:
    used = torch.get_device_module("vgpu").memory_allocated(device)
    return {"reserved_bytes.all.current": used, "active_bytes.all.current": used}


def properties(device: Any = None) -> Any:  # noqa: ARG001 (all are alike)
    return SimpleNamespace(major=8, minor=0, name="virtual GPU")


class ModelVBAR:
    """The memory of one model under DynamicVRAM: each weight gets its place when it is used."""

    def __init__(self, size: int, device: int) -> None:  # noqa: ARG002 (addresses cost nothing)
        self.device = torch.device("vgpu", device)
        self.num_bytes = 0
        self.pages: dict[int, tuple[torch.Tensor, int]] = {}

    def alloc(self, size: int) -> Any:
        self.num_bytes += size
        return self, self.num_bytes - size, size

    def page(self, place: int, size: int) -> tuple[torch.Tensor, int]:
        if place not in self.pages:
            memory = torch.empty(size, dtype=torch.uint8, device=self.device)
            self.pages[place] = memory, next(_signatures)
        return self.pages[place]

    def loaded_size(self) -> int:
        return sum(memory.numel() for memory, _ in self.pages.values())

    def free_memory(self, size: float) -> int:
        freed = 0
        while self.pages and freed < size:
            memory, _ = self.pages.pop(next(reversed(self.pages)))
            freed += memory.numel()
            memory.untyped_storage().resize_(0)  # layers still have views, and do not use them
        return freed

    def prioritize(self) -> None:
        """Come before other models: there is room for all."""


def fault(place: Any) -> int | None:
    """Return what tells this residence of a weight from others; None where there is no room."""
    bar, begin, size = place
    try:
        return int(bar.page(begin, size)[1])
    except torch.OutOfMemoryError:
        return None


def read_file(
    file: int, begin: int, size: int, stream: int, target: int, device: int, **_: Any
) -> None:
    """Bring a weight from its file to a device, whose memory is this process's."""
    assert not stream, "there are no streams of ComfyUI's on these devices"
    torch.accelerator.synchronize(torch.device("vgpu", device))
    data = os.pread(file if isinstance(file, int) else file.fileno(), size, begin)
    ctypes.memmove(target, data, size)


def give_cards() -> None:
    vgpu.install()
    module: Any = torch.cuda
    module.memory_stats, module.get_device_properties = memory_stats, properties
    for name in _PART_OF_TORCH:
        setattr(module, name, getattr(torch.get_device_module("vgpu"), name))


def give_dynamic_memory() -> None:
    # It comes with ComfyUI.
    from comfy_aimdo import (  # type: ignore[import-not-found,unused-ignore]
        control,
        host_buffer,
        model_vbar,
    )
    from comfy_aimdo import torch as tensors  # type: ignore[import-not-found,unused-ignore]

    control.init_devices = lambda _: True
    model_vbar.ModelVBAR = ModelVBAR
    model_vbar.vbar_fault = fault
    model_vbar.vbar_unpin = lambda _: None
    model_vbar.vbar_signature_compare = lambda a, b: a is not None and a == b
    model_vbar.vbars_analyze = lambda _=None: 0
    tensors.aimdo_to_tensor = lambda place, _: place[0].page(*place[1:])[0]
    host_buffer.read_file_to_device = read_file


give_cards()
if "--enable-dynamic-vram" in sys.argv:
    give_dynamic_memory()
