"""What is read, and when; what cannot be read is an error where it is needed, and no later."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager

import pytest

from distorch.errors import ExecutorError, StorageError
from distorch.plan.blocks import ALIGNMENT_BYTES, Block
from distorch.run.executor import Executor
from distorch.run.stats import Stats
from distorch.tiers import Delivery, Lying, Store
from distorch.tiers.host import HostTier
from distorch.tiers.null import NullTier
from tests.plan_strategies import equal_blocks, streaming_plan
from tests.run.make import Watched, eventually, running, visit, watched


def test_a_steady_pass_reads_each_block_once_a_step() -> None:
    with watched(num_slots=3) as (executor, store):
        for _ in range(5):
            executor.begin_step()
            visit(executor, *range(6))
            executor.end_step(complete=True)
        assert all(store.reads.count(f"m{n}") <= 6 for n in range(6))  # five, and one ahead
        assert executor.stats().num_steps == 5


def test_what_fits_in_the_ring_is_read_once() -> None:
    with watched(4, num_slots=4) as (executor, store):
        visit(executor, *range(4), *range(4), 2, 0, 3)
        assert sorted(store.reads) == ["m0", "m1", "m2", "m3"]


def test_the_end_of_a_step_brings_the_start_of_the_next() -> None:
    with watched() as (executor, store):
        executor.begin_step()
        visit(executor, *range(6))
        executor.end_step(complete=True)
        assert eventually(lambda: store.reads.count("m0") == store.reads.count("m1") == 2)


def test_an_abandoned_step_brings_the_start_of_the_next_without_being_asked() -> None:
    with watched() as (executor, store):
        executor.begin_step()
        visit(executor, 0, 1, 2)
        assert eventually(lambda: {"m3", "m4"} <= set(store.reads))
        time.sleep(0.02)  # the readers sleep again
        executor.end_step(complete=False)
        assert eventually(lambda: store.reads.count("m0") == store.reads.count("m1") == 2)


def test_a_new_order_is_followed_from_the_end_of_the_step_that_taught_it() -> None:
    with watched() as (executor, store):
        executor.begin_step()
        visit(executor, 5, 3, 1, 4, 2, 0)
        executor.end_step(complete=True)
        del store.reads[:]
        executor.begin_step()
        visit(executor, 5, 3, 1, 4, 2, 0)
        executor.end_step(complete=True)
        assert all(store.reads.count(f"m{number}") <= 2 for number in range(6))


def test_a_block_that_cannot_be_read_is_an_error_where_it_is_needed() -> None:
    with watched() as (executor, store):
        store.failing.add("m3")
        visit(executor, 0, 1, 2)
        with pytest.raises(ExecutorError, match=r"block m3 .*no m3") as caught:
            executor.acquire(3)
        assert isinstance(caught.value.__cause__, StorageError)
        assert caught.value.hint == "another disk"


def test_a_foreign_exception_in_a_store_is_an_executor_error_too() -> None:
    def burst(_block: Block, _slot: memoryview) -> None:
        raise ZeroDivisionError

    with watched() as (executor, store):
        store.before_read = burst
        with pytest.raises(ExecutorError, match="ZeroDivisionError"):
            executor.acquire(0)


def test_a_part_that_cannot_be_viewed_is_an_error_and_holds_no_slot() -> None:
    class Shrinking(NullTier):
        def lies_ready(self, block: Block) -> bool:
            return bool(block.parts)

        def view(self, block: Block) -> Lying:
            raise StorageError(f"the file of {block.name} became shorter")

    with watched(num_slots=2) as (executor, store):
        store.inner = Shrinking("disk")
        for _ in range(5):
            with pytest.raises(ExecutorError, match="became shorter"):
                executor.acquire(0)


def test_a_block_that_cannot_be_read_disturbs_no_other() -> None:
    with watched() as (executor, store):
        store.failing.add("m3")
        for _ in range(20):
            visit(executor, 0, 1, 2, 4, 5)  # a branch that skips it


def neighbours(store: Store) -> AbstractContextManager[Executor]:
    """A large block, six small ones that share a slot, and a large one."""
    large, small = equal_blocks(2, 60_000, "large"), equal_blocks(6, 64, "small")
    plan = streaming_plan([large[0], *small, large[1]], num_slots=3)
    return running(plan, {"cpu": HostTier("cpu"), "disk": store})


def test_small_neighbours_come_in_one_read_and_no_others_with_them() -> None:
    together: list[list[str]] = []

    class Noting(NullTier):
        def read(self, wanted: Sequence[Delivery]) -> None:
            together.append([block.name for block, _ in wanted])

    with neighbours(Noting("disk")) as executor:
        visit(executor, *range(8))
    small = [f"small{number}" for number in range(6)]
    assert {tuple(names) for names in together} == {("large0",), tuple(small), ("large1",)}


def test_of_neighbours_that_are_read_together_only_the_broken_one_fails() -> None:
    store = Watched(NullTier("disk"))
    store.failing.add("small3")
    with neighbours(store) as executor:
        visit(executor, 0, 1, 2, 3)
        before = store.reads.count("small4")
        visit(executor, 5, 6, 7)
        assert store.reads.count("small4") == before, "it was there"
        with pytest.raises(ExecutorError, match="small3"):
            executor.acquire(4)


def test_after_an_error_the_block_can_be_read_again() -> None:
    with watched() as (executor, store):
        for _ in range(5):
            store.failing.add("m3")
            with pytest.raises(ExecutorError):
                executor.acquire(3)
            time.sleep(0.01)  # readers that try again unasked would fail once more
            store.failing.clear()
            visit(executor, 3)
            visit(executor, 0, 1)


def test_after_an_error_other_blocks_can_be_read_again() -> None:
    with watched() as (executor, store):
        store.failing.add("m3")
        with pytest.raises(ExecutorError):
            executor.acquire(3)
        time.sleep(0.01)
        visit(executor, 0, 1, 2)


def test_a_failing_block_is_not_tried_over_and_over() -> None:
    with watched() as (executor, store):
        store.failing.add("m0")
        with pytest.raises(ExecutorError):
            executor.acquire(0)
        time.sleep(0.05)
        assert store.reads.count("m0") <= 3


def test_the_counters_agree_with_the_reads() -> None:
    blocks = equal_blocks(6, 64)
    plan = streaming_plan(blocks, num_slots=2)
    store = Watched(NullTier("disk", bytes_per_second=64e3))
    with running(plan, {"cpu": HostTier("cpu"), "disk": store}) as executor:
        executor.begin_step()
        visit(executor, *range(6))
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
