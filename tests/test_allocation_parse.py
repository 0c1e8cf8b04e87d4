"""The text of the allocation language: read, written again, and every error with its place."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distorch.allocation import Allocation, Entry
from distorch.errors import AllocationError
from tests.strategies import allocations, lines


def failure(line: str) -> AllocationError:
    with pytest.raises(AllocationError) as caught:
        Allocation.parse(line)
    return caught.value


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


LONG = "9" * 5000
ARABIC = "\N{ARABIC-INDIC DIGIT FIVE}gb"
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
    (f"cpu,{ARABIC}", ARABIC, "not an amount", "cpu,*"),
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
