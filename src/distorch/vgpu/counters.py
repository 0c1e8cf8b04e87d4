"""What has happened since the last `reset`, counted."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, fields
from itertools import permutations

from distorch.vgpu.control import memory_index, num_devices
from distorch.vgpu.library import call
from distorch.vgpu.spec import device_name

__all__ = ["Counters", "DeviceCounters", "LinkCounters", "counters"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCounters:
    """The memory of a device: bytes as asked for, without rounding."""

    capacity_bytes: int
    live_bytes: int
    peak_bytes: int
    num_allocations: int
    num_frees: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkCounters:
    """The copies from one memory to another, counted when they are queued."""

    num_copies: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """A moment's counts of all devices and links.

    ``links`` has those that were used, by the names of their ends: ``("cpu", "vgpu:0")``. A host
    sync is a wait of the host for a stream, an event or a device, also one within a pageable copy
    or an operator like ``item`` and ``nonzero``. Views are not counted as operators.
    """

    devices: tuple[DeviceCounters, ...]
    links: dict[tuple[str, str], LinkCounters]
    pinned_bytes: int
    pinned_peak_bytes: int
    num_pageable_copies: int
    num_host_syncs: int
    num_ops: int
    num_races: int


def counters() -> Counters:
    """Return the counts of this moment.

    Raises:
        MachineError: the virtual GPU is not installed.
    """
    devices = range(num_devices())
    counts = {
        name: _count(name, -1)
        for name in (
            "pinned_bytes",
            "pinned_peak_bytes",
            "num_pageable_copies",
            "num_host_syncs",
            "num_ops",
            "num_races",
        )
    }
    ends = permutations(["cpu", *map(device_name, devices)], 2)
    links = {(source, target): _link(source, target) for source, target in ends}
    return Counters(
        devices=tuple(
            DeviceCounters(
                **{field.name: _count(field.name, index) for field in fields(DeviceCounters)}
            )
            for index in devices
        ),
        links={ends: link for ends, link in links.items() if link.num_copies},
        **counts,
    )


def _count(name: str, device: int) -> int:
    value = ctypes.c_uint64()
    call("counter", name.encode(), device, ctypes.byref(value))
    return value.value


def _link(source: str, target: str) -> LinkCounters:
    num_copies, nbytes = ctypes.c_uint64(), ctypes.c_uint64()
    ends = memory_index(source), memory_index(target)
    call("link_counter", *ends, ctypes.byref(num_copies), ctypes.byref(nbytes))
    return LinkCounters(num_copies=num_copies.value, nbytes=nbytes.value)
