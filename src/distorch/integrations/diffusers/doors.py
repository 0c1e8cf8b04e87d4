"""What stands before each model of a pipeline: its turn comes, and its inputs to its device."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.hooks import ModelHook
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from distorch.integrations.attach import Handle
from distorch.integrations.turns import SharingHandle

__all__ = ["Door"]


class Door(ModelHook):  # type: ignore[misc]  # accelerate has no types
    """Stands before a model: gives it its turn, and brings inputs to its device.

    diffusers calls ``pre_forward`` before a VAE decodes or encodes, which is not its forward, and
    asks for ``execution_device`` to know where latents are made: protocols of accelerate's hooks.
    """

    def __init__(self, module: nn.Module, handle: Handle, latents: torch.device) -> None:
        self._module, self._handle = module, handle
        self._device, self.execution_device = torch.device(handle.plan.compute), latents
        self._hooks = [
            module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True),
            module.register_forward_hook(self._leave),
            module.register_forward_hook(self._end, always_call=True),
        ]
        if hasattr(module, "decode"):
            self._hooks += [
                child.register_forward_pre_hook(self._align, prepend=True, with_kwargs=True)
                for child in module.children()
            ]
        module._hf_hook = self  # noqa: SLF001  (the name of the protocol)

    def pre_forward(self, _module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Give the model its turn."""
        if isinstance(self._handle, SharingHandle):
            self._handle.turns.enter(self._handle)
        return args, kwargs

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._module.__dict__.pop("_hf_hook", None)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        before = set(module._forward_pre_hooks)  # noqa: SLF001  (torch has no other list of them)
        self.pre_forward(module)
        self._count(1)
        for key, hook in list(module._forward_pre_hooks.items()):  # noqa: SLF001  (as above)
            if key not in before:  # it came too late for this pass, which has begun
                hook(module, args)
        return self._align(module, args, kwargs)

    def _end(self, _module: nn.Module, _args: Any, _output: Any = None) -> None:
        self._count(-1)

    def _count(self, change: int) -> None:
        if isinstance(self._handle, SharingHandle):
            self._handle.passes = max(0, self._handle.passes + change)

    def _align(self, _module: nn.Module, args: Any, kwargs: Any) -> Any:
        moved = {name: _to(self._device, value) for name, value in kwargs.items()}
        return tuple(_to(self._device, value) for value in args), moved

    def _leave(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        return _to(self.execution_device, output)


def _to(device: torch.device, values: Any) -> Any:
    """Bring tensors to a device; what holds none from elsewhere, such as a cache, is kept."""
    if all(not isinstance(each, Tensor) or each.device == device for each in tree_leaves(values)):
        return values
    return tree_map_only(Tensor, lambda value: value.to(device), values)
