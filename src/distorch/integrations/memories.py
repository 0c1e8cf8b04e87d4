"""The memories that a plan names, on this machine: what is here, and what opens them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from distorch import vgpu
from distorch.errors import AllocationError
from distorch.machine import Machine
from distorch.plan.plan import Plan
from distorch.tiers import Store
from distorch.tiers.accelerator import AcceleratorTier
from distorch.tiers.disk import DiskTier
from distorch.tiers.host import HostTier
from distorch.tiers.pinned import Pins

__all__ = ["as_seen", "check_here", "machine_here", "open_stores", "pins_for"]


def machine_here(disk: Path | None = None) -> Machine:
    """Return this machine, with the virtual cards that the environment asks for.

    Raises:
        MachineError: they cannot be built, or what was measured cannot be read.
    """
    if os.environ.get("DISTORCH_VGPU"):
        vgpu.install()
    return Machine.here(disk)


def as_seen(machine: Machine, homes: Mapping[str, int], *, any_tier: bool) -> Machine:
    """The machine as a model sees it whose weights lie, or lay, in ``homes`` (bytes by tier).

    A checkpoint's own disk has room for it: it is there. A module has room where it came from.
    Who names no device means one that torch can use here.
    """
    if not any_tier:
        here = {"cpu", *_accelerators()}
        usable = tuple(tier for tier in machine.tiers if tier.is_disk or tier.name in here)
        machine = replace(machine, tiers=usable)
    for name, nbytes in homes.items():
        tier = machine.tier(name)
        if tier.is_disk:
            free_bytes = max(tier.free_bytes, nbytes)
            capacity_bytes = max(tier.capacity_bytes, free_bytes)
        else:
            capacity_bytes = tier.capacity_bytes
            free_bytes = min(capacity_bytes, tier.free_bytes + nbytes)
        machine = machine.replace_tier(
            replace(tier, capacity_bytes=capacity_bytes, free_bytes=free_bytes)
        )
    return machine


def check_here(plan: Plan) -> None:
    """Refuse a plan that names memories which torch does not find on this machine.

    Raises:
        AllocationError: there is such a memory, or the plan computes on disk.
    """
    here = ["cpu", *_accelerators()]
    missing = [name for name in plan.bytes_by_tier if not _is_disk(name) and name not in here]
    if missing or plan.compute not in here:
        raise AllocationError(
            f"torch finds {', '.join(here)} on this machine, not {missing or plan.compute}",
            hint=f"{here[-1]},64mb;disk,*",
        )


def pins_for(plan: Plan) -> Pins:
    """Return what pins host memory for the accelerators of a plan."""
    names = [plan.compute, *plan.bytes_by_tier]
    kinds = [name.split(":")[0] for name in names if name != "cpu" and not _is_disk(name)]
    return Pins(kinds[0] if kinds else "cpu")


def open_stores(
    plan: Plan, pins: Pins, kept: Collection[str], *, in_place: bool
) -> dict[str, Store]:
    """Open a store for each memory of a plan.

    Weights in ``kept`` stay in tensors of their own. ``in_place`` leaves disk blocks in their file.
    """
    stores: dict[str, Store] = {}
    for name in dict.fromkeys((plan.compute, *plan.bytes_by_tier)):
        here = [placed.block for placed in plan.placements if placed.tier == name]
        blocks = [block for block in here if block.parts[0].tensor not in kept]
        if _is_disk(name):
            _, _, folder = name.partition(":")
            path = Path(folder or tempfile.gettempdir())
            stores[name] = DiskTier(name, None if in_place and not folder else path)
        elif name == "cpu":
            stores[name] = HostTier(name, blocks, None if plan.compute == "cpu" else pins)
        else:
            stores[name] = AcceleratorTier(name, blocks, pins)
    return stores


def _accelerators() -> list[str]:
    """The accelerators that torch can use here, by name."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        return []
    return [f"{kind.type}:{index}" for index in range(torch.accelerator.device_count())]


def _is_disk(name: str) -> bool:
    return name.split(":", maxsplit=1)[0] == "disk"
