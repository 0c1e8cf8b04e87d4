"""What the simulator foretells against what is measured, and how close to the bound that is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import mean, median

import torch
from common import Figures, Quartiles, torch_threads, walk_seconds
from throttled import (
    Chain,
    distributed,
    layer_seconds,
    machine_of,
    pass_seconds,
    planned,
)

from distorch.cli.output import show_table
from distorch.integrations.attach import Handle
from distorch.plan.cost import bound
from distorch.plan.plan import Plan
from distorch.simulate import simulate

_MODELS = {
    "24 equal": [4096] * 25,
    "19 large, 38 small": [2048, 6144] * 10 + [2048] * 38,
    "uneven": [1024, 2048, 4096, 6144, 8192, 6144, 4096, 2048] * 2 + [1024],
}
_SHARES = (0.0, 0.25, 0.5, 0.75)
_ROWS = 96
_THROTTLED = 1.5e9
_ROUNDS = 3
_SWEEP = (0.1, 0.25, 0.5, 0.75, 1.0)
_SWEEP_RATIO = 0.3  # compute over transfer, with nothing at rest
_WALKS = 2


@dataclass(frozen=True, slots=True)
class Case:
    """One step as foretold and as measured, in seconds."""

    model: str
    donor: str
    share: float
    bound: float
    foretold: float
    measured: float

    @property
    def error(self) -> float:
        """How far the prediction is off, as a share of what was measured."""
        return abs(self.foretold - self.measured) / self.measured

    @property
    def row(self) -> list[str]:
        """As cells of a table."""
        times = (self.bound, self.foretold, self.measured)
        cells = [f"{each * 1e3:.0f}" for each in times]
        return [self.model, self.donor, f"{self.share:.0%}", *cells, f"{self.error:.1%}"]


def foretold() -> Figures:
    """Predict and measure three models at four budgets, from a disk and from a throttled donor."""
    with torch.no_grad(), torch_threads(1):
        cases = [case for name, widths in _MODELS.items() for case in _cases(name, widths)]
    print("bound, foretold and measured seconds of a step, each term measured beside it")
    titles = ("model", "donor", "at rest", "bound ms", "foretold ms", "measured ms", "error")
    show_table(titles, [case.row for case in cases])
    errors = [case.error for case in cases]
    print(f"error: median {median(errors):.1%}, mean {mean(errors):.1%}, most {max(errors):.1%}")
    return {"median_error": median(errors), "cases": [case.row for case in cases]}


def _cases(name: str, widths: list[int]) -> Iterator[Case]:
    """Run one model at every budget from both donors."""
    resident, model = Chain(widths), Chain(widths)
    x = torch.randn(_ROWS, widths[0]).bfloat16()
    for donor in ("disk", "throttled"):
        for share in _SHARES:
            plan = planned(model, layer_seconds(resident, x), share, machine_of(_THROTTLED))
            rounds = []
            with _running(model, plan, _THROTTLED if donor == "throttled" else None) as handle:
                for _ in range(_ROUNDS):
                    seconds = layer_seconds(resident, x)
                    step, speed = pass_seconds(model, x), _THROTTLED
                    if donor == "disk":
                        speed = plan.streamed_bytes / walk_seconds(handle, _WALKS)
                    machine = machine_of(speed)
                    found = simulate(plan, seconds, machine).step_seconds
                    rounds.append(
                        Case(name, donor, share, bound(plan, seconds, machine)[0], found, step)
                    )
            yield sorted(rounds, key=lambda case: case.error)[len(rounds) // 2]


@contextmanager
def _running(model: Chain, plan: Plan, bytes_per_second: float | None) -> Iterator[Handle]:
    handle = distributed(model, plan, bytes_per_second)
    try:
        yield handle
    finally:
        handle.remove()


def residency() -> Figures:
    """Sweep what is at rest, on a donor whose transfers take much longer than compute."""
    rows, efficiencies, overheads = [], [], []
    with torch.no_grad(), torch_threads(1):
        plain, model = Chain(_MODELS["24 equal"]), Chain(_MODELS["24 equal"])
        x = torch.randn(_ROWS, model.layers[0].in_features).bfloat16()
        seconds = layer_seconds(plain, x)
        speed = sum(p.nbytes for p in plain.parameters()) * _SWEEP_RATIO / sum(seconds)
        for share in _SWEEP:
            plan = planned(model, seconds, share, machine_of(speed))
            with _running(model, plan, speed):
                pairs = [(pass_seconds(plain, x), pass_seconds(model, x)) for _ in range(_ROUNDS)]
            found = Quartiles.of([max(c, plan.streamed_bytes / speed) / step for c, step in pairs])
            overhead = median(step / c for c, step in pairs)
            efficiencies.append(found.median)
            overheads.append(overhead)
            rows.append(
                [
                    f"{share:.0%}",
                    f"{median(s for _, s in pairs) * 1e3:.0f}",
                    found.text(),
                    f"{overhead:.3f}",
                ]
            )
    print(f"donor throttled to {speed / 1e9:.2f} GB/s: compute is {_SWEEP_RATIO} of the transfer")
    show_table(("at rest", "T, ms a pass", "E", "T / plain"), rows)
    over = overheads[-1] - 1
    print(f"mean E {mean(efficiencies):.3f}; all at rest: {over:+.1%} over the plain module")
    return {"mean_E": mean(efficiencies), "overhead": over}
