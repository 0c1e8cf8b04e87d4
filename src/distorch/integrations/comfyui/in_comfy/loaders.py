"""The loaders that saved workflows name: ComfyUI's own, and what they return placed as asked."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from inspect import cleandoc
from typing import Any, ClassVar

import nodes as comfyui

from distorch.integrations.comfyui.in_comfy.devices import device_names, validator
from distorch.integrations.comfyui.in_comfy.outputs import (
    Placer,
    eject_models,
    on_device,
    placed,
    spread,
)
from distorch.integrations.comfyui.kits import (
    DEVICE_INPUTS,
    Kit,
    compute_of,
    inputs_of,
    request_of,
    value_of,
)
from distorch.integrations.comfyui.table import ROWS, Row, merged

__all__ = ["Loader", "node_class", "nodes", "run_node"]

_log = logging.getLogger("distorch")

_SPLIT = """
    Loads the model and rests a part of it in another memory. The weights visit the device while it
    computes, ahead of their use; the result is the same, bit by bit.
"""
_WHOLE = """
    Loads the model on the device that is chosen, and leaves the rest to ComfyUI.
"""


class Loader:
    """A loader with a kit; the class of each node says which (`node_class`)."""

    row: ClassVar[Row]
    FUNCTION = "load"
    RETURN_TYPES: ClassVar[tuple[str, ...]]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:  # noqa: N802 (ComfyUI's name)
        """Return the loader's own inputs as they are now, and the kit's."""
        return merged(cls.base_inputs(), cls.row.kit, device_names())

    @classmethod
    def base_inputs(cls) -> Mapping[str, Any]:
        """Return what the loader asks for by itself."""
        inputs: Mapping[str, Any] = comfyui.NODE_CLASS_MAPPINGS[cls.row.base].INPUT_TYPES()
        return inputs

    def run_base(self, values: dict[str, Any], compute: str) -> tuple[Any, ...]:
        """Load as ComfyUI does; its own choice of a device goes with ours."""
        base = comfyui.NODE_CLASS_MAPPINGS[self.row.base]
        if "device" in base.INPUT_TYPES().get("optional", {}):
            values = {**values, "device": "cpu" if compute == "cpu" else "default"}
        return run_node(base, values)

    def load(self, **values: Any) -> tuple[Any, ...]:
        """Load, and place what was loaded.

        Raises:
            AllocationError: the line cannot be read, or does not fit.
            MachineError: a device that was chosen is not here.
        """
        kit, devices = self.row.kit, device_names()
        ours = {name: values.pop(name, None) for name in inputs_of(kit, devices)}
        compute, place = compute_of(kit, ours, devices), _placer(kit, ours, devices)
        if "eject_models" in ours and value_of(kit, "eject_models", ours, devices):
            eject_models()
        found = self.run_base(values, compute)
        if kit != "device" and "MODEL" in self.RETURN_TYPES:  # of a checkpoint, the model is split
            return _each(self.RETURN_TYPES, found, {"MODEL": place})
        return _each(self.RETURN_TYPES, found, dict.fromkeys(self.RETURN_TYPES, place))


def _placer(kit: Kit, values: Mapping[str, Any], devices: list[str]) -> Placer:
    if kit == "device":
        return on_device(compute_of(kit, values, devices))
    return spread(request_of(kit, values, devices))


def _each(
    kinds: tuple[str, ...], found: tuple[Any, ...], places: Mapping[str, Placer]
) -> tuple[Any, ...]:
    """Place each output whose type has a place; the others are returned as they are."""
    return tuple(
        placed(kind, thing, places[kind]) if kind in places else thing
        for kind, thing in zip(kinds, found, strict=True)
    )


def run_node(base: Any, values: Mapping[str, Any]) -> tuple[Any, ...]:
    """Run another node, of ComfyUI's first or its newer kind, and return its outputs."""
    result = (
        base.execute(**values)
        if hasattr(base, "define_schema")
        else getattr(base(), base.FUNCTION)(**values)
    )
    outputs = getattr(result, "result", result)
    return tuple(outputs)


def node_class(row: Row, kind: type[Loader], returns: tuple[str, ...]) -> type[Loader]:
    """Return the class of one node."""
    members = {
        "row": row,
        "CATEGORY": row.category,
        "DESCRIPTION": cleandoc(_WHOLE if row.kit == "device" else _SPLIT),
        "RETURN_TYPES": returns,
        "VALIDATE_INPUTS": classmethod(validator(DEVICE_INPUTS[row.kit])),
        "__doc__": row.title,
    }
    return type(row.key, (kind,), members)


def nodes() -> dict[str, type]:
    """Return the nodes over ComfyUI's loaders; one that it does not have any more is left out."""
    found: dict[str, type] = {}
    for row in ROWS:
        base = comfyui.NODE_CLASS_MAPPINGS.get(row.base)
        if base is None:
            _log.warning("%s is left out: this ComfyUI has no %s", row.key, row.base)
            continue
        found[row.key] = node_class(row, Loader, tuple(base.RETURN_TYPES))
    return found
