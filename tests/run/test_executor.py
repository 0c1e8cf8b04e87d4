"""The executor: the right bytes in time, and nothing left behind."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import textwrap
import threading
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distorch.errors import ExecutorError
from distorch.plan.blocks import Block
from distorch.run import executor as executor_module
from distorch.run.executor import Executor, Lease
from distorch.tiers.host import HostTier
from distorch.tiers.null import NullTier
from tests.plan_strategies import contents, equal_blocks, many_parts, streaming_plan
from tests.run.make import Watched, is_right, reader_threads, running, stores_of, visit, watched

FDS = Path("/proc/self/fd")
needs_fds = pytest.mark.skipif(not FDS.exists(), reason="no /proc/self/fd to count handles in")


@pytest.mark.parametrize("num_slots", [2, 3, 7])
@pytest.mark.parametrize("kind", ["host", "disk in place", "disk spill"])
def test_the_bytes_are_right_however_slow_the_store(
    kind: str, num_slots: int, tmp_path: Path
) -> None:
    blocks = many_parts(9, seed=num_slots)
    plan = streaming_plan(blocks, num_slots=num_slots, resident=[2, 5])
    data = contents(blocks)
    stores, source = stores_of(kind, plan, data, tmp_path, seed=num_slots)
    with running(plan, stores) as executor:
        for _ in range(4):
            executor.begin_step()
            for index, block in enumerate(blocks):
                lease = executor.acquire(index)
                assert is_right(lease, block, data)
                executor.release(lease)
            executor.end_step(complete=True)
    source.close()


@settings(max_examples=15, deadline=None)
@given(st.data(), st.integers(2, 4), st.integers(0, 1000))
def test_the_bytes_are_right_in_any_order_with_several_leases(
    data: st.DataObject, num_slots: int, seed: int
) -> None:
    blocks = many_parts(6, seed=seed)
    plan, weights = streaming_plan(blocks, num_slots=num_slots), contents(blocks, seed=seed)
    stores, _ = stores_of("host", plan, weights, Path(), seed=seed)
    visits = data.draw(st.lists(st.integers(0, 5), max_size=25))
    with running(plan, stores) as executor:
        held: list[Lease] = []
        for index in visits:
            if len(held) == num_slots - 1:
                executor.release(held.pop(data.draw(st.integers(0, len(held) - 1))))
            held.append(executor.acquire(index))
            assert all(is_right(lease, lease.placement.block, weights) for lease in held)


def test_a_leased_slot_is_never_written() -> None:
    leased: set[int] = set()
    wrong: list[str] = []

    def check(block: Block, slot: memoryview) -> None:
        if torch.frombuffer(slot, dtype=torch.uint8).data_ptr() in leased:
            wrong.append(block.name)

    rng = random.Random(0)  # noqa: S311  an order of visits
    with watched(num_slots=3) as (executor, store):
        store.before_read = check
        for _ in range(300):
            lease = executor.acquire(rng.randrange(6))
            address = lease.part(0).data_ptr()
            leased.add(address)
            assert address % 64 == 0
            leased.discard(address)
            executor.release(lease)
    assert not wrong


@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_all_slots_leased_is_an_error_and_no_wait(num_slots: int) -> None:
    with watched(num_slots=num_slots) as (executor, _):
        leases = [executor.acquire(index) for index in range(num_slots)]
        with pytest.raises(ExecutorError, match=f"all {num_slots} slots") as caught:
            executor.acquire(num_slots)
        assert caught.value.hint
        again = executor.acquire(0)  # what is here is served still
        assert again.where == leases[0].where
        executor.release(again)
        executor.release(leases[-1])
        executor.release(executor.acquire(num_slots))


def test_the_ring_has_the_bytes_of_the_plan_and_never_more() -> None:
    with watched(num_slots=3) as (executor, _):
        planned = executor.plan.ring.nbytes
        for index in (0, 1, 2, 5, 4, 3):
            lease = executor.acquire(index)
            assert executor.ring.untyped_storage().nbytes() == planned
            assert lease.memory.untyped_storage().data_ptr() == executor.ring.data_ptr()
            assert executor.weight_bytes == planned
            executor.release(lease)


def test_more_at_rest_than_planned_is_our_mistake() -> None:
    blocks = equal_blocks(2, 64)
    plan, host = streaming_plan(blocks, num_slots=2), HostTier("cpu")
    host.adopt(blocks[0])
    with pytest.raises(AssertionError, match="more rests"):
        Executor(plan, {"cpu": host, "disk": NullTier("disk")})


def test_nothing_is_allocated_after_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = many_parts(6)
    plan, data = streaming_plan(blocks, num_slots=2, resident=[1]), contents(blocks)
    stores, source = stores_of("disk in place", plan, data, tmp_path)

    def refuse(nbytes: int) -> torch.Tensor:
        raise AssertionError(f"{nbytes} bytes are allocated while a model runs")

    with running(plan, stores) as executor, monkeypatch.context() as patch:
        patch.setattr(executor_module, "allocate_pages", refuse)
        patch.setattr(torch, "empty", refuse)
        for _ in range(3):
            visit(executor, *range(6))
    source.close()


def test_a_resident_block_is_served_where_it_rests() -> None:
    blocks = many_parts(3)
    plan, data = streaming_plan(blocks, num_slots=2, resident=[0, 1, 2]), contents(blocks)
    stores, _ = stores_of("host", plan, data, Path())
    with running(plan, stores) as executor:
        one, two = executor.acquire(1), executor.acquire(1)
        assert one.place is None
        assert one.memory.data_ptr() == two.memory.data_ptr()
        assert is_right(one, blocks[1], data)
        executor.release(one)
        executor.release(two)
        assert not reader_threads()


@pytest.mark.parametrize("resident", [[], [0]])
@pytest.mark.parametrize("kind", ["host", "disk in place", "disk spill"])
def test_a_looked_up_block_gives_rows_and_never_visits_the_ring(
    kind: str, resident: list[int], tmp_path: Path
) -> None:
    blocks = [
        Block(name=b.name, parts=b.parts, module=None, looked_up=True)
        for b in many_parts(1, most_bytes=20)
    ]
    part = blocks[0].parts[0]
    rows, row_bytes = part.shape
    plan, data = streaming_plan(blocks, num_slots=0, resident=resident), contents(blocks)
    stores, source = stores_of(kind, plan, data, tmp_path)
    wanted = [rows - 1, 0, 0]
    with running(plan, stores) as executor:
        out = torch.empty(3, row_bytes, dtype=torch.uint8)
        executor.read_rows(0, wanted, out)
        expected = [data[part.tensor][row * row_bytes :][:row_bytes] for row in wanted]
        assert [row.numpy().tobytes() for row in out] == expected
        assert is_right(executor.acquire(0), blocks[0], data)  # asked for whole: read once
    source.close()


def test_a_graph_that_saved_a_slot_cannot_run_backward_on_other_bytes() -> None:
    with watched() as (executor, _):
        lease = executor.acquire(0)
        weight = lease.part(0).view(torch.float32)
        x = torch.ones(16, requires_grad=True)
        loss = (x * weight).sum()
        executor.release(lease)
        visit(executor, 1, 2, 3)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_blocks_are_served_in_inference_mode() -> None:
    blocks = many_parts(5)
    plan, data = streaming_plan(blocks, num_slots=2, resident=[1]), contents(blocks)
    with torch.inference_mode():
        stores, _ = stores_of("host", plan, data, Path())
        with running(plan, stores) as executor:
            for index, block in enumerate(blocks):
                lease = executor.acquire(index)
                assert is_right(lease, block, data)
                executor.release(lease)


@pytest.mark.parametrize("num_visits", [0, 1, 7])
def test_close_ends_every_thread_even_in_the_middle_of_a_read(num_visits: int) -> None:
    gc.collect()  # what earlier tests have forgotten could go meanwhile
    before = threading.active_count()
    plan = streaming_plan(equal_blocks(6, 64), num_slots=3)
    store = Watched(NullTier("disk", bytes_per_second=64e3 / 3))
    executor = Executor(plan, {"cpu": HostTier("cpu"), "disk": store})
    visit(executor, *(index % 6 for index in range(num_visits)))
    executor.close()
    assert threading.active_count() == before
    assert store.closed
    executor.close()  # once more does nothing


@needs_fds
@pytest.mark.parametrize("kind", ["disk in place", "disk spill"])
def test_close_leaves_no_file_handle(kind: str, tmp_path: Path) -> None:
    blocks = many_parts(4)
    plan, data = streaming_plan(blocks, num_slots=2), contents(blocks)
    before = len(list(FDS.iterdir()))
    stores, source = stores_of(kind, plan, data, tmp_path)
    with running(plan, stores) as executor:
        visit(executor, *range(4))
        assert len(list(FDS.iterdir())) > before
    source.close()
    assert len(list(FDS.iterdir())) == before


@pytest.mark.parametrize("what", ["in the ring", "not in the ring", "resident", "looked up"])
def test_acquire_after_close_says_that_the_model_is_no_longer_distributed(what: str) -> None:
    blocks = list(many_parts(6, most_bytes=200))
    blocks[2] = Block(name="e", parts=blocks[2].parts[:1], module=None, looked_up=True)
    plan, data = streaming_plan(blocks, num_slots=2, resident=[1]), contents(blocks)
    stores, _ = stores_of("host", plan, data, Path())
    executor = Executor(plan, stores)
    visit(executor, 0)
    executor.close()
    index = {"in the ring": 0, "not in the ring": 5, "resident": 1, "looked up": 2}[what]
    with pytest.raises(ExecutorError, match="no longer distributed"):
        executor.acquire(index)


def test_rows_after_close_say_that_the_model_is_no_longer_distributed(tmp_path: Path) -> None:
    blocks = equal_blocks(1, 64)
    plan = streaming_plan(blocks, num_slots=2)
    stores, _ = stores_of("disk spill", plan, contents(blocks), tmp_path)
    executor = Executor(plan, stores)
    executor.close()
    with pytest.raises(ExecutorError, match="no longer distributed"):
        executor.read_rows(0, [0], torch.empty(1, 1, dtype=torch.uint8))


def test_a_lease_may_be_given_back_after_close() -> None:
    with watched() as (executor, _):
        lease = executor.acquire(0)
        executor.close()
        executor.release(lease)
        assert lease.part(0).numel() == 64


def test_a_forgotten_executor_ends_its_threads_and_closes_its_stores() -> None:
    gc.collect()  # what earlier tests have forgotten could go meanwhile
    before = threading.active_count()
    plan = streaming_plan(equal_blocks(6, 64), num_slots=2)
    store = Watched(NullTier("disk"))
    executor = Executor(plan, {"cpu": HostTier("cpu"), "disk": store})
    visit(executor, 0, 1)
    gone = weakref.ref(executor)
    del executor
    gc.collect()
    assert gone() is None
    assert threading.active_count() == before
    assert store.closed


FORGOTTEN_IN_A_READER = """
    import gc, sys, threading, time
    from distorch.run.executor import Executor
    from distorch.tiers.host import HostTier
    from distorch.tiers.null import NullTier
    from tests.plan_strategies import equal_blocks, streaming_plan

    gc.disable()
    plan = streaming_plan(equal_blocks(40, 64), num_slots=2)
    disk = NullTier("disk", bytes_per_second=640)  # a read is under way when all is forgotten
    executor = Executor(plan, {"cpu": HostTier("cpu"), "disk": disk})
    for index in range(4):
        executor.release(executor.acquire(index))
    readers = executor._readers
    threads = list(readers._threads)
    decide, collected = readers._schedule.next_fetch, threading.Event()

    def decide_and_collect():  # where Python would collect by itself: an allocation under the lock
        if forgotten.is_set() and not collected.is_set():
            collected.set()
            gc.collect()
        return decide()

    forgotten = threading.Event()
    readers._schedule.next_fetch = decide_and_collect
    executor.itself = executor  # a model, its hooks and its executor are such a circle
    del executor
    forgotten.set()
    deadline = time.monotonic() + 5
    while any(t.is_alive() for t in threads) and time.monotonic() < deadline:
        time.sleep(0.01)
    alive = [t.name for t in threads if t.is_alive()]
    print(collected.is_set(), alive, flush=True)
    import os
    os._exit(bool(alive) or not collected.is_set())
"""


def test_an_executor_that_a_reader_thread_collects_ends_too() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORGOTTEN_IN_A_READER)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.split() == ["True", "[]"], done.stderr


def test_many_short_lives_leave_nothing() -> None:
    gc.collect()  # what earlier tests have forgotten could go meanwhile
    before = threading.active_count()
    for number in range(40):
        with watched(num_slots=2 + number % 3) as (executor, _):
            visit(executor, *range(number % 6))
    assert threading.active_count() == before
