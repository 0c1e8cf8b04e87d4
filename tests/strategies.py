"""Hypothesis strategies that the tests share: machines, devices, and lines that read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import strategies as st

from distorch.allocation import Allocation
from distorch.machine import Machine, Tier

if TYPE_CHECKING:
    from collections.abc import Sequence

GIB = 2**30
UNITS = ("b", "k", "kb", "KiB", "m", "MB", "mib", "g", "GB", "gib")


def model_sizes(max_bytes: int = 64 * GIB) -> st.SearchStrategy[int]:
    """Bytes of a model: often tiny or odd, where rounding shows."""
    return st.one_of(st.integers(0, 1000), st.integers(0, max_bytes))


def devices() -> st.SearchStrategy[str]:
    """Device names in canonical form."""
    indexed = st.builds("{}:{}".format, st.sampled_from(["cuda", "xpu", "npu"]), st.integers(0, 12))
    return st.one_of(indexed, st.sampled_from(["cpu", "mps", "disk", "disk:/mnt/NVMe 2"]))


@st.composite
def machines(draw: st.DrawFn, max_bytes: int = 64 * GIB) -> Machine:
    """Machines with a host, up to three cards before it, and perhaps a disk behind it."""
    names = [f"cuda:{index}" for index in range(draw(st.integers(0, 3)))]
    names += ["cpu", *draw(st.sampled_from([[], ["disk"]]))]
    tiers = []
    for name in names:
        capacity_bytes = draw(st.integers(0, max_bytes))
        free_bytes = draw(st.integers(0, capacity_bytes))
        tiers.append(Tier(name=name, capacity_bytes=capacity_bytes, free_bytes=free_bytes))
    return Machine(name="generated", tiers=tuple(tiers))


def _decimals(max_whole: int) -> st.SearchStrategy[str]:
    return st.builds(
        lambda whole, places: f"{whole}.{places}" if places else f"{whole}",
        st.integers(0, max_whole),
        st.text("0123456789", max_size=12),
    )


def _sizes() -> st.SearchStrategy[str]:
    counts = st.integers(0, 10**9).map(lambda count: f"{count}b")
    spaced = st.builds("{}{}{}".format, _decimals(99), st.sampled_from(["", " "]), _units())
    return st.one_of(counts, spaced)


def _units() -> st.SearchStrategy[str]:
    return st.sampled_from([unit for unit in UNITS if unit != "b"])


@st.composite
def _amounts(draw: st.DrawFn, num: int) -> list[str]:
    """Draw amounts of one mode that stand together in a line."""
    mode = draw(st.sampled_from(["bytes", "ratio", "fraction"]))
    rest = draw(st.one_of(st.none(), st.integers(0, num - 1)))
    if mode == "fraction":
        return [draw(st.sampled_from(["0", "0.1", "0.25", "0.5", "1", "1.0"])) for _ in range(num)]
    if mode == "bytes":
        amounts = [draw(_sizes()) for _ in range(num)]
        if rest is not None:
            amounts[rest] = draw(st.sampled_from(["*", f"{amounts[rest]}*"]))
        return amounts
    if rest is None and num == 1:
        return ["100%"]
    if rest is None:
        return ["1%", *(f"{draw(_decimals(200))}%" for _ in range(num - 1))]
    amounts = [f"{draw(_decimals(99 // num))}%" for _ in range(num)]
    amounts[rest] = "*"
    return amounts


@st.composite
def lines(draw: st.DrawFn, among: Sequence[str] | None = None) -> str:
    """Lines that read, as users write them: spaces, capitals and a last ';' included."""
    device = devices() if among is None else st.sampled_from(among)
    most = 5 if among is None else len(among)
    names = draw(st.lists(device, min_size=1, max_size=most, unique=True))
    amounts = draw(_amounts(len(names)))
    space = st.sampled_from(["", "", " ", "  "])
    entries = []
    for name, amount in zip(names, amounts, strict=True):
        written = name.upper() if draw(st.booleans()) and "/" not in name else name
        entries.append(f"{draw(space)}{written}{draw(space)},{draw(space)}{amount}{draw(space)}")
    return ";".join(entries) + draw(st.sampled_from(["", ";", " ; "]))


def allocations() -> st.SearchStrategy[Allocation]:
    """Allocations of any mode, on any devices."""
    return st.one_of(st.just(Allocation.parse("auto")), lines().map(Allocation.parse))


@st.composite
def allocations_on(draw: st.DrawFn, machine: Machine) -> Allocation:
    """Allocations whose devices the machine has; whether they fit is open."""
    names = [tier.name for tier in machine.tiers]
    auto = st.just(Allocation.parse("auto"))
    return draw(st.one_of(auto, lines(among=names).map(Allocation.parse)))
