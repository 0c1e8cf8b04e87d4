"""How a machine is written to a file: TOML, in units that a person reads.

Memories are in GiB, links in GB/s and microseconds, products in TFLOP/s, and each key names its
unit. This side of `distorch.machine` knows keys and units only: what it reads is handed over as
the arguments of `Machine`, `Tier`, `Link` and `Compute`, which judge the values.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import tomli_w

from distorch.errors import MachineError, StorageError
from distorch.files import replacing

__all__ = ["dump", "parse", "profile_names", "profile_text", "read", "replace_file"]

_MAX_BYTES: Final = 1 << 20
_GIB: Final = 1 << 30
_PROFILES: Final = files("distorch") / "profiles"


@dataclass(frozen=True, slots=True)
class _Number:
    """A number of a file, in the unit that its key names, and of a value, in its base unit."""

    argument: str
    read: Callable[[Decimal], float]
    write: Callable[[float], float | Decimal]


def _shifted(argument: str, digits: int) -> _Number:
    """Move the decimal point, which loses nothing: a float that is written reads as itself."""

    def read(number: Decimal) -> float:
        return float(number.scaleb(digits))

    def write(value: float) -> float | Decimal:
        exact = Decimal(repr(float(value))).scaleb(-digits)
        short = float(exact)
        return short if read(Decimal(repr(short))) == value else exact

    return _Number(argument, read, write)


def _gib(argument: str) -> _Number:
    return _Number(argument, lambda gib: round(float(gib) * _GIB), lambda nbytes: nbytes / _GIB)


_FLOPS: Final = _shifted("flops_per_second", 12)
_SPEED: Final = _shifted("bytes_per_second", 9)
# Of each list in a file: its keys. A text keeps its name; what is not required may be left out.
_TABLES: Final[Mapping[str, Mapping[str, _Number | type]]] = {
    "tier": {"name": str, "capacity_gib": _gib("capacity_bytes"), "free_gib": _gib("free_bytes")},
    "link": {
        "source": str,
        "target": str,
        "gb_per_second": _SPEED,
        "latency_us": _shifted("latency_seconds", -6),
        "bus": str,
    },
    "compute": {"device": str, "gb_per_second": _SPEED, "tflops": dict},
    "bus": {"name": str, "gb_per_second": _SPEED},
}
_OPTIONAL: Final = {"latency_us", "bus"}


def parse(text: str, where: str) -> dict[str, Any]:
    r"""Return the name of a machine, and the arguments of its parts under ``tier``, ``link``, ...

    Raises:
        MachineError: the text is no TOML, or not the description of a machine.

    >>> parse('name = "a"\ntier = [{ name = "cpu", capacity_gib = 2, free_gib = 1 }]', "b")["tier"]
    [{'name': 'cpu', 'capacity_bytes': 2147483648, 'free_bytes': 1073741824}]
    """
    try:
        data = tomllib.loads(text, parse_float=Decimal)
    except (ValueError, ArithmeticError, RecursionError) as error:
        problem = f"{where} is not TOML: {str(error)[:200] or type(error).__name__}"
        raise MachineError(problem, hint="a file that distorch probe --output wrote") from error
    _check_keys(where, data, ["name", *_TABLES], required=["name", "tier"])
    found: dict[str, Any] = {"name": _text(f"{where}: name", data["name"])}
    for table in _TABLES:
        rows = data.get(table, [])
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            problem = f"{where}: {table} is not a list of tables"
            raise MachineError(problem, hint=f"[[{table}]] above each of them")
        places = (f"{where}: {table} {number}" for number in range(1, len(rows) + 1))
        found[table] = [_row(place, table, row) for place, row in zip(places, rows, strict=True)]
    return found


def _row(where: str, table: str, row: dict[str, Any]) -> dict[str, Any]:
    keys = _TABLES[table]
    _check_keys(where, row, keys, required=[key for key in keys if key not in _OPTIONAL])
    arguments: dict[str, Any] = {}
    for key, value in row.items():
        kind = keys[key]
        if isinstance(kind, _Number):
            arguments[kind.argument] = _number(f"{where}: {key}", value, kind)
        elif kind is str:
            arguments[key] = _text(f"{where}: {key}", value)
        elif isinstance(value, dict):
            rates = {k: _number(f"{where}: {key}.{k}", v, _FLOPS) for k, v in value.items()}
            arguments[_FLOPS.argument] = rates
        else:
            problem = f"{where}: {key} is not a table"
            raise MachineError(problem, hint="tflops = { BF16 = 41.0, F32 = 20.0 }")
    return arguments


def _check_keys(
    where: str, table: Mapping[str, Any], known: Mapping[str, Any] | list[str], required: list[str]
) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, list(known), 1) or [", ".join(known)]
            problem = f"{where} has an unknown key {key[:80]!r}"
            raise MachineError(problem, hint=f"perhaps {near[0]}")
    for key in required:
        if key not in table:
            problem = f"{where} has no {key}"
            raise MachineError(problem, hint=f"add {_example(key)}")


def _example(key: str) -> str:
    if key in _TABLES:
        return f"a [[{key}]]"
    if key == "tflops":
        return "tflops = { BF16 = 41.0, F32 = 20.0 }"
    numbers = {"capacity_gib": "12.0", "free_gib": "11.0", "gb_per_second": "24.0"}
    return f"{key} = {numbers.get(key, repr('cuda:0'))}".replace("'", '"')


def _text(where: str, value: object) -> str:
    if not isinstance(value, str) or not value.isprintable():
        problem = f"{where} is not a text of one line"
        raise MachineError(problem, hint='a name in quotation marks: "cuda:0"')
    return value


def _number(where: str, value: object, kind: _Number) -> float:
    try:
        if isinstance(value, int | Decimal) and not isinstance(value, bool):
            return kind.read(Decimal(value))
    except (ArithmeticError, ValueError):  # out of every range, or not a number at all
        pass
    raise MachineError(f"{where} is not a number that can be used", hint="a number such as 24.0")


def dump(name: str, parts: Mapping[str, list[dict[str, Any]]]) -> str:
    """Write what `parse` returned: the inverse.

    >>> print(dump("box", {"bus": [{"name": "pcie", "bytes_per_second": 24e9}]}), end="")
    name = "box"
    bus = [
        { name = "pcie", gb_per_second = 24.0 },
    ]
    """
    tables = {table: [_written(table, row) for row in rows] for table, rows in parts.items()}
    some = {table: rows for table, rows in tables.items() if rows or table == "tier"}
    return tomli_w.dumps({"name": name, **some})


def _written(table: str, row: dict[str, Any]) -> dict[str, Any]:
    written: dict[str, Any] = {}
    for key, kind in _TABLES[table].items():
        if isinstance(kind, _Number):
            written[key] = kind.write(row[kind.argument])
        elif kind is str:
            written[key] = row[key]
        else:
            written[key] = {k: _FLOPS.write(v) for k, v in row[_FLOPS.argument].items()}
    return {key: value for key, value in written.items() if value or key not in _OPTIONAL}


def read(path: Path) -> str:
    """Return the text of a small file.

    Raises:
        MachineError: it is not there, too large for what it should be, or no text.
    """
    hint = "a TOML file that distorch probe --output wrote, or the name of a known machine"
    try:
        if not path.is_file():
            raise MachineError(f"{path} is not a file", hint=hint)
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise MachineError(f"{path} has more than 1 MiB and describes no machine", hint=hint)
        return data.decode()
    except (OSError, ValueError) as error:
        raise MachineError(f"{path} cannot be read: {error}", hint=hint) from error


def replace_file(path: Path, text: str) -> None:
    """Write a file that takes its place when it is whole; its folder is made.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise StorageError(
            f"the machine cannot be written to {path}: {error.strerror}",
            hint="a file name in a folder that has room: distorch probe --output machine.toml",
        ) from error


def profile_names() -> tuple[str, ...]:
    """Return the names of the machines that DisTorch ships a description of.

    >>> "rtx4070-12gb" in profile_names()
    True
    """
    names = (Path(file.name) for file in _PROFILES.iterdir())
    return tuple(sorted(name.stem for name in names if name.suffix == ".toml"))


def profile_text(name: str) -> str:
    """Return the text of a shipped description.

    Raises:
        MachineError: there is none of that name.
    """
    known = profile_names()
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, 3, 0.5)
        some = f"perhaps {', '.join(near)}" if near else f"one of {', '.join(known)}"
        raise MachineError(
            f"no machine is called {name[:80]!r}",
            hint=f"{some}; or a file, by a path that ends in .toml: ./machine.toml",
        )
    return (_PROFILES / f"{name}.toml").read_text(encoding="utf-8")
