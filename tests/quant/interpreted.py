"""What tests of the Triton kernels share: names, sound weights, and what torch makes of them."""

from __future__ import annotations

import torch
from torch import Tensor

from distorch.quant.block_formats import BLOCK_FORMATS
from tests.quant.make import sound_blocks

NAMES = ["Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "F8_E4M3", "F8_E5M2"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def by_torch(name: str, packed: Tensor, dtype: torch.dtype) -> Tensor:
    form = BLOCK_FORMATS[name]
    return form.decode(packed.view(-1, form.nbytes)).to(dtype)


def sound(name: str, rows: int, columns: int) -> Tensor:
    """Rows of blocks without infinity or NaN."""
    blocks = sound_blocks(name, rows * columns // BLOCK_FORMATS[name].elements)
    if name.startswith("F8"):
        blocks = blocks & 0xBF
    return torch.from_numpy(blocks).view(-1)
