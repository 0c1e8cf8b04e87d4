"""Nodes over other packs' nodes: one adapter for all, which runs them with a device of choice.

What comes back as a model of ComfyUI's is placed there. Whatever else a pack loads goes where the
pack puts it, which is asked for in the three ways that need no change of its code: its own input
for a device, torch's current device while it runs, and a device that it finds in what it is given.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import comfy.model_management
import nodes as comfyui
import torch
from server import PromptServer

from distorch.integrations.comfyui.in_comfy.devices import device_names, validator
from distorch.integrations.comfyui.in_comfy.loaders import run_node
from distorch.integrations.comfyui.in_comfy.outputs import on_device, placed
from distorch.integrations.comfyui.kits import check_device, default_device
from distorch.integrations.comfyui.packs import (
    PACK_ROWS,
    Wrapped,
    device_inputs,
    wrapped_inputs,
)

__all__ = ["nodes"]

_log = logging.getLogger("distorch")
_OLD_NAMES = {"vace_model": "extra_model"}


class Adapter:
    """A node of another pack on a device of choice; its class says which (`_class_of`)."""

    row: ClassVar[Wrapped]
    FUNCTION = "run"
    RETURN_TYPES: ClassVar[tuple[str, ...]]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:  # noqa: N802 (ComfyUI's name)
        """Return the inputs of the node below as they are now, and the device."""
        return wrapped_inputs(_base(cls.row).INPUT_TYPES(), cls.row, device_names())

    def run(self, **values: Any) -> tuple[Any, ...]:
        """Run the node below, and place what it returns.

        Raises:
            MachineError: the device is not here.
        """
        row, here = self.row, device_names()
        ours = {name: values.pop(name, None) for name in device_inputs(row, here)}
        device = check_device(ours[row.device] or default_device(here), here)
        _warn(row, device)
        base = _base(row)
        with _current(device):
            found = run_node(base, _values(base, row, values, device))
        place = on_device(device, ours.get("offload_device"))
        kinds = tuple(base.RETURN_TYPES)
        outputs = tuple(placed(kind, it, place) for kind, it in zip(kinds, found, strict=True))
        return (*outputs, device) if row.gives_device else outputs


def _base(row: Wrapped) -> Any:
    return comfyui.NODE_CLASS_MAPPINGS[row.base]


def _values(base: Any, row: Wrapped, values: Mapping[str, Any], device: str) -> dict[str, Any]:
    """What the node below gets: what it knows, and the device in its own words."""
    members = base.INPUT_TYPES()
    known = {**members.get("required", {}), **members.get("optional", {})}
    given = {_OLD_NAMES.get(name, name): value for name, value in values.items()}
    given = {name: value for name, value in given.items() if name in known or name == "unique_id"}
    for name in (*row.stands_for, row.device):
        if name in known:
            given[name] = _word_for(device, known[name][0])
    return given


def _word_for(device: str, choices: Any) -> str:
    """Say a device as one of ``choices``: by its name, or as on or off the main device."""
    words = ("cpu", "offload_device") if device == "cpu" else (device, "gpu", "main_device")
    options = choices if isinstance(choices, list) else [device]
    return next((word for word in words if word in options), options[0])


def _current(device: str) -> AbstractContextManager[Any]:
    """Make an accelerator torch's current one, which ComfyUI and most packs load to."""
    kind, _, index = device.partition(":")
    module = getattr(torch, kind, None)
    if not index or module is None or not hasattr(module, "device"):
        return nullcontext()
    context: AbstractContextManager[Any] = module.device(int(index))
    return context


def _warn(row: Wrapped, device: str) -> None:
    """Say where a device is chosen that the other pack may not go to."""
    main = str(comfy.model_management.get_torch_device())
    if device != main and row.category != "multigpu":
        line = (
            "%s: the pack below keeps its own device, %s, for what it does not ask; %s was chosen"
        )
        _log.warning(line, row.key, main, device)


def _class_of(row: Wrapped) -> type[Adapter]:
    base = _base(row)
    kinds = tuple(base.RETURN_TYPES)
    names = tuple(getattr(base, "RETURN_NAMES", None) or kinds)
    if row.gives_device:
        kinds, names = (*kinds, "MULTIGPUDEVICE"), (*names, row.gives_device)
    members: dict[str, Any] = {
        "row": row,
        "CATEGORY": row.category,
        "DESCRIPTION": f"{row.base}, on a device of your choice.",
        "RETURN_TYPES": kinds,
        "RETURN_NAMES": names,
        "OUTPUT_NODE": getattr(base, "OUTPUT_NODE", False),
    }
    if not row.is_handed_on:
        members["VALIDATE_INPUTS"] = classmethod(validator(tuple(device_inputs(row, ["cpu"]))))
    return type(row.key, (Adapter,), members)


def _there() -> dict[str, type]:
    """The nodes whose packs ComfyUI has loaded by now."""
    return {row.key: _class_of(row) for row in PACK_ROWS if row.base in comfyui.NODE_CLASS_MAPPINGS}


async def _register_rest(_app: Any) -> None:
    """Tell ComfyUI of the nodes over packs that were loaded after this one; it starts to serve."""
    home = comfyui.NODE_CLASS_MAPPINGS["UNETLoaderMultiGPU"].RELATIVE_PYTHON_MODULE
    for key, node in _there().items():
        if key not in comfyui.NODE_CLASS_MAPPINGS:
            node.RELATIVE_PYTHON_MODULE = home  # type: ignore[attr-defined]
            comfyui.NODE_CLASS_MAPPINGS[key] = node
            comfyui.NODE_DISPLAY_NAME_MAPPINGS[key] = node.row.title  # type: ignore[attr-defined]


def nodes() -> dict[str, type]:
    """Return the nodes over the packs that are there; those of later packs follow at the start."""
    PromptServer.instance.app.on_startup.append(_register_rest)
    return _there()
