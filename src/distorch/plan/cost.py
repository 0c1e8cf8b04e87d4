"""What a step asks of a machine, and the least time that it can take: pure arithmetic.

A `Profile` says what one forward pass needs, whatever the machine: blocks in execution order, their
floating-point operations, the memory beside weights. With a machine it becomes seconds per block;
with a plan, bytes on every bus. No step is faster than the larger of the two sums: the bound.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any, Self

from distorch.errors import FormatError
from distorch.formats.dtypes import DTYPES
from distorch.machine import Compute, Link, Machine
from distorch.plan.blocks import Block, Part
from distorch.plan.plan import Plan, read_block
from distorch.plan.sharing import num_groups

__all__ = [
    "Profile",
    "block_seconds",
    "bound",
    "lane_seconds",
    "lanes",
    "steady_bytes",
    "with_usual_links",
]

_VERSION = 1
_DISK_SPEED, _MEMORY_SPEED = 2e9, 12e9  # bytes/s of what nobody has measured
_UNPACK_SHARE = 0.8  # of a device's memory speed, that good kernels reach when they decode


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What one step (one forward pass) of a model asks of any machine.

    ``flops`` are per block, of one step; ``activation_bytes`` are the peak beside weights;
    ``compute_dtype`` is what packed weights become before they are multiplied.

    >>> part = Part(tensor="w", dtype="BF16", shape=(32, 32), nbytes=2048)
    >>> block = Block(name="w", parts=(part,), module="w")
    >>> profile = Profile(name="tiny", blocks=(block,), flops=(2048,), activation_bytes=64)
    >>> profile.model_bytes, Profile.from_json(profile.to_json()) == profile
    (2048, True)
    """

    name: str
    blocks: tuple[Block, ...]
    flops: tuple[int, ...]
    activation_bytes: int
    compute_dtype: str = "BF16"

    def __post_init__(self) -> None:
        """Every block has its operations."""
        assert len(self.blocks) == len(self.flops), "one number of operations for each block"

    @property
    def model_bytes(self) -> int:
        """Bytes of all blocks as stored, each tensor rounded up to 256 bytes."""
        return sum(block.nbytes for block in self.blocks)

    @property
    def total_flops(self) -> int:
        """Floating-point operations of one step."""
        return sum(self.flops)

    def to_json(self) -> str:
        """Write the profile as JSON; `from_json` reads it back."""
        return json.dumps({"version": _VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a profile that `to_json` wrote.

        Raises:
            FormatError: the text is not such a profile.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            if data.pop("version") != _VERSION:
                raise ValueError("another version")
            blocks = tuple(read_block(item) for item in data.pop("blocks"))
            flops = tuple(int(count) for count in data.pop("flops"))
            if len(blocks) != len(flops) or min((0, *flops)) < 0:
                raise ValueError("not one number of operations for each block")
            return cls(blocks=blocks, flops=flops, **data)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise FormatError(
                f"not a profile of this version: {error}", hint="profile the model again"
            ) from error


def block_seconds(profile: Profile, compute: Compute) -> tuple[float, ...]:
    """Return the seconds that each block computes, once its weights are on the device.

    A block takes as long as its operations or, if that is longer, as reading its weights once from
    the device's own memory. Packed weights are decoded before: packed bytes are read, two bytes a
    weight are written.
    """
    rate = compute.flops(profile.compute_dtype)
    return tuple(
        max(flops / rate, 0 if block.looked_up else block.nbytes / compute.bytes_per_second)
        + sum(_unpacked_bytes(part, profile.compute_dtype) for part in block.parts)
        / (_UNPACK_SHARE * compute.bytes_per_second)
        for block, flops in zip(profile.blocks, profile.flops, strict=True)
    )


def _unpacked_bytes(part: Part, compute_dtype: str) -> int:
    """Bytes that decoding a packed part reads and writes; none for one that is used as it is."""
    form = DTYPES.get(part.dtype)
    packed = form is not None and (form.block_elements > 1 or form.name.startswith("F8"))
    if not packed or part.dtype == compute_dtype:
        return 0
    return part.nbytes + 2 * prod(part.shape)


def steady_bytes(plan: Plan) -> dict[str, int]:
    """Return the bytes that leave each donor in a step after the first.

    A ring with room for every visitor keeps them all: then nothing moves any more.
    """
    order = plan.streamed_order
    if num_groups(order, plan.visitor_bytes, plan.ring.slot_bytes) <= plan.ring.num_slots:
        return {}
    totals: Counter[str] = Counter()
    for index in order:
        totals[plan.placements[index].tier] += plan.placements[index].block.nbytes
    return dict(totals)


def lanes(machine: Machine, source: str, target: str) -> dict[str, float]:
    """Return what a transfer passes, by name, and its bytes per second: links, and their buses."""
    found: dict[str, float] = {}
    for link in machine.route(source, target):
        found[f"{link.source}->{link.target}"] = link.bytes_per_second
        if link.bus:
            found[link.bus] = machine.bus_speed(link.bus)
    return found


def with_usual_links(machine: Machine, device: str) -> Machine:
    """Return the machine with usual speeds for the links to a device that were not measured.

    They say which donor is faster, not how fast it is: other memories before disks.

    >>> from distorch.machine import Tier
    >>> tiers = [Tier(name=n, capacity_bytes=1, free_bytes=1) for n in ("cuda:0", "cpu", "disk")]
    >>> found = with_usual_links(Machine(name="new", tiers=tuple(tiers)), "cuda:0")
    >>> [(link.source, link.target) for link in found.links]
    [('cpu', 'cuda:0'), ('disk', 'cpu')]
    """
    known = {(link.source, link.target) for link in machine.links}
    missing = [
        Link(source=tier.name, target=target, bytes_per_second=speed)
        for tier in machine.tiers
        for target, speed in [("cpu", _DISK_SPEED) if tier.is_disk else (device, _MEMORY_SPEED)]
        if tier.name != target and (tier.name, target) not in known
    ]
    return replace(machine, links=(*machine.links, *missing))


def lane_seconds(plan: Plan, machine: Machine) -> dict[str, float]:
    """Return the seconds that each link and each bus is busy in a step, at full speed."""
    totals: defaultdict[str, float] = defaultdict(float)
    for tier, nbytes in steady_bytes(plan).items():
        for lane, bytes_per_second in lanes(machine, tier, plan.compute).items():
            totals[lane] += nbytes / bytes_per_second
    return dict(totals)


def bound(plan: Plan, seconds: Sequence[float], machine: Machine) -> tuple[float, str]:
    """Return the least seconds that a step can take, and what sets them: ``compute`` or a lane."""
    limits = {"compute": sum(seconds), **lane_seconds(plan, machine)}
    limited_by = max(limits, key=lambda name: limits[name])
    return limits[limited_by], limited_by
