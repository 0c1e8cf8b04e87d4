"""``distorch plan``: does it fit, what goes where, how long is a step, before it runs."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from distorch.cli.answer import answer, difference, numbers
from distorch.cli.demo import find_model, is_checkpoint
from distorch.cli.options import (
    AllocationOption,
    BatchOption,
    ComputeOption,
    DonorOption,
    FormatOption,
    FramesOption,
    JsonOption,
    MachineOption,
    NamedModel,
    Placement,
    PlotOption,
    RingOption,
    SizeOption,
    TokensOption,
    VirtualVramOption,
    WeightDtypeOption,
)
from distorch.cli.output import Bar, show_pairs, show_table
from distorch.cli.profiles import model_profile
from distorch.draw import check_picture, draw_plan
from distorch.errors import AllocationError, StorageError
from distorch.files import replacing
from distorch.formats import open_checkpoint
from distorch.formats.scales import pair_scales
from distorch.machine import Machine
from distorch.plan.blocks import Block, Part, cut
from distorch.plan.cost import Profile
from distorch.plan.from_names import profile_from_names, tree_from_names
from distorch.plan.plan import Plan, gib
from distorch.plan.planner import make_plan
from distorch.plan.storage import converted, format_named
from distorch.simulate import best_plan, predict, timeline

__all__ = ["HELP", "plan", "read_plan"]

HELP = """
Say what a model would cost on a machine, without loading anything.

MODEL is a name (flux.1-dev, qwen-image, wan-14b, ...; a wrong one lists them), a directory with a
configuration, or a checkpoint. With --machine, any machine that is known or described; else this
one, as `distorch probe` measured it.

\b
Examples:
  distorch plan wan-14b --machine rtx4070-12gb --size 832x480 --frames 81 --format Q4_K
  distorch plan qwen-image --machine rtx3090-24gb --format fp8 --plot plan.html
  distorch plan demo --allocation "cpu,64mb;disk,*" --save plan.json
  distorch plan model.gguf --virtual-vram 8 --donor disk --json
  distorch plan --diff before.json after.json
"""

FileOption = Annotated[
    str | None,
    typer.Option("--file", metavar="PATH", help="A checkpoint, by its header alone."),
]
SaveOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write the plan to this file, as JSON.")
]
DiffOption = Annotated[
    tuple[Path, Path] | None, typer.Option(metavar="FILE FILE", help="Compare two saved plans.")
]
_SMALLER = ("fp8", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a model by name is asked to do."""

    size: str | None
    frames: int | None
    tokens: int | None
    batch: int
    format: str | None
    weight_dtype: str | None


def plan(
    model: Annotated[str | None, NamedModel] = None,
    *,
    machine: MachineOption = None,
    allocation: AllocationOption = None,
    virtual_vram: VirtualVramOption = None,
    donor: DonorOption = None,
    compute: ComputeOption = None,
    ring: RingOption = None,
    size: SizeOption = None,
    frames: FramesOption = None,
    tokens: TokensOption = None,
    batch: BatchOption = 1,
    format: FormatOption = None,  # noqa: A002  what users call it
    file: FileOption = None,
    weight_dtype: WeightDtypeOption = None,
    as_json: JsonOption = False,
    save: SaveOption = None,
    plot: PlotOption = None,
    diff: DiffOption = None,
) -> None:
    """Plan a model, print the answer, and write or draw the plan if asked."""
    if diff is not None:
        _show_difference(*map(read_plan, diff))
        return
    name = file or model
    if name is None:
        raise AllocationError("no MODEL was named", hint="distorch plan flux.1-dev")
    placement = Placement(
        allocation=allocation, virtual_vram=virtual_vram, donor=donor, compute=compute, ring=ring
    )
    asked = Workload(
        size=size,
        frames=frames,
        tokens=tokens,
        batch=batch,
        format=format,
        weight_dtype=weight_dtype,
    )
    where = Machine.load(machine) if machine else Machine.here()
    if plot is not None:
        check_picture(plot)
    profile: Profile | None
    if file is None and not is_checkpoint(name):
        made, profile = _by_name(name, asked, placement, where)
    else:
        made, profile, where = _by_file(name, asked, placement, where)
    if save is not None:
        _save(made, save)
    if plot is not None:
        draw_plan(made, timeline(made, profile, where) if profile else None, plot)
    if as_json:
        typer.echo(numbers(made))
    else:
        show_pairs(answer(made, where))


def read_plan(path: Path) -> Plan:
    """Read a plan that ``--save`` wrote.

    Raises:
        StorageError: the file cannot be read.
        FormatError: it holds no plan.
    """
    try:
        return Plan.from_json(path.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise StorageError(
            f"the plan {path} cannot be read: {error.strerror}",
            hint="distorch plan MODEL --save plan.json",
        ) from error


def _by_name(
    name: str, asked: Workload, placement: Placement, machine: Machine
) -> tuple[Plan, Profile]:
    if asked.weight_dtype is not None:
        raise AllocationError(
            "--weight-dtype is for the weights of a checkpoint, and a model by name has none",
            hint=f"--format {asked.weight_dtype}",
        )
    profile = model_profile(
        name,
        size=asked.size,
        frames=asked.frames,
        tokens=asked.tokens,
        batch=asked.batch,
        format=asked.format or "bf16",
    )
    try:
        return _judged(profile, placement, machine), profile
    except AllocationError as error:
        free = placement == Placement(compute=placement.compute)  # no line of the user's own
        smaller = _smaller(profile, placement, machine) if free else ""
        if not smaller:
            raise
        raise AllocationError(error.problem, hint=smaller) from error


def _smaller(profile: Profile, placement: Placement, machine: Machine) -> str:
    """Return the first smaller format in which the model fits as asked; empty if there is none."""
    for name in _SMALLER:
        stored = _stored(profile, name)
        with suppress(AllocationError):
            if stored.model_bytes < profile.model_bytes and _judged(stored, placement, machine):
                return f"--format {name}: {gib(stored.model_bytes)} of weights, which fit"
    return ""


def _stored(profile: Profile, name: str) -> Profile:
    """The same model with its weights stored in another format."""
    form = format_named(name)

    def again(part: Part) -> Part:
        dtype = form.dtype(part.shape)
        return replace(part, dtype=dtype.name, nbytes=dtype.nbytes(part.shape))

    blocks = (
        Block(
            name=block.name,
            parts=tuple(map(again, block.parts)),
            module=block.module,
            looked_up=block.looked_up,
        )
        for block in profile.blocks
    )
    return replace(profile, blocks=tuple(blocks))


def _by_file(
    name: str, asked: Workload, placement: Placement, machine: Machine
) -> tuple[Plan, Profile | None, Machine]:
    """Plan a checkpoint from its header; it has room on this machine's disk, where it lies."""
    given = [key for key in ("size", "frames", "format") if getattr(asked, key) is not None]
    if given:
        raise AllocationError(
            f"--{given[0]} was given with a checkpoint, whose header does not say what it is for",
            hint="distorch plan wan-14b --size 832x480",
        )
    with Bar() as bar:
        path = find_model(name, bar)
    blocks, in_place = _blocks_in(path, asked.weight_dtype)
    model_bytes = sum(block.nbytes for block in blocks)
    if in_place:
        machine = _with_room_on_disk(machine, model_bytes)
    made = make_plan(  # as a run of this file does
        blocks,
        placement.line(model_bytes, machine),
        machine,
        compute=placement.compute,
        ring_bytes=placement.ring_bytes,
    )
    if all(found.device != made.compute for found in machine.computes):
        return made, None, machine
    dtype = "F32" if made.compute == "cpu" else "BF16"
    profile = profile_from_names(path.name, blocks, asked.tokens or 1, dtype)
    return replace(made, prediction=predict(made, profile, machine)), profile, machine


def _blocks_in(path: Path, weight_dtype: str | None) -> tuple[tuple[Block, ...], bool]:
    """The blocks of a checkpoint, and whether they are read from it in place when it runs."""
    with open_checkpoint(path) as checkpoint:
        found = pair_scales(checkpoint)
        tensors = found.tensors
        if weight_dtype is not None:
            tensors = converted(tensors, format_named(weight_dtype), found.scales)
        return cut(tree_from_names(tensors)), tensors == found.tensors


def _judged(profile: Profile, placement: Placement, machine: Machine) -> Plan:
    return best_plan(
        profile,
        placement.line(profile.model_bytes, machine),
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


def _show_difference(before: Plan, after: Plan) -> None:
    rows, moved = difference(before, after)
    show_pairs(rows)
    if moved:
        show_table(("block", "bytes", "was on", "is on"), moved)


def _with_room_on_disk(machine: Machine, model_bytes: int) -> Machine:
    """See the disk as having room for the checkpoint: it is there, and is read in place."""
    disk = machine.tier("disk")
    free_bytes = max(disk.free_bytes, model_bytes)
    capacity_bytes = max(disk.capacity_bytes, free_bytes)
    return machine.replace_tier(replace(disk, capacity_bytes=capacity_bytes, free_bytes=free_bytes))
