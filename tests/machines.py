"""A machine with links, a bus and speeds."""

from __future__ import annotations

from distorch.machine import Compute, Link, Machine, Tier


def tier(name: str, num_bytes: int = 8) -> Tier:
    return Tier(name=name, capacity_bytes=num_bytes, free_bytes=num_bytes)


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
