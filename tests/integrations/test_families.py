"""Models by name: what is counted agrees with what is known of them."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import distorch
from distorch.allocation import Allocation
from distorch.errors import MissingExtraError, ModelError
from distorch.integrations.empty_models import diffusers_model
from distorch.integrations.families import FAMILIES, profile_family
from distorch.integrations.module_tree import describe
from distorch.machine import Compute, Link, Machine, Tier
from distorch.plan.blocks import cut
from distorch.plan.cost import Profile
from distorch.plan.storage import format_named, stored_as
from distorch.simulate import best_plan
from tests.integrations.configurations import SMALL, attention_flops, llama, saved, small
from tests.integrations.diffusers.originals import TINY

transformers = pytest.importorskip("transformers", reason="builds transformers' models")
diffusers = pytest.importorskip("diffusers", reason="builds diffusers' models")


def num_weights(profile: Profile) -> int:
    """Weights of a profile in bf16."""
    return sum(part.nbytes for block in profile.blocks for part in block.parts) // 2


@cache
def whole(name: str, size: str | None = None, frames: int | None = None) -> Profile:
    """A profile of a model in its full size, made once: it takes some seconds."""
    return profile_family(name, size=size, frames=frames)


@pytest.mark.parametrize(
    ("name", "size", "frames", "weights", "nbytes", "tflop"),
    [
        ("flux.1-dev", None, None, 11.90e9, 23.8e9, 74.4),
        ("qwen-image", None, None, 20.43e9, 40.9e9, 131.7),
        ("qwen-image", "1024x1024", None, 20.43e9, 40.9e9, 70.6),
        ("wan-14b", None, None, 14.29e9, 28.6e9, 1678),
        ("wan-14b", "1280x720", 81, 14.29e9, 28.6e9, 6523),
        ("wan-14b", "832x480", 17, 14.29e9, 28.6e9, 242),
    ],
)
def test_counts_agree_with_the_known_ones_within_one_percent(
    name: str, size: str | None, frames: int | None, weights: float, nbytes: float, tflop: float
) -> None:
    """Weights, bytes and TFLOP of a pass of the whole models, as they were counted before."""
    profile = whole(name, size, frames)
    assert num_weights(profile) == pytest.approx(weights, rel=0.01)
    assert profile.model_bytes == pytest.approx(nbytes, rel=0.01)
    assert profile.total_flops == pytest.approx(tflop * 1e12, rel=0.01)
    assert profile.compute_dtype == "BF16"


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("flux.2-dev", 32.2e9),
        ("z-image", 6.15e9),
        ("sd3.5-large", 8.06e9),
        ("sd3.5-medium", 2.24e9),
        ("wan-2.2-14b", 14.29e9),
        ("hunyuan-video", 12.82e9),
        ("ltx-video", 1.92e9),
    ],
)
def test_models_have_the_size_that_their_authors_say(name: str, weights: float) -> None:
    profile = whole(name)
    assert num_weights(profile) == pytest.approx(weights, rel=0.01)
    # a token of a step costs two operations a weight or more, whatever attention costs
    assert profile.total_flops > 2 * weights


@pytest.mark.parametrize(
    ("name", "attention", "known"),
    [
        ("flux.1-dev", attention_flops(4096 + 512, 4096 + 512, 3072, 57), 14.9),
        ("qwen-image", attention_flops(6889 + 128, 6889 + 128, 3072, 60), 36.3),
        ("wan-14b", attention_flops(32_760, 32_760 + 512, 5120, 40), 893),
    ],
)
def test_the_part_of_attention_agrees_too(name: str, attention: int, known: float) -> None:
    """Attention is what no weight of a module takes part in: in these models, after the norms."""
    profile = whole(name, None, None)
    outside = sum(
        flops
        for block, flops in zip(profile.blocks, profile.flops, strict=True)
        if all(len(part.shape) == 1 for part in block.parts)
    )
    assert outside == attention
    assert outside == pytest.approx(known * 1e12, rel=0.01)


@pytest.mark.parametrize("name", FAMILIES)
def test_formats_have_their_share_of_the_bytes(name: str) -> None:
    family = FAMILIES[name]
    model = diffusers_model(family.class_name, family.config, torch.bfloat16)
    root = describe(model).root
    nbytes = {
        form: sum(block.nbytes for block in cut(stored_as(root, format_named(form))))
        for form in ("bf16", "fp8", "Q8_0", "Q6_K", "Q4_K")
    }
    shares = {"fp8": 0.5, "Q8_0": 0.531, "Q6_K": 0.410, "Q4_K": 0.281}
    if name == "sd3.5-large":  # its width of 2432 is no whole blocks of 256
        shares |= {"Q6_K": 0.869, "Q4_K": 0.841}
    for form, share in shares.items():
        assert nbytes[form] / nbytes["bf16"] == pytest.approx(share, rel=0.01)


def test_a_format_changes_the_bytes_and_not_the_work(tmp_path: Path) -> None:
    folder = small(tmp_path, "FluxTransformer2DModel")
    dense, packed = (profile_family(folder, size="64x64", format=f) for f in ("bf16", "Q8_0"))
    assert packed.total_flops == dense.total_flops
    assert packed.model_bytes < 0.6 * dense.model_bytes


@pytest.mark.parametrize("class_name", SMALL)
def test_blocks_are_those_of_the_model_as_it_runs(tmp_path: Path, class_name: str) -> None:
    model = getattr(diffusers, class_name)(**SMALL[class_name])
    profile = profile_family(small(tmp_path, class_name), size="64x64", format="f32")
    assert {block.name: block for block in profile.blocks} == {
        block.name: block for block in cut(describe(model).root)
    }
    assert profile.compute_dtype == "F32"


def test_a_whole_pipelines_directory_stands_for_its_transformer(tmp_path: Path) -> None:
    config = {"_class_name": "FluxTransformer2DModel", **SMALL["FluxTransformer2DModel"]}
    saved(tmp_path, config, "pipeline/transformer")
    found = profile_family(str(tmp_path / "pipeline"), size="64x64")
    assert found.name == "pipeline 64x64 bf16"


def test_blocks_of_a_language_model_are_those_that_the_runtime_cuts(tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(llama(tmp_path))
    model = transformers.LlamaForCausalLM(config)
    profile = profile_family(llama(tmp_path), format="f32")
    assert {block.name for block in profile.blocks} == {
        block.name for block in cut(describe(model).root)
    }


@pytest.mark.parametrize(
    ("options", "problem", "hint"),
    [
        ({"name": "flux-dev"}, "known: flux.1-dev, flux.2-dev, qwen-image", "flux."),
        ({"name": "wan"}, "known: flux.1-dev, flux.2-dev, qwen-image", "wan-14b"),
        ({"size": "1000x1024"}, "tokens of 16 x 16 pixels", "992x1024"),
        ({"size": "0x8"}, "tokens of 16 x 16 pixels", "16x16"),
        ({"size": "1024"}, "is no size", "1024x1024"),
        ({"frames": 5}, "makes single images", "leave out"),
        ({"tokens": 0}, "tokens is 0", "1 or more"),
        ({"batch": -1}, "batch is -1", "1 or more"),
        ({"format": "Q4"}, "bf16, f16, f32, fp8, ", "Q4_"),
        ({"name": "wan-14b", "frames": 80}, "makes 1, 5, 9, 13", "81"),
        ({"name": "ltx-video", "frames": 80}, "makes 1, 9, 17, 25", "81"),
        ({"name": "ltx-video", "size": "720x480"}, "tokens of 32 x 32 pixels", "704x480"),
    ],
)
def test_what_is_refused_and_what_is_suggested(
    options: dict[str, Any], problem: str, hint: str
) -> None:
    with pytest.raises(ModelError) as caught:
        profile_family(**({"name": "flux.1-dev"} | options))
    assert problem in caught.value.problem
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ("{", "is no configuration"),
        ("[]", "is no configuration"),
        ({"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel, whose inputs"),
        ({"_class_name": "FluxTransformer2DModel", "num_layers": "two"}, "diffusers cannot build"),
        ({"_class_name": "FluxTransformer2DModel", "in_channels": None}, "cannot"),
        ({}, "transformers cannot read"),
        ({"model_type": "no-such"}, "transformers cannot read"),
        ({"model_type": "clip"}, "transformers has no model class"),
    ],
)
def test_configurations_that_make_no_model(tmp_path: Path, config: object, problem: str) -> None:
    with pytest.raises(ModelError, match=problem):
        profile_family(saved(tmp_path, config))


def test_a_language_model_has_no_size(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a language model"):
        profile_family(llama(tmp_path), size="512x512")


def test_a_missing_package_is_named_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    for name, extra in ((next(iter(FAMILIES)), "diffusers"), (llama(tmp_path), "transformers")):
        with pytest.raises(MissingExtraError) as caught:
            profile_family(name)
        assert caught.value.hint == f'pip install "distorch[{extra}]"'


def test_a_plan_made_from_a_profile_runs_the_model(tmp_path: Path) -> None:
    config = {"_class_name": "FluxTransformer2DModel"} | SMALL["FluxTransformer2DModel"]
    profile = profile_family(saved(tmp_path, config), size="64x64", format="f32")
    tiers = tuple(
        Tier(name=name, capacity_bytes=1 << 40, free_bytes=1 << 40) for name in ("cpu", "disk")
    )
    machine = Machine(
        name="test",
        tiers=tiers,
        links=(Link(source="disk", target="cpu", bytes_per_second=1e9),),
        computes=(Compute(device="cpu", flops_per_second={"F32": 1e11}, bytes_per_second=1e10),),
    )
    plan = best_plan(profile, Allocation.parse("cpu,25%;disk,*"), machine)
    model = diffusers.FluxTransformer2DModel(**SMALL["FluxTransformer2DModel"]).eval()
    given = TINY["flux.1"].inputs()
    with torch.inference_mode():
        expected = model(**given).sample
        handle = distorch.distribute(model, plan, machine=machine)
        assert {p.block.name: p.tier for p in handle.plan.placements} == {
            p.block.name: p.tier for p in plan.placements
        }
        assert torch.equal(model(**given).sample, expected)
        assert handle.stats().num_unplanned == 0
        handle.remove()
