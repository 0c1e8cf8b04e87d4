"""Two schemes of others in plain torch: copy at use, and one block ahead.

They are as good as their scheme can be: pinned memory, one flat copy a block, buffers that are
allocated once, no work for the processor that the scheme does not ask for. Whatever the scheme,
small weights (norms, biases) stay on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gpu.contenders import Job, Running
from gpu.model import Span

_SMALL_BYTES = 16 << 10


def _is_small(span: Span) -> bool:
    """Whether a weight stays on the device whatever the scheme: a norm, a bias."""
    return len(span.part.shape) < 2 or span.part.nbytes <= _SMALL_BYTES


class _Weights:
    """Which weights of a module stay on the device, and how the others are pointed at."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.module = job.model.empty()
        self._tree = job.model.tree(self.module)
        self.resident_bytes = 0

    def names_of(self, wanted: Callable[[str], bool]) -> list[str]:
        """Names of large weights, in the model's order."""
        return [
            name
            for name, span in self.job.model.spans.items()
            if not _is_small(span) and wanted(name)
        ]

    def nbytes(self, names: Collection[str]) -> int:
        return sum(self.job.model.spans[name].part.nbytes for name in names)

    def point(self, name: str, tensor: Tensor) -> None:
        for owner, attribute in self._tree.weights[name].users:
            owner._parameters[attribute] = tensor  # type: ignore[assignment]  # may be lazy

    def keep(self, names: Collection[str]) -> None:
        """Bring some weights, and all small ones, to the device for good."""
        model = self.job.model
        for name, span in model.spans.items():
            if name in names or _is_small(span):
                self.point(name, model.weight(name, model.raw(name).to(self.job.device.torch)))
                self.resident_bytes += span.part.nbytes

    def within(self, names: Collection[str], budget: int) -> list[str]:
        """The first of ``names`` that a budget holds."""
        kept = []
        for name in names:
            budget -= self.nbytes([name])
            if budget < 0:
                break
            kept.append(name)
        return kept


@contextmanager
def copy_at_use(job: Job) -> Iterator[Running]:
    """The original's scheme: a layer's weights are copied when it runs, and freed after.

    On the stream that computes, so nothing has to wait for them but the layer itself. What there
    is room for stays on the device.
    """
    weights = _Weights(job)
    model, device = job.model, job.device.torch
    looked_up = {p.tensor for block in model.blocks if block.looked_up for p in block.parts}
    names = sorted(weights.names_of(lambda _: True), key=lambda name: name not in looked_up)
    largest = max(weights.nbytes([name]) for name in names)
    kept = weights.within(names, job.room_bytes - 2 * largest)
    weights.keep(kept)
    nothing = torch.empty(0, device=device)
    modules = dict(weights.module.named_modules())
    streamed = [name for name in names if name not in kept]
    for name in streamed:

        def before(_module: nn.Module, _args: Any, name: str = name) -> None:
            raw = torch.empty_like(model.raw(name), device=device)
            raw.copy_(model.raw(name), non_blocking=True)
            weights.point(name, model.weight(name, raw))

        def after(_module: nn.Module, _args: Any, _output: Any, name: str = name) -> None:
            weights.point(name, nothing)

        owner = modules[name.rpartition(".")[0]]
        owner.register_forward_pre_hook(before)
        owner.register_forward_hook(after)
    yield Running(
        module=weights.module,
        streamed_bytes=weights.nbytes(streamed),
        figures={"resident_bytes": weights.resident_bytes},
    )


@contextmanager
def one_ahead(job: Job, *, prefix: bool = False) -> Iterator[Running]:
    """Group offload's scheme: while a block computes the next one is copied; the host waits.

    With ``prefix`` the first blocks stay, as many as there is room for; without, none does. Two
    buffers take turns, each block is one flat copy, and the last block's turn fetches the first.
    """
    weights = _Weights(job)
    model = job.model
    names = [group for group in model.groups if group]
    size = max(len(model.groups[group]) for group in names)
    outside = weights.names_of(lambda name: not model.group_of(name))
    budget = job.room_bytes - 2 * size - weights.nbytes(outside)
    kept: list[str] = []
    for group in names if prefix else ():
        budget -= len(model.groups[group])
        if budget < 0:
            break
        kept.append(group)
    weights.keep({*outside, *weights.names_of(lambda name: model.group_of(name) in kept)})
    streamed = [group for group in names if group not in kept]
    ahead = _Ahead(weights, streamed, size)
    modules = dict(weights.module.named_modules())
    for number, group in enumerate(streamed):
        modules[group].register_forward_pre_hook(partial(ahead.enter, number))
    yield Running(
        module=weights.module,
        streamed_bytes=sum(len(model.groups[group]) for group in streamed),
        figures={"resident_bytes": weights.resident_bytes},
    )


class _Ahead:
    """Two buffers on the device, and a stream on which blocks come into them in turn."""

    def __init__(self, weights: _Weights, groups: list[str], size: int) -> None:
        self._weights, self._groups = weights, groups
        self._device = weights.job.device
        self._stream = self._device.stream()
        count = 2 if groups else 0
        self._buffers = [
            torch.empty(size, dtype=torch.uint8, device=self._device.torch) for _ in range(count)
        ]
        self._turn = 0
        self._coming: int | None = None
        self._views: dict[tuple[int, int], list[tuple[str, Tensor]]] = {}

    def enter(self, number: int, _module: nn.Module, _args: Any) -> None:
        """Wait for the block that is about to compute, then send for the next."""
        if self._coming != number:
            self._fetch(number)
        self._stream.synchronize()
        for name, tensor in self._of(number, self._turn):
            self._weights.point(name, tensor)
        self._device.current_stream().synchronize()  # the block before is done with its buffer
        self._turn = 1 - self._turn
        self._fetch((number + 1) % len(self._groups))

    def _fetch(self, number: int) -> None:
        memory = self._weights.job.model.groups[self._groups[number]]
        with self._device.on(self._stream):
            self._buffers[self._turn][: len(memory)].copy_(memory, non_blocking=True)
        self._coming = number

    def _of(self, number: int, turn: int) -> list[tuple[str, Tensor]]:
        """The weights of a block as views of a buffer; made once for each of the two."""
        if (number, turn) not in self._views:
            model, group = self._weights.job.model, self._groups[number]
            self._views[number, turn] = [
                (name, model.weight(name, self._buffers[turn][at : at + span.part.nbytes]))
                for name, span in model.spans.items()
                if span.group == group and not _is_small(span)
                for at in (span.offset,)
            ]
        return self._views[number, turn]
