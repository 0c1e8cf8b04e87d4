"""How a command ends: one message on stderr, and an exit code that says whose turn it is.

0 is good, 1 a fault of ours (or nobody reads the output any more), 2 something about the input or
the machine, which the message says how to change, and 130 an interruption by Ctrl-C.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import typer
from typer.core import TyperCommand

from distorch.errors import (
    AllocationError,
    DistorchError,
    StorageError,
    is_out_of_memory,
    one_line,
)

__all__ = ["Command"]

_FAULT: Final = 1
_INTERRUPTED: Final = 130


class Command(TyperCommand):
    """A command that never ends in a traceback, unless ``DISTORCH_DEBUG=1`` asks for it."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command, its arguments being read already."""
        with _ending():
            return super().invoke(ctx)


@contextmanager
def _ending() -> Iterator[None]:
    try:
        yield
        sys.stdout.flush()  # here, where a closed pipe is still ours to notice
    except BrokenPipeError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(_FAULT) from error
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("DISTORCH_DEBUG") == "1":
            traceback.print_exc()
        known = _translated(error)
        print(known or _last_words(error), file=sys.stderr)  # noqa: T201
        raise typer.Exit(known.exit_code if known else _code(error)) from error


def _translated(error: BaseException) -> DistorchError | None:
    """Say in our words what the user can change; None for the rest."""
    if isinstance(error, DistorchError):
        return error
    if is_out_of_memory(error):
        return AllocationError(
            f"out of memory: {one_line(error)}",
            hint='a smaller amount for the compute device: --allocation "cpu,64mb;disk,*"',
        )
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return StorageError(
            f"{where}{error.strerror or one_line(error)}",
            hint="check the file's permissions and the room on its disk",
        )
    return None


def _last_words(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return (
        f"{type(error).__name__}: {one_line(error)}\n"
        "  this is a fault of DisTorch, not yours: please report it with the traceback that the "
        "same command shows under DISTORCH_DEBUG=1"
    )


def _code(error: BaseException) -> int:
    return _INTERRUPTED if isinstance(error, KeyboardInterrupt) else _FAULT
