"""Seconds per step against what is offloaded: a line for each donor, its bound underneath."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from distorch.draw.bars import LEGEND_ROW_INCHES, Entry, legend_rows, paint_legend
from distorch.draw.canvas import INK, QUIET, Style, save_picture, seconds_text, shown, styles_of
from distorch.plan.plan import gib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["SweepPoint", "draw_sweep"]

_GIB: Final = 1 << 30
_MIB: Final = 1 << 20
# In inches; of the size, the height is that of the axes.
_SIZE: Final = (9.5, 4.4)
_LEFT: Final = 0.8
_RIGHT: Final = 0.3
_HEAD: Final = 0.85
_FOOT: Final = 0.15
_TO_LEGEND: Final = 0.55
_THINNEST: Final = 2.0
_THICKER: Final = 0.8
_TOGETHER: Final = Style(colour=INK, marker="D")  # several donors at once
_LINES_APART: Final = 12  # a slowest line so many times the fastest would flatten it: log then
_BOUND_LINE: Final[dict[str, Any]] = {"linewidth": 1.1, "linestyle": (0, (1, 1.5))}
_FLOOR: Final[dict[str, Any]] = {"color": QUIET, "linewidth": 1.2, "linestyle": (0, (6, 3))}
_MARKER: Final[dict[str, Any]] = {"markersize": 7, "markeredgecolor": "white"}


Lines = dict[str, list["SweepPoint"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPoint:
    """One step with ``offloaded_bytes`` away from the compute device, on ``donor``.

    ``donor`` is a tier, or several as ``cpu + disk``. ``bound_seconds`` is the least that the step
    could take; ``predicted_seconds`` and ``measured_seconds`` are there where somebody did that.

    >>> SweepPoint(donor="cpu", offloaded_bytes=8, bound_seconds=1.0, measured_seconds=1.25).E
    0.8
    """

    donor: str
    offloaded_bytes: int
    bound_seconds: float
    predicted_seconds: float | None = None
    measured_seconds: float | None = None

    @property
    def seconds(self) -> float:
        """What was measured, else what is predicted, else the bound."""
        for found in (self.measured_seconds, self.predicted_seconds):
            if found is not None:
                return found
        return self.bound_seconds

    @property
    def E(self) -> float:  # noqa: N802  its name everywhere
        """The bound over the seconds: 1 is the best there can be."""
        return self.bound_seconds / self.seconds if self.seconds else 1.0


def draw_sweep(
    points: Sequence[SweepPoint],
    path: Path,
    *,
    title: str,
    subtitle: str = "",
    compute: str = "",
    compute_seconds: float | None = None,
) -> None:
    """Draw seconds per step against GiB offloaded, one line for each donor.

    Predicted points are joined by a line, measured ones are markers (joined where nothing is
    predicted); the thin line underneath is the donor's bound. ``compute_seconds`` is the floor of
    all, on the device ``compute``. The suffix of ``path`` is .png, .svg or .html.

    Raises:
        FormatError: another suffix.
        MissingExtraError: matplotlib is not installed.
        StorageError: the file cannot be written.
    """
    lines = _lines(points)
    entries = _entries(lines, compute, compute_seconds)
    wide, axes_high = _SIZE
    high = _HEAD + axes_high + _TO_LEGEND + legend_rows(entries) * LEGEND_ROW_INCHES + _FOOT

    def paint(figure: Figure) -> None:
        x = _LEFT / wide
        figure.text(x, 1 - 0.36 / high, shown(title), fontsize=13.5, fontweight="bold")
        figure.text(x, 1 - 0.62 / high, shown(subtitle, 110), color=QUIET)
        place = (x, 1 - (_HEAD + axes_high) / high, 1 - (_LEFT + _RIGHT) / wide, axes_high / high)
        axes = figure.add_axes(place)
        for number, (donor, line) in enumerate(lines.items()):
            thick = _THINNEST + _THICKER * (len(lines) - 1 - number)
            _paint_line(axes, line, _style(donor, lines, compute), thick)
        if compute_seconds is not None:
            axes.axhline(compute_seconds, **_FLOOR)
        _paint_axes(axes, lines, compute_seconds)
        paint_legend(axes, entries, _TO_LEGEND)

    save_picture(path, (wide, high), paint, title=title, rows=_facts(points, compute_seconds))


def _lines(points: Iterable[SweepPoint]) -> Lines:
    """Points by donor, the slowest line first: thinner ones on top of it leave its rim visible."""
    lines: Lines = {}
    for point in sorted(points, key=lambda point: point.offloaded_bytes):
        lines.setdefault(point.donor, []).append(point)
    return dict(sorted(lines.items(), key=lambda item: -_slowest(item[1])))


def _slowest(line: Iterable[SweepPoint]) -> float:
    return max(point.seconds for point in line)


def _style(donor: str, lines: Lines, compute: str) -> Style:
    alone = [name for name in sorted(lines) if " + " not in name]
    return styles_of(alone, compute).get(donor, _TOGETHER)


def _paint_line(axes: Axes, line: Sequence[SweepPoint], style: Style, thick: float) -> None:
    def draw(seconds: Iterable[float | None], **look: Any) -> None:
        pairs = [
            (point.offloaded_bytes, found)
            for point, found in zip(line, seconds, strict=True)
            if found is not None
        ]
        if pairs:
            axes.plot(*zip(*pairs, strict=True), color=style.colour, **look)

    predicted = [point.predicted_seconds for point in line]
    measured = [point.measured_seconds for point in line]
    joined = measured if predicted == [None] * len(line) else predicted
    draw([point.bound_seconds for point in line], **_BOUND_LINE)
    draw(joined, linewidth=thick, zorder=3, solid_capstyle="round")
    draw(measured, linestyle="none", marker=style.marker, zorder=4, clip_on=False, **_MARKER)


def _entries(lines: Lines, compute: str, compute_seconds: float | None) -> list[Entry]:
    from matplotlib.lines import Line2D

    entries: list[Entry] = []
    for donor, line in lines.items():
        style = _style(donor, lines, compute)
        measured = any(point.measured_seconds is not None for point in line)
        look: dict[str, Any] = {"marker": style.marker, **_MARKER} if measured else {}
        key = Line2D([], [], color=style.colour, linewidth=3, **look)
        entries.append((key, shown(donor, 40) + (", measured" if measured else "")))
    if compute_seconds is not None:
        key = Line2D([], [], **_FLOOR)
        entries.append((key, f"compute alone: {seconds_text(compute_seconds)}"))
    entries.append((Line2D([], [], color=QUIET, **_BOUND_LINE), "the bound of each"))
    return entries


def _paint_axes(axes: Axes, lines: Lines, compute_seconds: float | None) -> None:
    slowest = [_slowest(line) for line in lines.values()]
    floor = compute_seconds or 0.0
    if slowest and max(slowest) > _LINES_APART * min(slowest):
        _log_axis(axes, [*slowest, floor or min(slowest)])
    else:
        axes.set_ylim(0, 1.08 * max([*slowest, floor]) or 1)
    _bytes_axis(axes, [point.offloaded_bytes for line in lines.values() for point in line])
    axes.set_ylabel("seconds per step")
    axes.grid(axis="y", color="#e8e8e8", linewidth=0.8)
    axes.set_axisbelow(True)


def _bytes_axis(axes: Axes, offloaded: Sequence[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    most = max(offloaded, default=0) or _GIB
    unit, size = ("GiB", _GIB) if most >= _GIB else ("MiB", _MIB)
    ticks = MaxNLocator(nbins=10, steps=[1, 2, 5, 10]).tick_values(0, most / size)
    axes.set_xlim(0, 1.03 * most)
    axes.set_xticks([tick * size for tick in ticks if tick * size <= 1.03 * most])
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / size:g}")
    axes.set_xlabel(f"{unit} offloaded from the compute device", labelpad=2)


def _log_axis(axes: Axes, seconds: Sequence[float]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.set_ylim(min(seconds) / 1.5, max(seconds) * 1.2)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _facts(points: Sequence[SweepPoint], compute_seconds: float | None) -> list[tuple[str, str]]:
    rows = [
        (
            f"{point.donor}, {gib(point.offloaded_bytes)}",
            f"{seconds_text(point.seconds)} a step, E {point.E:.2f}",
        )
        for point in points
    ]
    if compute_seconds is not None:
        rows.insert(0, ("compute alone", seconds_text(compute_seconds)))
    return rows
