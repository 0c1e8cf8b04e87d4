"""A machine goes to a file and back; a file that describes none is refused with its reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from distorch.errors import MachineError, StorageError
from distorch.machine import Compute, Link, Machine
from tests.strategies import machines

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
from tests.machines import BOX

SPEEDS = st.floats(min_value=0, max_value=1e300, exclude_min=True, allow_subnormal=False)


def _some(draw: st.DrawFn, names: Sequence[Any]) -> list[Any]:
    return draw(st.lists(st.sampled_from(names), unique=True)) if names else []


@st.composite
def measured_machines(draw: st.DrawFn) -> Machine:
    """Machines with links, rates and buses."""
    machine = draw(machines())
    names = [tier.name for tier in machine.tiers]
    links = tuple(
        Link(
            source=source,
            target=target,
            bytes_per_second=draw(SPEEDS),
            latency_seconds=draw(st.floats(0, 1e3)),
            bus=draw(st.sampled_from(["", "pcie0", 'a "bus"', "ü"])),
        )
        for source, target in _some(draw, [(a, b) for a in names for b in names if a != b])
    )
    rates = st.dictionaries(st.sampled_from(["BF16", "F32", "F8_E4M3", "any name"]), SPEEDS)
    computes = tuple(
        Compute(device=name, flops_per_second=draw(rates), bytes_per_second=draw(SPEEDS))
        for name in _some(draw, names)
    )
    shared = sorted({link.bus for link in links} - {""})
    return Machine(
        name=draw(st.sampled_from(["box", "my 'box'", "é\\n"])),
        tiers=machine.tiers,
        links=links,
        computes=computes,
        buses=tuple((bus, draw(SPEEDS)) for bus in _some(draw, shared)),
    )


@given(measured_machines())
def test_a_saved_machine_is_the_same_machine(
    tmp_path_factory: pytest.TempPathFactory, machine: Machine
) -> None:
    path = tmp_path_factory.mktemp("machines") / "new" / "machine.toml"
    machine.save(path)
    assert Machine.load(path) == machine
    assert Machine.load(str(path)) == machine
    assert [file.name for file in path.parent.iterdir()] == ["machine.toml"]


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("as it was")
    with pytest.raises(StorageError, match="cannot be written"):
        BOX.save(tmp_path / "file" / "machine.toml")
    with pytest.raises(StorageError, match="cannot be written"):
        BOX.save(tmp_path)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["as it was"]


GOOD = BOX.to_toml()
HEAD = 'name = "box"\n'
CPU = '[[tier]]\nname = "cpu"\ncapacity_gib = 2\nfree_gib = 1\n'
RATE = '[[compute]]\ndevice = "cpu"\ngb_per_second = 1\n'
HOSTILE = {
    "": "has no name",
    "name": "not TOML",
    "x = " + "[" * 5000: "not TOML",
    "name = 1e" + "9" * 40: "not TOML",
    "name = " + "9" * 5000: "not TOML",
    HEAD: r"has no tier\n  try: add a \[\[tier\]\]",
    "name = 7\ntier = []": "name is not a text",
    'name = "a\\u001b"\ntier = []': "name is not a text of one line",
    f"{HEAD}tier = 7": "tier is not a list of tables",
    f"{HEAD}tier = [7]": "tier is not a list of tables",
    f"{HEAD}teir = []": r"unknown key 'teir'\n  try: perhaps tier",
    f"{HEAD}{CPU}free_gb = 1": r"tier 1 has an unknown key 'free_gb'\n  try: perhaps free_gib",
    f'{HEAD}[[tier]]\nname = "cpu"\nfree_gib = 1': r"no capacity_gib\n  try: add capacity_gib = 12",
    f"{HEAD}{CPU}{CPU}": "names a tier twice",
    HEAD + CPU.replace("2", "true"): "capacity_gib is not a number",
    HEAD + CPU.replace("2", '"2"'): "capacity_gib is not a number",
    HEAD + CPU.replace("2", "nan"): "capacity_gib is not a number",
    HEAD + CPU.replace("2", "inf"): "capacity_gib is not a number",
    HEAD + CPU.replace("2", "1e999999"): "capacity_gib is not a number",
    HEAD + CPU.replace("2", "-2"): "negative",
    f"{HEAD}{CPU}{RATE}": r"compute 1 has no tflops\n  try: add tflops = \{",
    f"{HEAD}{CPU}{RATE}tflops = 7": "tflops is not a table",
    f'{HEAD}{CPU}{RATE}tflops = {{ F32 = "7" }}': r"tflops.F32 is not a number",
    f"{HEAD}{CPU}{RATE}tflops = {{ F32 = 0 }}": r"flops_per_second\['F32'\] 0.0",
    f'{HEAD}{CPU}[[bus]]\nname = "usb"\ngb_per_second = 1': "a bus of 'usb'",
    f"# {'x' * 2**20}": "more than 1 MiB",
}


@pytest.mark.parametrize(("text", "message"), HOSTILE.items(), ids=range(len(HOSTILE)))
def test_a_file_that_describes_no_machine_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "machine.toml"
    path.write_text(text)
    with pytest.raises(MachineError, match=message) as caught:
        Machine.load(path)
    assert str(path) in caught.value.problem
    assert caught.value.hint


@given(st.data())
@example(None)
def test_a_damaged_file_is_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject | None
) -> None:
    path = tmp_path_factory.mktemp("machines") / "machine.toml"
    if data is None:
        path.write_bytes(b"\xff\xfe")
    else:
        lines = data.draw(st.permutations(GOOD.splitlines()))
        junk = data.draw(st.one_of(st.sampled_from(GOOD), st.text(max_size=5)))
        at = data.draw(st.integers(0, len(GOOD)))
        text = data.draw(
            st.sampled_from([GOOD[:at], GOOD[:at] + junk + GOOD[at:], "\n".join(lines)])
        )
        path.write_text(text, encoding="utf-8")
    try:
        assert Machine.load(path).to_toml()
    except MachineError as error:
        assert error.hint  # noqa: PT017  (most damage is an error, and each says what to do)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.toml", str(tmp_path / "missing")):
        with pytest.raises(MachineError, match="is not a file"):
            Machine.load(path)
