"""What a device is given: weights whole, where its library expects them, and room to work ahead."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

import distorch
from distorch.plan.blocks import ALIGNMENT_BYTES


def test_a_weight_of_many_rows_stays_whole_on_a_device() -> None:
    model = nn.Sequential(nn.Linear(16, 20_480), nn.Linear(20_480, 16)).eval()
    x = torch.randn(3, 16)
    with torch.inference_mode():
        expected = model(x)
        handle = distorch.distribute(model, "vgpu:0,0b;cpu,*")
        parts = [part.shape for placed in handle.plan.placements for part in placed.block.parts]
        assert (20_480, 16) in parts
        assert torch.equal(model(x.to("vgpu:0")).cpu(), expected)
        handle.remove()
        handle = distorch.distribute(model, "cpu,0b;disk,*")
        parts = [part.shape for placed in handle.plan.placements for part in placed.block.parts]
        assert (20_480, 16) not in parts
    handle.remove()


def test_weights_lie_where_a_library_of_matrices_finds_them_aligned() -> None:
    model = nn.ModuleList(nn.Linear(33, 7) for _ in range(6))
    handle = distorch.distribute(model, "vgpu:0,50%;cpu,50%")
    executor = handle._running()
    for index, placement in enumerate(handle.plan.placements):
        lease = executor.acquire(index)
        for number, _ in enumerate(placement.block.parts):
            assert lease.part(number).data_ptr() % 64 == 0  # as the virtual device allocates
            assert lease.offsets[number] % ALIGNMENT_BYTES == 0
        executor.release(lease)
    handle.remove()


def test_a_large_model_has_a_ring_to_work_ahead_in() -> None:
    widths = [1024] * 65
    model = nn.Sequential(*(nn.Linear(one, other, bias=False) for one, other in pairwise(widths)))
    handle = distorch.distribute(model, "vgpu:0,0b;cpu,*")
    ring, model_bytes = handle.plan.ring, handle.plan.model_bytes
    handle.remove()
    assert ring.num_slots > 4
    assert ring.nbytes <= model_bytes / 8
