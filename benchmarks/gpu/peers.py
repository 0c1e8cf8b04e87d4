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

__all__ = ["absent", "installed"]

_MB = 1 << 20


def _group_offload(job: Job, module: nn.Module) -> object:
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        module,
        onload_device=job.device.torch,
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=True,
        record_stream=True,
        low_cpu_mem_usage=not job.model.is_pinned,  # or it would pin a second copy of the model
    )
    return module


def _cpu_offload(job: Job, module: nn.Module) -> object:
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


def _dense(job: Job) -> nn.Module:
    if job.model.stored is not None:
        raise ValueError("packed weights are ours: it knows no such tensors")
    return job.model.module()


@contextmanager
def _streamed(way: _Way, job: Job) -> Iterator[Running]:
    module: Any = way(job, _dense(job))
    yield Running(module=module, streamed_bytes=job.model.nbytes)


@contextmanager
def _model_offload(job: Job) -> Iterator[Running]:
    """What diffusers' `enable_model_cpu_offload` does with each model of a pipeline.

    All of it comes with its first pass, and stays until another model runs: here, to the end.
    """
    from accelerate import cpu_offload_with_hook

    module, _ = cpu_offload_with_hook(_dense(job), job.device.torch)
    try:
        yield Running(module=module, streamed_bytes=0)
    except torch.OutOfMemoryError:
        needed = job.model.nbytes + job.activation_bytes
        raise MemoryError(f"out of memory, {needed / 1e9:.3g} GB are needed at once") from None


_TAME: Final[Mapping[str, tuple[str, Contender]]] = {
    "diffusers group offload": ("diffusers", partial(_streamed, _group_offload)),
    "diffusers model offload": ("accelerate", _model_offload),
    "accelerate cpu_offload": ("accelerate", partial(_streamed, _cpu_offload)),
}
_WILD: Final[Mapping[str, tuple[str, Contender]]] = {
    "flextensor": ("flextensor", partial(_streamed, _flextensor)),
    "ramtorch": ("ramtorch", partial(_streamed, _ramtorch)),
    "mmgp": ("mmgp", partial(_streamed, _mmgp)),  # last: it changes torch's defaults
}


def absent() -> list[str]:
    """Return the packages of peers that are not installed, so that nobody takes them for beaten."""
    packages = {package for package, _ in (*_TAME.values(), *_WILD.values())}
    return sorted(package for package in packages if find_spec(package) is None)


def installed(*, tame: bool) -> dict[str, Contender]:
    """Return the peers that can be imported here: those that leave torch alone, or the others."""
    return {
        name: run
        for name, (package, run) in (_TAME if tame else _WILD).items()
        if find_spec(package) is not None
    }
