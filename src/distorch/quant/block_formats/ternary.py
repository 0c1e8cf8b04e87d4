"""GGML's ternary formats: each weight is -1, 0 or 1 times one float16 scale for 256 of them.

Layouts: ``block_tq1_0`` and ``block_tq2_0`` in ggml-common.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distorch.quant.block_formats.base import BlockFormat, fields, half

__all__: list[str] = []


def _trits(packed: Tensor, count: int) -> Tensor:
    """Return the first ``count`` base-3 digits of bytes that are fractions: 0 to 2, high first.

    A byte holds its digits as a fraction of 256, so that a product by 3 pushes the next one out;
    a product by a power of 3, modulo 256, has pushed out those before.
    """
    turned = torch.stack([packed * 3**power for power in range(count)], dim=1)
    return (turned.to(torch.int16) * 3 >> 8).reshape(packed.shape[0], -1)


class TQ1_0(BlockFormat):  # noqa: N801  the format's own name
    """48 bytes of five weights each, 4 bytes of four, a float16 scale."""

    elements, nbytes = 256, 54

    @staticmethod
    def decode(blocks: Tensor) -> Tensor:
        parts = (blocks[:, :32], 5), (blocks[:, 32:48], 5), (blocks[:, 48:52], 4)
        q = torch.cat([_trits(packed, count) for packed, count in parts], dim=1) - 1
        return q.float() * half(blocks, 52)


class TQ2_0(BlockFormat):  # noqa: N801  the format's own name
    """64 bytes of four 2-bit weights each, a float16 scale."""

    elements, nbytes = 256, 66

    @staticmethod
    def decode(blocks: Tensor) -> Tensor:
        q = fields(blocks[:, :64].reshape(-1, 32), 2).reshape(-1, 256).to(torch.int8) - 1
        return q.float() * half(blocks, 64)
