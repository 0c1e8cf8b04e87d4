"""Language models and text encoders of many architectures: the bits of transformers' own.

Each is tiny and random, as transformers saves it. The runs in which large weights are cut, long
texts and files that are spoilt are in the tests beside this one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import (
    BertConfig,
    CLIPTextConfig,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3Config,
    T5Config,
    UMT5Config,
)

import distorch
from distorch.errors import ModelError

ALLOCATIONS = ["cpu,*", "cpu,50%;disk,50%", "cpu,10%;disk,*", "cpu,0b;disk,*"]
DTYPES = [torch.float32, torch.bfloat16]
VOCABULARY, IMAGE = 320, 300
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
DECODER = SIZES | {"num_key_value_heads": 2}
T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 3,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
EYES = {"hidden_size": 32, "intermediate_size": 48, "patch_size": 14}
QWEN_VL = Qwen2_5_VLConfig(
    text_config=DECODER
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
    vision_config=EYES
    | {
        "depth": 2,
        "num_heads": 2,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
        "window_size": 56,
    },
    image_token_id=IMAGE,
    video_token_id=IMAGE + 1,
    vision_start_token_id=IMAGE + 2,
    vision_end_token_id=IMAGE + 3,
)
GEMMA = DECODER | {"head_dim": 16, "sliding_window": 8}
GEMMA_WITH_EYES = Gemma3Config(
    text_config=GEMMA,
    vision_config=EYES | {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56},
    mm_tokens_per_image=4,
    image_token_index=IMAGE,
)
MODELS: dict[str, PretrainedConfig] = {  # by the class of transformers
    "LlamaForCausalLM": LlamaConfig(**DECODER),
    "Qwen2ForCausalLM": Qwen2Config(**DECODER),
    "Qwen3ForCausalLM": Qwen3Config(**DECODER, head_dim=16),
    "Gemma3ForCausalLM": Gemma3TextConfig(**GEMMA),
    "MistralForCausalLM": MistralConfig(**DECODER, sliding_window=8),
    "PhiForCausalLM": PhiConfig(**DECODER),
    "Phi3ForCausalLM": Phi3Config(**DECODER),
    "T5EncoderModel": T5Config(**T5, feed_forward_proj="gated-gelu"),
    "T5ForConditionalGeneration": T5Config(**T5),
    "UMT5EncoderModel": UMT5Config(**T5),
    "CLIPTextModel": CLIPTextConfig(**SIZES, eos_token_id=2),
    "CLIPTextModelWithProjection": CLIPTextConfig(**SIZES, eos_token_id=2, projection_dim=32),
    "BertModel": BertConfig(**SIZES),
    "Qwen2_5_VLForConditionalGeneration": QWEN_VL,  # the text encoder of Qwen-Image
    "Gemma3ForConditionalGeneration": GEMMA_WITH_EYES,
}
_saved: dict[tuple[str, torch.dtype], tuple[Path, list[Tensor]]] = {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("architectures")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """These models are too small for two, and threads that wait for a busy machine take long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def saved(name: str, dtype: torch.dtype, folder: Path) -> tuple[Path, list[Tensor]]:
    """A model's directory, and what transformers computes with it: each made once."""
    if (name, dtype) not in _saved:
        torch.manual_seed(4)
        model_class = getattr(transformers, name)
        model = model_class._from_config(MODELS[name], dtype=dtype)
        for parameter in model.parameters():  # norms and biases too
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
        path = folder / f"{name} {dtype}"
        model.save_pretrained(path)
        oracle = model_class.from_pretrained(path, dtype=dtype, local_files_only=True).eval()
        for parameter in oracle.parameters():  # from the mapped file to aligned memory
            parameter.data = parameter.data.clone()
        _saved[name, dtype] = path, outputs(oracle)
    return _saved[name, dtype]


def outputs(model: PreTrainedModel, device: str = "cpu") -> list[Tensor]:
    """Logits or hidden states, all layers' too, of two texts of which one is padded; tokens."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, IMAGE, (2, 20), generator=generator).to(device)
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    asked: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    with torch.inference_mode():
        more = {"decoder_input_ids": ids[:, :6]} if _has_decoder(model) else {}
        found = tensors_in(model(**asked, **more, output_hidden_states=True).to_tuple())
        if model.can_generate():
            made = model.generate(  # type: ignore[operator]
                input_ids=ids[:1, :9], max_new_tokens=5, min_new_tokens=5, do_sample=False
            )
            found.append(made)
    return found


def _has_decoder(model: PreTrainedModel) -> bool:
    return bool(model.config.is_encoder_decoder) and model.can_generate()


def tensors_in(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    return [t for each in values for t in tensors_in(each)] if isinstance(values, tuple) else []


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    """Whether they have the same bits, and say something."""
    assert all(bool(tensor.isfinite().all()) for tensor in second)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_transformers_bits_in_every_allocation(
    name: str, dtype: torch.dtype, folder: Path
) -> None:
    path, expected = saved(name, dtype, folder)
    for line in ALLOCATIONS:
        model = distorch.load(path, line)
        assert type(model).__name__ == name
        assert same(outputs(model), expected), line
        assert distorch.handle_of(model).stats().streamed_bytes > 0 or line == "cpu,*"


@pytest.mark.parametrize("weight_dtype", ["fp8_e4m3fn", "q8_0"])
@pytest.mark.parametrize("name", MODELS)
def test_converted_weights_give_the_bits_of_resident_ones(
    name: str, weight_dtype: str, folder: Path
) -> None:
    path, dense = saved(name, torch.bfloat16, folder)
    first, *others = ALLOCATIONS
    expected = outputs(distorch.load(path, first, weight_dtype=weight_dtype))
    assert not torch.equal(expected[0], dense[0]), "weights were converted"
    for line in others:
        assert same(outputs(distorch.load(path, line, weight_dtype=weight_dtype)), expected), line


@pytest.mark.parametrize("line", ALLOCATIONS)
def test_a_picture_is_seen_with_the_same_bits(line: str, folder: Path) -> None:
    """As Qwen-Image-Edit shows its encoder the picture to edit."""
    path, _ = saved("Qwen2_5_VLForConditionalGeneration", torch.float32, folder)
    oracle = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(path).eval()
    for parameter in oracle.parameters():
        parameter.data = parameter.data.clone()
    generator = torch.Generator().manual_seed(6)
    ids = torch.tensor([[7, IMAGE + 2, *[IMAGE] * 4, IMAGE + 3, 8, 9]])
    asked = {
        "input_ids": ids,
        "pixel_values": torch.randn(16, 3 * 2 * 14 * 14, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "output_hidden_states": True,
    }
    with torch.inference_mode():
        expected = tensors_in(oracle(**asked).to_tuple())
        assert same(tensors_in(distorch.load(path, line)(**asked).to_tuple()), expected)


def test_experts_in_files_of_their_own_are_refused(tmp_path: Path) -> None:
    config = transformers.Qwen3MoeConfig(**DECODER, num_experts=4, moe_intermediate_size=32)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="fused experts are not read yet"):
        distorch.load(tmp_path, "cpu,*")
