"""The schedule, checked against a model of what readers and a compute thread may do to it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from distorch.run.schedule import Fetch, Schedule

if TYPE_CHECKING:
    from collections.abc import Sequence

NUM_BLOCKS = 8
BLOCKS = st.integers(0, NUM_BLOCKS - 1)
ORDERS = st.lists(BLOCKS, max_size=12)
DISTINCT = st.lists(BLOCKS, min_size=1, unique=True)


class _Readers:
    """Runs a schedule as the executor does, and objects to whatever must not happen."""

    def __init__(self, order: Sequence[int], num_slots: int) -> None:
        self.schedule = Schedule(order=order, num_slots=num_slots)
        self.num_slots = num_slots
        self.held: dict[int, int] = {}  # slot -> block, arrived
        self.loading: dict[int, int] = {}
        self.leases: list[tuple[int, int]] = []  # (slot, block)
        self.num_fetches: Counter[int] = Counter()

    @property
    def leased_slots(self) -> set[int]:
        return {slot for slot, _ in self.leases}

    def fetch(self) -> Fetch | None:
        fetch = self.schedule.next_fetch()
        if fetch is not None:
            assert fetch.slot not in self.loading, "a slot is written twice at once"
            assert fetch.slot not in self.leased_slots, "a leased slot is written"
            here = {*self.held.values(), *self.loading.values()}
            assert fetch.block not in here, "what is here or on its way is fetched again"
            self.held.pop(fetch.slot, None)
            self.loading[fetch.slot] = fetch.block
            self.num_fetches[fetch.block] += 1
        return fetch

    def arrive(self, slot: int) -> None:
        self.held[slot] = self.loading.pop(slot)
        self.schedule.arrived(slot)

    def fail(self, slot: int) -> None:
        del self.loading[slot]
        self.schedule.failed(slot)

    def ask(self, block: int) -> int | None:
        slot = self.schedule.acquire(block)
        if slot is not None:
            assert self.held.get(slot) == block, "a lease of a slot that holds something else"
            self.leases.append((slot, block))
        return slot

    def release(self, index: int) -> None:
        slot, _ = self.leases.pop(index)
        self.schedule.release(slot)

    def drain(self) -> None:
        """Let the readers work until they have nothing to do."""
        for _ in range(10 * NUM_BLOCKS):
            if self.fetch() is None and not self.loading:
                return
            for slot in list(self.loading):
                self.arrive(slot)
        raise AssertionError("the readers never rest")

    def serve(self, block: int, fetches_between: int = 1) -> int | None:
        """Acquire as the executor does: ask, wait, ask again; None when every slot is leased."""
        for _ in range(10 * NUM_BLOCKS):
            slot = self.ask(block)
            if slot is not None:
                return slot
            if self.schedule.is_stuck:
                return None
            for _ in range(fetches_between):
                self.fetch()
            assert self.loading, "an acquire waits and nothing is on its way"
            self.arrive(next(iter(self.loading)))
        raise AssertionError("an acquire was never served")

    def upcoming(self, visits: Sequence[int]) -> set[int]:
        """The next distinct blocks that no lease holds, as many as there are slots for them."""
        room = self.num_slots - len(self.leased_slots)
        leased = {block for _, block in self.leases}
        return set([block for block in dict.fromkeys(visits) if block not in leased][:room])


class ScheduleMachine(RuleBasedStateMachine):
    """Readers and a compute thread that may do anything the executor lets them do."""

    readers: _Readers

    @initialize(order=ORDERS, num_slots=st.integers(1, 5))
    def begin(self, order: list[int], num_slots: int) -> None:
        self.readers = _Readers(order, num_slots)

    @rule()
    def a_reader_asks_for_work(self) -> None:
        self.readers.fetch()

    @precondition(lambda self: self.readers.loading)
    @rule(data=st.data())
    def a_fetch_ends_well(self, data: st.DataObject) -> None:
        self.readers.arrive(data.draw(st.sampled_from(sorted(self.readers.loading))))

    @precondition(lambda self: self.readers.loading)
    @rule(data=st.data())
    def a_fetch_fails(self, data: st.DataObject) -> None:
        self.readers.fail(data.draw(st.sampled_from(sorted(self.readers.loading))))

    @rule(block=BLOCKS)
    def compute_asks_and_gives_up(self, block: int) -> None:
        self.readers.ask(block)

    @rule(block=BLOCKS, fetches_between=st.integers(1, 3))
    def compute_waits_for_a_block(self, block: int, fetches_between: int) -> None:
        all_leased = len(self.readers.leased_slots) == self.readers.num_slots
        here = block in self.readers.held.values()
        served = self.readers.serve(block, fetches_between)
        assert (served is None) == (all_leased and not here)

    @precondition(lambda self: self.readers.leases)
    @rule(data=st.data())
    def compute_releases(self, data: st.DataObject) -> None:
        self.readers.release(data.draw(st.integers(0, len(self.readers.leases) - 1)))

    @rule()
    def a_step_begins(self) -> None:
        self.readers.schedule.begin_step()

    @rule(complete=st.booleans())
    def a_step_ends(self, complete: bool) -> None:  # noqa: FBT001  hypothesis passes it by name
        self.readers.schedule.end_step(complete=complete)

    @rule()
    def the_readers_rest_when_there_is_nothing_to_do(self) -> None:
        self.readers.drain()
        assert self.readers.fetch() is None

    @invariant()
    def the_schedule_knows_what_is_where(self) -> None:
        if not hasattr(self, "readers"):
            return
        for index, slot in enumerate(self.readers.schedule.slots):
            expected = self.readers.held.get(index, self.readers.loading.get(index))
            assert slot.block == expected
            assert slot.num_leases == [slot for slot, _ in self.readers.leases].count(index)
        full = len(self.readers.leased_slots) == self.readers.num_slots
        assert self.readers.schedule.is_stuck == full


def test_no_interleaving_breaks_the_ring() -> None:
    run_state_machine_as_test(
        ScheduleMachine, settings=settings(max_examples=150, stateful_step_count=40, deadline=None)
    )


@given(DISTINCT, st.integers(2, 6), st.data())
def test_a_steady_pass_fetches_each_block_once_between_two_visits(
    order: list[int], num_slots: int, data: st.DataObject
) -> None:
    readers = _Readers(order, num_slots)
    before: Counter[int] = Counter()
    for _ in range(3):
        readers.schedule.begin_step()
        for block in order:
            readers.serve(block, data.draw(st.integers(1, 3)))
            assert readers.num_fetches[block] - before[block] <= 1
            before[block] = readers.num_fetches[block]
            for _ in range(data.draw(st.integers(0, 2))):
                readers.fetch()
                if data.draw(st.booleans()) and readers.loading:
                    readers.arrive(data.draw(st.sampled_from(sorted(readers.loading))))
            readers.release(0)
        readers.schedule.end_step(complete=True)


@given(ORDERS.filter(bool), st.integers(2, 5))
def test_with_readers_in_time_no_visit_waits_however_blocks_repeat(
    order: list[int], num_slots: int
) -> None:
    readers = _Readers(order, num_slots)
    for _ in range(2):
        for block in order:
            readers.drain()
            assert readers.ask(block) is not None
            readers.release(0)


@given(ORDERS, st.integers(0, 4), st.data())
def test_what_fits_in_the_ring_is_fetched_once(
    order: list[int], spare: int, data: st.DataObject
) -> None:
    distinct = sorted(set(order))
    readers = _Readers(order, max(1, len(distinct) + spare))
    for block in data.draw(st.lists(st.sampled_from(distinct), max_size=20)) if distinct else []:
        readers.serve(block, data.draw(st.integers(1, 3)))
        readers.fetch()
        readers.release(0)
    readers.drain()
    assert all(count == 1 for count in readers.num_fetches.values())


@given(DISTINCT, st.integers(1, 6))
def test_the_end_of_a_step_brings_the_first_blocks_of_the_next(
    order: list[int], num_slots: int
) -> None:
    readers = _Readers(order[::-1], num_slots)  # the plan guessed another order
    for _ in range(2):
        readers.schedule.begin_step()
        for block in order:
            readers.serve(block)
            readers.release(0)
        readers.schedule.end_step(complete=True)
        readers.drain()
        assert set(readers.held.values()) >= set(order[:num_slots])
    assert readers.schedule.order == tuple(order)


@given(DISTINCT, st.integers(1, 6), st.data())
def test_after_any_visit_the_next_ones_are_on_their_way(
    order: list[int], num_slots: int, data: st.DataObject
) -> None:
    readers = _Readers(order, num_slots)
    for block in data.draw(st.lists(st.sampled_from(order), min_size=1, max_size=8)):
        readers.serve(block)
        readers.release(0)
        readers.drain()
        place = order.index(block) + 1
        upcoming = order[place:] + order[:place]
        assert set(readers.held.values()) >= readers.upcoming(upcoming)


@given(ORDERS.filter(bool), st.integers(2, 5))
def test_no_slot_stands_empty_while_another_block_is_wanted(
    order: list[int], num_slots: int
) -> None:
    readers = _Readers(order, num_slots)
    for place, block in enumerate(order, start=1):
        readers.serve(block)
        readers.drain()
        upcoming = order[place:] + order[:place]
        assert set(readers.held.values()) >= readers.upcoming(upcoming)
        readers.release(0)


@given(DISTINCT, st.integers(2, 6), st.data())
def test_a_skipped_block_costs_nothing_but_its_own_fetch(
    order: list[int], num_slots: int, data: st.DataObject
) -> None:
    skipped = data.draw(st.sampled_from(order))
    readers = _Readers(order, num_slots)
    for block in order:
        if block != skipped:
            readers.serve(block)
            readers.release(0)
    assert all(count <= 2 for count in readers.num_fetches.values())


@given(DISTINCT, st.data())
def test_an_incomplete_step_teaches_nothing_and_starts_over(
    order: list[int], data: st.DataObject
) -> None:
    readers = _Readers(order, 2)
    readers.schedule.begin_step()
    for block in data.draw(st.lists(st.sampled_from(order))):
        readers.serve(block)
        readers.release(0)
    readers.schedule.end_step(complete=False)
    readers.drain()
    assert readers.schedule.order == tuple(order)
    assert set(readers.held.values()) >= set(order[:2])


def test_a_block_of_no_order_is_served_and_the_prefetch_goes_on() -> None:
    readers = _Readers([0, 1, 2], 2)
    readers.drain()
    assert readers.serve(7) is not None
    readers.release(0)
    readers.drain()
    assert set(readers.held.values()) == {0, 1}


def test_a_lease_cannot_be_given_back_twice() -> None:
    readers = _Readers([0], 1)
    slot = readers.serve(0)
    assert slot is not None
    readers.schedule.release(slot)
    with pytest.raises(AssertionError):
        readers.schedule.release(slot)


def test_a_wanted_block_stays_while_another_slot_is_still_on_its_way() -> None:
    readers = _Readers([0, 1, 2, 3, 4, 5], 2)
    readers.fetch()
    readers.fetch()
    assert readers.ask(3) is None  # compute jumps ahead, and the slot of block 1 is slow
    readers.arrive(0)
    readers.fetch()
    readers.arrive(0)
    assert readers.ask(3) == 0
    readers.release(0)
    assert readers.fetch() == Fetch(4, 0)
    readers.arrive(0)
    assert readers.fetch() is None  # not block 5 in place of block 4, which comes before it
