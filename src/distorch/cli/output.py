"""What commands print: tables on stdout, and a bar on stderr while something takes long."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
)
from rich.table import Table
from rich.text import Text

__all__ = ["Bar", "StepBar", "printable", "show_pairs", "show_table"]

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


class _Line:
    """One line on a terminal's stderr, gone when it ends."""

    def __init__(self, *columns: ProgressColumn) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            *columns,
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


class Bar(_Line):
    """Says what is being done, and how far it is.

    >>> with Bar() as bar:
    ...     progress = bar.counting("loading the weights")
    ...     progress(1, 2)
    ...     bar.begin("preparing the tokenizer")
    """

    def __init__(self) -> None:
        super().__init__(DownloadColumn(binary_units=True))

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


class StepBar(_Line):
    """Says how many steps are done, how long one takes, and what share of it is waiting.

    >>> with StepBar() as steps:
    ...     steps.show(1, 20, 1.25, 0.03)
    """

    def __init__(self) -> None:
        super().__init__(MofNCompleteColumn())

    def show(
        self, done: int, total: int, seconds_per_step: float | None, stalled: float | None
    ) -> None:
        """Show it; what cannot be told yet is None."""
        said = "step"
        if seconds_per_step is not None and stalled is not None:
            said = f"{seconds_per_step:.2f} s a step, {stalled:.0%} stalled, step"
        self._progress.update(self._task, description=said, completed=done, total=total)
