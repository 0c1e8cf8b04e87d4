"""The strip: a model's bytes in the order of execution, folded into rows where it is fine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from distorch.draw.bars import Bar, Entry, merged, paint_bars, paint_legend
from distorch.draw.canvas import Style, shown
from distorch.plan.plan import Plan, gib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["paint_strip", "strip_rows", "tier_entries"]

_GIB: Final = 1 << 30
_BARS_IN_A_ROW: Final = 220
_MOST_ROWS: Final = 8
_ROW_HEIGHT: Final = 0.8
_PAPER: Final = "#f2f2f2"


def strip_rows(plan: Plan) -> list[list[Bar]]:
    """Return the blocks as bars, in rows of equal bytes: as many as show most of them apart."""
    bars, end = [], 0
    for placement in plan.placements:
        bars.append(Bar(placement.tier, end, end + placement.block.nbytes))
        end += placement.block.nbytes
    num_bars = sum(1 for _ in merged(bars, end / _MOST_ROWS))
    num_rows = max(1, min(_MOST_ROWS, -(-num_bars // _BARS_IN_A_ROW)))
    width = end / num_rows
    return [_cut(bars, number * width, (number + 1) * width) for number in range(num_rows)]


def _cut(bars: Sequence[Bar], low: float, high: float) -> list[Bar]:
    return [
        replace(bar, begin=max(bar.begin, low) - low, end=min(bar.end, high) - low)
        for bar in bars
        if bar.begin < high and bar.end > low
    ]


def tier_entries(plan: Plan, styles: dict[str, Style]) -> list[Entry]:
    """Return what the legend says: bytes and blocks of each tier, and the ring."""
    from matplotlib.patches import Patch

    entries: list[Entry] = []
    for tier, nbytes in plan.bytes_by_tier.items():
        count = sum(placement.tier == tier for placement in plan.placements)
        blocks = f"{count:,} block{'s' * (count != 1)}"
        patch = Patch(facecolor=styles[tier].colour)
        entries.append((patch, f"{shown(tier, 40)}: {gib(nbytes)} in {blocks}"))
    ring = plan.ring
    patch = Patch(facecolor="white", edgecolor=styles[plan.compute].colour, linewidth=1.2)
    what = f"{gib(ring.nbytes)} = {ring.num_slots} x {gib(ring.slot_bytes)}"
    entries.append((patch, f"ring on {shown(plan.compute, 40)}: {what}"))
    return entries if ring.num_slots else entries[:-1]


def paint_strip(
    axes: Axes,
    plan: Plan,
    rows: Sequence[Sequence[Bar]],
    styles: dict[str, Style],
    legend_below_inches: float,
) -> None:
    """Draw the rows, each tier in its colour and, for prints without colours, of its height."""
    width = plan.model_bytes / len(rows) or 1.0
    for number, row in enumerate(rows):
        bottom = -number - _ROW_HEIGHT / 2
        axes.broken_barh([(0, width)], (bottom, _ROW_HEIGHT), facecolors=_PAPER)
        for tier, style in styles.items():
            inside = [bar for bar in row if bar.lane == tier]
            place = (bottom, _ROW_HEIGHT * style.height)
            paint_bars(axes, inside, width, place, facecolors=style.colour)
    axes.set_ylim(0.5 - len(rows), 0.5)
    axes.set_yticks([-number for number in range(len(rows))])
    firsts = [f"from {number * width / _GIB:.1f} GiB" for number in range(len(rows))]
    axes.set_yticklabels(firsts if len(rows) > 1 else [f"{len(plan.placements):,} blocks"])
    _bytes_axis(axes, width)
    order = ", in the order of execution" + (", row by row" if len(rows) > 1 else "")
    axes.set_xlabel("GiB of weights" + order, labelpad=2)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    paint_legend(axes, tier_entries(plan, styles), legend_below_inches)


def _bytes_axis(axes: Axes, width: float) -> None:
    from matplotlib.ticker import MaxNLocator

    steps = MaxNLocator(nbins=10, steps=[1, 2, 5, 10]).tick_values(0, width / _GIB)
    axes.set_xlim(0, width)
    axes.set_xticks([step * _GIB for step in steps if step * _GIB <= width])
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / _GIB:g}")
