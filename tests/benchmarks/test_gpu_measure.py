"""How the GPU benchmarks measure a contender, on a virtual card of this process."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytest

pytestmark = [
    pytest.mark.vgpu,
    pytest.mark.skipif(
        not os.environ.get("DISTORCH_VGPU"), reason="needs virtual GPUs: DISTORCH_VGPU=2gb,2gb,2gb"
    ),
]


@pytest.fixture
def bench() -> Iterator[Any]:
    """What cases share, on a virtual card of this process."""
    workloads, cases = import_module("gpu.workloads"), import_module("gpu.cases")
    scale, device = workloads.tiny(), import_module("gpu.device").Device("vgpu:0")
    gc.collect()
    gc.freeze()  # as a run does
    arena = import_module("gpu.arena").Arena(device, 1 << 30, scale.slab_bytes)
    yield import_module("gpu.measure").Bench(
        device=device,
        arena=arena,
        clock=cases.Clock(2),
        margin_bytes=scale.margin_bytes,
        tile=scale.tile,
        most_passes=scale.most_passes,
    )
    arena.close()
    gc.unfreeze()
    gc.collect()  # pinned memory that nobody holds any more would count in other tests


def small_case(room_share: float, **contenders: Any) -> Any:
    """Return a case of a tiny FLUX, with room for a share of it."""
    cases = import_module("gpu.cases")
    entries = [cases.Entry(name=name, run=run) for name, run in contenders.items()]
    shape = import_module("gpu.workloads").tiny().flux()
    return cases.Case(label="small", shape=shape, entries=entries, room_share=room_share)


def test_who_runs_out_of_memory_says_what_it_needs_and_leaves_nothing(bench: Any) -> None:
    pytest.importorskip("accelerate")
    contenders = {
        "whole": import_module("gpu.peers").installed(tame=True)["diffusers model offload"],
        "next": import_module("gpu.plain").copy_at_use,
    }
    before = bench.device.allocated_bytes
    run_case = import_module("gpu.measure").run_case
    found = run_case(bench, small_case(0.6, **contenders), 60)
    whole, following = (found["contenders"][name] for name in contenders)
    needed = found["model_bytes"] + found["activation_bytes"]
    assert (
        whole["failed"] == f"MemoryError: out of memory, {needed / 1e9:.3g} GB are needed at once"
    )
    assert whole["left_bytes"] == following["left_bytes"] == 0
    assert following["bits_equal"] is True
    assert following["peak_bytes"] <= found["cap_bytes"] < needed
    roomy = run_case(bench, small_case(1.1, **contenders), 60)["contenders"]["whole"]
    assert roomy["bits_equal"] is True
    assert roomy["streamed_bytes"] == roomy["left_bytes"] == 0
    assert roomy["E"] == pytest.approx(roomy["C"] / roomy["seconds"])
    assert roomy["cap_bytes"] >= roomy["peak_bytes"] >= found["model_bytes"]
    assert bench.device.allocated_bytes == before


@pytest.mark.parametrize(("long_seconds", "warm"), [(0.0, 1), (60.0, 2)])
def test_passes_of_seconds_are_warmed_up_by_one(
    bench: Any, monkeypatch: pytest.MonkeyPatch, long_seconds: float, warm: int
) -> None:
    monkeypatch.setattr(import_module("gpu.measure"), "_LONG_SECONDS", long_seconds)
    calls = []

    @contextmanager
    def counted(job: Any) -> Iterator[Any]:
        with import_module("gpu.contenders").resident(job) as running:
            running.module.register_forward_pre_hook(lambda *_: calls.append(1))
            yield running

    found = import_module("gpu.measure").run_case(bench, small_case(1.1, counted=counted), 60)
    assert len(calls) == warm + len(found["contenders"]["counted"]["passes"])
