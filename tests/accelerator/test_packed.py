"""Modules whose weights are packed in memory: on devices, and back."""

from __future__ import annotations

from typing import cast

import pytest
import torch

import distorch
from distorch.quant.tensor import QuantTensor
from tests.accelerator.make import MACHINE, same
from tests.integrations.test_packed_modules import IDS, Net

DEVICE = "vgpu:0"
LINES = ["vgpu:0,*", "vgpu:0,0b;cpu,*", "vgpu:0,20%;cpu,30%;vgpu:1,30%;disk,20%"]


@pytest.mark.parametrize("line", LINES)
def test_packed_modules_compute_the_bits_of_the_device_and_come_back(line: str) -> None:
    module = Net("Q8_0")
    before = dict(module.named_parameters(remove_duplicate=False))
    blocks = cast("QuantTensor", before["layers.0.weight"]).packed.clone()
    plain = Net("Q8_0").to(DEVICE)
    plain.load_state_dict(_dense(module), strict=False)
    with torch.inference_mode():
        handle = distorch.distribute(module, line, machine=MACHINE)
        assert same(module(IDS.to(DEVICE)), plain(IDS.to(DEVICE)))
    handle.remove()
    after = dict(module.named_parameters(remove_duplicate=False))
    assert all(after[name] is each for name, each in before.items())
    assert torch.equal(cast("QuantTensor", after["layers.0.weight"]).packed, blocks)


def _dense(module: Net) -> dict[str, torch.Tensor]:
    found = module.state_dict()
    return {name: each for name, each in found.items() if not isinstance(each, QuantTensor)}


@pytest.mark.parametrize("made_in", [False, True])
@pytest.mark.parametrize("moved_in", [False, True])
def test_a_packed_module_goes_to_a_device_packed(*, made_in: bool, moved_in: bool) -> None:
    with torch.inference_mode(made_in):
        module = Net("Q8_0")
    weight = cast("QuantTensor", module.layers[0].weight)
    blocks = weight.packed
    with torch.inference_mode(moved_in):
        module.to(DEVICE)
    assert module.layers[0].weight is weight
    assert weight.device == torch.device(DEVICE)
    assert weight.packed.device == torch.device(DEVICE)
    with torch.inference_mode(moved_in):
        module.to("cpu")
    assert torch.equal(weight.packed, blocks)
