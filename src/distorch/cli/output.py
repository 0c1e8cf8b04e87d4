"""What commands print: tables on stdout, and a bar on stderr while something takes long."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

__all__ = ["Bar", "printable", "show_pairs", "show_table"]

_GAP = (0, 2, 0, 0)
_UNPRINTABLE = "\N{REPLACEMENT CHARACTER}"


def printable(text: str) -> str:
    r"""Replace what could steer a terminal; files and models are the work of strangers.

    >>> printable("a\tb\x1b[2J")
    'a\tb�[2J'
    """
    return "".join(c if c.isprintable() or c in "\n\t" else _UNPRINTABLE for c in text)


def show_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    """Print names and values in two columns."""
    table = Table(box=None, show_header=False, padding=_GAP)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(Text(printable(name)), Text(printable(value)))
    Console().print(table)


def show_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows under titles; all columns but the first hold numbers."""
    table = Table(box=None, padding=_GAP, header_style="dim")
    for title in titles:
        table.add_column(title, justify="right" if table.columns else "left")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console().print(table)


class Bar:
    """One line on a terminal's stderr that says what is being done, and how far it is.

    >>> with Bar() as bar:
    ...     progress = bar.counting("loading the weights")
    ...     progress(1, 2)
    ...     bar.begin("preparing the tokenizer")
    """

    def __init__(self) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            DownloadColumn(binary_units=True),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, what: str) -> None:
        """Say what comes next, of unknown length."""
        self._progress.reset(self._task, description=what, total=None)

    def counting(self, what: str) -> Callable[[int, int], None]:
        """Return what is to be called with the bytes done and the bytes in all."""

        def progress(done_bytes: int, total_bytes: int) -> None:
            self._progress.update(
                self._task, description=what, completed=done_bytes, total=total_bytes
            )

        return progress
