"""Executors over stores that are slow, fail, and note what is read."""

from __future__ import annotations

import random
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from distorch.errors import StorageError
from distorch.formats import TensorInfo
from distorch.plan.blocks import Block
from distorch.plan.plan import Plan
from distorch.run.executor import Executor, Lease
from distorch.tiers import Delivery, Lying, Source, Store
from distorch.tiers.disk import DiskTier
from distorch.tiers.host import HostTier
from distorch.tiers.null import NullTier
from distorch.tiers.sources import FileSource
from tests.plan_strategies import equal_blocks, memory_source, streaming_plan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

PATIENCE_SECONDS = 20.0


class Watched:
    """A store around another: slow at random, failing on demand, and noting every read."""

    def __init__(self, inner: Store, *, seed: int | None = None) -> None:
        self.inner = inner
        self.reads: list[str] = []
        self.failing: set[str] = set()
        self.before_read: Callable[[Block, memoryview], None] = lambda _block, _slot: None
        self._random = None if seed is None else random.Random(seed)  # noqa: S311  delays
        self.closed = False

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    def put(self, block: Block, source: Source) -> None:
        self.inner.put(block, source)

    def direct(self, block: Block) -> torch.Tensor | None:
        return self.inner.direct(block)

    def offsets(self, block: Block) -> Sequence[int]:
        return self.inner.offsets(block)

    def read(self, wanted: Sequence[Delivery]) -> None:
        assert not self.closed, "a closed store is read"
        for block, slot in wanted:
            self.before_read(block, slot)
            self.reads.append(block.name)
            if self._random is not None:
                time.sleep(self._random.choice([0, 0, 0.0005, 0.002]))
            if block.name in self.failing:
                raise StorageError(f"no {block.name}", hint="another disk")
            self.inner.read([(block, slot)])

    def lies_ready(self, block: Block) -> bool:
        return self.inner.lies_ready(block)

    def view(self, block: Block) -> Lying:
        return self.inner.view(block)

    def forget(self, block: Block) -> None:
        self.inner.forget(block)

    def read_rows(self, block: Block, rows: Sequence[int], out: memoryview) -> None:
        self.inner.read_rows(block, rows, out)

    def close(self) -> None:
        self.closed = True
        self.inner.close()


def stores_of(
    kind: str, plan: Plan, data: dict[str, bytes], folder: Path, *, seed: int | None = None
) -> tuple[dict[str, Store], Source]:
    """Fill a store for each tier of the plan from ``data``."""
    source: Source = memory_source(data)
    donors: dict[str, Callable[[], Store]] = {
        "null": lambda: NullTier("disk"),
        "host": lambda: HostTier("disk"),
        "disk in place": lambda: DiskTier("disk"),
        "disk spill": lambda: DiskTier("disk", folder),
    }
    if kind == "disk in place":
        path, infos, written = folder / "weights", {}, b""
        for name, value in data.items():
            info = TensorInfo(name, "U8", (len(value),), len(written), len(value), path)
            infos[name] = info
            written += value
        path.write_bytes(written)
        source = FileSource(infos)
    stores: dict[str, Store] = {"cpu": HostTier("cpu"), "disk": Watched(donors[kind](), seed=seed)}
    for placement in plan.placements:
        stores[placement.tier].put(placement.block, source)
    return stores, source


def is_right(lease: Lease, block: Block, data: dict[str, bytes]) -> bool:
    for index, part in enumerate(block.parts):
        begin = part.first_row * (part.nbytes // part.shape[0])
        expected = data[part.tensor][begin : begin + part.nbytes]
        if lease.part(index).numpy().tobytes() != expected:
            return False
    return True


@contextmanager
def running(plan: Plan, stores: dict[str, Store]) -> Iterator[Executor]:
    executor = Executor(plan, stores)
    try:
        yield executor
    finally:
        executor.close()


@contextmanager
def watched(num: int = 6, *, num_slots: int = 2) -> Iterator[tuple[Executor, Watched]]:
    """Yield an executor of equal blocks that stream from a store which only notes its reads."""
    plan = streaming_plan(equal_blocks(num, 64), num_slots=num_slots)
    store = Watched(NullTier("disk"))
    with running(plan, {"cpu": HostTier("cpu"), "disk": store}) as executor:
        yield executor, store


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE_SECONDS / 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    return condition()


def reader_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("distorch")}


def visit(executor: Executor, *blocks: int) -> None:
    for block in blocks:
        executor.release(executor.acquire(block))
