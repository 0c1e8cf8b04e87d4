"""Models that share one device's memory: the one that runs has it, the others give way.

The weights of each rest with the donors, all of them. What its plan has rest on the device that
computes is a copy there: given up when another model needs the room, and brought again.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NoReturn

import torch

from distorch.allocation import Allocation
from distorch.errors import AllocationError, ExecutorError, ModelError
from distorch.integrations.attach import Handle, Progress
from distorch.integrations.filling import Originals, fill
from distorch.integrations.hooking import Attachment, runs_of
from distorch.integrations.memories import pins_for
from distorch.integrations.request import Request
from distorch.integrations.resting import RestingWeight
from distorch.machine import Machine
from distorch.plan.plan import Plan
from distorch.run.executor import Executor
from distorch.run.stats import Stats
from distorch.tiers import Store
from distorch.tiers.cached import CachedTier
from distorch.tiers.pinned import Pins
from distorch.tiers.sources import MemorySource

__all__ = ["SharingHandle", "Turns"]


class Turns:
    """Who has a device's memory: at most ``budget_bytes`` of it, weights at rest and rings.

    The budget is what a line grants to weights at rest, or what the largest model has with its
    ring, if that is more.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._handles: list[SharingHandle] = []  # the one that ran last stands last
        self._lock = threading.RLock()

    def join(self, handle: SharingHandle) -> None:
        """Take one more model in, which has nothing on the device yet."""
        self._handles.insert(0, handle)
        self.budget_bytes = max(self.budget_bytes, handle.plan.held_bytes)

    def leave(self, handle: SharingHandle) -> None:
        """Forget a model."""
        self._handles.remove(handle)

    def enter(self, handle: SharingHandle) -> None:
        """Give a model what its plan has on the device.

        The models that ran longest ago give way first, and no more than is needed.

        Raises:
            AllocationError: the device has no room, although they have given way.
            ExecutorError: one of them is in the midst of a pass.
        """
        with self._lock:
            if handle.is_awake:
                return
            others = [other for other in self._handles if other is not handle]
            if any(other.passes for other in others):
                raise ExecutorError(
                    "another model of this pipeline is in the midst of a pass, and has the memory",
                    hint="one pass at a time, or a line of its own for each: components={...}",
                )
            self._handles = [*others, handle]
            for other in others:
                other.sleep()
            held_bytes = sum(other.cached_bytes for other in others)
            excess_bytes = handle.plan.held_bytes + held_bytes - self.budget_bytes
            for other in others:
                if excess_bytes > 0:
                    excess_bytes -= other.give_up(excess_bytes)
            handle.wake()


class SharingHandle(Handle):
    """The distribution of a model that takes turns with others (`Turns`).

    It sleeps until it runs: its weights are with the donors, but for those on the device that
    nobody has needed the room of. ``moved_bytes`` counts what was brought there for its turns,
    ``passes`` the passes it is in.
    """

    turns: Turns
    passes = 0
    moved_bytes: int
    _homes: dict[str, Store]
    _cache: CachedTier
    _pins: Pins
    _before: Stats
    _close_stores: Callable[[], object]

    @property
    def is_awake(self) -> bool:
        """Whether it has its ring, and all that its plan has on the device."""
        return self._executor is not None

    @property
    def cached_bytes(self) -> int:
        """Bytes of its weights that are on the device."""
        return self._cache.nbytes

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights on the compute device now."""
        return super().weight_bytes if self.is_awake else self.cached_bytes

    def bind(self, request: Request, machine: Machine | None, progress: Progress | None) -> None:
        """Plan, and bring every weight to a donor; the model sleeps.

        Raises:
            AllocationError: the donors have no room for all of it.
        """
        plan = self.plan_as(request, machine)
        away = _all_away(plan)
        self._pins = pins_for(plan)
        self._align_source(plan)
        weights = {} if self._source else self._tree.weights
        self._homes = self._open_stores(away, self._pins, frozenset())
        self._close_stores = weakref.finalize(self, _close, self._homes)
        try:
            source = self._source or MemorySource(Originals(weights))
            fill(away, self._homes, source, kept=(), originals=weights, progress=progress)
        except BaseException:
            self._close_stores()
            raise
        homes = {placed.block.name: self._homes[placed.tier] for placed in away.placements}
        resident = [placed.block for placed in plan.placements if placed.kind == "resident"]
        here = [(block, homes[block.name]) for block in resident]
        self._cache = CachedTier(plan.compute, here, self._pins)
        self.plan, self._request, self._machine = plan, request, machine
        self._before, self.moved_bytes = Stats(), 0
        self._point_at_sleeper()
        self._companions.move(self._module, torch.device(plan.compute))
        self._announce()

    def wake(self) -> None:
        """Bring what is missing, and put the hooks on.

        Raises:
            AllocationError: the device has no room.
        """
        with torch.inference_mode(mode=False):
            self._wake()

    def _wake(self) -> None:
        self.moved_bytes += self._cache.bring()
        stores: dict[str, Store] = {**self._homes, self.plan.compute: self._cache}
        self._executor = Executor(self.plan, stores, self._pins, keep_stores=True)
        self._attachment = Attachment(
            self._module, self._tree, self._executor, steps_of=self._steps_of
        )

    def sleep(self) -> None:
        """Take the hooks off and free the ring; what is on the device stays."""
        if self._executor is None or self._attachment is None:
            return
        self._attachment.take_off()
        self._before = self._before + self._executor.stats()
        self._point_at_sleeper()
        self._executor.close()
        self._executor = self._attachment = None

    def give_up(self, nbytes: int) -> int:
        """Free so many bytes of the device, or all there are; return how many."""
        assert not self.is_awake, "what runs keeps what it has"
        return self._cache.give_up(nbytes)

    def stats(self) -> Stats:
        """Return the counters of all turns so far."""
        return self._before if self._executor is None else self._before + self._executor.stats()

    def rebudget(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse: what one gets, others have to give.

        Raises:
            ModelError: always.
        """
        raise ModelError(
            "this model shares its memory with the others of its pipeline",
            hint="the pipeline's handle: .remove(), then distorch.distribute(pipe, line)",
        )

    def _running(self) -> Executor:
        self.turns.enter(self)
        return super()._running()

    def _take_off(self, *, restore: bool) -> None:
        self.turns.enter(self)
        try:
            super()._take_off(restore=restore)
        finally:
            self.turns.leave(self)
            self._cache.close()
            self._close_stores()

    def _point_at_sleeper(self) -> None:
        """Let the module find weights that wake it, if something reads them past its forward."""
        sleeper: Any = _Sleeper(self)
        for name, runs in runs_of(self.plan).items():
            weight = self._tree.weights[name]
            form = weight.form.on(sleeper.device)
            resting = RestingWeight(sleeper, runs, weight.shape, form)
            for owner, attribute in weight.users:
                owner._parameters[attribute] = resting  # type: ignore[assignment]  # it is lazy


class _Sleeper:
    """Stands for the executor of a model that sleeps: whoever asks it for a weight wakes it."""

    def __init__(self, handle: SharingHandle) -> None:
        self._handle = handle
        self.device = torch.device(handle.plan.compute)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle._running(), name)  # noqa: SLF001  (it stands for it)


def _close(stores: Mapping[str, Store]) -> None:
    for store in stores.values():
        store.close()


def _all_away(plan: Plan) -> Plan:
    """The plan with every weight at a donor: what rests on the device too goes to the line's last.

    Raises:
        AllocationError: the line has no donor that takes what is left over.
    """
    entries = Allocation.parse(plan.allocation).entries
    home = next((entry.device for entry in entries if entry.rest), plan.compute)
    if home == plan.compute:
        raise AllocationError(
            f"{plan.allocation} has no donor for what a model gives up",
            hint=f"{plan.compute},2gb;{'disk' if plan.compute == 'cpu' else 'cpu'},*",
        )
    placements = tuple(
        placed if placed.kind == "streamed" else replace(placed, tier=home, kind="streamed")
        for placed in plan.placements
    )
    return replace(plan, placements=placements)
