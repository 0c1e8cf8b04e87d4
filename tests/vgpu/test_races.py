"""The race detector: every missing wait is found, whatever the timing, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from distorch import vgpu

pytestmark = pytest.mark.vgpu

DEVICE = "vgpu:0"
NUM_BLOCKS, NUM_SLOTS, SIZE = 6, 2, 64


@pytest.fixture
def counting(enqueued: bool) -> Iterator[None]:  # noqa: FBT001 (a fixture)
    with vgpu.settings(enqueued=enqueued, races="count"):
        yield


class Ring:
    """Matrices go through slots: a stream brings them, another multiplies."""

    def __init__(self, *, ready: bool = True, free: bool = True) -> None:
        self.waits_for_ready, self.waits_for_free = ready, free
        self.copying = torch.Stream(device=DEVICE)
        self.slots = [torch.empty(SIZE, SIZE, device=DEVICE) for _ in range(NUM_SLOTS)]
        self.ready = [torch.Event(device=DEVICE) for _ in range(NUM_SLOTS)]
        self.free = [torch.Event(device=DEVICE) for _ in range(NUM_SLOTS)]
        self.copying.wait_stream(torch.accelerator.current_stream())

    def load(self, number: int, host: torch.Tensor) -> None:
        slot = number % NUM_SLOTS
        if self.waits_for_free:
            self.copying.wait_event(self.free[slot])
        with self.copying:
            self.slots[slot].copy_(host, non_blocking=True)
        self.ready[slot].record(self.copying)

    def use(self, number: int, x: torch.Tensor) -> torch.Tensor:
        slot = number % NUM_SLOTS
        compute = torch.accelerator.current_stream()
        if self.waits_for_ready:
            compute.wait_event(self.ready[slot])
        y = x @ self.slots[slot]
        self.free[slot].record(compute)
        return y

    def run(self, hosts: list[torch.Tensor]) -> torch.Tensor:
        x = torch.eye(SIZE, device=DEVICE)
        for number in range(NUM_SLOTS):
            self.load(number, hosts[number])
        for number in range(len(hosts)):
            x = self.use(number, x)
            if number + NUM_SLOTS < len(hosts):
                self.load(number + NUM_SLOTS, hosts[number + NUM_SLOTS])
        return x.cpu()


def hosts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SIZE, SIZE, generator=generator).pin_memory() for _ in range(NUM_BLOCKS)]


@pytest.mark.parametrize("seed", range(8))
def test_a_right_ring_has_no_race_and_the_right_bytes(
    seed: int,
    enqueued: bool,  # noqa: FBT001 (a fixture)
) -> None:
    sources = hosts()
    expected = torch.eye(SIZE)
    for host in sources:
        expected = expected @ host
    with vgpu.settings(enqueued=enqueued, races="raise", delay_seconds=0.002, seed=seed):
        assert torch.equal(Ring().run(sources), expected)


@pytest.mark.usefixtures("counting")
def test_reading_a_slot_before_it_is_filled_is_found_each_time() -> None:
    Ring(ready=False).run(hosts())
    reads = [race for race in vgpu.races() if race.startswith("the read by aten::mm")]
    assert len(reads) == NUM_BLOCKS
    freed = len(vgpu.races()) - len(reads)
    assert freed == NUM_SLOTS  # nor is the end of the slots ordered after the copies
    assert vgpu.counters().num_races == len(vgpu.races())
    assert "not ordered after the write by copy on stream 1 of vgpu:0" in vgpu.races()[0]


@pytest.mark.usefixtures("counting")
def test_filling_a_slot_that_is_still_read_is_found_each_time() -> None:
    Ring(free=False).run(hosts())
    assert vgpu.counters().num_races == NUM_BLOCKS - NUM_SLOTS
    assert all("the write by copy" in race for race in vgpu.races())
    assert all("after the read by aten::mm" in race for race in vgpu.races())


@pytest.mark.usefixtures("counting")
def test_using_fresh_memory_on_another_stream_is_found() -> None:
    target = torch.empty(4, device=DEVICE)
    with torch.Stream(device=DEVICE):
        target.fill_(1)
    assert vgpu.counters().num_races > 0
    assert "the write by allocation" in vgpu.races()[0]


@pytest.mark.usefixtures("counting")
@pytest.mark.parametrize("records", [False, True])
def test_freeing_what_another_stream_uses_is_found(records: bool) -> None:  # noqa: FBT001
    other = torch.Stream(device=DEVICE)
    x = torch.ones(4, device=DEVICE)
    other.wait_stream(torch.accelerator.current_stream())
    with other:
        x.mul(2)
        if records:
            x.record_stream(other)
    del x
    assert vgpu.counters().num_races == (not records)
    assert all("record_stream is missing" in race for race in vgpu.races())


@pytest.mark.usefixtures("counting")
@pytest.mark.parametrize("how", ["stream", "event", "query", "device", "stream query"])
def test_waiting_on_the_host_orders_streams(how: str) -> None:
    first, second = torch.Stream(device=DEVICE), torch.Stream(device=DEVICE)
    with first:
        x = torch.ones(4, device=DEVICE)
        event = first.record_event()
    match how:
        case "stream":
            first.synchronize()
        case "event":
            event.synchronize()
        case "query":
            while not event.query():
                pass
        case "stream query":
            while not first.query():
                pass
        case "device":
            torch.accelerator.synchronize()
    with second:
        x.add_(1)
    second.synchronize()
    assert vgpu.races() == ()


@pytest.mark.usefixtures("counting")
def test_an_old_record_orders_nothing_after_it() -> None:
    first, second = torch.Stream(device=DEVICE), torch.Stream(device=DEVICE)
    with first:
        x = torch.ones(4, device=DEVICE)
        event = first.record_event()
        x.add_(1)
    second.wait_event(event)
    with second:
        x.mul(2)
    assert vgpu.counters().num_races == 1


@pytest.mark.usefixtures("counting")
def test_parts_of_a_block_do_not_race() -> None:
    x = torch.ones(8, device=DEVICE)
    torch.accelerator.synchronize()
    streams = [torch.Stream(device=DEVICE) for _ in range(2)]
    for stream, part in zip(streams, x.chunk(2), strict=True):
        with stream:
            part.add_(1)
    assert vgpu.races() == ()
    with streams[0]:
        x[3:5].add_(1)
    assert vgpu.counters().num_races > 0


@pytest.mark.usefixtures("counting")
def test_streams_that_read_the_same_do_not_race() -> None:
    x = torch.ones(8, device=DEVICE)
    torch.accelerator.synchronize()
    for _ in range(3):
        with torch.Stream(device=DEVICE):
            x.sum()
    assert vgpu.races() == ()


@pytest.mark.usefixtures("counting")
@pytest.mark.parametrize("waits", [False, True])
def test_staging_through_pinned_memory_needs_a_wait(waits: bool) -> None:  # noqa: FBT001
    staging = torch.empty(64).pin_memory()
    source, target = torch.ones(64, device="vgpu:1"), torch.empty(64, device=DEVICE)
    torch.accelerator.synchronize(1)
    out, into = torch.Stream(device="vgpu:1"), torch.Stream(device=DEVICE)
    into.wait_stream(torch.accelerator.current_stream(0))
    with out:
        staging.copy_(source, non_blocking=True)
        event = out.record_event()
    if waits:
        into.wait_event(event)
    with into:
        target.copy_(staging, non_blocking=True)
    assert vgpu.counters().num_races == (not waits)


@pytest.mark.usefixtures("counting")
@pytest.mark.parametrize("waits", [False, True])
def test_the_host_may_fill_pinned_memory_only_after_it_is_read(waits: bool) -> None:  # noqa: FBT001
    staging = torch.ones(64).pin_memory()
    torch.empty(64, device=DEVICE).copy_(staging, non_blocking=True)
    vgpu.host_access(staging, write=False)
    assert vgpu.races() == ()
    if waits:
        torch.accelerator.synchronize()
    vgpu.host_access(staging[10:], write=True)
    assert vgpu.counters().num_races == (not waits)


def test_a_race_raises_at_the_call_that_makes_it() -> None:
    x = torch.ones(4, device=DEVICE)
    with vgpu.settings(races="raise"):
        with torch.Stream(device=DEVICE):
            x.add_(1)  # what was before the detector was on is done
        with pytest.raises(RuntimeError, match="vgpu race: the read by aten::mul on stream 0"):
            x.mul(2)
        torch.accelerator.synchronize()


def test_a_free_that_races_raises_at_the_next_wait() -> None:
    with vgpu.settings(races="raise"):
        x = torch.ones(4, device=DEVICE)
        other = torch.Stream(device=DEVICE)
        other.wait_stream(torch.accelerator.current_stream())
        with other:
            x.mul(2)
        del x
        with pytest.raises(RuntimeError, match="record_stream is missing"):
            torch.accelerator.synchronize()


def test_reset_forgets_races() -> None:
    with vgpu.settings(races="count"):
        x = torch.empty(4, device=DEVICE)
        with torch.Stream(device=DEVICE):
            x.fill_(1)
        assert vgpu.races()
    vgpu.reset()
    assert vgpu.races() == ()
    assert vgpu.counters().num_races == 0
