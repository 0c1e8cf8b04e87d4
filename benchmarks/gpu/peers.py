"""Other projects, where they are installed: each by its public interface, as its manual says.

Their weights begin in the same pinned memory as everybody's. What one of them raises is its row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any, Final

import torch
from torch import nn

from gpu.contenders import Contender, Job, Running

__all__ = ["installed"]

_MB = 1 << 20


def _diffusers(job: Job, module: nn.Module) -> object:
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        module,
        onload_device=job.device.torch,
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=True,
        record_stream=True,
    )
    return module


def _accelerate(job: Job, module: nn.Module) -> object:
    from accelerate import cpu_offload

    return cpu_offload(module, execution_device=job.device.torch)


def _flextensor(job: Job, module: nn.Module) -> object:
    import flextensor

    config = flextensor.OffloadConfig(
        include_patterns=[f"{name}.*" for name in job.model.shape.lists],
        max_gpu_mem_fraction=job.room_bytes / job.device.total_bytes,
        gpu_device=job.device.torch.index or 0,
        profiling_iters=3,
    )
    return _warmed(job, flextensor.offload(module, config=config), passes=6)


def _warmed(job: Job, module: Any, passes: int) -> object:
    """Run some passes, off the clock: it discovers and profiles in the first ones."""
    inputs = job.model.inputs(job.device.torch)
    for _ in range(passes):
        module(**inputs)
    return module


def _mmgp(job: Job, module: nn.Module) -> object:
    from mmgp import offload

    budget = max(1, job.room_bytes // _MB)
    offload.all(
        {"transformer": module},
        pinnedMemory=True,
        quantizeTransformer=False,
        budgets={"transformer": budget},
        verboseLevel=0,
    )
    return module


def _ramtorch(job: Job, module: nn.Module) -> object:
    from ramtorch.helpers import move_model_to_device, replace_linear_with_ramtorch

    replaced = replace_linear_with_ramtorch(module, device=job.device.name)
    return move_model_to_device(replaced, device=job.device.torch)


_Way = Callable[[Job, nn.Module], object]

_TAME: Final[Mapping[str, tuple[str, _Way]]] = {
    "diffusers group offload": ("diffusers", _diffusers),
    "accelerate cpu_offload": ("accelerate", _accelerate),
}
_WILD: Final[Mapping[str, tuple[str, _Way]]] = {
    "flextensor": ("flextensor", _flextensor),
    "ramtorch": ("ramtorch", _ramtorch),
    "mmgp": ("mmgp", _mmgp),  # last: it changes torch's defaults
}


@contextmanager
def _run(way: _Way, job: Job) -> Iterator[Running]:
    if job.model.stored is not None:
        raise ValueError("packed weights are ours: it knows no such tensors")
    module: Any = way(job, job.model.module())
    yield Running(module=module, streamed_bytes=job.model.nbytes)


def installed(*, tame: bool) -> dict[str, Contender]:
    """Return the peers that can be imported here: those that leave torch alone, or the others."""
    return {
        name: partial(_run, way)
        for name, (package, way) in (_TAME if tame else _WILD).items()
        if find_spec(package) is not None
    }
