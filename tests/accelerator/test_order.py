"""Copies and compute wait for each other, and the host for both where it frees or refills.

Links are slow here, or compute is, so that whatever does not wait is early every time.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from distorch import vgpu
from distorch.integrations.memories import open_stores
from distorch.run.executor import Executor
from distorch.tiers import Delivery, links
from distorch.tiers.accelerator import AcceleratorTier
from distorch.tiers.disk import DiskTier
from distorch.tiers.host import HostTier
from distorch.tiers.pinned import Pins
from tests.plan_strategies import contents, equal_blocks, memory_source, streaming_plan

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from distorch.plan.blocks import Block

DEVICE, PEER = "vgpu:0", "vgpu:1"
NBYTES, NUM_BLOCKS, NUM_SLOTS = 5000, 9, 3
SLOW = NBYTES / 5e-3  # bytes/s: five milliseconds a block
BLOCKS = equal_blocks(NUM_BLOCKS, NBYTES)
UNEVEN = tuple(
    block
    for name, nbytes in (("a", 40_000), ("b", 5000), ("c", 9000))
    for block in equal_blocks(4, nbytes, name)
)
DATA = contents(BLOCKS) | contents(UNEVEN)
WAYS = ["pinned", "pageable", "disk", "peer", "relayed"]
DONORS = {"pinned": "cpu", "pageable": "cpu", "disk": "disk", "peer": PEER, "relayed": PEER}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way into a slot; a block goes through a relay in several pieces."""
    monkeypatch.setattr(links, "_RELAYED_BYTES", NBYTES // 3)
    return str(request.param)


@contextmanager
def running(
    donors: Sequence[str], blocks: Sequence[Block] = BLOCKS, *, num_slots: int = NUM_SLOTS
) -> Iterator[Executor]:
    """An executor on a device, whose blocks rest on these donors in turn."""
    plan = streaming_plan(blocks, num_slots=num_slots)
    placements = tuple(
        replace(placed, tier=donors[index % len(donors)])
        for index, placed in enumerate(plan.placements)
    )
    plan = replace(plan, compute=DEVICE, placements=placements)
    pins = Pins("vgpu")
    stores = open_stores(plan, pins, (), in_place=False)
    executor = Executor(plan, stores, pins)
    try:
        for placed in plan.placements:
            stores[placed.tier].put(placed.block, memory_source(DATA))
        yield executor
    finally:
        executor.close()


@contextmanager
def behaving(way: str, **settings: Any) -> Iterator[None]:
    """Devices that raise races, and what this way needs of them."""
    refused = [(0, 1)] if way == "relayed" else []
    limit = 0 if way == "pageable" else None
    with vgpu.settings(races="raise", refuse_peers=refused, pinned_limit_bytes=limit, **settings):
        yield


def slow_links() -> None:
    for source, target in (("cpu", DEVICE), (PEER, DEVICE), (PEER, "cpu")):
        vgpu.set_link(source, target, SLOW)


def read(executor: Executor, block: int) -> Tensor:
    """A copy of a block's bytes, made on the current stream."""
    lease = executor.acquire(block)
    found = lease.part(0).clone()
    executor.release(lease)
    return found


def is_right(found: Tensor, block: int, blocks: Sequence[Block] = BLOCKS) -> bool:
    return found.cpu().numpy().tobytes() == DATA[blocks[block].parts[0].tensor]


@pytest.mark.parametrize("slow", ["links", "compute"])
def test_a_block_is_there_when_it_is_read_and_until_it_was(way: str, slow: str) -> None:
    order = [*range(NUM_BLOCKS), 0, 3, 3, 1, 8, *range(NUM_BLOCKS)]
    if slow == "links":
        slow_links()
    with (
        behaving(way, enqueued=True, op_seconds=5e-3 if slow == "compute" else 0),
        running([DONORS[way]]) as executor,
    ):
        found = [read(executor, block) for block in order]
        assert all(map(is_right, found, order))


@pytest.mark.parametrize("donors", [("cpu", PEER), ("disk", "cpu"), (PEER, "disk", "vgpu:2")])
def test_a_block_that_came_and_was_not_used_is_waited_for_by_the_next(
    donors: tuple[str, ...],
) -> None:
    slow_links()
    vgpu.set_link("vgpu:2", DEVICE, SLOW)
    order = [NUM_BLOCKS - 1, 3, 7, 0, 5, 2, 8, 1, 6]  # nothing that was prefetched is right
    with behaving("all", enqueued=True), running(donors) as executor:
        found = [read(executor, block) for block in order]
        assert all(map(is_right, found, order))


@pytest.mark.parametrize("slow", ["links", "compute"])
@pytest.mark.parametrize("donors", [("cpu",), ("cpu", PEER), ("disk", "cpu"), (PEER, "disk")])
def test_blocks_that_share_a_slot_wait_for_what_it_held_and_not_for_each_other(
    donors: tuple[str, ...], slow: str
) -> None:
    """Large ones come after small ones and the other way round, in steps and out of order."""
    if slow == "links":
        slow_links()
    step = [0, 4, 5, 6, 7, 1, 8, 2, 9, 10, 3, 11]
    order = [*step, *step, *step, 9, 4, 0, 7, 11, 2, 5, 1]
    streams = [torch.Stream(device=DEVICE) for _ in range(2)]
    with (
        behaving("all", enqueued=True, op_seconds=5e-3 if slow == "compute" else 0),
        running(donors, UNEVEN, num_slots=2) as executor,
    ):
        found = []
        for number, block in enumerate(order):
            if number % len(step) == 0:
                executor.end_step(complete=number <= 3 * len(step))
                executor.begin_step()
            with streams[number % 3 == 0]:
                found.append(read(executor, block))
        torch.accelerator.synchronize(DEVICE)
        assert all(is_right(each, block, UNEVEN) for each, block in zip(found, order, strict=True))
        assert executor.stats().streamed_bytes < 2 * sum(UNEVEN[block].nbytes for block in order)


def test_the_ring_is_written_after_what_had_its_memory_before(way: str) -> None:
    """A caching allocator gives memory that a queued kernel still uses to its stream's next."""
    slow_links()
    with behaving(way, enqueued=True), running([DONORS[way]]) as executor:
        assert is_right(read(executor, 0), 0)


def test_a_slot_is_refilled_after_readers_on_every_stream(way: str) -> None:
    """Two streams hold one block, and nothing orders the reads of one after the other's."""
    streams = [torch.Stream(device=DEVICE) for _ in range(2)]
    with behaving(way, enqueued=True, op_seconds=5e-3), running([DONORS[way]]) as executor:
        found = []
        for block in (*range(NUM_BLOCKS), *range(NUM_BLOCKS)):
            leases = []
            for stream in streams:
                with stream:
                    leases.append(executor.acquire(block))
                    found.append((leases[-1].part(0).clone(), block))
            for stream, lease in zip(streams, leases, strict=True):
                with stream:
                    executor.release(lease)
        torch.accelerator.synchronize(DEVICE)
        assert all(is_right(each, block) for each, block in found)


@pytest.mark.parametrize("slow", ["links", "compute"])
def test_memory_is_freed_after_the_copies_and_the_readers_of_it(way: str, slow: str) -> None:
    """The next blocks are under way when an executor is closed, and a side stream still reads."""
    if slow == "links":
        slow_links()
    side = torch.Stream(device=DEVICE)
    with behaving(way, enqueued=True, op_seconds=5e-3 if slow == "compute" else 0):
        with running([DONORS[way]]) as executor:
            with side:
                found = [read(executor, block) for block in range(4)]
            assert executor.ring.device == torch.device(DEVICE)
        del executor
        torch.accelerator.synchronize(DEVICE)
        assert all(map(is_right, found, range(4)))


def test_a_reader_in_the_midst_of_a_block_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it reads goes to the ring, through pinned memory: both are freed after."""
    real, inside, began = DiskTier.read, [], threading.Event()

    def slow(self: DiskTier, wanted: Sequence[Delivery]) -> None:
        inside.append(wanted)
        began.set()
        time.sleep(0.1)
        real(self, wanted)
        inside.remove(wanted)

    monkeypatch.setattr(DiskTier, "read", slow)
    with behaving("disk"), running(["disk"]) as executor:
        read(executor, 0)
        assert began.wait(timeout=60)
        executor.close()
        assert inside == []


def test_what_one_donor_still_sends_is_waited_for_although_another_is_lost() -> None:
    for source in ("cpu", PEER):
        vgpu.set_link(source, DEVICE, NBYTES / 0.05)
    settings = vgpu.settings(races="count")
    with suppress(RuntimeError), settings, running(["cpu", PEER]) as executor:
        read(executor, 0)
        vgpu.lose(1)
    assert vgpu.races() == ()


def test_a_link_to_a_device_that_is_lost_keeps_no_memory() -> None:
    pins, block = Pins("vgpu"), BLOCKS[0]
    device, store = torch.device(DEVICE), HostTier("cpu")
    store.put(block, memory_source(DATA))
    link = links.open_link("cpu", device, pins, block.slot_bytes)
    slot = torch.empty(block.slot_bytes, dtype=torch.uint8, device=device)
    events = [torch.Event(device=device) for _ in range(2)]
    for number in range(2 * links._NUM_STAGED):
        if number == links._NUM_STAGED:
            vgpu.lose(0)
        with nullcontext() if number < links._NUM_STAGED else pytest.raises(RuntimeError):
            link.bring(store, block, slot, events[:1], events[1])
    assert vgpu.counters().pinned_bytes == links._NUM_STAGED * block.slot_bytes
    link.wait()
    link.close()
    assert vgpu.counters().pinned_bytes == 0


def test_a_blocks_bytes_rest_where_they_were_put_when_put_returns() -> None:
    """Any stream may read them at once, and the next block goes through the same memory."""
    vgpu.set_link("cpu", PEER, SLOW)
    with behaving("peer"):
        pins = Pins("vgpu")
        tier = AcceleratorTier(PEER, BLOCKS, pins)
        for block in BLOCKS:
            tier.put(block, memory_source(DATA))
        with torch.Stream(device=PEER):
            found = [tier.memory(block)[: block.parts[0].nbytes].clone() for block in BLOCKS]
            assert all(map(is_right, found, range(NUM_BLOCKS)))
        tier.close()


def test_the_streams_and_the_device_of_the_caller_are_as_before(way: str) -> None:
    side = torch.Stream(device=DEVICE)
    with behaving(way), running([DONORS[way]]) as executor, torch.Stream(device="vgpu:2") as other:
        with side:
            for block in range(NUM_BLOCKS):
                read(executor, block)
            assert torch.accelerator.current_stream(DEVICE) == side
        assert torch.accelerator.current_device_index() == 2
        assert torch.accelerator.current_stream("vgpu:2") == other
        assert torch.accelerator.current_stream(PEER).stream_id == 0
        side.synchronize()
