from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distorch.errors import AllocationError, MachineError
from distorch.integrations.comfyui.kits import (
    DEVICE_INPUTS,
    Kit,
    compute_of,
    inputs_of,
    misnamed,
    request_of,
)
from distorch.integrations.request import Request
from distorch.machine import Machine, Tier

GIB = 2**30
DEVICES = ["cpu", "cuda:0", "cuda:1"]
KITS: list[Kit] = ["device", "device_offload", "distorch2", "distorch2_clip", "distorch"]
SPLITS: list[Kit] = ["distorch2", "distorch2_clip", "distorch"]


def _machine(devices: list[str]) -> Machine:
    tiers = [Tier(name=name, capacity_bytes=64 * GIB, free_bytes=32 * GIB) for name in devices]
    return Machine(name="test", tiers=tuple(tiers))


@pytest.mark.parametrize("kit", KITS)
@pytest.mark.parametrize("devices", [["cpu"], DEVICES])
def test_a_node_without_a_single_value_asks_for_what_its_widgets_show(
    kit: Kit, devices: list[str]
) -> None:
    shown = {name: options["default"] for name, (_, options) in inputs_of(kit, devices).items()}
    assert request_of(kit, {}, devices) == request_of(kit, shown, devices)
    assert request_of(kit, dict.fromkeys(shown), devices) == request_of(kit, shown, devices)


@pytest.mark.parametrize("kit", KITS)
@pytest.mark.parametrize("devices", [["cpu"], DEVICES])
def test_what_the_widgets_show_first_can_be_done(kit: Kit, devices: list[str]) -> None:
    line = request_of(kit, {}, devices).line(10 * GIB, _machine(devices))
    assert sum(n for _, n in line.resolve(10 * GIB, _machine(devices)).bytes_by_tier) == 10 * GIB


@pytest.mark.parametrize("kit", SPLITS)
@given(gib=st.floats(0, 128))
def test_more_gib_than_the_model_has_is_all_of_it(kit: Kit, gib: float) -> None:
    machine, model_bytes = _machine(DEVICES), 8 * GIB
    line = request_of(kit, {"virtual_vram_gb": gib}, DEVICES).line(model_bytes, machine)
    found = line.resolve(model_bytes, machine)
    assert found.compute == "cuda:0"
    assert found.bytes_on("cpu") <= min(int(gib * GIB) + 1, model_bytes)
    assert found.bytes_on("cpu") >= min(int(gib * GIB) - 1, model_bytes)


@pytest.mark.parametrize("kit", SPLITS)
def test_nothing_lent_is_everything_on_the_device(kit: Kit) -> None:
    compute = DEVICE_INPUTS[kit][0]
    asked = request_of(kit, {compute: "cuda:1", "virtual_vram_gb": 0.0}, DEVICES)
    assert asked == Request(allocation="cuda:1,*", compute="cuda:1")


@pytest.mark.parametrize("kit", SPLITS)
@pytest.mark.parametrize("line", ["cuda:0,2gb;cpu,*", "cuda:0,30%;cpu,*", "auto", " cpu,* "])
def test_a_line_wins_over_gib(kit: Kit, line: str) -> None:
    asked = request_of(kit, {"expert_mode_allocations": line, "virtual_vram_gb": 9.0}, DEVICES)
    assert asked == Request(allocation=line.strip(), compute="cuda:0")


@pytest.mark.parametrize("blank", ["", "  ", "\t", None])
def test_a_blank_line_is_none(blank: str | None) -> None:
    values = {"expert_mode_allocations": blank, "virtual_vram_gb": 2.0}
    assert request_of("distorch2", values, DEVICES).virtual_vram_gb == 2.0


@pytest.mark.parametrize(
    ("others", "donors"), [(False, ("cpu",)), (True, ("cuda:1", "cpu")), (None, ("cpu",))]
)
def test_the_first_form_borrows_from_other_accelerators_before_the_host(
    others: bool | None,  # noqa: FBT001 (parametrized)
    donors: tuple[str, ...],
) -> None:
    assert request_of("distorch", {"use_other_vram": others}, DEVICES).donor == donors


def test_a_donor_that_computes_lends_nothing() -> None:
    values = {"compute_device": "cuda:1", "donor_device": "cuda:1"}
    assert request_of("distorch2", values, DEVICES).allocation == "cuda:1,*"


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        (
            "cuda:0,0.1;cpu,0.5#cuda:0;4;cpu",
            Request(allocation="cuda:0,0.1;cpu,0.5", compute="cuda:0"),
        ),
        ("#cuda:1;4.5;cpu", Request(virtual_vram_gb=4.5, donor=("cpu",), compute="cuda:1")),
        (
            "# cuda:0 ; 4 ; cuda:1,cpu",
            Request(virtual_vram_gb=4.0, donor=("cuda:1", "cpu"), compute="cuda:0"),
        ),
        ("#cuda:1;0;cpu", Request(allocation="cuda:1,*", compute="cuda:1")),
    ],
)
def test_what_the_first_logs_printed_reads(text: str, asked: Request) -> None:
    assert request_of("distorch2", {"expert_mode_allocations": text}, DEVICES) == asked


@pytest.mark.parametrize("text", ["#cuda:0", "#cuda:0;many;cpu"])
def test_what_does_not_read_says_what_would(text: str) -> None:
    with pytest.raises(AllocationError, match="#cuda:0;4;cpu"):
        request_of("distorch2", {"expert_mode_allocations": text}, DEVICES)


@pytest.mark.parametrize("kit", KITS)
def test_a_device_of_another_machine_is_named(kit: Kit) -> None:
    compute = DEVICE_INPUTS[kit][0]
    with pytest.raises(MachineError, match=r"'cuda:7', and this machine has cpu, cuda:0, cuda:1"):
        compute_of(kit, {compute: "cuda:7"}, DEVICES)


def test_a_donor_of_another_machine_is_named() -> None:
    with pytest.raises(MachineError, match="'xpu:3'"):
        request_of("distorch2", {"donor_device": "xpu:3"}, DEVICES)


@pytest.mark.parametrize("name", ["cuda:", "cuda:-1", "", "a b", 3, "cuda:x"])
def test_what_can_be_no_device_is_said(name: Any) -> None:
    assert "is no name of a device" in misnamed([name])


@pytest.mark.parametrize("kit", KITS)
def test_every_input_says_what_it_does(kit: Kit) -> None:
    for name, (_, options) in inputs_of(kit, DEVICES).items():
        assert len(options["tooltip"]) > 15, name
