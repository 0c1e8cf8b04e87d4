"""Sizes as people write them: ``500mb``, ``2.5gb``. Units are powers of 1024, free of case."""

from __future__ import annotations

import re
from fractions import Fraction

__all__ = ["MAX_BYTES", "UNITS", "read_size"]

MAX_BYTES = 2**63 - 1

UNITS = {"b": 1} | {
    f"{letter}{end}": 2 ** (10 * power)
    for power, letter in enumerate("kmgt", start=1)
    for end in ("b", "", "ib")
}

_SIZE = re.compile(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?|\.[0-9]{1,20})\s*([a-z]*)\s*", re.ASCII)


def read_size(text: str) -> int:
    """Return the bytes of a size, cut to whole ones; a bare number is bytes.

    Raises:
        ValueError: the text is not a size.

    >>> read_size("2.5gb"), read_size("100")
    (2684354560, 100)
    """
    match = _SIZE.fullmatch(text.lower())
    unit_bytes = UNITS.get(match[2] or "b") if match else None
    if match is None or unit_bytes is None:
        raise ValueError(f"{text!r} is not a size in bytes")
    exact = Fraction(match[1]) * unit_bytes
    if exact > MAX_BYTES or (unit_bytes == 1 and exact.denominator != 1):
        raise ValueError(f"{text!r} is not a number of bytes")
    return int(exact)
