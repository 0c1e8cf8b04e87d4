"""The cut: every byte in exactly one part, and the same blocks whatever the budget."""

from __future__ import annotations

import inspect
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distorch.plan.blocks import ALIGNMENT_BYTES, Block, Node, Part, TensorSpec, aligned, cut
from tests.plan_strategies import MIB, RUN_ROWS, trees

TARGETS = st.integers(1, 16 * MIB)


def _specs(root: Node) -> dict[str, TensorSpec]:
    return {spec.name: spec for node in root.walk() for spec in node.tensors if spec.nbytes}


def _parts(blocks: tuple[Block, ...]) -> dict[str, list[Part]]:
    parts = defaultdict(list)
    for block in blocks:
        for part in block.parts:
            parts[part.tensor].append(part)
    return dict(parts)


def _matrix(rows: int, row_bytes: int = 4, **flags: bool) -> TensorSpec:
    return TensorSpec(
        name="w", dtype="U8", shape=(rows, row_bytes), nbytes=rows * row_bytes, **flags
    )


@given(trees(), TARGETS)
def test_every_byte_of_every_tensor_is_in_exactly_one_part(root: Node, target_bytes: int) -> None:
    specs = _specs(root)
    parts = _parts(cut(root, target_bytes=target_bytes))
    assert parts.keys() == specs.keys()
    for name, spec in specs.items():
        assert sum(part.nbytes for part in parts[name]) == spec.nbytes
        assert {part.dtype for part in parts[name]} == {spec.dtype}


@given(trees(), TARGETS)
def test_runs_of_rows_are_contiguous_complete_and_in_order(root: Node, target_bytes: int) -> None:
    parts = _parts(cut(root, target_bytes=target_bytes))
    for name, spec in _specs(root).items():
        runs = parts[name]
        if len(runs) == 1:
            assert (runs[0].shape, runs[0].first_row) == (spec.shape, 0)
            continue
        ends = [part.first_row + part.shape[0] for part in runs]
        assert [part.first_row for part in runs] == [0, *ends[:-1]]
        assert ends[-1] == spec.shape[0]
        row_bytes = spec.nbytes // spec.shape[0]
        assert all(part.nbytes == part.shape[0] * row_bytes for part in runs)
        assert all(part.shape[1:] == spec.shape[1:] for part in runs)
        assert not spec.whole


@given(trees(), TARGETS)
def test_parts_begin_at_multiples_of_64_and_never_overlap(root: Node, target_bytes: int) -> None:
    for block in cut(root, target_bytes=target_bytes):
        ends = [at + part.nbytes for at, part in zip(block.offsets, block.parts, strict=True)]
        assert all(offset % ALIGNMENT_BYTES == 0 for offset in block.offsets)
        assert all(end <= begin for end, begin in zip(ends, block.offsets[1:], strict=False))
        assert block.nbytes == aligned(ends[-1])


@given(trees(), TARGETS)
def test_block_names_are_unique(root: Node, target_bytes: int) -> None:
    names = [block.name for block in cut(root, target_bytes=target_bytes)]
    assert len(set(names)) == len(names)


@given(trees(), TARGETS)
def test_the_same_model_gives_the_same_blocks(root: Node, target_bytes: int) -> None:
    assert cut(root, target_bytes=target_bytes) == cut(root, target_bytes=target_bytes)


def test_the_cut_cannot_depend_on_a_budget() -> None:
    assert set(inspect.signature(cut).parameters) == {"root", "target_bytes"}


@given(trees(), TARGETS, TARGETS)
def test_runs_of_rows_do_not_depend_on_the_target(root: Node, one: int, other: int) -> None:
    def runs(target_bytes: int) -> list[Part]:
        blocks = cut(root, target_bytes=target_bytes)
        many = [parts for parts in _parts(blocks).values() if len(parts) > 1]
        return sorted((part for parts in many for part in parts), key=repr)

    assert runs(one) == runs(other)


@given(trees(), TARGETS)
def test_a_free_block_holds_one_part_and_only_free_ones_are_looked_up(
    root: Node, target_bytes: int
) -> None:
    for block in cut(root, target_bytes=target_bytes):
        if block.module is None:
            assert len(block.parts) == 1
        assert block.module is None or not block.looked_up


@given(trees(), TARGETS)
def test_a_bracketed_block_holds_only_weights_at_or_below_its_module(
    root: Node, target_bytes: int
) -> None:
    nodes = {node.name: node for node in root.walk()}
    for block in cut(root, target_bytes=target_bytes):
        if block.module is not None:
            below = {s.name for node in nodes[block.module].walk() for s in node.tensors}
            assert {part.tensor for part in block.parts} <= below


@given(trees(), TARGETS)
def test_every_bracket_is_a_module_whose_forward_is_called(root: Node, target_bytes: int) -> None:
    callable_names = {node.name for node in root.walk() if node.callable}
    for block in cut(root, target_bytes=target_bytes):
        assert block.module is None or block.module in callable_names


@given(trees(), TARGETS)
def test_a_block_above_the_target_belongs_to_one_module(root: Node, target_bytes: int) -> None:
    nodes = {node.name: node for node in root.walk()}
    for block in cut(root, target_bytes=target_bytes):
        if block.module is not None and block.nbytes > target_bytes:
            node = nodes[block.module]
            own = {spec.name for spec in node.tensors}
            assert node.atomic or {part.tensor for part in block.parts} <= own


@settings(max_examples=300)
@given(st.integers(1, 400 * RUN_ROWS))
def test_no_run_is_short_enough_to_add_in_another_order(rows: int) -> None:
    counts = [block.parts[0].shape[0] for block in cut(Node(name="head", tensors=(_matrix(rows),)))]
    assert sum(counts) == rows
    if len(counts) > 1:
        assert min(counts) >= RUN_ROWS


@pytest.mark.parametrize("rows", [32 * 8194, 129 * RUN_ROWS + 1])  # Gemma 3's 262,208; the worst
def test_the_last_run_is_as_long_as_the_others(rows: int) -> None:
    blocks = cut(Node(name="head", tensors=(_matrix(rows),)))
    assert min(block.parts[0].shape[0] for block in blocks) >= RUN_ROWS


@given(st.integers(2 * RUN_ROWS, 100 * RUN_ROWS))
def test_runs_begin_at_multiples_of_64_rows(rows: int) -> None:
    firsts = [b.parts[0].first_row for b in cut(Node(name="head", tensors=(_matrix(rows),)))]
    assert len(firsts) > 1
    assert all(first % 64 == 0 for first in firsts)
    assert all(one < two for one, two in pairwise(firsts))


def test_a_weight_that_must_stay_whole_is_one_block() -> None:
    (block,) = cut(Node(name="head", tensors=(_matrix(5 * RUN_ROWS, whole=True),)))
    assert block.module == "head"


def test_an_atomic_module_is_one_block_however_large() -> None:
    inner = Node(name="a.out", tensors=(replace(_matrix(100, MIB), name="a.out.w"),))
    outer = Node(name="a", tensors=(_matrix(100, MIB),), children=(inner,), atomic=True)
    (block,) = cut(outer, target_bytes=1)
    assert [part.tensor for part in block.parts] == ["w", "a.out.w"]


def test_a_shared_free_weight_is_placed_once_and_bracketed_by_no_one() -> None:
    shared = _matrix(10, free=True)
    root = Node(
        name="",
        children=(Node(name="a", tensors=(shared,)), Node(name="b", tensors=(shared,))),
    )
    (block,) = cut(root)
    assert (block.module, block.parts[0].tensor) == (None, "w")


@given(st.integers(0, 10**12))
def test_rounding_goes_up_to_the_next_multiple_and_no_further(nbytes: int) -> None:
    assert aligned(nbytes) % ALIGNMENT_BYTES == 0
    assert 0 <= aligned(nbytes) - nbytes < ALIGNMENT_BYTES
