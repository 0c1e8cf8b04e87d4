"""A sweep of a real model on this machine: seconds of a decode step at each budget."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final

import distorch
from distorch.cli.output import Bar
from distorch.cli.sweep import Point, Sweep, each, lines_of
from distorch.errors import ModelError
from distorch.formats import open_checkpoint
from distorch.machine import Machine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from distorch.integrations.attach import Handle
    from distorch.run.stats import Stats

__all__ = ["measured_sweep"]

_COMPUTE: Final = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    """A step at one budget, as the clock and the counters saw it."""

    point: Point
    streamed_bytes: float
    bytes_per_second: float


@dataclass(slots=True)
class _Clock:
    """What transformers calls a streamer: it notes when each token was there, and the counters."""

    handle: Handle
    times: list[float] = field(default_factory=list)
    counters: list[Stats] = field(default_factory=list)

    def put(self, _tokens: Any) -> None:
        """Take the prompt first, then a token of each step."""
        self.times.append(time.perf_counter())
        self.counters.append(self.handle.stats())

    def end(self) -> None:
        """Do nothing: the last token is there."""


def measured_sweep(
    path: Path, name: str, num_points: int | None, num_steps: int, bar: Bar
) -> Sweep:
    """Decode ``num_steps`` tokens at each of so many budgets; None asks for ``auto`` alone.

    Raises:
        StorageError, FormatError, ModelError: the model cannot be loaded, or generates no text.
        AllocationError: nothing fits.
    """
    model = _load(path, bar)
    handle = distorch.handle_of(model)
    model_bytes = handle.plan.model_bytes
    bar.begin("resident, to compare with")
    resident = _measure(model, "resident", f"{_COMPUTE},*", num_steps)
    lines = [("auto", "auto")]
    machine = Machine.detect()
    if num_points is not None:
        donors = {tier.name: {"": 1.0} for tier in machine.tiers if tier.name == "disk"}
        lines = [*lines_of(donors, _COMPUTE, machine, model_bytes, num_points)]
    found: list[_Measured] = []

    def run(donor: str, line: str) -> Point:
        found.append(_measure(model, donor, line, num_steps))
        return found[-1].point

    points, skipped = each(lines, run, bar.begin)
    # Every step computes all of it: where the machine was busy meanwhile, another tells better.
    resident_seconds = min(point.seconds for point in (resident.point, *points))
    return Sweep(
        model=name,
        machine=platform.node() or "this machine",
        compute=_COMPUTE,
        measured=True,
        model_bytes=model_bytes,
        compute_seconds=resident_seconds,
        points=_bounded(found, resident_seconds),
        skipped=skipped,
    )


def _load(path: Path, bar: Bar) -> PreTrainedModel:
    with open_checkpoint(path):
        pass  # a file that cannot be read says so at once, not after torch has been imported
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice is for programmers
    bar.begin("starting torch and transformers")
    progress = bar.counting("loading the weights")
    model: PreTrainedModel = distorch.load(path, f"{_COMPUTE},*", progress=progress)
    if getattr(model, "generate", None) is None:
        raise ModelError(
            f"a {type(model).__name__} generates no text, so it has no decode step",
            hint="a model with a language head, whose class is named ...ForCausalLM",
        )
    return model


def _measure(model: PreTrainedModel, donor: str, line: str, num_steps: int) -> _Measured:
    handle = distorch.handle_of(model)
    handle.rebudget(line)
    clock = _Clock(handle)
    prompt = model.dummy_inputs["input_ids"][:1]  # any tokens: the steps after them are measured
    generate: Any = model.generate
    generate(
        input_ids=prompt,
        attention_mask=prompt.new_ones(prompt.shape),
        max_new_tokens=num_steps + 1,
        min_new_tokens=num_steps + 1,
        do_sample=False,
        streamer=clock,
    )
    before, after = clock.counters[1], clock.counters[-1]
    steps = [later - earlier for earlier, later in pairwise(clock.times[1:])]
    seconds = clock.times[-1] - clock.times[1]
    streamed_bytes = after.streamed_bytes - before.streamed_bytes
    reading = after.transfer_seconds - before.transfer_seconds
    plan = handle.plan
    return _Measured(
        point=Point(
            donor=donor,
            allocation=plan.allocation,
            offloaded_bytes=plan.model_bytes - plan.bytes_by_tier[plan.compute],
            seconds=median(steps),  # not the mean: others may use the machine meanwhile
            bound_seconds=0.0,
            waited_share=(after.waited_seconds - before.waited_seconds) / seconds,
            limited_by="compute",
        ),
        streamed_bytes=streamed_bytes / num_steps,
        bytes_per_second=streamed_bytes / reading if streamed_bytes and reading else 0.0,
    )


def _bounded(found: list[_Measured], resident_seconds: float) -> tuple[Point, ...]:
    """Say how fast each could have been: no faster than resident, nor than the link at its best."""
    points = []
    for one in found:
        link = max(
            (other.bytes_per_second for other in found if other.point.donor == one.point.donor),
            default=0.0,
        )
        transfer_seconds = one.streamed_bytes / link if link else 0.0
        slower = transfer_seconds > resident_seconds
        points.append(
            replace(
                one.point,
                bound_seconds=max(resident_seconds, transfer_seconds),
                limited_by=f"{one.point.donor}->{_COMPUTE}" if slower else "compute",
            )
        )
    return tuple(points)
