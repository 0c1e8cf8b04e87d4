"""Which accelerators this machine has, and how much of their memory is free.

The driver's own library knows NVIDIA's cards, and answers without starting anything on them. torch
knows all kinds, but is asked only where a program uses it already: to import it takes seconds.
Virtual cards, where ``DISTORCH_VGPU`` asks for them, stand in the place of all others.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from distorch.vgpu.spec import Spec, device_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Memory", "read_accelerators", "virtual"]


class Memory(NamedTuple):
    """What one reading of one memory says."""

    capacity_bytes: int
    free_bytes: int


def virtual() -> Spec | None:
    """Return the virtual cards that the environment asks for.

    Raises:
        MachineError: what it says cannot be read.
    """
    line = os.environ.get("DISTORCH_VGPU")
    return Spec.parse(line) if line else None


def read_accelerators() -> dict[str, Memory]:
    """Read the memory of every accelerator, by the name that torch gives it.

    >>> all(memory.free_bytes <= memory.capacity_bytes for memory in read_accelerators().values())
    True
    """
    torch = sys.modules.get("torch")
    seen = _seen_by_torch(torch, start=False) if torch else {}
    spec = virtual()
    if spec is not None and not any(name.startswith("vgpu") for name in seen):
        sizes = [device.capacity_bytes for device in spec.devices]
        return {device_name(i): Memory(nbytes, nbytes) for i, nbytes in enumerate(sizes)}
    if seen:
        return seen
    cards = {f"cuda:{index}": card for index, card in enumerate(_nvidia_cards())}
    return cards or (_seen_by_torch(torch, start=True) if torch else {})


def _seen_by_torch(torch: Any, *, start: bool) -> dict[str, Memory]:  # noqa: ANN401
    """Read the kind of accelerator that torch has, if a program uses it yet or ``start`` is said.

    What torch's allocator keeps for later counts as free, and a cap on its share as all there is.
    """
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        return {}
    module = torch.get_device_module(kind)
    if not (start or module.is_initialized()) or not hasattr(module, "mem_get_info"):
        return {}
    share = getattr(module, "get_per_process_memory_fraction", lambda _index: 1.0)
    found = {}
    for index in range(torch.accelerator.device_count()):
        free_bytes, capacity_bytes = module.mem_get_info(index)
        reserved_bytes = module.memory_reserved(index)
        ours_bytes = module.memory_allocated(index)
        cap_bytes = int(capacity_bytes * share(index))
        free_bytes = min(free_bytes + reserved_bytes - ours_bytes, cap_bytes - ours_bytes)
        found[f"{kind.type}:{index}"] = Memory(cap_bytes, max(0, free_bytes))
    return found


def _nvidia_cards() -> list[Memory]:
    """Read the NVIDIA cards in torch's order; none without nvidia-ml-py or a driver."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return []
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return []
    try:
        return _visible_cards(nvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
    except nvml.NVMLError:
        return []
    finally:
        nvml.nvmlShutdown()


def _visible_cards(nvml: Any, visible: str | None) -> list[Memory]:  # noqa: ANN401
    """Read the cards that CUDA shows this process, in CUDA's order.

    NVML counts every card, while torch's ``cuda:0`` is the first that CUDA_VISIBLE_DEVICES names
    (by index or by the beginning of a UUID); CUDA ignores all from the first name it does not know.
    """
    handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    if visible is not None:
        handles = list(_named_by(visible, handles, [nvml.nvmlDeviceGetUUID(h) for h in handles]))
    readings = [nvml.nvmlDeviceGetMemoryInfo(handle) for handle in handles]
    return [Memory(int(reading.total), int(reading.free)) for reading in readings]


def _named_by(visible: str, handles: Sequence[Any], uuids: Sequence[str]) -> Iterator[Any]:
    """Yield the handles that a value of CUDA_VISIBLE_DEVICES names, as far as it can be read."""
    for name in (part.strip() for part in visible.split(",")):
        matches = [
            handle
            for index, (handle, uuid) in enumerate(zip(handles, uuids, strict=True))
            if name == str(index) or (name.startswith("GPU-") and uuid.startswith(name))
        ]
        if len(matches) != 1:
            return
        yield matches[0]
