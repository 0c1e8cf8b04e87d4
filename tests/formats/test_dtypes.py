"""The dtype table against the official packages, and the sizes it gives."""

from __future__ import annotations

import json

import gguf
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st

from distorch.errors import FormatError
from distorch.formats import DTYPES, GGML_DTYPES, SAFETENSORS_DTYPES, DType
from tests.formats.make import read_safetensors, safetensors_file


def test_ggml_table_is_that_of_the_gguf_package() -> None:
    """A type that gguf learns, or a block that changes, must show here first."""
    expected = {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    ours = {n: (d.name, d.block_elements, d.block_bytes) for n, d in GGML_DTYPES.items()}
    assert ours == expected


@pytest.mark.parametrize("dtype", SAFETENSORS_DTYPES.values(), ids=lambda d: d.name)
def test_safetensors_table_is_that_of_the_safetensors_package(dtype: DType) -> None:
    """The package accepts our size of every dtype, and refuses one byte more."""
    nbytes = dtype.nbytes((3, 8))
    for size in (nbytes, nbytes + 1):
        entry = {"dtype": dtype.name, "shape": [3, 8], "data_offsets": [0, size]}
        file = safetensors_file(json.dumps({"w": entry}).encode(), bytes(size))
        if size == nbytes:
            assert set(read_safetensors(file)) == {"w"}
        else:
            with pytest.raises(safetensors.SafetensorError):
                read_safetensors(file)


def test_names_are_unique_and_complete() -> None:
    assert all(DTYPES[name].name == name for name in DTYPES)
    assert set(DTYPES) == set(SAFETENSORS_DTYPES) | {d.name for d in GGML_DTYPES.values()}


@given(st.sampled_from(list(DTYPES.values())), st.lists(st.integers(0, 9), max_size=4))
def test_nbytes_is_blocks_times_their_bytes(dtype: DType, outer: list[int]) -> None:
    shape = (*outer, 3 * dtype.block_elements)
    blocks = 3
    for size in outer:
        blocks *= size
    assert dtype.nbytes(shape) == blocks * dtype.block_bytes


@pytest.mark.parametrize(
    ("dtype", "shape", "problem"),
    [
        ("Q4_K", (2, 255), "whole number of Q4_K blocks"),
        ("Q8_0", (), "whole number of Q8_0 blocks"),
        ("F32", (-1, -1), "negative"),
        ("F32", (2**32, 2**31), "impossible"),
        ("F32", (2**62, 4, 0), "impossible"),
        ("F32", (1,) * 65, "dimensions"),
    ],
)
def test_impossible_shapes_are_refused(dtype: str, shape: tuple[int, ...], problem: str) -> None:
    with pytest.raises(FormatError, match=problem):
        DTYPES[dtype].nbytes(shape)


def test_scalars_and_empty_tensors() -> None:
    assert DTYPES["F32"].nbytes(()) == 4
    assert DTYPES["F32"].nbytes((0, 7)) == 0
    assert DTYPES["Q4_0"].nbytes((0, 32)) == 0
