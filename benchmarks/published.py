"""Published measurements of others: reproduced by our simulator, and what ours is said to take.

The project has no such hardware, so this is arithmetic and no measurement of ours: the same figures
on every machine. Without torch; the chart needs matplotlib.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import sglang_prefix
from multigpu import (
    BARE,
    ORIGINAL,
    Copies,
    Result,
    offloading,
    reproduced,
    result,
)

from distorch.cli.output import show_table
from distorch.errors import MissingExtraError

CHART = Path(__file__).parent / "results" / "published.svg"

_GIB = 1 << 30
_WORST = 8
_STEPS = (
    ("base + bytes / published speed", BARE),
    ("+ fp8 from a GPU crosses as bf16", Copies(fp8_as_bf16=True)),
    ("+ pageable host copies at 77 %", Copies(fp8_as_bf16=True, pageable=True)),
    ("+ GPUs without NVLink: up, then down", ORIGINAL),
    ("all but fp8 as bf16", Copies(pageable=True, staged=True)),
    ("all but pageable", Copies(fp8_as_bf16=True, staged=True)),
)


def errors(copies: Copies = ORIGINAL) -> list[float]:
    """Return the relative error of each row with something offloaded."""
    return [abs(reproduced(row, copies) / row.seconds - 1) for row in offloading()]


def run() -> dict[str, Any]:
    """Reproduce, compare, draw; return every figure."""
    results = [result(row) for row in offloading()]
    print(f"{len(results)} measurements of ComfyUI-MultiGPU, in seconds per iteration")
    _show_all(results)
    print("\nrelative error of the reproduction")
    steps = _show_steps()
    print("\nthe worst rows")
    _show_worst(results)
    print("\npredicted speed-up over what was published, at the same memory")
    _show_speedups(results)
    print()
    found = {
        "steps": steps,
        "rows": [asdict(each) for each in results],
        "sglang": sglang_prefix.run(),
    }
    try:
        from published_chart import draw

        draw(results, CHART)
        print(f"\nchart: {CHART.relative_to(Path(__file__).parents[1])}")
    except MissingExtraError as error:
        print(f"\nno chart: {error}")
    return found


def _show_all(results: Iterable[Result]) -> None:
    """Print a table for each model, in seconds per iteration."""
    for name, group in groupby(results, lambda each: each.row.model):
        print(f"\n{name}")
        titles = ("donor", "GB", "published", "reproduced", "error", "our schedule", "ours")
        show_table(titles, (_cells(each) for each in group))


def _cells(each: Result) -> tuple[str, ...]:
    return (
        each.row.link,
        f"{each.row.offloaded_bytes / _GIB:.1f}",
        f"{each.row.seconds:.2f}",
        f"{each.reproduced:.2f}",
        f"{each.error:+.1%}",
        f"{each.schedule:.2f}",
        f"{each.distorch:.2f}",
    )


def _show_steps() -> dict[str, Any]:
    found: dict[str, Any] = {}
    rows = []
    for name, copies in _STEPS:
        each = errors(copies)
        figures = {
            "median": statistics.median(each),
            "mean": statistics.mean(each),
            "worst": max(each),
            "over 10 %": sum(error > 0.1 for error in each),
        }
        found[name] = figures
        cells = [f"{figures[key]:.1%}" for key in ("median", "mean", "worst")]
        rows.append((name, *cells, str(figures["over 10 %"])))
    show_table(("scheme", "median", "mean", "worst", "rows over 10 %"), rows)
    return found


def _show_worst(results: Iterable[Result]) -> None:
    worst = sorted(results, key=lambda each: -abs(each.error))[:_WORST]
    titles = ("model", "donor", "GB", "published", "reproduced", "error", "base")
    rows = ((each.row.model, *_cells(each)[:5], f"{each.base:.2f}") for each in worst)
    show_table(titles, rows)


def _show_speedups(results: Sequence[Result]) -> None:
    """A line per model and one for all: at the median of the rows, and at most."""
    groups = [(name, list(group)) for name, group in groupby(results, lambda each: each.row.model)]
    rows = []
    for name, group in [*groups, ("all", list(results))]:
        schedule = statistics.median(each.row.seconds / each.schedule for each in group)
        ours = statistics.median(each.speedup for each in group)
        hidden = sum(each.distorch <= 1.01 * each.base for each in group)
        rows.append(
            (
                name,
                f"{schedule:.2f}",
                f"{ours:.2f}",
                f"{max(each.speedup for each in group):.2f}",
                f"{hidden} of {len(group)}",
            )
        )
    show_table(("model", "schedule alone", "ours", "at most", "as fast as resident"), rows)


if __name__ == "__main__":
    run()
