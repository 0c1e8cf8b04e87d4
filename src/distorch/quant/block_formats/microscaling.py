"""Microscaling: 4-bit floating point (E2M1) under an 8-bit floating-point scale.

Layouts: ``block_mxfp4`` and ``block_nvfp4`` in ggml-common.h. As ggml does, both take the E2M1
values twice, which makes them whole numbers, and the scale by half.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distorch.quant.block_formats.base import BlockFormat, fields, look_up

__all__: list[str] = []

_E2M1_TWICE = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def _e2m1_twice(packed: Tensor) -> Tensor:
    """Look the nibbles of ``(n, k)`` up: ``(n, 2, k)``."""
    values = torch.tensor(_E2M1_TWICE, dtype=torch.float32, device=packed.device)
    return look_up(values, fields(packed, 4))


class MXFP4(BlockFormat):
    """A power of two as scale (E8M0), 32 nibbles (OCP microscaling formats)."""

    elements, nbytes = 32, 17

    @staticmethod
    def decode(blocks: Tensor) -> Tensor:
        exponent = blocks[:, :1].int()
        denormal = 1 << 21 << exponent.clamp(max=1)  # half of 2**-127 and of 2**-126
        scale = torch.where(exponent < 2, denormal, exponent - 1 << 23).view(torch.float32)  # noqa: PLR2004
        return scale * _e2m1_twice(blocks[:, 1:]).reshape(-1, 32)


class NVFP4(BlockFormat):
    """Four groups of 16 nibbles, each with a scale in E4M3 that has no sign (NVIDIA's format)."""

    elements, nbytes = 64, 36

    @staticmethod
    def decode(blocks: Tensor) -> Tensor:
        byte = blocks[:, :4]
        magnitude = (byte & 127).int()
        normal = ((magnitude << 20) + (120 << 23)).view(torch.float32)
        scale = torch.where(magnitude < 8, magnitude * 2.0**-9, normal) / 2  # noqa: PLR2004
        scale = torch.where(byte == 127, 0.0, scale)  # noqa: PLR2004  its NaN counts as zero
        q = _e2m1_twice(blocks[:, 4:].reshape(-1, 8)).reshape(-1, 4, 16)
        return (scale.unsqueeze(-1) * q).reshape(-1, 64)
