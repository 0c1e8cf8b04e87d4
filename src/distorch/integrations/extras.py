"""Libraries that are extras of ours: imported when they are needed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from distorch.errors import MissingExtraError

__all__ = ["need"]


def need(library: str, what: str) -> Any:
    """Return ``library``, imported for ``what``: the extra that brings it has its name.

    Raises:
        MissingExtraError: it is not installed.

    >>> need("torch", "a profile").__name__
    'torch'
    """
    try:
        return import_module(library)
    except ImportError as error:
        raise MissingExtraError(
            f"{what} needs {library}, which is not installed",
            hint=f'pip install "distorch[{library}]"',
        ) from error
