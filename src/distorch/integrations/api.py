"""The public verbs: distribute a model or a pipeline that is in memory, and find its handle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, Unpack, overload

from torch import nn

from distorch.allocation import Allocation
from distorch.errors import ModelError
from distorch.integrations import attach
from distorch.integrations.attach import Handle, Progress
from distorch.integrations.request import Request
from distorch.machine import Machine
from distorch.plan.plan import Plan

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from distorch.integrations.diffusers.pipelines import PipelineHandle

__all__ = ["distribute", "handle_of"]


class Asked(TypedDict, total=False):
    """What `distribute` may be asked besides a line, for those who check types."""

    virtual_vram_gb: float | None
    donor: str | Sequence[str] | None
    compute: str | None
    ring: str | int | None
    components: Mapping[str, str] | None
    machine: Machine | None
    progress: Progress | None


@overload
def distribute(
    model: nn.Module, allocation: str | Allocation | Plan | None = ..., **asked: Unpack[Asked]
) -> Handle: ...


@overload
def distribute(
    model: DiffusionPipeline,
    allocation: str | Allocation | Plan | None = ...,
    **asked: Unpack[Asked],
) -> PipelineHandle: ...


def distribute(  # noqa: PLR0913  (each is one thing that a user may ask for)
    model: Any,
    allocation: str | Allocation | Plan | None = None,
    *,
    virtual_vram_gb: float | None = None,
    donor: str | Sequence[str] | None = None,
    compute: str | None = None,
    ring: str | int | None = None,
    components: Mapping[str, str] | None = None,
    machine: Machine | None = None,
    progress: Progress | None = None,
) -> Handle | PipelineHandle:
    """Rest a model's weights in several memories, in place; return the handle that undoes it.

    ``model`` is any ``nn.Module``, or a pipeline of diffusers. ``allocation`` is a line of the
    allocation language, such as ``"cpu,64mb;disk,*"`` (default ``auto``), or a `Plan` made before;
    or give ``virtual_vram_gb``, in GiB, and its ``donor``. ``ring`` bounds the slots that streamed
    blocks visit ("200mb", or bytes). The model computes the same bits as before, in inference; its
    training is not supported. Weights that rest on disk are written once to a file of ours, in the
    folder that the line names (``disk:/mnt/nvme``) or the temporary one.

    The models of a pipeline share what the line grants of the device that computes: the one that
    runs has it, and the others give up as much as it needs. ``components`` gives some of them a
    line, and so a device, of their own: ``{"text_encoder": "cpu,*", "vae": "cuda:1,*"}``.

    Raises:
        AllocationError: the line cannot be read or does not fit this machine.
        ModelError: the weights cannot be distributed, or a component has no such name.
        StorageError: the disk is full.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    >>> x = torch.ones(1, 64)
    >>> with torch.inference_mode():
    ...     before = model(x)
    ...     handle = distribute(model, "cpu,0b;disk,*")
    ...     same = torch.equal(model(x), before)
    ...     handle.remove()
    >>> same
    True
    """
    request = Request(
        allocation=allocation,
        virtual_vram_gb=virtual_vram_gb,
        donor=donor,
        compute=compute,
        ring=ring,
    )
    if not _is_pipeline(model):
        if components is not None:
            raise ModelError(
                f"components are of a pipeline, and this is a {type(model).__name__}",
                hint="distorch.distribute(model, line)",
            )
        return attach.distribute(model, request, machine=machine, progress=progress)
    from distorch.integrations.diffusers.pipelines import distribute_pipeline  # noqa: PLC0415  heavy

    return distribute_pipeline(
        model, request, components=components, machine=machine, progress=progress
    )


@overload
def handle_of(model: nn.Module) -> Handle: ...


@overload
def handle_of(model: DiffusionPipeline) -> PipelineHandle: ...


def handle_of(model: Any) -> Any:
    """Return the handle of a distributed model or pipeline.

    Raises:
        ModelError: it is not distributed.
    """
    return attach.handle_of(model)


def _is_pipeline(model: Any) -> bool:
    """Whether it is a pipeline of diffusers, without importing that."""
    names = {f"{base.__module__.partition('.')[0]}.{base.__name__}" for base in type(model).__mro__}
    return "diffusers.DiffusionPipeline" in names
