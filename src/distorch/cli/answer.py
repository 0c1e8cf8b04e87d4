"""What a person asks of a plan: does it fit, how long is a step, what limits it, what helps."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from typing import Any

from distorch.draw import seconds_text
from distorch.machine import Machine
from distorch.plan.cost import lane_seconds
from distorch.plan.plan import Placement, Plan, Prediction, gib

__all__ = ["answer", "difference", "numbers"]

_UNKNOWN = "no time is predicted: `distorch probe` measures this machine, --machine names another"


Rows = list[tuple[str, str]]


def answer(plan: Plan, machine: Machine) -> Rows:
    """Return the whole plan as rows of a name and a value, the most wanted five first."""
    if plan.prediction is None:
        return [*plan.table(), ("note", _UNKNOWN)]
    return _first(plan, plan.prediction, machine) + plan.table()


def _first(plan: Plan, found: Prediction, machine: Machine) -> Rows:
    free = {name: machine.tier(name).free_bytes for name in (*plan.bytes_by_tier, "cpu")}
    places = [f"{_of(n, free[name])} on {name}" for name, n in plan.bytes_by_tier.items()]
    step = f"{seconds_text(found.predicted_seconds)}, {found.over_bound:.2f} x the bound"
    host = f"{_of(found.host_ram_bytes, free['cpu'])} that are free"
    return [
        (f"fits {machine.name}", ", ".join(places)),
        ("a step takes", step),
        ("limited by", _limits(plan, found, machine)),
        ("host RAM needed", host),
        ("faster with", _advice(plan, found, machine)),
        ("activations", f"{gib(found.activation_bytes)} on {plan.compute}"),
    ]


def _limits(plan: Plan, found: Prediction, machine: Machine) -> str:
    busy = {"compute": found.compute_seconds, **lane_seconds(plan, machine)}
    limit = busy[found.limited_by]
    told = {round(limit, 9)}  # a bus is as busy as its only link: not said twice
    others = []
    for name, seconds in busy.items():
        if round(seconds, 9) not in told:
            told.add(round(seconds, 9))
            others.append(f"{name} busy {seconds / found.predicted_seconds:.0%}")
    return "; ".join([f"{found.limited_by} ({seconds_text(limit)})", *others])


def _advice(plan: Plan, found: Prediction, machine: Machine) -> str:
    """Say what shortens the step: less to compute, or fewer bytes on the link that limits."""
    if found.limited_by == "compute":
        return "a faster device, or a smaller size: every copy hides behind compute"
    busy = lane_seconds(plan, machine)[found.limited_by]
    hidden = found.compute_seconds / busy
    moved_bytes = sum(found.streamed_bytes_by_link.values())
    more = gib(round(moved_bytes * (1 - hidden)))
    return (
        f"{more} more of {plan.compute} for weights, a link {1 / hidden:.1f} x as fast, or weights "
        f"of {hidden:.0%} of these bytes: then compute sets the pace"
        if hidden > 0
        else f"more of {plan.compute} for weights, or a faster link"
    )


def _of(nbytes: int, free_bytes: int) -> str:
    """Write ``1.00 of 2.00 GiB``, or both units where they differ."""
    part, unit = gib(nbytes).split()
    whole = gib(free_bytes)
    return f"{part} of {whole}" if whole.endswith(unit) else f"{part} {unit} of {whole}"


def numbers(plan: Plan) -> str:
    """Return the numbers by name, and the plan itself, as one JSON object.

    What cannot be told without the model's operations and the machine's speeds is null.
    """
    found: dict[str, Any] = dict.fromkeys(Prediction.__dataclass_fields__)
    if plan.prediction is not None:
        found = asdict(plan.prediction)
    placed = {
        "model_bytes": plan.model_bytes,
        "resident_bytes": plan.bytes_by_tier[plan.compute],
        "bytes_by_tier": plan.bytes_by_tier,
        "ring_bytes": plan.ring.nbytes,
    }
    return json.dumps({**placed, **found, "plan": json.loads(plan.to_json())})


def difference(before: Plan, after: Plan) -> tuple[Rows, list[tuple[str, ...]]]:
    """Return what changed from one plan to another: totals, and each block that moved.

    >>> from distorch.plan.plan import Ring
    >>> plan = Plan(compute="cpu", allocation="cpu,*", placements=(), ring=Ring())
    >>> difference(plan, plan)[1]
    []
    """
    rows = [("allocation", f"{before.allocation} -> {after.allocation}")]
    tiers = dict.fromkeys((*before.bytes_by_tier, *after.bytes_by_tier))
    for name in tiers:
        one, other = before.bytes_by_tier.get(name, 0), after.bytes_by_tier.get(name, 0)
        rows.append((name, f"{gib(one)} -> {gib(other)}"))
    rows.append(("ring", f"{gib(before.ring.nbytes)} -> {gib(after.ring.nbytes)}"))
    if before.prediction and after.prediction:
        one_step = seconds_text(before.prediction.predicted_seconds)
        rows.append(("a step", f"{one_step} -> {seconds_text(after.prediction.predicted_seconds)}"))
    moved = _moved(before, after)
    kinds = Counter(tuple(row[-2:]) for row in moved)
    rows += [("moved", f"{count} blocks {a} -> {b}") for (a, b), count in kinds.items()]
    return rows, moved


def _moved(before: Plan, after: Plan) -> list[tuple[str, ...]]:
    def by_name(plan: Plan) -> dict[str, Placement]:
        return {placement.block.name: placement for placement in plan.placements}

    old, new = by_name(before), by_name(after)
    return [
        (
            name,
            gib((old.get(name) or new[name]).block.nbytes),
            old[name].tier if name in old else "-",
            new[name].tier if name in new else "-",
        )
        for name in dict.fromkeys((*old, *new))
        if name not in old or name not in new or old[name].tier != new[name].tier
    ]
