"""Draws seconds per iteration against GB offloaded: published, reproduced, and ours."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multigpu import CARD_BYTES, Result

from distorch.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GIB = 1 << 30
_SIZE_INCHES = (12.0, 7.2)
_COLUMNS = 3
_COLOURS = {
    "pcie3x4-1660ti": "#d55e00",
    "pcie3x8-3090": "#cc79a7",
    "pcie3x8-cpu": "#0072b2",
    "pcie4x16-cpu": "#009e73",
    "nvlink-3090": "#e69f00",
}
_LINKS = {
    "pcie3x4-1660ti": "GTX 1660 Ti, PCIe 3.0 x4",
    "pcie3x8-3090": "2nd RTX 3090, PCIe 3.0 x8",
    "pcie3x8-cpu": "host memory, PCIe 3.0 x8",
    "pcie4x16-cpu": "host memory, PCIe 4.0 x16",
    "nvlink-3090": "2nd RTX 3090, NVLink",
}
"""From the slowest to the fastest; later ones are drawn on top."""

_GREY = "#555555"
_PUBLISHED: dict[str, Any] = {
    "linestyle": "none",
    "marker": "o",
    "markersize": 5.5,
    "markeredgecolor": "white",
}
_REPRODUCED: dict[str, Any] = {"linewidth": 1.2, "linestyle": (0, (3, 1.5))}
_OURS: dict[str, Any] = {"linewidth": 2.6, "solid_capstyle": "round", "alpha": 0.85}


def draw(results: Sequence[Result], path: Path) -> None:
    """Draw a panel for each model, and write a picture; the same file for the same figures.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            "matplotlib is not installed", hint="pip install 'distorch[plot]'"
        ) from error
    panels = [(name, list(rows)) for name, rows in groupby(results, lambda each: each.row.model)]
    with mpl.rc_context({"svg.hashsalt": "distorch", "font.size": 10, "svg.fonttype": "path"}):
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        figure.suptitle(
            "Offloading on an RTX 3090: ComfyUI-MultiGPU as published, and DisTorch as predicted",
            fontsize=13,
            fontweight="bold",
        )
        num_rows = -(-(len(panels) + 1) // _COLUMNS)
        axes = figure.subplots(num_rows, _COLUMNS).flatten()
        for at, (name, rows) in zip(axes, panels, strict=False):
            _draw_model(at, name, rows)
        _draw_legend(axes[len(panels)])
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=110, metadata=metadata)


def _draw_model(axes: Axes, name: str, results: Sequence[Result]) -> None:
    model_bytes = results[0].row.model_bytes
    fits = model_bytes < CARD_BYTES  # else it never ran with nothing offloaded
    for link, colour in _COLOURS.items():
        rows = [each for each in results if each.row.link == link]
        offloaded = [each.row.offloaded_bytes / _GIB for each in rows]
        start = [rows[0].base] if rows and fits else []
        places = [0.0, *offloaded] if start else offloaded
        axes.plot(places, [*start, *(each.distorch for each in rows)], color=colour, **_OURS)
        played = [*start, *(each.reproduced for each in rows)]
        axes.plot(places, played, color=colour, **_REPRODUCED)
        axes.plot(offloaded, [each.row.seconds for each in rows], color=colour, **_PUBLISHED)
    _dress(axes, f"{name}, {model_bytes / _GIB:.3g} GB")


def _dress(axes: Axes, title: str) -> None:
    lowest, highest = axes.get_ylim()
    from_zero = lowest < highest / 2
    axes.set_ylim(bottom=0 if from_zero else lowest)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("GB offloaded")
    axes.set_ylabel("seconds per iteration" + ("" if from_zero else " (not from 0)"))
    axes.set_xlim(left=0)
    axes.grid(color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_legend(axes: Axes) -> None:
    from matplotlib.lines import Line2D

    axes.set_axis_off()
    kinds = [
        Line2D([], [], color=_GREY, label="published", **_PUBLISHED),
        Line2D([], [], color=_GREY, label="reproduced: on demand, no overlap", **_REPRODUCED),
        Line2D([], [], color=_GREY, label="DisTorch, predicted: same memory", **_OURS),
    ]
    links = [
        Line2D([], [], color=colour, linewidth=6, label=_LINKS[name])
        for name, colour in _COLOURS.items()
    ]
    look: dict[str, Any] = {
        "loc": "upper left",
        "frameon": False,
        "alignment": "left",
        "title_fontproperties": {"weight": "bold"},
    }
    first = axes.legend(handles=kinds, title="What", bbox_to_anchor=(0.0, 1.0), **look)
    axes.add_artist(first)  # a second legend would else take its place
    axes.legend(handles=links, title="Where weights rest", bbox_to_anchor=(0.0, 0.62), **look)
