"""The machine: its memories (tiers), the paths between them (links), and how fast each is.

A `Machine` is a value: the planner, the simulator and the allocation language read it and never
ask the hardware. `Machine.detect` is the one place that does; `Machine.load` reads a description
from a file instead. Nothing here imports torch.
"""

from __future__ import annotations

import os
import platform
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from platformdirs import user_config_path

from distorch._machine_accelerators import virtual
from distorch._machine_detect import read_memories
from distorch._machine_file import dump, parse, profile_names, profile_text, read, replace_file
from distorch._machine_parts import Compute, Link, Tier, check_speed, listed
from distorch.errors import MachineError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Compute", "Link", "Machine", "Tier"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The tiers of one machine, those that compute fastest first, and the links between them.

    ``computes`` says how fast devices compute. ``buses`` has the bytes/s that all links of a bus
    have together; a bus that is not there has those of its fastest link.

    >>> cpu = Tier(name="cpu", capacity_bytes=64 * 2**30, free_bytes=48 * 2**30)
    >>> Machine(name="laptop", tiers=(cpu,)).tier("cpu").free_bytes // 2**30
    48
    """

    name: str
    tiers: tuple[Tier, ...]
    links: tuple[Link, ...] = ()
    computes: tuple[Compute, ...] = ()
    buses: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        """Refuse names that find two things or none."""
        tiers = [tier.name for tier in self.tiers]
        self._check_once("a tier", tiers)
        self._check_once("a link", [f"{link.source} -> {link.target}" for link in self.links])
        self._check_once("the compute rate of a device", [rate.device for rate in self.computes])
        self._check_once("a bus", [bus for bus, _ in self.buses])
        ends = [end for link in self.links for end in (link.source, link.target)]
        self._check_there("a link", ends, tiers)
        self._check_there("a compute rate", [rate.device for rate in self.computes], tiers)
        self._check_there("a bus", [bus for bus, _ in self.buses], [x.bus for x in self.links])
        for bus, speed in self.buses:
            check_speed(f"the bus {bus!r}", "bytes_per_second", speed)

    def _check_once(self, what: str, names: Sequence[str]) -> None:
        if len(set(names)) < len(names):
            problem = f"machine '{self.name}' names {what} twice: {', '.join(names)}"
            raise MachineError(problem, hint=f"name {what} once")

    def _check_there(self, what: str, names: Sequence[str], there: Sequence[str]) -> None:
        for name in names:
            if name not in there:
                problem = f"machine '{self.name}' has {what} of '{name}', which it does not have"
                raise MachineError(problem, hint=f"one of {listed(sorted(set(there) - {''}))}")

    def tier(self, name: str) -> Tier:
        """Return the tier of that name; ``disk:/path`` falls back to ``disk``.

        >>> disk = Tier(name="disk", capacity_bytes=8, free_bytes=4)
        >>> Machine(name="laptop", tiers=(disk,)).tier("disk:/mnt/nvme").name
        'disk'
        """
        by_name = {tier.name: tier for tier in self.tiers}
        found = by_name.get(name) or by_name.get(_without_path(name))
        if found is None:
            has = ", ".join(by_name) or "no memory at all"
            problem = f"machine '{self.name}' has no '{name}'"
            raise MachineError(problem, hint=f"a device it has: {has}")
        return found

    def link(self, source: str, target: str) -> Link:
        """Return the link from one tier to another; ``disk:/path`` falls back to ``disk``.

        Raises:
            MachineError: nothing leads there directly.

        >>> there = Machine.load("rtx4070-12gb").link("cpu", "cuda:0")
        >>> there.bytes_per_second / 1e9
        24.0
        """
        found = self._find_link(source, target)
        if found is None:
            has = listed(f"{link.source} -> {link.target}" for link in self.links)
            raise MachineError(
                f"machine '{self.name}' has no link {source} -> {target}, but {has}",
                hint="distorch probe measures the links of this machine",
            )
        return found

    def route(self, source: str, target: str) -> tuple[Link, ...]:
        """Return the links from one tier to another: the direct one, or two through ``cpu``.

        From a tier to itself there is nothing to cross.

        Raises:
            MachineError: no such links.

        >>> [link.source for link in Machine.load("rtx4070-12gb").route("disk", "cuda:0")]
        ['disk', 'cpu']
        """
        if source == target:
            return ()
        direct = self._find_link(source, target)
        if direct is not None:
            return (direct,)
        first, second = self._find_link(source, "cpu"), self._find_link("cpu", target)
        if first is not None and second is not None:
            return (first, second)
        return (self.link(source, target),)  # raises

    def _find_link(self, source: str, target: str) -> Link | None:
        by_ends = {(link.source, link.target): link for link in self.links}
        plain = _without_path(source), _without_path(target)
        return by_ends.get((source, target)) or by_ends.get(plain)

    def bus_speed(self, bus: str) -> float:
        """Return the bytes/s that all links of a bus have together.

        Raises:
            MachineError: no link is on that bus.

        >>> Machine.load("rtx4070-12gb").bus_speed("pcie0.in") / 1e9
        24.0
        """
        speeds = [link.bytes_per_second for link in self.links if bus and link.bus == bus]
        if not speeds:
            has = listed(sorted({link.bus for link in self.links} - {""}))
            problem = f"machine '{self.name}' has no bus {bus!r}"
            raise MachineError(problem, hint=f"one of its buses: {has}")
        return dict(self.buses).get(bus, max(speeds))

    def compute(self, device: str) -> Compute:
        """Return how fast a device computes.

        Raises:
            MachineError: it was not measured.

        >>> Machine.load("rtx4070-12gb").compute("cuda:0").bytes_per_second / 1e9
        504.0
        """
        for rate in self.computes:
            if rate.device == device:
                return rate
        raise MachineError(
            f"how fast '{device}' of machine '{self.name}' computes is not known",
            hint="distorch probe measures this machine",
        )

    def replace_tier(self, tier: Tier) -> Machine:
        """Return this machine with ``tier`` in place of the one of its name, or added last.

        >>> machine = Machine(name="laptop", tiers=())
        >>> machine.replace_tier(Tier(name="disk", capacity_bytes=8, free_bytes=4)).tiers[0].name
        'disk'
        """
        tiers = {old.name: old for old in self.tiers} | {tier.name: tier}
        return replace(self, tiers=tuple(tiers.values()))

    @classmethod
    def detect(cls, disk: Path | None = None) -> Machine:
        """Describe this machine as it is now: accelerators first, then the host, then a disk.

        ``disk`` is any path on the file system meant, by default the temporary directory. Links
        are those of virtual cards, which are known; all others have to be measured.

        >>> [tier.name for tier in Machine.detect().tiers][-2:]
        ['cpu', 'disk']
        """
        tiers = (
            Tier(name=name, capacity_bytes=memory.capacity_bytes, free_bytes=memory.free_bytes)
            for name, memory in read_memories(disk).items()
        )
        spec = virtual()
        return cls(
            name=platform.node() or "this machine",
            tiers=tuple(tiers),
            links=tuple(Link(**asdict(link)) for link in spec.links()) if spec else (),
            buses=tuple(spec.buses().items()) if spec else (),
        )

    @classmethod
    def here(cls, disk: Path | None = None) -> Machine:
        """Describe this machine as it is now, with the speeds that ``distorch probe`` saved.

        Raises:
            MachineError: what was saved cannot be read any more.

        >>> "cpu" in {tier.name for tier in Machine.here().tiers}
        True
        """
        found, saved = cls.detect(disk), cls.probe_path()
        if not saved.exists():
            return found
        try:
            return found.measured_by(cls.load(saved))
        except MachineError as error:
            raise MachineError(
                f"the speeds of this machine were saved, but {error.problem}",
                hint="distorch probe, which measures and saves them again",
            ) from error

    @staticmethod
    def probe_path() -> Path:
        """Return where ``distorch probe`` saves the speeds of this machine, by its host name.

        >>> Machine.probe_path().suffix
        '.toml'
        """
        node = re.sub(r"[^\w.-]", "-", platform.node()) or "this-machine"
        return user_config_path("distorch") / "machines" / f"{node}.toml"

    def measured_by(self, profile: Machine) -> Machine:
        """Return this machine with the links and rates that ``profile`` has for its tiers.

        >>> profile = Machine.load("rtx4070-12gb")
        >>> Machine(name="box", tiers=profile.tiers).measured_by(profile).links == profile.links
        True
        """
        here = {tier.name for tier in self.tiers}
        measured = [link for link in profile.links if {link.source, link.target} <= here]
        links = {(link.source, link.target): link for link in (*self.links, *measured)}
        used = {link.bus for link in links.values()}
        rates = {rate.device: rate for rate in (*self.computes, *profile.computes)}
        return replace(
            self,
            links=tuple(links.values()),
            computes=tuple(rate for name, rate in rates.items() if name in here),
            buses=tuple(
                (bus, v) for bus, v in dict(self.buses + profile.buses).items() if bus in used
            ),
        )

    @classmethod
    def load(cls, name_or_path: str | Path) -> Machine:
        """Read a description: a known machine by name, or a TOML file by a path.

        Raises:
            MachineError: there is no such machine or file, or it does not describe a machine.

        >>> Machine.load("rtx4070-12gb").tiers[0].name
        'cuda:0'
        """
        text = os.fspath(name_or_path)
        if isinstance(name_or_path, Path) or text.endswith(".toml") or Path(text).name != text:
            parsed = parse(read(Path(text)), where=text)
        else:
            parsed = parse(profile_text(text), where=text)
        try:
            return cls(
                name=parsed["name"],
                tiers=tuple(Tier(**row) for row in parsed["tier"]),
                links=tuple(Link(**row) for row in parsed["link"]),
                computes=tuple(Compute(**row) for row in parsed["compute"]),
                buses=tuple((row["name"], row["bytes_per_second"]) for row in parsed["bus"]),
            )
        except MachineError as error:
            raise MachineError(f"{text}: {error.problem}", hint=error.hint) from error

    @staticmethod
    def known() -> tuple[str, ...]:
        """Return the names of the machines that `load` knows.

        >>> "2x-rtx3090-nvlink" in Machine.known()
        True
        """
        return profile_names()

    def to_toml(self) -> str:
        r"""Return this machine as the text of a file that `load` reads.

        >>> Machine(name="laptop", tiers=()).to_toml()
        'name = "laptop"\ntier = []\n'
        """
        return dump(
            self.name,
            {
                "tier": [asdict(tier) for tier in self.tiers],
                "link": [asdict(link) for link in self.links],
                "compute": [asdict(rate) for rate in self.computes],
                "bus": [{"name": bus, "bytes_per_second": speed} for bus, speed in self.buses],
            },
        )

    def save(self, path: Path) -> None:
        """Write this machine to a file that `load` reads; the file is whole or as it was.

        Raises:
            StorageError: it cannot be written.

        >>> import tempfile
        >>> laptop = Machine.load("laptop-32gb")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     laptop.save(Path(folder, "machine.toml"))
        ...     Machine.load(Path(folder, "machine.toml")) == laptop
        True
        """
        replace_file(path, self.to_toml())


def _without_path(name: str) -> str:
    return "disk" if name.startswith("disk:") else name
