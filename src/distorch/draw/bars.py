"""Bars along an axis: of bytes or of seconds, merged where they are too narrow to be seen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from distorch.draw.canvas import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "LEGEND_ROW_INCHES",
    "Bar",
    "Entry",
    "legend_columns",
    "legend_rows",
    "merged",
    "paint_bars",
    "paint_legend",
]

LEGEND_ROW_INCHES: Final = 0.23
_VISIBLE: Final = 1 / 320  # of an axis: what is narrower is merged with its like
_GAP: Final = 1 / 1600  # of an axis, left white between bars that can be told apart
_TOUCHING: Final = 1 / 10_000
_MANY: Final = 250  # more bars than these in a row are one texture
_LEGEND_CHARACTERS: Final = 150  # in a row of a legend, keys and space between included
_KEY_CHARACTERS: Final = 7
_MOST_COLUMNS: Final = 4

Entry = tuple[Any, str]
"""A key of a legend, as matplotlib draws it, and what it says."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A stretch of an axis: bytes of one tier, or seconds of one lane."""

    lane: str
    begin: float
    end: float

    @property
    def length(self) -> float:
        """From begin to end."""
        return self.end - self.begin


def merged(bars: Iterable[Bar], width: float) -> Iterator[Bar]:
    """Join neighbours of one lane where one of them is too narrow for an axis of ``width``.

    >>> list(merged([Bar("cpu", 0, 1), Bar("cpu", 1, 2), Bar("disk", 2, 3)], 1000))
    [Bar(lane='cpu', begin=0, end=2), Bar(lane='disk', begin=2, end=3)]
    """
    last: Bar | None = None
    for bar in bars:
        if last is None:
            last = bar
        elif (
            last.lane == bar.lane
            and bar.begin - last.end <= width * _TOUCHING
            and min(bar.length, last.length) < width * _VISIBLE
        ):
            last = replace(last, end=bar.end)
        else:
            yield last
            last = bar
    if last is not None:
        yield last


def paint_bars(
    axes: Axes,
    bars: Iterable[Bar],
    width: float,
    place: tuple[float, float],
    *,
    thinnest: float = 0.0,
    **look: Any,
) -> None:
    """Draw bars on an axis of ``width``, at the bottom and of the height that ``place`` says.

    A few bars are drawn ``thinnest`` (of the axis) at least, so that none vanishes between pixels;
    very many are drawn as they are, and shade the pixels that they share.
    """
    given = list(bars)
    many = len(given) > _MANY
    gap, least = (0.0, 0.0) if many else (width * _GAP, width * thinnest)
    ranges = [
        (bar.begin, max(bar.length - (gap if bar.length > 4 * gap else 0), least))
        for bar in merged(given, width)
    ]
    axes.broken_barh(ranges, place, **{"linewidth": 0, "snap": not many, **look})


def legend_columns(entries: Sequence[Entry]) -> int:
    """How many entries stand side by side; a legend is filled column by column."""
    lengths = [len(label) + _KEY_CHARACTERS for _, label in entries]
    for columns in range(min(_MOST_COLUMNS, len(entries)), 1, -1):
        rows = -(-len(entries) // columns)
        width = sum(max(lengths[first : first + rows]) for first in range(0, len(lengths), rows))
        if width <= _LEGEND_CHARACTERS:
            return columns
    return 1


def legend_rows(entries: Sequence[Entry]) -> int:
    """How many rows a legend takes."""
    return -(-len(entries) // legend_columns(entries)) if entries else 0


def paint_legend(axes: Axes, entries: Sequence[Entry], below_inches: float) -> None:
    """Put a legend under an axis, where it never hides a bar."""
    from matplotlib.transforms import ScaledTranslation

    figure = axes.get_figure(root=True)
    assert figure is not None, "axes belong to a figure"
    axes.legend(
        [key for key, _ in entries],
        [label for _, label in entries],
        loc="upper left",
        bbox_to_anchor=(0, 0),
        bbox_transform=axes.transAxes + ScaledTranslation(0, -below_inches, figure.dpi_scale_trans),
        borderaxespad=0,
        borderpad=0,
        ncols=legend_columns(entries),
        labelcolor=INK,
        handlelength=1.4,
        columnspacing=2.2,
    )
