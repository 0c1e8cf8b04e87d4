"""A virtual GPU: devices that behave as graphics cards do, on a machine without one.

``DISTORCH_VGPU=12gb,24gb@4gb/s`` in the environment, or `install`, gives torch the device type
``vgpu``. Its devices have memories of their own with a capacity, streams and events that run
asynchronously, links with a speed, and a race detector; results are the CPU's, bit for bit. It is
built once with the machine's C++ compiler. Importing this module imports no torch.
"""

from __future__ import annotations

from distorch.vgpu.control import (
    host_access,
    lose,
    register,
    reset,
    set_bus,
    set_capacity,
    set_link,
    settings,
    unregister,
)
from distorch.vgpu.counters import Counters, DeviceCounters, LinkCounters, counters
from distorch.vgpu.install import autoload, install, is_installed, why_not
from distorch.vgpu.observe import Span, races, trace
from distorch.vgpu.spec import DeviceSpec, LinkSpec, Spec

__all__ = [
    "Counters",
    "DeviceCounters",
    "DeviceSpec",
    "LinkCounters",
    "LinkSpec",
    "Span",
    "Spec",
    "autoload",
    "counters",
    "host_access",
    "install",
    "is_installed",
    "lose",
    "races",
    "register",
    "reset",
    "set_bus",
    "set_capacity",
    "set_link",
    "settings",
    "trace",
    "unregister",
    "why_not",
]
