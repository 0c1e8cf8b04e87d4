"""Model directories: ours equals transformers' own reading of them, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

import distorch
from distorch.errors import DistorchError, ModelError
from tests.integrations.make import leaving_nothing_open

ALLOCATIONS = ["cpu,*", "cpu,50%;disk,50%", "cpu,0b;disk,*"]
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "tied": LlamaConfig(vocab_size=16384 + 128, tie_word_embeddings=True, **SMALL),
    "untied": LlamaConfig(vocab_size=17408, tie_word_embeddings=False, **SMALL),
    "gemma3": Gemma3TextConfig(
        vocab_size=320, sliding_window=8, **SMALL | {"num_hidden_layers": 7}
    ),
    "llama 3's rotation": LlamaConfig(
        vocab_size=320,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        **SMALL,
    ),
    "qwen3": Qwen3Config(vocab_size=320, **SMALL),
    "gpt2": GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4, n_positions=128),
}


def save(folder: Path, config: PretrainedConfig, dtype: torch.dtype, shard: str = "5GB") -> None:
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder, max_shard_size=shard)


def reference(folder: Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """Transformers' own model, its weights moved from the mapped file to aligned memory."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return cast("PreTrainedModel", model)


def outputs(model: PreTrainedModel) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    found = []
    with torch.inference_mode():
        for count in (1, 5, 40):
            ids = torch.randint(3, 320, (1, count), generator=generator)
            found.append(model(ids).logits)
        made = model.generate(  # type: ignore[operator]
            ids[:, :5],
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return [*found, made.sequences, torch.stack(made.logits)]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shard", ["5GB", "200KB"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_tokens_are_transformers_bits_in_every_allocation(
    name: str, shard: str, tmp_path: Path
) -> None:
    save(tmp_path, CONFIGS[name], torch.bfloat16, shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard != "5GB")
    oracle = reference(tmp_path)
    expected = outputs(oracle)
    assert expected[0].dtype == torch.bfloat16
    for line in ALLOCATIONS:
        model = distorch.load(tmp_path, line)
        assert type(model) is type(oracle)
        assert same(outputs(model), expected), line
        handle = distorch.handle_of(model)
        assert handle.weight_bytes == handle.plan.bytes_by_tier["cpu"] + handle.plan.ring.nbytes
        handle.remove()
        assert same(outputs(model), expected), line


@pytest.mark.parametrize("name", CONFIGS)
def test_buffers_and_settings_are_transformers(name: str, tmp_path: Path) -> None:
    save(tmp_path, CONFIGS[name], torch.bfloat16)
    oracle, model = reference(tmp_path), distorch.load(tmp_path, "cpu,0b;disk,*")
    buffers = dict(model.named_buffers())
    for key, value in oracle.named_buffers():
        found = buffers.pop(key)
        assert found.dtype == value.dtype, key
        assert torch.equal(found, value), key
    assert not buffers
    assert not any(p.is_meta for p in model.parameters())
    assert model.dtype == oracle.dtype
    assert not model.training
    assert model.generation_config.to_dict() == oracle.generation_config.to_dict()
    distorch.handle_of(model).remove()


@pytest.mark.parametrize(
    ("stored", "configured"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
def test_weights_stored_in_another_dtype_compute_as_transformers_casts_them(
    stored: torch.dtype, configured: torch.dtype, tmp_path: Path
) -> None:
    save(tmp_path, CONFIGS["qwen3"], stored)
    config = json.loads((tmp_path / "config.json").read_text())
    config["dtype"] = str(configured).removeprefix("torch.")
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = outputs(reference(tmp_path, configured))
    for line in ALLOCATIONS:
        model = distorch.load(tmp_path, line)
        assert same(outputs(model), expected)
        distorch.handle_of(model).remove()


def test_a_single_file_and_its_directory_are_the_same_model(tmp_path: Path) -> None:
    save(tmp_path, CONFIGS["qwen3"], torch.bfloat16)
    expected = outputs(reference(tmp_path))
    model = distorch.load(tmp_path / "model.safetensors", "cpu,0b;disk,*")
    assert same(outputs(model), expected)
    distorch.handle_of(model).remove()


def test_the_generation_settings_beside_the_weights_are_honoured(tmp_path: Path) -> None:
    save(tmp_path, CONFIGS["qwen3"], torch.bfloat16)
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"temperature": 0.25, "top_k": 7, "do_sample": True, "eos_token_id": [5, 6]})
    )
    model = distorch.load(tmp_path, "cpu,*")
    found = model.generation_config
    assert (found.temperature, found.top_k, found.do_sample) == (0.25, 7, True)
    assert found.eos_token_id == [5, 6]
    assert found.to_dict() == reference(tmp_path).generation_config.to_dict()
    distorch.handle_of(model).remove()


def test_a_model_that_is_not_a_language_model_keeps_its_buffers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    oracle = BertModel(config).eval()
    oracle.save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    model = distorch.load(tmp_path, "cpu,0b;disk,*")
    with torch.inference_mode():
        assert torch.equal(model(ids).last_hidden_state, oracle(ids).last_hidden_state)
    buffers = dict(model.named_buffers())
    for key, value in oracle.named_buffers():
        assert torch.equal(buffers[key], value), key
    distorch.handle_of(model).remove()


def rewrite(folder: Path, **config: Any) -> None:
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(found | config))


def resize(folder: Path, num_layers: int) -> None:
    rewrite(folder, num_hidden_layers=num_layers, layer_types=["full_attention"] * num_layers)


def edit_tensors(folder: Path, **tensors: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    held = load_file(path) | tensors
    save_file({name: t for name, t in held.items() if t is not None}, path)


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda d: (d / "config.json").unlink(), r"no config\.json"),
        (lambda d: (d / "config.json").write_text("{"), r"config\.json"),
        (lambda d: (d / "config.json").write_text("[]"), r"config\.json"),
        (lambda d: rewrite(d, model_type="unheard-of", architectures=["X"]), "unheard-of"),
        (lambda d: rewrite(d, num_attention_heads=0), None),
        (lambda d: resize(d, 4), r"lacks model\.layers\.3"),
        (lambda d: resize(d, 2), r"holds model\.layers\.2"),
        (lambda d: rewrite(d, num_hidden_layers=2), "layer_types"),
        (lambda d: rewrite(d, intermediate_size=128), "shape"),
        (lambda d: rewrite(d, dtype="banana"), None),
        (lambda d: edit_tensors(d, **{NORM: None}), f"lacks {NORM}"),
        (lambda d: edit_tensors(d, **{NORM: torch.ones(65)}), f"{NORM} has shape"),
        (lambda d: edit_tensors(d, extra=torch.ones(3)), "holds extra"),
        (lambda d: edit_tensors(d, **{NORM: torch.ones(64, dtype=torch.int64)}), "I64"),
        (
            lambda d: (d / "generation_config.json").write_text("{not json"),
            r"generation_config\.json",
        ),
    ],
    ids=range(15),
)
@pytest.mark.parametrize("line", ["cpu,*", "cpu,0b;disk,*"])
def test_a_directory_that_cannot_be_loaded_says_why_before_anything_runs(
    spoil: Any, says: str | None, line: str, tmp_path: Path
) -> None:
    save(tmp_path, CONFIGS["qwen3"], torch.bfloat16)
    spoil(tmp_path)
    with leaving_nothing_open(), pytest.raises(DistorchError, match=says) as caught:
        distorch.load(tmp_path, line)
    assert caught.value.exit_code == 2
    assert caught.value.hint


def test_code_in_a_directory_is_not_run(tmp_path: Path) -> None:
    save(tmp_path, CONFIGS["qwen3"], torch.bfloat16)
    flag = tmp_path / "was run"
    (tmp_path / "evil.py").write_text(f"open({str(flag)!r}, 'w')\nclass E: pass\n")
    rewrite(tmp_path, model_type="evil", auto_map={"AutoConfig": "evil.E"})
    with pytest.raises(ModelError):
        distorch.load(tmp_path, "cpu,*")
    assert not flag.exists()


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    save(tmp_path, CONFIGS["tied"], torch.bfloat16, "200KB")
    shard = max(tmp_path.glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(DistorchError, match=shard.name):
        distorch.load(tmp_path, "cpu,*")


def test_tied_weights_are_one_weight(tmp_path: Path) -> None:
    save(tmp_path, CONFIGS["tied"], torch.bfloat16)
    model = distorch.load(tmp_path, "cpu,0b;disk,*")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    stored = sum(t.nbytes for t in load_file(tmp_path / "model.safetensors").values())
    planned = distorch.handle_of(model).plan.model_bytes
    assert stored <= planned < 1.01 * stored
    distorch.handle_of(model).remove()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model.lm_head.weight, torch.nn.Parameter)


def test_rebudget_reads_the_file_again_and_a_file_that_is_gone_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save(folder, CONFIGS["qwen3"], torch.bfloat16)
    expected = outputs(reference(folder))
    model = distorch.load(folder, "cpu,0b;disk,*")
    handle = distorch.handle_of(model)
    shutil.rmtree(folder)  # open files outlive their names
    for line in ALLOCATIONS:
        handle.rebudget(line)
        assert same(outputs(model), expected)
    handle.remove()
    with pytest.raises(DistorchError):
        distorch.load(folder, "cpu,*")


def test_a_rebudget_that_fails_leaves_a_loaded_model_that_computes(tmp_path: Path) -> None:
    save(tmp_path, CONFIGS["qwen3"], torch.bfloat16)
    expected = outputs(reference(tmp_path))
    model = distorch.load(tmp_path, "cpu,0b;disk,*")
    handle = distorch.handle_of(model)
    for line in ("cpu,2gbb", "cpu,0b;disk:/nowhere/at/all,*"):
        with pytest.raises(DistorchError):
            handle.rebudget(line)
        assert same(outputs(model), expected)
    handle.remove()


def test_the_configuration_is_the_one_in_the_directory(tmp_path: Path) -> None:
    save(tmp_path, CONFIGS["llama 3's rotation"], torch.bfloat16)
    model = distorch.load(tmp_path, "cpu,*")
    expected = AutoConfig.from_pretrained(tmp_path)
    assert model.config.rope_parameters == expected.rope_parameters
    distorch.handle_of(model).remove()
