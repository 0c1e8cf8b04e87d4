"""Blocks of every format, and what ``gguf.quants`` says that they mean."""

from __future__ import annotations

from functools import cache
from typing import cast

import gguf
import libgguf
import numpy as np
import torch
from torch import Tensor

from distorch.quant.block_formats import BLOCK_FORMATS

Bytes = np.ndarray

HALVES_AT = {  # the float16 scales of each block; IQ1_M's is in pieces
    "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q2_K": (80, 82),
    "Q3_K": (108,), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,),
}  # fmt: skip
NO_HALVES = {"IQ1_M", "MXFP4", "NVFP4"}
DENSE = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
GGML = sorted(
    name
    for name in BLOCK_FORMATS
    if name in gguf.GGMLQuantizationType.__members__ and name != "I8"  # no weights by themselves
)
ORACLE = [name for name in GGML if name != "F64"]  # which gguf.quants does not decode
PACKED = [name for name in ORACLE if name not in DENSE]


def random_blocks(name: str, num_blocks: int, seed: int = 0) -> Bytes:
    """Random bytes: every value of every byte."""
    shape = num_blocks, BLOCK_FORMATS[name].nbytes
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def sound_blocks(name: str, num_blocks: int, seed: int = 0) -> Bytes:
    """Random bytes but for the scales: those are positive numbers around a hundredth."""
    blocks = random_blocks(name, num_blocks, seed)
    small = np.random.default_rng(seed).uniform(0.001, 0.02, num_blocks).astype(np.float16)
    if name == "F32":
        return blocks & 0x3F
    if name in {"MXFP4", "NVFP4"}:
        blocks[:, : 1 if name == "MXFP4" else 4] &= 0x77
        return blocks
    return blocks if name in DENSE | {"I8"} else with_halves(name, blocks, small.view(np.uint16))


def with_halves(name: str, blocks: Bytes, bits: Bytes | int) -> Bytes:
    """Blocks whose float16 scales have these bits."""
    blocks = blocks.copy()
    halves = np.broadcast_to(np.asarray(bits, dtype="<u2"), len(blocks)).copy()
    if name == "IQ1_M":
        for piece in range(4):
            nibble = (halves >> 4 * piece & 15).astype(np.uint8)
            blocks[:, 49 + 2 * piece] = blocks[:, 49 + 2 * piece] & 0x0F | nibble << 4
    elif name not in NO_HALVES:
        for at in HALVES_AT.get(name, (0,)):
            blocks[:, at : at + 2] = halves.view(np.uint8).reshape(-1, 2)
    return blocks


@cache
def quantised_rows(name: str) -> Bytes:
    """Rows as a converter writes them: normal numbers, zeros, one large outlier, tiny ones."""
    rng = np.random.default_rng(1)
    rows = rng.normal(0, 0.05, (40, 1024)).astype(np.float32)
    rows[3] = 0
    rows[5, 17] = 900.0
    rows[7] *= 1e-8
    kind = gguf.GGMLQuantizationType[name]
    try:
        found = gguf.quants.quantize(rows, kind)
    except NotImplementedError:
        found = libgguf.quantize_rows(rows, kind)
    return cast("Bytes", np.ascontiguousarray(found).view(np.uint8))


def oracle(name: str, blocks: Bytes) -> Tensor:
    """Decode with ``gguf.quants``, whose float32 is the meaning of each format."""
    kind = gguf.GGMLQuantizationType[name]
    with np.errstate(all="ignore"):
        values = gguf.quants.dequantize(blocks.reshape(1, -1), kind)
    return torch.from_numpy(np.ascontiguousarray(values)).view(-1)


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Bit for bit, the sign of zero included; one NaN is as good as another."""
    found, expected = found.reshape(-1), expected.reshape(-1)
    assert found.dtype == expected.dtype
    as_bits = torch.int32 if found.dtype == torch.float32 else torch.int16
    both_nan = found.isnan() & expected.isnan()
    return bool(((found.view(as_bits) == expected.view(as_bits)) | both_nan).all())
