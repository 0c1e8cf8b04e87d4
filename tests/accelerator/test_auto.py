"""``auto`` on accelerators: what fits, and donors in proportion to their links."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import distorch
from distorch.machine import Link, Machine, Tier

pytestmark = pytest.mark.vgpu

MIB = 1 << 20


def _machine(card_mib: int, **speeds: float) -> Machine:
    """Three cards of which the first is small, and links of so many bytes a second."""
    free = {"vgpu:0": card_mib, "vgpu:1": 1024, "vgpu:2": 1024, "cpu": 1024, "disk": 4096}
    tiers = [Tier(name=n, capacity_bytes=v * MIB, free_bytes=v * MIB) for n, v in free.items()]
    names = {"peer": "vgpu:1", "other": "vgpu:2", "host": "cpu"}
    links = [
        Link(source=names[name], target="vgpu:0", bytes_per_second=speed)
        for name, speed in speeds.items()
    ]
    return Machine(name="three cards", tiers=tuple(tiers), links=tuple(links))


def _model() -> nn.Module:
    return nn.Sequential(*(nn.Linear(512, 512) for _ in range(48))).eval()  # 48 MiB


def test_donors_lend_in_proportion_to_their_links() -> None:
    model, x = _model(), torch.randn(2, 512)
    with torch.inference_mode():
        expected = model(x)
        handle = distorch.distribute(model, machine=_machine(12, peer=8e9, other=4e9, host=4e9))
        held = handle.plan.bytes_by_tier
        assert torch.equal(model(x.to("vgpu:0")).cpu(), expected)
    handle.remove()
    assert held["vgpu:1"] == pytest.approx(held["vgpu:2"] + held["cpu"], rel=0.15)
    assert held["vgpu:2"] == pytest.approx(held["cpu"], rel=0.25)
    assert "disk" not in held


def test_weights_and_ring_fit_a_card_however_small() -> None:
    model = _model()
    for card_mib in (4, 8, 20, 40):
        machine = _machine(card_mib, host=4e9)
        handle = distorch.distribute(model, machine=machine)
        assert handle.weight_bytes <= machine.tier("vgpu:0").usable_bytes
        handle.remove()


def test_a_model_that_fits_stays_on_the_card() -> None:
    handle = distorch.distribute(_model(), machine=_machine(512))
    assert set(handle.plan.bytes_by_tier) == {"vgpu:0"}
    handle.remove()


def test_a_disk_is_the_last_that_lends_where_nothing_was_measured() -> None:
    machine = _machine(8)
    host = replace(machine.tier("cpu"), capacity_bytes=16 * MIB, free_bytes=16 * MIB)
    small = replace(machine, tiers=(machine.tier("vgpu:0"), host, machine.tier("disk")))
    handle = distorch.distribute(_model(), machine=small)
    held = handle.plan.bytes_by_tier
    handle.remove()
    assert held["cpu"] > 0.8 * host.usable_bytes
    assert held["disk"] == handle.plan.model_bytes - held["vgpu:0"] - held["cpu"]
