"""LoRAs on devices: the bits of the device, their own weights on any memory, and no trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import distorch
from distorch import vgpu
from distorch.errors import AllocationError
from distorch.integrations.attach import Handle
from tests.accelerator.make import MACHINE, same
from tests.integrations.loras import IDS, first, made, second
from tests.integrations.make import num_hooks

LINES = ["vgpu:0,0b;cpu,*", "vgpu:0,50%;vgpu:1,50%", "vgpu:0,20%;cpu,30%;vgpu:1,30%;disk,20%"]


def distributed(module: nn.Module, line: str) -> Handle:
    return distorch.distribute(module, line, machine=MACHINE)


def run(module: nn.Module) -> Tensor:
    with torch.inference_mode():
        result = module(IDS.to("vgpu:0"))
    assert isinstance(result, Tensor)
    return result.cpu()


@pytest.mark.parametrize("num_loras", range(3))
@pytest.mark.parametrize("form", ["float32", "bfloat16", "Q8_0"])
def test_streamed_gives_the_bits_of_resident(form: str, num_loras: int) -> None:
    found = []
    for line in ("vgpu:0,*", *LINES):
        module = made(form)
        handle = distributed(module, line)
        for number, tensors in enumerate([first(), second()][:num_loras]):
            handle.add_lora(tensors, 0.5 + number)
        found += [run(module) for _ in range(3)]
        assert all(lora.stats().num_unplanned == 0 for lora in handle.loras.values())
        handle.remove()
    assert all(same(each, found[0]) for each in found)


def test_it_goes_with_the_model_to_another_device_and_back() -> None:
    module = made("float32")
    handle = distributed(module, "cpu,50%;disk,50%")
    lora = handle.add_lora(first())
    own = handle.add_lora(second(), allocation="cpu,0b;disk,*")
    with torch.inference_mode():
        expected = module(IDS)
    handle.rebudget(LINES[2], machine=MACHINE)
    assert {lora.plan.compute, own.plan.compute} == {"vgpu:0"}
    assert torch.allclose(run(module), expected, rtol=1e-5, atol=1e-6)
    handle.rebudget("cpu,50%;disk,50%", machine=MACHINE)
    with torch.inference_mode():
        assert torch.equal(module(IDS), expected)
    handle.remove()


def test_it_computes_where_the_model_does() -> None:
    module = made("float32")
    handle = distributed(module, LINES[0])
    before = num_hooks(module)
    with pytest.raises(AllocationError, match=r"would compute on cpu, the model on vgpu:0"):
        handle.add_lora(first(), allocation="cpu,*")
    assert num_hooks(module) == before
    handle.remove()


def test_strengths_move_nothing_and_removal_gives_the_memory_back() -> None:
    module = made("float32")
    handle = distributed(module, LINES[2])
    run(module)
    before = vgpu.counters()
    lora = handle.add_lora(second())
    run(module)
    moved = vgpu.counters().links
    for strength in (0.0, 0.3, 1.0):
        lora.strength = strength
    assert vgpu.counters().links == moved
    lora.remove()
    torch.accelerator.synchronize()
    after = vgpu.counters()
    assert [each.live_bytes for each in after.devices] == [
        each.live_bytes for each in before.devices
    ]
    assert after.pinned_bytes == before.pinned_bytes
    handle.remove()
