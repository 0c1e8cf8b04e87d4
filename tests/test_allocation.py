"""The allocation language, by invariant, and every error with its place."""

from __future__ import annotations

import time
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from distorch.allocation import Allocation, Entry, Resolved
from distorch.errors import AllocationError, MachineError
from distorch.machine import Machine, Tier
from tests.strategies import GIB, allocations, allocations_on, lines, machines, model_sizes


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


def failure(line: str) -> AllocationError:
    with pytest.raises(AllocationError) as caught:
        Allocation.parse(line)
    return caught.value


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


# --- canonical text ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("CUDA:0 , 2.50 GiB ; Cpu , * ;", "cuda:0,2.5gb;cpu,*"),
        ("cuda:0,12.6gb;cpu,*", "cuda:0,12.6gb;cpu,*"),
        ("cpu,500m;disk:/Mnt/NVMe,*", "cpu,500mb;disk:/Mnt/NVMe,*"),
        ("cpu,0.5gb;disk,2304mb", "cpu,512mb;disk,2.25gb"),
        ("cpu,1tb;disk,0gb", "cpu,1024gb;disk,0b"),
        ("cpu,64*;disk,1k", "cpu,64b*;disk,1kb"),
        ("cpu,007.50%;disk,.5%", "cpu,7.5%;disk,0.5%"),
        ("cpu,1.0;disk,0.10", "cpu,1;disk,0.1"),
        ("mps,25%;cpu,75%", "mps,25%;cpu,75%"),
        ("cuda:0,4000000000;cpu,*", "cuda:0,3906250kb;cpu,*"),
        ("Auto", "auto"),
    ],
)
def test_canonical_text(text: str, canonical: str) -> None:
    assert str(Allocation.parse(text)) == canonical
    assert Allocation.parse(text) == Allocation.parse(canonical)


@given(allocations())
def test_text_and_value_are_inverse(allocation: Allocation) -> None:
    assert Allocation.parse(str(allocation)) == allocation
    assert str(Allocation.parse(str(allocation))) == str(allocation)


@given(st.integers(0, 2**63 - 1), st.booleans())
def test_every_number_of_bytes_has_a_text(num_bytes: int, rest: bool) -> None:  # noqa: FBT001
    entry = Entry(device="cpu", amount=num_bytes, rest=rest)
    allocation = Allocation(mode="bytes", entries=(entry,))
    assert Allocation.parse(str(allocation)) == allocation


@pytest.mark.parametrize("unit", ["t", "tb", "tib", "TB", "TiB"])
def test_terabytes_are_not_bytes(unit: str) -> None:
    assert Allocation.parse(f"cpu,1{unit}").entries[0].amount == 2**40


def test_the_odd_bytes_go_to_the_first() -> None:
    found = Allocation.parse("cuda:1,1%;cuda:0,1%;cpu,1%;disk,0%").resolve(11, BOX)
    assert [num_bytes for _, num_bytes in found.bytes_by_tier] == [4, 4, 3, 0]


def test_shares_are_exact() -> None:
    host = Machine(name="host", tiers=(tier("cpu", 512), tier("disk", 512)))
    found = Allocation.parse("cpu,0.3333333333;disk,1").resolve(400 * GIB, host)
    assert found.bytes_on("cpu") == 512 * GIB * 3333333333 // 10**10


# --- errors of the text -----------------------------------------------------------------------

LONG = "9" * 5000

ERRORS = [
    # text, what the carets stand under, part of the message, the nearest line
    (
        "cuda:0,2.5gbb;cpu,*",
        "gbb",
        "unknown unit 'gbb': use b, kb, mb, gb or tb",
        "cuda:0,2.5gb;cpu,*",
    ),
    ("cuda:0,5 x;cpu,*", "x", "unknown unit 'x'", "cuda:0,2.5gb;cpu,*"),
    ("cpu,5\N{KELVIN SIGN}b", "\N{KELVIN SIGN}b", "unknown unit", "cpu,5kb"),
    ("cpu,1gb;;disk,*", "", "empty entry", "cpu,1gb;disk,*"),
    (";", "", "empty entry", "cpu,*"),
    ("cpu;disk,*", "cpu", "no comma in 'cpu'", "cpu,*"),
    ("cuda:0 2gb;cpu,*", "cuda:0 2gb", "no comma", "cuda:0,2gb;cpu,*"),
    ("cuda:0,1gb,cpu,*", ",", "a second comma", "cuda:0,1gb;cpu,*"),
    ("cuda:0,2,5gb;cpu,*", ",", "a second comma", "cuda:0,2.5gb;cpu,*"),
    ("cpu,", "", "no amount", "cpu,*"),
    (",5gb", "", "no device", "cuda:0,2.5gb;cpu,*"),
    ("cpu,five", "five", "not an amount", "cpu,*"),
    (
        "cpu,\N{ARABIC-INDIC DIGIT FIVE}gb",
        "\N{ARABIC-INDIC DIGIT FIVE}gb",
        "not an amount",
        "cpu,*",
    ),
    ("cpu,-5gb", "-5gb", "has a sign", "cpu,5gb"),
    ("cpu,+5gb", "+5gb", "has a sign", "cpu,5gb"),
    ("cpu,inf", "inf", "not a finite number", "cpu,*"),
    ("cpu,-Infinity", "-Infinity", "not a finite number", "cpu,*"),
    ("cpu,nan", "nan", "not a finite number", "cpu,*"),
    ("cpu,1e9", "1e9", "has an exponent", "cuda:0,2.5gb;cpu,*"),
    ("cpu,1e400;disk,*", "1e400", "has an exponent", "cuda:0,2.5gb;cpu,*"),
    ("cpu,9999999999gb;disk,1gb", "9999999999gb", "more bytes than any memory", "cpu,*;disk,1gb"),
    ("cpu,1gb;CPU,2gb", "CPU", "'cpu' is named twice", "cpu,1gb"),
    ("cuda:0,*;cpu,*", "*", "a second '*'", "cuda:0,*"),
    ("cpu,1gb*;disk,2gb*", "2gb*", "a second '*'", "cpu,1gb*;disk,2gb"),
    ("cpu,50%*;disk,*", "%*", "'%' and '*' for one device", "cpu,50%;disk,*"),
    ("cuda:0,80%;cuda:1,30%;cpu,*", "30%", "more than 100%", "cuda:0,80%;cuda:1,20%;cpu,*"),
    ("cuda:0,60%", "60%", "where the other 40% of the model goes", "cuda:0,60%;cpu,*"),
    ("cpu,60.5%", "60.5%", "where the other 39.5%", "cpu,60.5%;disk,*"),
    ("cuda:0,160%", "160%", "more than the whole model", "cuda:0,100%"),
    ("cpu,0%;disk,0%", "0%", "the shares come to 0%", "cpu,100%;disk,0%"),
    ("cpu,0.5;disk,2.5", "2.5", "a fraction above 1", "cpu,512mb;disk,2.5gb"),
    ("cuda:0,25;cpu,75", "25", "a fraction above 1", "cuda:0,25%;cpu,75%"),
    ("cuda:0,4000000000;cpu,1", "4000000000", "a fraction above 1", "cuda:0,3906250kb;cpu,1b"),
    ("cuda:0,25%;cpu,5gb", "5gb", "bytes next to '%'", "cuda:0,25%;cpu,*"),
    ("cuda:0,50%;cpu,5gb*", "5gb*", "bytes next to '%'", "cuda:0,50%;cpu,*"),
    ("cuda:0,25%;cpu,0.75", "0.75", "a bare number next to '%'", "cuda:0,25%;cpu,75%"),
    ("cuda:0,0.5;cpu,*", "0.5", "a fraction next to bytes or '*'", "cuda:0,50%;cpu,*"),
    ("cuda:0,0.5;cpu,5gb", "0.5", "a fraction next to bytes or '*'", "cuda:0,512mb;cpu,5gb"),
    ("cuda:0,2.5;cpu,*", "2.5", "a part of a byte", "cuda:0,2.5gb;cpu,*"),
    ("cuda:-1,*", "-1", "not an index", "cuda:1,*"),
    ("cuda:+1,*", "+1", "not an index", "cuda:1,*"),
    ("cuda: 1,*", " 1", "not an index", "cuda:1,*"),
    ("cuda:1 2,*", "1 2", "not an index", "cuda:12,*"),
    ("cuda :1,*", "cuda ", "not a device name", "cuda:0,2.5gb;cpu,*"),
    ("cuda:01,*", "01", "not an index", "cuda:1,*"),
    ("cuda:,*", "", "not an index", "cuda:0,*"),
    ("cu$a,*", "cu$a", "not a device name", "cuda:0,2.5gb;cpu,*"),
    ("\N{KELVIN SIGN}pu,*", "\N{KELVIN SIGN}pu", "not a device name", "cuda:0,2.5gb;cpu,*"),
    ("disk:,*", "disk:", "no path", "disk,*"),
    ("disk: /mnt,*", "disk: /mnt", "no path", "disk:/mnt,*"),
    ("auto;", "auto", "stands alone", "auto"),
    ("", "", "empty entry", "cpu,*"),
    ("   ", "", "empty entry", "cpu,*"),
]


@pytest.mark.parametrize(("text", "under", "message", "nearest"), ERRORS)
def test_errors(text: str, under: str, message: str, nearest: str) -> None:
    error = failure(text)
    assert message in error.problem
    assert error.text == text
    assert text[error.position :][: error.length] == under
    assert error.hint == nearest
    assert str(Allocation.parse(error.hint)) == error.hint


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("cuda:0,2.5gbb;cpu,*", 10),
        ("  cuda:0 ,  2.5gbb ;cpu,*", 15),
        ("cpu,1gb; ;disk,*", 9),
        ("cpu,1gb; cpu,2gb", 9),
        ("cuda:0,*; cpu, *", 15),
        ("cuda:0,80%;cuda:1,30%;cpu,*", 18),
        ("cuda:0,;cpu,*", 7),
        ("cuda:0,1gb;cuda: 1,*", 16),
        ("cuda:0,1gb;cpu,2gb,disk,*", 18),
        ("   ", 3),
    ],
)
def test_carets(text: str, position: int) -> None:
    assert failure(text).position == position


def test_an_error_is_shown_under_its_line() -> None:
    assert str(failure("cuda:0,2.5gbb;cpu,*")).splitlines() == [
        "cuda:0,2.5gbb;cpu,*",
        "          ^^^ unknown unit 'gbb': use b, kb, mb, gb or tb",
        "  try: cuda:0,2.5gb;cpu,*",
    ]


@pytest.mark.parametrize("char", ["\n", "\t", "\0", "\x1b", "\x7f", "\u2028", "\u202e", "\ud800"])
def test_control_characters_are_found_and_not_printed(char: str) -> None:
    error = failure(f"cpu,1gb;{char}disk,*")
    assert "control character" in error.problem
    assert (error.position, error.length) == (8, 1)
    assert error.hint == "cpu,1gb;disk,*"
    assert char not in str(error).replace("\n", "", 2)


@pytest.mark.parametrize("text", [LONG, f"cpu,{LONG}gb", "cpu,1gb;" * 600, "\x1b" * 10**6])
def test_overlong_lines(text: str) -> None:
    error = failure(text)
    assert "are too many" in error.problem
    assert error.text[error.position :] == "..."
    assert len(str(error)) < 500


def test_a_line_is_as_short_as_its_canonical_text_must_be() -> None:
    line = ";".join(f"a{index},1t" for index in range(1000, 1400))
    assert len(line) < 4096
    assert "are too many" in failure(line).problem


@pytest.mark.parametrize("text", [None, 5, b"cpu,*"])
def test_only_text_is_read(text: object) -> None:
    with pytest.raises(AllocationError, match="a line of text, not"):
        Allocation.parse(text)  # type: ignore[arg-type]


PUNCTUATED = st.text(
    alphabet="cpudaskmgtb:0123456789.,;*%-+ eE/Ki\n\N{SUPERSCRIPT TWO}", max_size=60
)


def reads_or_is_refused(text: str) -> None:
    try:
        allocation = Allocation.parse(text)
    except AllocationError as error:
        assert 0 <= error.position <= len(error.text)  # noqa: PT017
        Allocation.parse(error.hint)
    else:
        assert Allocation.parse(str(allocation)) == allocation


@settings(max_examples=500)
@given(st.one_of(st.text(), PUNCTUATED))
@example("cpu,0." + "3" * 4080)
@example("cpu," + "9" * 4090 + "%;")
@example("1" * 4096)
@example(";" * 4096)
@example("," * 4096)
@example("a,*;" * 1024)
def test_any_text_reads_or_is_an_allocation_error(text: str) -> None:
    reads_or_is_refused(text)


@given(lines(), st.data())
def test_one_slip_in_a_right_line_is_still_read_or_refused(line: str, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(line) - 1))
    slip = data.draw(st.sampled_from(["", ";", ",", "*", "%", " ", "-", "x", ":", "9", "."]))
    reads_or_is_refused(line[:position] + slip + line[position + 1 :])


@pytest.mark.parametrize("piece", [";", ",", "9", "a,*;", "*", " ", "%", "a:-", "\N{SNOWMAN}"])
def test_the_longest_lines_are_read_at_once(piece: str) -> None:
    start = time.perf_counter()
    for text in (piece * (4096 // len(piece)), f"cpu,{piece * (4000 // len(piece))}"):
        failure(text)
    assert time.perf_counter() - start < 1


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
