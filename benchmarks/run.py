"""The benchmarks, all or some: ours and others side by side, as ratios in one run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import dequantize
import disk
import foretold
import links
import lora
import main_job
import offload
import published
import typer
from common import Figures, machine_line
from gpu.suite import gpu

from distorch.errors import MissingExtraError

_BENCHMARKS: dict[str, Callable[[], Figures]] = {
    "dequantize": dequantize.run,
    "disk": disk.run,
    "offload": offload.run,
    "loading": main_job.loading,
    "decoding": main_job.decoding,
    "capped": main_job.capped,
    "published": published.run,
    "foretold": foretold.foretold,
    "residency": foretold.residency,
    "links": links.run,
    "lora": lora.run,
    "gpu": gpu,
}
_GROUPS = {"main": ["loading", "decoding", "capped"]}
_HELP = f"Some of {', '.join([*_BENCHMARKS, *_GROUPS])}, with commas between; all if not given."


def main(
    only: Annotated[str, typer.Option(metavar="NAMES", help=_HELP, show_default=False)] = "",
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every figure there.")
    ] = None,
    read_ahead_kb: Annotated[
        int,
        typer.Option(
            min=0, help="For `disk` and `offload`: the system's read-ahead; 0 leaves it as it is."
        ),
    ] = disk.READ_AHEAD_KIB,
) -> None:
    """Measure and print tables; no time is ever asserted, since machines differ."""
    wanted = [name.strip() for name in only.split(",") if name.strip()] or list(_BENCHMARKS)
    names = [each for name in wanted for each in _GROUPS.get(name, [name])]
    unknown = [name for name in names if name not in _BENCHMARKS]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join([*_BENCHMARKS, *_GROUPS])}")
    line = machine_line()
    print(f"{line}, {time.strftime('%Y-%m-%d %H:%M')}")
    chosen = {
        name: partial(_BENCHMARKS[name], read_ahead_kib=read_ahead_kb)
        for name in ("disk", "offload")
    }
    benchmarks = {**_BENCHMARKS, **chosen}
    found: Figures = {}
    for name in names:
        print(f"\n{name}: ", end="")
        try:
            found[name] = benchmarks[name]()
        except MissingExtraError as error:
            print(f"skipped, {error}")
            found[name] = {"skipped": str(error)}
    if json_file is not None:
        json_file.write_text(json.dumps({"machine": line, **found}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
