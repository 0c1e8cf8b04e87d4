"""The room that ComfyUI gives a model on its device, and the plan that keeps within it."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from distorch.integrations.memories import machine_here
from distorch.integrations.request import Request
from distorch.machine import Machine
from distorch.plan.plan import Plan, gib
from distorch.plan.shrink import shrunk

__all__ = ["fitted", "machine_for", "plan_within"]

_log = logging.getLogger("distorch")


def machine_for(request: Request, device: torch.device | None = None) -> Machine:
    """Return this machine, the cards empty that ComfyUI makes room on: ``device``, or None: all.

    ComfyUI unloads other models when this one is loaded. An ``auto`` request goes by what is free.
    """
    machine = machine_here(request.folder)
    if request.is_auto:
        return machine
    for tier in machine.tiers:
        is_card = not tier.is_disk and tier.name != "cpu"
        if is_card if device is None else tier.name == str(device):
            machine = machine.replace_tier(replace(tier, free_bytes=tier.capacity_bytes))
    return machine


def plan_within(plan: Plan, room_bytes: int) -> Plan:
    """Return a plan that holds no more of its device, as near to ``plan`` as there is."""
    if plan.held_bytes <= room_bytes:
        return plan
    free = {tier.name: tier.usable_bytes for tier in machine_here().tiers}
    return shrunk(plan, room_bytes, free)


def fitted(plan: Plan, room_bytes: int, request: Request) -> Plan:
    """Return `plan_within`, and say in the log if that is not what the user asked for."""
    less = plan_within(plan, room_bytes)
    if less is not plan and not request.is_auto:
        elsewhere = [
            f"{gib(nbytes - plan.bytes_by_tier.get(name, 0))} go to {name}"
            for name, nbytes in less.bytes_by_tier.items()
            if nbytes > plan.bytes_by_tier.get(name, 0)
        ]
        _log.warning(
            "%s asks for %s of %s with its ring, and ComfyUI has room for %s: it takes %s%s",
            plan.allocation,
            gib(plan.held_bytes),
            plan.compute,
            gib(room_bytes),
            gib(less.held_bytes),
            f", and {', '.join(elsewhere)}" if elsewhere else "",
        )
    return less
