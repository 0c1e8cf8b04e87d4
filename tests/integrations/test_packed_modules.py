"""A module whose weights are packed in memory is distributed as they are, and computes its bits."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, cast

import gguf
import libgguf
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import distorch
from distorch.integrations import planning
from distorch.integrations.module_tree import describe
from distorch.integrations.resting import RestingWeight
from distorch.plan.blocks import cut
from distorch.quant.block_formats import block_format
from distorch.quant.tensor import QuantTensor
from tests.plan_strategies import roomy

if TYPE_CHECKING:
    from distorch.integrations.attach import Handle

WIDTH, VOCABULARY = 256, 64
MACHINE = roomy("cpu", "disk")
LINES = ["cpu,*", "cpu,0b;disk,*", "cpu,50%;disk,50%"]


def packed(form: str, *shape: int, rows: int | None = None) -> QuantTensor:
    """A weight in a block format; ``rows`` are those it was packed by, where not its own."""
    rng = np.random.default_rng(sum(shape))
    dense = rng.normal(0, 0.1, shape).astype("f4").reshape(rows or shape[0], -1)
    kind = gguf.GGMLQuantizationType[form]
    quantise = libgguf.quantize_rows if form.endswith("K") else gguf.quants.quantize
    raw = torch.from_numpy(quantise(dense, kind).reshape(-1).view(np.uint8).copy())
    return QuantTensor(raw, block_format(form), shape, torch.float32)


class Net(nn.Module):
    """An embedding, a convolution whose rows are no whole blocks, and linear layers."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.embed._parameters["weight"] = packed(form, VOCABULARY, WIDTH)  # type: ignore[assignment]
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.conv._parameters["weight"] = packed(form, WIDTH, WIDTH, 3, rows=1)  # type: ignore[assignment]
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])
        for layer in self.layers:
            layer._parameters["weight"] = packed(form, WIDTH, WIDTH)  # type: ignore[assignment]
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.embed(ids).mT).mT
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return cast("Tensor", self.head(x))


IDS = torch.arange(12).view(2, 6)


@pytest.fixture(autouse=True)
def _many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "cut", functools.partial(cut, target_bytes=1))


def distributed(module: nn.Module, line: str) -> Handle:
    return distorch.distribute(module, line, machine=MACHINE)


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("form", ["Q8_0", "Q4_K", "F16"])
def test_every_placement_computes_the_packed_modules_bits(form: str, line: str) -> None:
    torch.manual_seed(0)
    module = Net(form)
    with torch.inference_mode():
        expected = module(IDS)
        handle = distributed(module, line)
        for _ in range(2):
            assert torch.equal(module(IDS), expected)
        handle.remove()
        assert torch.equal(module(IDS), expected)


def test_remove_gives_the_same_objects_with_the_same_bytes() -> None:
    module = Net("Q8_0")
    before: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    packed = {name: each for name, each in before.items() if isinstance(each, QuantTensor)}
    blocks = {name: each.packed.clone() for name, each in packed.items()}
    handle = distributed(module, "cpu,0b;disk,*")
    streamed = module.layers[0].weight
    assert isinstance(streamed, RestingWeight)
    assert not packed["layers.0.weight"].packed.numel()
    handle.remove()
    after = dict(module.named_parameters(remove_duplicate=False))
    assert all(after[name] is each for name, each in before.items())
    assert len(blocks) == 6
    assert all(torch.equal(packed[name].packed, raw) for name, raw in blocks.items())


def test_the_plan_counts_bytes_as_they_are_stored() -> None:
    tree = describe(Net("Q4_K"))
    specs = {spec.name: spec for node in tree.root.walk() for spec in node.tensors}
    linear, conv = specs["layers.0.weight"], specs["conv.weight"]
    assert (linear.dtype, linear.nbytes) == ("Q4_K", WIDTH * 144)
    assert conv.whole
    assert conv.nbytes == 3 * WIDTH * 144
    assert specs["embed.weight"].looked_up is False  # it is the head's too
    assert not tree.notes


def test_an_error_while_filling_gives_the_bytes_back() -> None:
    module = Net("Q8_0")
    with torch.inference_mode():
        expected = module(IDS)

    def fail(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distorch.distribute(module, "cpu,0b;disk,*", machine=MACHINE, progress=fail)
    with torch.inference_mode():
        assert torch.equal(module(IDS), expected)


def test_rebudget_moves_packed_weights() -> None:
    module = Net("Q8_0")
    with torch.inference_mode():
        expected = module(IDS)
        handle = distributed(module, LINES[0])
        for line in LINES[1:]:
            handle.rebudget(line, machine=MACHINE)
            assert torch.equal(module(IDS), expected)
        handle.remove()
