"""What the new nodes ask of an object that is already loaded: its owner, its request, its plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from distorch.errors import ModelError
from distorch.integrations.attach import plan_for
from distorch.integrations.comfyui.in_comfy.ordinary import make_ordinary
from distorch.integrations.comfyui.in_comfy.outputs import loaded_patchers
from distorch.integrations.comfyui.in_comfy.patcher import handle_in
from distorch.integrations.comfyui.node_texts import ANY_DEVICE
from distorch.integrations.memories import machine_here
from distorch.integrations.request import Request
from distorch.machine import Machine
from distorch.plan.plan import Plan

__all__ = ["patcher_of", "plan_leaving_free", "plan_of", "request_for"]


def patcher_of(thing: Any) -> Any:
    """Return ComfyUI's owner of the weights of a MODEL, CLIP, VAE or CONTROL_NET.

    Raises:
        ModelError: it has no weights of its own, or is nothing that has.
    """
    for name in ("patcher", "control_model_wrapped"):
        owner = getattr(thing, name, None)
        if owner is not None:
            return owner
    if hasattr(thing, "load_device") and hasattr(thing, "model"):
        return thing
    raise ModelError(
        f"a {type(thing).__name__} has no weights of its own: some ControlNets use the model's",
        hint="place the MODEL instead",
    )


def request_for(patcher: Any, allocation: str, compute: str, ring: str) -> Request:
    """Return what a node's widgets ask for; an ``auto`` line computes where ComfyUI would."""
    line, device = allocation.strip() or "auto", compute.strip()
    where = None if device in {"", ANY_DEVICE} else device
    if where is None and line.lower() == "auto":
        where = _device_of(patcher)
    return Request(allocation=line, compute=where, ring=ring.strip() or None)


def plan_of(patcher: Any, request: Request, machine: Machine | None = None) -> Plan:
    """Return the plan that a request comes to; nothing moves, and a placed model stays placed.

    Raises:
        AllocationError: the request does not fit this machine.
    """
    handle = handle_in(patcher)
    if handle is not None:
        return handle.plan_as(request, machine)
    module = getattr(patcher.model, "diffusion_model", patcher.model)
    make_ordinary(module)
    return plan_for(module, request, machine)


def plan_leaving_free(patcher: Any, keep_free_bytes: int, compute: str, ring: str) -> Plan:
    """Return the fastest plan that leaves so many bytes of the compute device free of weights.

    What ComfyUI has loaded there counts as free: it makes room when it needs it.

    Raises:
        AllocationError: the memories together have no room for the rest.
    """
    request = request_for(patcher, "auto", compute, ring)
    device = request.compute or plan_of(patcher, request).compute
    machine = machine_here()
    tier = machine.tier(device)
    held_bytes = sum(
        int(loaded.loaded_size())
        for loaded in loaded_patchers()
        if str(loaded.load_device) == device and loaded.model is not patcher.model
    )
    free_bytes = min(tier.capacity_bytes, tier.free_bytes + held_bytes)
    smaller = replace(tier, free_bytes=max(0, free_bytes - keep_free_bytes))
    return plan_of(patcher, replace(request, compute=device), machine.replace_tier(smaller))


def _device_of(patcher: Any) -> str | None:
    """The device that ComfyUI chose, if this machine knows it by that name."""
    name = str(patcher.load_device)
    return name if name in {tier.name for tier in machine_here().tiers} else None
