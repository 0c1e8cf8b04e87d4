"""A donor of a set speed that costs hardly any CPU, and models to stream from it."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Sequence
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor, nn

from distorch.allocation import Allocation
from distorch.integrations.attach import Handle
from distorch.integrations.module_tree import describe
from distorch.integrations.request import Request
from distorch.machine import Link, Machine, Tier
from distorch.plan.blocks import cut
from distorch.plan.plan import Plan
from distorch.plan.planner import Judge, make_plan
from distorch.simulate import simulate
from distorch.tiers import Delivery, Store
from distorch.tiers.host import HostTier
from distorch.tiers.pinned import Pins

_ROOM_BYTES = 1 << 50
_WARM_PASSES = 2


class Throttled(HostTier):
    """Host memory behind a link of ``bytes_per_second``, which moves one block after another."""

    def __init__(self, name: str, bytes_per_second: float) -> None:
        super().__init__(name)
        self._bytes_per_second = bytes_per_second
        self._lock = threading.Lock()
        self._free_at = 0.0

    def read(self, wanted: Sequence[Delivery]) -> None:
        """Copy blocks, and let the rest of their time on the link pass."""
        with self._lock:
            self._free_at = max(time.perf_counter(), self._free_at)
            self._free_at += sum(block.nbytes for block, _ in wanted) / self._bytes_per_second
            until = self._free_at
        super().read(wanted)
        time.sleep(max(0.0, until - time.perf_counter()))


class Chain(nn.Module):
    """Matrices of bf16 one after another, between these widths."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(one, other, bias=False, dtype=torch.bfloat16, device="meta")
            for one, other in pairwise(widths)
        )
        self.to_empty(device="cpu")
        some = torch.randn(1 << 20).bfloat16()  # one draw for all: random numbers take long
        for parameter in self.parameters():
            parameter.view(-1, len(some)).copy_(some * parameter.shape[1] ** -0.5)
        self.eval().requires_grad_(requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def layer_seconds(model: Chain, x: Tensor, num_passes: int = 3) -> list[float]:
    """Return the seconds that each layer computes, its weights at rest: medians of some passes."""
    passes = []
    for _ in range(num_passes):
        seconds, value = [], x
        for layer in model.layers:
            began = time.perf_counter()
            value = layer(value)
            seconds.append(time.perf_counter() - began)
        passes.append(seconds)
    return [median(each) for each in zip(*passes, strict=True)]


def pass_seconds(model: nn.Module, x: Tensor, num_passes: int = 4) -> float:
    """Return the seconds of a pass in the middle of many: those before it empty a full ring."""
    for _ in range(_WARM_PASSES):
        model(x)
    began = time.perf_counter()
    for _ in range(num_passes):
        model(x)
    return (time.perf_counter() - began) / num_passes


def machine_of(bytes_per_second: float) -> Machine:
    """Describe a machine that computes on the CPU and reads from one donor, called its disk."""
    tiers = tuple(
        Tier(name=name, capacity_bytes=_ROOM_BYTES, free_bytes=_ROOM_BYTES)
        for name in ("cpu", "disk")
    )
    link = Link(source="disk", target="cpu", bytes_per_second=bytes_per_second)
    return Machine(name="this machine", tiers=tiers, links=(link,))


def planned(model: Chain, seconds: Sequence[float], share: float, machine: Machine) -> Plan:
    """Return the plan that keeps a share of the model on the compute device, judged best."""
    blocks = cut(describe(model).root)
    budget = round(share * sum(block.nbytes for block in blocks))
    judge = Judge(
        seconds=lambda plan: simulate(plan, seconds, machine).step_seconds,
        least_seconds=sum(seconds),
    )
    return make_plan(blocks, Allocation.parse(f"cpu,{budget}b;disk,*"), machine, judge=judge)


def distributed(model: Chain, plan: Plan, bytes_per_second: float | None) -> Handle:
    """Distribute a model by a plan; its donor is throttled to a speed, or (None) a real disk."""

    def stores(_plan: Plan, _pins: Pins, _kept: Collection[str]) -> dict[str, Store]:
        assert bytes_per_second is not None, "asked for only where it is set"
        return {"cpu": HostTier("cpu"), "disk": Throttled("disk", bytes_per_second)}

    handle = Handle(model, describe(model), None, stores if bytes_per_second else None)
    handle.bind(Request(allocation=plan), None, None)
    return handle
