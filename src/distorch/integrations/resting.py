"""A weight that rests somewhere else, as the model sees it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows
from torch import Tensor

from distorch.plan.blocks import Part
from distorch.quant.block_formats import block_format
from distorch.quant.lazy import LazyWeight
from distorch.quant.tensor import QuantTensor
from distorch.run.executor import Executor, Lease
from distorch.tiers.accelerator import reserve
from distorch.tiers.memory import allocate

__all__ = ["TORCH_DTYPES", "RestingWeight", "Run", "as_weight"]

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


def as_weight(raw: Tensor, part: Part, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """View a part's bytes as the weight a model computes with: dense, or packed and lazy."""
    if TORCH_DTYPES.get(part.dtype) == dtype:
        return raw.view(dtype).view(tuple(shape))
    return QuantTensor(raw, block_format(part.dtype), tuple(shape), dtype)


@dataclass(frozen=True, slots=True)
class Run:
    """Where some rows of a weight are: block ``block``, its part ``index``."""

    block: int
    index: int
    part: Part


class RestingWeight(LazyWeight):
    """A weight whose rows rest in one or more blocks, brought when an operation needs them.

    A linear layer multiplies run by run; an embedding reads the rows it looks up and no others;
    anything else reads the whole weight for that one use.
    """

    executor: Executor
    runs: tuple[Run, ...]
    _views: dict[tuple[int, int], Tensor]

    def __new__(
        cls, executor: Executor, runs: Sequence[Run], shape: Sequence[int], dtype: torch.dtype
    ) -> Self:
        """Wrap the runs of one weight, in the order of their rows."""
        self = LazyWeight.__new__(cls, shape, dtype, executor.device)
        self.executor, self.runs = executor, tuple(runs)
        self._views = {}
        return self

    def __copy__(self) -> RestingWeight:
        """Another wrapper of the same weight."""
        return RestingWeight(self.executor, self.runs, self.shape, self.dtype)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply by each run as it arrives."""
        if len(self.runs) == 1:
            with self._leased(self.runs[0]) as weight:
                return F.linear(x, weight, bias)
        out = x.new_empty(*x.shape[:-1], self.shape[0])
        for run in self.runs:
            rows = slice(run.part.first_row, run.part.first_row + run.part.shape[0])
            with self._leased(run) as weight:
                out[..., rows] = F.linear(x, weight, None if bias is None else bias[rows])
        return out

    def embedding(self, ids: Tensor) -> Tensor:
        """Read the distinct rows that ``ids`` names, then look up among them."""
        device = self.executor.device
        if not ids.numel():
            return torch.empty(*ids.shape, self.shape[-1], dtype=self.dtype, device=device)
        distinct, place = torch.unique(ids, return_inverse=True)
        distinct = distinct.cpu()
        if int(distinct[0]) < 0 or int(distinct[-1]) >= self.shape[0]:
            raise IndexError(f"index out of range: the embedding has {self.shape[0]} rows")
        part = self.runs[0].part
        raw = allocate(len(distinct) * (part.nbytes // part.shape[0])).view(len(distinct), -1)
        for run in self.runs:
            first, last = run.part.first_row, run.part.first_row + run.part.shape[0]
            inside = ((distinct >= first) & (distinct < last)).nonzero().flatten()
            if len(inside):
                begin, end = int(inside[0]), int(inside[-1]) + 1  # distinct rows are sorted
                wanted = (distinct[begin:end] - first).tolist()
                self.executor.read_rows(run.block, wanted, raw[begin:end])
        few = Part(
            tensor=part.tensor,
            dtype=part.dtype,
            shape=(len(distinct), *part.shape[1:]),
            nbytes=raw.numel(),
        )
        rows = raw.view(-1).to(device)
        return F.embedding(place, as_weight(rows, few, few.shape, self.dtype))

    def materialize(self) -> Tensor:
        """Read the whole weight into memory of its own, dense."""
        whole = self.whole(self.executor.device)
        return whole.materialize() if isinstance(whole, LazyWeight) else whole

    def whole(self, device: torch.device) -> Tensor:
        """Read the whole weight into memory of its own on ``device``, as stored."""
        raw, first = self.raw(device), self.runs[0].part
        part = Part(
            tensor=first.tensor, dtype=first.dtype, shape=tuple(self.shape), nbytes=raw.numel()
        )
        return as_weight(raw, part, self.shape, self.dtype)

    def raw(self, device: torch.device) -> Tensor:
        """Read the weight's bytes into memory of their own on ``device``.

        What goes to the host does not pass through the device that computes.
        """
        raw = reserve(device, sum(run.part.nbytes for run in self.runs))
        past_ring = device.type == "cpu" != self.executor.device.type
        bring = self.executor.read if past_ring else self.executor.acquire
        filled = 0
        for run in self.runs:
            lease = bring(run.block)
            raw[filled : filled + run.part.nbytes] = lease.part(run.index)
            self.executor.release(lease)
            filled += run.part.nbytes
        return raw

    @contextmanager
    def _leased(self, run: Run) -> Iterator[Tensor]:
        lease: Lease = self.executor.acquire(run.block)
        try:
            yield self._view(lease, run)
        finally:
            self.executor.release(lease)

    def _view(self, lease: Lease, run: Run) -> Tensor:
        """The rows of one run where the lease has them; made once for each such place."""
        view = None if lease.where is None else self._views.get((run.block, lease.where))
        if view is None:
            shape = run.part.shape if len(self.runs) > 1 else self.shape
            with torch.inference_mode(mode=False):
                view = as_weight(lease.part(run.index), run.part, shape, self.dtype)
            if lease.where is not None:
                self._views[run.block, lease.where] = view
        return view
