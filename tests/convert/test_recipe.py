"""What each tensor becomes, without a weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distorch.convert.recipe import Recipe, recipe_for
from distorch.errors import FormatError, ModelError, StorageError
from distorch.formats import DTYPES, Checkpoint, TensorInfo
from tests.convert.make import FLUX

Spec = tuple[str, tuple[int, ...]]  # dtype, shape

WAN = {
    "blocks.0.self_attn.norm_q.weight": ("BF16", (512,)),
    "text_embedding.2.weight": ("BF16", (512, 512)),
    "head.modulation": ("BF16", (1, 2, 512)),
    "patch_embedding.weight": ("BF16", (512, 16, 1, 2, 2)),
    "blocks.0.ffn.0.weight": ("BF16", (1024, 512)),
}
SD = {
    "label_emb.0.0.weight": ("F16", (1280, 2816)),
    "input_blocks.1.0.in_layers.2.weight": ("F16", (320, 320, 3, 3)),
    "input_blocks.4.1.proj_in.weight": ("F16", (640, 640)),
    "input_blocks.0.0.weight": ("F16", (320, 4, 3, 3)),
    "out.2.bias": ("F16", (4,)),
}


def checkpoint(specs: Mapping[str, Spec], **metadata: object) -> Checkpoint:
    path = Path("model.gguf" if metadata else "model.safetensors")
    infos = {
        name: TensorInfo(name, dtype, shape, 0, DTYPES[dtype].nbytes(shape), path)
        for name, (dtype, shape) in specs.items()
    }
    return Checkpoint(path, "gguf" if metadata else "safetensors", metadata, infos)


def recipe(specs: Mapping[str, Spec], form: str, suffix: str = "gguf", **more: object) -> Recipe:
    keep = more.pop("keep", ())
    assert isinstance(keep, tuple)
    return recipe_for(checkpoint(specs, **more), Path(f"out.{suffix}"), form, keep=keep)


def stored(found: Recipe) -> dict[str, str]:
    return {output.name: output.dtype.name for output in found.outputs}


def test_matrices_are_packed_and_all_that_is_delicate_is_not() -> None:
    found = recipe(WAN, "Q4_K")
    assert found.architecture == "wan"
    assert stored(found) == {
        "blocks.0.self_attn.norm_q.weight": "F32",
        "text_embedding.2.weight": "BF16",  # a first layer: as it was
        "head.modulation": "F32",  # a parameter by itself, which no loader decodes
        "patch_embedding.weight": "F32",
        "blocks.0.ffn.0.weight": "Q4_K",
    }
    assert found.outputs[3].shape == (512, 16, 1, 2, 2)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("ltxv", "transformer_blocks.0.scale_shift_table"),
        ("hidream", "double_stream_blocks.0.block.ff_i.gate.weight"),
        ("wan", "blocks.0.modulation"),
        ("WanTransformer3DModel", "blocks.0.scale_shift_table"),
    ],
)
def test_parameters_that_no_loader_decodes_are_single_precision(model: str, name: str) -> None:
    specs: dict[str, Spec] = {name: ("BF16", (6, 512))}
    found = recipe_for(checkpoint(specs), Path("o.gguf"), "Q4_K", architecture=model)
    assert stored(found) == {name: "F32"}


def test_models_of_convolutions_are_folded_with_their_shapes_beside() -> None:
    outputs = {output.name: output for output in recipe(SD, "Q5_K").outputs}
    folded = outputs["input_blocks.1.0.in_layers.2.weight"]
    assert (folded.dtype.name, folded.shape) == ("Q5_K", (3600, 256))
    assert folded.logical_shape == (320, 320, 3, 3)
    assert outputs["input_blocks.4.1.proj_in.weight"].shape == (1600, 256)
    first = outputs["input_blocks.0.0.weight"]
    assert (first.dtype.name, first.shape, first.logical_shape) == ("F32", (320, 4, 3, 3), None)
    assert outputs["label_emb.0.0.weight"].dtype.name == "F16"


def test_a_folded_file_is_unfolded() -> None:
    key = "comfy.gguf.orig_shape.conv.weight"
    specs: dict[str, Spec] = {"conv.weight": ("Q8_0", (36, 256))}
    found = recipe(specs, "F16", "safetensors", **{key: [32, 32, 3, 3]})
    assert found.outputs[0].shape == (32, 32, 3, 3)
    with pytest.raises(FormatError, match=r"conv\.weight of shape \(36, 256\) cannot be"):
        recipe(specs, "F16", "safetensors", **{key: [32, 32, 3]})


def test_the_prefix_goes_and_other_models_with_it() -> None:
    specs = {f"model.diffusion_model.{name}": spec for name, spec in WAN.items()}
    found = recipe(specs | {"vae.conv.weight": ("F32", (4, 4))}, "Q8_0")
    assert set(stored(found)) == set(WAN)
    assert any("vae.conv.weight" in note for note in found.notes)


def test_rows_of_no_whole_blocks_stay_dense_and_are_said() -> None:
    specs = {FLUX: ("F32", (512, 512)), "b": ("F32", (64, 80)), "h": ("F16", (64, 80))}
    found = recipe(specs, "Q4_K")
    assert stored(found) == {FLUX: "Q4_K", "b": "BF16", "h": "F16"}
    assert any("2 tensors not Q4_K" in note and ": b, h" in note for note in found.notes)


@pytest.mark.parametrize(("source", "becomes"), [("F8_E4M3", "F16"), ("F8_E5M2", "F16")])
def test_what_gguf_cannot_hold_is_held_by_the_next_wider(source: str, becomes: str) -> None:
    specs: dict[str, Spec] = {FLUX: ("BF16", (512, 512)), "img_in.weight": (source, (256, 64))}
    assert stored(recipe(specs, "Q4_K"))["img_in.weight"] == becomes


def test_numbers_that_are_no_weights_are_copied_or_refused() -> None:
    specs: dict[str, Spec] = {FLUX: ("BF16", (512, 512)), "ids": ("I64", (3,))}
    assert stored(recipe(specs, "Q4_K"))["ids"] == "I64"
    specs["mask"] = ("BOOL", (3,))
    assert stored(recipe(specs, "fp8_e4m3fn", "safetensors"))["mask"] == "BOOL"
    with pytest.raises(ModelError, match="cannot hold mask, which is BOOL"):
        recipe(specs, "Q4_K")


def test_kept_tensors_stay() -> None:
    found = recipe(WAN, "Q4_K", keep=("blocks.0.ffn*",))
    assert stored(found)["blocks.0.ffn.0.weight"] == "BF16"
    found = recipe(WAN, "fp8_e5m2", "safetensors", keep=("blocks.0.ffn*",))
    assert stored(found)["blocks.0.ffn.0.weight"] == "BF16"
    assert stored(found)["text_embedding.2.weight"] == "F8_E5M2"
    with pytest.raises(ModelError, match="cannot keep w as Q4_K"):
        recipe({"w": ("Q4_K", (4, 256))}, "F16", "safetensors", keep=("w",), said="")


def test_nothing_is_widened_on_the_way_to_fp8() -> None:
    specs: dict[str, Spec] = {
        "matrix": ("F16", (64, 64)),
        "half": ("F16", (64,)),
        "single": ("F32", (64,)),
        "eighth": ("F8_E5M2", (64,)),
    }
    assert stored(recipe(specs, "fp8", "safetensors")) == {
        "matrix": "F8_E4M3",
        "half": "F16",
        "single": "BF16",
        "eighth": "F8_E5M2",
    }


@given(
    st.dictionaries(
        st.text("abc", min_size=1, max_size=3),
        st.tuples(
            st.sampled_from(["F64", "F32", "F16", "BF16", "F8_E4M3", "U8", "I64"]),
            st.lists(st.integers(0, 80), max_size=4).map(tuple),
        ),
        min_size=1,
    ),
    st.sampled_from(["f32", "f16", "bf16", "fp8_e4m3fn", "fp8_e5m2"]),
)
def test_dtype_changes_lose_no_tensor_and_align_every_one(
    specs: dict[str, Spec], form: str
) -> None:
    found = recipe(specs, form, "safetensors")
    assert {o.name: o.shape for o in found.outputs} == {n: s for n, (_, s) in specs.items()}
    position = 0
    for output in found.outputs:
        assert position % output.dtype.block_bytes == 0
        position += output.nbytes


@given(st.lists(st.integers(1, 70), min_size=1, max_size=5).map(tuple), st.booleans())
def test_every_shape_has_a_place_in_gguf(shape: tuple[int, ...], folds: bool) -> None:  # noqa: FBT001
    specs: dict[str, Spec] = {"w": ("F32", shape)}
    for form in ("Q4_K", "Q8_0", "F16"):
        made = recipe_for(
            checkpoint(specs), Path("o.gguf"), form, architecture="sd1" if folds else "flux"
        )
        (output,) = made.outputs
        assert math.prod(output.shape) == math.prod(shape)
        assert output.nbytes == output.dtype.nbytes(output.shape)
        assert (output.logical_shape or output.shape) == shape


def test_names_are_as_long_as_programs_in_c_read_them() -> None:
    long = "x" * 128
    with pytest.raises(ModelError, match="128 characters"):
        recipe({FLUX: ("F32", (512, 512)), long: ("F32", (4,))}, "Q4_K")
    assert stored(recipe({long: ("F32", (4,))}, "F16", "safetensors")) == {long: "F16"}


def test_scales_beside_fp8_weights_are_not_lost() -> None:
    specs: dict[str, Spec] = {
        FLUX: ("F8_E4M3", (512, 512)),
        "double_blocks.0.img_attn.proj.scale_weight": ("F32", ()),
    }
    with pytest.raises(ModelError, match="scales of its own"):
        recipe(specs, "Q4_K")


def test_a_language_model_in_gguf_is_left_to_llama_cpp() -> None:
    with pytest.raises(ModelError, match="'llama', which is not one of images") as caught:
        recipe({"w": ("F16", (4, 256))}, "Q4_K", **{"general.architecture": "llama"})
    assert "llama-quantize" in caught.value.hint


def test_formats_and_suffixes_that_contradict_each_other() -> None:
    for form, suffix, problem in (
        ("fp8_e4m3fn", "gguf", "GGUF file cannot hold fp8"),
        ("Q4_K", "safetensors", "safetensors file cannot hold Q4_K"),
        ("Q4_J", "gguf", "'Q4_J' is no format"),
    ):
        with pytest.raises(ModelError, match=problem):
            recipe(WAN, form, suffix)
    with pytest.raises(StorageError, match=r"neither \.gguf nor \.safetensors"):
        recipe(WAN, "Q4_K", "bin")


def test_a_checkpoint_without_tensors_is_refused() -> None:
    with pytest.raises(FormatError, match="no tensors"):
        recipe({}, "F16", "safetensors")


def test_diffusers_names_are_written_only_in_formats_that_it_reads() -> None:
    names: dict[str, Spec] = {"transformer_blocks.0.ff.net.0.proj.weight": ("F32", (512, 512))}
    found = recipe_for(
        checkpoint(names), Path("o.gguf"), "Q4_K", class_name="FluxTransformer2DModel"
    )
    assert found.architecture == "FluxTransformer2DModel"
    assert any("ComfyUI does not load" in note for note in found.notes)
    with pytest.raises(ModelError, match="does not read IQ3_S"):
        recipe_for(checkpoint(names), Path("o.gguf"), "IQ3_S", class_name="FluxTransformer2DModel")
