"""Streams and events: what runs when."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch

from distorch import vgpu

pytestmark = pytest.mark.vgpu

DEVICE = "vgpu:0"
MIB = 2**20
COPY_SECONDS = 0.03
LATE_SECONDS = 0.1  # what a busy machine may add


@pytest.fixture
def pinned() -> torch.Tensor:
    """A MiB that takes `COPY_SECONDS` to the device."""
    vgpu.set_link("cpu", DEVICE, MIB / COPY_SECONDS)
    return torch.ones(MIB, dtype=torch.uint8).pin_memory()


def empty() -> torch.Tensor:
    return torch.empty(MIB, dtype=torch.uint8, device=DEVICE)


def test_a_pinned_copy_leaves_the_host_at_once(pinned: torch.Tensor) -> None:
    target = empty()
    begin = time.perf_counter()
    target.copy_(pinned, non_blocking=True)
    assert time.perf_counter() - begin < COPY_SECONDS / 2
    stream = torch.accelerator.current_stream()
    assert not stream.query()
    stream.synchronize()
    assert stream.query()
    assert COPY_SECONDS <= time.perf_counter() - begin < COPY_SECONDS + LATE_SECONDS


def test_a_pageable_copy_blocks_the_host_and_is_counted(pinned: torch.Tensor) -> None:
    target, pageable = empty(), pinned.clone()
    assert not pageable.is_pinned()
    begin = time.perf_counter()
    target.copy_(pageable, non_blocking=True)
    assert time.perf_counter() - begin >= COPY_SECONDS
    counters = vgpu.counters()
    assert (counters.num_pageable_copies, counters.num_host_syncs) == (1, 1)


def test_copies_overlap_compute(pinned: torch.Tensor, enqueued: bool) -> None:  # noqa: FBT001
    copying = torch.Stream(device=DEVICE)
    compute = torch.accelerator.current_stream()
    slots = [empty() for _ in range(4)]
    x = torch.zeros(8, device=DEVICE)
    copying.wait_stream(compute)
    with (
        vgpu.settings(enqueued=enqueued, races="raise", op_seconds=COPY_SECONDS),
        vgpu.trace() as spans,
    ):
        events = []
        for slot in slots:
            with copying:
                slot.copy_(pinned, non_blocking=True)
            events.append(copying.record_event())
        for event in events:
            compute.wait_event(event)
            x.add_(1)
    copies = [span for span in spans if span.operation == "copy"]
    adds = [span for span in spans if span.operation == "aten::add_"]
    assert len(copies) == len(adds) == 4
    for copy, add in zip(copies, adds, strict=True):
        assert copy.end <= add.begin  # each waits for its own copy,
    together = [  # while the next is on its way
        min(copy.end, add.end) - max(copy.begin, add.begin)
        for copy, add in zip(copies[1:], adds, strict=False)
    ]
    assert min(together) > 0
    assert sum(together) > COPY_SECONDS  # of the three times that are ideal
    copy = copies[0]
    assert (copy.source, copy.target, copy.nbytes) == ("cpu", DEVICE, MIB)
    assert (copy.device, copy.stream) == (DEVICE, copying.stream_id)
    assert COPY_SECONDS <= copy.seconds < COPY_SECONDS + LATE_SECONDS


def test_compute_is_asynchronous_where_it_is_enqueued() -> None:
    x = torch.zeros(8, device=DEVICE)
    for enqueued, is_done in ((False, True), (True, False)):
        with vgpu.settings(enqueued=enqueued, op_seconds=0.02):
            x.add_(1)
            assert torch.accelerator.current_stream().query() == is_done


def test_an_event_that_was_never_recorded_is_done() -> None:
    event = torch.Event(device=DEVICE)
    assert event.query()
    event.synchronize()
    torch.accelerator.current_stream().wait_event(event)


def test_a_wait_means_the_record_before_it(pinned: torch.Tensor) -> None:
    """Recording again does not move a wait that is queued, nor does a wait see what comes after."""
    first, second = torch.Stream(device=DEVICE), torch.Stream(device=DEVICE)
    event = torch.Event(device=DEVICE)
    event.record(first)
    second.wait_event(event)
    target = empty()
    with first:
        target.copy_(pinned, non_blocking=True)
        event.record(first)
    second.synchronize()  # it waited for the first record only
    assert not event.query()
    event.synchronize()
    assert event.query()


def test_events_measure_time(pinned: torch.Tensor) -> None:
    begin, end = (torch.Event(device=DEVICE, enable_timing=True) for _ in range(2))
    with pytest.raises(ValueError, match="recorded"):
        begin.elapsed_time(end)
    target = empty()
    begin.record()
    target.copy_(pinned, non_blocking=True)
    end.record()
    with pytest.raises(RuntimeError, match="complete"):
        begin.elapsed_time(end)
    end.synchronize()
    assert COPY_SECONDS * 1e3 <= begin.elapsed_time(end) < (COPY_SECONDS + LATE_SECONDS) * 1e3


def test_streams_repeat_beyond_the_pool() -> None:
    streams = [torch.Stream(device=DEVICE) for _ in range(40)]
    assert len({stream.stream_id for stream in streams}) == 32
    assert 0 not in {stream.stream_id for stream in streams}


def test_a_stream_of_another_device_makes_that_current() -> None:
    with torch.Stream(device="vgpu:1"):
        assert torch.accelerator.current_device_index() == 1
        assert torch.empty(1, device="vgpu").device == torch.device("vgpu:1")
    assert torch.accelerator.current_device_index() == 0


def test_threads_have_devices_and_streams_of_their_own() -> None:
    seen = []

    def look() -> None:
        stream = torch.accelerator.current_stream(0)
        seen.append((torch.accelerator.current_device_index(), stream.stream_id))

    with torch.accelerator.device_index(1), torch.Stream(device=DEVICE):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert seen == [(0, 0)]


def test_waiting_leaves_other_python_threads_alone(pinned: torch.Tensor) -> None:
    target, count, stop = empty(), 0, threading.Event()

    def run() -> None:
        nonlocal count
        while not stop.wait(0.001):
            count += 1

    thread = threading.Thread(target=run)
    thread.start()
    for _ in range(3):
        target.copy_(pinned, non_blocking=True)
    event = torch.accelerator.current_stream().record_event()
    event.synchronize()
    stop.set()
    thread.join()
    assert count > 10


def test_an_error_of_a_stream_surfaces_once_when_it_is_waited_for() -> None:
    index = torch.tensor([5])
    with vgpu.settings(enqueued=True):
        x = torch.zeros(3, device=DEVICE).index_select(0, index.to(DEVICE))
        with pytest.raises(RuntimeError, match=r"index out of range.*queued earlier on vgpu:0"):
            torch.accelerator.synchronize()
        torch.accelerator.synchronize()
    assert x.isnan().all().item()


def test_wrong_shapes_raise_at_the_call(enqueued: bool) -> None:  # noqa: FBT001 (a fixture)
    with vgpu.settings(enqueued=enqueued):
        x = torch.zeros(3, device=DEVICE)
        with pytest.raises(RuntimeError, match="must match the size"):
            x + torch.zeros(4, device=DEVICE)
        with pytest.raises(RuntimeError, match="must match the size"):
            x.add_(torch.zeros(4, device=DEVICE))


def test_what_the_host_passes_is_read_at_the_call() -> None:
    with vgpu.settings(enqueued=True, op_seconds=0.01):
        scalar, x = torch.tensor(2.0), torch.ones(3, device=DEVICE)
        y = x * scalar
        scalar.fill_(5)
        assert y.cpu().eq(2).all()


def test_waits_of_the_host_are_counted() -> None:
    x = torch.ones(3, device=DEVICE)
    stream = torch.accelerator.current_stream()
    for wait in (
        stream.synchronize,
        stream.record_event().synchronize,
        torch.accelerator.synchronize,
    ):
        before = vgpu.counters().num_host_syncs
        wait()
        assert vgpu.counters().num_host_syncs == before + 1
    asks: tuple[Callable[[], object], ...] = (x.sum().item, x.nonzero, x.cpu)
    for ask in asks:
        before = vgpu.counters().num_host_syncs
        ask()
        assert vgpu.counters().num_host_syncs == before + 1
    before = vgpu.counters().num_host_syncs
    x.add_(1).view(3).mul(2)
    assert vgpu.counters().num_host_syncs == before


def test_more_than_the_queue_holds_waits_for_room() -> None:
    x = torch.zeros(1, device=DEVICE)
    with vgpu.settings(enqueued=True):
        for _ in range(5000):
            x.add_(1)
        assert x.item() == 5000


def feed(seed: int, wrong: list[object]) -> None:
    """Multiply by matrices that a second stream brings, many times."""
    device = f"vgpu:{seed % 2}"
    copying, computing = (torch.Stream(device=device) for _ in range(2))
    generator = torch.Generator().manual_seed(seed)
    hosts = [torch.randn(32, 32, generator=generator).pin_memory() for _ in range(4)]
    expected = torch.eye(32)
    for host in hosts:
        expected = torch.nn.functional.linear(expected, host)
    with torch.inference_mode(), computing:
        for round_ in range(60):
            copying.wait_stream(computing)
            x = torch.eye(32, device=device)
            for host in hosts:
                with copying:
                    weight = host.to(device, non_blocking=True)
                    event = copying.record_event()
                computing.wait_event(event)
                weight.record_stream(computing)
                x = torch.nn.functional.linear(x, weight)
            if not torch.equal(x.cpu(), expected):
                wrong.append((seed, round_))


def test_many_threads_copy_without_a_wrong_byte() -> None:
    wrong: list[object] = []
    before = [device.live_bytes for device in vgpu.counters().devices]
    for index in (0, 1):
        vgpu.set_link("cpu", f"vgpu:{index}", 1e9, "shared")
    vgpu.set_bus("shared", 1e9)
    with vgpu.settings(enqueued=True, delay_seconds=0.0002, races="count"):
        threads = [threading.Thread(target=feed, args=(seed, wrong)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    counters = vgpu.counters()
    assert counters.num_races == 0, vgpu.races()[0]
    assert [device.live_bytes for device in counters.devices] == before
    copies = [counters.links["cpu", f"vgpu:{index}"] for index in (0, 1)]
    assert [link.num_copies for link in copies] == [480, 480]
    assert [link.nbytes for link in copies] == [480 * 4096] * 2
