"""A weight that rests somewhere else, as the model sees it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows
from torch import Tensor

from distorch.plan.blocks import Part
from distorch.quant.block_formats import block_format
from distorch.quant.lazy import LazyWeight
from distorch.quant.scale import Scale
from distorch.quant.tensor import QuantTensor
from distorch.run.executor import Executor, Lease
from distorch.tiers.accelerator import reserve
from distorch.tiers.memory import allocate

__all__ = ["TORCH_DTYPES", "Form", "Packed", "RestingWeight", "Run"]

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


class Form(Protocol):
    """What a weight is made of: how flat bytes become the tensor that a model computes with."""

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes with."""

    @property
    def nbytes(self) -> int:
        """Bytes that it keeps of its own on the compute device, beside the weight's."""

    @property
    def lasts(self) -> bool:
        """Whether what `weight` returns may be used again, for other bytes at the same place."""

    def weight(
        self, raw: Tensor, shape: Sequence[int], rows: slice | Tensor | None = None
    ) -> Tensor:
        """View the bytes of a weight, or of those of its rows that are named, as a tensor."""

    def on(self, device: torch.device) -> Form:
        """Return the same with what it keeps of its own, such as a scale, on ``device``."""


@dataclass(frozen=True, slots=True)
class Packed:
    """Bytes of the dtype ``stored``, which may be a block format, and perhaps their scale.

    Those that are stored as the model computes are used as they are; all others are decoded where
    they are used.
    """

    stored: str
    dtype: torch.dtype
    scale: Scale | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the scale."""
        return 0 if self.scale is None else self.scale.nbytes

    @property
    def lasts(self) -> bool:
        """It is a view."""
        return True

    def weight(
        self, raw: Tensor, shape: Sequence[int], rows: slice | Tensor | None = None
    ) -> Tensor:
        """View bytes as a dense tensor, or as a packed and lazy one."""
        if self.scale is None and TORCH_DTYPES.get(self.stored) == self.dtype:
            return raw.view(self.dtype).view(tuple(shape))
        scale = self.scale if self.scale is None or rows is None else self.scale.rows(rows)
        return QuantTensor(raw, block_format(self.stored), tuple(shape), self.dtype, scale)

    def on(self, device: torch.device) -> Packed:
        """Return the same with its scale on ``device``."""
        return self if self.scale is None else replace(self, scale=self.scale.on(device))


@dataclass(frozen=True, slots=True)
class Run:
    """Where some rows of a weight are: block ``block``, its part ``index``."""

    block: int
    index: int
    part: Part

    @property
    def rows(self) -> slice:
        """The rows of the weight that are there."""
        first = self.part.first_row
        return slice(first, first + (self.part.shape[0] if self.part.shape else 1))


class RestingWeight(LazyWeight):
    """A weight whose rows rest in one or more blocks, brought when an operation needs them.

    A linear layer multiplies run by run; an embedding reads the rows it looks up and no others;
    anything else reads the whole weight for that one use.
    """

    executor: Executor
    runs: tuple[Run, ...]
    form: Form
    _views: dict[tuple[int, int], Tensor]

    def __new__(
        cls, executor: Executor, runs: Sequence[Run], shape: Sequence[int], form: Form
    ) -> Self:
        """Wrap the runs of one weight, in the order of their rows."""
        self = LazyWeight.__new__(cls, shape, form.dtype, executor.device)
        self.executor, self.runs, self.form = executor, tuple(runs), form
        self._views = {}
        return self

    def __copy__(self) -> RestingWeight:
        """Another wrapper of the same weight."""
        return RestingWeight(self.executor, self.runs, self.shape, self.form)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply by each run as it arrives."""
        if len(self.runs) == 1:
            with self._leased(self.runs[0]) as weight:
                return F.linear(x, weight, bias)
        out = x.new_empty(*x.shape[:-1], self.shape[0])
        for run in self.runs:
            with self._leased(run) as weight:
                part = None if bias is None else bias[run.rows]
                out[..., run.rows] = F.linear(x, weight, part)
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
            first, last = run.rows.start, run.rows.stop
            inside = ((distinct >= first) & (distinct < last)).nonzero().flatten()
            if len(inside):
                begin, end = int(inside[0]), int(inside[-1]) + 1  # distinct rows are sorted
                wanted = (distinct[begin:end] - first).tolist()
                self.executor.read_rows(run.block, wanted, raw[begin:end])
        few = (len(distinct), *part.shape[1:])
        rows = self.form.weight(raw.view(-1).to(device), few, distinct)
        return F.embedding(place, rows)

    def materialize(self) -> Tensor:
        """Read the whole weight into memory of its own, dense."""
        whole = self.whole(self.executor.device)
        return whole.materialize() if isinstance(whole, LazyWeight) else whole

    def whole(self, device: torch.device) -> Tensor:
        """Read the whole weight into memory of its own on ``device``, as stored."""
        return self.form.on(device).weight(self.raw(device), self.shape)

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
            shape, rows = (run.part.shape, run.rows) if len(self.runs) > 1 else (self.shape, None)
            with torch.inference_mode(mode=False):
                view = self.form.weight(lease.part(run.index), shape, rows)
            if lease.where is not None and self.form.lasts:
                self._views[run.block, lease.where] = view
        return view
