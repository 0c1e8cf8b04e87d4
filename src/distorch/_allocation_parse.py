"""The text of an allocation line: read into entries, and written back.

The grammar is at the top of allocation.py. A fault knows its place in the line and, where one can
be guessed, a cure; the cured line is shown only if it reads.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Literal, NamedTuple

from distorch.errors import AllocationError
from distorch.sizes import MAX_BYTES, UNITS

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

__all__ = ["Entry", "Mode", "line_text", "read_line", "size_text"]

Mode = Literal["auto", "bytes", "ratio", "fraction"]

_EXAMPLE = "cuda:0,2.5gb;cpu,*"
_MAX_CHARACTERS = 4096
_MAX_CURES = 8
_MAX_QUOTED = 40
_ALL_PERCENT = 100

_NAME = re.compile(r"[a-z][a-z0-9_]*", re.ASCII | re.IGNORECASE)
_INDEX = re.compile(r"0|[1-9][0-9]*", re.ASCII)
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+", re.ASCII)
_EXPONENT = re.compile(r"e[+-]?[0-9]+", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What one device of a line is given: whole bytes, percent, or a fraction; never a float.

    With ``rest`` it also takes what the other entries leave, and ``amount`` is the least it gets.

    >>> Entry(device="cpu", amount=5 * 2**30, rest=True).text("bytes")
    'cpu,5gb*'
    """

    device: str
    amount: int | Decimal
    rest: bool = False

    def text(self, mode: Mode) -> str:
        """Write the entry in its canonical form.

        >>> Entry(device="cuda:0", amount=Decimal("12.50")).text("ratio")
        'cuda:0,12.5%'
        """
        if mode == "bytes" or self.rest:
            size = "" if self.rest and not self.amount else size_text(int(self.amount))
            return f"{self.device},{size}{'*' if self.rest else ''}"
        return f"{self.device},{_decimal_text(self.amount)}{'%' if mode == 'ratio' else ''}"


def line_text(mode: Mode, entries: tuple[Entry, ...]) -> str:
    """Write the canonical line, the inverse of `read_line`."""
    return "auto" if mode == "auto" else ";".join(entry.text(mode) for entry in entries)


def size_text(num_bytes: int) -> str:
    """Write bytes in the shortest form that reads back as exactly as many.

    >>> size_text(2_684_354_560), size_text(500 * 2**20), size_text(1_000_000_007)
    ('2.5gb', '500mb', '1000000007b')
    """
    units = ("gb", "mb", "kb", "b")
    forms = [f"{_shortest_multiple(num_bytes, UNITS[unit])}{unit}" for unit in units]
    return min(forms, key=lambda form: (len(form), form.startswith("0.")))


def _shortest_multiple(num_bytes: int, unit_bytes: int) -> str:
    """Return the shortest decimal that, times the unit and cut to whole bytes, is the number.

    The loop ends: as soon as the places are finer than the unit, every byte has a decimal.
    """
    places = 0
    while True:
        scale = 10**places
        digits = -(-num_bytes * scale // unit_bytes)
        if digits * unit_bytes // scale == num_bytes:
            whole, part = divmod(digits, scale)
            return f"{whole}.{part:0{places}}" if places else f"{whole}"
        places += 1


def _decimal_text(number: int | Decimal) -> str:
    text = format(number, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def _quote(text: str) -> str:
    return repr(text if len(text) <= _MAX_QUOTED else f"{text[:_MAX_QUOTED]}...")


class _Piece(NamedTuple):
    """A stretch of the line without the white space around it, and where it starts."""

    start: int
    text: str

    def cut(self, begin: int, end: int | None = None) -> _Piece:
        part = self.text[begin:end]
        return _Piece(self.start + begin + len(part) - len(part.lstrip()), part.strip())

    def split(self, separator: str) -> list[_Piece]:
        pieces, begin = [], 0
        for part in self.text.split(separator):
            pieces.append(self.cut(begin, begin + len(part)))
            begin += len(part) + len(separator)
        return pieces


class _Fault(Exception):  # noqa: N818 (a place in a text, not yet an error)
    """A problem at ``place``; putting ``cure`` there (or at ``cure_at``) may mend the line."""

    def __init__(
        self, place: _Piece, problem: str, cure: str | None = None, cure_at: _Piece | None = None
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.place = place
        self.cure = cure
        self.cure_at = cure_at or place

    def cured(self, line: str) -> str | None:
        if self.cure is None:
            return None
        start, old = self.cure_at
        return line[:start] + self.cure + line[start + len(old) :]


class _Amount(NamedTuple):
    """An amount as written, before the other entries say what a bare number means."""

    place: _Piece
    kind: Literal["rest", "bytes", "ratio", "bare"]
    number: Decimal = Decimal(0)
    unit_bytes: int = 1
    is_rest: bool = False


class _Pair(NamedTuple):
    """An entry as written."""

    place: _Piece
    device_at: _Piece
    device: str
    amount: _Amount


def read_line(text: str) -> tuple[Mode, tuple[Entry, ...]]:
    """Read a line, or raise an `AllocationError` that shows the place and a line that reads.

    >>> mode, entries = read_line("cpu, 64MiB; disk, *")
    >>> line_text(mode, entries)
    'cpu,64mb;disk,*'
    """
    _check_length(text, len(text))
    try:
        mode, entries = _read(text)
    except _Fault as fault:
        raise AllocationError(
            fault.problem,
            hint=_nearest(text, fault),
            text=_printable(text),
            position=fault.place.start,
            length=len(fault.place.text),
        ) from None
    # What is written back must read again, so the limit is one for both forms.
    _check_length(text, len(line_text(mode, entries)))
    return mode, entries


def _check_length(text: str, num_characters: int) -> None:
    if num_characters > _MAX_CHARACTERS:
        problem = f"{num_characters:,} characters are too many: a line has at most 4,096"
        shown = f"{_printable(text[:60])}..."
        raise AllocationError(problem, hint=_EXAMPLE, text=shown, position=len(shown) - 3, length=3)


def _nearest(text: str, fault: _Fault) -> str:
    """Apply the cures one after another until the line reads; an example where they run out."""
    for _ in range(_MAX_CURES):
        line = fault.cured(text)
        if line is None or len(line) > _MAX_CHARACTERS:
            break
        try:
            mode, entries = _read(line)
        except _Fault as next_fault:
            text, fault = line, next_fault
        else:
            return line_text(mode, entries)
    return _EXAMPLE


def _read(text: str) -> tuple[Mode, tuple[Entry, ...]]:
    _check_printable(text)
    line = _Piece(0, text).cut(0)
    if line.text.lower() == "auto":
        return "auto", ()
    pieces = line.split(";")
    if len(pieces) > 1 and not pieces[-1].text:
        pieces.pop()
    pairs = [_read_pair(piece, line) for piece in pieces]
    _check_repeats(pairs)
    kinds = {pair.amount.kind for pair in pairs}
    mode: Mode
    values: Sequence[int | Decimal]
    if "ratio" in kinds:
        mode, values = "ratio", [_percent(pair.amount) for pair in pairs]
        _check_ratios(pairs)
    elif kinds == {"bare"}:
        mode, values = "fraction", [_fraction(pair.amount) for pair in pairs]
    else:
        mode, values = "bytes", [_bytes(pair.amount, kinds) for pair in pairs]
    entries = (
        Entry(device=pair.device, amount=value, rest=pair.amount.is_rest)
        for pair, value in zip(pairs, values, strict=True)
    )
    return mode, tuple(entries)


def _printable(text: str, instead: str = "\N{REPLACEMENT CHARACTER}") -> str:
    return "".join(char if char.isprintable() else instead for char in text)


def _check_printable(text: str) -> None:
    """Refuse control and invisible characters: they would move the caret, or the terminal."""
    for position, char in enumerate(text):
        if not char.isprintable():
            problem = f"control character {char!a}: write plain text on one line"
            raise _Fault(_Piece(position, char), problem, _printable(text, " "), _Piece(0, text))


def _read_pair(piece: _Piece, line: _Piece) -> _Pair:
    """Read one ``device,amount``."""
    if not piece.text:
        cure = "" if line.text else "cpu,*"
        raise _Fault(piece, "an empty entry: write device,amount", cure, _Piece(piece.start, ";"))
    if piece.text.lower() == "auto":
        raise _Fault(piece, "'auto' stands alone: it needs no ';'", "auto", line)
    parts = piece.split(",")
    if len(parts) == 1:
        cure = piece.text.replace(" ", ",", 1) if " " in piece.text else f"{piece.text},*"
        raise _Fault(piece, f"no comma in {_quote(piece.text)}: write device,amount", cure)
    if len(parts) > 2:  # noqa: PLR2004 (a pair)
        second = piece.text.index(",", piece.text.index(",") + 1)
        around = piece.text[second - 1 : second + 2]
        cure = "." if around[0].isdigit() and around[-1].isdigit() else ";"
        problem = "a second comma: ';' stands between entries, '.' in numbers"
        raise _Fault(piece.cut(second, second + 1), problem, cure)
    return _Pair(piece, parts[0], _read_device(parts[0]), _read_amount(parts[1]))


def _read_device(piece: _Piece) -> str:
    """Read ``name``, ``name:index`` or ``disk:path``; only the path keeps its case."""
    name, colon, tail = piece.text.partition(":")
    if not _NAME.fullmatch(name):
        problem = f"{_quote(name)} is not a device name" if name else "no device"
        raise _Fault(_Piece(piece.start, name), f"{problem}: write one like cpu, cuda:0 or disk")
    name = name.lower()
    if not colon:
        return name
    if name == "disk":
        if not tail or tail.startswith(" "):
            cure = f"disk:{tail.lstrip()}" if tail else "disk"
            raise _Fault(piece, "no path right after 'disk:': write one like disk:/mnt/nvme", cure)
        return f"disk:{tail}"
    if not _INDEX.fullmatch(tail):
        digits = "".join(re.findall("[0-9]", tail)).lstrip("0") or "0"
        problem = f"{_quote(tail)} is not an index: write digits only, like {name}:0"
        raise _Fault(_Piece(piece.start + len(name) + 1, tail), problem, digits)
    return f"{name}:{tail}"


def _read_amount(piece: _Piece) -> _Amount:
    """Read ``*``, or a number and what follows it."""
    if piece.text == "*":
        return _Amount(piece, "rest", is_rest=True)
    match = _NUMBER.match(piece.text)
    if not match:
        raise _not_an_amount(piece)
    number = Decimal(match.group())
    suffix = piece.cut(match.end())
    unit = suffix.text.removesuffix("*").rstrip()
    is_rest = suffix.text.endswith("*")
    if unit == "%" and is_rest:
        raise _Fault(suffix, "'%' and '*' for one device: choose one", "%")
    if unit == "%":
        return _Amount(piece, "ratio", number)
    if not unit:
        return _Amount(piece, "bytes" if is_rest else "bare", number, is_rest=is_rest)
    if unit.isascii() and unit.lower() in UNITS:
        return _Amount(piece, "bytes", number, UNITS[unit.lower()], is_rest)
    if _EXPONENT.fullmatch(unit):
        raise _Fault(piece, f"{_quote(piece.text)} has an exponent: write all digits, or a unit")
    cure = next((known for known in UNITS if known[0] == unit[0].lower()), None)
    problem = f"unknown unit {_quote(unit)}: use b, kb, mb, gb or tb"
    raise _Fault(_Piece(suffix.start, unit), problem, cure)


def _not_an_amount(piece: _Piece) -> _Fault:
    unsigned = piece.text.lstrip("+-").strip()
    accepted = "write bytes (2.5gb), a share (25%) or *"
    if not piece.text:
        return _Fault(piece, f"no amount: {accepted}", "*")
    if unsigned.lower() in {"inf", "infinity", "nan"}:
        return _Fault(piece, f"{_quote(piece.text)} is not a finite number: {accepted}", "*")
    if unsigned != piece.text:
        problem = f"{_quote(piece.text)} has a sign: an amount is a plain number from 0 up"
        return _Fault(piece, problem, unsigned or "*")
    return _Fault(piece, f"{_quote(piece.text)} is not an amount: {accepted}", "*")


def _check_repeats(pairs: list[_Pair]) -> None:
    devices: set[str] = set()
    has_rest = False
    for place, device_at, device, amount in pairs:
        if device in devices:
            problem = f"{_quote(device)} is named twice: write one entry for each device"
            raise _Fault(device_at, problem, "", place)
        if amount.is_rest and has_rest:
            problem = "a second '*': only one device can take the rest"
            least = amount.place.text.rstrip("* ")
            raise _Fault(amount.place, problem, least, amount.place if least else place)
        devices.add(device)
        has_rest = has_rest or amount.is_rest


def _percent(amount: _Amount) -> Decimal:
    """Read an amount of a line that has a ``%``."""
    if amount.kind == "bare":
        share = amount.number * 100 if amount.number <= 1 else amount.number
        problem = "a bare number next to '%': write every share with '%'"
        raise _Fault(amount.place, problem, f"{_decimal_text(share)}%")
    if amount.kind == "bytes":
        problem = "bytes next to '%': write every amount as bytes, or every one as a share"
        raise _Fault(amount.place, problem, "*")
    return amount.number


def _fraction(amount: _Amount) -> Decimal:
    """Read an amount of a line that has bare numbers only."""
    if amount.number > 1:
        is_whole = Fraction(amount.number).denominator == 1
        unit = "gb" if not is_whole else "%" if amount.number <= _ALL_PERCENT else "b"
        problem = "a fraction above 1: write 0 to 1 of the device, or add a unit or '%'"
        raise _Fault(amount.place, problem, f"{amount.place.text}{unit}")
    return amount.number


def _bytes(amount: _Amount, kinds: Collection[str]) -> int:
    """Read an amount of a line of bytes, cut to whole bytes: an amount is never exceeded."""
    exact = Fraction(amount.number) * amount.unit_bytes
    if exact > MAX_BYTES:
        raise _Fault(amount.place, "more bytes than any memory holds (8 EiB)", "*")
    if amount.unit_bytes == 1 and exact.denominator != 1:
        cure = f"{_decimal_text(amount.number)}gb{'*' if amount.is_rest else ''}"
        if amount.kind == "bytes" or exact > 1:
            raise _Fault(amount.place, "a part of a byte: add a unit, like 2.5gb", cure)
        problem = "a fraction next to bytes or '*': write bytes, or a share like 50%"
        share = f"{_decimal_text(amount.number * 100)}%"
        raise _Fault(amount.place, problem, cure if "bytes" in kinds else share)
    return int(exact)


def _check_ratios(pairs: list[_Pair]) -> None:
    """Refuse shares of which the line does not say what is meant."""
    total = Fraction(0)
    has_rest = any(pair.amount.is_rest for pair in pairs)
    for pair in pairs:
        left = _ALL_PERCENT - total
        total += Fraction(pair.amount.number)
        if has_rest and total > _ALL_PERCENT:
            problem = "the shares next to '*' come to more than 100%"
            raise _Fault(pair.amount.place, problem, f"{int(left)}%")
    place, number = pairs[0].amount.place, pairs[0].amount.number
    if len(pairs) == 1 and total > _ALL_PERCENT:
        raise _Fault(place, "more than the whole model: write 100%", "100%")
    if len(pairs) == 1 and total < _ALL_PERCENT:
        donor = "disk" if pairs[0].device == "cpu" else "cpu"
        other = _decimal_text(_ALL_PERCENT - number)
        problem = f"a single share: say where the other {other}% of the model goes"
        raise _Fault(place, problem, f"{place.text};{donor},*")
    if not total and not has_rest:
        raise _Fault(place, "the shares come to 0%: give a device a part of the model", "100%")
