"""A whole pipeline under one line: its components share the memory of the device that computes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import ModelHook
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from distorch.allocation import Allocation
from distorch.errors import ModelError
from distorch.integrations.attach import Handle, Progress
from distorch.integrations.memories import as_seen, machine_here
from distorch.integrations.module_tree import Tree, describe
from distorch.integrations.request import Request
from distorch.integrations.turns import SharingHandle, Turns
from distorch.machine import Machine
from distorch.plan.blocks import cut
from distorch.tiers import Source

__all__ = ["Component", "PipelineHandle", "distribute_pipeline"]

_ATTRIBUTE = "_distorch_handle"
_WEIGHTS = {".safetensors", ".gguf"}
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
        self._doors: list[_Door] = []

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
        self._doors.append(_Door(component.module, handle, torch.device(device)))


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


def models_in(path: Path) -> list[str]:
    """Return the names of the models with weights in a pipeline's directory.

    Raises:
        ModelError: its ``model_index.json`` is no index of a pipeline.
    """
    return [
        name
        for name, is_there in _entries(path).items()
        if is_there and any(it.suffix in _WEIGHTS for it in (path / name).glob("*"))
    ]


def assemble(path: Path, found: Mapping[str, Component]) -> Any:
    """Let diffusers put a pipeline together around models that are built already.

    Raises:
        ModelError: it cannot.
    """
    given: dict[str, Any] = {name: component.module for name, component in found.items()}
    given |= {name: None for name, is_there in _entries(path).items() if not is_there}
    make: Any = DiffusionPipeline.from_pretrained  # diffusers has no types
    try:
        return make(path, local_files_only=True, **given)
    except Exception as error:
        raise ModelError(
            f"diffusers cannot make a pipeline of {path}: {error}",
            hint="the directory as it was saved: each component in a folder of its own",
        ) from error


def _entries(path: Path) -> dict[str, bool]:
    """A pipeline's components by name, and whether it was saved with them."""
    index = path / "model_index.json"
    try:
        said = json.loads(index.read_bytes())
        return {name: any(entry) for name, entry in said.items() if isinstance(entry, list)}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{index} is no index of a pipeline: {error}",
            hint="the file may be damaged; download it again",
        ) from error


def _models(pipe: DiffusionPipeline, found: Mapping[str, Component]) -> dict[str, Component]:
    """The pipeline's models by name; one that stands under two names is found under the first."""
    models: dict[str, Component] = {}
    seen: set[int] = set()
    components: Mapping[str, Any] = pipe.components  # type: ignore[attr-defined]  # no types
    for name, module in components.items():
        if isinstance(module, nn.Module) and id(module) not in seen:
            seen.add(id(module))
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
    resolved = request.line(total_bytes, here).resolve(total_bytes, here, request.compute)
    compute, granted_bytes = resolved.compute, resolved.bytes_on(resolved.compute)
    if granted_bytes >= total_bytes:
        requests |= {model.name: Request(allocation=f"{compute},*") for model in models}
        return None
    donors = {name: n for name, n in resolved.bytes_by_tier if name != compute}
    rest = _rest_of(request.line(total_bytes, here), compute)
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


class _Door(ModelHook):  # type: ignore[misc]  # accelerate has no types
    """Stands before a model: gives it its turn, and brings inputs to its device.

    diffusers calls ``pre_forward`` before a VAE decodes or encodes, which is not its forward, and
    asks for ``execution_device`` to know where latents are made: protocols of accelerate's hooks.
    """

    def __init__(self, module: nn.Module, handle: Handle, latents: torch.device) -> None:
        self._module, self._handle = module, handle
        self._device, self.execution_device = torch.device(handle.plan.compute), latents
        self._hooks = [
            module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True),
            module.register_forward_hook(self._leave),
        ]
        if hasattr(module, "decode"):
            self._hooks += [
                child.register_forward_pre_hook(self._align, prepend=True, with_kwargs=True)
                for child in module.children()
            ]
        module._hf_hook = self  # noqa: SLF001  (the name of the protocol)

    def pre_forward(self, _module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Give the model its turn."""
        if isinstance(self._handle, SharingHandle):
            self._handle.turns.enter(self._handle)
        return args, kwargs

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._module.__dict__.pop("_hf_hook", None)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        before = set(module._forward_pre_hooks)  # noqa: SLF001  (torch has no other list of them)
        self.pre_forward(module)
        for key, hook in list(module._forward_pre_hooks.items()):  # noqa: SLF001  (as above)
            if key not in before:  # it came too late for this pass, which has begun
                hook(module, args)
        return self._align(module, args, kwargs)

    def _align(self, _module: nn.Module, args: Any, kwargs: Any) -> Any:
        return _to(self._device, (args, kwargs))

    def _leave(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        return _to(self.execution_device, output)


def _to(device: torch.device, values: Any) -> Any:
    return tree_map_only(
        Tensor, lambda value: value if value.device == device else value.to(device), values
    )
