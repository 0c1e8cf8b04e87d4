"""The benchmarks, all or some: ours and others side by side, as ratios in one run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import dequantize
import disk
import main_job
import typer
from common import Figures, machine_line

_BENCHMARKS: dict[str, Callable[[], Figures]] = {
    "dequantize": dequantize.run,
    "disk": disk.run,
    "main": main_job.run,
}


def main(
    only: Annotated[
        str, typer.Option(metavar="NAMES", help=f"Some of {','.join(_BENCHMARKS)}.")
    ] = ",".join(_BENCHMARKS),
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every figure there.")
    ] = None,
) -> None:
    """Measure and print tables; no time is ever asserted, since machines differ."""
    names = [name.strip() for name in only.split(",")]
    unknown = [name for name in names if name not in _BENCHMARKS]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(_BENCHMARKS)}")
    line = machine_line()
    print(f"{line}, {time.strftime('%Y-%m-%d %H:%M')}")
    found = {}
    for name in names:
        print()
        found[name] = _BENCHMARKS[name]()
    if json_file is not None:
        json_file.write_text(json.dumps({"machine": line, **found}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
