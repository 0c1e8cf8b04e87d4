"""``distorch bench``: seconds per step against what is offloaded, predicted or measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Final

import typer

from distorch.cli.demo import find_model, is_checkpoint
from distorch.cli.measure import measured_sweep
from distorch.cli.options import (
    BatchOption,
    FormatOption,
    FramesOption,
    JsonOption,
    MachineOption,
    NamedModel,
    PlotOption,
    SizeOption,
    TokensOption,
)
from distorch.cli.output import Bar, show_pairs, show_table
from distorch.cli.profiles import model_profile
from distorch.cli.sweep import Sweep, predicted_sweep
from distorch.draw import check_picture, draw_sweep, seconds_text
from distorch.errors import MachineError
from distorch.machine import Machine
from distorch.plan.plan import gib

__all__ = ["HELP", "bench"]

HELP = """
Say how many seconds a step takes as more and more of a model is offloaded.

A model by name or by its configuration is predicted, on any machine that is known or described.
A checkpoint (GGUF, safetensors, demo) is measured: on this machine, by decoding tokens.

\b
Examples:
  distorch bench flux.1-dev --sweep --machine rtx4070-12gb --plot sweep.png
  distorch bench wan-14b --sweep --machine 2x-rtx3090 --size 832x480 --frames 81 --format Q8_0
  distorch bench demo --sweep --points 5
  distorch bench model.gguf --json
"""

_TITLES: Final = ("donor", "offloaded", "a step", "waited", "bound", "E", "limited by")

SweepOption = Annotated[
    bool,
    typer.Option("--sweep", help="From nothing to all offloaded; else one step, as auto has it."),
]
PointsOption = Annotated[
    int, typer.Option(metavar="N", min=2, max=200, help="Points of each line of the sweep.")
]
StepsOption = Annotated[
    int, typer.Option(metavar="N", min=1, help="Steps to measure at each point, of a checkpoint.")
]


def bench(
    model: Annotated[str, NamedModel],
    *,
    sweep: SweepOption = False,
    machine: MachineOption = None,
    points: PointsOption = 9,
    steps: StepsOption = 12,
    size: SizeOption = None,
    frames: FramesOption = None,
    tokens: TokensOption = None,
    batch: BatchOption = 1,
    format: FormatOption = None,  # noqa: A002  what users call it
    plot: PlotOption = None,
    as_json: JsonOption = False,
) -> None:
    """Predict or measure steps, print a table, and draw it if asked."""
    if plot is not None:
        check_picture(plot)  # before all the work that it shows
    num_points = points if sweep else None
    if is_checkpoint(model):
        found = _measured(model, machine, num_points, steps)
    else:
        where = Machine.here() if machine is None else Machine.load(machine)
        profile = model_profile(
            model, size=size, frames=frames, tokens=tokens, batch=batch, format=format or "bf16"
        )
        with Bar() as bar:
            found = predicted_sweep(profile, where, num_points, bar.begin)
    if plot is not None:
        _draw(found, plot)
    if as_json:
        typer.echo(json.dumps(found.numbers()))
    else:
        _show(found)


def _measured(model: str, machine: str | None, num_points: int | None, steps: int) -> Sweep:
    if machine is not None:
        raise MachineError(
            f"{model} is a checkpoint, which is measured on this machine, not on {machine}",
            hint=f"without --machine; or distorch plan {model} --machine {machine}",
        )
    with Bar() as bar:
        path = find_model(model, bar)
        return measured_sweep(path, path.name, num_points, steps, bar)


def _show(found: Sweep) -> None:
    how = "measured" if found.measured else "predicted"
    show_pairs(
        [
            ("model", f"{found.model}, {gib(found.model_bytes)}"),
            ("machine", f"{found.machine}, {found.compute} computes"),
            ("compute alone", f"{seconds_text(found.compute_seconds)} a step, {how}"),
        ]
    )
    print()  # noqa: T201
    show_table(
        _TITLES,
        [
            (
                point.donor,
                gib(point.offloaded_bytes),
                seconds_text(point.seconds),
                f"{point.waited_share:.0%}",
                seconds_text(point.bound_seconds),
                f"{point.E:.2f}",
                point.limited_by,
            )
            for point in found.points
        ],
    )
    if found.skipped:
        print()  # noqa: T201
        show_pairs(("left out", skipped) for skipped in found.skipped)


def _draw(found: Sweep, path: Path) -> None:
    how = "measured" if found.measured else "predicted"
    draw_sweep(
        found.drawn(),
        path,
        title=f"{found.model}: what offloading costs",
        subtitle=f"{gib(found.model_bytes)} on {found.machine}, {how}",
        compute=found.compute,
        compute_seconds=found.compute_seconds,
    )
