"""The dtype that a loaded model computes in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch

from distorch.errors import ModelError
from distorch.formats import TensorInfo
from distorch.integrations.memories import as_seen, machine_here
from distorch.integrations.request import Request
from distorch.integrations.resting import TORCH_DTYPES
from distorch.machine import Machine
from distorch.plan.plan import Plan

__all__ = ["read_dtype", "stored_dtype", "usual_dtype"]

_DTYPES = {
    "float32": torch.float32,
    "f32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "f16": torch.float16,
    "fp16": torch.float16,
}


def read_dtype(asked: str | torch.dtype | None) -> torch.dtype | None:
    """Return the dtype that a user asks for; None where it is left to us.

    Raises:
        ModelError: models do not compute in it.

    >>> read_dtype("bf16")
    torch.bfloat16
    """
    found = _DTYPES.get(asked.lower()) if isinstance(asked, str) else asked
    if (asked is not None and found is None) or found not in {None, *_DTYPES.values()}:
        raise ModelError(
            f"compute_dtype={asked!r} is not one that models compute in",
            hint='compute_dtype="bfloat16", "float16" or "float32"',
        )
    return found


def stored_dtype(infos: Iterable[TensorInfo]) -> torch.dtype | None:
    """Return the dtype that most of the bytes are stored in; None if models do not compute in it.

    >>> stored_dtype([]) is None
    True
    """
    totals: Counter[str] = Counter()
    for info in infos:
        totals[info.dtype] += info.nbytes
    most = max(totals, key=lambda name: totals[name], default="")
    found = TORCH_DTYPES.get(most)
    return found if found in _DTYPES.values() else None


def usual_dtype(request: Request, model_bytes: int, machine: Machine | None) -> torch.dtype:
    """Return what a model of packed weights computes in: float32 on the CPU, else bfloat16.

    Raises:
        AllocationError: the request cannot be read, or does not fit the machine.
    """
    return torch.float32 if _device(request, model_bytes, machine) == "cpu" else torch.bfloat16


def _device(request: Request, model_bytes: int, machine: Machine | None) -> str:
    if isinstance(request.allocation, Plan):
        return request.allocation.compute
    machine = as_seen(
        machine or machine_here(request.folder),
        {"disk": model_bytes},
        any_tier=request.names_its_devices,
    )
    return request.line(model_bytes, machine).resolve(model_bytes, machine, request.compute).compute
