"""GGML's K formats: 256 weights in groups whose own small scales stand under a float16 scale.

Layouts: ``block_q2_K`` and its neighbours in ggml-common.h. Of each run of 32 packed bytes, the
lowest bits are the first 32 weights, the next bits the next 32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distorch.quant.block_formats.base import BlockFormat, fields, half

__all__: list[str] = []


def _weights(packed: Tensor, width: int, group: int) -> Tensor:
    """Unpack the weights of each block: ``(n, groups, group)``."""
    return fields(packed.reshape(-1, 32), width).reshape(packed.shape[0], -1, group)


def _scales_and_minimums(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Unpack 8 scales and 8 minimums, of 6 bits each, from the 12 bytes of Q4_K and Q5_K."""
    scale, minimum, rest = packed.reshape(-1, 3, 4).unbind(1)
    scales = torch.cat((scale & 63, (rest & 15) | (scale >> 6 << 4)), dim=1)
    minimums = torch.cat((minimum & 63, (rest >> 4) | (minimum >> 6 << 4)), dim=1)
    return scales.float(), minimums.float()


def _between(q: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """``scale * q - minimum`` for each group, with two roundings."""
    return (scale.unsqueeze(-1) * q.float() - minimum.unsqueeze(-1)).reshape(-1, 256)


class Q2_K(BlockFormat):  # noqa: N801  the format's own name
    """16 groups, each with a 4-bit scale and minimum; 2-bit weights; two float16 super-scales."""

    elements, nbytes = 256, 84

    @staticmethod
    def decode(blocks: Tensor) -> Tensor:
        scale, minimum = fields(blocks[:, :16], 4).float().unbind(1)
        q = _weights(blocks[:, 16:80], width=2, group=16)
        return _between(q, half(blocks, 80) * scale, half(blocks, 82) * minimum)


class Q3_K(BlockFormat):  # noqa: N801  the format's own name
    """256 high bits, 2 low bits each, 16 six-bit scales centred on 32, a float16 super-scale.

    A missing high bit takes 4 off the weight.
    """

    elements, nbytes = 256, 110

    @staticmethod
    def decode(blocks: Tensor) -> Tensor:
        low = fields(blocks[:, 96:104], 4).reshape(-1, 16)
        high = fields(blocks[:, 104:108], 2).reshape(-1, 16)
        scale = half(blocks, 108) * ((low | high << 4).to(torch.int8) - 32).float()
        q = _weights(blocks[:, 32:96], width=2, group=16)
        is_high = _weights(blocks[:, :32], width=1, group=16)
        weights = (q | is_high << 2).to(torch.int8) - 4
        return (scale.unsqueeze(-1) * weights.float()).reshape(-1, 256)


class Q4_K(BlockFormat):  # noqa: N801  the format's own name
    """256 nibbles in 8 groups, each with a 6-bit scale and minimum; two float16 super-scales."""

    elements, nbytes = 256, 144

    @staticmethod
    def decode(blocks: Tensor) -> Tensor:
        scale, minimum = _scales_and_minimums(blocks[:, 4:16])
        q = _weights(blocks[:, 16:], width=4, group=32)
        return _between(q, half(blocks, 0) * scale, half(blocks, 2) * minimum)


class Q5_K(BlockFormat):  # noqa: N801  the format's own name
    """Q4_K with 256 high bits besides."""

    elements, nbytes = 256, 176

    @staticmethod
    def decode(blocks: Tensor) -> Tensor:
        scale, minimum = _scales_and_minimums(blocks[:, 4:16])
        q = _weights(blocks[:, 48:], width=4, group=32)
        q = q | _weights(blocks[:, 16:48], width=1, group=32) << 4
        return _between(q, half(blocks, 0) * scale, half(blocks, 2) * minimum)


class Q6_K(BlockFormat):  # noqa: N801  the format's own name
    """256 weights of 4 low and 2 high bits, 16 signed byte scales, a float16 super-scale."""

    elements, nbytes = 256, 210

    @staticmethod
    def decode(blocks: Tensor) -> Tensor:
        low = fields(blocks[:, :128].reshape(-1, 64), 4).reshape(-1, 16, 16)
        high = _weights(blocks[:, 128:192], width=2, group=16)
        q = (low | high << 4).to(torch.int8) - 32
        scale = half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
        return (scale.unsqueeze(-1) * q.float()).reshape(-1, 256)
