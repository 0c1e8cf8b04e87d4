"""What all pictures share: files that are whole, colours that print, text that does no harm.

Figures are made without pyplot, so no global state and no window. Equal input gives equal bytes.
"""

from __future__ import annotations

import html
import io
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from distorch.errors import FormatError, MissingExtraError, StorageError
from distorch.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "BOUND",
    "INK",
    "QUIET",
    "WAIT",
    "WAIT_PAPER",
    "Style",
    "check_picture",
    "save_picture",
    "seconds_text",
    "shown",
    "styles_of",
]

_SUFFIXES: Final = (".png", ".svg", ".html")
_DPI: Final = 160
_LONGEST: Final = 72

INK: Final = "#222222"
QUIET: Final = "#6b6b6b"
WAIT: Final = "#D55E00"
WAIT_PAPER: Final = "#FBE3D0"
BOUND: Final = "#000000"
# Okabe and Ito's colours, which people who see few colours tell apart. Dark ones compute, so that
# tiers also differ in grey; in strips, heights differ too.
_COMPUTE: Final = "#0072B2"
_HOST: Final = "#E69F00"
_DISK: Final = "#8C8C8C"
_CARDS: Final = ("#009E73", "#56B4E9", "#CC79A7", "#F0E442")

_LOOK: Final[Any] = {  # matplotlib's type for it has 300 names
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "text.parse_math": False,  # a $ in a model's name is a $
    "axes.edgecolor": "#b0b0b0",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titlecolor": QUIET,
    "xtick.color": "#b0b0b0",
    "ytick.color": "#b0b0b0",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "hatch.linewidth": 0.8,
    "svg.fonttype": "none",  # text stays text: it is searched, read aloud, and small
    "svg.hashsalt": "distorch",
}
# What would differ between versions and days, or name addresses elsewhere.
_SILENT: Final = {
    "png": {"Software": None},
    "svg": dict.fromkeys(("Date", "Creator", "Format", "Type")),
}

_PAGE: Final = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width"/>
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 75rem;
  padding: 0 1rem; }}
h1 {{ font-size: 1.3rem; }}
svg {{ width: 100%; height: auto; }}
table {{ border-collapse: collapse; margin-top: 1rem; }}
th, td {{ text-align: left; vertical-align: top; padding: 0.15rem 1.5rem 0.15rem 0; }}
th {{ color: #6b6b6b; font-weight: normal; white-space: nowrap; }}
</style>
</head>
<body>
<h1>{title}</h1>
{svg}
<table>
{rows}
</table>
</body>
</html>
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """How a tier looks: its colour, its height in a strip (1 is the full one), its marker."""

    colour: str
    height: float = 1.0
    marker: str = "o"


def styles_of(tiers: Iterable[str], compute: str) -> dict[str, Style]:
    """Give each tier its look: the compute device's, the host's, a disk's, or one of the others'.

    >>> styles_of(["cuda:0", "cpu"], "cuda:0")["cpu"].colour
    '#E69F00'
    """
    styles = {compute: Style(colour=_COMPUTE)}
    num_cards = 0
    for name in tiers:
        if name in styles:
            continue
        if name == "cpu":
            styles[name] = Style(colour=_HOST, height=0.72)
        elif name.partition(":")[0] == "disk":
            styles[name] = Style(colour=_DISK, height=0.44, marker="s")
        else:
            height = 0.86 if num_cards % 2 == 0 else 0.58
            marker = "^vDP"[num_cards % 4]
            colour = _CARDS[num_cards % len(_CARDS)]
            styles[name] = Style(colour=colour, height=height, marker=marker)
            num_cards += 1
    return styles


def shown(text: str, longest: int = _LONGEST) -> str:
    r"""Return text that a picture can show: no control characters, and not endless.

    >>> shown("a\x1b[2Jb"), shown("long " * 20, 10)
    ('a�[2Jb', 'long long…')
    """
    clean = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return clean if len(clean) <= longest else clean[: longest - 1].rstrip() + "…"


def seconds_text(seconds: float) -> str:
    """Write seconds in three digits, in the unit that people would use.

    >>> seconds_text(12.345), seconds_text(0.0421), seconds_text(3e-05)
    ('12.3 s', '42.1 ms', '30 µs')
    """
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{_three_digits(seconds * factor)} {unit}"
    return f"{_three_digits(seconds * 1e6)} µs"


def _three_digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"  # noqa: PLR2004  three digits


def check_picture(path: Path) -> None:
    """Refuse what `draw_plan` and `draw_sweep` could not write, before long work is done for it.

    Raises:
        FormatError: the name does not end in .png, .svg or .html.
        MissingExtraError: matplotlib is not installed.
        StorageError: its folder is not there.

    >>> check_picture(Path("plan.pdf"))
    Traceback (most recent call last):
        ...
    distorch.errors.FormatError: plan.pdf is no picture that can be drawn
      try: a name that ends in .png, .svg or .html: plan.png
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise FormatError(
            f"{path} is no picture that can be drawn",
            hint=f"a name that ends in .png, .svg or .html: {path.stem or 'plan'}.png",
        )
    if not path.parent.is_dir():
        raise _not_written(path, f"{path.parent} is not a folder")
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise MissingExtraError(
            f"pictures need matplotlib, which is not installed: {error}",
            hint='pip install "distorch[plot]"',
        ) from error
    del mpl


def save_picture(
    path: Path,
    size: tuple[float, float],
    paint: Callable[[Figure], None],
    *,
    title: str,
    rows: Iterable[tuple[str, str]] = (),
) -> None:
    """Write what ``paint`` puts on a figure of ``size`` inches; its suffix says in which form.

    ``title`` and ``rows`` are shown by a page (.html) around the picture. The file is whole or as
    it was.

    Raises:
        FormatError, MissingExtraError, StorageError: as `check_picture` says, or a full disk.
    """
    check_picture(path)
    suffix = path.suffix.lower()
    with _look():
        from matplotlib.figure import Figure

        figure = Figure(figsize=size, dpi=_DPI)
        paint(figure)
        data = _bytes(figure, "png" if suffix == ".png" else "svg")
    if suffix == ".html":
        data = _page(title, data.decode(), rows).encode()
    try:
        with replacing(path) as file:
            file.write(data)
    except OSError as error:
        raise _not_written(path, error.strerror or str(error)) from error


def _not_written(path: Path, found: str) -> StorageError:
    return StorageError(
        f"the picture cannot be written to {path}: {found}",
        hint=f"a file name in a folder that is there and has room: {path.name or 'plan.png'}",
    )


@contextmanager
def _look() -> Iterator[None]:
    """Our settings, whatever the user's own; what matplotlib warns of is for programmers."""
    import matplotlib as mpl

    with warnings.catch_warnings(), mpl.rc_context():
        warnings.simplefilter("ignore")  # a glyph that the font lacks
        mpl.rcdefaults()
        mpl.rcParams.update(_LOOK)
        yield


def _bytes(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata=_SILENT[kind])
    return buffer.getvalue()


def _page(title: str, svg: str, rows: Iterable[tuple[str, str]]) -> str:
    cells = "\n".join(
        f'<tr><th scope="row">{_escaped(name)}</th><td>{_escaped(value)}</td></tr>'
        for name, value in rows
    )
    return _PAGE.format(title=_escaped(title), svg=svg[svg.index("<svg") :], rows=cells)


def _escaped(text: str) -> str:
    return html.escape(shown(text, longest=1000))
