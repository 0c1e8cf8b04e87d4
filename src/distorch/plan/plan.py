"""The plan: every block's placement and the ring. The planner writes it, all others read it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import inf
from typing import Any, Literal, Self

from distorch.errors import AllocationError, FormatError
from distorch.plan.blocks import Block, Part

__all__ = ["Placement", "Plan", "Prediction", "Ring", "gib", "read_block"]

_GIB = 1 << 30
_MIB = 1 << 20
_VERSION = 1


def gib(nbytes: int) -> str:
    """Write bytes for people: GiB, or MiB and bytes where GiB would show a zero.

    >>> gib(5 << 29), gib(64 << 20), gib(12)
    ('2.50 GiB', '64.0 MiB', '12 B')
    """
    if nbytes >= _GIB:
        return f"{nbytes / _GIB:.2f} GiB"
    return f"{nbytes / _MIB:.1f} MiB" if nbytes >= _MIB // 10 else f"{nbytes} B"


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where one block rests: ``resident`` on the compute device, or ``streamed`` from a donor."""

    block: Block
    tier: str
    kind: Literal["resident", "streamed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ring:
    """The slots on the compute device that streamed blocks visit, all of one size."""

    num_slots: int = 0
    slot_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self.num_slots * self.slot_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a step costs on the machine named, as simulated: seconds, bytes, operations.

    ``bound_seconds`` is the least that any schedule could take with these placements;
    ``limited_by`` says what sets it: ``compute``, or a link or bus.
    """

    machine: str
    predicted_seconds: float
    bound_seconds: float
    compute_seconds: float
    limited_by: str
    streamed_bytes_by_link: dict[str, int]
    host_ram_bytes: int
    activation_bytes: int
    flops: int = 0

    @property
    def over_bound(self) -> float:
        """How many times the bound is predicted."""
        return self.predicted_seconds / self.bound_seconds if self.bound_seconds else 1.0

    def table(self) -> list[tuple[str, str]]:
        """Return what was foretold, as rows of a name and a value."""
        step = f"{self.predicted_seconds:.4g} s a step on {self.machine}"
        bound = f"{self.bound_seconds:.4g} s, set by {self.limited_by}"
        return [("predicted", step), ("bound", bound)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Every block's placement, in execution order as far as it is known, and the ring.

    ``allocation`` is the line it was made from; ``notes`` say what a user should know about it;
    ``prediction`` what a step costs, where the model's operations and the machine are known.
    """

    compute: str
    allocation: str
    placements: tuple[Placement, ...]
    ring: Ring
    notes: tuple[str, ...] = ()
    prediction: Prediction | None = None

    @property
    def model_bytes(self) -> int:
        """Bytes of all blocks, each tensor rounded up to 256 bytes."""
        return sum(placement.block.nbytes for placement in self.placements)

    @property
    def bytes_by_tier(self) -> dict[str, int]:
        """Bytes at rest on each tier, the compute device first."""
        totals = Counter({self.compute: 0})
        for placement in self.placements:
            totals[placement.tier] += placement.block.nbytes
        return dict(totals)

    @property
    def held_bytes(self) -> int:
        """Bytes of the compute device that weights take: at rest there, and the ring."""
        return self.bytes_by_tier[self.compute] + self.ring.nbytes

    @property
    def streamed_bytes(self) -> int:
        """Bytes that visit the ring in a step that uses every block once."""
        return sum(
            placement.block.nbytes
            for placement in self.placements
            if placement.kind == "streamed" and not placement.block.looked_up
        )

    @property
    def streamed_order(self) -> tuple[int, ...]:
        """The blocks that visit the ring, in the order of the model's definition."""
        return tuple(
            index
            for index, placement in enumerate(self.placements)
            if placement.kind == "streamed" and not placement.block.looked_up
        )

    @property
    def visitor_bytes(self) -> dict[int, int]:
        """The bytes that each block of `streamed_order` takes in a slot."""
        return {index: self.placements[index].block.slot_bytes for index in self.streamed_order}

    def table(self) -> list[tuple[str, str]]:
        """Return what a person wants to know, as rows of a name and a value."""
        rows = [("allocation", self.allocation), ("model", gib(self.model_bytes))]
        for tier, nbytes in self.bytes_by_tier.items():
            count = sum(placement.tier == tier for placement in self.placements)
            what = "resident" if tier == self.compute else "streamed"
            rows.append((f"{tier} ({what})", f"{gib(nbytes)} in {count} blocks"))
        ring = self.ring
        rows.append(("ring", f"{gib(ring.nbytes)} = {ring.num_slots} x {gib(ring.slot_bytes)}"))
        rows.append(("streamed each step", gib(self.streamed_bytes)))
        return rows + [("note", note) for note in self.notes]

    def for_blocks(self, blocks: Sequence[Block]) -> Plan:
        """Return this plan for a model that is cut into ``blocks``.

        They are found by name or, since a file may name its tensors otherwise than a module does,
        by their places and sizes.

        Raises:
            AllocationError: the plan was made for another model.
        """
        named = {placement.block.name: placement for placement in self.placements}
        places: Sequence[Placement] = self.placements
        if {block.name for block in blocks} == set(named):
            places = [named[block.name] for block in blocks]
        mine, theirs = [_size(placement.block) for placement in places], [*map(_size, blocks)]
        if mine != theirs:
            held = sum(block.nbytes for block in blocks)
            raise AllocationError(
                f"the plan is of another model: {len(mine)} blocks of {gib(self.model_bytes)}, and "
                f"this model has {len(theirs)} of {gib(held)}",
                hint="distorch plan MODEL --save plan.json",
            )
        pairs = zip(places, blocks, strict=True)
        return replace(self, placements=tuple(replace(place, block=b) for place, b in pairs))

    def to_json(self) -> str:
        """Write the plan as JSON; `from_json` reads it back.

        >>> plan = Plan(compute="cpu", allocation="cpu,*", placements=(), ring=Ring())
        >>> Plan.from_json(plan.to_json()) == plan
        True
        """
        return json.dumps({"version": _VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a plan that `to_json` wrote.

        Raises:
            FormatError: the text is not such a plan.
        """
        try:
            data = json.loads(text)
            if data.pop("version") != _VERSION:
                raise ValueError("another version")
            data["placements"] = tuple(_placement(item) for item in data["placements"])
            data["ring"] = Ring(**data["ring"])
            data["notes"] = tuple(data["notes"])
            if data.get("prediction") is not None:
                data["prediction"] = _prediction(data["prediction"])
            plan = cls(**data)
            _check(plan)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise FormatError(
                f"not a plan of this version: {error}", hint="write it again with `distorch plan`"
            ) from error
        return plan


def _check(plan: Plan) -> None:
    """Refuse what JSON can say and no plan does: the executor takes sizes at their word."""
    numbers: list[Any] = [plan.ring.num_slots, plan.ring.slot_bytes]
    texts: list[Any] = [plan.compute, plan.allocation, *plan.notes]
    for placement in plan.placements:
        block = placement.block
        texts += [placement.tier, block.name, block.module or ""]
        for part in block.parts:
            numbers += [part.nbytes - 1, part.first_row, *part.shape]
            texts += [part.tensor, part.dtype]
        if not block.parts or type(block.looked_up) is not bool:
            raise ValueError(f"block {block.name} is no block")
        if placement.kind != ("resident" if placement.tier == plan.compute else "streamed"):
            raise ValueError(f"block {block.name} is {placement.kind} on {placement.tier}")
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError("a size is not a whole number from 0 up")
    if any(type(text) is not str for text in texts):
        raise ValueError("a name is not text")
    largest = max((plan.placements[i].block.slot_bytes for i in plan.streamed_order), default=0)
    if largest and (plan.ring.num_slots < 1 or plan.ring.slot_bytes < largest):
        raise ValueError(f"slots of {plan.ring.slot_bytes} bytes, and a block needs {largest}")


def _size(block: Block) -> tuple[int, bool]:
    return block.nbytes, block.looked_up


def _prediction(item: dict[str, Any]) -> Prediction:
    made = Prediction(**item)
    moved = made.streamed_bytes_by_link
    numbers = [made.predicted_seconds, made.bound_seconds, made.compute_seconds]
    counts = [made.host_ram_bytes, made.activation_bytes, made.flops, *moved.values()]
    texts: list[Any] = [made.machine, made.limited_by, *moved]
    if any(type(number) not in {int, float} or not 0 <= number < inf for number in numbers):
        raise ValueError("a predicted time is not a number of seconds")
    if any(type(count) is not int or count < 0 for count in counts):
        raise ValueError("a predicted size is not a whole number from 0 up")
    if any(type(text) is not str for text in texts):
        raise ValueError("a name is not text")
    return made


def _placement(item: dict[str, Any]) -> Placement:
    return Placement(block=read_block(item["block"]), tier=str(item["tier"]), kind=item["kind"])


def read_block(item: dict[str, Any]) -> Block:
    """Read a block that `dataclasses.asdict` wrote; ValueError if its sizes contradict."""
    block = dict(item)
    stored = block.pop("nbytes")
    parts = tuple(Part(**{**part, "shape": tuple(part["shape"])}) for part in block.pop("parts"))
    made = Block(**block, parts=parts)
    if made.nbytes != stored:
        raise ValueError(f"block {made.name} says {stored} bytes, its parts say {made.nbytes}")
    return made
