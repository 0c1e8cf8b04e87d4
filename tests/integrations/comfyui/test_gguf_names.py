"""Names of text encoders, against the maps of the package that writes GGUF files."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from distorch.errors import FormatError, ModelError
from distorch.formats import TensorInfo
from distorch.integrations.comfyui.gguf_names import encoder_names, head_counts, shapes

ARCH = gguf.MODEL_ARCH
T5 = [
    "SelfAttention.q",
    "SelfAttention.k",
    "SelfAttention.v",
    "SelfAttention.o",
    "SelfAttention.relative_attention_bias",
]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
DECODER = [
    "input_layernorm",
    *(f"self_attn.{name}" for name in ATTENTION),
    "post_attention_layernorm",
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]
NORMS = ["self_attn.q_norm", "self_attn.k_norm"]
GEMMA = ["pre_feedforward_layernorm", "post_feedforward_layernorm"]


def t5_names(feed_forward: list[str]) -> list[str]:
    layer = [f"layer.0.{name}" for name in [*T5, "layer_norm"]]
    layer += [f"layer.1.{name}" for name in ["layer_norm", *feed_forward]]
    return [
        "shared",
        "encoder.final_layer_norm",
        *(f"encoder.block.{index}.{name}" for index in range(12) for name in layer),
    ]


def decoder_names(extra: list[str], *, head: bool = True) -> list[str]:
    outside = ["model.embed_tokens", "model.norm", *(["lm_head"] if head else [])]
    inside = [*DECODER, *extra]
    return outside + [f"model.layers.{index}.{name}" for index in range(12) for name in inside]


GATED = [f"DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")]
CASES = [
    ("t5", ARCH.T5, t5_names(GATED)),
    ("t5encoder", ARCH.T5ENCODER, t5_names(GATED)),
    ("t5", ARCH.T5, t5_names(["DenseReluDense.wi", "DenseReluDense.wo"])),
    ("llama", ARCH.LLAMA, decoder_names([])),
    ("qwen2", ARCH.QWEN2, decoder_names([])),
    ("qwen2vl", ARCH.QWEN2VL, decoder_names([])),
    ("qwen3", ARCH.QWEN3, decoder_names(NORMS)),
    ("gemma2", ARCH.GEMMA2, decoder_names(GEMMA, head=False)),
    ("gemma3", ARCH.GEMMA3, decoder_names([*NORMS, *GEMMA], head=False)),
]


@pytest.mark.parametrize(("name", "architecture", "theirs"), CASES)
def test_names_are_those_that_the_converter_started_from(
    name: str, architecture: gguf.MODEL_ARCH, theirs: list[str]
) -> None:
    known = gguf.get_tensor_name_map(architecture, 12)
    stored = {f"{known.get_name(each)}.weight": f"{each}.weight" for each in theirs}
    assert "None.weight" not in stored
    assert encoder_names(name, stored) == stored


def test_an_unknown_architecture_is_refused_unless_it_uses_comfyuis_names() -> None:
    with pytest.raises(ModelError, match="'mamba'"):
        encoder_names("mamba", ["blk.0.ssm_in.weight"])
    plain = "text_model.encoder.layers.0.mlp.fc1.weight"
    assert encoder_names("", [plain]) == {plain: plain}


@pytest.mark.parametrize("given", [[2, 3], "abc", 7, [-1, -24]])
def test_a_shape_that_does_not_fit_is_refused(given: object) -> None:
    info = TensorInfo("w", "F32", (24,), 0, 96, Path("a.gguf"))
    with pytest.raises(FormatError, match=r"a\.gguf: w of shape"):
        shapes({"w": info}, {"comfy.gguf.orig_shape.w": given})


def test_heads_that_are_no_number_are_refused() -> None:
    with pytest.raises(FormatError, match="head_count"):
        head_counts({"general.architecture": "llama", "llama.attention.head_count": [8]})
