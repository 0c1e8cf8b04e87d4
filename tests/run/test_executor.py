"""The executor: the right bytes in time, errors where they belong, and nothing left behind."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distorch.errors import ExecutorError, StorageError
from distorch.formats import TensorInfo
from distorch.plan.blocks import ALIGNMENT_BYTES, Block
from distorch.plan.plan import Plan
from distorch.run import executor as executor_module
from distorch.run.executor import Executor, Lease
from distorch.run.stats import Stats
from distorch.tiers import Lying, Source, Store
from distorch.tiers.disk import DiskTier
from distorch.tiers.host import HostTier
from distorch.tiers.null import NullTier
from distorch.tiers.sources import FileSource
from tests.plan_strategies import contents, equal_blocks, many_parts, memory_source, streaming_plan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

PATIENCE_SECONDS = 20.0
FDS = Path("/proc/self/fd")
needs_fds = pytest.mark.skipif(not FDS.exists(), reason="no /proc/self/fd to count handles in")


class Watched:
    """A store around another: slow at random, failing on demand, and noting every read."""

    def __init__(self, inner: Store, *, seed: int | None = None) -> None:
        self.inner = inner
        self.reads: list[str] = []
        self.failing: set[str] = set()
        self.before_read: Callable[[Block, memoryview], None] = lambda _block, _slot: None
        self._random = None if seed is None else random.Random(seed)  # noqa: S311  delays
        self.closed = False

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    def put(self, block: Block, source: Source) -> None:
        self.inner.put(block, source)

    def direct(self, block: Block) -> torch.Tensor | None:
        return self.inner.direct(block)

    def offsets(self, block: Block) -> Sequence[int]:
        return self.inner.offsets(block)

    def read(self, block: Block, slot: memoryview) -> None:
        assert not self.closed, "a closed store is read"
        self.before_read(block, slot)
        self.reads.append(block.name)
        if self._random is not None:
            time.sleep(self._random.choice([0, 0, 0.0005, 0.002]))
        if block.name in self.failing:
            raise StorageError(f"no {block.name}", hint="another disk")
        self.inner.read(block, slot)

    def lies_ready(self, block: Block) -> bool:
        return self.inner.lies_ready(block)

    def view(self, block: Block) -> Lying:
        return self.inner.view(block)

    def forget(self, block: Block) -> None:
        self.inner.forget(block)

    def read_rows(self, block: Block, rows: Sequence[int], out: memoryview) -> None:
        self.inner.read_rows(block, rows, out)

    def close(self) -> None:
        self.closed = True
        self.inner.close()


def _stores(
    kind: str, plan: Plan, data: dict[str, bytes], folder: Path, *, seed: int | None = None
) -> tuple[dict[str, Store], Source]:
    """Fill a store for each tier of the plan from ``data``."""
    source: Source = memory_source(data)
    donors: dict[str, Callable[[], Store]] = {
        "null": lambda: NullTier("disk"),
        "host": lambda: HostTier("disk"),
        "disk in place": lambda: DiskTier("disk"),
        "disk spill": lambda: DiskTier("disk", folder),
    }
    if kind == "disk in place":
        path, infos, written = folder / "weights", {}, b""
        for name, value in data.items():
            info = TensorInfo(name, "U8", (len(value),), len(written), len(value), path)
            infos[name] = info
            written += value
        path.write_bytes(written)
        source = FileSource(infos)
    stores: dict[str, Store] = {"cpu": HostTier("cpu"), "disk": Watched(donors[kind](), seed=seed)}
    for placement in plan.placements:
        stores[placement.tier].put(placement.block, source)
    return stores, source


def _right(lease: Lease, block: Block, data: dict[str, bytes]) -> bool:
    for index, part in enumerate(block.parts):
        begin = part.first_row * (part.nbytes // part.shape[0])
        expected = data[part.tensor][begin : begin + part.nbytes]
        if lease.part(index).numpy().tobytes() != expected:
            return False
    return True


@contextmanager
def _executor(plan: Plan, stores: dict[str, Store]) -> Iterator[Executor]:
    executor = Executor(plan, stores)
    try:
        yield executor
    finally:
        executor.close()


@contextmanager
def _watched(num: int = 6, *, num_slots: int = 2) -> Iterator[tuple[Executor, Watched]]:
    """Yield an executor of equal blocks that stream from a store which only notes its reads."""
    plan = streaming_plan(equal_blocks(num, 64), num_slots=num_slots)
    store = Watched(NullTier("disk"))
    with _executor(plan, {"cpu": HostTier("cpu"), "disk": store}) as executor:
        yield executor, store


def _eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE_SECONDS / 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    return condition()


def _reader_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("distorch")}


def _visit(executor: Executor, *blocks: int) -> None:
    for block in blocks:
        executor.release(executor.acquire(block))


@pytest.mark.parametrize("num_slots", [2, 3, 7])
@pytest.mark.parametrize("kind", ["host", "disk in place", "disk spill"])
def test_the_bytes_are_right_however_slow_the_store(
    kind: str, num_slots: int, tmp_path: Path
) -> None:
    blocks = many_parts(9, seed=num_slots)
    plan = streaming_plan(blocks, num_slots=num_slots, resident=[2, 5])
    data = contents(blocks)
    stores, source = _stores(kind, plan, data, tmp_path, seed=num_slots)
    with _executor(plan, stores) as executor:
        for _ in range(4):
            executor.begin_step()
            for index, block in enumerate(blocks):
                lease = executor.acquire(index)
                assert _right(lease, block, data)
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
    stores, _ = _stores("host", plan, weights, Path(), seed=seed)
    visits = data.draw(st.lists(st.integers(0, 5), max_size=25))
    with _executor(plan, stores) as executor:
        held: list[Lease] = []
        for index in visits:
            if len(held) == num_slots - 1:
                executor.release(held.pop(data.draw(st.integers(0, len(held) - 1))))
            held.append(executor.acquire(index))
            assert all(_right(lease, lease.placement.block, weights) for lease in held)


def test_a_leased_slot_is_never_written() -> None:
    leased: set[int] = set()
    wrong: list[str] = []

    def check(block: Block, slot: memoryview) -> None:
        if torch.frombuffer(slot, dtype=torch.uint8).data_ptr() in leased:
            wrong.append(block.name)

    rng = random.Random(0)  # noqa: S311  an order of visits
    with _watched(num_slots=3) as (executor, store):
        store.before_read = check
        for _ in range(300):
            lease = executor.acquire(rng.randrange(6))
            leased.add(lease.memory.data_ptr())
            assert lease.memory.data_ptr() % 64 == 0
            leased.discard(lease.memory.data_ptr())
            executor.release(lease)
    assert not wrong


def test_a_steady_pass_reads_each_block_once_a_step() -> None:
    with _watched(num_slots=3) as (executor, store):
        for _ in range(5):
            executor.begin_step()
            _visit(executor, *range(6))
            executor.end_step(complete=True)
        assert all(store.reads.count(f"m{n}") <= 6 for n in range(6))  # five, and one ahead
        assert executor.stats().num_steps == 5


def test_what_fits_in_the_ring_is_read_once() -> None:
    with _watched(4, num_slots=4) as (executor, store):
        _visit(executor, *range(4), *range(4), 2, 0, 3)
        assert sorted(store.reads) == ["m0", "m1", "m2", "m3"]


def test_the_end_of_a_step_brings_the_start_of_the_next() -> None:
    with _watched() as (executor, store):
        executor.begin_step()
        _visit(executor, *range(6))
        executor.end_step(complete=True)
        assert _eventually(lambda: store.reads.count("m0") == store.reads.count("m1") == 2)


def test_an_abandoned_step_brings_the_start_of_the_next_without_being_asked() -> None:
    with _watched() as (executor, store):
        executor.begin_step()
        _visit(executor, 0, 1, 2)
        assert _eventually(lambda: {"m3", "m4"} <= set(store.reads))
        time.sleep(0.02)  # the readers sleep again
        executor.end_step(complete=False)
        assert _eventually(lambda: store.reads.count("m0") == store.reads.count("m1") == 2)


def test_a_new_order_is_followed_from_the_end_of_the_step_that_taught_it() -> None:
    with _watched() as (executor, store):
        executor.begin_step()
        _visit(executor, 5, 3, 1, 4, 2, 0)
        executor.end_step(complete=True)
        del store.reads[:]
        executor.begin_step()
        _visit(executor, 5, 3, 1, 4, 2, 0)
        executor.end_step(complete=True)
        assert all(store.reads.count(f"m{number}") <= 2 for number in range(6))


def test_a_block_that_cannot_be_read_is_an_error_where_it_is_needed() -> None:
    with _watched() as (executor, store):
        store.failing.add("m3")
        _visit(executor, 0, 1, 2)
        with pytest.raises(ExecutorError, match=r"block m3 .*no m3") as caught:
            executor.acquire(3)
        assert isinstance(caught.value.__cause__, StorageError)
        assert caught.value.hint == "another disk"


def test_a_foreign_exception_in_a_store_is_an_executor_error_too() -> None:
    def burst(_block: Block, _slot: memoryview) -> None:
        raise ZeroDivisionError

    with _watched() as (executor, store):
        store.before_read = burst
        with pytest.raises(ExecutorError, match="ZeroDivisionError"):
            executor.acquire(0)


def test_a_part_that_cannot_be_viewed_is_an_error_and_holds_no_slot() -> None:
    class Shrinking(NullTier):
        def lies_ready(self, block: Block) -> bool:
            return bool(block.parts)

        def view(self, block: Block) -> Lying:
            raise StorageError(f"the file of {block.name} became shorter")

    with _watched(num_slots=2) as (executor, store):
        store.inner = Shrinking("disk")
        for _ in range(5):
            with pytest.raises(ExecutorError, match="became shorter"):
                executor.acquire(0)


def test_a_block_that_cannot_be_read_disturbs_no_other() -> None:
    with _watched() as (executor, store):
        store.failing.add("m3")
        for _ in range(20):
            _visit(executor, 0, 1, 2, 4, 5)  # a branch that skips it


def test_after_an_error_the_block_can_be_read_again() -> None:
    with _watched() as (executor, store):
        for _ in range(5):
            store.failing.add("m3")
            with pytest.raises(ExecutorError):
                executor.acquire(3)
            time.sleep(0.01)  # readers that try again unasked would fail once more
            store.failing.clear()
            _visit(executor, 3)
            _visit(executor, 0, 1)


def test_after_an_error_other_blocks_can_be_read_again() -> None:
    with _watched() as (executor, store):
        store.failing.add("m3")
        with pytest.raises(ExecutorError):
            executor.acquire(3)
        time.sleep(0.01)
        _visit(executor, 0, 1, 2)


def test_a_failing_block_is_not_tried_over_and_over() -> None:
    with _watched() as (executor, store):
        store.failing.add("m0")
        with pytest.raises(ExecutorError):
            executor.acquire(0)
        time.sleep(0.05)
        assert store.reads.count("m0") <= 3


@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_all_slots_leased_is_an_error_and_no_wait(num_slots: int) -> None:
    with _watched(num_slots=num_slots) as (executor, _):
        leases = [executor.acquire(index) for index in range(num_slots)]
        with pytest.raises(ExecutorError, match=f"all {num_slots} slots") as caught:
            executor.acquire(num_slots)
        assert caught.value.hint
        again = executor.acquire(0)  # what is here is served still
        assert again.slot == leases[0].slot
        executor.release(again)
        executor.release(leases[-1])
        executor.release(executor.acquire(num_slots))


def test_the_ring_has_the_bytes_of_the_plan_and_never_more() -> None:
    with _watched(num_slots=3) as (executor, _):
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
    stores, source = _stores("disk in place", plan, data, tmp_path)

    def refuse(nbytes: int) -> torch.Tensor:
        raise AssertionError(f"{nbytes} bytes are allocated while a model runs")

    with _executor(plan, stores) as executor, monkeypatch.context() as patch:
        patch.setattr(executor_module, "allocate_pages", refuse)
        patch.setattr(torch, "empty", refuse)
        for _ in range(3):
            _visit(executor, *range(6))
    source.close()


def test_a_resident_block_is_served_where_it_rests() -> None:
    blocks = many_parts(3)
    plan, data = streaming_plan(blocks, num_slots=2, resident=[0, 1, 2]), contents(blocks)
    stores, _ = _stores("host", plan, data, Path())
    with _executor(plan, stores) as executor:
        one, two = executor.acquire(1), executor.acquire(1)
        assert one.slot is None
        assert one.memory.data_ptr() == two.memory.data_ptr()
        assert _right(one, blocks[1], data)
        executor.release(one)
        executor.release(two)
        assert not _reader_threads()


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
    stores, source = _stores(kind, plan, data, tmp_path)
    wanted = [rows - 1, 0, 0]
    with _executor(plan, stores) as executor:
        out = torch.empty(3, row_bytes, dtype=torch.uint8)
        executor.read_rows(0, wanted, out)
        expected = [data[part.tensor][row * row_bytes :][:row_bytes] for row in wanted]
        assert [row.numpy().tobytes() for row in out] == expected
        assert _right(executor.acquire(0), blocks[0], data)  # asked for whole: read once
    source.close()


def test_a_graph_that_saved_a_slot_cannot_run_backward_on_other_bytes() -> None:
    with _watched() as (executor, _):
        lease = executor.acquire(0)
        weight = lease.part(0).view(torch.float32)
        x = torch.ones(16, requires_grad=True)
        loss = (x * weight).sum()
        executor.release(lease)
        _visit(executor, 1, 2, 3)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_blocks_are_served_in_inference_mode() -> None:
    blocks = many_parts(5)
    plan, data = streaming_plan(blocks, num_slots=2, resident=[1]), contents(blocks)
    with torch.inference_mode():
        stores, _ = _stores("host", plan, data, Path())
        with _executor(plan, stores) as executor:
            for index, block in enumerate(blocks):
                lease = executor.acquire(index)
                assert _right(lease, block, data)
                executor.release(lease)


def test_the_counters_agree_with_the_reads() -> None:
    blocks = equal_blocks(6, 64)
    plan = streaming_plan(blocks, num_slots=2)
    store = Watched(NullTier("disk", bytes_per_second=64e3))
    with _executor(plan, {"cpu": HostTier("cpu"), "disk": store}) as executor:
        executor.begin_step()
        _visit(executor, *range(6))
        executor.end_step(complete=True)
    stats = executor.stats()
    assert stats.streamed_bytes == ALIGNMENT_BYTES * len(store.reads)
    assert stats.num_visits == 6
    assert 0 < stats.waited_seconds <= stats.step_seconds
    assert len(store.reads) * 0.001 / 2 <= stats.transfer_seconds
    assert 0 <= stats.transfer_hidden <= 1
    assert 0 < stats.efficiency <= 1
    assert stats.link_bytes_per_second > 0


def test_counters_of_nothing_divide_by_nothing() -> None:
    stats = Stats()
    assert (stats.transfer_hidden, stats.link_bytes_per_second, stats.efficiency) == (1.0, 0.0, 1.0)


@pytest.mark.parametrize("num_visits", [0, 1, 7])
def test_close_ends_every_thread_even_in_the_middle_of_a_read(num_visits: int) -> None:
    before = threading.active_count()
    plan = streaming_plan(equal_blocks(6, 64), num_slots=3)
    store = Watched(NullTier("disk", bytes_per_second=64e3 / 3))
    executor = Executor(plan, {"cpu": HostTier("cpu"), "disk": store})
    _visit(executor, *(index % 6 for index in range(num_visits)))
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
    stores, source = _stores(kind, plan, data, tmp_path)
    with _executor(plan, stores) as executor:
        _visit(executor, *range(4))
        assert len(list(FDS.iterdir())) > before
    source.close()
    assert len(list(FDS.iterdir())) == before


@pytest.mark.parametrize("what", ["in the ring", "not in the ring", "resident", "looked up"])
def test_acquire_after_close_says_that_the_model_is_no_longer_distributed(what: str) -> None:
    blocks = list(many_parts(6, most_bytes=200))
    blocks[2] = Block(name="e", parts=blocks[2].parts[:1], module=None, looked_up=True)
    plan, data = streaming_plan(blocks, num_slots=2, resident=[1]), contents(blocks)
    stores, _ = _stores("host", plan, data, Path())
    executor = Executor(plan, stores)
    _visit(executor, 0)
    executor.close()
    index = {"in the ring": 0, "not in the ring": 5, "resident": 1, "looked up": 2}[what]
    with pytest.raises(ExecutorError, match="no longer distributed"):
        executor.acquire(index)


def test_rows_after_close_say_that_the_model_is_no_longer_distributed(tmp_path: Path) -> None:
    blocks = equal_blocks(1, 64)
    plan = streaming_plan(blocks, num_slots=2)
    stores, _ = _stores("disk spill", plan, contents(blocks), tmp_path)
    executor = Executor(plan, stores)
    executor.close()
    with pytest.raises(ExecutorError, match="no longer distributed"):
        executor.read_rows(0, [0], torch.empty(1, 1, dtype=torch.uint8))


def test_a_lease_may_be_given_back_after_close() -> None:
    with _watched() as (executor, _):
        lease = executor.acquire(0)
        executor.close()
        executor.release(lease)
        assert lease.part(0).numel() == 64


def test_a_forgotten_executor_ends_its_threads_and_closes_its_stores() -> None:
    before = threading.active_count()
    plan = streaming_plan(equal_blocks(6, 64), num_slots=2)
    store = Watched(NullTier("disk"))
    executor = Executor(plan, {"cpu": HostTier("cpu"), "disk": store})
    _visit(executor, 0, 1)
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
    before = threading.active_count()
    for number in range(40):
        with _watched(num_slots=2 + number % 3) as (executor, _):
            _visit(executor, *range(number % 6))
    assert threading.active_count() == before
