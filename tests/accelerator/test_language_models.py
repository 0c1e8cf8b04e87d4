"""Language models and text encoders on several devices at once: the bits of transformers' own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import distorch
from distorch import vgpu
from tests.accelerator.make import MACHINE
from tests.integrations.huggingface.test_architectures import MODELS, outputs, same, saved

LINE = "vgpu:0,20%;vgpu:1,40%;cpu,40%"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("architectures")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_three_memories_computes_the_bits_of_the_cpu(name: str, folder: Path) -> None:
    path, expected = saved(name, torch.bfloat16, folder)
    with vgpu.settings(races="raise"):
        model = distorch.load(path, LINE, machine=MACHINE)
        handle = distorch.handle_of(model)
        assert set(handle.plan.bytes_by_tier) == {"vgpu:0", "vgpu:1", "cpu"}
        found = [tensor.cpu() for tensor in outputs(model, "vgpu:0")]
        assert same(found, expected)
        handle.remove()


@pytest.mark.parametrize("weight_dtype", ["fp8_e4m3fn", "q8_0"])
@pytest.mark.parametrize("name", ["Gemma3ForCausalLM", "T5EncoderModel"])
def test_converted_weights_compute_the_bits_of_the_cpu(
    name: str, weight_dtype: str, folder: Path
) -> None:
    path, _ = saved(name, torch.bfloat16, folder)
    expected = outputs(distorch.load(path, "cpu,*", weight_dtype=weight_dtype))
    model = distorch.load(path, LINE, machine=MACHINE, weight_dtype=weight_dtype)
    assert same([tensor.cpu() for tensor in outputs(model, "vgpu:0")], expected)
    distorch.handle_of(model).remove()
