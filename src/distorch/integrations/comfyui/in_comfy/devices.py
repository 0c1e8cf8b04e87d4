"""The devices of this machine as ComfyUI's users name them, and how a node asks for one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import Parameter, Signature
from typing import Any

import torch

from distorch.integrations.comfyui.kits import misnamed

__all__ = ["device_names", "validator"]

_KINDS = ("cuda", "xpu", "npu", "mlu", "mps", "corex")


def device_names() -> list[str]:
    """Return ``cpu`` and every accelerator: ``cuda:0``, ``xpu:1``, ``mps``, ``vgpu:0``."""
    kinds = dict.fromkeys((*_KINDS, torch._C._get_privateuse1_backend_name()))  # noqa: SLF001 (it has no other name)
    return ["cpu", *(name for kind in kinds for name in _names_of(kind))]


def _names_of(kind: str) -> list[str]:
    """The devices of one kind; none where torch has no module for it, or finds no card."""
    module = getattr(torch, kind, None)
    if kind == "mps":
        return ["mps"] if torch.backends.mps.is_available() else []
    if module is None or not hasattr(module, "is_available") or not module.is_available():
        return []
    return [f"{kind}:{index}" for index in range(module.device_count())]


def validator(names: Sequence[str]) -> Callable[..., bool | str]:
    """Return a node's ``VALIDATE_INPUTS``: a device of another machine is no fault of the workflow.

    ComfyUI leaves the inputs that the signature names to us, and checks the others against their
    lists. Whether the device is here is said when the node runs, with the devices that are.
    """

    def validate(_node: type, **values: Any) -> bool | str:
        return misnamed(value for value in values.values() if value is not None) or True

    positional = Parameter.POSITIONAL_OR_KEYWORD
    parameters = [Parameter(name, positional, default=None) for name in names]
    validate.__signature__ = Signature(  # type: ignore[attr-defined]
        [Parameter("cls", positional), *parameters]
    )
    return validate
