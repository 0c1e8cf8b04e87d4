"""One case: a model under a cap, run by contenders in turn, each in the same way."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from distorch.errors import AllocationError
from gpu.arena import Arena, first_line
from gpu.cases import Case, Clock, Entry, Speeds
from gpu.contenders import Job, Running, resident
from gpu.device import Device, Figures
from gpu.model import Model

_FEWEST_PASSES = 3
_ROOMIER = 0.9  # what is tried where a device was full
_TRIES = 3
_LONG_SECONDS = 2.0  # of a pass: one of them warms up what there is


@dataclass(slots=True, kw_only=True)
class Bench:
    """What all cases share."""

    device: Device
    arena: Arena
    clock: Clock
    speeds: Speeds = field(default_factory=Speeds)
    margin_bytes: int
    tile: int
    most_passes: int = 8
    warm_passes: int = 2


@dataclass(slots=True)
class Reference:
    """What the resident model does: the seconds of its passes, what they need, what comes out."""

    seconds: list[float]
    activation_bytes: int
    output: Tensor

    @property
    def best(self) -> float:
        """The fastest pass: with it, E is never flattered."""
        return min(self.seconds)


def run_case(bench: Bench, case: Case, seconds: float) -> Figures:
    """Run a case within so many seconds; contenders that do not get a turn are named."""
    until = time.perf_counter() + seconds
    model = Model(case.shape, case.form, bench.arena, length=bench.tile)
    found = _about(bench, case, model)
    inputs = model.inputs(bench.device.torch)
    rows: Figures = found["contenders"]
    reference, rows["resident"] = _reference(bench, model, inputs, until)
    activation_bytes = reference.activation_bytes if reference else 0
    usual_bytes = bench.device.allocated_bytes + activation_bytes + bench.margin_bytes
    own_cap = case.cap_bytes or round(usual_bytes + case.room_share * model.nbytes)
    found |= {"activation_bytes": activation_bytes, "cap_bytes": own_cap}
    for number, entry in enumerate(case.entries):
        left, before = until - time.perf_counter(), bench.device.allocated_bytes
        if left <= 0 or not bench.clock.left:
            rows[entry.name] = {"cut_off": "the time was up"}
            bench.clock.say(f"  {entry.name}: cut off, the time was up")
            continue
        share = left / (len(case.entries) - number)
        cap_bytes = entry.cap_bytes or own_cap
        row = _try(bench, model, inputs, entry, reference, cap_bytes, share)
        rows[entry.name] = row | {"left_bytes": bench.device.allocated_bytes - before}
        if "failed" in row and not bench.device.works():
            found["stopped"] = f"the device does not compute any more after {entry.name}"
            break
    return found


def _about(bench: Bench, case: Case, model: Model) -> Figures:
    """Say what a case is, and return its figures before anybody ran."""
    pinned = "pinned" if model.is_pinned else "PAGEABLE"
    bench.clock.say(
        f"{case.label}: {model.name}, {model.nbytes / 1e9:.2f} GB in {len(model.blocks)} blocks, "
        f"{pinned}, made in {model.build_seconds:.1f} s"
    )
    return {
        "model": model.name,
        "model_bytes": model.nbytes,
        "format": case.form,
        "pinned": model.is_pinned,
        "contenders": {},
    }


def _reference(
    bench: Bench, model: Model, inputs: dict[str, Tensor], until: float
) -> tuple[Reference | None, Figures]:
    device = bench.device
    job = Job(model=model, device=device, room_bytes=model.nbytes)
    try:
        with resident(job) as running, torch.no_grad():
            share = (until - time.perf_counter()) / 4
            running.module(**inputs)  # what is done once needs memory too: not counted
            device.reset_peaks()
            before = device.allocated_bytes
            seconds, output, _ = _passes(bench, running, inputs, share)
            found = Reference(seconds, device.peak_bytes - before, output)
            row = _memory(device) | _seconds(seconds)
        del running
    except Exception as error:  # noqa: BLE001  the others still have their turn
        bench.clock.say(f"  resident: failed, {first_line(error)}")
        return None, {"failed": first_line(error)}
    finally:
        device.tidy()
    bench.clock.say(f"  resident: C {1e3 * found.best:.1f} ms")
    return found, row


def _try(
    bench: Bench,
    model: Model,
    inputs: dict[str, Tensor],
    entry: Entry,
    reference: Reference | None,
    cap_bytes: int,
    seconds: float,
) -> Figures:
    """One contender's row; one that raises is reported, and stops nothing."""
    known = reference.activation_bytes if reference else 0
    taken = bench.device.allocated_bytes + (known or cap_bytes // 4) + bench.margin_bytes
    job = Job(
        model=model, device=bench.device, room_bytes=cap_bytes - taken, activation_bytes=known
    )
    for number in range(_TRIES):
        full = ""
        try:
            row = _row(bench, job, inputs, entry, reference, cap_bytes, seconds)
        except (torch.OutOfMemoryError, AllocationError) as error:
            full = first_line(error)
        except Exception as error:  # noqa: BLE001  the others still have their turn
            bench.clock.say(f"  {entry.name}: failed, {first_line(error)}")
            return {"failed": first_line(error)}
        finally:
            bench.device.tidy()
        if not full:
            return row | ({"tries": number + 1} if number else {})
        bench.clock.say(f"  {entry.name}: the device was full with {job.room_bytes / 1e9:.2f} GB")
        job = replace(job, room_bytes=round(job.room_bytes * _ROOMIER))
    return {"failed": full}


def _row(
    bench: Bench,
    job: Job,
    inputs: dict[str, Tensor],
    entry: Entry,
    reference: Reference | None,
    cap_bytes: int,
    share: float,
) -> Figures:
    device = job.device
    began = time.perf_counter()
    with device.cap(cap_bytes) as held, torch.no_grad():
        with entry.run(job) as running:
            set_up = time.perf_counter() - began
            device.reset_peaks()
            retries = device.retries
            seconds, output, moved = _passes(bench, running, inputs, share - set_up)
            row: Figures = {
                **_seconds(seconds),
                **_memory(device),
                **_bits(output, reference),
                **_bound(bench, running, reference, statistics.median(seconds), moved),
                **running.figures,
                "stats": running.stats(),
                "cap_bytes": cap_bytes,
                "held_by": held,
                "room_bytes": job.room_bytes,
                "set_up_seconds": set_up,
                "allocator_retries": device.retries - retries,
            }
        del running, output
    bench.clock.say(f"  {entry.name}: {_said(row)}")
    return row


def _said(row: Figures) -> str:
    """A row in a line: it is in the log though the run should be ended from outside."""
    efficiency = "" if row["E"] is None else f", E {row['E']:.2f}"
    retries = row["allocator_retries"]
    return (
        f"{1e3 * row['seconds']:.1f} ms{efficiency}, peak {row['peak_bytes'] / 1e9:.3g} GB, "
        f"set up in {row['set_up_seconds']:.1f} s"
        + (f", {retries} times short of memory" if retries else "")
        + ("" if row["bits_equal"] in {True, None} else ", OTHER BITS")
    )


def _passes(
    bench: Bench, running: Running, inputs: dict[str, Tensor], share: float
) -> tuple[list[float], Tensor, int]:
    """Seconds of each pass after some that warm up, what the last computed, bytes moved by each."""
    until = time.perf_counter() + share
    outputs: list[Tensor] = []

    def step() -> None:
        outputs[:] = [running.module(**inputs)]

    for _ in range(bench.warm_passes):
        if bench.device.seconds(step) > _LONG_SECONDS:
            break
    before = running.moved() if running.moved else 0
    seconds: list[float] = []
    while len(seconds) < (_FEWEST_PASSES if bench.clock.left else 1) or (
        len(seconds) < bench.most_passes and time.perf_counter() < until
    ):
        seconds.append(bench.device.seconds(step))
    moved = running.streamed_bytes
    if running.moved:
        moved = (running.moved() - before) // len(seconds)
    return seconds, outputs[0], moved


def _seconds(seconds: list[float]) -> Figures:
    return {"seconds": statistics.median(seconds), "passes": seconds}


def _memory(device: Device) -> Figures:
    return {"peak_bytes": device.peak_bytes, "peak_reserved_bytes": device.peak_reserved_bytes}


def _bits(output: Tensor, reference: Reference | None) -> Figures:
    """Whether every bit is the resident model's; how far off, where not."""
    if reference is None:
        return {"bits_equal": None}
    found, expected = output.cpu(), reference.output.cpu()
    same = torch.equal(_raw(found), _raw(expected))
    figures: Figures = {"bits_equal": same, "finite": bool(expected.isfinite().all())}
    if not same:
        apart = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
        figures["largest_difference"] = float(apart)
    return figures


def _raw(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


def _bound(
    bench: Bench, running: Running, reference: Reference | None, seconds: float, moved: int
) -> Figures:
    """The slower of computing and moving, alone; and what part of the time that is."""
    speeds = bench.speeds
    from_disk = sum(
        nbytes
        for name, nbytes in running.figures.get("bytes_by_tier", {}).items()
        if name.startswith("disk")
    )
    terms = {
        "compute": reference.best if reference else 0.0,
        "link": moved / speeds.link if speeds.link else 0.0,
        "disk": from_disk / speeds.disk if speeds.disk else 0.0,
    }
    known = reference is not None
    bound = max(terms.values())
    return {
        "C": reference.best if reference else None,
        "streamed_bytes": moved,
        "disk_bytes": from_disk,
        "link_bytes_per_second": moved / seconds,
        "bound_seconds": bound if known else None,
        "bound_by": max(terms, key=lambda name: terms[name]),
        "E": bound / seconds if known else None,
    }
