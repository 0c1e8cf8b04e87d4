"""``distorch probe``: how fast this machine is."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distorch.cli.options import JsonOption
from distorch.cli.output import Bar, show_table
from distorch.errors import StorageError
from distorch.machine import Machine

if TYPE_CHECKING:
    from distorch.probe import Probed, Reading

__all__ = ["HELP", "probe"]

HELP = """
Measure this machine: its disk, its memory, what computes, and the links between.

Takes less than a minute, most of it for the disk, to which a file of 512 MiB (with --quick 128 MiB)
is written and removed. The speeds are saved for this machine.

\b
Examples:
  distorch probe
  distorch probe --disk /mnt/models --quick
  distorch probe --output machine.toml --json
"""


def probe(
    *,
    disk: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="A folder on the disk that holds your models."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Measure less, less exactly.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the speeds to this file, as TOML, not to yours."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure this machine, print what was found, and save it."""
    from distorch.probe import FULL, QUICK
    from distorch.probe import probe as measure

    path = Machine.probe_path() if output is None else output
    if path.is_dir():
        raise StorageError(f"{path} is a folder", hint=f"--output {path / 'machine.toml'}")
    with Bar() as bar:

        def progress(what: str, done_bytes: int, total_bytes: int) -> None:
            if total_bytes:
                bar.counting(what)(done_bytes, total_bytes)
            else:
                bar.begin(what)

        probed = measure(disk, effort=QUICK if quick else FULL, progress=progress)
    probed.machine.save(path)
    if as_json:
        typer.echo(json.dumps(_facts(probed, path)))
    else:
        show_table(("measured", "speed"), [(r.what, _speed(r)) for r in probed.readings])
        typer.echo(f"\nsaved to {path}")


def _facts(probed: Probed, path: Path) -> dict[str, object]:
    return {
        "saved_to": str(path),
        "machine": asdict(probed.machine),
        "readings": [asdict(reading) for reading in probed.readings],
    }


def _speed(reading: Reading) -> str:
    if reading.unit == "FLOP":
        return f"{reading.per_second / 1e12:,.2f} TFLOP/s"
    return f"{reading.per_second / 1e9:,.2f} GB/s"
