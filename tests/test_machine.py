"""The machine: a value that finds its parts and checks them."""

from __future__ import annotations

import math
import subprocess
import sys
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given

from distorch.errors import MachineError
from distorch.machine import Compute, Link, Machine, Tier
from tests.machines import BOX, link, tier
from tests.strategies import machines

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


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
