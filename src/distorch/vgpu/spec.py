"""Which virtual devices there are: the text of ``DISTORCH_VGPU``.

    line    =  device ("," device)*
    device  =  size ["@" size "/s"] ["+" bus]

``12gb`` is a device with a memory of 12 GiB and an infinitely fast link to the host; sizes are
written as in the allocation language. ``@4gb/s`` is the speed of its link, each way. Devices that
name the same bus share it: host to device on its ``.in``, device to host on its ``.out``, each as
fast as the fastest link on it. Between two devices, the slower of their links counts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import permutations

from distorch.errors import MachineError
from distorch.sizes import read_size

__all__ = ["MAX_DEVICES", "DeviceSpec", "LinkSpec", "Spec", "device_name"]

MAX_DEVICES = 16
_EXAMPLE = "DISTORCH_VGPU=12gb,24gb@4gb/s"
_DEVICE = re.compile(
    r"(?P<size>[^@+]+?)\s*(?:@\s*(?P<speed>[^@+]+?)\s*/\s*s)?\s*(?:\+\s*(?P<bus>\w+))?",
    re.ASCII | re.IGNORECASE,
)


def device_name(index: int) -> str:
    """Return torch's name of a device.

    >>> device_name(1)
    'vgpu:1'
    """
    return f"vgpu:{index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """One device: its memory in bytes, and its link to the host in bytes/s (None: no limit).

    >>> DeviceSpec(capacity_bytes=2**30).bus
    ''
    """

    capacity_bytes: int
    bytes_per_second: float | None = None
    bus: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpec:
    """A directed link between two memories, and the bus it shares (none: ``""``).

    >>> LinkSpec(source="cpu", target="vgpu:0", bytes_per_second=4e9).bus
    ''
    """

    source: str
    target: str
    bytes_per_second: float
    bus: str = ""


@dataclass(frozen=True, slots=True)
class Spec:
    """The devices of a line.

    >>> spec = Spec.parse("12gb, 24gb@4gb/s+left")
    >>> [device.capacity_bytes >> 30 for device in spec.devices]
    [12, 24]
    >>> spec.links()[0]
    LinkSpec(source='cpu', target='vgpu:1', bytes_per_second=4294967296, bus='left.in')
    """

    devices: tuple[DeviceSpec, ...]

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Read a line.

        Raises:
            MachineError: it cannot be read; the message says where, and shows a line that reads.
        """
        devices = tuple(_read_device(piece.strip(), text) for piece in text.split(","))
        if len(devices) > MAX_DEVICES:
            problem = f"{len(devices)} virtual devices are too many: at most {MAX_DEVICES}"
            raise MachineError(problem, hint=_EXAMPLE)
        return cls(devices)

    def links(self) -> tuple[LinkSpec, ...]:
        """Return the links that have a speed: with the host, and between devices."""
        found = []
        for index, device in enumerate(self.devices):
            if device.bytes_per_second is None:
                continue
            for source, target, way in (
                ("cpu", device_name(index), "in"),
                (device_name(index), "cpu", "out"),
            ):
                bus = f"{device.bus}.{way}" if device.bus else ""
                found.append(_link(source, target, device.bytes_per_second, bus))
        for (i, one), (j, other) in permutations(enumerate(self.devices), 2):
            speeds = [end.bytes_per_second for end in (one, other) if end.bytes_per_second]
            if speeds:
                found.append(_link(device_name(i), device_name(j), min(speeds)))
        return tuple(found)

    def buses(self) -> dict[str, float]:
        """Return the speed of each bus in bytes/s: that of the fastest link on it."""
        speeds: dict[str, float] = {}
        for link in self.links():
            if link.bus:
                speeds[link.bus] = max(link.bytes_per_second, speeds.get(link.bus, 0))
        return speeds


def _link(source: str, target: str, bytes_per_second: float, bus: str = "") -> LinkSpec:
    return LinkSpec(source=source, target=target, bytes_per_second=bytes_per_second, bus=bus)


def _read_device(piece: str, line: str) -> DeviceSpec:
    match = _DEVICE.fullmatch(piece)
    if match is None:
        raise MachineError(
            f"{piece!r} in {line!r} is not a virtual device: write size, size@speed/s or "
            "size@speed/s+bus",
            hint=_EXAMPLE,
        )
    size, speed, bus = match["size"], match["speed"], match["bus"]
    if bus and not speed:
        problem = f"{piece!r} in {line!r} is on a bus, but its link has no speed"
        raise MachineError(problem, hint=f"{size}@4gb/s+{bus}")
    return DeviceSpec(
        capacity_bytes=_read_bytes(size, line),
        bytes_per_second=_read_bytes(speed, line) if speed else None,
        bus=bus or "",
    )


def _read_bytes(text: str, line: str) -> int:
    """Read a size as the allocation language does."""
    try:
        nbytes = read_size(text)
    except ValueError:
        nbytes = -1
    if nbytes < 0 or text.isdigit():  # without a unit it would be bytes: nobody means that
        problem = f"{text!r} in {line!r} is not a size: write bytes, like 12gb or 500mb"
        raise MachineError(problem, hint=_EXAMPLE)
    if nbytes == 0:
        raise MachineError(f"{text!r} in {line!r} is nothing", hint=_EXAMPLE)
    return nbytes
