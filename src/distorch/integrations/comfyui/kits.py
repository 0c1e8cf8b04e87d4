"""The inputs that a loader node gets beside its own, and what their values ask for.

A kit is a group of such inputs. ``device`` puts a model on one device; ``distorch2`` and
``distorch2_clip`` rest a part of it on a donor; ``distorch`` is the first form of that. Names,
types and defaults are those of workflows that people have saved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from distorch.errors import AllocationError, MachineError
from distorch.integrations.request import Request

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = [
    "DEVICE_INPUTS",
    "Kit",
    "Options",
    "check_device",
    "compute_of",
    "default_device",
    "inputs_of",
    "misnamed",
    "request_of",
    "value_of",
]

Kit = Literal["device", "device_offload", "distorch2", "distorch2_clip", "distorch"]
Options = dict[str, tuple[Any, dict[str, Any]]]

DEVICE_INPUTS: dict[Kit, tuple[str, ...]] = {
    "device": ("device",),
    "device_offload": ("device", "offload_device"),
    "distorch2": ("compute_device", "donor_device"),
    "distorch2_clip": ("device", "donor_device"),
    "distorch": ("device",),
}

_EXPERT = (
    "One line that says which memory holds how much, such as cuda:0,4gb;cuda:1,8gb;cpu,* or "
    "cuda:0,30%;cpu,* or cpu,2gb;disk,*. If it is given, virtual_vram_gb and donor_device are not "
    "used. The model computes on the device chosen above."
)
_GIB = (
    "GiB of weights that rest on the donor, and visit the device while it computes. More than the "
    "model has means all of it. 0 keeps everything on the device."
)


def default_device(devices: Sequence[str]) -> str:
    """Return the first accelerator, else the host.

    >>> default_device(["cpu", "cuda:0", "cuda:1"]), default_device(["cpu"])
    ('cuda:0', 'cpu')
    """
    return next((device for device in devices if device != "cpu"), "cpu")


def device_input(devices: Sequence[str], tooltip: str, default: str | None = None) -> Any:
    """Return an input that chooses one of ``devices``, in ComfyUI's form."""
    return list(devices), {"default": default or default_device(devices), "tooltip": tooltip}


def gib_input(tooltip: str = _GIB, default: float = 4.0, most: float = 128.0) -> Any:
    """Return an input of GiB, in ComfyUI's form."""
    limits = {"default": default, "min": 0.0, "max": most, "step": 0.1}
    return "FLOAT", {**limits, "tooltip": tooltip}


def expert_input() -> Any:
    """Return an input that takes an allocation line, in ComfyUI's form."""
    return "STRING", {"multiline": False, "default": "", "tooltip": _EXPERT}


def eject_input(*, default: bool) -> Any:
    """Return the input that makes room before loading, in ComfyUI's form."""
    tooltip = "Unload every other model before this one is loaded."
    return "BOOLEAN", {"default": default, "tooltip": tooltip}


def inputs_of(kit: Kit, devices: Sequence[str]) -> Options:
    """Return a kit's inputs in their order, each as ComfyUI's pair of type and options.

    >>> list(inputs_of("distorch", ["cpu", "cuda:0"]))
    ['device', 'virtual_vram_gb', 'use_other_vram', 'expert_mode_allocations']
    """
    compute, *_ = DEVICE_INPUTS[kit]
    found: Options = {compute: device_input(devices, "The device that computes.")}
    if kit == "device_offload":
        offload = device_input(devices, "Where the model waits between its uses.", "cpu")
        return {**found, "offload_device": offload}
    if kit in {"distorch2", "distorch2_clip"}:
        found["virtual_vram_gb"] = gib_input()
        donor = "The memory that lends its space: the host's, or another device's."
        found["donor_device"] = device_input(devices, donor, "cpu")
        found["expert_mode_allocations"] = expert_input()
        found["eject_models"] = eject_input(default=kit == "distorch2")
    if kit == "distorch":
        found["virtual_vram_gb"] = gib_input(most=24.0)
        others = "Let other accelerators lend their memory first, and the host what they have not."
        found["use_other_vram"] = ("BOOLEAN", {"default": False, "tooltip": others})
        found["expert_mode_allocations"] = expert_input()
    return found


def value_of(kit: Kit, name: str, values: Mapping[str, Any], devices: Sequence[str]) -> Any:
    """Return an input's value, or its default where it was left out or is None."""
    value = values.get(name)
    return inputs_of(kit, devices)[name][1]["default"] if value is None else value


def compute_of(kit: Kit, values: Mapping[str, Any], devices: Sequence[str]) -> str:
    """Return the device that computes.

    Raises:
        MachineError: this machine does not have it.

    >>> compute_of("device", {}, ["cpu", "cuda:0"])
    'cuda:0'
    """
    return check_device(value_of(kit, DEVICE_INPUTS[kit][0], values, devices), devices)


def check_device(name: str, devices: Sequence[str]) -> str:
    """Return ``name``, a device of this machine.

    Raises:
        MachineError: this machine does not have it.
    """
    if name not in devices:
        raise MachineError(
            f"the workflow asks for '{name}', and this machine has {', '.join(devices)}",
            hint=f"choose {default_device(devices)} in the node",
        )
    return name


def misnamed(names: Iterable[Any]) -> str:
    """Say which of ``names`` can be no device of any machine, or nothing.

    >>> misnamed(["cuda:7", "cpu"]), misnamed(["the left one"])
    ('', "'the left one' is no name of a device: try cpu or cuda:0")
    """
    for name in names:
        kind, colon, index = str(name).partition(":")
        if not kind.isidentifier() or (colon and not index.isdecimal()):
            return f"{name!r} is no name of a device: try cpu or cuda:0"
    return ""


def request_of(kit: Kit, values: Mapping[str, Any], devices: Sequence[str]) -> Request:
    """Return what a kit's values ask for, on a machine with these devices.

    An expert line wins over ``virtual_vram_gb``; a donor that computes as well lends nothing.

    Raises:
        MachineError: a device that is chosen is not on this machine.
        AllocationError: the expert line has the old form and does not read.

    >>> request_of("distorch2", {"virtual_vram_gb": 8.0}, ["cpu", "cuda:0"]).donor
    ('cpu',)
    >>> request_of("distorch2", {"virtual_vram_gb": 0.0}, ["cpu", "cuda:0"]).allocation
    'cuda:0,*'
    """
    compute = compute_of(kit, values, devices)
    if kit in {"device", "device_offload"}:
        return _all_on(compute)
    line = str(value_of(kit, "expert_mode_allocations", values, devices)).strip()
    if "#" in line:
        line, _, numbers = (part.strip() for part in line.partition("#"))
        if not line and numbers:
            return _read_numbers(numbers, devices)
    if line:
        return Request(allocation=line, compute=compute)
    if kit == "distorch":
        others = value_of(kit, "use_other_vram", values, devices)
        donors = [name for name in devices if name != "cpu"] if others else []
        donors.append("cpu")
    else:
        donors = [check_device(value_of(kit, "donor_device", values, devices), devices)]
    return _lent(compute, value_of(kit, "virtual_vram_gb", values, devices), donors)


def _lent(compute: str, gib: float, donors: Sequence[str]) -> Request:
    """Ask for ``gib`` GiB on the donors, the first as far as it goes."""
    givers = tuple(name for name in donors if name != compute)
    if not gib or not givers:
        return _all_on(compute)
    return Request(virtual_vram_gb=gib, donor=givers, compute=compute)


def _all_on(device: str) -> Request:
    return Request(allocation=f"{device},*", compute=device)


def _read_numbers(text: str, devices: Sequence[str]) -> Request:
    """Read what the first logs printed behind a ``#``: ``compute;GiB;donor,donor``."""
    compute, *rest = (part.strip() for part in text.split(";"))
    try:
        gib = float(rest[0])
        donors = [name.strip() for part in rest[1:] for name in part.split(",") if name.strip()]
        return _lent(compute, gib, [check_device(name, devices) for name in donors or ["cpu"]])
    except (IndexError, ValueError) as error:
        raise AllocationError(
            f"after '#' stand a device, GiB and donors, not {text!r}", hint="#cuda:0;4;cpu"
        ) from error
