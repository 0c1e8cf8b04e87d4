"""One picture of a plan: where its blocks rest and, with a timeline, how a step passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from distorch.draw.bars import LEGEND_ROW_INCHES, legend_rows
from distorch.draw.canvas import QUIET, check_picture, save_picture, seconds_text, shown, styles_of
from distorch.draw.strip import paint_strip, strip_rows, tier_entries
from distorch.draw.timeline import lanes_of, paint_timeline, time_entries
from distorch.plan.plan import Plan, gib
from distorch.simulate import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_plan"]

# All in inches, so that a row is as high in a picture of two as in one of twelve.
_WIDTH: Final = 12.0
_LEFT: Final = 1.75
_RIGHT: Final = 0.25
_HEAD: Final = 0.85
_STRIP_ROW: Final = 0.46
_LANE: Final = 0.5
_TO_LEGEND: Final = 0.52  # room for the axis' numbers and label
_BETWEEN: Final = 0.3


@dataclass(frozen=True, slots=True)
class _Panel:
    """A part of the picture: how high it is, with its legend, and what draws it."""

    height: float
    legend_height: float
    paint: Callable[[Axes], None]


def draw_plan(plan: Plan, timeline: Timeline | None, path: Path) -> None:
    """Draw where the blocks of ``plan`` rest and, with a ``timeline``, how a step passes.

    The timeline comes from ``simulate(..., trace=True)``. The suffix of ``path`` says what is
    written: .png, .svg, or .html, a page that needs nothing beside it.

    Raises:
        FormatError: another suffix.
        MissingExtraError: matplotlib is not installed.
        StorageError: the file cannot be written.
    """
    check_picture(path)
    title = _title(plan, timeline)
    panels = [_strip(plan)] + ([] if timeline is None else [_timeline(plan, timeline)])
    heights = [panel.height + _TO_LEGEND + panel.legend_height + _BETWEEN for panel in panels]
    height = _HEAD + sum(heights)

    def paint(figure: Figure) -> None:
        _paint_head(figure, plan, title)
        top = height - _HEAD
        for panel, whole in zip(panels, heights, strict=True):
            place = (_LEFT, top - panel.height, _WIDTH - _LEFT - _RIGHT, panel.height)
            x, y, wide, high = place
            panel.paint(
                figure.add_axes((x / _WIDTH, y / height, wide / _WIDTH, high / height)),
            )
            top -= whole

    save_picture(path, (_WIDTH, height), paint, title=title, rows=_facts(plan))


def _strip(plan: Plan) -> _Panel:
    styles = styles_of(plan.bytes_by_tier, plan.compute)
    rows = strip_rows(plan)
    return _Panel(
        len(rows) * _STRIP_ROW,
        legend_rows(tier_entries(plan, styles)) * LEGEND_ROW_INCHES,
        lambda axes: paint_strip(axes, plan, rows, styles, _TO_LEGEND),
    )


def _timeline(plan: Plan, timeline: Timeline) -> _Panel:
    styles = styles_of(plan.bytes_by_tier, plan.compute)
    return _Panel(
        len(lanes_of(plan, timeline)) * _LANE,
        legend_rows(time_entries(plan, timeline, styles)) * LEGEND_ROW_INCHES,
        lambda axes: paint_timeline(axes, plan, timeline, styles, _TO_LEGEND),
    )


def _paint_head(figure: Figure, plan: Plan, title: str) -> None:
    x, height = _LEFT / _WIDTH, figure.get_figheight()
    figure.text(x, 1 - 0.36 / height, title, fontsize=13.5, fontweight="bold")
    on = f" on {shown(plan.prediction.machine, 40)}" if plan.prediction else ""
    under = f"{gib(plan.model_bytes)} as {shown(plan.allocation)}{on}"
    figure.text(x, 1 - 0.62 / height, under, color=QUIET)


def _title(plan: Plan, timeline: Timeline | None) -> str:
    found = plan.prediction
    if found is not None:
        return (
            f"{seconds_text(found.predicted_seconds)} a step predicted; bound "
            f"{seconds_text(found.bound_seconds)}, set by {shown(found.limited_by, 40)}"
        )
    if timeline is not None:
        return f"{seconds_text(timeline.step_seconds)} a step predicted"
    return f"Where {len(plan.placements):,} blocks rest"


def _facts(plan: Plan) -> list[tuple[str, str]]:
    """The plan's table, and what was predicted."""
    found = plan.prediction
    if found is None:
        return plan.table()
    return [
        ("machine", found.machine),
        *plan.table(),
        ("a step", f"{seconds_text(found.predicted_seconds)}, predicted"),
        ("bound", f"{seconds_text(found.bound_seconds)}, set by {found.limited_by}"),
        ("predicted / bound", f"{found.over_bound:.2f}"),
        ("compute", seconds_text(found.compute_seconds)),
        ("host RAM", gib(found.host_ram_bytes)),
        ("activations", gib(found.activation_bytes)),
    ]
