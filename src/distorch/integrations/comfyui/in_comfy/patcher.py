"""ComfyUI's owner of a model, with the weights placed by DisTorch: a subclass, and no patch.

ComfyUI keeps deciding when a model is on the device, which LoRA applies and what has to go to make
room. What changes is `load`: no layer is moved; the module is distributed, and ComfyUI's own layers
find each weight where they need it, since the hooks put it there before their forward. A LoRA stays
a function that ComfyUI applies to the weight when it is used, so its strength changes without a
byte being moved. The line says what a model may take of its device, and ComfyUI's room bounds it.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_patcher
import torch
from torch import nn

from distorch.integrations.attach import Handle, distribute, plan_for
from distorch.integrations.comfyui.in_comfy.baking import baked_keys, bakes_anew
from distorch.integrations.comfyui.in_comfy.classic import classic, settle
from distorch.integrations.comfyui.in_comfy.ordinary import make_ordinary
from distorch.integrations.comfyui.in_comfy.room import fitted, machine_for, plan_within
from distorch.integrations.request import Request
from distorch.plan.plan import Plan, gib

__all__ = ["DistributedPatcher", "adopt", "handle_in"]

_OURS_ALONE = 2  # references to what only we hold: ours, and that of the question
_NOTHING = 1  # bytes that ComfyUI may load by itself: with 0 it would load all

_log = logging.getLogger("distorch")


@dataclass(slots=True)
class _Placed:
    """What was asked for, its plan, and the handle of what was done: of all a patcher's clones."""

    request: Request
    asked: Plan
    handle: Handle
    holder: int = 0  # the id of the patcher that loaded last


def adopt(
    patcher: comfy.model_patcher.ModelPatcher, request: Request
) -> comfy.model_patcher.ModelPatcher:
    """Return a clone of ``patcher`` whose model rests as ``request`` says; nothing moves yet.

    Raises:
        AllocationError: the request does not fit this machine.
        MachineError: it names a device that is not here.
    """
    twin = classic(patcher).clone()
    twin.__class__ = _class_for(type(twin))
    twin.request = request
    placed = _placed(twin.model)
    if placed is None:
        make_ordinary(_module(twin.model))
        plan = plan_for(_module(twin.model), request, machine_for(request))
    else:
        plan = placed.handle.plan_as(request, machine_for(request))
    twin.load_device = twin.computes_on = torch.device(plan.compute)
    twin.size = plan.held_bytes
    return twin


def handle_in(patcher: Any) -> Handle | None:
    """Return the handle of a model that is placed now."""
    placed = _placed(patcher.model)
    return None if placed is None else placed.handle


class DistributedPatcher(comfy.model_patcher.ModelPatcher):  # type: ignore[misc]
    """A `ModelPatcher` whose weights rest where ``request`` says while the model is loaded."""

    # of a clone that is not ready yet: older versions ask for its size while they make it
    request = Request(allocation="auto")
    computes_on: torch.device
    _is_reloading = False
    _is_dying = False

    def __del__(self) -> None:
        """Let go as ComfyUI does; what other clones still use stays where it is."""
        self._is_dying = True
        if not sys.is_finalizing():
            self._leave()
        super().__del__()

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        """Return a twin that shares the model, and where its weights rest."""
        twin = super().clone(*args, **kwargs)
        twin.request, twin.computes_on = self.request, self.computes_on
        return twin

    def model_size(self) -> int:
        """Return the bytes that were asked for of its device: weights at rest, and the ring."""
        placed = _placed(self.model)
        if placed is not None and placed.request == self.request:
            self.size = placed.asked.held_bytes
        return self.size

    def load(
        self,
        device_to: torch.device | None = None,
        lowvram_model_memory: float = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
        **more: Any,
    ) -> Any:
        """Let ComfyUI set its LoRA functions, and place the weights where they are not yet.

        If it has less room than was asked for, they are placed within that; once it has enough,
        as asked.
        """
        if self.load_device != self.computes_on:
            self._follow()
        placed = _placed(self.model)
        if placed is not None and (placed.request != self.request or bakes_anew(self)):
            self._bring_back()
            placed = None
        result = super().load(device_to, _NOTHING, False, False, **more)
        room_bytes = None if full_load else int(lowvram_model_memory)
        if placed is None:
            placed = self._place(room_bytes)
        elif room_bytes is None or placed.asked.held_bytes <= room_bytes:
            self._rebudget(placed, placed.asked)
        placed.holder = id(self)
        self.model.model_loaded_weight_memory = placed.handle.weight_bytes
        return result

    def partially_load(self, *args: Any, **kwargs: Any) -> Any:
        """Load as ComfyUI does; weights that are placed stay where they are."""
        if _placed(self.model) is None and self.model.model_loaded_weight_memory:
            super().unpatch_model(self.offload_device, True)  # a patcher of ComfyUI's loaded it
        self._is_reloading = True
        try:
            return super().partially_load(*args, **kwargs)
        finally:
            self._is_reloading = False

    def partially_unload(
        self,
        device_to: torch.device,
        memory_to_free: int = 0,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """Give up as much of the device as is asked for.

        If the smallest ring is too large for what is left, all of it is given up: ComfyUI's layers
        go on from host memory, more slowly.
        """
        placed, freed = _placed(self.model), 0
        if placed is not None:
            before, kept = placed.handle.weight_bytes, 0
            less = plan_within(placed.handle.plan, int(before - memory_to_free))
            if less.held_bytes <= before - memory_to_free:
                self._rebudget(placed, less)
                kept = placed.handle.weight_bytes
            else:
                self._bring_back()
            freed = before - kept
            self.model.model_loaded_weight_memory -= freed
            _log.info("%s of %s are given up, %s kept", gib(freed), self.load_device, gib(kept))
        if freed < memory_to_free:
            freed += super().partially_unload(device_to, memory_to_free - freed, *args, **kwargs)
        return freed

    def unpatch_model(
        self,
        device_to: torch.device | None = None,
        unpatch_weights: bool = True,
    ) -> Any:
        """Take LoRA off; for another LoRA, the weights stay where they are."""
        if unpatch_weights and _placed(self.model) is not None:
            if self._is_reloading and not self.backup:
                return super().unpatch_model(None, unpatch_weights)
            self._bring_back()
        return super().unpatch_model(device_to, unpatch_weights)

    def is_clone(self, other: Any) -> Any:
        """Say whether both own one model; ComfyUI asks before one takes over from the other."""
        is_twin = super().is_clone(other)
        if is_twin:
            self.model.distorch_has_heir = True
        return is_twin

    def detach(self, unpatch_all: bool = True) -> Any:
        """Let go of the model; its weights stay placed if a patcher of ours takes over."""
        if self._is_dying:
            return super().detach(unpatch_all)
        has_heir = getattr(self.model, "distorch_has_heir", False)
        self.model.distorch_has_heir = False
        return super().detach(unpatch_all or not has_heir)

    def pin_weight_to_device(self, key: str) -> None:
        """Pin nothing: the tensors of the module are about to be empty."""

    def _leave(self) -> None:
        """Hand what rests elsewhere to the patcher that this one was cloned from.

        If that is ComfyUI's own, and somebody still has it or one that it came from, the weights
        come back, for its forward; if not, nobody has the model, and its memory is free at once.
        """
        placed = _placed(self.model)
        if placed is None or placed.holder != id(self):
            return
        if isinstance(self.parent, DistributedPatcher):
            placed.holder = id(self.parent)
        elif _somebody_has_a_parent_of(self):
            super().detach(True)
        else:
            self.model.distorch_placed = None
            placed.handle.discard()

    def _follow(self) -> None:
        """Compute where a node of ComfyUI's has sent the model, which it may have loaded anew."""
        plan, device = self.request.allocation, str(self.load_device)
        line = plan.allocation if isinstance(plan, Plan) else plan
        self.request = replace(self.request, allocation=line, compute=device)
        self.computes_on = self.load_device
        settle(self.model)

    def _place(self, room_bytes: int | None) -> _Placed:
        """Place the weights as asked, within the room that there is; None: all."""
        module, request = _module(self.model), self.request
        self._bake()
        make_ordinary(module)
        asked = plan_for(module, request, machine_for(request, self.load_device))
        plan = asked if room_bytes is None else fitted(asked, room_bytes, request)
        placed = self.model.distorch_placed = _Placed(
            request, asked, distribute(module, Request(allocation=plan))
        )
        return placed

    def _rebudget(self, placed: _Placed, plan: Plan) -> None:
        """Move what is placed otherwise than in ``plan``."""
        now = placed.handle.plan
        if (now.placements, now.ring) != (plan.placements, plan.ring):
            placed.handle.rebudget(plan)

    def _bring_back(self) -> None:
        placed = _placed(self.model)
        if placed is not None:
            self.model.distorch_placed = None
            placed.handle.remove()

    def _bake(self) -> None:
        """Apply LoRA to the weights of layers that take no functions; ComfyUI keeps a backup."""
        for key in baked_keys(self):
            self.patch_weight_to_device(key)


_CLASSES: dict[type, type] = {comfy.model_patcher.ModelPatcher: DistributedPatcher}


def _class_for(found: type) -> type:
    """Our class over the one that a loader made, so that what it has added stays."""
    if issubclass(found, DistributedPatcher):
        return found
    if found not in _CLASSES:
        _CLASSES[found] = type(f"Distributed{found.__name__}", (DistributedPatcher, found), {})
    return _CLASSES[found]


def _somebody_has_a_parent_of(patcher: Any) -> bool:
    """Say whether one of those that a patcher was cloned from is held by more than its clone."""
    while patcher.parent is not None:
        if sys.getrefcount(patcher.parent) > _OURS_ALONE:
            return True
        patcher = patcher.parent
    return False


def _placed(model: Any) -> _Placed | None:
    return getattr(model, "distorch_placed", None)


def _module(model: Any) -> nn.Module:
    """The module whose weights are placed: of an image or video model the part that denoises."""
    found = getattr(model, "diffusion_model", model)
    assert isinstance(found, nn.Module), "ComfyUI's models are modules"
    return found
