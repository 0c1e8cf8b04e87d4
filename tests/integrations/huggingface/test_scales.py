"""Directories of fp8 and int8 weights with scales: ours equals the dense model they stand for."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

import distorch
from distorch.errors import FormatError, ModelError
from distorch.formats import open_checkpoint
from distorch.formats.scales import pair_scales
from distorch.plan.blocks import cut
from distorch.plan.from_names import tree_from_names
from tests.integrations.huggingface.test_safetensors import (
    ALLOCATIONS,
    SMALL,
    reference,
    same,
    save,
)

WIDE: dict[str, Any] = SMALL | {
    "hidden_size": 160,
    "intermediate_size": 288,
    "head_dim": 40,
    "num_hidden_layers": 2,
}
CONFIG = LlamaConfig(vocab_size=320, tie_word_embeddings=False, **WIDE)
LARGE = LlamaConfig(vocab_size=17408, tie_word_embeddings=False, **WIDE)  # in two runs of rows
LINES = [ALLOCATIONS[0], ALLOCATIONS[-1]]
FP8, INT8 = torch.float8_e4m3fn, torch.int8
NAME = "model.layers.1.mlp.up_proj.weight"

Files = dict[str, Tensor]


def grid(weight: Tensor, tile: tuple[int, int]) -> Tensor:
    """The largest value of each tile, as far down and across as the tiles go."""
    rows = [part.split(tile[1], dim=1) for part in weight.float().abs().split(tile[0])]
    return torch.stack([torch.stack([part.max() for part in row]) for row in rows])


def quantised(weight: Tensor, dtype: torch.dtype, tile: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Stored numbers, and the scales that they are to be multiplied by."""
    scale = grid(weight, tile) / (127 if dtype == INT8 else torch.finfo(dtype).max)
    divided = weight.float() / spread(scale, tile, weight)
    return (divided.round() if dtype == INT8 else divided).to(dtype), scale


def spread(scale: Tensor, tile: tuple[int, int], weight: Tensor) -> Tensor:
    rows, columns = weight.shape
    return scale.repeat_interleave(tile[0], 0)[:rows].repeat_interleave(tile[1], 1)[:, :columns]


def one(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]


def by_rows(weight: Tensor) -> tuple[int, int]:
    return 1, weight.shape[1]


def by_tiles(_weight: Tensor) -> tuple[int, int]:
    return 128, 128


def by_groups(_weight: Tensor) -> tuple[int, int]:
    return 1, 32


Layout = tuple[torch.dtype, Callable[[Tensor], tuple[int, int]], str, Callable[[Tensor], Tensor]]
LAYOUTS: dict[str, Layout] = {
    "ComfyUI": (FP8, one, "{}.scale_weight", lambda scale: scale.view(())),
    "ComfyUI e5m2": (torch.float8_e5m2, one, "{}.weight_scale", lambda scale: scale.view(1)),
    "ComfyUI int8": (INT8, one, "{}.weight_scale", lambda scale: scale.view(())),
    "a scale for each row": (FP8, by_rows, "{}.weight_scale", lambda scale: scale),
    "scales without a dimension": (FP8, by_rows, "{}.weight_scale", lambda scale: scale.view(-1)),
    "tiles": (FP8, by_tiles, "{}.weight_scale_inv", lambda scale: scale),
    "groups of columns": (INT8, by_groups, "{}.weight_scale", lambda scale: scale),
    "int8": (INT8, by_rows, "{}.weight_scale", lambda scale: scale),
    "torchao": (FP8, by_rows, "{}._weight_scale", lambda scale: scale),
}


def rewrite(folder: Path, change: Callable[[Files], Files]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def scaled(layout: Layout) -> tuple[Callable[[Files], Files], Callable[[Files], Files]]:
    """What stores matrices in a layout, and what gives the dense model that this stands for."""
    dtype, tile_of, name_of, shaped = layout
    stored_name = "{}._weight_qdata" if name_of.startswith("{}._") else "{}.weight"

    def store(tensors: Files) -> Files:
        files: Files = {}
        for name, tensor in tensors.items():
            if tensor.dim() != 2:
                files[name] = tensor
                continue
            module = name.removesuffix(".weight")
            stored, scale = quantised(tensor, dtype, tile_of(tensor))
            files[stored_name.format(module)] = stored
            files[name_of.format(module)] = shaped(scale).contiguous()
        return files

    def decode(tensors: Files) -> Files:
        files: Files = {}
        for name, tensor in tensors.items():
            files[name] = tensor
            if tensor.dim() == 2:
                stored, scale = quantised(tensor, dtype, tile_of(tensor))
                files[name] = (stored.float() * spread(scale, tile_of(tensor), tensor)).bfloat16()
        return files

    return store, decode


def logits(model: PreTrainedModel) -> list[Tensor]:
    ids = torch.arange(40).view(1, 40)
    with torch.inference_mode():
        return [model(ids[:, :count]).logits for count in (1, 5, 40)]


@pytest.mark.parametrize(
    ("layout", "config"),
    [*((layout, CONFIG) for layout in LAYOUTS), ("int8", LARGE), ("tiles", LARGE)],
)
def test_scaled_weights_compute_the_bits_of_the_dense_model(
    layout: str, config: LlamaConfig, tmp_path: Path
) -> None:
    """Each of two runs of rows takes its own rows of the scale, and so does a row looked up."""
    store, decode = scaled(LAYOUTS[layout])
    save(tmp_path, config, torch.bfloat16)
    original = load_file(tmp_path / "model.safetensors")
    rewrite(tmp_path, decode)
    expected = logits(reference(tmp_path))
    rewrite(tmp_path, lambda _: store(original))
    for line in LINES:
        model = distorch.load(tmp_path, line)
        assert same(logits(model), expected)
        handle = distorch.handle_of(model)
        assert any("of scales, of 16 weights" in note for note in handle.plan.notes)
        handle.remove()
        assert same(logits(model), expected)


def stored(folder: Path, **changes: Tensor | None) -> Path:
    """A directory with a scale for each row, and some tensors of a module changed."""
    save(folder, CONFIG, torch.bfloat16)
    module = NAME.removesuffix(".weight")

    def change(tensors: Files) -> Files:
        files = scaled(LAYOUTS["a scale for each row"])[0](tensors)
        for leaf, tensor in changes.items():
            files.pop(f"{module}.{leaf}", None)
            if tensor is not None:
                files[f"{module}.{leaf}"] = tensor
        return files

    rewrite(folder, change)
    return folder


def test_a_configuration_that_asks_for_quantised_layers_builds_plain_ones(tmp_path: Path) -> None:
    stored(tmp_path)
    expected = logits(distorch.load(tmp_path, "cpu,*"))
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    path.write_text(json.dumps(config))
    model = distorch.load(tmp_path, "cpu,*")
    assert same(logits(model), expected)


def test_what_concerns_activations_is_left_out_and_noted(tmp_path: Path) -> None:
    said = torch.tensor([*json.dumps({"format": "float8_e4m3fn"}).encode()], dtype=torch.uint8)
    stored(tmp_path, input_scale=torch.tensor(0.5), comfy_quant=said)
    handle = distorch.handle_of(distorch.load(tmp_path, "cpu,*"))
    assert any("up_proj.input_scale is not used" in note for note in handle.plan.notes)


def test_the_plan_of_the_header_has_the_blocks_of_the_loaded_model(tmp_path: Path) -> None:
    stored(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        from_header = cut(tree_from_names(checkpoint))
        assert len(pair_scales(checkpoint).scales) == 16
    plan = distorch.handle_of(distorch.load(tmp_path, "cpu,*")).plan
    assert {placed.block.name: placed.block.nbytes for placed in plan.placements} == {
        block.name: block.nbytes for block in from_header
    }


def test_scales_count_as_weights_on_the_device(tmp_path: Path) -> None:
    stored(tmp_path)
    handle = distorch.handle_of(distorch.load(tmp_path, "cpu,*"))
    rows = sum(
        tensor.shape[0]
        for name, tensor in load_file(tmp_path / "model.safetensors").items()
        if name.endswith("weight_scale")
    )
    assert handle.weight_bytes == handle.plan.bytes_by_tier["cpu"] + 4 * rows


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"weight_scale": torch.ones(7)}, ModelError, [f"{NAME}_scale", "[7]", NAME, "[288, 160]"]),
        ({"weight_scale": torch.ones(160, 1)}, ModelError, ["[160, 1]", "[288, 160]"]),
        ({"weight_scale": None, "weight": torch.ones(288, 160, dtype=INT8)}, ModelError, ["I8"]),
        ({"weight_scale": torch.ones(288, 5, dtype=torch.uint8)}, ModelError, ["U8"]),
        (
            {"comfy_quant": torch.tensor([*b'{"format": "mxfp8"}'], dtype=torch.uint8)},
            ModelError,
            ["'mxfp8'", NAME],
        ),
        (
            {"comfy_quant": torch.tensor([*b"{"], dtype=torch.uint8)},
            FormatError,
            ["comfy_quant", "JSON"],
        ),
    ],
)
def test_what_cannot_be_understood_is_an_error_that_names_it(
    changes: dict[str, Tensor | None], error: type[Exception], words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(error) as caught:
        distorch.load(stored(tmp_path, **changes), "cpu,*")
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_useless_scale_is_warned_of(
    value: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scale = torch.ones(288, 1)
    scale[3] = value
    with caplog.at_level(logging.WARNING, "distorch"):
        distorch.load(stored(tmp_path, weight_scale=scale), "cpu,*")
    assert f"{NAME}_scale is zero, infinite or not a number" in caplog.text
