"""Weights that other libraries have quantised are moved as they are, and give their bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distorch
from distorch.integrations.module_tree import describe
from tests.plan_strategies import roomy

MACHINE = roomy("cpu", "disk")
WIDTH = 256
LINES = ["cpu,*", "cpu,0b;disk,*", "cpu,50%;disk,50%"]


def _layers(make: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(make() for _ in range(3))).to(dtype).eval()


def torchao_int8() -> tuple[nn.Module, torch.dtype]:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = _layers(lambda: nn.Linear(WIDTH, WIDTH), torch.bfloat16)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model, torch.bfloat16


def torchao_float8() -> tuple[nn.Module, torch.dtype]:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = _layers(lambda: nn.Linear(WIDTH, WIDTH), torch.bfloat16)
    quantization.quantize_(model, quantization.Float8WeightOnlyConfig())
    return model, torch.bfloat16


def bitsandbytes_nf4(*, nested: bool = True) -> tuple[nn.Module, torch.dtype]:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = _layers(
        lambda: bnb.nn.Linear4bit(
            WIDTH,
            WIDTH,
            compute_dtype=torch.float32,
            compress_statistics=nested,
            quant_type="nf4",
        )
    )
    return model.to("cpu"), torch.float32


def bitsandbytes_int8() -> tuple[nn.Module, torch.dtype]:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = _layers(lambda: bnb.nn.Linear8bitLt(WIDTH, WIDTH, has_fp16_weights=False))
    return model.to("cpu"), torch.float32


def diffusers_gguf() -> tuple[nn.Module, torch.dtype]:
    utils = pytest.importorskip("diffusers.quantizers.gguf.utils", reason="needs diffusers")
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType.Q8_0

    def make() -> nn.Module:
        layer: nn.Module = utils.GGUFLinear(WIDTH, WIDTH, compute_dtype=torch.float32)
        values = torch.randn(WIDTH, WIDTH).numpy()
        packed = torch.from_numpy(gguf.quants.quantize(values, kind))
        layer.weight = utils.GGUFParameter(packed, quant_type=kind)
        return layer

    torch.manual_seed(0)
    return nn.Sequential(*(make() for _ in range(3))).eval(), torch.float32


MAKERS = [torchao_int8, torchao_float8, bitsandbytes_nf4, bitsandbytes_int8, diffusers_gguf]


def run(model: nn.Module, dtype: torch.dtype, rows: int = 3) -> Tensor:
    x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.inference_mode():
        out: Tensor = model(x)
    return out


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("make", MAKERS)
def test_every_placement_computes_the_librarys_bits(make: Any, line: str, *, warm: bool) -> None:
    """Whether or not it has run before: bitsandbytes moves its scales when it first does."""
    model, dtype = make()
    expected = run(make()[0], dtype)
    if warm:
        run(model, dtype)
    weights = [module.get_parameter("weight") for module in model.children()]
    handle = distorch.distribute(model, line, machine=MACHINE)
    assert not any("stays where it is" in note for note in handle.plan.notes)
    for _ in range(3):
        assert torch.equal(run(model, dtype), expected)
    handle.remove()
    after = [module.get_parameter("weight") for module in model.children()]
    assert all(one is other for one, other in zip(after, weights, strict=True))
    assert torch.equal(run(model, dtype), expected)


@pytest.mark.parametrize("make", MAKERS)
def test_its_bytes_are_counted_and_let_go_of(make: Any) -> None:
    model, dtype = make()
    expected = run(model, dtype)
    tree = describe(model)
    nbytes = [tree.weights[f"{number}.weight"].memory.numel() for number in range(3)]
    handle = distorch.distribute(model, "cpu,0b;disk,*", machine=MACHINE)
    assert handle.plan.bytes_by_tier["disk"] >= sum(nbytes)
    handle.rebudget("cpu,*", machine=MACHINE)
    assert torch.equal(run(model, dtype), expected)
    handle.remove()
    after = describe(model)
    assert [after.weights[f"{number}.weight"].memory.numel() for number in range(3)] == nbytes
