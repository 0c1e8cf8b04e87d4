"""What the tests of cost, search and simulation share: profiles, and machines with links."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import strategies as st

from distorch.machine import Compute, Link, Machine, Tier
from distorch.plan.blocks import Block, Part
from distorch.plan.cost import Profile, block_seconds
from distorch.plan.planner import Judge
from distorch.simulate import simulate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MIB, GIB = 1 << 20, 1 << 30
RATE = 1e12  # operations a second of the compute device


def profile_of(
    sizes: Sequence[int], seconds: Sequence[float], activation_bytes: int = 0
) -> Profile:
    """Return a profile whose blocks have these bytes, and compute for these seconds."""
    parts = [
        Part(tensor=f"m{number}.w", dtype="BF16", shape=(nbytes // 2,), nbytes=nbytes)
        for number, nbytes in enumerate(sizes)
    ]
    return Profile(
        name="made up",
        blocks=tuple(Block(name=part.tensor, parts=(part,), module=part.tensor) for part in parts),
        flops=tuple(round(each * RATE) for each in seconds),
        activation_bytes=activation_bytes,
    )


def machine_of(
    speeds: Mapping[str, float],
    *,
    free: Mapping[str, int] | None = None,
    bus: str = "",
    latency_seconds: float = 0.0,
) -> Machine:
    """Return a machine whose donors send at these bytes a second to ``cuda:0``."""
    names = ("cuda:0", *speeds)
    room = dict.fromkeys(names, 64 * GIB) | dict(free or {})
    return Machine(
        name="made up",
        tiers=tuple(Tier(name=n, capacity_bytes=room[n], free_bytes=room[n]) for n in names),
        links=tuple(
            Link(
                source=name,
                target="cuda:0",
                bytes_per_second=speed,
                latency_seconds=latency_seconds,
                bus=bus,
            )
            for name, speed in speeds.items()
        ),
        computes=(
            Compute(device="cuda:0", flops_per_second={"BF16": RATE}, bytes_per_second=1e18),
        ),
    )


def judge_of(profile: Profile, machine: Machine) -> Judge:
    """Return a judge that simulates."""
    seconds = block_seconds(profile, machine.compute("cuda:0"))
    return Judge(
        seconds=lambda plan: simulate(plan, seconds, machine).step_seconds,
        least_seconds=sum(seconds),
        reserve_bytes=profile.activation_bytes,
    )


@st.composite
def profiles(draw: st.DrawFn, max_blocks: int = 20) -> Profile:
    """Models of blocks of one size, of two sizes, or of any."""
    num = draw(st.integers(1, max_blocks))
    size = st.integers(1, 32).map(lambda mib: mib * MIB)
    kinds = draw(st.lists(size, min_size=1, max_size=3))
    sizes = draw(st.lists(st.sampled_from(kinds), min_size=num, max_size=num))
    time = st.integers(0, 40).map(lambda ms: ms / 1e3)
    seconds = draw(
        st.one_of(time.map(lambda each: [each] * num), st.lists(time, min_size=num, max_size=num))
    )
    return profile_of(sizes, seconds)


speeds = st.integers(1, 64).map(lambda mib: mib * MIB * 16.0)
