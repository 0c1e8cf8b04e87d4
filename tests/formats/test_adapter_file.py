"""Names of LoRA files, in every dialect, mean the same modules; what does not add up is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distorch.errors import FormatError
from distorch.formats.adapter_file import AdapterSpec, describe_adapters, read_config
from distorch.formats.adapter_names import match_targets

RANK, INPUTS, OUTPUTS = 4, 24, 36
DOWN, UP = (RANK, INPUTS), (OUTPUTS, RANK)
MODULES = [
    "",
    "blocks",
    "blocks.0",
    "blocks.0.attn",
    "blocks.0.attn.to_q",
    "blocks.0.attn.to_out.0",
]

DIALECTS: dict[str, tuple[str, str]] = {
    "peft": (
        "base_model.model.blocks.0.attn.to_q.lora_A.weight",
        "base_model.model.blocks.0.attn.to_q.lora_B.weight",
    ),
    "peft, as the module has it": (
        "blocks.0.attn.to_q.lora_A.default.weight",
        "blocks.0.attn.to_q.lora_B.default.weight",
    ),
    "diffusers": (
        "transformer.blocks.0.attn.to_q.lora_A.weight",
        "transformer.blocks.0.attn.to_q.lora_B.weight",
    ),
    "diffusers, older": (
        "unet.blocks.0.attn.to_q.lora.down.weight",
        "unet.blocks.0.attn.to_q.lora.up.weight",
    ),
    "diffusers, oldest": (
        "unet.blocks.0.attn.processor.to_q_lora.down.weight",
        "unet.blocks.0.attn.processor.to_q_lora.up.weight",
    ),
    "diffusers, of a text encoder": (
        "text_encoder.blocks.0.attn.to_q.lora_linear_layer.down.weight",
        "text_encoder.blocks.0.attn.to_q.lora_linear_layer.up.weight",
    ),
    "Kohya": (
        "lora_unet_blocks_0_attn_to_q.lora_down.weight",
        "lora_unet_blocks_0_attn_to_q.lora_up.weight",
    ),
    "Kohya, of a text encoder": (
        "lora_te1_blocks_0_attn_to_q.lora_down.weight",
        "lora_te1_blocks_0_attn_to_q.lora_up.weight",
    ),
    "LyCORIS": (
        "lycoris_blocks_0_attn_to_q.lora_down.weight",
        "lycoris_blocks_0_attn_to_q.lora_up.weight",
    ),
    "ComfyUI": (
        "diffusion_model.blocks.0.attn.to_q.lora_A.weight",
        "diffusion_model.blocks.0.attn.to_q.lora_B.weight",
    ),
    "ComfyUI, older": (
        "diffusion_model.blocks.0.attn.to_q.lora_down.weight",
        "diffusion_model.blocks.0.attn.to_q.lora_up.weight",
    ),
}


def only(
    shapes: dict[str, tuple[int, ...]], numbers: dict[str, float] | None = None, **config: Any
) -> AdapterSpec:
    found = describe_adapters(shapes, (numbers or {}).__getitem__, config)
    (spec,) = found.specs
    assert not found.unknown
    return spec


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_names_the_module_and_its_two_matrices(dialect: str) -> None:
    down, up = DIALECTS[dialect]
    spec = only({down: DOWN, up: UP})
    assert (spec.kind, spec.tensors, spec.scale) == ("lora", {"down": down, "up": up}, 1.0)
    matches = match_targets([spec.target], MODULES)
    assert matches.found == {spec.target: "blocks.0.attn.to_q"}
    assert not matches.missing
    assert not matches.elsewhere


FACTORS = {
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "lokr": ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"),
}


@pytest.mark.parametrize("kind", FACTORS)
@pytest.mark.parametrize("prefix", ["base_model.model.x", "lycoris_x", "diffusion_model.x"])
def test_factors_of_products(kind: str, prefix: str) -> None:
    shapes = {f"{prefix}.{role}": (RANK, RANK) for role in FACTORS[kind]}
    spec = only({**shapes, f"{prefix}.alpha": ()}, {f"{prefix}.alpha": 2.0})
    assert spec.kind == kind
    assert spec.tensors == {role: f"{prefix}.{role}" for role in FACTORS[kind]}
    assert spec.scale == 2.0 / RANK


def test_an_alpha_of_the_file_is_divided_by_the_rank() -> None:
    assert (
        only(
            {"x.lora_down.weight": DOWN, "x.lora_up.weight": UP, "x.alpha": ()}, {"x.alpha": 3}
        ).scale
        == 0.75
    )


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"r": 4, "lora_alpha": 2}, 0.5),
        ({"r": 4, "lora_alpha": 2, "use_rslora": True}, 1.0),
        ({"r": 8, "lora_alpha": 2, "alpha_pattern": {"to_q": 12}}, 3.0),
        ({"r": 8, "lora_alpha": 2, "alpha_pattern": {"^a.to_q": 12}}, 3.0),
        ({"r": 8, "lora_alpha": 2, "alpha_pattern": {"o_q": 12}}, 0.5),
        ({"transformer.lora_alpha": 2, "transformer.r": 4, "text_encoder.lora_alpha": 9}, 1.0),
    ],
)
def test_the_configuration_says_alpha(config: dict[str, Any], scale: float) -> None:
    assert only({"a.to_q.lora_A.weight": DOWN, "a.to_q.lora_B.weight": UP}, **config).scale == scale


def test_a_configuration_for_several_models_is_read_for_the_right_one() -> None:
    config = {"transformer.lora_alpha": 2, "text_encoder.lora_alpha": 12}
    shapes = {
        f"{model}.q.lora_{each}.weight": DOWN
        for model in ("transformer", "text_encoder")
        for each in "AB"
    }
    found = describe_adapters(shapes, float, config)
    assert {spec.target: spec.scale for spec in found.specs} == {
        "transformer.q": 0.5,
        "text_encoder.q": 3.0,
    }


def test_a_lokr_of_whole_factors_is_scaled_by_a_configuration_only() -> None:
    shapes = {"x.lokr_w1": (6, 4), "x.lokr_w2": (6, 6), "x.alpha": ()}
    assert only(shapes, {"x.alpha": 3}).scale == 1.0  # as LyCORIS has it
    del shapes["x.alpha"]
    assert only(shapes, r=6, alpha=3).scale == 0.5  # as peft has it
    assert only(shapes).scale == 1.0


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("lora_magnitude_vector", "magnitude"),
        ("lora_magnitude_vector.weight", "magnitude"),
        ("dora_scale", "dora_scale"),
    ],
)
def test_magnitudes_go_with_their_lora(name: str, role: str) -> None:
    spec = only({"x.lora_A.weight": DOWN, "x.lora_B.weight": UP, f"x.{name}": (OUTPUTS,)})
    assert spec.tensors[role] == f"x.{name}"


def test_a_lora_and_a_whole_difference_of_one_module_are_two() -> None:
    shapes = {
        "x.lora_down.weight": DOWN,
        "x.lora_up.weight": UP,
        "x.diff_b": (OUTPUTS,),
        "y.diff": (8,),
    }
    found = describe_adapters(shapes, float).specs
    assert [(spec.target, spec.kind) for spec in found] == [
        ("x", "lora"),
        ("x", "difference"),
        ("y", "difference"),
    ]


def test_an_embedding_has_names_of_its_own() -> None:
    spec = only({"e.lora_embedding_A": (4, 99), "e.lora_embedding_B": (24, 4)}, r=4, lora_alpha=8)
    assert (set(spec.tensors), spec.scale) == ({"embedding_down", "embedding_up"}, 2.0)


def test_names_that_mean_nothing_are_told() -> None:
    shapes = {
        "x.lora_A.weight": DOWN,
        "x.lora_B.weight": UP,
        "bundle_emb.hat.string_to_param": (2, 8),
    }
    assert describe_adapters(shapes, float).unknown == ("bundle_emb.hat.string_to_param",)


def test_a_peft_file_without_its_configuration_is_a_guess() -> None:
    shapes = {"base_model.model.x.lora_A.weight": DOWN, "base_model.model.x.lora_B.weight": UP}
    assert describe_adapters(shapes, float).guessed
    assert not describe_adapters(shapes, float, {"r": 4, "lora_alpha": 4}).guessed


@pytest.mark.parametrize(
    ("shapes", "problem"),
    [
        ({}, "holds no tensors"),
        ({"model.layers.0.weight": (4, 4)}, "not a LoRA: its 1 tensors .*model.layers.0.weight"),
        ({"x.lora_A.weight": DOWN}, "'x' has down without up"),
        ({"x.hada_w1_a": DOWN, "x.hada_w1_b": DOWN, "x.hada_w2_a": DOWN}, "without hada_w2_b"),
        ({"x.lokr_w1": DOWN, "x.lokr_w2_a": DOWN}, "without lokr_w2"),
        ({"x.lora_A.weight": (0, 24), "x.lora_B.weight": (36, 0)}, r"'x' has rank 0: .*\(0, 24\)"),
        ({"x.lora_A.weight": (), "x.lora_B.weight": UP}, "rank 0"),
        ({"x.lora_A.weight": DOWN, "x.lora_B.weight": UP, "x.lokr_w1": UP}, "or of several"),
        ({"x.dora_scale": (36,)}, "of no kind"),
        ({"x.alpha": ()}, "of no kind"),
        ({"x.lora_A.weight": DOWN, "x.lora_A.a.weight": DOWN, "x.lora_B.weight": UP}, "two LoRAs"),
    ],
)
def test_what_does_not_add_up_is_told(shapes: dict[str, tuple[int, ...]], problem: str) -> None:
    with pytest.raises(FormatError, match=problem):
        describe_adapters(shapes, lambda _: 1.0)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"r": 4, "lora_alpha": "many"}, "'lora_alpha' .* 'many', not a number"),
        ({"r": 4, "lora_alpha": 4, "alpha_pattern": [1]}, "'alpha_pattern' .* not a table"),
        ({"r": 4, "lora_alpha": 4, "alpha_pattern": {"(a+)+$": 1}}, "an expression"),
    ],
)
def test_a_strange_configuration_is_told(config: dict[str, Any], problem: str) -> None:
    with pytest.raises(FormatError, match=problem):
        only({"x.lora_A.weight": DOWN, "x.lora_B.weight": UP}, **config)


def test_the_configuration_stands_in_the_header_or_beside_the_file(tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.safetensors"
    assert read_config(file, {}) == {}
    (tmp_path / "adapter_config.json").write_text('{"r": 4}', encoding="utf-8")
    assert read_config(file, {}) == {"r": 4}
    assert read_config(file, {"lora_adapter_metadata": json.dumps({"unet.r": 8})}) == {"unet.r": 8}
    for text in ("[1]", "{", "[" * 100_000):
        (tmp_path / "adapter_config.json").write_text(text, encoding="utf-8")
        with pytest.raises(FormatError, match=r"adapter_config\.json is not"):
            read_config(file, {})


def test_numbers_in_names_are_tried_too() -> None:
    matches = match_targets(["unet.blocks.0.attn.to_out"], MODULES)
    assert matches.found == {"unet.blocks.0.attn.to_out": "blocks.0.attn.to_out.0"}


def test_names_that_a_model_lacks_are_missing() -> None:
    matches = match_targets(["unet.blocks.0.attn.to_q", "unet.blocks.7.attn.to_q"], MODULES)
    assert matches.missing == ("unet.blocks.7.attn.to_q",)


def test_modules_whose_names_begin_like_a_models_are_not_taken_for_it() -> None:
    modules = ["", "transformer_blocks.0.to_q", "unet_head"]
    targets = ["transformer_blocks.0.to_q", "unet_head", "x_embedder"]
    matches = match_targets(targets, modules)
    assert matches.found == {name: name for name in targets[:2]}
    assert matches.missing == ("x_embedder",)


@pytest.mark.parametrize(("num_layers", "own"), [(2, "lora_te1_"), (4, "lora_te2_")])
def test_of_two_text_encoders_each_takes_its_own(num_layers: int, own: str) -> None:
    """The names of the first are those of the second, which has more of them."""
    first = [f"lora_te1_layers_{layer}_mlp" for layer in range(2)]
    second = [f"lora_te2_layers_{layer}_mlp" for layer in range(4)]
    matches = match_targets(
        [*first, *second], [f"layers.{layer}.mlp" for layer in range(num_layers)]
    )
    assert {name[:9] for name in matches.found} == {own}
    assert len(matches.found) == num_layers
    assert not matches.missing
    assert {name[:9] for name in matches.elsewhere} == {"lora_te1_", "lora_te2_"} - {own}


def test_a_module_that_holds_a_whole_pipeline_takes_all_parts() -> None:
    modules = ["unet.blocks.0", "text_encoder.layers.0"]
    matches = match_targets(modules, modules)
    assert matches.found == {name: name for name in modules}
