"""Every block format means what ``gguf.quants`` says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest
import torch

from distorch.errors import ModelError
from distorch.formats.dtypes import DTYPES
from distorch.quant.block_formats import BLOCK_FORMATS, block_format
from distorch.quant.dequantize import dequantize
from tests.quant.make import (
    GGML,
    ORACLE,
    PACKED,
    oracle,
    quantised_rows,
    random_blocks,
    same_bits,
    sound_blocks,
    with_halves,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

SLOW_TO_QUANTISE = {"IQ1_S", "IQ1_M", "IQ2_S", "IQ2_XS"}  # libgguf prepares for 5 to 25 s
NUM_BLOCKS = 700  # several tiles of the kernels, and a remainder

CASES: dict[str, Callable[[str], np.ndarray]] = {
    "random bytes": lambda name: random_blocks(name, NUM_BLOCKS),
    "sound scales": lambda name: sound_blocks(name, NUM_BLOCKS),
    "zeros": lambda name: random_blocks(name, 9) & 0,
    "ones": lambda name: random_blocks(name, 9) | 255,
    "zero scales": lambda name: with_halves(name, random_blocks(name, 99), 0),
    "minus zero scales": lambda name: with_halves(name, random_blocks(name, 99), 0x8000),
    "denormal scales": lambda name: with_halves(
        name, random_blocks(name, 1023), np.arange(1, 1024) | (np.arange(1, 1024) % 2 << 15)
    ),
    "largest scales": lambda name: with_halves(name, random_blocks(name, 99), 0x7BFF),
    "infinite scales": lambda name: with_halves(name, random_blocks(name, 99), 0x7C00),
    "minus infinite scales": lambda name: with_halves(name, random_blocks(name, 99), 0xFC00),
    "NaN scales": lambda name: with_halves(
        name, random_blocks(name, 1023), np.arange(1, 1024) | 0x7C00
    ),
}


def by_torch(name: str, packed: Tensor) -> Tensor:
    form = BLOCK_FORMATS[name]
    return form.decode(packed.view(-1, form.nbytes))


def in_one_go(name: str, packed: Tensor) -> Tensor:
    form = BLOCK_FORMATS[name]
    num_blocks = packed.numel() // form.nbytes
    return dequantize(packed, form, torch.empty(num_blocks * form.elements, dtype=torch.float32))


@pytest.mark.parametrize("decode", [by_torch, in_one_go])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ORACLE)
def test_blocks_decode_to_the_oracles_bits(
    name: str, case: str, decode: Callable[[str, Tensor], Tensor]
) -> None:
    blocks = CASES[case](name)
    assert same_bits(decode(name, torch.from_numpy(blocks)), oracle(name, blocks))


@pytest.mark.parametrize("name", ["MXFP4", "NVFP4"])
def test_every_scale_of_one_byte_is_the_oracles(name: str) -> None:
    blocks = random_blocks(name, 256)
    blocks[:, 0] = np.arange(256)
    assert same_bits(by_torch(name, torch.from_numpy(blocks)), oracle(name, blocks))


@pytest.mark.parametrize("decode", [by_torch, in_one_go])
@pytest.mark.parametrize("name", [name for name in ORACLE if name not in SLOW_TO_QUANTISE])
def test_quantised_weights_decode_to_the_oracles_bits(
    name: str, decode: Callable[[str, Tensor], Tensor]
) -> None:
    blocks = quantised_rows(name)
    assert same_bits(decode(name, torch.from_numpy(blocks.reshape(-1))), oracle(name, blocks))


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_blocks_may_begin_at_any_address(name: str) -> None:
    """A weight in a file lies where the file has it; torch wants numbers at their own multiples."""
    for num_blocks in (1, 3):
        blocks = torch.from_numpy(random_blocks(name, num_blocks))
        room = torch.empty(blocks.numel() + 1, dtype=torch.uint8)
        moved = room[1:].view(blocks.shape).copy_(blocks)
        expected = BLOCK_FORMATS[name].decode(blocks)
        assert same_bits(BLOCK_FORMATS[name].decode(moved), expected)
        assert same_bits(in_one_go(name, moved), expected)


@pytest.mark.parametrize(("name", "mantissa"), [("F8_E4M3", 3), ("F8_E5M2", 2)])
@pytest.mark.parametrize("decode", [by_torch, in_one_go])
def test_eight_bit_floats_mean_what_their_standard_says(
    name: str, mantissa: int, decode: Callable[[str, Tensor], Tensor]
) -> None:
    """Sign, exponent, mantissa; E4M3 has no infinity, and one NaN of each sign."""
    bias = 7 if mantissa == 3 else 15
    found = decode(name, torch.arange(256, dtype=torch.uint8).view(-1, 1)).view(-1)
    for byte in range(256):
        exponent, fraction = (byte & 0x7F) >> mantissa, byte & ((1 << mantissa) - 1)
        value = (bool(exponent) + fraction / (1 << mantissa)) * 2.0 ** (max(exponent, 1) - bias)
        if byte & 0x7F == 0x7F if mantissa == 3 else exponent == 31:
            value = float("nan") if fraction else float("inf")
        assert same_bits(found[byte], torch.tensor(-value if byte & 0x80 else value))


def test_every_format_that_the_oracle_decodes_is_here() -> None:
    """A format that gguf learns must show here."""
    decodes = set()
    for kind, (elements, nbytes) in gguf.GGML_QUANT_SIZES.items():
        try:
            gguf.quants.dequantize(np.zeros((1, nbytes), np.uint8), kind)
        except NotImplementedError:
            continue
        decodes.add(kind.name)
        assert (BLOCK_FORMATS[kind.name].elements, BLOCK_FORMATS[kind.name].nbytes) == (
            elements,
            nbytes,
        )
    assert decodes == set(ORACLE)
    assert set(GGML) - decodes == {"F64"}
    assert len(PACKED) >= 23


def test_block_sizes_are_those_of_the_files() -> None:
    for name, form in BLOCK_FORMATS.items():
        assert (form.elements, form.nbytes) == (
            DTYPES[name].block_elements,
            DTYPES[name].block_bytes,
        )


@pytest.mark.parametrize("name", ["Q8_1", "Q8_K", "F9"])
def test_an_unknown_format_names_the_weight_and_what_is_known(name: str) -> None:
    """Q8_1 and Q8_K are for activations: no file holds weights in them."""
    with pytest.raises(ModelError, match=f"blk.0 in m.gguf is stored as {name}") as caught:
        block_format(name, "blk.0 in m.gguf")
    assert all(known in caught.value.hint for known in BLOCK_FORMATS)
    assert caught.value.exit_code == 2
