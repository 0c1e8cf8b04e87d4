"""What a module has beside its placed weights: it goes to the device that computes, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distorch.errors import AllocationError
from distorch.plan.plan import gib

__all__ = ["Companions"]


@dataclass(frozen=True, slots=True)
class _Moved:
    """A tensor under its name in a module's dictionary: the one from before, and the one there."""

    names: dict[str, Any]
    name: str
    original: Tensor
    moved: Tensor


class Companions:
    """Buffers, and parameters that cannot be placed, on the device that computes.

    >>> module = nn.BatchNorm1d(3)
    >>> companions = Companions()
    >>> companions.move(module, torch.device("meta"))
    >>> module.running_mean.device
    device(type='meta')
    >>> companions.restore()
    >>> module.running_mean
    tensor([0., 0., 0.])
    """

    def __init__(self) -> None:
        self._moved: list[_Moved] = []

    def move(self, module: nn.Module, device: torch.device) -> None:
        """Bring what is elsewhere; after an error, `restore` undoes what was done.

        Raises:
            AllocationError: the device has no room.
        """
        twins: dict[int, Tensor] = {}  # a tensor of several names stays one
        for owner in module.modules():
            dictionaries: tuple[dict[str, Any], ...] = owner._parameters, owner._buffers
            for names in dictionaries:
                for name, tensor in names.items():
                    if tensor is None or tensor.device == device:
                        continue
                    twin = twins.setdefault(id(tensor), _twin(tensor, device))
                    self._moved.append(_Moved(names, name, tensor, twin))
                    names[name] = twin

    def restore(self) -> None:
        """Put back what was there before, with what has been written to it since."""
        for entry in self._moved:
            current = entry.names.get(entry.name)
            if current is None:
                continue
            if current is not entry.moved:  # the model has put another in its place
                entry.names[entry.name] = current.to(entry.original.device)
                continue
            if not current.is_meta:
                entry.original.data.copy_(current.data)
            entry.names[entry.name] = entry.original

    def forget(self) -> None:
        """Let go of what was on the device; nothing may use it any more."""
        self._moved.clear()


def _twin(tensor: Tensor, device: torch.device) -> Tensor:
    try:
        with torch.inference_mode(mode=False):
            twin = tensor.detach().to(device)
    except torch.OutOfMemoryError as error:
        raise AllocationError(
            f"{device} has no room for a buffer of {gib(tensor.nbytes)}: "
            f"{str(error).partition(chr(10))[0]}",
            hint=f"a smaller amount for {device}, or close what else uses it",
        ) from error
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(twin, requires_grad=tensor.requires_grad)
    return twin
