"""Every format of weights in every kind of module: streamed gives the bits of resident.

Both equal the module whose dense weights are the decoded ones, so that a format cannot agree with
itself alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import distorch
from distorch.quant.block_formats import BLOCK_FORMATS, block_format
from distorch.quant.dequantize import dequantize
from distorch.quant.scale import Scale
from distorch.quant.tensor import QuantTensor
from tests.plan_strategies import roomy
from tests.quant.make import random_blocks

MACHINE = roomy("cpu", "disk")
COLUMNS = 256  # whole blocks of every format
ROWS = 64

Shape = tuple[int, ...]
Input = Callable[[torch.dtype], Tensor]


@dataclass(frozen=True)
class Kind:
    """A module with one weight, and what it is given."""

    make: Callable[[], nn.Module]
    given: Input


def _floats(*shape: int) -> Input:
    return lambda dtype: torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


KINDS = {
    "Linear": Kind(lambda: nn.Linear(COLUMNS, ROWS), _floats(3, COLUMNS)),
    "Linear, one row": Kind(lambda: nn.Linear(COLUMNS, ROWS, bias=False), _floats(1, COLUMNS)),
    "Embedding": Kind(lambda: nn.Embedding(ROWS, COLUMNS), lambda _: torch.tensor([[3, 60, 3]])),
    "Conv1d": Kind(lambda: nn.Conv1d(128, 16, 2), _floats(1, 128, 8)),
    "Conv2d": Kind(lambda: nn.Conv2d(64, 16, 2), _floats(1, 64, 5, 5)),
    "Conv3d": Kind(lambda: nn.Conv3d(32, 16, 2), _floats(1, 32, 3, 3, 3)),
}


@dataclass(frozen=True)
class Stored:
    """A format, and whether one scale is for all of a weight, for each row, or there is none."""

    name: str
    scaled: str = ""

    def __str__(self) -> str:
        return f"{self.name}{self.scaled and ', a scale ' + self.scaled}"


FORMATS = [
    *(Stored(name) for name in BLOCK_FORMATS if name != "I8"),
    *(Stored(name, to) for name in ("F8_E4M3", "F8_E5M2", "I8") for to in ("for all", "by row")),
]


def packed(stored: Stored, shape: Shape, dtype: torch.dtype) -> tuple[QuantTensor, Tensor]:
    """A packed weight of small finite values, and the dense one that it stands for."""
    form = block_format(stored.name)
    count = torch.Size(shape).numel() // form.elements
    raw = torch.from_numpy(random_blocks(stored.name, 16 * count).copy())
    decoded = dequantize(raw, form, torch.empty(16 * count, form.elements))
    size = decoded.abs().amax(1)
    order = torch.where(size.isfinite() & (size < 1e6), 0, 1).argsort(stable=True)[:count]
    values = decoded[order].reshape(shape)
    scale = None
    if stored.scaled:
        factors = torch.rand(shape[0] if stored.scaled == "by row" else 1) / 100
        scale = Scale.fit(factors, shape)
        values = values * factors.view(-1, *[1] * (len(shape) - 1))
    blocks = raw[order].contiguous().view(-1)
    return QuantTensor(blocks, form, shape, dtype, scale), values.to(dtype)


def run(module: nn.Module, given: Tensor) -> Tensor:
    with torch.inference_mode():
        out: Tensor = module(given)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", FORMATS, ids=str)
def test_streamed_is_resident_bit_for_bit(stored: Stored, kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module, given = KINDS[kind].make().to(dtype).eval(), KINDS[kind].given(dtype)
    found = module.weight
    assert isinstance(found, Tensor)
    weight, dense = packed(stored, tuple(found.shape), dtype)
    module.weight = nn.Parameter(dense, requires_grad=False)
    expected = run(module, given)
    assert expected.isfinite().all()
    module._parameters["weight"] = weight  # type: ignore[assignment]  # it passes for one
    assert torch.equal(run(module, given), expected)
    for line in ("cpu,*", "cpu,0b;disk,*"):
        handle = distorch.distribute(module, line, machine=MACHINE)
        assert not handle.plan.notes or stored.scaled
        assert torch.equal(run(module, given), expected)
        assert torch.equal(run(module, given), expected)
        handle.remove()
    assert module._parameters["weight"] is weight  # type: ignore[comparison-overlap]
    assert torch.equal(run(module, given), expected)
