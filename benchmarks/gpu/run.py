"""Benchmarks on an accelerator, in one command: `python benchmarks/gpu/run.py --help`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

_BENCHMARKS = Path(__file__).resolve().parents[1]
_MISSING = 3


def main(arguments: list[str] | None = None) -> int:
    """Read the command line and run; 0 unless something that is needed is missing."""
    for folder in (_BENCHMARKS, _BENCHMARKS.parent / "src"):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    from gpu.needs import explain, missing

    if lacking := missing():
        print(explain(lacking), file=sys.stderr)
        return _MISSING
    from gpu.suite import Options, run
    from gpu.workloads import KERNELS, WORKLOADS

    names = ", ".join(f"{name} ({each.title})" for name, each in WORKLOADS.items())
    parser = _parser(f"{names}, {KERNELS} (decoding, products with few rows)")
    chosen = parser.parse_args(arguments)
    only = [name.strip() for name in chosen.only.split(",") if name.strip()]
    if unknown := [name for name in only if name not in {KERNELS, *WORKLOADS}]:
        parser.error(f"{unknown[0]!r} is none of {', '.join([*WORKLOADS, KERNELS])}")
    run(Options(**vars(chosen) | {"only": only}))
    return 0


def _parser(names: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Streaming weights to an accelerator: ours and others, side by side.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--only", default="", help=f"some of {names}; with commas between")
    parser.add_argument("--device", default="", help="cuda:0, vgpu:0; the first one if not given")
    parser.add_argument("--scale", choices=("full", "tiny"), default="full")
    parser.add_argument("--cap-gb", type=float, default=12.0, help="of the device, at full scale")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="what is not done by then is cut"
    )
    parser.add_argument(
        "--host-gb", type=float, default=0.0, help="to pin; 0: 56, or half of what is free"
    )
    parser.add_argument("--folder", type=Path, help="for g7, on the disk to measure")
    parser.add_argument("--out", type=Path, help="a file for the results, written as they come")
    parser.add_argument("--save", action="store_true", help="keep them in benchmarks/results")
    parser.add_argument("--commit", default="", help="where the sources came without their git")
    return parser


if __name__ == "__main__":
    sys.exit(main())
