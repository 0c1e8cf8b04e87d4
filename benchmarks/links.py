"""How much of the links a run gets out of them, and of the time: on virtual GPUs of set speeds.

A virtual GPU's transfers take the time that its links say and its operators the time they are told
to, so neither depends on this machine as long as its own copies are much faster.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import mean, median

import torch
from common import Figures
from torch import Tensor, nn

import distorch
from distorch import vgpu
from distorch.cli.output import show_table
from distorch.integrations.attach import Handle
from distorch.machine import Machine, Tier

_DEVICES = "2gb,2gb"
_DEVICE, _PEER = "vgpu:0", "vgpu:1"
_FAST, _SLOW = 0.2e9, 0.1e9  # bytes/s
_BLOCK_BYTES = 1 << 20
_NUM_BLOCKS = 48
_ROUNDS = 3
_WARM, _PASSES = 2, 4
_SHARES = tuple(tenths / 10 for tenths in range(1, 10))
_ROOM_BYTES = 1 << 50
_COPY_BYTES = 64 << 20

_MACHINE = Machine(
    name="virtual",
    tiers=tuple(
        Tier(name=name, capacity_bytes=_ROOM_BYTES, free_bytes=_ROOM_BYTES)
        for name in (_DEVICE, _PEER, "cpu", "disk")
    ),
)


class Tap(nn.Module):
    """A weight of which little is computed: an operator of a device takes the time it is told."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.zeros(_BLOCK_BYTES // 4 // 64, 64)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight[0]


@dataclass(frozen=True, slots=True)
class Way:
    """Two donors: the speeds of their links, the bus that both are on, and their shares."""

    name: str
    speeds: tuple[float, float]
    bus: float | None
    shares: tuple[int, int]

    @property
    def line(self) -> str:
        return f"{_DEVICE},0%;cpu,{self.shares[0]}%;{_PEER},{self.shares[1]}%"

    @property
    def limit(self) -> float:
        """The most that these links can deliver together, in bytes/s."""
        used = [speed for speed, share in zip(self.speeds, self.shares, strict=True) if share]
        return min(sum(used), self.bus or float("inf"))


_WAYS = (
    Way("two buses", (_FAST, _SLOW), None, (67, 33)),
    Way("one bus", (_FAST, _FAST), _FAST, (50, 50)),
    Way("one donor", (_FAST, _FAST), None, (100, 0)),
)


def run() -> Figures:
    """Measure in a process of its own: torch has a virtual GPU for good once it has it."""
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "DISTORCH_VGPU": _DEVICES},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    *table, figures = done.stdout.splitlines()
    print("\n".join(table))
    found: Figures = json.loads(figures)
    return found


def _main() -> None:
    vgpu.install(_DEVICES)
    speed = _copy_speed()
    print(
        f"links of {_FAST / 1e9:.1f} and {_SLOW / 1e9:.1f} GB/s, "
        f"{_NUM_BLOCKS} blocks of {_BLOCK_BYTES >> 20} MiB; "
        f"this machine's own copies: {speed / 1e9:.1f} GB/s"
    )
    with vgpu.settings(enqueued=True, poison=False), torch.inference_mode():
        figures = {"copy_bytes_per_second": speed, "delivered": _delivered()}
    with torch.inference_mode():
        figures["efficiency"] = _efficiencies()
    print(json.dumps(figures))


def _copy_speed() -> float:
    source, target = torch.zeros(2, _COPY_BYTES, dtype=torch.uint8)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - began)
    return _COPY_BYTES / min(seconds)


def _delivered() -> Figures:
    """Bytes per second that arrive from two donors, beside what their links can carry."""
    rows, found = [], {}
    for way in _WAYS:
        vgpu.set_bus("shared", way.bus)
        for source, speed in zip(("cpu", _PEER), way.speeds, strict=True):
            vgpu.set_link(source, _DEVICE, speed, "shared" if way.bus else None)
        with _running(way.line) as (_, handle):
            speeds = [
                handle.plan.streamed_bytes / seconds for seconds in _steady(lambda: _walk(handle))
            ]
        share = median(speeds) / way.limit
        found[way.name] = share
        rows.append([way.name, f"{way.limit / 1e9:.2f}", f"{median(speeds) / 1e9:.3f}"])
        rows[-1].append(f"{share:.3f}")
    show_table(("donors", "links, GB/s", "delivered, GB/s", "share"), rows)
    return found


def _efficiencies() -> Figures:
    """E where computing takes as long as the transfer, with a part of the weights at rest."""
    vgpu.set_link("cpu", _DEVICE, _FAST, None)
    rows, found = [], {}
    for share in (0.0, *_SHARES):
        transfer = (1 - share) * _NUM_BLOCKS * _BLOCK_BYTES / _FAST
        with vgpu.settings(enqueued=True, poison=False, op_seconds=transfer / _NUM_BLOCKS):
            rounds = [_efficiency(share) for _ in range(_ROUNDS)]
        found[share] = median(rounds)
        rows.append([f"{share:.0%}", f"{transfer * 1e3:.0f}", f"{found[share]:.3f}"])
    show_table(("at rest", "transfer = compute, ms", "E"), rows)
    found_mean = mean(found[share] for share in _SHARES)
    print(f"mean E over 10 to 90 % at rest: {found_mean:.3f}")
    return {"by_share": found, "mean": found_mean}


def _efficiency(share: float) -> float:
    with _running(f"{_DEVICE},100%") as (model, _):
        compute = median(_steady(lambda: _pass(model)))
    percent = round(share * 100)
    with _running(f"{_DEVICE},{percent}%;cpu,{100 - percent}%") as (model, handle):
        step = median(_steady(lambda: _pass(model)))
        transfer = handle.plan.streamed_bytes / _FAST
    return max(compute, transfer) / step


@contextmanager
def _running(line: str) -> Iterator[tuple[nn.Module, Handle]]:
    with torch.inference_mode(mode=False):
        model = nn.Sequential(*[Tap() for _ in range(_NUM_BLOCKS)])
    handle = distorch.distribute(model, line, compute=_DEVICE, machine=_MACHINE)
    try:
        yield model, handle
    finally:
        handle.remove()


def _pass(model: nn.Module) -> None:
    model(torch.zeros(1, 64, device=_DEVICE))


def _walk(handle: Handle) -> None:
    """Let a step's blocks arrive with nobody computing."""
    executor = handle._executor  # noqa: SLF001  users have no reason to walk
    assert executor is not None, "the handle was not removed"
    for block in handle.plan.streamed_order:
        executor.release(executor.acquire(block))


def _steady(job: Callable[[], None]) -> Sequence[float]:
    """Return the seconds that the device takes for each of some jobs in the midst of others."""
    marks = []
    for number in range(_WARM + _PASSES + 1):
        job()
        if number >= _WARM:
            marks.append(torch.Event(device=_DEVICE, enable_timing=True))
            marks[-1].record(torch.accelerator.current_stream(_DEVICE))
    torch.accelerator.synchronize(_DEVICE)
    return [marks[0].elapsed_time(marks[-1]) / 1e3 / _PASSES]


if __name__ == "__main__":
    _main()
