"""The allocation language: one line of text that says which memory holds which part of a model.

    cuda:0,2.5gb;cpu,*           bytes      2.5 GiB on cuda:0, the rest in host RAM
    cuda:0,25%;cpu,75%           ratio      shares of the model
    cuda:0,0.1;cpu,0.5           fraction   10 % of cuda:0's capacity, 50 % of the host's
    auto                         auto       decided from the machine

    allocation = "auto" | entry { ";" entry } [ ";" ]
    entry      = device "," amount
    device     = name [ ":" index ] | "disk" [ ":" path ]
    amount     = rest | bytes | ratio | fraction
    rest       = "*" | bytes "*"        "5gb*": 5 GiB at least, and whatever is left over
    bytes      = number [ unit ]        b, and k, m, g, t with b or ib or alone: powers of 1024
    ratio      = number "%"
    fraction   = number                 from 0 to 1, in a line of bare numbers only
    number     = digits [ "." digits ]

Spaces are free around ``;`` ``,`` and numbers; names and units are case-free, a disk's path is not.
A line has one mode; only ``%`` and ``*`` meet. The order of the entries is the order of preference,
and the first is the compute device. An explicit amount is the most a device holds. Sizes are whole
bytes and shares are exact: no float comes near them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain
from typing import TYPE_CHECKING

from distorch._allocation_parse import Entry, Mode, line_text, read_line
from distorch.errors import AllocationError, MachineError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from distorch.machine import Machine, Tier

__all__ = ["Allocation", "Entry", "Mode", "Resolved"]

_GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """An allocation of one model on one machine, in whole bytes that sum to the model's.

    >>> Resolved(compute="cuda:0", bytes_by_tier=(("cpu", 7),)).bytes_on("cuda:0")
    0
    """

    compute: str
    bytes_by_tier: tuple[tuple[str, int], ...]
    notes: tuple[str, ...] = ()

    def bytes_on(self, device: str) -> int:
        """Return what rests on ``device``; 0 where the line does not name it.

        >>> Resolved(compute="cpu", bytes_by_tier=(("cpu", 7),)).bytes_on("cpu")
        7
        """
        return dict(self.bytes_by_tier).get(device, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """One line of the language as a value; ``str()`` writes its canonical text.

    >>> allocation = Allocation.parse("CUDA:0, 2.50GiB; cpu, *")
    >>> str(allocation)
    'cuda:0,2.5gb;cpu,*'
    >>> Allocation.parse(str(allocation)) == allocation
    True
    """

    mode: Mode
    entries: tuple[Entry, ...] = ()

    def __str__(self) -> str:
        """Write the canonical line: parsing it gives an equal value back."""
        return line_text(self.mode, self.entries)

    @classmethod
    def parse(cls, text: str) -> Allocation:
        """Read a line, or raise an `AllocationError` that shows the place and a line that reads.

        >>> Allocation.parse("cuda:0,50%;cpu,*").mode
        'ratio'
        """
        if not isinstance(text, str):
            problem = f"an allocation is a line of text, not {text!r}"
            raise AllocationError(problem, hint="auto")
        mode, entries = read_line(text)
        return cls(mode=mode, entries=entries)

    @classmethod
    def virtual(
        cls,
        virtual_vram_gb: float,
        donors: str | Sequence[str] | None,
        compute: str | None,
        model_bytes: int,
        machine: Machine,
    ) -> Allocation:
        """Write the normal mode as a line: that many GiB rest on the donors, the others on compute.

        The donors ("cuda:1,cpu", or a sequence) are filled in their order, each up to what it has
        free. The last also takes what none has room for, so that `resolve` names it and the gap.
        What is left out (None, "") is the machine's first device that computes, with the host's
        memory as its donor, or the disk where the host computes.

        >>> from distorch.machine import Machine, Tier
        >>> cpu = Tier(name="cpu", capacity_bytes=2**34, free_bytes=2**33)
        >>> disk = Tier(name="disk", capacity_bytes=2**40, free_bytes=2**39)
        >>> machine = Machine(name="laptop", tiers=(cpu, disk))
        >>> str(Allocation.virtual(8, "disk", "cpu", 2**34, machine))
        'cpu,*;disk,8gb'
        """
        compute = compute or _first_computing(machine).name
        donors = donors or ("disk" if compute.strip().lower() == "cpu" else "cpu")
        names = donors.split(",") if isinstance(donors, str) else donors
        line = cls.parse(";".join([f"{compute},*", *(f"{name},0b" for name in names)]))
        _check_devices(line, model_bytes, machine)
        rest, *givers = line.entries
        left_bytes = min(_bytes_of_gib(virtual_vram_gb), model_bytes)
        entries = [rest]
        for giver in givers:
            free_bytes = machine.tier(giver.device).free_bytes
            amount = left_bytes if giver is givers[-1] else min(left_bytes, free_bytes)
            left_bytes -= amount
            if amount:
                entries.append(replace(giver, amount=amount))
        return cls(mode="bytes", entries=tuple(entries))

    def resolve(self, model_bytes: int, machine: Machine, compute: str | None = None) -> Resolved:
        """Return whole bytes for each device, which sum to ``model_bytes`` and fit what is free.

        >>> from distorch.machine import Machine, Tier
        >>> cpu = Tier(name="cpu", capacity_bytes=2**34, free_bytes=2**33)
        >>> disk = Tier(name="disk", capacity_bytes=2**40, free_bytes=2**39)
        >>> machine = Machine(name="laptop", tiers=(cpu, disk))
        >>> Allocation.parse("cpu,64b;disk,*").resolve(100, machine).bytes_by_tier
        (('cpu', 64), ('disk', 36))
        """
        if model_bytes < 0:
            problem = f"a model of {model_bytes} bytes"
            raise AllocationError(problem, hint="model_bytes is zero or more")
        device = _computing(compute, machine) if compute else ""
        _check_devices(self, model_bytes, machine, device)
        if not device:
            device = self.entries[0].device if self.entries else _first_computing(machine).name
        shares = _shares(self, model_bytes, machine, device)
        left_bytes = model_bytes - sum(shares.values())
        notes: tuple[str, ...] = ()
        has_cpu = any(tier.name == "cpu" for tier in machine.tiers)
        if left_bytes and self.mode == "bytes" and has_cpu and "cpu" not in shares:
            shares["cpu"] = left_bytes
            notes = (f"{_gib(left_bytes)} that the line does not place go to cpu",)
            left_bytes = 0
        _check_room(self, shares, left_bytes, machine, device)
        return Resolved(compute=device, bytes_by_tier=tuple(shares.items()), notes=notes)


def _computing(name: str, machine: Machine) -> str:
    """Return the canonical name of a device that the caller, not the line, asks to compute."""
    kind, colon, place = name.strip().partition(":")
    tier = machine.tier(f"{kind.lower()}{colon}{place}")
    if tier.is_disk:
        problem = f"compute is '{name}', and a disk cannot compute"
        raise AllocationError(problem, hint=f"compute='{_first_computing(machine).name}'")
    return tier.name


def _first_computing(machine: Machine) -> Tier:
    for tier in machine.tiers:
        if not tier.is_disk:
            return tier
    problem = f"machine '{machine.name}' has no device that computes"
    raise AllocationError(problem, hint="describe its host memory as the tier 'cpu'")


def _shares(line: Allocation, model_bytes: int, machine: Machine, compute: str) -> dict[str, int]:
    """Return whole bytes for each device of the line; what they leave has no place in it."""
    if line.mode == "auto":
        return _auto_shares(model_bytes, machine, compute)
    if line.mode == "ratio" and not any(entry.rest for entry in line.entries):
        return _proportional(model_bytes, line.entries)
    bounds = []
    for entry in line.entries:
        whole = Fraction(1)
        if line.mode == "ratio":
            whole = Fraction(model_bytes, 100)
        elif line.mode == "fraction":
            whole = Fraction(machine.tier(entry.device).capacity_bytes)
        bounds.append(int(Fraction(entry.amount) * whole))
    return _filled(model_bytes, line.entries, bounds)


def _filled(model_bytes: int, entries: Sequence[Entry], bounds: Sequence[int]) -> dict[str, int]:
    """Fill the devices in order, each up to its bound; the rest's least is set aside first."""
    shares = {}
    least = sum(bound for entry, bound in zip(entries, bounds, strict=True) if entry.rest)
    left_bytes = model_bytes - min(least, model_bytes)
    for entry, bound in zip(entries, bounds, strict=True):
        shares[entry.device] = 0 if entry.rest else min(bound, left_bytes)
        left_bytes -= shares[entry.device]
    rest = next((entry.device for entry in entries if entry.rest), None)
    if rest is not None:
        shares[rest] = model_bytes - sum(shares.values())
    return shares


def _proportional(model_bytes: int, entries: Sequence[Entry]) -> dict[str, int]:
    """Deal the model in proportion, each device less than a byte from its exact share."""
    total = sum(Fraction(entry.amount) for entry in entries)
    exact = {entry.device: model_bytes * Fraction(entry.amount) / total for entry in entries}
    shares = {device: int(share) for device, share in exact.items()}
    broken = [device for device, share in exact.items() if share.denominator > 1]
    for device in broken[: model_bytes - sum(shares.values())]:
        shares[device] += 1
    return shares


def _auto_shares(model_bytes: int, machine: Machine, compute: str) -> dict[str, int]:
    """Fill the memories in the machine's order, the compute device first and the disks last.

    A tenth of what is free is kept back everywhere but on disk, for all that is not weights.
    """
    tiers = sorted(machine.tiers, key=lambda tier: (tier.name != compute, tier.is_disk))
    shares = {}
    left_bytes = model_bytes
    for tier in tiers:
        shares[tier.name] = min(left_bytes, tier.usable_bytes)
        left_bytes -= shares[tier.name]
    return shares


def _check_devices(line: Allocation, model_bytes: int, machine: Machine, compute: str = "") -> None:
    """Refuse a device that the machine does not have."""
    for entry in line.entries:
        try:
            machine.tier(entry.device)
        except MachineError as error:
            has = ", ".join(tier.name for tier in machine.tiers) or "no memory"
            problem = f"this machine has no '{entry.device}': it has {has}"
            hint = _hint_without(entry, line, model_bytes, machine, compute)
            raise _error(problem, line, entry.device, hint) from error


def _hint_without(
    missing: Entry, line: Allocation, model_bytes: int, machine: Machine, compute: str
) -> str:
    """Return the line with a device that is there in place of the missing one, if that fits."""
    named = {entry.device for entry in line.entries}
    spare = next((tier.name for tier in machine.tiers if tier.name not in named), None)
    if spare is None:
        return _fitting_line({_first_computing(machine).name: 0}, model_bytes, machine)
    found = replace(missing, device=spare)
    entries = tuple(found if entry is missing else entry for entry in line.entries)
    other = replace(line, entries=entries)
    try:
        other.resolve(model_bytes, machine, compute)
    except AllocationError as error:
        return error.hint
    return str(other)


def _check_room(
    line: Allocation, shares: Mapping[str, int], left_bytes: int, machine: Machine, compute: str
) -> None:
    """Refuse what does not fit, with the gap and the nearest line that does."""
    model_bytes = sum(shares.values()) + left_bytes
    if machine.tier(compute).is_disk:
        first = _first_computing(machine).name
        hint = _fitting_line({first: 0} | dict(shares), model_bytes, machine)
        problem = "a disk cannot compute: name first what does"
        raise _error(problem, line, compute, hint)
    if left_bytes:
        placed = _gib(model_bytes - left_bytes)
        problem = f"room for {placed}, {_gib(left_bytes)} less than the model"
        raise _error(problem, line, "", _fitting_line(shares, model_bytes, machine))
    asked: Counter[str] = Counter()
    for device, num_bytes in shares.items():
        tier = machine.tier(device)
        asked[tier.name] += num_bytes
        over_bytes = asked[tier.name] - tier.free_bytes
        if over_bytes > 0:
            problem = (
                f"{device} is asked for {_gib(num_bytes)} and has {_gib(tier.free_bytes)} free: "
                f"{_gib(over_bytes)} too much"
            )
            raise _error(problem, line, device, _fitting_line(shares, model_bytes, machine))


def _error(problem: str, line: Allocation, device: str, hint: str) -> AllocationError:
    """Point at ``device`` in the canonical line, or at all of it if the line does not name it."""
    position, text = 0, str(line)
    for entry in line.entries:
        if entry.device == device:
            length = len(device)
            return AllocationError(problem, hint=hint, text=text, position=position, length=length)
        position += len(entry.text(line.mode)) + 1
    return AllocationError(problem, hint=hint, text=text, length=len(text))


def _fitting_line(wanted: Mapping[str, int], model_bytes: int, machine: Machine) -> str:
    """Return the line of bytes nearest to ``wanted`` that fits, in round numbers if those fit."""
    for cut in (_round_down, int):
        line = _fitted(wanted, model_bytes, machine, cut)
        if line:
            return str(line)
    free_bytes = sum(tier.free_bytes for tier in machine.tiers)
    return f"a smaller model, or more memory: {_gib(free_bytes)} are free on all devices together"


def _fitted(
    wanted: Mapping[str, int], model_bytes: int, machine: Machine, cut: Callable[[int], int]
) -> Allocation | None:
    """Give each device what it wants and has, then what is left to the last ones first."""
    room = {tier.name: cut(tier.free_bytes) for tier in machine.tiers}
    given: Counter[str] = Counter()
    left_bytes = model_bytes
    rest = [*wanted][-1]
    spare = sorted(room, key=lambda name: ["cpu", "disk", name].index(name))
    wishes = [(device, cut(num_bytes)) for device, num_bytes in wanted.items()]
    takers = [(device, model_bytes) for device in chain(reversed([*wanted]), spare)]
    for turn, (device, wish) in enumerate(wishes + takers):
        tier = machine.tier(device).name
        taken = min(wish, room[tier], left_bytes)
        given[device] += taken
        room[tier] -= taken
        left_bytes -= taken
        if taken and turn >= len(wishes):
            rest = device
    if left_bytes:
        return None
    first = next(iter(wanted))
    entries = (
        Entry(device=device, amount=0 if device == rest else num_bytes, rest=device == rest)
        for device, num_bytes in given.items()
        if num_bytes or device in {first, rest}
    )
    return Allocation(mode="bytes", entries=tuple(entries))


def _round_down(num_bytes: int) -> int:
    """Cut to hundredths of the largest unit that is not above it, so that it prints short."""
    unit_bytes = next((size for size in (2**30, 2**20, 2**10) if size <= num_bytes), 1)
    hundredths = (num_bytes * 100 + 99) // unit_bytes  # 1.2gb is read as a byte's part less
    return hundredths * unit_bytes // 100


def _bytes_of_gib(virtual_vram_gb: float) -> int:
    """Take the number as it is written: 0.1 is a tenth, not the float that stands for it."""
    try:
        num_bytes = int(Fraction(str(virtual_vram_gb)) * _GIB)
    except ValueError:
        num_bytes = -1
    if num_bytes < 0:
        problem = f"virtual_vram_gb is {virtual_vram_gb!r}"
        raise AllocationError(problem, hint="a number of GiB from 0 up, like 8 or 2.5") from None
    return num_bytes


def _gib(num_bytes: int) -> str:
    """Print GiB, and plain bytes where hundredths of a GiB would hide the difference."""
    hundredths = (num_bytes * 200 + _GIB) // (2 * _GIB)
    if hundredths < 1:
        return f"{num_bytes:,} bytes"
    return f"{hundredths // 100:,}.{hundredths % 100:02} GiB"
