"""Adapters compute what peft computes on the dense module, and say which shapes do not fit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from distorch.errors import ModelError
from distorch.formats.adapter_file import describe_adapters
from distorch.quant.adapters import Adapter, Difference, LoHa, LoKr, LoRA

KINDS: dict[str, type[Adapter]] = {"lora": LoRA, "loha": LoHa, "lokr": LoKr}
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 2**-6}
"""How far from peft, as a share of the largest output: the last bits of either dtype."""

BASES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(24, 36),
    "linear without bias": lambda: nn.Linear(24, 36, bias=False),
    "conv1d": lambda: nn.Conv1d(4, 6, 3, padding=1),
    "conv2d": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "conv2d 1x1": lambda: nn.Conv2d(4, 6, 1),
    "conv2d in groups": lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "conv3d": lambda: nn.Conv3d(4, 6, (1, 3, 3)),
    "embedding": lambda: nn.Embedding(20, 24),
}
INPUTS: dict[str, Callable[[], Tensor]] = {
    "linear": lambda: torch.randn(2, 5, 24),
    "conv1d": lambda: torch.randn(2, 4, 9),
    "conv2d": lambda: torch.randn(2, 4, 9, 8),
    "conv3d": lambda: torch.randn(2, 4, 3, 6, 5),
    "embedding": lambda: torch.arange(12).view(2, 6),
}
LORA = {"r": 4, "lora_alpha": 3}
CONFIGS: dict[str, tuple[type[Any], dict[str, Any], str]] = {
    "LoRA": (peft.LoraConfig, LORA, "linear conv1d conv2d conv3d embedding"),
    "DoRA": (peft.LoraConfig, {**LORA, "use_dora": True}, "linear conv1d conv2d conv3d embedding"),
    "LoRA, rank-stabilised": (peft.LoraConfig, {**LORA, "use_rslora": True}, "linear"),
    "LoHa": (peft.LoHaConfig, {"r": 4, "alpha": 3}, "linear conv1d conv2d"),
    "LoHa, Tucker": (
        peft.LoHaConfig,
        {"r": 4, "alpha": 3, "use_effective_conv2d": True},
        "conv1d conv2d",
    ),
    "LoKr": (peft.LoKrConfig, {"r": 1, "alpha": 3}, "linear conv2d"),
    "LoKr, whole": (peft.LoKrConfig, {"r": 9, "alpha": 3}, "linear conv2d"),
    "LoKr, both in two": (
        peft.LoKrConfig,
        {"r": 1, "alpha": 3, "decompose_both": True, "use_effective_conv2d": True},
        "linear conv2d",
    ),
}
CASES = [
    (config, base)
    for config, (_, _, kinds) in CONFIGS.items()
    for base in BASES
    if base.split()[0] in kinds.split() and not (config == "DoRA" and "groups" in base)
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def with_peft(base: nn.Module, config: str) -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    """A copy of ``base`` that peft has wrapped, its random tensors by name, its configuration."""
    kind, options, _ = CONFIGS[config]
    settings = kind(target_modules=["base"], **options)
    model = peft.inject_adapter_in_model(settings, nn.ModuleDict({"base": copy.deepcopy(base)}))
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.rand_like(parameter)
        elif "base_layer" not in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    tensors = {name: each.clone() for name, each in get_peft_model_state_dict(model).items()}
    return model.get_submodule("base"), tensors, settings.to_dict()


def adapter_of(base: nn.Module, tensors: dict[str, Tensor], config: dict[str, Any]) -> Adapter:
    found = describe_adapters({name: each.shape for name, each in tensors.items()}, float, config)
    (spec,) = found.specs
    assert not found.unknown
    parts = {role: tensors[name] for role, name in spec.tensors.items()}
    return KINDS[spec.kind](base, parts, spec.scale)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("config", "name"), CASES)
@torch.inference_mode()
def test_the_sum_is_that_of_peft(config: str, name: str, dtype: torch.dtype) -> None:
    base = BASES[name]().to(dtype)
    x = INPUTS[name.split(maxsplit=1)[0]]()
    x = x.to(dtype) if x.is_floating_point() else x
    wrapped, tensors, settings = with_peft(base, config)
    expected, plain = wrapped(x), base(x)
    adapter = adapter_of(base, {key: each.to(dtype) for key, each in tensors.items()}, settings)
    found = adapter(base, x, plain, 1.0)
    assert found.dtype == dtype
    largest = float(expected.abs().max())
    assert float((expected - plain).abs().max()) > 0.02 * largest, "it does something"
    assert float((found - expected).abs().max()) <= BOUNDS[dtype] * largest


@pytest.mark.parametrize("config", ["LoRA", "DoRA", "LoHa", "LoKr"])
@torch.inference_mode()
def test_a_strength_weighs_the_whole_change(config: str) -> None:
    base, x = nn.Linear(24, 36), torch.randn(3, 24)
    _, tensors, settings = with_peft(base, config)
    adapter = adapter_of(base, tensors, settings)
    plain = base(x)
    change = adapter(base, x, plain, 1.0) - plain
    assert torch.allclose(adapter(base, x, plain, -0.5), plain - 0.5 * change, atol=1e-6)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@torch.inference_mode()
def test_narrow_weights_compute_in_the_modules_dtype(stored: torch.dtype) -> None:
    base, x = nn.Linear(24, 36), torch.randn(3, 24)
    down, up = torch.randn(4, 24).to(stored), torch.randn(36, 4).to(stored)
    adapter = LoRA(base, {"down": down, "up": up}, 0.5)
    assert adapter.down.dtype == stored
    expected = base(x) + F.linear(F.linear(x, down.float()), up.float()) * 0.5
    assert torch.equal(adapter(base, x, base(x), 1.0), expected)


@torch.inference_mode()
def test_wide_weights_on_a_narrow_module_compute_wide() -> None:
    base, x = nn.Linear(24, 36).bfloat16(), torch.randn(3, 24).bfloat16()
    down, up = torch.randn(4, 24), torch.randn(36, 4)
    adapter = LoRA(base, {"down": down, "up": up}, 0.5)
    wide = base(x) + F.linear(F.linear(x.float(), down), up) * 0.5
    assert torch.equal(adapter(base, x, base(x), 1.0), wide.bfloat16())


@torch.inference_mode()
def test_a_convolution_in_three_parts() -> None:
    base, x = (
        nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="reflect"),
        torch.randn(2, 4, 9, 8),
    )
    down, mid, up = torch.randn(3, 4, 1, 1), torch.randn(3, 3, 3, 3), torch.randn(6, 3, 1, 1)
    delta = torch.zeros_like(base.weight)
    for o, i, r, s in torch.cartesian_prod(*map(torch.arange, (6, 4, 3, 3))).tolist():
        delta[o, i] += up[o, r, 0, 0] * mid[r, s] * down[s, i, 0, 0]
    adapter = LoRA(base, {"down": down, "mid": mid, "up": up}, 0.5)
    changed = copy.deepcopy(base)
    changed.weight.data += 0.5 * delta
    assert torch.allclose(adapter(base, x, base(x), 1.0), changed(x), atol=1e-4)
    assert torch.allclose(adapter.delta(base, torch.float32), delta, atol=1e-5)


@torch.inference_mode()
def test_a_kronecker_product_on_a_convolution_in_one_dimension() -> None:
    base, x = nn.Conv1d(4, 6, 3, padding=1), torch.randn(2, 4, 9)  # where peft 0.21 fails
    first, second = torch.randn(3, 2), torch.randn(2, 2, 3)
    adapter = LoKr(base, {"lokr_w1": first, "lokr_w2": second}, 0.5)
    changed = copy.deepcopy(base)
    for row, column in torch.cartesian_prod(*map(torch.arange, first.shape)).tolist():
        delta = 0.5 * first[row, column] * second
        changed.weight.data[2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += delta
    assert torch.allclose(adapter(base, x, base(x), 1.0), changed(x), atol=1e-5)


@pytest.mark.parametrize(
    ("base", "x"),
    [
        (nn.Linear(24, 36), torch.randn(3, 24)),
        (nn.Conv2d(4, 6, 3), torch.randn(2, 4, 9, 8)),
        (nn.Embedding(20, 24), torch.arange(7)),
        (nn.LayerNorm(24), torch.randn(3, 24)),
        (nn.GroupNorm(2, 4), torch.randn(2, 4, 9)),
        (nn.RMSNorm(24, eps=1e-6), torch.randn(3, 24)),
    ],
)
@torch.inference_mode()
def test_a_whole_difference_is_that_of_the_weights(base: nn.Module, x: Tensor) -> None:
    changed = copy.deepcopy(base)
    parts = {name: torch.randn_like(each) for name, each in base.named_parameters()}
    for name, each in changed.named_parameters():
        each.data += 0.5 * parts[name]
    adapter = Difference(base, parts, 1.0)
    assert torch.allclose(adapter(base, x, base(x), 0.5), changed(x), atol=1e-5)


@torch.inference_mode()
def test_the_difference_of_a_bias_alone() -> None:
    base, x = nn.Conv2d(4, 6, 3), torch.randn(2, 4, 9, 8)
    added = torch.randn(6)
    found = Difference(base, {"bias": added}, 1.0)(base, x, base(x), 1.0)
    assert torch.equal(found, base(x) + added.view(6, 1, 1))


def test_a_matrix_fits_a_convolution_of_one_point_and_the_reverse() -> None:
    down, up = torch.randn(2, 4), torch.randn(6, 2)
    for base in (nn.Conv2d(4, 6, 1), nn.Linear(4, 6)):
        flat = LoRA(base, {"down": down, "up": up}, 1.0)
        deep = LoRA(base, {"down": down.view(2, 4, 1, 1), "up": up.view(6, 2, 1, 1)}, 1.0)
        assert torch.equal(flat.delta(base, torch.float32), deep.delta(base, torch.float32))


@torch.inference_mode()
def test_an_embedding_takes_matrices_too() -> None:
    base, ids = nn.Embedding(20, 24), torch.arange(12).view(2, 6)
    down, up = torch.randn(4, 24), torch.randn(20, 4)  # as ComfyUI reads them: up @ down
    adapter = LoRA(base, {"down": down, "up": up}, 1.0)
    expected = F.embedding(ids, base.weight + up @ down)
    assert torch.allclose(adapter(base, ids, base(ids), 1.0), expected, atol=1e-5)


BAD: list[tuple[type[Adapter], nn.Module, dict[str, tuple[int, ...]]]] = [
    (LoRA, nn.Linear(24, 36), {"down": (4, 25), "up": (36, 4)}),
    (LoRA, nn.Linear(24, 36), {"down": (4, 24), "up": (35, 4)}),
    (LoRA, nn.Linear(24, 36), {"down": (4, 24), "up": (36, 5)}),
    (LoRA, nn.Conv2d(4, 6, 3), {"down": (2, 4, 1, 1), "up": (6, 2, 1, 1)}),
    (LoRA, nn.Embedding(20, 24), {"embedding_down": (4, 21), "embedding_up": (24, 4)}),
    (LoRA, nn.Linear(24, 36), {"down": (4, 24), "up": (36, 4), "magnitude": (24,)}),
    (LoRA, nn.Linear(24, 36), {"down": (4, 24), "up": (36, 4), "dora_scale": (1, 36)}),
    (
        LoHa,
        nn.Linear(24, 36),
        {"hada_w1_a": (36, 2), "hada_w1_b": (2, 24), "hada_w2_a": (36, 2), "hada_w2_b": (2, 20)},
    ),
    (LoKr, nn.Linear(24, 36), {"lokr_w1": (6, 4), "lokr_w2": (6, 5)}),
    (Difference, nn.Linear(24, 36), {"weight": (24, 36)}),
    (Difference, nn.Linear(24, 36), {"bias": (24,)}),
]


@pytest.mark.parametrize(("kind", "base", "shapes"), BAD)
def test_what_does_not_fit_is_told_with_both_shapes(
    kind: type[Adapter], base: nn.Module, shapes: dict[str, tuple[int, ...]]
) -> None:
    with pytest.raises(ModelError) as caught:
        kind(base, {role: torch.randn(shape) for role, shape in shapes.items()}, 1.0)
    weight = base.weight
    assert isinstance(weight, Tensor)
    assert str(tuple(weight.shape)) in caught.value.problem
    assert caught.value.problem.count("(") >= 2


@pytest.mark.parametrize("base", [nn.ConvTranspose2d(4, 6, 3), nn.LSTM(4, 6), nn.Identity()])
def test_a_module_of_another_type_is_named(base: nn.Module) -> None:
    with pytest.raises(ModelError, match=type(base).__name__):
        LoRA(base, {"down": torch.randn(2, 4), "up": torch.randn(6, 2)}, 1.0)
