"""Which model a file is of."""

from __future__ import annotations

import pytest

from distorch.convert.architectures import (
    _DIFFUSERS_CLASSES,
    ARCHITECTURES,
    architecture_named,
    detect,
    prefix,
)
from distorch.errors import ModelError

# Names from models in circulation, more than their signatures.
Z_IMAGE = {
    "cap_embedder.1.weight",
    "context_refiner.0.attention.qkv.weight",
    "layers.0.adaLN_modulation.0.weight",
}
HUNYUAN = {
    "txt_in.individual_token_refiner.blocks.0.norm1.weight",
    "double_blocks.0.img_attn.proj.weight",  # in ComfyUI's names it is one of Flux' too
}
LANGUAGE = [
    "model.layers.0.self_attn.q_proj.weight",
    "encoder.block.0.layer.0.SelfAttention.q.weight",
    "blk.0.attn_q.weight",
    "transformer.h.0.attn.c_attn.weight",
]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_signature_is_known_as_its_own_model(name: str) -> None:
    for signature in ARCHITECTURES[name].signatures:
        assert detect({*signature, "other.weight"}, None).name == name
        assert architecture_named(name).name == name


def test_names_that_models_share_do_not_mislead() -> None:
    assert detect(Z_IMAGE, None).name == "lumina2"
    assert detect(HUNYUAN, None).name == "hyvid"


def test_half_a_signature_is_none() -> None:
    first, *_ = ARCHITECTURES["wan"].signatures[0]
    with pytest.raises(ModelError, match=r"known are hyvid, flux.*") as caught:
        detect({first}, None)
    assert "--architecture" in caught.value.hint


def test_names_of_diffusers_go_by_their_class() -> None:
    found = detect({"transformer_blocks.0.attn.norm_added_k.weight"}, "FluxTransformer2DModel")
    assert found.of_diffusers
    assert found.name == "FluxTransformer2DModel"


def test_a_class_that_nobody_loads_is_refused() -> None:
    with pytest.raises(
        ModelError, match="neither ComfyUI nor diffusers loads the class AutoencoderTiny"
    ):
        detect({"encoder.weight"}, "AutoencoderTiny")


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_language_model_is_left_to_llama_cpp(name: str) -> None:
    with pytest.raises(ModelError, match="language model") as caught:
        detect({name}, None)
    assert "convert_hf_to_gguf" in caught.value.hint


def test_an_unknown_architecture_lists_the_known() -> None:
    with pytest.raises(ModelError, match="qwen_image") as caught:
        architecture_named("flx")
    assert caught.value.hint == "--architecture flux"


def test_a_prefix_is_that_of_all_names_or_of_the_diffusion_model() -> None:
    assert prefix({"net.a", "net.b"}) == "net."
    assert prefix({"net.a", "other"}) == ""
    assert prefix({"vae.a", "model.diffusion_model.b"}) == "model.diffusion_model."
    assert prefix(()) == ""


def test_classes_are_those_that_diffusers_loads_from_a_single_file() -> None:
    loaders = pytest.importorskip("diffusers.loaders.single_file_model")
    assert set(loaders.SINGLE_FILE_LOADABLE_CLASSES) >= _DIFFUSERS_CLASSES
