"""Triton kernels: packed blocks to floating point on a GPU, and their product with few rows.

Imported only where a GPU computes. A format is one function that says what element ``i`` of group
``g`` of a block is; a block's groups share a scale, and a group's elements lie side by side. Both
kernels call it: ``decode`` writes what it says, ``linear`` multiplies it before it leaves the chip.
Layouts and the order of operations are those of ``block_formats``. Kernels are compiled without
joining a product and a sum into one operation, since that would leave out a rounding.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from distorch.quant.block_formats import BlockFormat

__all__ = ["FORMATS", "MAX_ROWS", "decode", "linear"]

MAX_ROWS: Final = 16  # of the input of a product: what one tensor-core instruction takes
_STEP = 256  # weights of a row at a time: a K block, or as many smaller ones
_DECODE_TILE = 16  # times a step, decoded by one program: 4,096 weights for 128 threads
_LINEAR_TILE = 16  # rows of a weight for one program
_LAUNCH: Final = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _half(at: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Read a float16 scale; a block begins at an even address."""
    return tl.load(at.to(tl.pointer_type(tl.float16)), mask, other=0.0).to(tl.float32)


@triton.jit
def _byte(at: tl.tensor, mask: tl.tensor) -> tl.tensor:
    return tl.load(at, mask, other=0).to(tl.int32)


@triton.jit
def _signed(byte: tl.tensor) -> tl.tensor:
    return byte.to(tl.int8, bitcast=True).to(tl.float32)


@triton.jit
def _q4_0(at: tl.tensor, g: tl.tensor, i: tl.tensor, mask: tl.tensor) -> tl.tensor:
    q = (_byte(at + 2 + i, mask) >> 4 * g & 15) - 8
    return q.to(tl.float32) * _half(at, mask)


@triton.jit
def _q8_0(at: tl.tensor, g: tl.tensor, i: tl.tensor, mask: tl.tensor) -> tl.tensor:  # noqa: ARG001  the one group is the block
    return _signed(tl.load(at + 2 + i, mask, other=0)) * _half(at, mask)


@triton.jit
def _scale_and_minimum(at: tl.tensor, g: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Read a group's in Q4_K and Q5_K: 6 bits each, those of the last four groups in pieces."""
    one, other = _byte(at + 4 + g % 4, mask), _byte(at + 8 + g % 4, mask)
    rest = _byte(at + 12 + g % 4, mask)
    scale = tl.where(g < 4, one & 63, (rest & 15) | (one >> 6 << 4))
    minimum = tl.where(g < 4, other & 63, (rest >> 4) | (other >> 6 << 4))
    return _half(at, mask) * scale.to(tl.float32), _half(at + 2, mask) * minimum.to(tl.float32)


@triton.jit
def _q4_k(at: tl.tensor, g: tl.tensor, i: tl.tensor, mask: tl.tensor) -> tl.tensor:
    scale, minimum = _scale_and_minimum(at, g, mask)
    q = _byte(at + 16 + 32 * (g // 2) + i, mask) >> 4 * (g % 2) & 15
    return scale * q.to(tl.float32) - minimum


@triton.jit
def _q5_k(at: tl.tensor, g: tl.tensor, i: tl.tensor, mask: tl.tensor) -> tl.tensor:
    scale, minimum = _scale_and_minimum(at, g, mask)
    low = _byte(at + 48 + 32 * (g // 2) + i, mask) >> 4 * (g % 2) & 15
    q = low | (_byte(at + 16 + i, mask) >> g & 1) << 4
    return scale * q.to(tl.float32) - minimum


@triton.jit
def _q6_k(at: tl.tensor, g: tl.tensor, i: tl.tensor, mask: tl.tensor) -> tl.tensor:
    side, quarter, column = g // 8, g % 8 // 2, 16 * (g % 2) + i
    low = _byte(at + 64 * side + 32 * (quarter % 2) + column, mask) >> 4 * (quarter // 2) & 15
    high = _byte(at + 128 + 32 * side + column, mask) >> 2 * quarter & 3
    scale = _half(at + 208, mask) * _signed(tl.load(at + 192 + g, mask, other=0))
    return scale * ((low | high << 4) - 32).to(tl.float32)


@triton.jit
def _f8_e4m3(at: tl.tensor, g: tl.tensor, i: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """A float16 of the same bits is 2**8 times smaller, the denormal ones too."""
    byte = _byte(at + g + i, mask)
    half = ((byte & 128) << 8 | (byte & 127) << 7).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.where((byte & 127) == 127, float("nan"), half.to(tl.float32) * 256.0)


@triton.jit
def _f8_e5m2(at: tl.tensor, g: tl.tensor, i: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """The upper half of a float16."""
    half = (_byte(at + g + i, mask) << 8).to(tl.int16).to(tl.float16, bitcast=True)
    return half.to(tl.float32)


# The function of each format, and the groups in a block.
FORMATS: Final[dict[str, tuple[Any, int]]] = {
    "Q4_0": (_q4_0, 2),
    "Q8_0": (_q8_0, 1),
    "Q4_K": (_q4_k, 8),
    "Q5_K": (_q5_k, 8),
    "Q6_K": (_q6_k, 16),
    "F8_E4M3": (_f8_e4m3, 1),
    "F8_E5M2": (_f8_e5m2, 1),
}


@triton.jit
def _values(
    packed: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    value_of: tl.constexpr,
    nbytes: tl.constexpr,
    groups: tl.constexpr,
    size: tl.constexpr,
    blocks: tl.constexpr,
) -> tl.tensor:
    """Decode ``blocks`` blocks from each of ``first`` on, a row each; zero from ``last`` on."""
    g = tl.arange(0, blocks * groups)[None, :, None]
    i = tl.arange(0, size)[None, None, :]
    number = first[:, None, None] + g // groups
    values = value_of(packed + number * nbytes, g % groups, i, number < last[:, None, None])
    return tl.reshape(values, (first.shape[0], blocks * groups * size))


@triton.jit
def _decode(
    packed: tl.tensor,
    out: tl.tensor,
    num_blocks: tl.tensor,
    value_of: tl.constexpr,
    nbytes: tl.constexpr,
    groups: tl.constexpr,
    size: tl.constexpr,
    blocks: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    last = num_blocks + tl.full((tile,), 0, tl.int64)
    values = _values(packed, row * blocks, last, value_of, nbytes, groups, size, blocks)
    step: tl.constexpr = blocks * groups * size
    at = row[:, None] * step + tl.arange(0, step)[None, :]
    inside = at < num_blocks * tl.full((), groups * size, tl.int64)
    tl.store(out + at, values.to(out.dtype.element_ty), inside)


@triton.jit
def _linear(
    x: tl.tensor,
    packed: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    num_rows: tl.tensor,
    num_outputs: tl.tensor,
    row_blocks: tl.tensor,
    value_of: tl.constexpr,
    nbytes: tl.constexpr,
    groups: tl.constexpr,
    size: tl.constexpr,
    blocks: tl.constexpr,
    tile: tl.constexpr,
    max_rows: tl.constexpr,
) -> None:
    """Each program goes along some rows of the weight, so that sums have one order."""
    n = tl.program_id(0) * tile + tl.arange(0, tile)
    m = tl.arange(0, max_rows)
    first = n.to(tl.int64) * row_blocks
    last = tl.where(n < num_outputs, first + row_blocks, 0)
    step: tl.constexpr = blocks * groups * size
    columns = row_blocks * (groups * size)
    sums = tl.full((tile, max_rows), 0.0, tl.float32)
    for begin in range(0, row_blocks, blocks):
        values = _values(packed, first + begin, last, value_of, nbytes, groups, size, blocks)
        k = begin * (groups * size) + tl.arange(0, step)
        inside = (k[:, None] < columns) & (m[None, :] < num_rows)
        inputs = tl.load(x + m[None, :] * columns + k[:, None], inside, other=0.0)
        sums = tl.dot(values.to(inputs.dtype), inputs, sums, input_precision="ieee")
    if bias is not None:
        sums += tl.load(bias + n, n < num_outputs, other=0.0).to(tl.float32)[:, None]
    inside = (n[:, None] < num_outputs) & (m[None, :] < num_rows)
    tl.store(y + m[None, :] * num_outputs + n[:, None], sums.to(y.dtype.element_ty), inside)


def _constants(form: type[BlockFormat]) -> dict[str, Any]:
    value_of, groups = FORMATS[form.name]
    return {
        "value_of": value_of,
        "nbytes": form.nbytes,
        "groups": groups,
        "size": form.elements // groups,
        "blocks": _STEP // form.elements,
        **_LAUNCH,
    }


def decode(packed: Tensor, form: type[BlockFormat], out: Tensor) -> None:
    """Decode contiguous uint8 ``packed`` blocks into ``out`` on the current device and stream."""
    num_blocks = packed.numel() // form.nbytes
    constants = _constants(form)
    grid = (triton.cdiv(num_blocks, constants["blocks"] * _DECODE_TILE),)
    if num_blocks:
        _decode[grid](_even(packed), out, num_blocks, tile=_DECODE_TILE, **constants)


def linear(x: Tensor, packed: Tensor, form: type[BlockFormat], bias: Tensor | None) -> Tensor:
    """Return ``x @ weight.T + bias`` for up to ``MAX_ROWS`` rows, with sums in float32.

    The weight is rounded to the dtype of ``x`` before it is multiplied, as ``decode`` would.
    """
    num_rows, columns = x.shape
    row_blocks = columns // form.elements
    num_outputs = packed.numel() // (row_blocks * form.nbytes)
    y = x.new_empty(num_rows, num_outputs)
    _linear[(triton.cdiv(num_outputs, _LINEAR_TILE),)](
        x.contiguous(),
        _even(packed),
        bias,
        y,
        num_rows,
        num_outputs,
        row_blocks,
        tile=_LINEAR_TILE,
        max_rows=MAX_ROWS,
        **_constants(form),
    )
    return y


def _even(packed: Tensor) -> Tensor:
    """Blocks whose float16 scales can be read: at an even address, which all but views have."""
    return packed.clone() if packed.data_ptr() % torch.float16.itemsize else packed
