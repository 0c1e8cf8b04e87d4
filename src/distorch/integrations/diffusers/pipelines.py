"""A whole pipeline under one line: its components share the memory of the device that computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from distorch.allocation import Allocation
from distorch.errors import ModelError
from distorch.integrations.attach import Handle, Progress
from distorch.integrations.diffusers.doors import Door
from distorch.integrations.memories import as_seen, machine_here
from distorch.integrations.module_tree import Tree, describe
from distorch.integrations.request import Request
from distorch.integrations.turns import SharingHandle, Turns
from distorch.machine import Machine
from distorch.plan.blocks import cut
from distorch.tiers import Source

__all__ = ["Component", "PipelineHandle", "distribute_pipeline"]

_ATTRIBUTE = "_distorch_handle"
_MAIN = ("transformer", "unet", "transformer_2")  # what runs most steps, and where latents are


@dataclass(frozen=True, slots=True)
class Component:
    """A model of a pipeline; ``source`` is its checkpoint, if it has never been in memory."""

    name: str
    module: nn.Module
    tree: Tree
    source: Source | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return sum(block.nbytes for block in cut(self.tree.root))


class PipelineHandle(Mapping[str, Handle]):
    """A pipeline's distribution: the handle of each of its models, by name.

    ``handle["transformer"].plan`` says where one rests, ``.stats()`` what it has done. Models under
    one line share what it grants of the device that computes: ``budget_bytes``, or None where all
    of them fit, each with what it has.
    """

    def __init__(self, pipe: DiffusionPipeline, turns: Turns | None) -> None:
        self._pipe, self._turns = pipe, turns
        self._handles: dict[str, Handle] = {}
        self._doors: list[Door] = []

    @property
    def budget_bytes(self) -> int | None:
        """Bytes of the device that models which take turns have together."""
        return None if self._turns is None else self._turns.budget_bytes

    @property
    def weight_bytes(self) -> dict[str, int]:
        """Bytes of weights now on each device that computes."""
        held: Counter[str] = Counter()
        for handle in self._handles.values():
            held[handle.plan.compute] += handle.weight_bytes
        return dict(held)

    def remove(self) -> None:
        """Bring every weight into memory, and make the pipeline an ordinary one again."""
        for door in self._doors:
            door.close()
        self._doors.clear()
        handles, self._handles = self._handles, {}
        for handle in handles.values():
            handle.remove()
        self._pipe.__dict__.pop(_ATTRIBUTE, None)

    def __getitem__(self, name: str) -> Handle:
        return self._handles[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._handles)

    def __len__(self) -> int:
        return len(self._handles)

    def _add(self, component: Component, handle: Handle, device: str) -> None:
        self._handles[component.name] = handle
        self._doors.append(Door(component.module, handle, torch.device(device)))


def distribute_pipeline(
    pipe: DiffusionPipeline,
    request: Request,
    *,
    components: Mapping[str, str] | None = None,
    machine: Machine | None = None,
    progress: Progress | None = None,
    found: Mapping[str, Component] | None = None,
) -> PipelineHandle:
    """Distribute every model of a pipeline; see `distorch.distribute`.

    ``components`` gives some of them lines of their own. ``found`` are models that are not in
    memory yet, by name.

    Raises:
        ModelError: a name is none of the pipeline's models, or it is distributed already.
        AllocationError: a line cannot be read, or does not fit.
    """
    if getattr(pipe, _ATTRIBUTE, None) is not None:
        raise ModelError(
            "this pipeline is distributed already", hint="distorch.handle_of(pipe).remove() first"
        )
    models = _models(pipe, found or {})
    own = dict(components or {})
    strange = [name for name in own if name not in models]
    if strange:
        raise ModelError(
            f"{type(pipe).__name__} has no model {strange[0]!r}: it has {', '.join(models)}",
            hint=f'components={{"{next(iter(models))}": "cpu,*"}}',
        )
    shared = [model for name, model in models.items() if name not in own]
    requests = {name: Request(allocation=line) for name, line in own.items()}
    turns = _share(shared, request, machine, requests)
    main = next((name for name in _MAIN if name in models), next(iter(models)))
    handle = PipelineHandle(pipe, turns)
    done = _Summed(progress, sum(model.nbytes for model in models.values()))
    try:
        bound = {}
        for name, model in models.items():
            takes_turns = turns if name not in own else None
            bound[name] = _bound(model, requests[name], machine, done, takes_turns)
            done.begin_next(model.nbytes)
        for name, model in models.items():
            handle._add(model, bound[name], bound[main].plan.compute)  # noqa: SLF001  (ours)
    except BaseException:
        for one in bound.values():
            one.remove()
        raise
    pipe.__dict__[_ATTRIBUTE] = handle
    return handle


def _models(pipe: DiffusionPipeline, found: Mapping[str, Component]) -> dict[str, Component]:
    """The pipeline's models by name; one that stands under two names is found under the first."""
    models: dict[str, Component] = {}
    seen: set[int] = set()
    components: Mapping[str, Any] = pipe.components  # type: ignore[attr-defined]  # no types
    for name, module in components.items():
        if isinstance(module, nn.Module) and id(module) not in seen:
            seen.add(id(module))
            if getattr(module, _ATTRIBUTE, None) is not None:
                raise ModelError(
                    f"the pipeline's {name} is distributed already",
                    hint=f'distorch.load(directory, line, files={{"{name}": "its.gguf"}})',
                )
            models[name] = found.get(name) or Component(name, module, describe(module))
    if not models:
        raise ModelError(f"{type(pipe).__name__} has no models", hint="a pipeline that is loaded")
    return models


def _share(
    models: list[Component],
    request: Request,
    machine: Machine | None,
    requests: dict[str, Request],
) -> Turns | None:
    """Write a line for each model that shares ``request``; None: they all fit, and take no turns.

    A model may have all that the request grants of the device, while it runs; what it has beside
    is dealt to the donors as the request deals the whole.
    """
    total_bytes = sum(model.nbytes for model in models)
    here = _machine(models, request, machine)
    asked = request.line(total_bytes, here)
    resolved = asked.resolve(total_bytes, here, request.compute)
    compute, granted_bytes = resolved.compute, resolved.bytes_on(resolved.compute)
    if granted_bytes >= total_bytes:
        requests |= {model.name: Request(allocation=f"{compute},*") for model in models}
        return None
    donors = {name: n for name, n in resolved.bytes_by_tier if name != compute}
    rest = _rest_of(asked, compute)
    over = {model.name: max(0, model.nbytes - granted_bytes) for model in models}
    for model in models:
        entries = [f"{compute},{min(granted_bytes, model.nbytes)}b"]
        for name, nbytes in donors.items():
            if name != rest:
                share = nbytes * over[model.name] // max(1, sum(over.values()))
                entries.append(f"{name},{share}b")
        line = ";".join([*entries, f"{rest},*"])
        requests[model.name] = Request(allocation=line, ring=request.ring)
    return Turns(granted_bytes)


def _machine(models: list[Component], request: Request, machine: Machine | None) -> Machine:
    """The machine with room for the models where they lie now."""
    homes: Counter[str] = Counter()
    for model in models:
        if model.source is not None:
            homes["disk"] += model.nbytes
            continue
        for weight in model.tree.weights.values():
            homes[str(weight.original.device)] += weight.memory.nbytes
    found = machine or machine_here(request.folder)
    return as_seen(found, homes, any_tier=request.names_its_devices)


def _rest_of(line: Allocation, compute: str) -> str:
    """The donor that takes what no other does."""
    rest = next((entry.device for entry in line.entries if entry.rest), compute)
    if rest != compute:
        return rest
    donors = [entry.device for entry in line.entries if entry.device != compute]
    return donors[-1] if donors else "disk" if compute == "cpu" else "cpu"


def _bound(
    model: Component,
    request: Request,
    machine: Machine | None,
    progress: Progress,
    turns: Turns | None,
) -> Handle:
    if turns is None:
        handle = Handle(model.module, model.tree, model.source)
        handle.bind(request, machine, progress)
        return handle
    sharing = SharingHandle(model.module, model.tree, model.source)
    sharing.turns = turns
    sharing.bind(request, machine, progress)
    turns.join(sharing)
    return sharing


class _Summed:
    """Progress over several models, as one."""

    def __init__(self, progress: Progress | None, total_bytes: int) -> None:
        self._progress, self._total_bytes = progress, total_bytes
        self._before_bytes = 0

    def __call__(self, done_bytes: int, _model_bytes: int) -> None:
        if self._progress is not None:
            self._progress(self._before_bytes + done_bytes, self._total_bytes)

    def begin_next(self, done_bytes: int) -> None:
        """Count a whole model."""
        self._before_bytes += done_bytes
