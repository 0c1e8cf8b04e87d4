"""From the first placement to the last: modules of every kind, moved between devices, and back."""

from __future__ import annotations

import copy
import gc
from contextlib import nullcontext
from typing import TYPE_CHECKING, cast

import pytest
import torch
from torch import Tensor, nn

import distorch
from distorch import vgpu
from distorch.errors import AllocationError
from tests.accelerator.make import MACHINE, chain, distributed, examples, same
from tests.integrations.modules import CASES

if TYPE_CHECKING:
    from collections.abc import Iterator

DEVICE, OTHER = "vgpu:0", "vgpu:1"
ALL = "vgpu:0,20%;cpu,30%;vgpu:1,30%;disk,20%"
LINES = ["vgpu:0,*", "vgpu:0,0b;cpu,*", "vgpu:0,0b;vgpu:1,*", "vgpu:0,0b;disk,*", ALL]


@pytest.fixture(autouse=True, params=[False, True], ids=["eager", "enqueued"])
def _behaviour(request: pytest.FixtureRequest, _devices: None) -> Iterator[None]:
    with vgpu.settings(enqueued=request.param, races="raise", delay_seconds=3e-4):
        yield


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("case", CASES)
def test_modules_of_every_kind_compute_the_bits_of_the_device(case: str, line: str) -> None:
    make, make_input = CASES[case]
    module = make().eval()
    parameters = dict(module.named_parameters(remove_duplicate=False))
    values = {name: each.detach().clone() for name, each in parameters.items()}
    plain = copy.deepcopy(module).to(DEVICE)
    inputs = [make_input().to(DEVICE) for _ in range(2)]
    handle = distorch.distribute(module, line, machine=MACHINE)
    with torch.inference_mode():
        for x in inputs:
            assert same(module(x), plain(x))
    handle.remove()
    after = dict(module.named_parameters(remove_duplicate=False))
    assert all(after[name] is each for name, each in parameters.items())
    assert all(same(after[name], value) for name, value in values.items())
    assert all(each.device.type == "cpu" for each in after.values())


@pytest.mark.parametrize("compute", [DEVICE, OTHER])
def test_a_module_that_lives_on_a_device_is_distributed_from_there(compute: str) -> None:
    x, expected = torch.randn(2, 256), None
    module = chain().to(DEVICE)
    with torch.inference_mode():
        expected = module(x.to(DEVICE))
        parameters = dict(module.named_parameters())
        handle = distorch.distribute(
            module, "vgpu:0,30%;vgpu:1,30%;cpu,40%", compute=compute, machine=MACHINE
        )
        assert handle.plan.compute == compute
        for _ in range(2):
            assert same(module(x.to(compute)), expected)
        handle.remove()
        assert all(found is parameters[name] for name, found in module.named_parameters())
        assert {str(each.device) for each in parameters.values()} == {DEVICE}
        assert same(module(x.to(DEVICE)), expected)


class Counting(nn.Module):
    """Buffers that change, and parameters that cannot be placed."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(64)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.turned = nn.Parameter(torch.randn(64, 64).t())
        self.register_buffer("num_passes", torch.zeros((), dtype=torch.int64))
        self.register_buffer("shared", self.norm.running_mean)

    def forward(self, x: Tensor) -> Tensor:
        cast("Tensor", self.num_passes).add_(1)
        x = self.norm(x)
        for layer in self.layers:
            x = torch.tanh(layer(x) @ self.turned)
        return x + cast("Tensor", self.shared)


@pytest.mark.parametrize("removed_on", ["the default stream", "the stream of the passes"])
@pytest.mark.parametrize("start", ["cpu", OTHER])
def test_buffers_and_what_cannot_be_placed_go_to_the_device_and_come_back(
    start: str, removed_on: str
) -> None:
    """Passes on a stream of the caller's change the buffers, and nobody waits for it before."""
    plain, x = Counting(), torch.randn(8, 64)
    module = copy.deepcopy(plain).to(start)
    module.register_buffer("shared", module.norm.running_mean)  # `to` has made two of them
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    handle = distorch.distribute(module, ALL, machine=MACHINE)
    assert {str(buffer.device) for buffer in module.buffers()} == {DEVICE}
    assert str(module.turned.device) == DEVICE
    assert module.shared is module.norm.running_mean
    with torch.no_grad():
        side = torch.Stream(device=DEVICE)
        with side:
            found = [module(x.to(DEVICE)) for _ in range(3)]
        with side if removed_on == "the stream of the passes" else nullcontext():
            handle.remove()
        expected = [plain(x) for _ in range(3)]
    torch.accelerator.synchronize(DEVICE)
    assert all(map(same, found, expected))
    after = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    assert all(after[name] is each for name, each in tensors.items())
    assert {str(each.device) for each in after.values()} == {start}
    assert module.shared is module.norm.running_mean
    for name, buffer in plain.named_buffers():
        assert same(after[name], buffer)


def test_rebudget_moves_the_weights_from_devices_to_devices_and_back() -> None:
    module, handle = distributed("bf16", "vgpu:0,100%", compute=DEVICE)
    lines = [ALL, "vgpu:2,0b;vgpu:1,*", "cpu,*", "vgpu:1,40%;vgpu:0,60%", "vgpu:0,0b;disk,*"]
    for line in lines:
        handle.rebudget(line, machine=MACHINE)
        held = handle.plan.bytes_by_tier
        for index, device in enumerate(vgpu.counters().devices):
            name = f"vgpu:{index}"
            ring = handle.plan.ring.nbytes if name == handle.plan.compute else 0
            assert device.live_bytes == held.get(name, 0) + ring
        with torch.inference_mode():
            for x, expected in examples("bf16"):
                assert same(module(x.to(handle.plan.compute)), expected)
    handle.remove()


def test_rebudget_of_packed_weights_reads_them_again() -> None:
    module, handle = distributed("Q4_K", "vgpu:0,30%;cpu,70%", compute=DEVICE)
    for line in ("vgpu:1,0b;vgpu:0,*", "vgpu:0,100%", "cpu,*"):
        handle.rebudget(line, machine=MACHINE)
        with torch.inference_mode():
            for x, expected in examples("Q4_K"):
                assert same(module(x.to(handle.plan.compute)), expected)
    handle.remove()


def test_a_line_that_does_not_fit_changes_nothing() -> None:
    module, handle = distributed("bf16", ALL, compute=DEVICE)
    plan = handle.plan
    with pytest.raises(AllocationError):
        handle.rebudget("vgpu:0,0b;vgpu:1,10%", machine=MACHINE)
    assert handle.plan is plan
    x, expected = examples("bf16")[0]
    with torch.inference_mode():
        assert same(module(x.to(DEVICE)), expected)
    handle.remove()


@pytest.mark.parametrize("donor", ["cpu", OTHER, "disk"])
def test_an_embedding_reads_from_its_donor_the_rows_it_looks_up_and_no_others(donor: str) -> None:
    torch.manual_seed(0)
    module, ids = nn.Embedding(5000, 64), torch.randint(0, 5000, (3, 7))
    expected = module(ids)
    handle = distorch.distribute(module, f"vgpu:0,0b;{donor},*", machine=MACHINE)
    before = sum(link.nbytes for link in vgpu.counters().links.values())
    with torch.inference_mode():
        assert same(module(ids.to(DEVICE)), expected)
    moved = sum(link.nbytes for link in vgpu.counters().links.values()) - before
    assert moved <= 4 * (ids.numel() * 8 + expected.nbytes)
    handle.remove()


def test_a_handle_that_is_forgotten_with_its_module_leaves_nothing() -> None:
    module, handle = distributed("bf16", ALL, compute=DEVICE)
    x, expected = examples("bf16")[0]
    with torch.inference_mode():
        found = module(x.to(DEVICE))
    del module, handle
    gc.collect()
    assert same(found, expected)
    del found
    counters = vgpu.counters()
    assert [device.live_bytes for device in counters.devices] == [0, 0, 0]
    assert counters.pinned_bytes == 0


def test_what_a_device_says_of_its_steps_adds_up() -> None:
    module, handle = distributed("bf16", "vgpu:0,0b;cpu,*", compute=DEVICE)
    x, _ = examples("bf16")[0]
    x = x.to(DEVICE)
    with torch.inference_mode():
        for _ in range(4):
            module(x)
    torch.accelerator.synchronize(DEVICE)
    stats = handle.stats()
    assert stats.num_steps == 4
    assert stats.streamed_bytes >= 4 * handle.plan.streamed_bytes
    assert 0 < stats.waited_seconds <= stats.step_seconds
    assert stats.transfer_seconds > 0
    assert 0 <= stats.efficiency <= 1
    handle.remove()
