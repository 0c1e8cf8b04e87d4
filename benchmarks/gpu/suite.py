"""The whole run: links, then workloads in turn, within a time; results are written at once."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distorch.integrations import planning
from distorch.plan.blocks import cut
from gpu.arena import Arena, first_line
from gpu.cases import Clock
from gpu.device import Device, Figures, find, hardware, host_memory
from gpu.kernels import measure_kernels
from gpu.links import measure_links
from gpu.measure import Bench, run_case
from gpu.peers import absent
from gpu.report import markdown, result_path, show, write_json
from gpu.workloads import DISK, KERNELS, WORKLOADS, Scale, full, tiny

_HOST_BYTES = 56 * 10**9  # as much pinned memory as is asked for at most
_HOST_SHARE = 0.5  # of what is free
_NONE = "skipped, no accelerator: torch finds none, and --device names none"
_VIRTUAL = "skipped, only a virtual card is here: --scale tiny is for those"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a run is asked to do."""

    only: Sequence[str] = ()
    device: str = ""
    scale: str = "full"
    cap_gb: float = 12.0
    host_gb: float = 0.0
    minutes: float = 8.0
    folder: Path | None = None
    out: Path | None = None
    save: bool = False
    commit: str = ""


def gpu() -> Figures:
    """Run all of it at full scale, for benchmarks/run.py."""
    return run(Options())


def run(options: Options) -> Figures:
    """Measure, print, and return the figures."""
    clock = Clock(options.minutes)
    name = find(options.device)
    if name is None or (name.startswith("vgpu") and options.scale == "full"):
        why = _NONE if name is None else _VIRTUAL
        print(why)
        return {"skipped": why}
    device = Device(name)
    scale = tiny() if options.scale == "tiny" else full(options.cap_gb)
    threads = torch.get_num_threads()
    torch.set_num_threads(scale.threads or threads)
    found = _nothing_yet(device, options)
    gc.collect()
    gc.freeze()  # what was imported need not be looked at after every contender
    clock.say(f"{found['hardware']['device']}, torch {torch.__version__}, {scale.name} scale")
    if found["absent"]:
        clock.say(f"not installed, and so not compared with: {', '.join(found['absent'])}")
    bench = _bench(device, scale, clock, round(options.host_gb * 1e9))
    plans: Any = planning
    usual = plans.cut
    if scale.block_bytes:  # or a tiny model would be a block or two
        plans.cut = partial(cut, target_bytes=scale.block_bytes)
    try:
        _measure(bench, scale, options, found)
    finally:
        plans.cut = usual
        torch.set_num_threads(threads)
        found["seconds"] = clock.passed
        _write(options, found)
        device.tidy()
        bench.arena.close()
        gc.unfreeze()
    show(found)
    return found


def _nothing_yet(device: Device, options: Options) -> Figures:
    """Return the results before anything is measured: where and how."""
    return {
        "hardware": hardware(device, options.commit),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "options": {key: str(value) for key, value in asdict(options).items()},
        "absent": absent(),
        "links": {},
        "cases": {},
    }


def _bench(device: Device, scale: Scale, clock: Clock, host_bytes: int) -> Bench:
    usual = min(_HOST_BYTES, round(_HOST_SHARE * host_memory()[1])) or _HOST_BYTES
    return Bench(
        device=device,
        arena=Arena(device, host_bytes or usual, scale.slab_bytes),
        clock=clock,
        margin_bytes=scale.margin_bytes,
        tile=scale.tile,
        most_passes=scale.most_passes,
        warm_passes=scale.warm_passes,
    )


def _measure(bench: Bench, scale: Scale, options: Options, found: Figures) -> None:
    """The links, the kernels, then the workloads; of all, those that were asked for."""
    sizes = scale.sizes
    if options.only and DISK not in options.only:
        sizes = replace(sizes, file_bytes=0)
    bench.clock.say(f"at most {bench.arena.most_bytes / 1e9:.0f} GB of host memory; links")
    found["links"], bench.speeds = measure_links(
        bench.device, bench.arena, options.folder, sizes, bench.clock
    )
    _write(options, found)
    if not options.only or KERNELS in options.only:
        found["kernels"] = measure_kernels(bench.device, scale.weights, bench.clock)
        _write(options, found)
    _run_workloads(bench, scale, options, found)


def _run_workloads(bench: Bench, scale: Scale, options: Options, found: Figures) -> None:
    """Each gets a share of the time that is left, by weight: what one spares, the next may use."""
    names = [name for name in WORKLOADS if not options.only or name in options.only]
    for number, name in enumerate(names):
        workload = WORKLOADS[name]
        weights = [WORKLOADS[each].weight for each in names[number:]]
        until = time.perf_counter() + bench.clock.left * workload.weight / sum(weights)
        cases = [*workload.cases(scale, bench.speeds, options.folder)]
        bench.clock.say(f"{name}: {workload.title}")
        for turn, case in enumerate(cases):
            left = until - time.perf_counter()
            if left <= 0:
                found["cases"][case.label] = {"cut_off": "the time was up"}
                bench.clock.say(f"{case.label}: cut off, the time was up")
                continue
            try:
                found["cases"][case.label] = run_case(bench, case, left / (len(cases) - turn))
            except Exception as error:  # noqa: BLE001  the others still have their turn
                found["cases"][case.label] = {"failed": first_line(error)}
                bench.clock.say(f"{case.label}: failed, {first_line(error)}")
            _write(options, found)
            if not bench.device.works():
                bench.clock.say("the device does not compute any more: the run ends here")
                return


def _write(options: Options, found: Figures) -> None:
    """Write what there is so far."""
    paths = [options.out] if options.out else []
    if options.save:
        name = found["hardware"]["device"]
        paths.append(result_path(name, "json"))
        notes = result_path(name, "md")
        notes.parent.mkdir(parents=True, exist_ok=True)
        notes.write_text(markdown(found), encoding="utf-8")
    for path in paths:
        write_json(path, found)
