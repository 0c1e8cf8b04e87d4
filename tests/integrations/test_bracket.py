"""What a module is pointed at while it runs, and what it may keep afterwards."""

from __future__ import annotations

import functools

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows
from torch import Tensor, nn

from distorch.integrations import planning
from distorch.integrations.attach import Handle
from distorch.integrations.module_tree import Stored, describe
from distorch.integrations.request import Request
from distorch.plan.blocks import cut
from distorch.quant.tensor import QuantTensor
from distorch.tiers.sources import MemorySource

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
