"""A weight in the form it has on disk, that computes as the floating point it stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows
from torch import Tensor

from distorch.quant.block_formats import BlockFormat
from distorch.quant.choice import GPUS, few_rows
from distorch.quant.dequantize import dequantize, scratch
from distorch.quant.lazy import LazyWeight
from distorch.quant.scale import Scale

__all__ = ["QuantTensor"]

_TILE_ELEMENTS = 1 << 19  # 2 MiB of float32: decoded and multiplied before it leaves the cache
_TILE_ROW_MULTIPLE = 64
_DECODED = {torch.float32, torch.bfloat16, torch.float16}  # straight; others by way of float32
_MOVES = {torch.ops.aten.to, torch.ops.aten._to_copy}  # noqa: SLF001  (what torch calls it)


class QuantTensor(LazyWeight):
    """A packed weight: uint8 blocks that become floating point where they are used.

    ``packed`` holds the blocks as stored, row after row; ``shape`` and ``dtype`` are what the
    model computes with. ``F.linear`` decodes into a reused buffer and multiplies; ``F.embedding``
    decodes the rows it looks up and no others. Results are bit-identical to the same operation on
    ``gguf.quants.dequantize`` of the weight, times its ``scale`` if it has one, in float32, rounded
    once to ``dtype``.

    >>> from distorch.quant.block_formats import block_format
    >>> packed = torch.zeros(2, 34, dtype=torch.uint8); packed[:, 1] = 0x3C; packed[1, 2:] = 3
    >>> weight = QuantTensor(packed, block_format("Q8_0"), (2, 32), torch.float32)
    >>> F.linear(torch.ones(1, 32), weight)
    tensor([[ 0., 96.]])
    """

    # Plain attributes: torch answers .shape and .dtype of a subclass through Python, 3 us each.
    packed: Tensor
    form: type[BlockFormat]
    scale: Scale | None
    rows: int
    columns: int
    row_bytes: int
    compute_dtype: torch.dtype
    decoded_dtype: torch.dtype  # a scale multiplies float32

    def __new__(
        cls,
        packed: Tensor,
        form: type[BlockFormat],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        scale: Scale | None = None,
    ) -> Self:
        """Wrap ``packed`` without copying it."""
        self = LazyWeight.__new__(cls, shape, dtype, packed.device)
        self.packed, self.form, self.compute_dtype = packed.view(-1), form, dtype
        self.scale = scale
        self.decoded_dtype = dtype if scale is None and dtype in _DECODED else torch.float32
        self.columns = shape[-1] if shape else 1
        self.is_matrix = self.is_matrix and self.columns % form.elements == 0  # rows of blocks
        self.row_bytes = self.columns // form.elements * form.nbytes
        self.rows = packed.numel() // self.row_bytes if self.row_bytes else 0
        return self

    def __copy__(self) -> QuantTensor:
        """Another wrapper of the same bytes."""
        return QuantTensor(
            self.packed, self.form, tuple(self.shape), self.compute_dtype, self.scale
        )

    def on(self, device: torch.device | str, *, non_blocking: bool = False) -> QuantTensor:
        """Return the same weight in the memory of ``device``, packed."""
        packed = self.packed.to(device, non_blocking=non_blocking)
        scale = self.scale and self.scale.on(device, non_blocking=non_blocking)
        return QuantTensor(packed, self.form, tuple(self.shape), self.compute_dtype, scale)

    @property
    def nbytes(self) -> int:  # type: ignore[override]  # torch's too cannot be set
        """Bytes of memory that the weight takes, as stored."""
        return self.packed.numel()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub is not its documentation
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Keep the weight packed on its way to another device; decode it for all else."""
        if func.overloadpacket in _MOVES and isinstance(args[0], QuantTensor):
            names = (argument.name for argument in func._schema.arguments)  # noqa: SLF001  (no other way)
            given = dict(zip(names, args, strict=False)) | dict(kwargs or {})
            weight, device = args[0], given.get("device")
            if device is not None and given.get("dtype") in {None, weight.compute_dtype}:
                return weight.on(device, non_blocking=bool(given.get("non_blocking")))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        """Say what the weight is made of, by which ``module.to`` knows how to replace it."""
        return ["packed"], (self.form, tuple(self.shape), self.compute_dtype, self.scale)

    @staticmethod
    def __tensor_unflatten__(
        parts: Mapping[str, Tensor], made_of: tuple[Any, ...], *_: Any
    ) -> QuantTensor:
        """Make the weight again."""
        return QuantTensor(parts["packed"], *made_of)

    def decoded(self) -> Tensor:
        """Return the whole weight in float32, where possible in the thread's scratch.

        It may be written to, and is to be used at once: the next weight takes its place.
        """
        if self.packed.device.type == "cpu":
            out = scratch(self.numel())
        else:
            out = torch.empty(self.numel(), dtype=torch.float32, device=self.packed.device)
        return self._scaled(dequantize(self.packed, self.form, out)).view(self.shape)

    def materialize(self) -> Tensor:
        """Return the whole weight, decoded into memory of its own."""
        out = torch.empty(self.shape, dtype=self.decoded_dtype, device=self.packed.device)
        return self._scaled(dequantize(self.packed, self.form, out)).to(self.compute_dtype)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Decode and multiply; a single row of ``x`` does so tile by tile, in the CPU's cache.

        On a GPU one kernel may do both for few rows, where it is asked for (``choice.py``).

        A matrix-vector product computes each output on its own, so tiles do not change a bit, as
        long as every thread gets whole groups of rows: the rows left over are added in another
        order. A matrix-matrix product may do so for any number of rows, and gets the weight whole.
        """
        device_type = self.packed.device.type
        tracked = torch.is_grad_enabled() and x.requires_grad
        plain = self.scale is None and x.dtype == self.compute_dtype and not tracked
        if device_type in GPUS and plain and not isinstance(bias, LazyWeight):
            y = few_rows(x, self.packed, self.form, bias)
            if y is not None:
                return y
        is_vector = x.numel() == self.columns and bias is None and device_type == "cpu"
        unit = _TILE_ROW_MULTIPLE * torch.get_num_threads()
        tile = _TILE_ELEMENTS // self.columns // unit * unit
        if is_vector and not tracked and 0 < tile < self.rows and self.rows % unit == 0:
            return self._by_tiles(x, tile)
        return F.linear(x, self._decoded(0, self.rows), bias)

    def embedding(self, ids: Tensor) -> Tensor:
        """Decode the rows that ``ids`` names."""
        wanted = ids.reshape(-1)
        packed = self.packed.view(self.rows, self.row_bytes).index_select(0, wanted)
        out = torch.empty(len(wanted), self.columns, dtype=self.decoded_dtype, device=packed.device)
        found = self._scaled(dequantize(packed, self.form, out), wanted)
        return found.to(self.compute_dtype).view(*ids.shape, self.columns)

    def _by_tiles(self, x: Tensor, tile: int) -> Tensor:
        out = x.new_empty(*x.shape[:-1], self.rows)
        row = x.reshape(1, self.columns)
        for number, piece in enumerate(out.view(1, self.rows).split(tile, dim=1)):
            first = number * tile
            weight = self._decoded(first, first + piece.shape[1])
            torch.mm(row, weight.t(), out=piece)
        return out

    def _decoded(self, first: int, last: int) -> Tensor:
        """Rows ``first`` to ``last``, where possible in the thread's scratch: use them at once."""
        packed = self.packed[first * self.row_bytes : last * self.row_bytes]
        elements = (last - first) * self.columns
        if packed.device.type == "cpu":
            out = scratch(elements, self.decoded_dtype)
        else:
            out = torch.empty(elements, dtype=self.decoded_dtype, device=packed.device)
        weight = dequantize(packed, self.form, out).view(last - first, self.columns)
        weight = self._scaled(weight, slice(first, last))
        return weight.to(self.compute_dtype)

    def _scaled(self, decoded: Tensor, rows: slice | Tensor | None = None) -> Tensor:
        """Multiply what was decoded, the whole weight or some of its rows, by the scale."""
        if self.scale is not None and decoded.numel():
            scale = self.scale if rows is None else self.scale.rows(rows)
            height = len(decoded) if rows is not None else self.shape[0] if self.shape else 1
            scale.multiply(decoded.view(height, -1))
        return decoded
