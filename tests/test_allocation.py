"""What an allocation means on a machine, by invariant, and every error with its way out."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from distorch.allocation import Allocation, Resolved
from distorch.errors import AllocationError, MachineError
from distorch.machine import Machine, Tier
from tests.strategies import GIB, allocations_on, machines, model_sizes


def tier(name: str, free_gib: float, capacity_gib: float | None = None) -> Tier:
    capacity_bytes = int((free_gib if capacity_gib is None else capacity_gib) * GIB)
    return Tier(name=name, capacity_bytes=capacity_bytes, free_bytes=int(free_gib * GIB))


BOX = Machine(
    name="box",
    tiers=(tier("cuda:0", 11, 12), tier("cuda:1", 7, 8), tier("cpu", 48, 64), tier("disk", 900)),
)
LAPTOP = Machine(name="laptop", tiers=(tier("cpu", 4, 8), tier("disk", 100)))


def resolved(line: str, model_gib: float, machine: Machine = BOX) -> dict[str, float]:
    found = Allocation.parse(line).resolve(int(model_gib * GIB), machine)
    return {device: num_bytes / GIB for device, num_bytes in found.bytes_by_tier}


# --- what the specification shows -------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "model_gib", "expected"),
    [
        ("cuda:0,2.5gb;cpu,*", 10, {"cuda:0": 2.5, "cpu": 7.5}),
        (
            "cuda:0,500mb;cuda:1,3.0g;cpu,*",
            4,
            {"cuda:0": 500 / 1024, "cuda:1": 3, "cpu": 0.51171875},
        ),
        ("cuda:0,25%;cpu,75%", 8, {"cuda:0": 2, "cpu": 6}),
        ("cuda:0,8%;cuda:1,8%;cpu,4%", 10, {"cuda:0": 4, "cuda:1": 4, "cpu": 2}),
        ("cuda:0,0.1;cpu,0.5", 20, {"cuda:0": 1.2, "cpu": 18.8}),
        ("cpu,64mb;disk,*", 1, {"cpu": 0.0625, "disk": 0.9375}),
        ("cuda:0,50%;cpu,*", 8, {"cuda:0": 4, "cpu": 4}),
        ("cuda:0,1073741824;cpu,*", 3, {"cuda:0": 1, "cpu": 2}),
        ("cuda:0,10gb;cpu,5gb*", 12, {"cuda:0": 7, "cpu": 5}),
        ("cuda:0,1gb;cpu,5gb*", 12, {"cuda:0": 1, "cpu": 11}),
        ("cuda:0,1gb;cpu,5gb*", 3, {"cuda:0": 0, "cpu": 3}),
        ("cuda:0,0;cpu,*", 3, {"cuda:0": 0, "cpu": 3}),
        ("cuda:0,100%", 3, {"cuda:0": 3}),
        ("cuda:0,9gb;cpu,9gb", 3, {"cuda:0": 3, "cpu": 0}),
        ("auto", 9, {"cuda:0": 9, "cuda:1": 0, "cpu": 0, "disk": 0}),
    ],
)
def test_meaning(line: str, model_gib: float, expected: dict[str, float]) -> None:
    assert resolved(line, model_gib) == pytest.approx(expected, abs=1 / GIB)


def test_the_order_of_the_line_is_the_order_of_the_result() -> None:
    assert [*resolved("cuda:1,1gb;cpu,1gb;cuda:0,*", 5)] == ["cuda:1", "cpu", "cuda:0"]


def test_what_is_left_over_goes_to_cpu_and_says_so() -> None:
    found = Allocation.parse("cuda:0,2gb").resolve(5 * GIB, BOX)
    assert found.bytes_by_tier == (("cuda:0", 2 * GIB), ("cpu", 3 * GIB))
    assert found.notes == ("3.00 GiB that the line does not place go to cpu",)
    assert Allocation.parse("cuda:0,5gb").resolve(5 * GIB, BOX).notes == ()


def test_the_first_entry_computes_unless_another_is_named() -> None:
    line = Allocation.parse("cpu,1gb;cuda:0,*")
    assert line.resolve(GIB, BOX).compute == "cpu"
    assert line.resolve(GIB, BOX, compute=" CUDA:1 ").compute == "cuda:1"
    assert line.resolve(GIB, BOX, compute="cuda:1").bytes_on("cuda:1") == 0
    assert Allocation.parse("disk,*").resolve(GIB, BOX, "cuda:0").bytes_on("disk") == GIB
    with pytest.raises(MachineError, match="no 'mps'"):
        line.resolve(GIB, BOX, compute="mps")
    with pytest.raises(AllocationError, match="a disk cannot compute"):
        line.resolve(GIB, BOX, compute="DISK")


def test_auto_keeps_a_tenth_back_and_sends_the_rest_to_disk() -> None:
    found = Allocation.parse(" AUTO ").resolve(60 * GIB, BOX)
    assert found.bytes_on("cuda:0") == 11 * GIB * 9 // 10
    assert found.bytes_on("disk") == 60 * GIB - sum(f * GIB * 9 // 10 for f in (11, 7, 48))
    assert Allocation.parse("auto").resolve(GIB, BOX, "cpu").bytes_by_tier[0] == ("cpu", GIB)


def test_the_odd_bytes_go_to_the_first() -> None:
    found = Allocation.parse("cuda:1,1%;cuda:0,1%;cpu,1%;disk,0%").resolve(11, BOX)
    assert [num_bytes for _, num_bytes in found.bytes_by_tier] == [4, 4, 3, 0]


def test_shares_are_exact() -> None:
    host = Machine(name="host", tiers=(tier("cpu", 512), tier("disk", 512)))
    found = Allocation.parse("cpu,0.3333333333;disk,1").resolve(400 * GIB, host)
    assert found.bytes_on("cpu") == 512 * GIB * 3333333333 // 10**10


# --- resolve ----------------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> tuple[Allocation, Machine, int]:
    machine = draw(machines())
    return draw(allocations_on(machine)), machine, draw(model_sizes())


def outcome(allocation: Allocation, num_bytes: int, machine: Machine) -> Resolved | AllocationError:
    try:
        return allocation.resolve(num_bytes, machine)
    except AllocationError as error:
        return error


@settings(max_examples=300)
@given(cases())
def test_whole_bytes_that_sum_to_the_model_and_fit(case: tuple[Allocation, Machine, int]) -> None:
    allocation, machine, model_bytes = case
    found = outcome(allocation, model_bytes, machine)
    assume(isinstance(found, Resolved))
    assert isinstance(found, Resolved)
    assert sum(num_bytes for _, num_bytes in found.bytes_by_tier) == model_bytes
    for device, num_bytes in found.bytes_by_tier:
        assert 0 <= num_bytes <= machine.tier(device).free_bytes
    named = [entry.device for entry in allocation.entries]
    assert [device for device, _ in found.bytes_by_tier][: len(named)] == named


@settings(max_examples=300)
@given(cases())
def test_no_device_holds_more_than_its_amount(case: tuple[Allocation, Machine, int]) -> None:
    allocation, machine, model_bytes = case
    found = outcome(allocation, model_bytes, machine)
    assume(isinstance(found, Resolved))
    assert isinstance(found, Resolved)
    has_rest = any(entry.rest for entry in allocation.entries)
    total = 100 if has_rest else sum(Fraction(entry.amount) for entry in allocation.entries)
    for entry in allocation.entries:
        amount = Fraction(entry.amount)
        if allocation.mode == "fraction":
            amount *= machine.tier(entry.device).capacity_bytes
        elif allocation.mode == "ratio":
            amount *= Fraction(model_bytes) / total
        if entry.rest:
            assert (
                found.bytes_on(entry.device) == model_bytes
                or found.bytes_on(entry.device) >= amount
            )
        elif allocation.mode == "ratio":
            assert abs(found.bytes_on(entry.device) - amount) < 1
        else:
            assert found.bytes_on(entry.device) <= amount


@settings(max_examples=500)
@given(cases())
def test_the_hint_of_what_does_not_fit_fits(case: tuple[Allocation, Machine, int]) -> None:
    allocation, machine, model_bytes = case
    error = outcome(allocation, model_bytes, machine)
    assume(isinstance(error, AllocationError))
    assert isinstance(error, AllocationError)
    assert error.text == str(allocation)
    if sum(tier.free_bytes for tier in machine.tiers) < model_bytes:
        assert "a smaller model" in error.hint
    else:
        found = Allocation.parse(error.hint).resolve(model_bytes, machine)
        assert sum(num_bytes for _, num_bytes in found.bytes_by_tier) == model_bytes


def renamed(text: str) -> str:
    return text.replace("cuda:0", "cuda:x").replace("cuda:2", "cuda:0").replace("cuda:x", "cuda:2")


@given(cases())
def test_the_numbers_of_devices_mean_nothing(case: tuple[Allocation, Machine, int]) -> None:
    allocation, machine, model_bytes = case
    tiers = tuple(
        Tier(name=renamed(t.name), capacity_bytes=t.capacity_bytes, free_bytes=t.free_bytes)
        for t in machine.tiers
    )
    other = Machine(name=machine.name, tiers=tiers)
    found = outcome(allocation, model_bytes, machine)
    same = outcome(Allocation.parse(renamed(str(allocation))), model_bytes, other)
    assert renamed(str(found)) == str(same)


BOX_GAPS = [
    # line, GiB of the model, what is wrong, what the carets stand under, a line that fits
    ("cuda:0,20gb;cpu,*", 25, "cuda:0 is asked for 20.00 GiB", "cuda:0", "cuda:0,11gb;cpu,*"),
    ("cuda:0,20gb;cpu,*", 25, "and has 11.00 GiB free", "cuda:0", "cuda:0,11gb;cpu,*"),
    ("cuda:0,20gb;cpu,*", 25, "free: 9.00 GiB too much", "cuda:0", "cuda:0,11gb;cpu,*"),
    ("cuda:0,1gb;cpu,*", 58, "cpu is asked for 57.00 GiB", "cpu", "cuda:0,*;cpu,48gb"),
    ("cuda:0,2gb;cpu,3gb", 25, "room for 5.00 GiB", ..., "cuda:0,2gb;cpu,*"),
    ("cuda:0,2gb;cpu,3gb", 25, "20.00 GiB less than the model", ..., "cuda:0,2gb;cpu,*"),
    ("cuda:0,0.1;cpu,0.1", 20, "12.40 GiB less than the model", ..., "cuda:0,1.2gb;cpu,*"),
    ("cuda:0,1", 12, "cuda:0 is asked for 12.00 GiB", "cuda:0", "cuda:0,11gb;cpu,*"),
    ("cuda:0,1gb", 58, "cpu is asked for 57.00 GiB", ..., "cuda:0,*;cpu,48gb"),
    ("cuda:7,4gb;cpu,*", 9, "it has cuda:0, cuda:1, cpu, disk", "cuda:7", "cuda:0,4gb;cpu,*"),
    ("cuda:0,4gb;none,*", 9, "this machine has no 'none'", "none", "cuda:0,4gb;cuda:1,*"),
]
LAPTOP_GAPS = [
    ("cpu,*", 5, "cpu is asked for 5.00 GiB and has 4.00 GiB", "cpu", "cpu,4gb;disk,*"),
    ("cpu,4.5gb;disk,*", 5, "cpu is asked for 4.50 GiB", "cpu", "cpu,4gb;disk,*"),
    ("disk,*", 3, "a disk cannot compute", "disk", "cpu,0b;disk,*"),
    ("disk:/A,60gb;cpu,*", 62, "a disk cannot compute", "disk:/A", "cpu,2gb;disk:/A,*"),
    (
        "cpu,*;disk:/a,60gb;disk:/b,42gb",
        103,
        "42.00 GiB",
        "disk:/b",
        "cpu,*;disk:/a,60gb;disk:/b,40gb",
    ),
    ("cpu,1gb;disk,*", 105, "104.00 GiB", "disk", "a smaller model"),
    ("auto", 200, "96.40 GiB less than the model", ..., "a smaller model"),
    ("auto", 103.9, "room for 103.60 GiB", ..., "cpu,*;disk,100gb"),
]


@pytest.mark.parametrize(
    ("machine", "gap"), [(BOX, gap) for gap in BOX_GAPS] + [(LAPTOP, gap) for gap in LAPTOP_GAPS]
)
def test_what_does_not_fit(machine: Machine, gap: tuple[str, float, str, Any, str]) -> None:
    line, model_gib, problem, under, hint = gap
    with pytest.raises(AllocationError) as caught:
        Allocation.parse(line).resolve(int(model_gib * GIB), machine)
    error = caught.value
    assert problem in error.problem
    assert error.text == line
    assert line[error.position :][: error.length] == (line if under is ... else under)
    assert error.hint.startswith(hint)
    if hint != "a smaller model":
        assert resolved(hint, model_gib, machine)


def test_a_byte_too_much_is_named() -> None:
    tiny = Machine(name="tiny", tiers=(Tier(name="cpu", capacity_bytes=9, free_bytes=5),))
    with pytest.raises(AllocationError, match="asked for 6 bytes and has 5 bytes free: 1 bytes"):
        Allocation.parse("cpu,*").resolve(6, tiny)
    with pytest.raises(AllocationError, match="a model of -1 bytes"):
        Allocation.parse("cpu,*").resolve(-1, tiny)


def test_a_machine_needs_a_device_that_computes() -> None:
    disk = Machine(name="shelf", tiers=(tier("disk", 100),))
    for line in ("auto", "disk,*"):
        with pytest.raises(AllocationError, match="no device that computes"):
            Allocation.parse(line).resolve(GIB, disk)


# --- the normal mode --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gib", "donors", "compute", "expected"),
    [
        (8, "cpu", "cuda:0", "cuda:0,*;cpu,8gb"),
        (8, "disk", "cpu", "cpu,*;disk,8gb"),
        (0.1, "cpu", "cuda:0", "cuda:0,*;cpu,0.1gb"),
        (8, "cuda:1,cpu", "cuda:0", "cuda:0,*;cuda:1,7gb;cpu,1gb"),
        (8, ["cpu", "cuda:1"], "cuda:0", "cuda:0,*;cpu,8gb"),
        (8, " CUDA:1 , Cpu ", "CUDA:0", "cuda:0,*;cuda:1,7gb;cpu,1gb"),
        (100, "cpu", "cuda:0", "cuda:0,*;cpu,20gb"),
        (0, "cpu", "cuda:0", "cuda:0,*"),
        (8, None, None, "cuda:0,*;cpu,8gb"),
        (8, "", "", "cuda:0,*;cpu,8gb"),
        (8, None, " CPU", "cpu,*;disk,8gb"),
        (9, "cuda:1", "cuda:0", "cuda:0,*;cuda:1,9gb"),
    ],
)
def test_normal_mode(
    gib: float, donors: str | list[str] | None, compute: str | None, expected: str
) -> None:
    assert str(Allocation.virtual(gib, donors, compute, 20 * GIB, BOX)) == expected


@pytest.mark.parametrize(
    ("gib", "donors", "compute", "problem"),
    [
        (-1, "cpu", "cuda:0", "virtual_vram_gb is -1"),
        (float("nan"), "cpu", "cuda:0", "virtual_vram_gb is nan"),
        (float("inf"), "cpu", "cuda:0", "virtual_vram_gb is inf"),
        (1, "cpu,cpu", "cuda:0", "'cpu' is named twice"),
        (1, "cuda:0", "cuda:0", "'cuda:0' is named twice"),
        (1, "cuda:5", "cuda:0", "no 'cuda:5': it has cuda:0, cuda:1, cpu, disk"),
        (1, "None", "cuda:0", "no 'none'"),
        (1, "cpu,", "cuda:0", "no device"),
    ],
)
def test_normal_mode_errors(gib: float, donors: str, compute: str, problem: str) -> None:
    with pytest.raises(AllocationError, match=problem):
        Allocation.virtual(gib, donors, compute, 20 * GIB, BOX)


def test_donors_too_small_are_named_when_the_line_meets_the_machine() -> None:
    line = Allocation.virtual(9, "cuda:1", "cuda:0", 20 * GIB, BOX)
    with pytest.raises(AllocationError, match=r"cuda:1 is asked for 9\.00 GiB"):
        line.resolve(20 * GIB, BOX)


@given(machines(), model_sizes(), st.decimals(0, 64, places=3).map(float))
def test_normal_mode_gives_the_donors_what_they_are_asked(
    machine: Machine, model_bytes: int, gib: float
) -> None:
    compute = machine.tiers[0].name
    others = [tier.name for tier in machine.tiers[1:]]
    assume(others)
    allocation = Allocation.virtual(gib, others, compute, model_bytes, machine)
    given_bytes = sum(int(entry.amount) for entry in allocation.entries[1:])
    assert given_bytes == min(model_bytes, int(Fraction(str(gib)) * GIB))
    for entry in allocation.entries[1:]:
        is_last = entry.device == others[-1]
        assert is_last or int(entry.amount) <= machine.tier(entry.device).free_bytes
