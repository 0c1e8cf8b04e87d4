"""``distorch plan``: what would rest where, from the header of a file alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from distorch.cli.demo import find_model
from distorch.cli.options import (
    AllocationOption,
    ComputeOption,
    DonorOption,
    JsonOption,
    ModelArgument,
    Placement,
    RingOption,
    VirtualVramOption,
)
from distorch.cli.output import Bar, show_pairs
from distorch.errors import StorageError
from distorch.files import replacing
from distorch.formats import open_checkpoint
from distorch.machine import Machine
from distorch.plan.blocks import cut
from distorch.plan.from_names import tree_from_names
from distorch.plan.plan import Plan
from distorch.plan.planner import make_plan

__all__ = ["HELP", "plan"]

HELP = """
Show what would rest where, without loading anything.

Reads the header of the checkpoint and the memories of this machine.

\b
Examples:
  distorch plan demo --allocation "cpu,64mb;disk,*"
  distorch plan model.gguf --virtual-vram 8 --donor disk --json
  distorch plan model-directory --save plan.json
"""


def plan(
    model: ModelArgument,
    *,
    allocation: AllocationOption = None,
    virtual_vram: VirtualVramOption = None,
    donor: DonorOption = None,
    compute: ComputeOption = None,
    ring: RingOption = None,
    as_json: JsonOption = False,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the plan to this file, as JSON.")
    ] = None,
) -> None:
    """Plan a model, print the plan, and write it to a file if asked."""
    placement = Placement(
        allocation=allocation, virtual_vram=virtual_vram, donor=donor, compute=compute, ring=ring
    )
    with Bar() as bar:
        path = find_model(model, bar)
    made = _plan(path, placement)
    if save is not None:
        _save(made, save)
    if as_json:
        typer.echo(made.to_json())
    else:
        show_pairs(made.table())


def _plan(path: Path, placement: Placement) -> Plan:
    with open_checkpoint(path) as checkpoint:
        blocks = cut(tree_from_names(checkpoint))
    model_bytes = sum(block.nbytes for block in blocks)
    machine = _with_room_on_disk(Machine.detect(), model_bytes)
    return make_plan(
        blocks,
        placement.line(model_bytes, machine),
        machine,
        compute=placement.compute,
        ring_bytes=placement.ring_bytes,
    )


def _save(made: Plan, path: Path) -> None:
    try:
        with replacing(path) as file:
            file.write(made.to_json().encode() + b"\n")
    except OSError as error:
        raise StorageError(
            f"the plan cannot be written to {path}: {error.strerror}",
            hint="--save a file name in a folder that is there and has room",
        ) from error


def _with_room_on_disk(machine: Machine, model_bytes: int) -> Machine:
    """See the disk as having room for the checkpoint: it is there, and is read in place."""
    disk = machine.tier("disk")
    free_bytes = max(disk.free_bytes, model_bytes)
    capacity_bytes = max(disk.capacity_bytes, free_bytes)
    return machine.replace_tier(replace(disk, capacity_bytes=capacity_bytes, free_bytes=free_bytes))
