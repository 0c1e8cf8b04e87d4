"""One weight of a file by its name, whatever it is stored as."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import distorch
from distorch.errors import ModelError, StorageError
from tests.quant.make import ORACLE, oracle, same_bits, sound_blocks

if TYPE_CHECKING:
    from pathlib import Path

ROWS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file with a matrix of every format, 6 x 512."""
    path = tmp_path_factory.mktemp("formats") / "m.gguf"
    writer = gguf.GGUFWriter(path, "tiny")
    for name in ORACLE:
        kind = gguf.GGMLQuantizationType[name]
        blocks = sound_blocks(name, ROWS * 512 // gguf.GGML_QUANT_SIZES[kind][0])
        writer.add_tensor(f"{name}.weight", blocks.reshape(ROWS, -1), raw_dtype=kind)
    q8_1 = gguf.GGMLQuantizationType.Q8_1
    writer.add_tensor("odd.weight", np.zeros((1, 40), np.uint8), raw_dtype=q8_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ORACLE)
def test_a_weight_of_every_format_is_the_oracles(
    name: str, dtype: torch.dtype, model: Path
) -> None:
    with distorch.open_checkpoint(model) as checkpoint:
        found = distorch.dequantize(checkpoint, f"{name}.weight", dtype)
        stored = np.array(checkpoint.view(f"{name}.weight"))
        expected = oracle(name, stored).to(dtype)
    assert found.shape == (ROWS, 512)
    assert same_bits(found, expected)
    found += 1  # memory of its own, which outlives the file's map


def test_a_weight_with_a_scale_is_multiplied_by_it(tmp_path: Path) -> None:
    stored, scale = torch.randn(4, 8).to(torch.float8_e4m3fn), torch.tensor(0.37)
    save_file({"up.weight": stored, "up.scale_weight": scale}, tmp_path / "m.safetensors")
    with distorch.open_checkpoint(tmp_path) as checkpoint:
        found = distorch.dequantize(checkpoint, "up.weight", torch.bfloat16)
        assert torch.equal(found, (stored.float() * scale).bfloat16())
        assert distorch.dequantize(checkpoint, "up.scale_weight") == scale


def test_a_scale_of_another_shape_is_an_error(tmp_path: Path) -> None:
    stored = torch.randn(4, 8).to(torch.float8_e4m3fn)
    save_file({"up.weight": stored, "up.scale_weight": torch.ones(3)}, tmp_path / "m.safetensors")
    with (
        distorch.open_checkpoint(tmp_path) as checkpoint,
        pytest.raises(ModelError, match=r"up.weight in .*m.safetensors.*\[4, 8\].*\[3\]"),
    ):
        distorch.dequantize(checkpoint, "up.weight")


def test_scalars_and_empty_tensors_have_their_shape(tmp_path: Path) -> None:
    one, none = torch.tensor(2.5, dtype=torch.float16), torch.empty(0, 3)
    save_file({"one": one, "none": none}, tmp_path / "m.safetensors")
    with distorch.open_checkpoint(tmp_path) as checkpoint:
        assert distorch.dequantize(checkpoint, "one") == torch.tensor(2.5)
        assert distorch.dequantize(checkpoint, "none").shape == (0, 3)


def test_a_name_that_is_not_there_gets_those_that_are_close(model: Path) -> None:
    with (
        distorch.open_checkpoint(model) as checkpoint,
        pytest.raises(ModelError, match=r"'Q4_k\.weight' among the .*m\.gguf") as caught,
    ):
        distorch.dequantize(checkpoint, "Q4_k.weight")
    assert "Q4_K.weight" in caught.value.hint


def test_what_is_no_format_of_weights_names_the_tensor_and_the_file(model: Path) -> None:
    with (
        distorch.open_checkpoint(model) as checkpoint,
        pytest.raises(ModelError, match=r"odd\.weight in .*m\.gguf is stored as Q8_1"),
    ):
        distorch.dequantize(checkpoint, "odd.weight")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64])
def test_only_floating_point_is_decoded_to(dtype: torch.dtype, model: Path) -> None:
    with (
        distorch.open_checkpoint(model) as checkpoint,
        pytest.raises(ModelError, match=r"Q8_0\.weight cannot be decoded to torch\."),
    ):
        distorch.dequantize(checkpoint, "Q8_0.weight", dtype)


def test_a_closed_checkpoint_is_an_error(model: Path) -> None:
    checkpoint = distorch.open_checkpoint(model)
    checkpoint.close()
    with pytest.raises(StorageError, match="closed"):
        distorch.dequantize(checkpoint, "Q8_0.weight")
