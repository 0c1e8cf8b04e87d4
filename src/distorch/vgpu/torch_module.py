"""``torch.vgpu``: the functions of ``torch.cuda``, by their names, for virtual devices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Event, Stream

from distorch.vgpu.control import num_devices
from distorch.vgpu.library import library

__all__ = [
    "Event",
    "Stream",
    "can_device_access_peer",
    "current_device",
    "current_stream",
    "default_stream",
    "device",
    "device_count",
    "empty_cache",
    "get_amp_supported_dtype",
    "get_device_name",
    "get_rng_state",
    "init",
    "ipc_collect",
    "is_available",
    "is_bf16_supported",
    "is_initialized",
    "manual_seed",
    "manual_seed_all",
    "max_memory_allocated",
    "max_memory_reserved",
    "mem_get_info",
    "memory_allocated",
    "memory_reserved",
    "memory_stats",
    "reset_peak_memory_stats",
    "set_device",
    "set_rng_state",
    "set_stream",
    "stream",
    "synchronize",
]

Device = torch.device | str | int | None


def _index(device: Device) -> int:
    """Return the index of a device; None, and one without index, is the current one."""
    if device is None:
        return current_device()
    if isinstance(device, int):
        return device
    wanted = torch.device(device)
    if wanted.type != "vgpu":
        raise ValueError(f"{wanted} is not a virtual GPU: write one like vgpu:0")
    return current_device() if wanted.index is None else wanted.index


def device_count() -> int:
    """Return how many devices there are."""
    return num_devices()  # never by torch.accelerator, which asks here


def is_available() -> bool:
    """Whether there are devices."""
    return num_devices() > 0


def is_initialized() -> bool:
    """Whether devices can be used: always, there is nothing to start."""
    return True


def init() -> None:
    """Start what there is to start: nothing."""


def _is_in_bad_fork() -> bool:
    return bool(library().vgpu_is_forked())


def current_device() -> int:
    """Return the index of the calling thread's device."""
    return torch.accelerator.current_device_index()


def set_device(device: Device) -> None:
    """Make a device the calling thread's."""
    torch.accelerator.set_device_index(_index(device))


class device:  # noqa: N801 (torch.cuda.device is a class of this name)
    """Make a device the calling thread's within a block."""

    def __init__(self, device: Device) -> None:
        self.idx = _index(device)
        self.prev_idx = -1

    def __enter__(self) -> None:
        """Change the current device."""
        self.prev_idx = current_device()
        set_device(self.idx)

    def __exit__(self, *_: object) -> None:
        """Change it back."""
        set_device(self.prev_idx)


def synchronize(device: Device = None) -> None:
    """Wait for all streams of a device."""
    torch.accelerator.synchronize(_index(device))


def current_stream(device: Device = None) -> Stream:
    """Return the calling thread's stream of a device."""
    return torch.accelerator.current_stream(_index(device))


def default_stream(device: Device = None) -> Stream:
    """Return the stream that is used where none is chosen."""
    like = current_stream(device)
    return Stream(stream_id=0, device_index=like.device_index, device_type=like.device_type)


def set_stream(stream: Stream) -> None:
    """Make a stream the calling thread's, and its device too."""
    torch.accelerator.set_stream(stream)


def stream(stream: Stream) -> Stream:
    """Return what makes a stream the calling thread's within a block: itself."""
    return stream


def mem_get_info(device: Device = None) -> tuple[int, int]:
    """Return the free and the total bytes of a device."""
    return torch.accelerator.get_memory_info(_index(device))


def memory_allocated(device: Device = None) -> int:
    """Return the bytes of a device that tensors have."""
    return torch.accelerator.memory_allocated(_index(device))


def max_memory_allocated(device: Device = None) -> int:
    """Return the most bytes of a device that tensors have had."""
    return torch.accelerator.max_memory_allocated(_index(device))


def memory_reserved(device: Device = None) -> int:
    """Return the bytes that are taken from a device: those of tensors, there is no cache."""
    return memory_allocated(device)


def max_memory_reserved(device: Device = None) -> int:
    """Return the most bytes that were taken from a device."""
    return max_memory_allocated(device)


def memory_stats(device: Device = None) -> dict[str, Any]:
    """Return torch's statistics of a device's memory."""
    return dict(torch.accelerator.memory_stats(_index(device)))


def reset_peak_memory_stats(device: Device = None) -> None:
    """Let the peak be what is in use now."""
    torch.accelerator.reset_peak_memory_stats(_index(device))


def empty_cache() -> None:
    """Give back what is kept for later: nothing is."""


def ipc_collect() -> None:
    """Do nothing: memory is not shared with other processes."""


def can_device_access_peer(device: Device, peer_device: Device) -> bool:
    """Whether two devices can copy to each other directly."""
    return not library().vgpu_is_refused(_index(device), _index(peer_device))


def get_device_name(device: Device = None) -> str:
    """Return what a device is called."""
    return f"virtual GPU {_index(device)}"


def manual_seed(seed: int) -> None:
    """Do nothing: random numbers are the CPU's, and ``torch.manual_seed`` seeds those."""


def manual_seed_all(seed: int) -> None:
    """Do nothing: random numbers are the CPU's, and ``torch.manual_seed`` seeds those."""


def get_rng_state(device: Device = None) -> torch.Tensor:  # noqa: ARG001 (as torch calls it)
    """Return the state of the random numbers, the CPU's."""
    return torch.get_rng_state()


def set_rng_state(new_state: torch.Tensor, device: Device = None) -> None:  # noqa: ARG001
    """Set the state of the random numbers, the CPU's."""
    torch.set_rng_state(new_state)


def get_amp_supported_dtype() -> list[torch.dtype]:
    """Return the dtypes that autocast can compute in."""
    return [torch.float16, torch.bfloat16]


def is_bf16_supported() -> bool:
    """Whether bfloat16 computes: it does."""
    return True
