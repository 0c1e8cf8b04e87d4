"""Files that diffusers loads as its own: every weight there, in the numbers of the file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from distorch.convert import convert
from tests.convert.make import save

diffusers = pytest.importorskip("diffusers")

WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 128,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 256,
    "freq_dim": 256,
    "ffn_dim": 512,
    "num_layers": 2,
}
FLUX = {
    "in_channels": 64,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 128,
    "num_attention_heads": 2,
    "joint_attention_dim": 256,
    "pooled_projection_dim": 256,
    "guidance_embeds": True,
}
_AUTHORS = {  # diffusers' names of Wan's parts, and their authors'
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "attn1": "self_attn",
    "attn2": "cross_attn",
    "to_out.0": "o",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "norm2": "norm3",
}


def authors_name(name: str) -> str:
    """Return what Wan's authors call a tensor of diffusers'."""
    if name == "scale_shift_table":
        return "head.modulation"
    if name.startswith("proj_out."):
        return f"head.head.{name.rpartition('.')[2]}"
    for ours, theirs in _AUTHORS.items():
        name = name.replace(ours, theirs)
    return name.replace("scale_shift_table", "modulation")


def random_model(class_name: str, config: Mapping[str, Any]) -> torch.nn.Module:
    torch.manual_seed(0)
    model: torch.nn.Module = getattr(diffusers, class_name)(**config)
    return model.eval()


def load(path: Path, class_name: str, config: Path, dtype: torch.dtype = torch.float32) -> Any:
    return getattr(diffusers, class_name).from_single_file(
        str(path),
        config=str(config),
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=dtype),
        torch_dtype=dtype,
        local_files_only=True,
    )


def check(model: Any, path: Path, names: Mapping[str, str]) -> None:
    """Assert that each parameter has the file's bytes, or where it is dense the file's numbers."""
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert set(names.values()) == set(stored)
    for name, parameter in model.named_parameters():
        tensor = stored[names[name]]
        if getattr(parameter, "quant_type", None) is not None:
            assert parameter.quant_type == tensor.tensor_type
            assert parameter.as_tensor().numpy().tobytes() == tensor.data.tobytes(), name
        else:
            expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert np.array_equal(parameter.detach().numpy().ravel(), expected.ravel()), name


@pytest.mark.parametrize("form", ["Q4_K", "Q8_0", "BF16"])
@pytest.mark.parametrize("start", ["", "model.diffusion_model."])
def test_wan_in_its_authors_names(form: str, start: str, tmp_path: Path) -> None:
    model = random_model("WanTransformer3DModel", WAN)
    model.save_config(tmp_path / "config")  # type: ignore[operator]
    names = {name: authors_name(name) for name in model.state_dict()}
    weights = {
        start + names[name]: weight.to(torch.bfloat16).contiguous()
        for name, weight in model.state_dict().items()
    }
    out = tmp_path / "wan.gguf"
    done = convert(save(tmp_path / "in.safetensors", weights), out, form)
    assert done.recipe.architecture == "wan"
    loaded = load(out, "WanTransformer3DModel", tmp_path / "config")
    check(loaded, out, names)
    with torch.inference_mode():
        result = loaded(
            hidden_states=torch.randn(1, 4, 1, 4, 4),
            timestep=torch.tensor([500]),
            encoder_hidden_states=torch.randn(1, 8, 256),
            return_dict=False,
        )[0]
    assert result.isfinite().all()


@pytest.mark.parametrize("form", ["Q4_K", "Q5_0"])
def test_flux_in_diffusers_names(form: str, tmp_path: Path) -> None:
    model = random_model("FluxTransformer2DModel", FLUX)
    model.save_pretrained(tmp_path / "transformer", max_shard_size="2MB")  # type: ignore[operator]
    out = tmp_path / "flux.gguf"
    done = convert(tmp_path / "transformer", out, form)
    assert done.recipe.architecture == "FluxTransformer2DModel"
    assert any("ComfyUI does not load" in note for note in done.recipe.notes)
    loaded = load(out, "FluxTransformer2DModel", tmp_path / "transformer")
    assert type(loaded.transformer_blocks[0].attn.to_q).__name__ == "GGUFLinear"
    check(loaded, out, {name: name for name in model.state_dict()})
