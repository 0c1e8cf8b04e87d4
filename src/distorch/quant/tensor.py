"""A weight in the form it has on disk, that computes as the floating point it stands for."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows
from torch import Tensor

from distorch.quant.block_formats import BlockFormat
from distorch.quant.dequantize import dequantize, scratch
from distorch.quant.lazy import LazyWeight

__all__ = ["QuantTensor"]

_TILE_ELEMENTS = 1 << 20  # 4 MiB of float32: decoded and multiplied before it leaves the cache
_TILE_ROW_MULTIPLE = 64


class QuantTensor(LazyWeight):
    """A packed weight: uint8 blocks that become floating point where they are used.

    ``packed`` holds the blocks as stored, row after row; ``shape`` and ``dtype`` are what the
    model computes with. ``F.linear`` decodes into a reused buffer and multiplies; ``F.embedding``
    decodes the rows it looks up and no others. Results are bit-identical to the same operation on
    ``gguf.quants.dequantize`` of the weight.

    >>> from distorch.quant.block_formats import block_format
    >>> packed = torch.zeros(2, 34, dtype=torch.uint8); packed[:, 1] = 0x3C; packed[1, 2:] = 3
    >>> weight = QuantTensor(packed, block_format("Q8_0"), (2, 32), torch.float32)
    >>> F.linear(torch.ones(1, 32), weight)
    tensor([[ 0., 96.]])
    """

    packed: Tensor
    form: type[BlockFormat]

    def __new__(
        cls, packed: Tensor, form: type[BlockFormat], shape: tuple[int, ...], dtype: torch.dtype
    ) -> QuantTensor:
        """Wrap ``packed`` without copying it."""
        self = LazyWeight.__new__(cls, shape, dtype, packed.device)
        self.packed, self.form = packed, form
        return self

    def __copy__(self) -> QuantTensor:
        """Another wrapper of the same bytes."""
        return QuantTensor(self.packed, self.form, tuple(self.shape), self.dtype)

    def materialize(self) -> Tensor:
        """Return the whole weight, decoded into memory of its own."""
        out = torch.empty(self.shape, dtype=torch.float32, device=self.device)
        return dequantize(self.packed.view(-1), self.form, out).to(self.dtype)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Decode and multiply; a single row of ``x`` does so tile by tile, in the cache.

        A matrix-vector product computes each output on its own, so tiles do not change a bit; a
        matrix-matrix product may add in another order for another number of rows, so it gets the
        weight whole.
        """
        rows, columns = self.shape
        tile = rows
        if x.numel() == columns and self.device.type == "cpu":
            tile = _TILE_ELEMENTS // columns // _TILE_ROW_MULTIPLE * _TILE_ROW_MULTIPLE
        if not 0 < tile < rows:
            return F.linear(x, self._decoded(0, rows), bias)
        out = x.new_empty(*x.shape[:-1], rows)
        for first in range(0, rows, tile):
            last = min(first + tile, rows)
            part = None if bias is None else bias[first:last]
            out[..., first:last] = F.linear(x, self._decoded(first, last), part)
        return out

    def embedding(self, ids: Tensor) -> Tensor:
        """Decode the rows that ``ids`` names."""
        columns = self.shape[-1]
        packed = self.packed.view(self.shape[0], -1).index_select(0, ids.reshape(-1))
        out = torch.empty(*ids.shape, columns, dtype=torch.float32, device=self.device)
        return dequantize(packed.view(-1), self.form, out).to(self.dtype)

    def _decoded(self, first: int, last: int) -> Tensor:
        """Rows ``first`` to ``last`` in the thread's scratch: valid until the next decoding."""
        columns = self.shape[-1]
        row_bytes = columns // self.form.elements * self.form.nbytes
        packed = self.packed.view(-1)[first * row_bytes : last * row_bytes]
        out = scratch((last - first) * columns) if packed.device.type == "cpu" else None
        if out is None:
            out = torch.empty((last - first) * columns, dtype=torch.float32, device=packed.device)
        return dequantize(packed, self.form, out).view(last - first, columns).to(self.dtype)

    def __reduce_ex__(self, _protocol: Any) -> Any:
        """Packed weights are not pickled: the checkpoint is where they are kept."""
        raise TypeError("a QuantTensor cannot be pickled; save the checkpoint it came from")
