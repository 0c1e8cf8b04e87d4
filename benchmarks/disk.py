"""A model on disk, cold, with compute about equal to reading: who overlaps the two?"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import median

import torch
from common import (
    Figures,
    Quartiles,
    best_of,
    cached_bytes,
    forget,
    in_turn,
    read_ahead,
    seconds_of,
    settle,
    torch_threads,
    walk_seconds,
    write_out,
)
from torch import Tensor, nn

import distorch
from distorch.cli.output import show_table

NUM_ROUNDS = 7
_NUM_BLOCKS, _SHAPES = 10, ((4096, 8192), (8192, 4096))
MODEL_BYTES = _NUM_BLOCKS * (64 << 20)
READ_AHEAD_KIB = 128  # Linux' default: what a machine has that nobody has tuned
_PASSES = 3  # one after another: a step begins where the last one ended
_WALKS = 2
_SEED = 0
_CALM = 1.15  # a round whose compute took longer than the best by more was disturbed


class Blocks(nn.Module):
    """Matrices of 64 MiB, one after another."""

    def __init__(self) -> None:
        super().__init__()
        shapes = islice(cycle(_SHAPES), _NUM_BLOCKS)
        self.layers = nn.ModuleList(
            nn.Linear(width, height, bias=False, dtype=torch.bfloat16, device="meta")
            for width, height in shapes
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@dataclass(frozen=True, slots=True)
class Contender:
    """A way to run the model; ``make_cold`` is called before each pass, off the clock."""

    name: str
    model: nn.Module
    make_cold: Callable[[], None] | None = None
    begin: Callable[[], None] = lambda: None  # before each round, off the clock

    def passes(self, x: Tensor) -> tuple[float, list[Tensor]]:
        """Return the seconds per pass of some passes in a row, and what they computed."""
        if self.make_cold is None:
            outputs: list[Tensor] = []
            seconds = seconds_of(lambda: outputs.extend(self.model(x) for _ in range(_PASSES)))
            return seconds / _PASSES, outputs
        total, outputs = 0.0, []
        for _ in range(_PASSES):
            self.make_cold()
            total += seconds_of(lambda: outputs.append(self.model(x)))
        return total / _PASSES, outputs


class Ours:
    """The model under ``cpu,0b;disk,*``: nothing at rest in memory, all of it on disk."""

    def __init__(self, folder: Path) -> None:
        self.model = build()
        self._folder = folder
        self._line = f"cpu,0b;disk:{folder},*"
        self.handle = distorch.distribute(self.model, self._line)
        assert self.handle.plan.streamed_bytes == MODEL_BYTES, "every pass reads all of the model"

    def fresh(self) -> None:
        """Begin again with an empty ring, so that the first block of the round is paid for."""
        self.handle.rebudget(self._line)
        settle()

    def read_alone(self) -> float:
        """X: seconds per pass of reading, in the same order into the same slots, and no compute."""
        self.fresh()
        return walk_seconds(self.handle, _WALKS)

    def check_uncached(self) -> None:
        """See that streaming has left nothing in the page cache: each pass found its file cold."""
        left, size = cached_bytes(self._file()), self._file().stat().st_size
        assert left <= size // 100, f"our file has {left} of {size} bytes in the page cache"

    def _file(self) -> Path:
        """The file that the disk tier reads; it has no name any more, but the system lists it."""
        for link in Path("/proc/self/fd").iterdir():
            with suppress(OSError):
                if link.readlink().is_relative_to(self._folder):
                    return link
        raise AssertionError("the disk tier has its file open")


def build() -> Blocks:
    """Build the model, the same one each time."""
    model = Blocks().to_empty(device="cpu").requires_grad_(requires_grad=False)
    random = torch.Generator().manual_seed(_SEED)
    for parameter in model.parameters():
        parameter.normal_(std=parameter.shape[1] ** -0.5, generator=random)
    return model.eval()


def accelerate_offload(model: nn.Module, folder: Path) -> Contender:
    """``disk_offload``: a file for each weight, mapped when its layer begins."""
    from accelerate import disk_offload

    disk_offload(model, folder, execution_device=torch.device("cpu"))
    return Contender("accelerate", model, _cold(folder))


def diffusers_offload(model: nn.Module, folder: Path) -> Contender:
    """Group offloading to disk, one layer a group."""
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        model,
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        offload_to_disk_path=str(folder),
    )
    return Contender("diffusers", model, _cold(folder))


def _cold(folder: Path) -> Callable[[], None]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
    write_out(files)
    return lambda: forget(files)


def balanced_rows(model: nn.Module, x_seconds: float) -> int:
    """Choose how many rows go in, so that a pass computes about as long as its weights are read."""
    rows = 64
    for _ in range(3):
        rows_in = _input(rows)
        model(rows_in)
        ratio = x_seconds / best_of(3, lambda rows_in=rows_in: model(rows_in))
        rows = min(1024, max(8, round(rows * ratio / 8) * 8))
    return rows


def _input(rows: int) -> Tensor:
    random = torch.Generator().manual_seed(_SEED)
    return torch.randn(rows, _SHAPES[0][0], generator=random).bfloat16()


@contextmanager
def _folders(count: int) -> Iterator[list[Path]]:
    with tempfile.TemporaryDirectory(prefix="distorch-bench-") as root:
        folders = [Path(root).resolve() / str(number) for number in range(count)]
        for folder in folders:
            folder.mkdir()
        yield folders


def run(num_rounds: int = NUM_ROUNDS, read_ahead_kib: int = READ_AHEAD_KIB) -> Figures:
    """Measure, print, and return the figures."""
    with _folders(3) as folders, read_ahead(folders[0], read_ahead_kib) as setting:
        print(setting)
        return {"read_ahead": setting, **_measure(folders, num_rounds)}


def _measure(folders: Sequence[Path], num_rounds: int) -> Figures:
    with torch.no_grad(), torch_threads(1):
        ours = Ours(folders[0])
        contenders = [
            Contender("ours", ours.model, begin=ours.fresh),
            accelerate_offload(build(), folders[1]),
            diffusers_offload(build(), folders[2]),
            Contender("resident", build()),
        ]
        resident = contenders[-1].model
        x = _input(balanced_rows(resident, median(ours.read_alone() for _ in range(3))))
        expected = resident(x)
        equal = {contender.name: True for contender in contenders}
        for contender in contenders:  # what is done once, such as learning the order
            contender.passes(x)
        rounds = []
        for number in range(num_rounds):
            seconds = {"reading": ours.read_alone()}
            for contender in in_turn(contenders, number):
                contender.begin()
                seconds[contender.name], outputs = contender.passes(x)
                equal[contender.name] &= all(torch.equal(output, expected) for output in outputs)
                settle()
            ours.check_uncached()
            rounds.append(seconds)
        ours.handle.remove()
        return _report(rounds, equal, len(x))


def _report(rounds: list[dict[str, float]], equal: dict[str, bool], num_rows: int) -> Figures:
    best = min(seconds["resident"] for seconds in rounds)
    calm = [seconds for seconds in rounds if seconds["resident"] <= _CALM * best]
    compute = Quartiles.of([seconds["resident"] for seconds in calm])
    reading = Quartiles.of([seconds["reading"] for seconds in calm])
    print(
        f"{_NUM_BLOCKS} blocks x 64 MiB bf16, {num_rows} rows, one compute thread, "
        f"{len(calm)} of {len(rounds)} rounds were calm\n"
        f"compute C {compute.text(0, 1e3)} ms, reading X {reading.text(0, 1e3)} ms a pass "
        f"({MODEL_BYTES / reading.median / 1e9:.2f} GB/s)"
    )
    found = {name: _figures(name, calm) for name in equal}
    rows = [
        [
            name,
            f["seconds"].text(0, 1e3),
            f["E"].text(),
            f"{f['vs_resident'].median:.2f}",
            f["gain"].text(),
            "yes" if equal[name] else "NO",
        ]
        for name, f in found.items()
    ]
    show_table(("contender", "T, ms a pass", "E", "T / C", "best peer / T", "equal"), rows)
    return {
        "num_rows": num_rows,
        "rounds": rounds,
        "calm_rounds": len(calm),
        "contenders": {
            name: {**{key: value.figures for key, value in f.items()}, "bits_equal": equal[name]}
            for name, f in found.items()
        },
    }


def _figures(name: str, rounds: list[dict[str, float]]) -> dict[str, Quartiles]:
    """Compare within each round, then summarise."""
    peers = [peer for peer in rounds[0] if peer in {"accelerate", "diffusers"}]
    limits = [max(seconds["resident"], seconds["reading"]) for seconds in rounds]
    times = [seconds[name] for seconds in rounds]
    return {
        "seconds": Quartiles.of(times),
        "E": Quartiles.of([limit / time for limit, time in zip(limits, times, strict=True)]),
        "vs_resident": Quartiles.of([seconds[name] / seconds["resident"] for seconds in rounds]),
        "gain": Quartiles.of(
            [min(seconds[p] for p in peers) / seconds[name] for seconds in rounds]
        ),
    }
