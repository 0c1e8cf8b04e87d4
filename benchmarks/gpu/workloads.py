"""What is run: seven workloads at full scale, and their small likes for a virtual GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from gpu import shapes
from gpu.cases import Case, Entry, Speeds
from gpu.contenders import Job, Running
from gpu.kernels import TINY as TINY_WEIGHTS
from gpu.kernels import Weights
from gpu.links import TINY, Sizes
from gpu.ours import ours, ours_as_shipped
from gpu.peers import installed
from gpu.plain import copy_at_use, one_ahead
from gpu.shapes import Shape

KERNELS = "kernels"  # what is measured before any workload, and can be asked for as one
DISK = "g7"  # the one that reads it
_GB = 10**9
_MIB = 1 << 20
_RING_SHARE = 0.15
_DISK_SECONDS = 25.0  # that writing for g7 may take in all
_DISK_BYTES = (2 * _GB, 8 * _GB)  # the model that it reads
_WRITTEN = 2.25  # times the model: with 0, 25 and 50 % of it in RAM
_FLUX_BYTES = 23.8e9
_SWEEP_GB = (4, 8, 12, 16, 20, 24)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How large everything is."""

    name: str
    sizes: Sizes
    weights: Weights
    margin_bytes: int
    tile: int
    cap_bytes: int
    room_share: float = 0.5
    block_bytes: int = 0
    most_passes: int = 8
    warm_passes: int = 2
    slab_bytes: int = 4 << 30
    threads: int = 0
    flux: Callable[[], Shape]
    wan_long: Callable[[], Shape]
    wan_short: Callable[[], Shape]
    qwen: Callable[[], Shape]
    llama: Callable[..., Shape]
    sweep: tuple[float, ...]
    batches: tuple[int, ...] = (1, 32)


def full(cap_gb: float) -> Scale:
    """The models as they are, under a cap."""
    return Scale(
        name="full",
        sizes=Sizes(),
        weights=Weights(),
        margin_bytes=400 * _MIB,  # cuBLAS' workspaces, and what the allocator cannot use
        tile=(1 << 24) - 4099,
        cap_bytes=round(cap_gb * _GB),
        flux=shapes.flux,
        wan_long=shapes.wan,
        wan_short=partial(shapes.wan, frames=17),
        qwen=shapes.qwen_image,
        llama=shapes.llama,
        sweep=tuple(gb / 23.8 for gb in _SWEEP_GB),
    )


def tiny() -> Scale:
    """Seconds on a virtual GPU: the same blocks, a hundredth of the width or less."""
    wan = partial(shapes.wan, dim=256, ffn=704, layers=6, size=(64, 64), text_dim=256)
    return Scale(
        name="tiny",
        sizes=TINY,
        weights=TINY_WEIGHTS,
        margin_bytes=_MIB,
        tile=(1 << 20) - 4099,
        cap_bytes=0,
        room_share=0.6,
        block_bytes=256 << 10,
        most_passes=3,
        warm_passes=1,
        slab_bytes=64 * _MIB,
        threads=1,
        flux=partial(shapes.flux, dim=256, double=2, single=4, size=64, text_dim=256),
        wan_long=partial(wan, frames=9),
        wan_short=partial(wan, frames=1),
        qwen=partial(shapes.qwen_image, dim=256, layers=4, size=64, text_dim=256),
        llama=partial(
            shapes.llama, dim=512, ffn=1024, layers=8, vocabulary=512, kv_heads=2, context=16
        ),
        sweep=(0.5, 0.9),
        batches=(1, 4),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A name, what it asks, its share of the time, and its cases."""

    title: str
    weight: float
    cases: Callable[[Scale, Speeds, Path | None], Iterator[Case]]


def _plain() -> list[Entry]:
    return [
        Entry(name="copy at use", run=copy_at_use),
        Entry(name="one ahead", run=one_ahead),
        Entry(name="one ahead, prefix stays", run=partial(one_ahead, prefix=True)),
    ]


def _ours() -> list[Entry]:
    return [
        Entry(name="ours", run=ours),
        Entry(name="ours, large ring", run=partial(ours, ring_share=_RING_SHARE)),
    ]


def _peers(*, tame: bool) -> list[Entry]:
    """Other projects: those that leave the process as it was, or the others."""
    found = installed(tame=tame)
    return [Entry(name=name, run=run) for name, run in found.items()]


def _peers_too(scale: Scale) -> list[Entry]:
    """Other projects once more, at full scale; a tiny run has met them in g1."""
    return _peers(tame=True) if scale.name == "full" else []


def _case(scale: Scale, label: str, shape: Shape, entries: list[Entry], form: str = "BF16") -> Case:
    """Return a case under the cap that all share."""
    return Case(
        label=label,
        shape=shape,
        form=form,
        entries=entries,
        cap_bytes=scale.cap_bytes,
        room_share=scale.room_share,
    )


def _g1(scale: Scale, _speeds: Speeds, _folder: Path | None) -> Iterator[Case]:
    shipped = Entry(name="ours, as shipped", run=ours_as_shipped)
    entries = [*_ours(), shipped, *_plain(), *_peers(tame=True)]
    yield _case(scale, "g1", scale.flux(), entries)


def _g2(scale: Scale, _speeds: Speeds, _folder: Path | None) -> Iterator[Case]:
    entries = [*_ours()[:1], *_plain()[1:], *_peers_too(scale)]
    yield _case(scale, "g2", scale.wan_long(), entries)


def _g3(scale: Scale, _speeds: Speeds, _folder: Path | None) -> Iterator[Case]:
    entries = [*_ours(), *_plain(), *_peers_too(scale)]
    yield _case(scale, "g3", scale.wan_short(), entries)


def _g4(scale: Scale, _speeds: Speeds, _folder: Path | None) -> Iterator[Case]:
    for form in ("BF16", "F8_E4M3", "Q8_0", "Q4_K"):
        entries = [*_ours(), *_plain()[2:], *(_peers_too(scale) if form == "BF16" else ())]
        yield _case(scale, f"g4 {form}", scale.qwen(), entries, form=form)


def _g5(scale: Scale, _speeds: Speeds, _folder: Path | None) -> Iterator[Case]:
    entries = [*_ours()[:1], *_plain()[:1], *_plain()[2:]]
    for batch in scale.batches:
        yield _case(scale, f"g5 batch {batch}", scale.llama(batch=batch), entries, form="Q4_K")


def _g6(scale: Scale, _speeds: Speeds, _folder: Path | None) -> Iterator[Case]:
    """Caps from a sixth of the model to all of it: what stays is spread, or comes first."""
    shape = scale.flux()
    entries = []
    for share in scale.sweep:
        for name, prefix in (("spread", False), ("prefix", True)):
            run = partial(_with_room, share, partial(ours, prefix=prefix))
            entries.append(Entry(name=f"{100 * share:.0f} %, {name}", run=run))
    yield Case(label="g6", shape=shape, entries=entries, room_share=1.2)


@contextmanager
def _with_room(
    share: float, run: Callable[[Job], AbstractContextManager[Running]], job: Job
) -> Iterator[Running]:
    """Run with room for a share of the model, whatever the cap is."""
    with run(replace(job, room_bytes=round(share * job.model.nbytes))) as running:
        yield running


def _g7(scale: Scale, speeds: Speeds, folder: Path | None) -> Iterator[Case]:
    """A quarter of the model stays; of the rest, k is in RAM and what is left on disk."""
    shape = scale.flux()
    if scale.name == "full":
        write = speeds.disk_write or 0.5 * _GB
        least, most = _DISK_BYTES
        part = min(most, max(least, write * _DISK_SECONDS / _WRITTEN)) / _FLUX_BYTES
        shape = shapes.flux(double=max(2, round(19 * part)), single=max(4, round(38 * part)))
    entries = [
        Entry(name=f"{share:.0%} in RAM", run=partial(_partly_on_disk, share, folder))
        for share in (1.0, 0.5, 0.25, 0.0)
    ]
    share = 0.25 if scale.name == "full" else scale.room_share
    yield Case(label="g7", shape=shape, entries=entries, room_share=share)


def _others(scale: Scale, _speeds: Speeds, _folder: Path | None) -> Iterator[Case]:
    """Last, since some of them change torch for the whole process."""
    if entries := _peers(tame=False):
        entries = [Entry(name="ours", run=ours), *entries]
        yield _case(scale, "others", scale.flux(), entries)


@contextmanager
def _partly_on_disk(share: float, folder: Path | None, job: Job) -> Iterator[Running]:
    disk = f"disk:{folder}" if folder else "disk"
    in_ram = round(share * max(0, job.model.nbytes - job.room_bytes))
    donors = {1.0: "cpu,*", 0.0: f"{disk},*"}.get(share, f"cpu,{in_ram}b;{disk},*")
    with ours(job, donors=donors, folder=folder) as running:
        yield running


WORKLOADS: Mapping[str, Workload] = {
    "g1": Workload(title="FLUX.1-dev, an image", weight=70, cases=_g1),
    "g2": Workload(title="Wan 14B, 81 frames: compute-bound", weight=90, cases=_g2),
    "g3": Workload(title="Wan 14B, 17 frames: balanced", weight=50, cases=_g3),
    "g4": Workload(title="Qwen-Image in four formats", weight=90, cases=_g4),
    "g5": Workload(title="70B, decoding", weight=60, cases=_g5),
    "g6": Workload(title="FLUX.1-dev, how much stays", weight=45, cases=_g6),
    DISK: Workload(title="FLUX.1-dev, disk to RAM to device", weight=60, cases=_g7),
    "others": Workload(title="FLUX.1-dev, more projects", weight=30, cases=_others),
}
