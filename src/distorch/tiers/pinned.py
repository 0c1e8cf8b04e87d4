"""Pinned host memory: the one kind that a device copies from and to while everybody else works.

Memory is allocated first, at its exact size, and then registered with the driver where it offers
that (CUDA, ROCm, the virtual GPU). torch's own pinned allocator rounds up to a power of two: it is
used where there is no other way. Where the driver refuses, the memory is pageable: copies from it
work, and stop the thread that asks for them.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from distorch.tiers.memory import allocate_pages

__all__ = ["Pins"]

_log = logging.getLogger("distorch")

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every card, not only the current one

_Registration = tuple[Callable[[int, int], None], Callable[[int], None]]


class Pins:
    """Allocates pinned memory for copies to and from one kind of device, and lets go of it.

    ``kind`` is torch's name of the device type. What was refused is not asked for again, nor more
    than that, and one line says so; less may still be had, such as the buffers to copy through.

    >>> pins = Pins("cpu")
    >>> pins.allocate(100).is_pinned()
    False
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._registration = _registration(kind)
        self._pinned: dict[int, Tensor] = {}
        self._refused_bytes = 0 if kind == "cpu" else sys.maxsize

    def allocate(self, nbytes: int) -> Tensor:
        """Return ``nbytes`` of uint8 in host memory, pinned where that can be had."""
        if not nbytes or nbytes >= self._refused_bytes:
            return allocate_pages(nbytes)
        try:
            memory = self._pin(nbytes)
        except RuntimeError as error:
            if self._refused_bytes == sys.maxsize:
                _log.warning(
                    "no more pinned memory (%s): what is left of the weights in host RAM is "
                    "copied through small buffers, by a thread",
                    str(error).partition("\n")[0],
                )
            self._refused_bytes = nbytes
            return allocate_pages(nbytes)
        self._pinned[memory.data_ptr()] = memory
        return memory

    def has(self, memory: Tensor) -> bool:
        """Whether ``memory`` is a part of what `allocate` has pinned."""
        return memory.untyped_storage().data_ptr() in self._pinned

    def free(self, memory: Tensor) -> None:
        """Let go of what `allocate` returned; nothing may copy from or to it any more."""
        if self._pinned.pop(memory.data_ptr(), None) is not None and self._registration:
            with suppress(RuntimeError):  # the device may be gone
                self._registration[1](memory.data_ptr())

    def _pin(self, nbytes: int) -> Tensor:
        if self._registration is None:
            with torch.inference_mode(mode=False):
                return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        memory = allocate_pages(nbytes).zero_()  # several threads touch the pages, not the driver
        try:
            self._registration[0](memory.data_ptr(), nbytes)
        except RuntimeError:
            if self._pinned:
                raise
            self._registration = None  # some systems only refuse to register
            return self._pin(nbytes)
        return memory


def _registration(kind: str) -> _Registration | None:
    """How memory of this process becomes pinned for a kind of device, and ordinary again."""
    if kind == "cuda":
        return _register_with_cuda, _unregister_with_cuda
    if kind == "vgpu":
        from distorch import vgpu  # noqa: PLC0415  only where somebody uses one

        return vgpu.register, vgpu.unregister
    return None


def _register_with_cuda(address: int, nbytes: int) -> None:
    runtime = torch.cuda.cudart()
    error = runtime.cudaHostRegister(address, nbytes, _PORTABLE)
    if int(error) == 0:
        return
    # The runtime keeps the error for the next call that asks: a kernel that did nothing wrong.
    with suppress(RuntimeError):
        torch.zeros(1, device="cuda").add_(1)
    raise RuntimeError(runtime.cudaGetErrorString(error))


def _unregister_with_cuda(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)
