"""Plain floating point: the trivial case, one element a block."""

from __future__ import annotations

import torch
from torch import Tensor

from distorch.quant.block_formats.base import BlockFormat, half, typed

__all__: list[str] = []


class F64(BlockFormat):
    """IEEE 754 double precision, rounded to single."""

    elements, nbytes = 1, 8

    @staticmethod
    def decode(blocks: Tensor) -> Tensor:
        return typed(blocks, torch.float64).float()


class F32(BlockFormat):
    """IEEE 754 single precision."""

    elements, nbytes = 1, 4

    @staticmethod
    def decode(blocks: Tensor) -> Tensor:
        return typed(blocks, torch.float32)


class F16(BlockFormat):
    """IEEE 754 half precision."""

    elements, nbytes = 1, 2

    @staticmethod
    def decode(blocks: Tensor) -> Tensor:
        return half(blocks, 0)


class BF16(BlockFormat):
    """The upper half of a float32."""

    elements, nbytes = 1, 2

    @staticmethod
    def decode(blocks: Tensor) -> Tensor:
        return typed(blocks, torch.bfloat16).float()


class F8_E4M3(BlockFormat):  # noqa: N801  the format's own name
    """Eight bits: four of exponent, three of mantissa, no infinity (OCP 8-bit floating point)."""

    elements, nbytes = 1, 1

    @staticmethod
    def decode(blocks: Tensor) -> Tensor:
        return blocks.view(torch.float8_e4m3fn).float()


class F8_E5M2(BlockFormat):  # noqa: N801  the format's own name
    """Eight bits: five of exponent, two of mantissa (OCP 8-bit floating point)."""

    elements, nbytes = 1, 1

    @staticmethod
    def decode(blocks: Tensor) -> Tensor:
        return blocks.view(torch.float8_e5m2).float()


class I8(BlockFormat):
    """A signed byte: a number that a scale makes a weight of."""

    elements, nbytes = 1, 1

    @staticmethod
    def decode(blocks: Tensor) -> Tensor:
        return blocks.view(torch.int8).float()
