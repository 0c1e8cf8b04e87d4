"""What a block format is, and the few ways in which all of them pack numbers into bytes.

A block format stores ``elements`` weights in ``nbytes`` bytes: small integers and the scales that
turn them back into numbers. Layouts are ggml's (``ggml-common.h``); the arithmetic follows ggml's
reference order of operations. So every format gives the bits of ``gguf.quants.dequantize``; where
that gives a NaN, so does ours, with a sign and a payload that are the machine's affair.

To add a format, write its class: the class statement registers it. A faster kernel for the CPU
may be added under the same name in ``kernels.c``; the class stays the meaning, on every device.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from distorch.errors import ModelError

__all__ = [
    "BLOCK_FORMATS",
    "BlockFormat",
    "bits",
    "block_format",
    "fields",
    "half",
    "look_up",
    "typed",
]

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


def block_format(name: str, tensor: str = "the weight") -> type[BlockFormat]:
    """Return the class of the block format ``name``; ``tensor`` is what is stored in it.

    Raises:
        ModelError: it is not a format of weights, or not one of this version.
    """
    try:
        return BLOCK_FORMATS[name]
    except KeyError:
        known = ", ".join(sorted(BLOCK_FORMATS))
        raise ModelError(
            f"{tensor} is stored as {name}, which is not a format of weights here",
            hint=f"a file that uses only {known}",
        ) from None


def typed(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Read the bytes of ``blocks`` as numbers, wherever in memory they begin.

    >>> typed(torch.tensor([[0, 0, 0x3C]], dtype=torch.uint8)[:, 1:], torch.float16)
    tensor([[1.]], dtype=torch.float16)
    """
    return blocks.clone(memory_format=torch.contiguous_format).view(dtype)


def half(blocks: Tensor, at: int) -> Tensor:
    """Return the float16 at byte ``at`` of each block, as float32 of shape ``(n, 1)``."""
    return typed(blocks[:, at : at + 2], torch.float16).float()


def fields(packed: Tensor, width: int) -> Tensor:
    """Split bytes ``(n, k)`` into their fields, the lowest bits first: ``(n, 8 // width, k)``.

    >>> fields(torch.tensor([[0x21, 0x43]], dtype=torch.uint8), 4).tolist()
    [[[1, 3], [2, 4]]]
    """
    mask = (1 << width) - 1
    return torch.stack([packed >> at & mask for at in range(0, 8, width)], dim=1)


def bits(packed: Tensor, width: int = 1) -> Tensor:
    """Split bytes ``(n, k)`` likewise, but byte after byte: ``(n, 8 // width * k)``.

    >>> bits(torch.tensor([[0x21, 0x43]], dtype=torch.uint8), 4).tolist()
    [[1, 2, 3, 4]]
    """
    return fields(packed, width).transpose(1, 2).flatten(1)


def look_up(values: Tensor, index: Tensor) -> Tensor:
    """Return the value that each number stands for: ``values[index]``, several times as fast.

    >>> look_up(torch.tensor([0.0, 0.5]), torch.tensor([[1, 0]], dtype=torch.uint8))
    tensor([[0.5000, 0.0000]])
    """
    return values.index_select(0, index.flatten().int()).view(index.shape)
