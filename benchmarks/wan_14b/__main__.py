"""A 14B video model denoises within 2 GiB of memory: ``make demo-14b``.

Writes a GGUF of Wan 2.1's architecture with random weights (8 GB, in a folder of its own that goes
afterwards), denoises under a hard cap where this system lets us set one, and compares some layers,
bit by bit, with the same layers computed from dense weights in memory.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks' own folder
import model_file
from common import CappedRun, MemoryGroups, forget, write_out

from distorch.cli.output import Bar, show_pairs
from distorch.plan.plan import gib
from distorch.sizes import read_size

_HERE = Path(__file__).parent
_SPARE_BYTES = 1 << 30  # that the disk keeps


def main(
    folder: Annotated[Path | None, typer.Option(help="Where the model is written.")] = None,
    cap: Annotated[str, typer.Option(help="The most memory that the run may take.")] = "2gb",
    allocation: Annotated[str, typer.Option(help="Where the weights rest.")] = "cpu,400mb;disk,*",
    layers: Annotated[int, typer.Option(min=1, help="Layers of the model: 40 are 14 B.")] = 40,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the sampler.")] = 4,
) -> None:
    """Run a 14B model in a fraction of its size."""
    home = folder or Path(tempfile.gettempdir())
    needed, free = model_file.file_bytes(layers), shutil.disk_usage(home).free
    if free < needed + _SPARE_BYTES:
        raise SystemExit(
            f"the model takes {gib(needed)} and {home} has {gib(free)} free: nothing was written\n"
            "  try: make demo-14b ARGS='--folder /a/disk/with/room', or --layers 4 for a small one"
        )
    with tempfile.TemporaryDirectory(prefix="distorch-14b-", dir=home) as place:
        model, samples = Path(place) / "wan-14b-q4_k.gguf", Path(place) / "samples.safetensors"
        written = _write(model, layers)
        run, capped = _denoise(model, samples, allocation, steps, read_size(cap))
        same = _compare(model, samples)
    show_pairs(_report(model_file.file_bytes(layers), written, run, capped, same))
    if not all(same.values()):
        raise SystemExit("the layers differ: this is a bug, please report it")


def _write(path: Path, layers: int) -> float:
    began = time.perf_counter()
    with Bar() as bar:
        model_file.write(path, layers, bar.counting("writing the model"))
        bar.begin("letting the disk finish")
        write_out([path])
        forget([path])  # what is cached already would not count under the cap
    return time.perf_counter() - began


def _denoise(
    model: Path, samples: Path, allocation: str, steps: int, cap_bytes: int
) -> tuple[CappedRun, str]:
    command = [sys.executable, str(_HERE / "denoise.py"), str(model), allocation, str(steps)]
    groups, why = MemoryGroups.find()
    with Bar() as bar:
        bar.begin(f"denoising in {gib(cap_bytes)}")
        if groups is None:
            run = CappedRun.measured([*command, str(samples)])
        else:
            run = groups.run([*command, str(samples)], cap_bytes)
    if run.figures is None:
        raise SystemExit(f"the run ended with {run.returncode}: {gib(cap_bytes)} were not enough")
    return run, f"{gib(cap_bytes)}, hard" if groups else f"none: {why}"


def _compare(model: Path, samples: Path) -> dict[str, bool]:
    with Bar() as bar:
        bar.begin("computing some layers again, all in memory")
        command = [sys.executable, str(_HERE / "resident.py"), str(model), str(samples)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, bool] = json.loads(done.stdout.splitlines()[-1])
    return found


def _report(
    model_bytes: int, written: float, run: CappedRun, cap: str, same: dict[str, bool]
) -> list[tuple[str, str]]:
    found: dict[str, Any] = run.figures or {}
    first, *later = found["step_seconds"]
    steps = ", ".join(f"{seconds:.1f}" for seconds in later)
    equal = "bit-identical" if all(same.values()) else f"DIFFERENT: {same}"
    return [
        ("model", f"{gib(model_bytes)}, written in {written:.0f} s"),
        ("memory cap", cap),
        (
            "peak memory",
            f"{gib(run.peak_bytes)} of the group, {gib(run.peak_anonymous_bytes)} its own",
        ),
        ("weights in memory", f"{gib(found['held_bytes'])} of {gib(found['model_bytes'])}"),
        ("ready after", f"{found['ready_seconds']:.1f} s"),
        ("first step", f"{first:.1f} s"),
        ("further steps", f"{steps} s" if later else "-"),
        ("E", f"{found['efficiency']:.2f} = max(compute, transfer) / time"),
        ("streamed", gib(found["streamed_bytes"])),
        (f"layers {', '.join(same)}", f"{equal} to dense weights in memory"),
    ]


if __name__ == "__main__":
    typer.run(main)
