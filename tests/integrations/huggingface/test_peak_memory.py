"""What loading and computing take of memory, beside what transformers takes for its own class."""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import distorch
from distorch.formats import Checkpoint
from distorch.machine import Machine
from tests.cli.make import environment
from tests.integrations.huggingface.make import CASES, write
from tests.integrations.huggingface.test_safetensors import SMALL, save

MIB = 1 << 20
LOADING, COMPUTING = 24 * MIB, 48 * MIB
"""Beside weights and ring: our modules, pages of torch's code, buffers of reads, activations."""
OURS = {"distorch", "platformdirs", "psutil", "tomli_w"}

MEASURED = """
import json, re, sys
from pathlib import Path

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

import torch, transformers
import transformers.models.llama.modeling_llama
known, before = set(sys.modules), peak()

import distorch
model = distorch.load(sys.argv[1], sys.argv[2])
loading, imported = peak() - before, set(sys.modules) - known
with torch.inference_mode():
    for _ in range(2):
        model(torch.arange(8).view(1, 8))
plan = distorch.handle_of(model).plan
print(json.dumps({
    "loading": loading,
    "computing": peak() - before,
    "resting": plan.bytes_by_tier["cpu"],
    "ring": plan.ring.nbytes,
    "imported": sorted({name.partition(".")[0] for name in imported} - sys.stdlib_module_names),
}))
"""


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 350 MiB, all zeros, that takes no disk."""
    folder = tmp_path_factory.mktemp("sparse")
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 14}
    config = LlamaConfig(vocab_size=8192, dtype="bfloat16", **SMALL | sizes)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        weights = dict(LlamaForCausalLM(config).named_parameters())
    header: dict[str, Any] = {}
    end = 0
    for name, weight in weights.items():
        begin, end = end, end + 2 * math.prod(weight.shape)
        header[name] = {"dtype": "BF16", "shape": [*weight.shape], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("line", "is_cached"),
    [("cpu,*", False), ("cpu,32mb;disk,*", False), ("cpu,32mb;disk,*", True)],
)
def test_the_peak_is_the_plans_memory_and_little_else(
    line: str, *, is_cached: bool, sparse: Path
) -> None:
    file = sparse / "model.safetensors"
    assert file.stat().st_size > 350 * MIB
    if is_cached:  # weights on disk are then used in place
        shutil.copyfile(file, os.devnull)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, sparse, line],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found["imported"]) <= OURS, "imported, though the model's class does without"
    in_mib = {key: round(value / MIB) for key, value in found.items() if key != "imported"}
    assert found["loading"] < found["resting"] + LOADING, in_mib
    assert found["computing"] < found["resting"] + found["ring"] + COMPUTING, in_mib


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_a_header_is_let_go_of_before_the_weights_come(
    kind: str, tmp_path: Path, machine: Machine
) -> None:
    """A vocabulary of 260 thousand tokens is 9 MiB of a GGUF's header."""
    path = tmp_path / "model.gguf"
    if kind == "gguf":
        write(path, CASES["qwen2"])
    else:
        save(tmp_path, LlamaConfig(vocab_size=320, **SMALL), torch.bfloat16)
        path = tmp_path

    def headers() -> int:
        return sum(type(found) is Checkpoint for found in gc.get_objects())

    before, during = headers(), []
    distorch.load(path, "cpu,*", machine=machine, progress=lambda *_: during.append(headers()))
    assert during
    assert max(during) <= before
