"""How weights would be stored in a format."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distorch.errors import ModelError
from distorch.formats.dtypes import DTYPES, GGML_DTYPES, TensorInfo
from distorch.plan.blocks import Node, TensorSpec
from distorch.plan.storage import FORMATS, Format, converted, format_named, stored_as

shapes = st.lists(st.sampled_from([1, 3, 32, 64, 256, 768]), min_size=1, max_size=4).map(tuple)


@given(st.sampled_from(sorted(FORMATS)), shapes)
def test_a_stored_weight_has_the_bytes_of_its_dtype(name: str, shape: tuple[int, ...]) -> None:
    spec = TensorSpec(name="w", dtype="F64", shape=shape, nbytes=8 * prod(shape), whole=True)
    root = Node(name="", children=(Node(name="layer", tensors=(spec,)),))
    found = stored_as(root, FORMATS[name]).children[0].tensors[0]
    assert found.shape == shape
    assert found.nbytes == DTYPES[found.dtype].nbytes(shape)
    assert not found.whole
    if prod(shape) <= 1024 or len(shape) in {1, 4}:
        assert found.dtype == FORMATS[name].other.name


def test_every_block_format_of_gguf_is_known_by_its_name_in_any_case() -> None:
    names = {dtype.name for dtype in GGML_DTYPES.values() if dtype.block_elements > 1}
    assert names | {"bf16", "f16", "f32", "fp8", "fp8_e5m2"} == set(FORMATS)
    for name in FORMATS:
        assert format_named(name.upper()) == format_named(name.lower()) == FORMATS[name]


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("bf16", (5,), "BF16"),
        ("f32", (64, 64), "F32"),
        ("fp8", (64, 64), "F8_E4M3"),
        ("fp8", (4096,), "BF16"),
        ("fp8", (32, 32), "BF16"),
        ("Q8_0", (64, 96), "Q8_0"),
        ("Q4_K", (64, 96), "BF16"),
        ("Q4_K", (4, 256), "F32"),
        ("Q4_K", (1, 4096), "F32"),
        ("Q4_K", (8, 64, 256), "Q4_K"),
        ("Q4_K", (1, 6, 5120), "F32"),
        ("Q4_K", (5120, 16, 1, 2, 2), "F32"),
    ],
)
def test_the_rule(name: str, shape: tuple[int, ...], dtype: str) -> None:
    assert format_named(name).dtype(shape).name == dtype


def test_an_unknown_format_is_answered_with_all_known_and_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"bf16, f16, f32, fp8, fp8_e5m2, Q4_0") as caught:
        format_named("Q4_K_M")
    assert caught.value.hint == "Q4_K"


def test_what_packed_weights_are_computed_in() -> None:
    computed = {name: found.compute for name, found in FORMATS.items()}
    assert (computed["f16"], computed["f32"]) == ("F16", "F32")
    assert {computed[name] for name in FORMATS if name not in {"f16", "f32"}} == {"BF16"}
    assert isinstance(FORMATS["fp8"], Format)


@pytest.mark.parametrize(
    ("dtype", "shape", "wanted"),
    [
        ("BF16", (64, 256), "Q4_K"),
        ("Q8_0", (64, 256), "Q4_K"),
        ("F8_E4M3", (64, 256), "Q4_K"),
        ("BF16", (4, 64, 256), "Q4_K"),
        ("BF16", (4096,), "BF16"),
        ("F32", (64, 96), "F32"),
        ("BF16", (4, 256), "BF16"),
        ("F32", (8, 8, 3, 256), "F32"),
        ("I32", (64, 256), "I32"),
    ],
)
def test_large_matrices_of_whole_blocks_are_converted_and_no_others(
    dtype: str, shape: tuple[int, ...], wanted: str
) -> None:
    info = TensorInfo("w", dtype, shape, 0, DTYPES[dtype].nbytes(shape), Path("w"))
    found = converted({"w": info}, format_named("q4_k"))["w"]
    assert (found.dtype, found.nbytes) == (wanted, DTYPES[wanted].nbytes(shape))
    kept = wanted if len(shape) == 2 else dtype  # a scale is for the rows of one matrix
    assert converted({"w": info}, format_named("q4_k"), {"w"})["w"].dtype == kept


@pytest.mark.parametrize(
    ("alias", "name"), [("fp8_e4m3fn", "fp8"), ("fp16", "f16"), ("BFLOAT16", "bf16")]
)
def test_torchs_names_are_known_too(alias: str, name: str) -> None:
    assert format_named(alias) is FORMATS[name]
