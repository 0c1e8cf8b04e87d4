"""What a module is pointed at while it runs, and what it may keep afterwards."""

from __future__ import annotations

import functools
from typing import cast

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows
from torch import Tensor, nn

import distorch
from distorch.integrations import planning
from distorch.integrations.attach import Handle
from distorch.integrations.module_tree import Stored, describe
from distorch.integrations.request import Request
from distorch.machine import Machine
from distorch.plan.blocks import cut
from distorch.quant.tensor import QuantTensor
from distorch.tiers.sources import MemorySource
from tests.integrations.make import equal

WIDTH, NUM_LAYERS = 64, 8


class Gives(nn.Module):
    """Returns its weight beside its result, as a head that is shared by hand would."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, self.weight), self.weight


@pytest.fixture
def packed_model(monkeypatch: pytest.MonkeyPatch) -> tuple[nn.ModuleList, list[Tensor], Handle]:
    """Modules that stream from Q8_0, one block each; the dense weights; the handle."""
    monkeypatch.setattr(planning, "cut", functools.partial(cut, target_bytes=1))
    rng = np.random.default_rng(0)
    kind = gguf.GGMLQuantizationType.Q8_0
    with torch.device("meta"):
        module = nn.ModuleList([Gives() for _ in range(NUM_LAYERS)])
    packed = {
        f"{i}.weight": gguf.quants.quantize(rng.normal(0, 1, (WIDTH, WIDTH)).astype("f4"), kind)
        for i in range(NUM_LAYERS)
    }
    dense = [torch.from_numpy(gguf.quants.dequantize(rows, kind)) for rows in packed.values()]
    stored = {
        name: Stored(dtype="Q8_0", shape=(WIDTH, WIDTH), nbytes=rows.nbytes)
        for name, rows in packed.items()
    }
    source = MemorySource({name: memoryview(rows.tobytes()) for name, rows in packed.items()})
    handle = Handle(module, describe(module, stored), source)
    handle.bind(Request(allocation="cpu,0b;disk,*"), None, None)
    return module, dense, handle


Model = tuple[nn.ModuleList, list[Tensor], Handle]


def test_a_packed_weight_that_a_module_returns_outlives_its_slot(packed_model: Model) -> None:
    """Its bytes are in a slot that another block is about to take."""
    module, dense, handle = packed_model
    assert handle.plan.ring.num_slots < NUM_LAYERS
    x = torch.randn(3, WIDTH)
    with torch.inference_mode():
        given = [gives(x) for gives in module]
        for (result, weight), expected in zip(given, dense, strict=True):
            assert torch.equal(result, F.linear(x, expected))
            assert torch.equal(weight + 0, expected)
    handle.remove()


def test_a_module_finds_packed_bytes_while_it_runs_and_a_resting_weight_after(
    packed_model: Model,
) -> None:
    module, _, handle = packed_model
    seen: list[Tensor] = []
    first = module[0]
    hook = first.register_forward_pre_hook(lambda m, _: seen.append(m.weight))
    resting = first.weight
    with torch.inference_mode():
        first(torch.randn(1, WIDTH))
    hook.remove()
    assert isinstance(seen[0], QuantTensor)
    assert first.weight is resting
    handle.remove()
    assert isinstance(first.weight, QuantTensor)
    assert isinstance(first.weight, nn.Parameter)


def test_a_weight_that_a_module_returns_outlives_its_slot(machine: Machine) -> None:
    """The slot is written again before the pass ends: what was returned is a copy."""

    class Gives(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(1500, 1500))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"x": x, "weight": self.weight, "rows": self.weight[3:9].t()}

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gives = Gives()
            self.layers = nn.Sequential(*(nn.Linear(1500, 1500) for _ in range(6)))

        def forward(self, x: Tensor) -> Tensor:
            given = self.gives(x)
            y = self.layers(given["x"])
            return torch.cat([y @ given["weight"], given["rows"].t()])

    module, x = Model(), torch.randn(2, 1500)
    with torch.inference_mode():
        expected = module(x)
        handle = distorch.distribute(module, "cpu,0b;disk,*", machine=machine)
        assert handle.plan.ring.num_slots < 7
        for _ in range(3):
            assert equal(module(x), expected)
    handle.remove()


def test_a_shared_weight_that_a_module_returns_is_the_weight(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It rests elsewhere and has no memory of its own to look at."""
    from distorch.integrations import planning

    monkeypatch.setattr(planning, "cut", functools.partial(cut, target_bytes=1))

    class Gives(nn.Module):
        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.weight = cast("nn.Parameter", weight)
            self.scale = nn.Parameter(torch.randn(32))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * self.scale, self.weight

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32)
            self.gives = Gives(self.layer.weight)

        def forward(self, x: Tensor) -> Tensor:
            scaled, weight = cast("tuple[Tensor, Tensor]", self.gives(self.layer(x)))
            return scaled @ weight

    module, x = Model(), torch.randn(2, 32)
    with torch.inference_mode():
        expected = module(x)
        handle = distorch.distribute(module, "cpu,0b;disk,*", machine=machine)
        assert equal(module(x), expected)
        assert equal(module.gives(x)[1] + 0, module.layer.weight + 0)
    handle.remove()


def test_a_backward_pass_through_slots_that_were_used_again_raises(machine: Machine) -> None:
    module = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(6)))
    handle = distorch.distribute(module, "cpu,0b;disk,*", machine=machine)
    x = torch.randn(2, 2048, requires_grad=True)
    y = module(x).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    handle.remove()
