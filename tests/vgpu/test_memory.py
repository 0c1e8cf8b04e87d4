"""Memories: capacity, poison, and what the host pins."""

from __future__ import annotations

import mmap

import pytest
import torch

from distorch import vgpu

pytestmark = pytest.mark.vgpu

DEVICE = "vgpu:0"
MIB = 2**20


def of_bytes(nbytes: int, device: str = DEVICE) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def test_a_device_holds_as_many_bytes_as_it_has_and_not_one_more() -> None:
    vgpu.set_capacity(0, 1000)
    one = of_bytes(999)
    two = of_bytes(1)
    with pytest.raises(torch.OutOfMemoryError, match="1 bytes on vgpu:0, which has 1000"):
        of_bytes(1)
    of_bytes(1, "vgpu:1")
    del two
    of_bytes(1)
    del one
    assert vgpu.counters().devices[0].live_bytes == 0


def test_results_count_too(enqueued: bool) -> None:  # noqa: FBT001 (a fixture)
    vgpu.set_capacity(0, 5 * MIB)
    with vgpu.settings(enqueued=enqueued):
        x = torch.zeros(2 * MIB, dtype=torch.uint8, device=DEVICE)
        y = x + 1
        with pytest.raises(torch.OutOfMemoryError):
            x + 1
        assert vgpu.counters().devices[0].live_bytes == 4 * MIB
        assert y.sum().item() == 2 * MIB


def test_counters_return_to_zero_and_the_peak_stays() -> None:
    x = of_bytes(100)
    y = x.view(10, 10)[2:]
    device = vgpu.counters().devices[0]
    assert (device.live_bytes, device.num_allocations, device.num_frees) == (100, 1, 0)
    del x
    assert vgpu.counters().devices[0].live_bytes == 100  # the view holds it
    del y
    device = vgpu.counters().devices[0]
    assert (device.live_bytes, device.peak_bytes, device.num_frees) == (0, 100, 1)


def test_torchs_own_questions_are_answered() -> None:
    module = torch.get_device_module("vgpu")
    x = of_bytes(100, "vgpu:1")
    free, total = module.mem_get_info(1)
    assert total - free == x.nbytes == module.memory_allocated("vgpu:1")
    assert torch.accelerator.memory_allocated(1) == 100
    del x
    assert module.max_memory_allocated(1) == 100
    module.reset_peak_memory_stats(1)
    assert module.max_memory_allocated(1) == 0
    assert module.device_count() == torch.accelerator.device_count() >= 2
    with module.device(1):
        assert module.current_device() == 1
    assert module.current_device() == 0
    assert "virtual" in module.get_device_name()


def test_storage_is_resized_to_nothing_and_back() -> None:
    x = torch.ones(1000, device=DEVICE)
    x.untyped_storage().resize_(0)
    assert vgpu.counters().devices[0].live_bytes == 0
    x.untyped_storage().resize_(4000)
    assert x.isnan().all().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_fresh_memory_is_poison(dtype: torch.dtype) -> None:
    assert torch.empty(9, dtype=dtype, device=DEVICE).float().isnan().all().item()
    assert torch.empty(9, dtype=dtype, pin_memory=True).float().isnan().all()


def test_freed_memory_is_poison_to_a_late_reader() -> None:
    """Two streams: the second reads what the first has freed, without record_stream."""
    other = torch.Stream(device=DEVICE)
    with vgpu.settings(enqueued=True, op_seconds=0.02):
        x = torch.ones(1000, device=DEVICE)
        other.wait_stream(torch.accelerator.current_stream())
        with other:
            busy = torch.zeros(1, device=DEVICE).add_(1).add_(1)
            y = x * 2
        del x
        torch.accelerator.synchronize()
        found = y.cpu()
        del busy
    assert found.isnan().all()


def test_record_stream_keeps_memory_for_a_late_reader() -> None:
    other = torch.Stream(device=DEVICE)
    with vgpu.settings(enqueued=True, op_seconds=0.02):
        x = torch.ones(1000, device=DEVICE)
        other.wait_stream(torch.accelerator.current_stream())
        with other:
            torch.zeros(1, device=DEVICE).add_(1).add_(1)
            y = x * 2
            x.record_stream(other)
        del x
        torch.accelerator.synchronize()
        found = y.cpu()
    assert found.eq(2).all()


def test_a_copy_is_poison_until_it_is_complete() -> None:
    vgpu.set_link("cpu", DEVICE, 4 * MIB / 0.05)
    source = torch.ones(MIB).pin_memory()
    target = torch.zeros(MIB, device=DEVICE)
    copying, reading = torch.Stream(device=DEVICE), torch.Stream(device=DEVICE)
    with copying:
        target.copy_(source, non_blocking=True)
    with reading, vgpu.settings():  # waits: the copy is complete
        assert target.eq(1).all().item()
    with copying:
        target.copy_(source, non_blocking=True)
    while not target.view(torch.uint8).cpu().eq(255).any():
        assert not copying.query()
    copying.synchronize()
    assert target.eq(1).all().item()


def test_a_source_that_is_written_too_early_shows() -> None:
    vgpu.set_link("cpu", DEVICE, 4 * MIB / 0.03)
    source = torch.ones(MIB).pin_memory()
    target = torch.empty(MIB, device=DEVICE)
    target.copy_(source, non_blocking=True)
    source.fill_(7)
    torch.accelerator.synchronize()
    assert target.eq(7).all().item()


def test_without_poison_memory_is_what_it_was() -> None:
    with vgpu.settings(poison=False):
        torch.empty(2**20, device=DEVICE)  # only allocated: nothing to assert about its content
    assert vgpu.counters().devices[0].num_frees == 1


def test_pinned_memory_is_counted_and_limited() -> None:
    with vgpu.settings(pinned_limit_bytes=1000):
        first = torch.empty(600, dtype=torch.uint8, pin_memory=True)
        assert first.is_pinned()
        assert first[10:20].is_pinned()
        with pytest.raises(RuntimeError, match="cannot pin 500 bytes"):
            torch.empty(500, dtype=torch.uint8, pin_memory=True)
        with pytest.raises(RuntimeError, match="cannot pin"):
            torch.zeros(500, dtype=torch.uint8).pin_memory()
        plain = torch.zeros(500, dtype=torch.uint8)
        with pytest.raises(RuntimeError, match="cannot pin"):
            vgpu.register(plain.data_ptr(), plain.nbytes)
        assert not plain.is_pinned()
        assert vgpu.counters().pinned_bytes == 600
        del first
        vgpu.register(plain.data_ptr(), plain.nbytes)
        assert plain.is_pinned()
        vgpu.unregister(plain.data_ptr())
    counters = vgpu.counters()
    assert (counters.pinned_bytes, counters.pinned_peak_bytes) == (0, 600)


def test_registered_memory_is_copied_without_the_host() -> None:
    vgpu.set_link("cpu", DEVICE, MIB / 0.05)
    memory = mmap.mmap(-1, MIB)
    host = torch.frombuffer(memory, dtype=torch.uint8)
    host.fill_(3)
    vgpu.register(host.data_ptr(), host.nbytes)
    target = of_bytes(MIB)
    target.copy_(host, non_blocking=True)
    event = torch.Event(device=DEVICE)
    event.record()
    assert not event.query()
    assert vgpu.counters().num_host_syncs == 0
    vgpu.unregister(host.data_ptr())  # waits for the copy
    assert not host.is_pinned()
    event.synchronize()
    assert target.eq(3).all().item()
    assert vgpu.counters().num_pageable_copies == 0


def test_memory_is_registered_once_and_as_it_was() -> None:
    plain = torch.zeros(1000, dtype=torch.uint8)
    vgpu.register(plain.data_ptr(), 1000)
    with pytest.raises(RuntimeError, match="already"):
        vgpu.register(plain.data_ptr() + 10, 10)
    with pytest.raises(RuntimeError, match="no registered memory"):
        vgpu.unregister(plain.data_ptr() + 10)
    vgpu.unregister(plain.data_ptr())
    with pytest.raises(RuntimeError, match="no registered memory"):
        vgpu.unregister(plain.data_ptr())
    with pytest.raises(RuntimeError, match="no bytes"):
        vgpu.register(plain.data_ptr(), 0)


def test_a_pinned_source_lives_until_it_is_copied() -> None:
    vgpu.set_link("cpu", DEVICE, 4000 / 0.005)
    target = torch.empty(1000, device=DEVICE)
    for value in range(5):
        target.copy_(torch.full((1000,), float(value)).pin_memory(), non_blocking=True)
    torch.accelerator.synchronize()
    assert target.eq(4).all().item()
