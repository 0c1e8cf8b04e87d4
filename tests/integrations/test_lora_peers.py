"""LoRAs of others on distributed models: peft's and diffusers' own loading, and their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import distorch
from tests.integrations.huggingface.make import CASES, write
from tests.integrations.loras import LINES, MACHINE, RANK, Net, distributed, run

pytestmark = pytest.mark.usefixtures("seed", "many_blocks")


def randomise(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn_like(parameter)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
@pytest.mark.filterwarnings("ignore:.*save_embedding_layers")
@pytest.mark.parametrize("line", LINES)
def test_a_gguf_model_takes_the_lora_of_peft(line: str, tmp_path: Path) -> None:
    """Packed weights stay packed, and the sum is peft's on the dense model."""
    path = tmp_path / "model.gguf"
    write(path, CASES["llama"])
    dense = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32, local_files_only=True
    ).eval()
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj", "embed_tokens", "lm_head"])
    wrapped = peft.get_peft_model(dense, config)
    randomise(wrapped)
    wrapped.save_pretrained(str(tmp_path / "lora"), save_embedding_layers=False)
    ids = torch.arange(3, 20)[None]
    model = distorch.load(path, line)
    handle = distorch.handle_of(model)
    with torch.inference_mode():
        expected, plain = wrapped(ids).logits, model(ids).logits
        lora = handle.add_lora(tmp_path / "lora", strict=True)
        assert len(lora.targets) == 6
        found = model(ids).logits
        assert torch.equal(model(ids).logits, found)
        assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
        assert not torch.allclose(found, plain)
        lora.remove()
        assert torch.equal(model(ids).logits, plain)


INPUTS = {
    "hidden_states": (1, 16, 4),
    "encoder_hidden_states": (1, 8, 32),
    "pooled_projections": (1, 32),
    "timestep": (1,),
    "img_ids": (16, 3),
    "txt_ids": (8, 3),
}


def flux() -> Any:
    """A small transformer of diffusers."""
    torch.manual_seed(1)
    kind: Any = diffusers.FluxTransformer2DModel
    return kind(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    ).eval()


def test_a_file_of_diffusers_and_its_own_loading(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(2)
    inputs = {name: torch.rand(shape, generator=random) for name, shape in INPUTS.items()}

    def out(model: nn.Module) -> Tensor:
        with torch.inference_mode():
            result = model(**inputs, return_dict=False)[0]
        assert isinstance(result, Tensor)
        return result

    dense = flux()
    targets = ["to_q", "to_out.0", "proj_out"]
    dense.add_adapter(
        peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, rank_pattern={"proj_out": 2})
    )
    randomise(dense)
    dense.save_lora_adapter(tmp_path)
    model = flux()
    plain = out(model)
    handle = distributed(model, LINES[1])
    lora = handle.add_lora(tmp_path, strict=True)
    assert torch.allclose(out(model), out(dense), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(out(model), plain)
    lora.remove()
    assert torch.equal(out(model), plain)
    (file,) = tmp_path.iterdir()
    model.load_lora_adapter(tmp_path, prefix=None, weight_name=file.name)
    before = handle.stats().num_unplanned
    assert torch.equal(out(model), out(dense))
    assert handle.stats().num_unplanned == before
    handle.remove()
    assert torch.equal(out(model), out(dense))


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("use_dora", [False, True])
def test_peft_itself_works_on_a_distributed_module(line: str, *, use_dora: bool) -> None:
    """Its wrappers call the modules that carry our hooks; DoRA reads their weights besides."""
    config = peft.LoraConfig(
        r=RANK, target_modules=["conv", "layers.0", "layers.2"], use_dora=use_dora
    )
    tensors: dict[str, Tensor] = {}
    results = []
    for distribute in (False, True):
        torch.manual_seed(3)
        module = Net()
        handle = distributed(module, line) if distribute else None
        wrapped = peft.inject_adapter_in_model(config, module)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                tensors.setdefault(name, 0.1 * torch.randn_like(parameter))
                parameter.data = tensors[name].clone()
        results.append(run(wrapped))
    assert handle is not None
    assert torch.equal(*results)
    before = handle.stats()
    assert torch.equal(run(wrapped), results[0])
    after = handle.stats()
    if not use_dora:
        assert after.num_unplanned == before.num_unplanned
    handle.rebudget("cpu,20%;disk,80%", machine=MACHINE)
    assert torch.equal(run(wrapped), results[0])
    handle.remove()
    assert torch.equal(run(wrapped), results[0])
