"""A plan: sums that agree, and a JSON text that gives it back or says why not."""

from __future__ import annotations

import json
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distorch.errors import AllocationError, FormatError
from distorch.plan.plan import Plan, Prediction, gib
from tests.plan_strategies import GIB, MIB, equal_blocks, plans, streaming_plan

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["cpu", "resident", "streamed", 64, 0, -1]),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner)
)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container of a JSON value, with each of its keys."""
    found = []
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        found.append((value, key))
        if isinstance(value[key], dict | list):
            found += _places(value[key])
    return found


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """Return the text of a plan in which a few values are others, or missing, or new."""
    data = json.loads(draw(plans()).to_json())
    for _ in range(draw(st.integers(1, 3))):
        places = _places(data)
        if not places:
            break
        holder, key = draw(st.sampled_from(places))
        action = draw(st.sampled_from(["replace", "replace", "delete", "add"]))
        if action == "replace":
            holder[key] = draw(VALUES)
        elif action == "delete":
            del holder[key]
        elif isinstance(holder, dict):
            holder[draw(st.text(max_size=8))] = draw(VALUES)
        else:
            holder.append(draw(VALUES))
    return json.dumps(data)


@st.composite
def damaged(draw: st.DrawFn) -> str:
    """Return the text of a plan that lost, gained or changed some characters."""
    text = draw(plans()).to_json()
    begin = draw(st.integers(0, len(text)))
    end = draw(st.integers(begin, min(len(text), begin + 40)))
    return text[:begin] + draw(st.text(max_size=5)) + text[end:]


def _read(text: str) -> Plan | None:
    try:
        return Plan.from_json(text)
    except FormatError:
        return None


@given(plans())
def test_the_text_gives_an_equal_plan_back(plan: Plan) -> None:
    read = Plan.from_json(plan.to_json())
    assert read == plan
    assert hash(read) == hash(plan)


@settings(max_examples=200)
@given(st.one_of(mutated(), damaged(), st.text(), VALUES.map(json.dumps)))
def test_any_other_text_is_a_format_error_or_a_plan(text: str) -> None:
    _read(text)


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(mutated())
def test_a_plan_that_was_read_can_be_used(text: str) -> None:
    plan = _read(text)
    if plan is None:
        return
    assert Plan.from_json(plan.to_json()) == plan
    assert all(isinstance(value, str) for row in plan.table() for value in row)
    assert {placement.kind for placement in plan.placements} <= {"resident", "streamed"}
    assert plan.ring.num_slots >= 0
    visitors = [plan.placements[index].block for index in plan.streamed_order]
    assert all(block.nbytes <= plan.ring.slot_bytes for block in visitors)
    assert all(part.nbytes > 0 for p in plan.placements for part in p.block.parts)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "1", '{"version": 2}', "[" * 100_000])
def test_what_is_no_plan_says_how_to_get_one(text: str) -> None:
    with pytest.raises(FormatError, match="distorch plan"):
        Plan.from_json(text)


def test_a_block_whose_bytes_are_not_its_parts_is_refused() -> None:
    data = json.loads(streaming_plan(equal_blocks(2, 64), num_slots=2).to_json())
    data["placements"][0]["block"]["nbytes"] += 64
    with pytest.raises(FormatError, match=r"m0 .*320"):
        Plan.from_json(json.dumps(data))


@given(plans())
def test_tiers_hold_the_model_and_nothing_else(plan: Plan) -> None:
    assert sum(plan.bytes_by_tier.values()) == plan.model_bytes
    assert next(iter(plan.bytes_by_tier)) == plan.compute


@given(plans())
def test_what_streams_is_what_neither_rests_on_the_device_nor_is_looked_up(plan: Plan) -> None:
    looked_up = sum(p.block.nbytes for p in plan.placements if p.block.looked_up)
    resting = plan.bytes_by_tier[plan.compute]
    assert plan.model_bytes - resting - looked_up <= plan.streamed_bytes
    assert plan.streamed_bytes <= plan.model_bytes - resting
    order = [plan.placements[index] for index in plan.streamed_order]
    assert sum(placement.block.nbytes for placement in order) == plan.streamed_bytes
    assert all(p.kind == "streamed" and not p.block.looked_up for p in order)
    assert list(plan.streamed_order) == sorted(plan.streamed_order)


@given(plans())
def test_the_table_names_every_tier_and_note(plan: Plan) -> None:
    table = plan.table()
    names = " ".join(name for name, _ in table)
    assert all(tier in names for tier in plan.bytes_by_tier)
    assert [value for name, value in table if name == "note"] == list(plan.notes)


@given(st.integers(0, 1 << 50))
def test_no_byte_prints_as_nothing(nbytes: int) -> None:
    number, unit = gib(nbytes).split()
    scale = {"B": 1, "MiB": MIB, "GiB": GIB}[unit]
    assert abs(float(number) * scale - nbytes) <= scale / 10
    assert (float(number) == 0) == (nbytes == 0)


def _predicted(plan: Plan) -> Plan:
    found = Prediction(
        machine="laptop",
        predicted_seconds=2.0,
        bound_seconds=1.0,
        compute_seconds=0.5,
        limited_by="cpu->cuda:0",
        streamed_bytes_by_link={"cpu->cuda:0": 7},
        host_ram_bytes=8,
        activation_bytes=9,
        flops=10,
    )
    return replace(plan, prediction=found)


@given(plans())
def test_a_prediction_comes_back_with_its_plan(plan: Plan) -> None:
    predicted = _predicted(plan)
    assert Plan.from_json(predicted.to_json()) == predicted
    assert predicted.prediction is not None
    assert predicted.prediction.over_bound == 2.0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("predicted_seconds", -1),
        ("bound_seconds", "1"),
        ("compute_seconds", float("nan")),
        ("host_ram_bytes", 1.5),
        ("limited_by", 3),
        ("streamed_bytes_by_link", {"cpu": -1}),
        ("streamed_bytes_by_link", 4),
        ("unknown", 1),
    ],
)
def test_a_prediction_that_cannot_be_is_refused(key: str, value: object) -> None:
    data = json.loads(_predicted(streaming_plan(equal_blocks(3, MIB), num_slots=2)).to_json())
    data["prediction"][key] = value
    with pytest.raises(FormatError):
        Plan.from_json(json.dumps(data))


@given(plans(), st.randoms())
def test_a_plan_fits_its_own_blocks_in_any_order(plan: Plan, random: Random) -> None:
    blocks = [placement.block for placement in plan.placements]
    assert plan.for_blocks(blocks) == plan
    if len({block.name for block in blocks}) == len(blocks):
        random.shuffle(blocks)
        found = plan.for_blocks(blocks)
        assert {p.block.name: p.tier for p in found.placements} == {
            p.block.name: p.tier for p in plan.placements
        }


def test_a_plan_fits_blocks_of_other_names_by_place_and_size_and_no_others() -> None:
    plan = streaming_plan(equal_blocks(3, MIB), num_slots=2, resident=[1])
    blocks = [
        replace(block, name=f"other{number}")
        for number, block in enumerate(placement.block for placement in plan.placements)
    ]
    assert [p.tier for p in plan.for_blocks(blocks).placements] == ["disk", "cpu", "disk"]
    for others in (blocks[:2], equal_blocks(3, 2 * MIB)):
        with pytest.raises(AllocationError, match="another model"):
            plan.for_blocks(others)
