"""A sweep: more and more of a model away from the compute device, donor by donor.

Predicted from a profile and a machine, without weights; `distorch.cli.measure` does it for real.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from distorch.allocation import Allocation
from distorch.draw import SweepPoint
from distorch.errors import AllocationError, MachineError
from distorch.machine import Machine
from distorch.plan.cost import Profile, block_seconds, lanes
from distorch.plan.plan import Plan
from distorch.plan.search import shares_by_speed
from distorch.simulate import best_plan

__all__ = ["Point", "Progress", "Sweep", "each", "lines_of", "predicted_sweep"]

Progress = Callable[[str], None]
"""Called with what is done next."""

Line = tuple[str, str]
"""The donor, as a table names it, and the allocation."""

_PIECES: Final = 256  # in which bytes are dealt to several donors


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One allocation, and the seconds of a step; ``waited_share`` is of those seconds."""

    donor: str
    allocation: str
    offloaded_bytes: int
    seconds: float
    bound_seconds: float
    waited_share: float
    limited_by: str

    @property
    def E(self) -> float:  # noqa: N802  its name everywhere
        """The bound over the seconds."""
        return min(1.0, self.bound_seconds / self.seconds) if self.seconds else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What a sweep found; ``skipped`` says of what did not fit, and why."""

    model: str
    machine: str
    compute: str
    measured: bool
    model_bytes: int
    compute_seconds: float
    points: tuple[Point, ...]
    skipped: tuple[str, ...]

    def drawn(self) -> list[SweepPoint]:
        """Return the points as `distorch.draw.draw_sweep` takes them."""
        name = "measured_seconds" if self.measured else "predicted_seconds"
        return [
            SweepPoint(
                donor=point.donor,
                offloaded_bytes=point.offloaded_bytes,
                bound_seconds=point.bound_seconds,
                **{name: point.seconds},
            )
            for point in self.points
        ]

    def numbers(self) -> dict[str, Any]:
        """Return all of it for JSON."""
        fields = (*Point.__dataclass_fields__, "E")
        points = [{name: getattr(point, name) for name in fields} for point in self.points]
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {
            "points": points
        }


def lines_of(
    donors: Mapping[str, Mapping[str, float]],
    compute: str,
    machine: Machine,
    model_bytes: int,
    num_points: int,
) -> Iterator[Line]:
    """Yield allocations from nothing to all of a model offloaded, donor by donor, then together.

    ``donors`` are the speeds of the lanes to each.

    >>> machine = Machine.load("rtx4070-12gb")
    >>> [line for _, line in lines_of({"cpu": {}}, "cuda:0", machine, 100, 3)]
    ['cuda:0,100b;cpu,*', 'cuda:0,50b;cpu,*', 'cuda:0,0b;cpu,*']
    """
    steps = range(num_points - 1, -1, -1)
    resident = [model_bytes * step // max(num_points - 1, 1) for step in steps]
    for donor in donors:
        yield from ((donor, f"{compute},{nbytes}b;{donor},*") for nbytes in resident)
    if len(donors) > 1:
        for nbytes in resident:
            shares = _dealt(model_bytes - nbytes, donors, machine)
            yield " + ".join(donors), ";".join([f"{compute},{nbytes}b", *shares])


def _dealt(
    nbytes: int, donors: Mapping[str, Mapping[str, float]], machine: Machine
) -> Sequence[str]:
    """Deal bytes to all donors by the speed of their links; the roomiest takes the rounding."""
    rooms = {name: machine.tier(name).free_bytes for name in donors}
    shares = shares_by_speed([nbytes // _PIECES] * _PIECES, rooms, donors) or dict(rooms)
    roomiest = max(donors, key=lambda name: rooms[name] - shares[name])
    amounts = {name: "*" if name == roomiest else f"{shares[name]}b" for name in donors}
    return [f"{name},{amount}" for name, amount in amounts.items() if amount != "0b"]


def predicted_sweep(
    profile: Profile, machine: Machine, num_points: int | None, progress: Progress
) -> Sweep:
    """Predict a sweep of so many points for each donor; None asks for ``auto`` alone.

    Raises:
        MachineError: the machine does not say how fast it computes.
        AllocationError: nothing fits.
    """
    compute = Allocation.parse("auto").resolve(0, machine).compute
    compute_seconds = sum(block_seconds(profile, machine.compute(compute)))
    donors, unlinked = _donors(machine, compute)
    lines = [("auto", "auto")]
    if num_points is not None:
        lines = [*lines_of(donors, compute, machine, profile.model_bytes, num_points)]

    def predict(donor: str, line: str) -> Point:
        return _predicted(donor, best_plan(profile, Allocation.parse(line), machine))

    points, refused = each(lines, predict, progress)
    return Sweep(
        model=profile.name,
        machine=machine.name,
        compute=compute,
        measured=False,
        model_bytes=profile.model_bytes,
        compute_seconds=compute_seconds,
        points=points,
        skipped=unlinked + refused,
    )


def each(
    lines: Sequence[Line], run: Callable[[str, str], Point], progress: Progress
) -> tuple[tuple[Point, ...], tuple[str, ...]]:
    """Run every line that fits; return the points, and what is to be said of the others.

    Raises:
        AllocationError: none fits.
    """
    points = []
    refused: dict[str, list[AllocationError]] = {}
    for number, (donor, line) in enumerate(lines, 1):
        progress(f"{number} of {len(lines)}: {donor}")
        try:
            points.append(run(donor, line))
        except AllocationError as error:
            refused.setdefault(donor, []).append(error)
    if not points:
        first = next(iter(refused.values()))[0] if refused else None
        raise AllocationError(
            "no allocation of the sweep fits" + (f": {first.problem}" if first else ""),
            hint=(first and first.hint) or "a machine that has a donor: --machine rtx4070-12gb",
        ) from first
    of_donor = Counter(donor for donor, _ in lines)
    return tuple(points), tuple(
        f"{donor}: {len(errors)} of {of_donor[donor]} do not fit: {errors[0].problem}"
        for donor, errors in refused.items()
    )


def _donors(machine: Machine, compute: str) -> tuple[dict[str, dict[str, float]], tuple[str, ...]]:
    """The memories that have a way to the compute device, the fastest first; and the others."""
    found: dict[str, dict[str, float]] = {}
    unlinked = []
    for tier in machine.tiers:
        if tier.name != compute:
            try:
                found[tier.name] = lanes(machine, tier.name, compute)
            except MachineError as error:
                unlinked.append(f"{tier.name}: {error.problem}")
    fastest_first = sorted(found.items(), key=lambda item: -min(item[1].values()))
    return dict(fastest_first), tuple(unlinked)


def _predicted(donor: str, plan: Plan) -> Point:
    found = plan.prediction
    assert found is not None, "the best plan is the one that was judged"
    seconds = found.predicted_seconds
    return Point(
        donor=donor,
        allocation=plan.allocation,
        offloaded_bytes=plan.model_bytes - plan.bytes_by_tier[plan.compute],
        seconds=seconds,
        bound_seconds=found.bound_seconds,
        waited_share=max(0.0, 1 - found.compute_seconds / seconds) if seconds else 0.0,
        limited_by=found.limited_by,
    )
