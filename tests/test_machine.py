"""The machine: a value that finds its parts, checks them, and goes to a file and back."""

from __future__ import annotations

import math
import subprocess
import sys
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from distorch.errors import MachineError, StorageError
from distorch.machine import Compute, Link, Machine, Tier
from tests.strategies import machines

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


def tier(name: str, num_bytes: int = 8) -> Tier:
    return Tier(name=name, capacity_bytes=num_bytes, free_bytes=num_bytes)


def test_a_tier_is_found_by_its_name() -> None:
    box = Machine(name="box", tiers=(tier("cuda:0"), tier("disk"), tier("disk:/fast")))
    assert box.tier("cuda:0").name == "cuda:0"
    assert box.tier("disk:/fast").name == "disk:/fast"
    assert box.tier("disk:/slow").name == "disk"
    with pytest.raises(MachineError, match=r"no 'cpu'\n  try: .* cuda:0, disk, disk:/fast"):
        box.tier("cpu")
    with pytest.raises(MachineError, match="no memory at all"):
        Machine(name="box", tiers=()).tier("cpu")
    with pytest.raises(MachineError, match="no 'disk:/fast'"):
        Machine(name="box", tiers=()).tier("disk:/fast")


def test_a_tier_is_replaced_in_its_place_or_added_last() -> None:
    box = Machine(name="box", tiers=(tier("cpu"), tier("disk")), links=(LINK,))
    assert box.replace_tier(tier("cpu", 9)).tiers == (tier("cpu", 9), tier("disk"))
    assert box.replace_tier(tier("disk:/x")).tiers[-1] == tier("disk:/x")
    assert box.replace_tier(tier("cpu", 9)).links == (LINK,)
    assert box.tier("cpu") == tier("cpu")


LINK = Link(source="disk", target="cpu", bytes_per_second=3e9)


def test_what_no_machine_can_be_is_refused() -> None:
    with pytest.raises(MachineError, match="twice"):
        Machine(name="box", tiers=(tier("cpu"), tier("cpu")))
    with pytest.raises(MachineError, match="negative"):
        Tier(name="cpu", capacity_bytes=8, free_bytes=-1)


@given(machines())
def test_every_tier_of_a_machine_is_found(machine: Machine) -> None:
    assert [machine.tier(tier.name) for tier in machine.tiers] == list(machine.tiers)


# --- speeds -----------------------------------------------------------------------------------


def link(source: str, target: str, speed: float = 1e9, bus: str = "") -> Link:
    return Link(source=source, target=target, bytes_per_second=speed, bus=bus)


BOX = Machine(
    name="box",
    tiers=tuple(map(tier, ("cuda:0", "cuda:1", "cpu", "disk"))),
    links=(
        link("cpu", "cuda:0", 24e9, "pcie"),
        link("cuda:1", "cuda:0", 4e9, "pcie"),
        link("disk", "cpu", 7e9),
    ),
    computes=(
        Compute(
            device="cuda:0", flops_per_second={"BF16": 4e13, "F32": 2e13}, bytes_per_second=5e11
        ),
    ),
)


def test_a_route_is_direct_or_through_the_host() -> None:
    assert BOX.link("cpu", "cuda:0").bytes_per_second == 24e9
    assert BOX.route("cuda:1", "cuda:0") == (BOX.link("cuda:1", "cuda:0"),)
    assert BOX.route("disk:/fast", "cuda:0") == (BOX.link("disk", "cpu"), BOX.link("cpu", "cuda:0"))
    assert BOX.route("disk:/fast", "cpu") == (BOX.link("disk:/other", "cpu"),)
    assert BOX.route("cpu", "cpu") == ()
    for source, target in [("cuda:0", "cpu"), ("disk", "cuda:1"), ("cuda:0", "xpu:0")]:
        with pytest.raises(MachineError, match=f"no link {source} -> {target}.*\n  try: distorch"):
            BOX.route(source, target)


def test_a_bus_has_the_speed_of_its_fastest_link_unless_it_is_told() -> None:
    assert BOX.bus_speed("pcie") == 24e9
    told = Machine(name="box", tiers=BOX.tiers, links=BOX.links, buses=(("pcie", 20e9),))
    assert told.bus_speed("pcie") == 20e9
    for name in ("", "nvlink"):
        with pytest.raises(MachineError, match="no bus"):
            BOX.bus_speed(name)


def test_a_rate_that_is_not_known_is_that_of_a_wider_dtype() -> None:
    card = BOX.compute("cuda:0")
    rates = {dtype: card.flops(dtype) for dtype in ("F8_E4M3", "BF16", "F16", "Q4_K", "F32")}
    assert rates == {"F8_E4M3": 4e13, "BF16": 4e13, "F16": 4e13, "Q4_K": 4e13, "F32": 2e13}
    fast = Compute(device="cuda:0", flops_per_second={"BF16": 1.0}, bytes_per_second=1.0)
    with pytest.raises(MachineError, match="multiplies F32 is not known, only BF16"):
        fast.flops("F32")
    with pytest.raises(MachineError, match=r"'cpu' of machine 'box'.*\n  try: distorch probe"):
        BOX.compute("cpu")


def test_the_rates_of_a_device_are_its_own() -> None:
    rates = {"F32": 1.0}
    device = Compute(device="cpu", flops_per_second=rates, bytes_per_second=1.0)
    rates["F32"] = 2.0
    assert device.flops("F32") == 1.0
    assert hash(device) == hash(
        Compute(device="cpu", flops_per_second={"F32": 1.0}, bytes_per_second=1)
    )


@pytest.mark.parametrize("speed", [0, -1.0, math.inf, math.nan])
def test_a_speed_is_finite_and_above_zero(speed: float) -> None:
    wrong: list[Callable[[], object]] = [
        lambda: link("cpu", "disk", speed),
        lambda: Compute(device="cpu", flops_per_second={}, bytes_per_second=speed),
        lambda: Compute(device="cpu", flops_per_second={"F32": speed}, bytes_per_second=1),
        lambda: Machine(name="box", tiers=BOX.tiers, links=BOX.links, buses=(("pcie", speed),)),
    ]
    for make in wrong:
        with pytest.raises(MachineError, match="\n  try: more than zero"):
            make()


@pytest.mark.parametrize("seconds", [-1e-9, math.inf, math.nan])
def test_a_latency_is_finite_and_not_below_zero(seconds: float) -> None:
    with pytest.raises(MachineError, match="latency_seconds"):
        Link(source="cpu", target="disk", bytes_per_second=1, latency_seconds=seconds)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"links": (link("cpu", "disk"), link("cpu", "disk"))}, "a link twice: cpu -> disk"),
        ({"links": (link("cpu", "xpu:0"),)}, "a link of 'xpu:0'.*\n  try: one of cpu, cuda:0"),
        ({"computes": (*BOX.computes, *BOX.computes)}, "rate of a device twice: cuda:0"),
        (
            {"computes": (Compute(device="mps", flops_per_second={}, bytes_per_second=1),)},
            "a compute rate of 'mps'",
        ),
        ({"links": BOX.links, "buses": (("usb", 1.0),)}, "a bus of 'usb'.*\n  try: one of pcie"),
        ({"links": BOX.links, "buses": (("pcie", 1.0), ("pcie", 2.0))}, "a bus twice"),
    ],
)
def test_parts_of_a_machine_fit_each_other(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(MachineError, match=message):
        Machine(name="box", tiers=BOX.tiers, **parts)


def test_a_link_has_two_ends() -> None:
    with pytest.raises(MachineError, match="leads nowhere"):
        link("cpu", "cpu")


# --- files ------------------------------------------------------------------------------------

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


def test_a_name_nobody_knows_gets_suggestions() -> None:
    with pytest.raises(MachineError, match=r"called 'RTX4070'\n  try: perhaps .*rtx4070-12gb"):
        Machine.load("RTX4070")
    with pytest.raises(MachineError, match=r"one of 2x-rtx3090, .*; or a file"):
        Machine.load("zzz")


# --- the machines that are shipped --------------------------------------------------------------


def test_every_size_of_card_is_shipped() -> None:
    assert set(Machine.known()) >= {
        *("rtx4060-8gb", "rtx3060-12gb", "rtx4070-12gb", "rtx4060ti-16gb", "rtx4080-16gb"),
        *("rtx3090-24gb", "rtx4090-24gb", "rtx5090-32gb", "h200-141gb", "laptop-32gb"),
        *("2x-rtx3090", "2x-rtx3090-nvlink", "rtx4090-rtx3060"),
    }


@pytest.mark.parametrize("name", Machine.known())
def test_a_shipped_machine_says_what_a_plan_needs(name: str) -> None:
    machine = Machine.load(name)
    compute, *donors = machine.tiers
    assert machine.name == name
    assert Machine.load(name) == machine
    rates = machine.compute(compute.name)
    assert 0 < rates.flops("F32") <= rates.flops("BF16")
    assert donors[-1].name == "disk"
    for donor in donors:
        route = machine.route(donor.name, compute.name)
        assert (route[0].source, route[-1].target) == (donor.name, compute.name)
        assert all(0 < part.latency_seconds < 1e-3 for part in route)
    for memory in machine.tiers:
        assert 0.3 * memory.capacity_bytes < memory.free_bytes <= memory.capacity_bytes
    for path in machine.links:
        assert 1e9 < path.bytes_per_second < 1e11
        assert not path.bus or machine.bus_speed(path.bus) >= path.bytes_per_second


@pytest.mark.parametrize("name", Machine.known())
def test_every_number_of_a_shipped_machine_has_its_source(name: str) -> None:
    text = (files("distorch") / "profiles" / f"{name}.toml").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if " = " in line.partition("#")[0]]
    assert [
        line for line in lines if '"' not in line.partition("#")[0] and "  # " not in line
    ] == []


def test_a_bridge_is_faster_than_the_host() -> None:
    with_bridge, without = map(Machine.load, ("2x-rtx3090-nvlink", "2x-rtx3090"))
    assert with_bridge.link("cuda:1", "cuda:0").bytes_per_second > 50e9
    assert without.link("cuda:1", "cuda:0").bytes_per_second < 12e9


# --- this machine, measured ---------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the probe of this machine is saved, in a folder of the test's own."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr("distorch.machine.user_config_path", tmp_path.joinpath)
    assert tmp_path in Machine.probe_path().parents
    return Machine.probe_path()


def test_without_a_probe_this_machine_is_what_is_seen(saved: Path) -> None:
    assert not saved.exists()
    assert (Machine.here().links, Machine.here().computes) == ((), ())


def test_what_was_probed_is_kept_of_what_is_here(saved: Path, tmp_path: Path) -> None:
    seen = Machine.detect()
    Machine(
        name="then",
        tiers=(*(tier(x.name) for x in seen.tiers), tier("xpu:9")),
        links=(link("disk", "cpu", 2e9, "a"), link("cpu", "xpu:9", 3e9, "b")),
        computes=tuple(
            Compute(device=name, flops_per_second={"F32": 1e11}, bytes_per_second=3e10)
            for name in ("cpu", "xpu:9")
        ),
        buses=(("a", 3e9), ("b", 4e9)),
    ).save(saved)
    here = Machine.here(disk=tmp_path)
    assert here.name == seen.name
    assert [x.name for x in here.tiers] == [x.name for x in seen.tiers]
    assert here.tier("cpu").capacity_bytes == seen.tier("cpu").capacity_bytes
    assert here.links == (link("disk", "cpu", 2e9, "a"),)
    assert [rate.device for rate in here.computes] == ["cpu"]
    assert here.buses == (("a", 3e9),)


def test_a_broken_probe_names_its_file_and_the_command(saved: Path) -> None:
    saved.parent.mkdir(parents=True)
    saved.write_text("nonsense")
    with pytest.raises(MachineError, match=r"nonsense|not TOML") as caught:
        Machine.here()
    assert str(saved) in caught.value.problem
    assert "distorch probe" in caught.value.hint


def test_it_answers_without_torch() -> None:
    code = "import sys, distorch.machine, distorch.allocation as a; a.Allocation.parse('auto'); "
    code += "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
