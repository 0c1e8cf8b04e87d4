"""GGML's first formats: 32 weights under one float16 scale, some with a float16 minimum.

Layouts: ``block_q4_0`` and its neighbours in ggml-common.h. Of 16 packed bytes, the low nibbles
are weights 0 to 15, the high nibbles 16 to 31.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distorch.quant.block_formats.base import BlockFormat, bits, fields, half

__all__: list[str] = []


def _nibbles(packed: Tensor) -> Tensor:
    return fields(packed, 4).reshape(-1, 32)


class Q4_0(BlockFormat):  # noqa: N801  the format's own name
    """A float16 scale, 32 nibbles; weights are centred on 8."""

    elements, nbytes = 32, 18

    @staticmethod
    def decode(blocks: Tensor) -> Tensor:
        q = _nibbles(blocks[:, 2:]).to(torch.int8) - 8
        return q.float() * half(blocks, 0)


class Q4_1(BlockFormat):  # noqa: N801  the format's own name
    """A float16 scale, a float16 minimum, 32 nibbles."""

    elements, nbytes = 32, 20

    @staticmethod
    def decode(blocks: Tensor) -> Tensor:
        return _nibbles(blocks[:, 4:]).float() * half(blocks, 0) + half(blocks, 2)


class Q5_0(BlockFormat):  # noqa: N801  the format's own name
    """A float16 scale, 32 high bits, 32 low nibbles; weights are centred on 16."""

    elements, nbytes = 32, 22

    @staticmethod
    def decode(blocks: Tensor) -> Tensor:
        q = _nibbles(blocks[:, 6:]) | bits(blocks[:, 2:6]) << 4
        return (q.to(torch.int8) - 16).float() * half(blocks, 0)


class Q5_1(BlockFormat):  # noqa: N801  the format's own name
    """A float16 scale, a float16 minimum, 32 high bits, 32 low nibbles."""

    elements, nbytes = 32, 24

    @staticmethod
    def decode(blocks: Tensor) -> Tensor:
        q = _nibbles(blocks[:, 8:]) | bits(blocks[:, 4:8]) << 4
        return q.float() * half(blocks, 0) + half(blocks, 2)


class Q8_0(BlockFormat):  # noqa: N801  the format's own name
    """A float16 scale and 32 signed bytes."""

    elements, nbytes = 32, 34

    @staticmethod
    def decode(blocks: Tensor) -> Tensor:
        return blocks[:, 2:].view(torch.int8).float() * half(blocks, 0)
