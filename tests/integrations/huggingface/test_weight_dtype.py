"""Weights in another format than the file's: converted as they are read, never all in memory."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

import distorch
from distorch.errors import AllocationError, ModelError
from tests.cli.make import environment, invoke
from tests.integrations.huggingface.test_safetensors import SMALL, reference, same, save
from tests.integrations.huggingface.test_scales import LARGE, LINES, Files, logits, rewrite, stored
from tests.plan_strategies import roomy

MIB = 1 << 20


def brought_to(weight_dtype: str, weight: Tensor) -> Tensor:
    """A matrix with the values that its converted form stands for."""
    dense = {"fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
    dense |= {"fp16": torch.float16, "f32": torch.float32}
    if weight_dtype in dense:
        return weight.to(dense[weight_dtype]).to(weight.dtype)
    kind = gguf.GGMLQuantizationType[weight_dtype.upper()]
    packed = gguf.quants.quantize(weight.float().numpy(), kind)
    return torch.from_numpy(gguf.quants.dequantize(packed, kind)).to(weight.dtype)


@pytest.mark.parametrize("weight_dtype", ["fp8_e4m3fn", "fp8_e5m2", "fp16", "q8_0", "Q5_1"])
def test_the_model_computes_the_bits_of_the_converted_weights(
    weight_dtype: str, tmp_path: Path
) -> None:
    save(tmp_path, LARGE, torch.bfloat16)
    models = {line: distorch.load(tmp_path, line, weight_dtype=weight_dtype) for line in LINES}
    found = {line: logits(model) for line, model in models.items()}

    def convert(tensors: Files) -> Files:
        return {
            name: brought_to(weight_dtype, tensor) if tensor.dim() == 2 else tensor
            for name, tensor in tensors.items()
        }

    del models
    rewrite(tmp_path, convert)
    expected = logits(reference(tmp_path))
    assert all(same(each, expected) for each in found.values())


def test_a_scaled_file_loses_its_scales_on_the_way(tmp_path: Path) -> None:
    plain = logits(distorch.load(stored(tmp_path), "cpu,*", compute_dtype="float32"))
    model = distorch.load(tmp_path, LINES[-1], weight_dtype="f32", compute_dtype=torch.float32)
    assert same(logits(model), plain)
    assert not any("scales" in note for note in distorch.handle_of(model).plan.notes)


def test_what_rests_on_disk_is_the_converted_copy(tmp_path: Path) -> None:
    """Nothing is read from the model's file once it is loaded."""
    save(tmp_path, LARGE, torch.bfloat16)
    model = distorch.load(tmp_path, LINES[-1], weight_dtype="fp8_e4m3fn")
    expected = logits(model)
    path = tmp_path / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes(bytes(size))
    assert same(logits(model), expected)


@pytest.mark.parametrize("compute_dtype", ["float32", torch.bfloat16, "fp16"])
def test_the_compute_dtype_is_a_choice(compute_dtype: str | torch.dtype, tmp_path: Path) -> None:
    save(tmp_path, LlamaConfig(vocab_size=320, **SMALL), torch.bfloat16)
    wanted = {"float32": torch.float32, "fp16": torch.float16}.get(str(compute_dtype))
    models = [distorch.load(tmp_path, line, compute_dtype=compute_dtype) for line in LINES]
    results = [logits(model) for model in models]
    assert results[0][0].dtype == (wanted or torch.bfloat16)
    assert same(results[0], results[1])
    assert same(results[0], logits(reference(tmp_path, results[0][0].dtype)))


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"weight_dtype": "q9_0"}, ["'q9_0'", "Q8_0"]),
        ({"weight_dtype": "IQ2_XXS"}, ["IQ2_XXS", "which weights matter"]),
        ({"compute_dtype": "int8"}, ["'int8'", "bfloat16"]),
        ({"compute_dtype": torch.int8}, ["torch.int8"]),
    ],
)
def test_a_format_that_is_none_is_an_error(
    choice: dict[str, str], words: list[str], tmp_path: Path
) -> None:
    config = LlamaConfig(vocab_size=320, **SMALL | {"hidden_size": 256})
    save(tmp_path, config, torch.bfloat16)
    with pytest.raises(ModelError) as caught:
        distorch.load(tmp_path, "cpu,*", **choice)  # type: ignore[arg-type]
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(("value", "said"), [(float("nan"), "nan"), (1e6, "999424.0")])
def test_weights_that_the_format_cannot_hold_are_warned_of(
    value: float, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, LlamaConfig(vocab_size=320, **SMALL), torch.bfloat16)
    name = "model.layers.1.mlp.up_proj.weight"

    def spoil(tensors: Files) -> Files:
        tensors[name][3, 3] = value
        return tensors

    rewrite(tmp_path, spoil)
    with caplog.at_level(logging.WARNING, "distorch"):
        distorch.load(tmp_path, "cpu,*", weight_dtype="fp8_e4m3fn")
    assert [record.getMessage() for record in caplog.records] == [
        f"{name} holds weights ({said}) that F8_E4M3 cannot hold"
    ]


@pytest.mark.parametrize("weight_dtype", ["fp8_e5m2", "Q8_0"])
def test_the_command_plans_what_is_loaded(weight_dtype: str, tmp_path: Path) -> None:
    save(tmp_path, LARGE, torch.bfloat16)
    line = "cpu,1mb;disk,*"
    done = invoke("plan", tmp_path, "--allocation", line, "--weight-dtype", weight_dtype, "--json")
    assert done.code == 0, done.err
    plan = distorch.handle_of(distorch.load(tmp_path, line, weight_dtype=weight_dtype)).plan
    assert done.json["plan"]["placements"] == json.loads(plan.to_json())["placements"]
    refused = invoke("plan", "wan-14b", "--weight-dtype", "fp8_e4m3fn")
    assert refused.code == 2
    assert "--format fp8_e4m3fn" in refused.err


def test_a_converted_copy_needs_room_on_disk(tmp_path: Path) -> None:
    """The file itself lies there already; its copy does not."""
    machine = roomy("cpu", "disk")
    disk = machine.tier("disk")
    full = machine.replace_tier(replace(disk, free_bytes=MIB))
    save(tmp_path, LARGE, torch.bfloat16)
    distorch.load(tmp_path, LINES[-1], machine=full)
    with pytest.raises(AllocationError):
        distorch.load(tmp_path, LINES[-1], weight_dtype="fp8_e4m3fn", machine=full)


PEAK = """
import json, sys
from pathlib import Path

def high_water():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) << 10

import torch, transformers, gguf, libgguf, distorch
import distorch.integrations.huggingface.safetensors_model
small, path, line, weight_dtype = sys.argv[1:]
tokens = torch.arange(8).view(1, 8)
with torch.inference_mode():
    distorch.load(small, "cpu,*", weight_dtype=weight_dtype)(tokens)
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water()
    model = distorch.load(path, line, weight_dtype=weight_dtype)
    for _ in range(2):
        model(tokens)
plan = distorch.handle_of(model).plan
print(json.dumps([high_water() - before, plan.bytes_by_tier["cpu"] + plan.ring.nbytes]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("line", ["cpu,*", "cpu,16mb;disk,*"])
@pytest.mark.parametrize("weight_dtype", ["fp8_e4m3fn", "q8_0"])
def test_no_whole_copy_is_in_memory(
    weight_dtype: str, line: str, tmp_path: Path, big: Path
) -> None:
    """A model of 240 MiB is loaded and computes: the peak is the plan's memory and 64 MiB.

    That is beside a process that has loaded a small one, so without what the imports take.
    """
    save(tmp_path, LlamaConfig(vocab_size=320, **SMALL), torch.bfloat16)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path, big, line, weight_dtype],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    peak, planned = json.loads(done.stdout.splitlines()[-1])
    assert (big / "model.safetensors").stat().st_size > 200 * MIB
    assert peak < planned + 64 * MIB, (peak / MIB, planned / MIB)


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("big")
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
    save(folder, LlamaConfig(vocab_size=8192, **SMALL | sizes), torch.bfloat16)
    return folder
