"""Distributes the weights of any ``nn.Module``: hooks that can be taken off again, nothing else."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from distorch.allocation import Allocation
from distorch.errors import ModelError
from distorch.integrations.companions import Companions
from distorch.integrations.filling import Originals, Progress, fill, lost
from distorch.integrations.hooking import Attachment
from distorch.integrations.lora import Lora, Loras
from distorch.integrations.lora_source import LoraSource
from distorch.integrations.memories import open_stores, pins_for
from distorch.integrations.module_tree import Tree, describe, whole
from distorch.integrations.planning import Planning
from distorch.integrations.request import Request
from distorch.machine import Machine
from distorch.plan.blocks import ALIGNMENT_BYTES, CPU_ALIGNMENT_BYTES
from distorch.plan.plan import Plan
from distorch.run.executor import Executor
from distorch.run.stats import Stats
from distorch.tiers import Source, Store
from distorch.tiers.converted import ConvertedSource
from distorch.tiers.pinned import Pins
from distorch.tiers.sources import FileSource, MemorySource

__all__ = ["Handle", "Progress", "distribute", "handle_of", "plan_for"]

_ATTRIBUTE = "_distorch_handle"


def distribute(
    module: nn.Module,
    request: Request,
    *,
    machine: Machine | None = None,
    progress: Progress | None = None,
) -> Handle:
    """Rest a module's weights in several memories, in place; see `distorch.distribute`."""
    if not isinstance(module, nn.Module):
        raise ModelError(
            f"a torch.nn.Module is distributed, not {type(module).__name__}",
            hint="distorch.load(path, allocation) for a file",
        )
    if getattr(module, _ATTRIBUTE, None) is not None:
        raise ModelError(
            "this module is distributed already",
            hint="distorch.handle_of(module).rebudget(...), or .remove() first",
        )
    tree = describe(module)
    if any(weight.original.is_meta for weight in tree.weights.values()):
        raise ModelError(
            "some weights are on the meta device: they have no values yet",
            hint="distorch.load(path, allocation) builds and loads a model in one go",
        )
    handle = Handle(module, tree)
    handle.bind(request, machine, progress)
    return handle


def plan_for(module: nn.Module, request: Request, machine: Machine | None = None) -> Plan:
    """Return the plan that `distribute` would carry out; nothing moves.

    Raises:
        AllocationError: the request cannot be read or does not fit this machine.
    """
    return Handle(module, describe(module)).plan_as(request, machine)


def handle_of(module: nn.Module) -> Handle:
    """Return the handle of what is distributed: a module, or a pipeline.

    Raises:
        ModelError: it is not distributed.
    """
    handle = getattr(module, _ATTRIBUTE, None)
    if handle is None:
        raise ModelError("this module is not distributed", hint="distorch.distribute(module, line)")
    found: Handle = handle  # the attribute is ours alone
    return found


class Handle:
    """A module's distribution: its plan, its counters, and the way back.

    ``plan`` is what was decided, ``stats()`` what has happened since. ``source`` is given for a
    model whose weights have never been in memory: a checkpoint's files, which the disk tier reads
    in place. ``opened_by`` opens a store for each tier of a plan: another may stand for a donor.
    ``steps_of`` is the module whose passes are the steps, where that is another. ``loras`` are
    those that were added, by name.
    """

    plan: Plan

    def __init__(
        self,
        module: nn.Module,
        tree: Tree,
        source: Source | None = None,
        opened_by: Callable[[Plan, Pins, Collection[str]], dict[str, Store]] | None = None,
        steps_of: nn.Module | None = None,
    ) -> None:
        self._module = module
        self._tree = tree
        self._source = source
        in_place = source is not None and not isinstance(source, ConvertedSource)
        self._open_stores = opened_by or partial(open_stores, in_place=in_place)
        self._request = Request()
        self._attachment: Attachment | None = None
        self._companions = Companions()
        self._executor: Executor | None = None
        self._machine: Machine | None = None
        self._steps_of = module if steps_of is None else steps_of
        self.loras = Loras(module, weakref.proxy(self))

    def stats(self) -> Stats:
        """Return the counters of the run so far.

        Raises:
            ModelError: the handle was removed.
        """
        return self._running().stats()

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights on the compute device now: at rest, the ring, and their scales."""
        scales = sum(weight.form.nbytes for weight in self._tree.weights.values())
        return self._running().weight_bytes + scales

    def rebudget(
        self,
        allocation: str | Allocation | Plan | None = None,
        *,
        machine: Machine | None = None,
        **request: Any,
    ) -> None:
        """Move the weights to another allocation; takes the same arguments as `distribute`.

        Weights that came from a checkpoint are read again from it. Others come back into memory
        on the way, which must have room for them.
        """
        wanted = Request(allocation=allocation, **request)
        self.plan_as(wanted, machine)  # a line that does not fit raises before anything moves
        before = self._request
        self._take_off(restore=self._source is None)
        try:
            self.bind(wanted, machine, None)
        except BaseException:
            self.bind(before, machine, None)
            raise
        self.loras.follow(machine)

    def add_lora(
        self,
        source: LoraSource,
        strength: float = 1.0,
        *,
        name: str | None = None,
        allocation: str | Allocation | None = None,
        strict: bool = False,
    ) -> Lora:
        """Add a LoRA (or DoRA, LoHa, LoKr) to what the module computes, beside its weights.

        ``source`` is a safetensors file, a directory with one, or tensors by name. Its own weights
        rest as the module's do, or by a line of their own. Names that no module has are warned
        about; ``strict`` makes them an error.

        Raises:
            FormatError, ModelError: it is not a whole LoRA, or it is for another model.
            AllocationError: its weights do not fit.
        """
        self._running()
        return self.loras.add(source, strength, name=name, allocation=allocation, strict=strict)

    def remove(self) -> None:
        """Bring every weight into memory and make the module ordinary again.

        The parameters are the ones from before, with their values; those of a loaded model, which
        had none, are new. No thread, hook or file handle is left.

        Raises:
            ExecutorError: some weights rest on a device that is gone; the others are back.
        """
        self.loras.clear()
        try:
            self._take_off(restore=True)
        finally:
            if self._source is not None and self._executor is None:
                self._source.close()

    def discard(self) -> None:
        """Let go of the weights too, wherever they rest: nobody will use the module again.

        What forgets a module that is distributed waits for Python's collector; this does not.
        """
        self.loras.clear()
        self._take_off(restore=False)
        for weight in self._tree.weights.values():
            weight.empty()
            weight.give_up()
        if self._source is not None:
            self._source.close()

    @torch.inference_mode(mode=False)  # parameters and buffers are for any mode
    def bind(self, request: Request, machine: Machine | None, progress: Progress | None) -> None:
        """Plan, fill the tiers, and put the hooks on."""
        plan = self.plan_as(request, machine)
        pins, kept = pins_for(plan), self._kept(plan)
        weights = {} if self._source else self._tree.weights
        self._align_source(plan)
        stores = self._open_stores(plan, pins, kept)
        executor = _executor(plan, stores, pins)  # first: no weight moves if its ring has no room
        try:
            fill(
                plan,
                stores,
                self._source or MemorySource(Originals(weights)),
                kept=kept,
                originals=weights,
                progress=progress,
            )
        except BaseException:
            executor.close()
            raise
        self.plan, self._executor, self._request = plan, executor, request
        self._machine = machine
        self._attachment = Attachment(
            self._module, self._tree, executor, kept=kept, steps_of=self._steps_of
        )
        try:
            self._companions.move(self._module, executor.device)
            executor.wait()  # any stream may read them, and a copy between devices is only queued
        except BaseException:
            self._take_off(restore=self._source is None)
            raise
        self._announce()

    def _align_source(self, plan: Plan) -> None:
        """Say what the device that computes asks of weights that are used where they lie."""
        if isinstance(self._source, FileSource):
            on_host = plan.compute == "cpu"
            self._source.align_to(CPU_ALIGNMENT_BYTES if on_host else ALIGNMENT_BYTES)

    def _announce(self) -> None:
        self._module.__dict__[_ATTRIBUTE] = self

    def __reduce_ex__(self, _protocol: Any) -> Any:
        """Refuse: hooks and files cannot be pickled."""
        raise ModelError(
            "a distributed module cannot be copied or saved as it is",
            hint="distorch.handle_of(model).remove() first",
        )

    def place(self, adapters: nn.Module, allocation: str | Allocation) -> Handle:
        """Distribute a LoRA's own weights, for passes of this module."""
        tree = describe(adapters)
        tree = replace(tree, root=whole(tree.root))  # thin matrices: runs of rows may differ
        handle = Handle(adapters, tree, steps_of=self._module)
        handle.bind(Request(allocation=allocation), self._machine, None)
        return handle

    def _running(self) -> Executor:
        if self._executor is None:
            raise ModelError("this handle was removed", hint="distorch.distribute(module, line)")
        return self._executor

    def plan_as(self, request: Request, machine: Machine | None) -> Plan:
        """Return the plan that a request comes to on a machine (None: this one), as it is now."""
        held: dict[str, int] = {}
        if self._executor is not None:
            held = {**self.plan.bytes_by_tier, self.plan.compute: self.plan.held_bytes}
        in_place = self._source is not None
        spills = isinstance(self._source, ConvertedSource)
        planning = Planning(self._tree, in_place=in_place, spills=spills, held=held)
        return planning.plan(request, machine)

    def _kept(self, plan: Plan) -> frozenset[str]:
        """The weights that stay in the module's own tensors: all their rows rest where they are."""
        if self._source is not None:
            return frozenset()
        moved = {
            part.tensor
            for placement in plan.placements
            if placement.kind == "streamed"
            for part in placement.block.parts
        }
        return frozenset(
            name
            for name, weight in self._tree.weights.items()
            if name not in moved and str(weight.original.device) == plan.compute
        )

    @torch.inference_mode(mode=False)
    def _take_off(self, *, restore: bool) -> None:
        executor, gone = self._running(), dict[str, Exception]()
        assert self._attachment is not None, "it comes with the executor"
        self._attachment.take_off()
        try:
            if restore:
                gone = self._attachment.restore()
            self._companions.restore()
        finally:
            self._attachment = None
            executor.close()
            self._companions.forget()
            self._executor = None
            self._module.__dict__.pop(_ATTRIBUTE, None)
        if gone:
            raise lost(gone)


def _executor(plan: Plan, stores: Mapping[str, Store], pins: Pins) -> Executor:
    try:
        return Executor(plan, stores, pins)
    except BaseException:
        for store in stores.values():
            store.close()
        raise
