"""LoRAs over every format of weights, streamed and resident: the bits of the dense module."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn

import distorch
from tests.integrations.test_formats_matrix import FORMATS, KINDS, MACHINE, Stored, packed, run

RANK = 4
LINES = ("cpu,*", "cpu,0b;disk,*")


def lora_of(module: nn.Module, dtype: torch.dtype, *, dora: bool) -> dict[str, Tensor]:
    """A LoRA of the only module in a sequence, or a DoRA, which measures the weight's rows."""
    random = torch.Generator().manual_seed(int(dora))
    weight = cast("Tensor", module.weight)
    shape, size = tuple(weight.shape), float(weight.abs().max())
    down: tuple[int, ...]
    up: tuple[int, ...]
    if isinstance(module, nn.Embedding):
        names, down, up = "embedding_A embedding_B", (RANK, shape[0]), (shape[1], RANK)
    else:
        ones = (1,) * (len(shape) - 2)
        names, down, up = "A.weight B.weight", (RANK, *shape[1:]), (shape[0], RANK, *ones)
    found = {
        f"0.lora_{name}": (torch.randn(each, generator=random) * size**0.5).to(dtype)
        for name, each in zip(names.split(), (down, up), strict=True)
    }
    if dora:
        found["0.lora_magnitude_vector"] = (torch.rand(up[0], generator=random) * size).to(dtype)
    return found


def outputs(module: nn.Module, given: Tensor, line: str, dtype: torch.dtype) -> list[Tensor]:
    """What one LoRA gives, and two."""
    model = nn.Sequential(module)
    handle = distorch.distribute(model, line, machine=MACHINE)
    found = []
    for dora in (False, True):
        handle.add_lora(lora_of(module, dtype, dora=dora), 0.5)
        found += [run(model, given), run(model, given)]
    handle.remove()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["Linear", "Embedding", "Conv2d"])
@pytest.mark.parametrize("stored", FORMATS, ids=str)
def test_streamed_is_resident_bit_for_bit(stored: Stored, kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module, given = KINDS[kind].make().to(dtype).eval(), KINDS[kind].given(dtype)
    weight, dense = packed(stored, tuple(cast("Tensor", module.weight).shape), dtype)
    module.weight = nn.Parameter(dense, requires_grad=False)
    plain, expected = run(module, given), outputs(module, given, LINES[0], dtype)
    assert not torch.equal(expected[0], plain)
    assert not torch.equal(expected[2], expected[0])
    module._parameters["weight"] = weight  # type: ignore[assignment]  # it passes for one
    for line in LINES:
        found = outputs(module, given, line, dtype)
        assert [torch.equal(*pair) for pair in zip(found, expected, strict=True)] == [True] * 4
    assert torch.equal(run(module, given), plain)
