"""Who shares a slot: nobody overlaps, nobody is split, and no neighbour that fits is left out."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from distorch.plan.sharing import num_groups, seats

SLOT_BYTES = 100
BLOCKS = st.integers(0, 30)
SIZES = st.dictionaries(BLOCKS, st.integers(1, SLOT_BYTES))


@given(st.lists(BLOCKS), SIZES)
def test_blocks_of_a_group_lie_side_by_side_in_one_slot(
    order: list[int], sizes: dict[int, int]
) -> None:
    found = seats(order, sizes, SLOT_BYTES)
    assert set(found) == set(order)
    for one, other in pairwise(dict.fromkeys(order)):
        before, after = found[one], found[other]
        end = before.begin + sizes.get(one, SLOT_BYTES)
        assert end <= SLOT_BYTES
        if after.group == before.group:
            assert after.begin == end
        else:
            assert (after.group, after.begin) == (before.group + 1, 0)


@given(st.lists(BLOCKS), SIZES)
def test_who_has_no_size_or_comes_several_times_is_alone(
    order: list[int], sizes: dict[int, int]
) -> None:
    found = seats(order, sizes, SLOT_BYTES)
    members = Counter(seat.group for seat in found.values())
    for block, visits in Counter(order).items():
        if visits > 1 or block not in sizes:
            assert members[found[block].group] == 1


@given(st.lists(BLOCKS, unique=True), SIZES)
def test_a_neighbour_that_fits_shares(order: list[int], sizes: dict[int, int]) -> None:
    order = [block for block in order if block in sizes]
    found = seats(order, sizes, SLOT_BYTES)
    for one, other in pairwise(order):
        fits = found[one].begin + sizes[one] + sizes[other] <= SLOT_BYTES
        assert (found[one].group == found[other].group) == fits


@given(st.lists(BLOCKS, unique=True), SIZES)
def test_as_many_slots_as_groups_hold_all(order: list[int], sizes: dict[int, int]) -> None:
    groups = {seat.group for seat in seats(order, sizes, SLOT_BYTES).values()}
    assert groups == set(range(num_groups(order, sizes, SLOT_BYTES)))


@given(st.lists(BLOCKS, unique=True), st.integers(1, SLOT_BYTES))
def test_larger_slots_never_need_to_be_more(order: list[int], more_bytes: int) -> None:
    sizes = {block: 1 + block * 3 for block in order}
    small = num_groups(order, sizes, SLOT_BYTES)
    assert num_groups(order, sizes, SLOT_BYTES + more_bytes) <= small
