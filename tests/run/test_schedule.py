"""The schedule, checked against a model of what readers and a compute thread may do to it."""

from __future__ import annotations

import copy
from collections import Counter
from itertools import islice
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

from distorch.plan.sharing import num_groups, seats
from distorch.run.schedule import Fetch, Place, Schedule

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

NUM_BLOCKS = 8
BLOCKS = st.integers(0, NUM_BLOCKS - 1)
ORDERS = st.lists(BLOCKS, max_size=12)
DISTINCT = st.lists(BLOCKS, min_size=1, unique=True)
SLOT_BYTES = 4
SIZES: st.SearchStrategy[dict[int, int]] = st.one_of(
    st.just({}), st.dictionaries(BLOCKS, st.integers(1, SLOT_BYTES), min_size=NUM_BLOCKS)
)


class _Readers:
    """Runs a schedule as the executor does, and objects to whatever must not happen.

    Blocks without a size take a slot of one byte.
    """

    def __init__(
        self,
        order: Sequence[int],
        num_slots: int,
        sizes: Mapping[int, int] | None = None,
        slot_bytes: int = 1,
    ) -> None:
        self.schedule = Schedule(
            order=order, num_slots=num_slots, sizes=sizes, slot_bytes=slot_bytes
        )
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self.sizes = sizes or {}
        self.held: dict[int, Place] = {}  # block -> where, arrived
        self.loading: dict[int, Place] = {}
        self.leases: list[int] = []
        self.num_fetches: Counter[int] = Counter()

    @property
    def leased_slots(self) -> set[int]:
        return {self.held[block].slot for block in self.leases}

    def bytes_of(self, block: int, place: Place) -> range:
        return range(place.begin, place.begin + self.sizes.get(block, self.slot_bytes))

    def fetch(self, most: int | None = None) -> list[Fetch]:
        fetches = [*islice(iter(self.schedule.next_fetch, None), most)]
        for fetch in fetches:
            here = self.held | self.loading
            assert fetch.block not in here, "what is here or on its way is fetched again"
            written = self.bytes_of(fetch.block, fetch.place)
            slot = fetch.place.slot
            assert slot * self.slot_bytes <= written.start
            assert written.stop <= (slot + 1) * self.slot_bytes, "a block lies in one slot"
            beside = [block for block, place in here.items() if place.slot == slot]
            if fetch.renews:
                assert not {*beside} & {*self.loading, *self.leases}, "what is used is given up"
                for block in beside:
                    del self.held[block]
            else:
                for block in beside:
                    there = self.bytes_of(block, here[block])
                    assert written.stop <= there.start or there.stop <= written.start, "overlap"
            self.loading[fetch.block] = fetch.place
            self.num_fetches[fetch.block] += 1
        return fetches

    def arrive(self, block: int) -> None:
        self.held[block] = self.loading.pop(block)
        self.schedule.arrived(block)

    def fail(self, block: int) -> None:
        del self.loading[block]
        self.schedule.failed(block)

    def ask(self, block: int) -> Place | None:
        place = self.schedule.acquire(block)
        if place is not None:
            assert self.held.get(block) == place, "a lease of a place that holds something else"
            self.leases.append(block)
        return place

    def release(self, index: int) -> None:
        self.schedule.release(self.leases.pop(index))

    def end_step(self, *, complete: bool) -> None:
        self.schedule.end_step(complete=complete)
        gone = set(self.held) - self.schedule.here
        assert not gone & set(self.leases), "what is used is given up"
        for block in gone:
            del self.held[block]

    def drain(self) -> None:
        """Let the readers work until they have nothing to do."""
        for _ in range(10 * NUM_BLOCKS):
            if not self.fetch() and not self.loading:
                return
            for block in list(self.loading):
                self.arrive(block)
        raise AssertionError("the readers never rest")

    def serve(self, block: int) -> Place | None:
        """Acquire as the executor does: ask, wait, ask again; None when every slot is leased."""
        for _ in range(10 * NUM_BLOCKS):
            place = self.ask(block)
            if place is not None:
                return place
            if self.schedule.is_stuck:
                return None
            self.fetch()
            assert self.loading, "an acquire waits and nothing is on its way"
            self.arrive(next(iter(self.loading)))
        raise AssertionError("an acquire was never served")

    def upcoming(self, visits: Sequence[int]) -> set[int]:
        """The next distinct blocks that no lease holds, as many as there are slots for them.

        Those that share a slot count as one, and with one that is leased as none.
        """
        seated = seats(self.schedule.order, self.sizes, self.slot_bytes)
        groups = {seated[block].group for block in self.leases}
        found = set()
        for block in visits:
            groups.add(seated[block].group)
            if len(groups) > self.num_slots:
                break
            found.add(block)
        return found - set(self.leases)


def rests_rightly(schedule: Schedule) -> bool:
    """Whether one that says there is nothing to do finds nothing either when it looks."""
    wide_awake = copy.deepcopy(schedule)
    wide_awake._is_settled = False
    wide_awake._fetches.clear()
    return not schedule._is_settled or wide_awake.next_fetch() is None


class ScheduleMachine(RuleBasedStateMachine):
    """Readers and a compute thread that may do anything the executor lets them do."""

    readers: _Readers

    @initialize(order=ORDERS, num_slots=st.integers(1, 5), sizes=SIZES)
    def begin(self, order: list[int], num_slots: int, sizes: dict[int, int]) -> None:
        self.readers = _Readers(order, num_slots, sizes, SLOT_BYTES)

    @rule()
    def an_interrupt_comes_after_one_instruction(self) -> None:
        self.readers.fetch(1)

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

    @rule(block=BLOCKS)
    def compute_waits_for_a_block(self, block: int) -> None:
        leased = self.readers.leased_slots
        all_leased = len(leased) == self.readers.num_slots
        here = block in self.readers.held or block in self.readers.loading
        served = self.readers.serve(block)
        if not self.readers.sizes:
            assert (served is None) == (all_leased and not here)
        if served is None:
            assert all_leased
            assert not here
        elif all_leased:  # then it was here, or has a place beside a leased one
            assert served.slot in leased

    @precondition(lambda self: self.readers.leases)
    @rule(data=st.data())
    def compute_releases(self, data: st.DataObject) -> None:
        self.readers.release(data.draw(st.integers(0, len(self.readers.leases) - 1)))

    @rule()
    def a_step_begins(self) -> None:
        self.readers.schedule.begin_step()

    @rule(complete=st.booleans())
    def a_step_ends(self, complete: bool) -> None:  # noqa: FBT001  hypothesis passes it by name
        self.readers.end_step(complete=complete)

    @rule()
    def the_readers_rest_when_there_is_nothing_to_do(self) -> None:
        self.readers.drain()
        assert self.readers.fetch() == []

    @invariant()
    def a_schedule_that_rests_has_nothing_to_do(self) -> None:
        if hasattr(self, "readers"):
            assert rests_rightly(self.readers.schedule)

    @invariant()
    def the_schedule_knows_what_is_where(self) -> None:
        if not hasattr(self, "readers"):
            return
        schedule = self.readers.schedule
        renewed = {fetch.place.slot for fetch in schedule._fetches if fetch.renews}
        held = {block for block, at in self.readers.held.items() if at.slot not in renewed}
        assert schedule.here == held
        full = len(self.readers.leased_slots) == self.readers.num_slots
        waits = schedule.urgent is not None and schedule.urgent not in self.readers.held
        if not self.readers.sizes:
            assert schedule.is_stuck == (full and waits)
        elif schedule.is_stuck:
            assert full
            assert waits


def test_no_interleaving_breaks_the_ring() -> None:
    run_state_machine_as_test(
        ScheduleMachine, settings=settings(max_examples=150, stateful_step_count=40, deadline=None)
    )


@given(DISTINCT, st.integers(2, 6), SIZES, st.data())
def test_a_steady_pass_fetches_each_block_once_between_two_visits(
    order: list[int], num_slots: int, sizes: dict[int, int], data: st.DataObject
) -> None:
    readers = _Readers(order, num_slots, sizes, SLOT_BYTES)
    before: Counter[int] = Counter()
    for _ in range(3):
        readers.schedule.begin_step()
        for block in order:
            readers.serve(block)
            assert readers.num_fetches[block] - before[block] <= 1
            before[block] = readers.num_fetches[block]
            for _ in range(data.draw(st.integers(0, 2))):
                readers.fetch()
                if data.draw(st.booleans()) and readers.loading:
                    readers.arrive(data.draw(st.sampled_from(sorted(readers.loading))))
            readers.release(0)
        readers.end_step(complete=True)


@given(ORDERS.filter(bool), st.integers(2, 5), SIZES)
def test_with_readers_in_time_no_visit_waits_however_blocks_repeat(
    order: list[int], num_slots: int, sizes: dict[int, int]
) -> None:
    readers = _Readers(order, num_slots, sizes, SLOT_BYTES)
    for _ in range(2):
        for block in order:
            readers.drain()
            assert readers.ask(block) is not None
            readers.release(0)


@given(ORDERS, st.integers(0, 4), SIZES, st.data())
def test_what_fits_in_the_ring_is_fetched_once(
    order: list[int], spare: int, sizes: dict[int, int], data: st.DataObject
) -> None:
    distinct = sorted(set(order))
    num_slots = max(1, num_groups(order, sizes, SLOT_BYTES) + spare)
    readers = _Readers(order, num_slots, sizes, SLOT_BYTES)
    for block in data.draw(st.lists(st.sampled_from(distinct), max_size=20)) if distinct else []:
        readers.serve(block)
        readers.fetch()
        readers.release(0)
    readers.drain()
    assert all(count == 1 for count in readers.num_fetches.values())


@given(DISTINCT, st.integers(1, 6), SIZES)
def test_the_end_of_a_step_brings_the_first_blocks_of_the_next(
    order: list[int], num_slots: int, sizes: dict[int, int]
) -> None:
    readers = _Readers(order[::-1], num_slots, sizes, SLOT_BYTES)  # the plan guessed another order
    for _ in range(6):
        readers.schedule.begin_step()
        for block in order:
            readers.serve(block)
            readers.release(0)
        readers.end_step(complete=True)
        readers.drain()
        assert set(readers.held) >= set(order[:num_slots])
    assert set(readers.held) >= readers.upcoming(order)
    assert readers.schedule.order == tuple(order)


@given(DISTINCT, st.integers(1, 6), SIZES, st.data())
def test_after_any_visit_the_next_ones_are_on_their_way(
    order: list[int], num_slots: int, sizes: dict[int, int], data: st.DataObject
) -> None:
    readers = _Readers(order, num_slots, sizes, SLOT_BYTES)
    for block in data.draw(st.lists(st.sampled_from(order), min_size=1, max_size=8)):
        readers.serve(block)
        readers.release(0)
        readers.drain()
        place = order.index(block) + 1
        upcoming = order[place:] + order[:place]
        assert set(readers.held) >= readers.upcoming(upcoming)


@given(ORDERS.filter(bool), st.integers(2, 5), SIZES)
def test_no_slot_stands_empty_while_another_block_is_wanted(
    order: list[int], num_slots: int, sizes: dict[int, int]
) -> None:
    readers = _Readers(order, num_slots, sizes, SLOT_BYTES)
    for place, block in enumerate(order, start=1):
        readers.serve(block)
        readers.drain()
        upcoming = order[place:] + order[:place]
        assert set(readers.held) >= readers.upcoming(upcoming)
        readers.release(0)


@given(DISTINCT, st.integers(2, 6), SIZES, st.data())
def test_a_skipped_block_costs_nothing_but_its_own_fetch(
    order: list[int], num_slots: int, sizes: dict[int, int], data: st.DataObject
) -> None:
    skipped = data.draw(st.sampled_from(order))
    readers = _Readers(order, num_slots, sizes, SLOT_BYTES)
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
    readers.end_step(complete=False)
    readers.drain()
    assert readers.schedule.order == tuple(order)
    assert set(readers.held) >= set(order[:2])


def test_a_block_of_no_order_is_served_and_the_prefetch_goes_on() -> None:
    readers = _Readers([0, 1, 2], 2)
    readers.drain()
    assert readers.serve(7) is not None
    readers.release(0)
    readers.drain()
    assert set(readers.held) == {0, 1}


def test_a_block_of_no_order_comes_as_soon_as_a_lease_ends() -> None:
    readers = _Readers([0], 1)
    assert readers.serve(0) is not None
    assert readers.ask(1) is None
    assert readers.fetch() == []
    readers.release(0)
    assert [fetch.block for fetch in readers.fetch()] == [1]


def test_a_lease_of_a_block_that_lies_as_an_earlier_order_had_it_ends_like_any_other() -> None:
    readers = _Readers([3], 3, dict.fromkeys(range(NUM_BLOCKS), 1), SLOT_BYTES)
    readers.schedule.begin_step()
    assert readers.serve(0) is not None
    assert readers.serve(2) is not None
    readers.end_step(complete=True)  # from now on blocks 0 and 2 share a slot
    for block in (3, 0, 0):
        readers.ask(block)
    readers.release(0)
    readers.end_step(complete=False)
    for _ in range(2):
        readers.release(2)
    assert readers.serve(1) is not None
    readers.fetch()
    readers.release(0)
    assert rests_rightly(readers.schedule)


def test_a_lease_cannot_be_given_back_twice() -> None:
    readers = _Readers([0], 1)
    assert readers.serve(0) is not None
    readers.schedule.release(0)
    with pytest.raises(AssertionError):
        readers.schedule.release(0)


def test_a_wanted_block_stays_while_another_slot_is_still_on_its_way() -> None:
    readers = _Readers([0, 1, 2, 3, 4, 5], 2)
    readers.fetch()
    assert readers.ask(3) is None  # compute jumps ahead, and the slot of block 1 is slow
    readers.arrive(0)
    readers.fetch()
    readers.arrive(3)
    assert readers.ask(3) == Place(0, 0)
    readers.release(0)
    assert readers.fetch() == [Fetch(4, Place(0, 0))]
    readers.arrive(4)
    assert readers.fetch() == []  # not block 5 in place of block 4, which comes before it
