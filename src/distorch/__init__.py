"""DisTorch: run models larger than the compute device's memory, at full speed.

The names below are the public interface; each is imported when it is first used, so that
``import distorch`` costs nothing and the command line answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distorch.allocation import Allocation as Allocation
    from distorch.errors import DistorchError as DistorchError
    from distorch.formats import open_checkpoint as open_checkpoint
    from distorch.integrations.api import distribute as distribute
    from distorch.integrations.api import handle_of as handle_of
    from distorch.integrations.attach import Handle as Handle
    from distorch.integrations.huggingface import load_tokenizer as load_tokenizer
    from distorch.integrations.loading import load as load
    from distorch.machine import Machine as Machine
    from distorch.plan.plan import Plan as Plan
    from distorch.quant.of_checkpoint import dequantize as dequantize

_HOMES = {
    "Allocation": "distorch.allocation",
    "DistorchError": "distorch.errors",
    "Handle": "distorch.integrations.attach",
    "Machine": "distorch.machine",
    "Plan": "distorch.plan.plan",
    "dequantize": "distorch.quant.of_checkpoint",
    "distribute": "distorch.integrations.api",
    "handle_of": "distorch.integrations.api",
    "load": "distorch.integrations.loading",
    "load_tokenizer": "distorch.integrations.huggingface",
    "open_checkpoint": "distorch.formats",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605  (the keys are the names)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:  # noqa: ANN401  (whatever the name stands for)
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'distorch' has no attribute {name!r}")
