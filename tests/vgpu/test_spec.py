"""The line of DISTORCH_VGPU."""

from __future__ import annotations

import pytest

from distorch.errors import MachineError
from distorch.vgpu.spec import MAX_DEVICES, Spec

GIB = 2**30


def test_sizes_are_those_of_the_allocation_language() -> None:
    devices = Spec.parse("12gb, 500MiB,2.5g").devices
    assert [device.capacity_bytes for device in devices] == [12 * GIB, 500 * 2**20, 5 * GIB // 2]
    assert Spec.parse("1gb").links() == ()


def test_a_speed_is_that_of_both_ways_to_the_host() -> None:
    links = {(link.source, link.target): link for link in Spec.parse("1gb,1gb @ 4gb/s").links()}
    assert set(links) == {
        ("cpu", "vgpu:1"),
        ("vgpu:1", "cpu"),
        ("vgpu:0", "vgpu:1"),
        ("vgpu:1", "vgpu:0"),
    }
    assert {link.bytes_per_second for link in links.values()} == {4 * GIB}


def test_the_slower_link_counts_between_devices() -> None:
    links = {(link.source, link.target): link for link in Spec.parse("1gb@2gb/s,1gb@3gb/s").links()}
    assert links["vgpu:0", "vgpu:1"].bytes_per_second == 2 * GIB


def test_a_bus_is_shared_one_way_at_a_time() -> None:
    spec = Spec.parse("1gb@2gb/s+a,1gb@3gb/s+a,1gb@3gb/s+b")
    buses = {(link.source, link.target): link.bus for link in spec.links()}
    assert buses["cpu", "vgpu:0"] == buses["cpu", "vgpu:1"] == "a.in"
    assert buses["vgpu:0", "cpu"] == "a.out"
    assert buses["cpu", "vgpu:2"] == "b.in"
    assert buses["vgpu:0", "vgpu:1"] == ""
    assert spec.buses() == {"a.in": 3 * GIB, "a.out": 3 * GIB, "b.in": 3 * GIB, "b.out": 3 * GIB}


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("", "not a virtual device"),
        ("12gb,", "not a virtual device"),
        ("12", "not a size"),
        ("12%", "not a size"),
        ("*", "not a size"),
        ("0gb", "is nothing"),
        ("1gb;cpu", "not a size"),
        ("12gbb", "not a size"),
        ("12gb@4gb", "not a virtual device"),
        ("12gb@4gb/s@5gb/s", "not a virtual device"),
        ("12gb@fast/s", "not a size"),
        ("12gb+a", "its link has no speed"),
        (",".join(["1gb"] * (MAX_DEVICES + 1)), "too many"),
    ],
)
def test_a_line_that_cannot_be_read_says_why_and_shows_one_that_can(line: str, text: str) -> None:
    with pytest.raises(MachineError, match=text) as caught:
        Spec.parse(line)
    Spec.parse(caught.value.hint.removeprefix("DISTORCH_VGPU="))
