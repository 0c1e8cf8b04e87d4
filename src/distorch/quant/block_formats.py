"""What the bytes mean: one class per block format, each with one method that decodes it.

A block format stores ``elements`` weights in ``nbytes`` bytes: small integers and the scales that
turn them back into numbers. Layouts are ggml's (``ggml-common.h``); the arithmetic follows ggml's
reference order of operations, so every format is bit-identical to ``gguf.quants.dequantize``.
Plain floating point is the trivial case of one element a block.

To add a format, write its class: the class statement registers it. A faster kernel for the CPU
may be added under the same name in ``kernels.c``; the class stays the meaning, on every device.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from distorch.errors import ModelError

__all__ = ["BLOCK_FORMATS", "BlockFormat", "block_format"]

BLOCK_FORMATS: dict[str, type[BlockFormat]] = {}


class BlockFormat:
    """How ``elements`` weights are stored in ``nbytes`` bytes, and how to get them back.

    >>> block_format("Q8_0").elements, block_format("Q8_0").nbytes
    (32, 34)
    """

    name: ClassVar[str]
    elements: ClassVar[int]
    nbytes: ClassVar[int]

    def __init_subclass__(cls) -> None:
        cls.name = cls.__name__
        BLOCK_FORMATS[cls.name] = cls

    @staticmethod
    def decode(blocks: Tensor) -> Tensor:
        """Turn uint8 blocks of shape ``(n, nbytes)`` into float32 of shape ``(n, elements)``."""
        raise NotImplementedError


def block_format(name: str) -> type[BlockFormat]:
    """Return the class of the block format ``name``.

    Raises:
        ModelError: the format is not one this version can compute with.
    """
    try:
        return BLOCK_FORMATS[name]
    except KeyError:
        known = ", ".join(sorted(BLOCK_FORMATS))
        raise ModelError(
            f"block format {name} cannot be computed with yet",
            hint=f"a file that uses only {known}",
        ) from None


def _half(blocks: Tensor, at: int) -> Tensor:
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """Split bytes ``(n, k)`` into their low and high halves, ``(n, 2, k)``."""
    return torch.stack((packed & 15, packed >> 4), dim=1)


class F64(BlockFormat):
    """IEEE 754 double precision, rounded to single."""

    elements, nbytes = 1, 8

    @staticmethod
    def decode(blocks: Tensor) -> Tensor:
        return blocks.view(torch.float64).float()


class F32(BlockFormat):
    """IEEE 754 single precision."""

    elements, nbytes = 1, 4

    @staticmethod
    def decode(blocks: Tensor) -> Tensor:
        return blocks.view(torch.float32)


class F16(BlockFormat):
    """IEEE 754 half precision."""

    elements, nbytes = 1, 2

    @staticmethod
    def decode(blocks: Tensor) -> Tensor:
        return blocks.view(torch.float16).float()


class BF16(BlockFormat):
    """The upper half of a float32."""

    elements, nbytes = 1, 2

    @staticmethod
    def decode(blocks: Tensor) -> Tensor:
        return blocks.view(torch.bfloat16).float()


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


class Q8_0(BlockFormat):  # noqa: N801  the format's own name
    """A float16 scale and 32 signed bytes."""

    elements, nbytes = 32, 34

    @staticmethod
    def decode(blocks: Tensor) -> Tensor:
        return blocks[:, 2:].view(torch.int8).float() * _half(blocks, 0)


class Q5_0(BlockFormat):  # noqa: N801  the format's own name
    """A float16 scale, 32 high bits, 32 low nibbles; weights are centred on 16."""

    elements, nbytes = 32, 22

    @staticmethod
    def decode(blocks: Tensor) -> Tensor:
        bit = torch.arange(8, dtype=torch.uint8, device=blocks.device)
        high = ((blocks[:, 2:6].unsqueeze(-1) >> bit) & 1).reshape(-1, 32)
        low = _nibbles(blocks[:, 6:]).reshape(-1, 32)
        return ((low | high << 4).to(torch.int8) - 16).float() * _half(blocks, 0)


class Q4_K(BlockFormat):  # noqa: N801  the format's own name
    """256 nibbles in 8 groups, each with a 6-bit scale and minimum; two float16 super-scales."""

    elements, nbytes = 256, 144

    @staticmethod
    def decode(blocks: Tensor) -> Tensor:
        packed = blocks[:, 4:16].view(-1, 3, 4)
        scale_low, min_low, rest = packed.unbind(1)
        scales = torch.cat((scale_low & 63, (rest & 15) | (scale_low >> 6 << 4)), dim=1)
        mins = torch.cat((min_low & 63, (rest >> 4) | (min_low >> 6 << 4)), dim=1)
        scale = (_half(blocks, 0) * scales.float()).unsqueeze(-1)
        minimum = (_half(blocks, 2) * mins.float()).unsqueeze(-1)
        q = torch.stack(_nibbles(blocks[:, 16:].reshape(-1, 32)).unbind(1), dim=1)
        return (scale * q.reshape(-1, 8, 32).float() - minimum).reshape(-1, 256)


class Q6_K(BlockFormat):  # noqa: N801  the format's own name
    """256 weights of 4 low and 2 high bits, 16 signed byte scales, a float16 super-scale."""

    elements, nbytes = 256, 210

    @staticmethod
    def decode(blocks: Tensor) -> Tensor:
        low = _nibbles(blocks[:, :128].reshape(-1, 64)).reshape(-1, 4, 32)
        shift = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device).view(1, 4, 1)
        high = (blocks[:, 128:192].reshape(-1, 1, 32) >> shift) & 3
        q = ((low | high << 4).to(torch.int8) - 32).reshape(-1, 16, 16)
        scale = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
        return (scale.unsqueeze(-1) * q.float()).reshape(-1, 256)
