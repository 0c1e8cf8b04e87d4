"""The timeline: one step, a lane for what computes and one for each donor that sends."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from distorch.draw.bars import Bar, Entry, paint_bars, paint_legend
from distorch.draw.canvas import BOUND, WAIT, WAIT_PAPER, Style, seconds_text, shown
from distorch.plan.plan import Plan
from distorch.simulate import Span, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["lanes_of", "paint_timeline", "time_entries"]

_LANE_HEIGHT: Final = 0.66
_LONGEST_NAME: Final = 13
_THINNEST: Final = 1 / 1400  # of the axis: a pixel
_UNITS: Final = (("s", 1.0), ("ms", 1e3), ("µs", 1e6))
_WAITS: Final[dict[str, Any]] = {"facecolor": WAIT_PAPER, "edgecolor": WAIT, "hatch": "//////"}
_BOUND_LINE: Final[dict[str, Any]] = {
    "color": BOUND,
    "linestyle": (0, (5, 3)),
    "linewidth": 1.4,
}


def lanes_of(plan: Plan, timeline: Timeline) -> list[str]:
    """Return ``compute`` and the donors that send, in the order of the plan."""
    sending = {span.lane for span in timeline.spans} - {"compute", "wait"}
    return ["compute", *(tier for tier in plan.bytes_by_tier if tier in sending)]


def time_entries(plan: Plan, timeline: Timeline, styles: dict[str, Style]) -> list[Entry]:
    """Return what the legend says: computing, waiting and how much, and the bound."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    waited = timeline.waited_seconds
    share = waited / timeline.step_seconds if timeline.step_seconds else 0.0
    says = f"waits for weights: {seconds_text(waited)}, {share:.1%} of the step"
    entries: list[Entry] = [
        (Patch(facecolor=styles[plan.compute].colour), "computes"),
        (Patch(**_WAITS), says if waited else "waits for weights: never"),
    ]
    if plan.prediction is not None:
        bound = seconds_text(plan.prediction.bound_seconds)
        entries.append((Line2D([], [], **_BOUND_LINE), f"bound: {bound}"))
    return entries


def paint_timeline(
    axes: Axes,
    plan: Plan,
    timeline: Timeline,
    styles: dict[str, Style],
    legend_below_inches: float,
) -> None:
    """Draw one step in the middle of many; what crosses its ends is cut there."""
    step = timeline.step_seconds or 1.0
    lanes, labels = lanes_of(plan, timeline), []
    for number, lane in enumerate(lanes):
        bars = _within(timeline.spans, lane, step)
        place = (-number - _LANE_HEIGHT / 2, _LANE_HEIGHT)
        computes = lane == "compute"
        colour = styles[plan.compute if computes else lane].colour
        paint_bars(axes, bars, step, place, thinnest=_THINNEST, facecolors=colour)
        device = shown(plan.compute, _LONGEST_NAME)
        name = f"{device} computes" if computes else f"{shown(lane, _LONGEST_NAME)} → {device}"
        labels.append(f"{name}\n{sum(bar.length for bar in bars) / step:.0%} busy")
    waits = _within(timeline.spans, "wait", step)
    place = (-_LANE_HEIGHT / 2, _LANE_HEIGHT)
    paint_bars(axes, waits, step, place, thinnest=_THINNEST, **_WAITS)
    if plan.prediction is not None:
        axes.axvline(plan.prediction.bound_seconds, zorder=3, **_BOUND_LINE)
    axes.set_ylim(0.5 - len(lanes), 0.5)
    axes.set_yticks([-number for number in range(len(lanes))])
    axes.set_yticklabels(labels)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    _time_axis(axes, step)
    paint_legend(axes, time_entries(plan, timeline, styles), legend_below_inches)


def _within(spans: Iterable[Span], lane: str, step: float) -> list[Bar]:
    return [
        Bar(lane, max(span.begin, 0.0), min(span.end, step))
        for span in spans
        if span.lane == lane and span.begin < step and span.end > 0
    ]


def _time_axis(axes: Axes, step: float) -> None:
    unit, factor = next((pair for pair in _UNITS if step * pair[1] >= 1), _UNITS[-1])
    axes.set_xlim(0, step * 1.004)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x * factor:g}")
    axes.set_xlabel(f"{unit} from the start of a step in the middle of many", labelpad=2)
