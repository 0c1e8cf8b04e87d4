"""The hooks around one module: its block is there while its forward runs."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from distorch.integrations.resting import Form
from distorch.quant.lazy import LazyWeight
from distorch.run.executor import Executor, Lease

__all__ = ["Bracket", "Place", "mark_steps"]


@dataclass(frozen=True, slots=True)
class Place:
    """One part of a block and where modules look for it: ``(parameters, attribute)`` pairs."""

    users: tuple[tuple[dict[str, Any], str], ...]
    resting: Tensor
    shape: tuple[int, ...]
    form: Form

    def point(self, tensor: Tensor) -> None:
        """Let every user find ``tensor``."""
        for parameters, attribute in self.users:
            parameters[attribute] = tensor


class Bracket:
    """Points a module at its block's slot before its forward, and away from it after."""

    def __init__(self, executor: Executor, index: int, places: Sequence[Place]) -> None:
        self._executor = executor
        self._index = index
        self._places = tuple(places)
        self._views: dict[int, list[Tensor]] = {}
        self._lease: Lease | None = None
        self._depth = 0

    def attach(self, module: nn.Module) -> list[RemovableHandle]:
        """Put the hooks on; the one after runs even when forward raises."""
        return [
            module.register_forward_pre_hook(self._enter, prepend=True),
            module.register_forward_hook(self._leave, always_call=True),
        ]

    def reset(self) -> None:
        """Give back a lease that an interrupted pass has left behind."""
        if self._lease is not None:
            self._depth = 1
            self._point_away()

    def _enter(self, _module: nn.Module, _args: Any) -> None:
        if self._depth == 0:
            self._lease = self._executor.acquire(self._index)
            for place, tensor in zip(self._places, self._tensors(self._lease), strict=True):
                place.point(tensor)
        self._depth += 1

    def _leave(self, _module: nn.Module, _args: Any, output: Any = None) -> Any:
        if self._lease is None:  # acquire raised: there is nothing to give back
            return None
        kept = self._detached(output) if self._depth == 1 else None
        self._point_away()
        return kept

    def _point_away(self) -> None:
        self._depth -= 1
        if self._depth == 0 and self._lease is not None:
            for place in self._places:
                place.point(place.resting)
            lease, self._lease = self._lease, None
            self._executor.release(lease)

    def _tensors(self, lease: Lease) -> list[Tensor]:
        """The block's weights as views of its bytes; made once for each place these can be in."""
        views = None if lease.where is None else self._views.get(lease.where)
        if views is None:
            with torch.inference_mode(mode=False):
                views = [
                    place.form.weight(lease.part(index), place.shape)
                    for index, place in enumerate(self._places)
                ]
            if lease.where is not None and all(place.form.lasts for place in self._places):
                self._views[lease.where] = views
        return views

    def _detached(self, output: Any) -> Any:
        """Copy what the module returns of its own weights: the slot is about to change."""
        ring = self._executor.ring.untyped_storage().data_ptr()
        changed = False

        def own(tensor: Tensor) -> Tensor:
            nonlocal changed
            memory = getattr(tensor, "packed", None) if isinstance(tensor, LazyWeight) else tensor
            if memory is None or memory.layout != torch.strided:
                return tensor
            if memory.untyped_storage().data_ptr() != ring:
                return tensor
            changed = True
            return tensor.materialize() if isinstance(tensor, LazyWeight) else tensor.clone()

        result = own(output) if type(output) is Tensor else tree_map_only(Tensor, own, output)
        return result if changed else None


class _Turn:
    """A lock that its thread may take again: an interrupt can have kept it from giving it back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None

    def take(self) -> None:
        if self._owner != threading.get_ident():
            self._lock.acquire()
            self._owner = threading.get_ident()

    def give_back(self) -> None:
        if self._owner == threading.get_ident():
            self._owner = None
            self._lock.release()


def mark_steps(
    module: nn.Module, executor: Executor, brackets: Sequence[Bracket]
) -> list[RemovableHandle]:
    """Tell the executor when a pass of the whole module begins and ends.

    Passes of several threads take turns: there is one ring, and one place for each weight.
    """
    turn = _Turn()

    def begin(_module: nn.Module, _args: Any) -> None:
        turn.take()
        for bracket in brackets:
            bracket.reset()
        executor.begin_step()

    def end(_module: nn.Module, _args: Any, _output: Any) -> None:
        executor.end_step(complete=True)

    def abandon(_module: nn.Module, _args: Any, _output: Any = None) -> None:
        executor.end_step(complete=False)  # does nothing after a complete one
        turn.give_back()

    return [
        module.register_forward_pre_hook(begin, prepend=True),
        module.register_forward_hook(end),
        module.register_forward_hook(abandon, always_call=True),
    ]
