"""The contract of a tier, on every memory: the host's, pinned or not, disks, accelerators."""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

import pytest
import torch

from distorch import vgpu
from distorch.errors import StorageError
from distorch.formats import TensorInfo
from distorch.plan.blocks import Block, Part
from distorch.tiers import Copied, Delivery, Destination, Lying, Source, Store
from distorch.tiers.accelerator import AcceleratorTier
from distorch.tiers.disk import DiskTier
from distorch.tiers.host import HostTier
from distorch.tiers.memory import allocate, allocate_pages, view_bytes
from distorch.tiers.null import NullTier
from distorch.tiers.pinned import Pins
from distorch.tiers.sources import FileSource
from tests.plan_strategies import contents, equal_blocks, many_parts, memory_source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

GUARD = 0xA5
KINDS = [
    "null",
    "host",
    "disk in place",
    "disk spill",
    pytest.param("pinned host", marks=pytest.mark.vgpu),
    pytest.param("vgpu", marks=pytest.mark.vgpu),
]


@dataclass
class Memory:
    """A tier, its weights, and where they come from; the null tier alone does not move them."""

    tier: Store
    source: Source
    blocks: tuple[Block, ...]
    data: Mapping[str, bytes]
    moves: bool
    open_tier: Callable[[Sequence[Block]], Store]
    is_direct: bool = False
    left: bool = False

    def expected(self, part: Part) -> bytes:
        begin = part.first_row * (part.nbytes // part.shape[0])
        return self.data[part.tensor][begin : begin + part.nbytes]

    def fill(self) -> None:
        for block in self.blocks:
            self.tier.put(block, self.source)

    def read(self, block: Block, spare_bytes: int = 0) -> memoryview:
        memory = view_bytes(allocate_pages(block.slot_bytes + spare_bytes))
        memory[:] = bytes([GUARD]) * len(memory)
        self.left = self.tier.lies_ready(block)
        if not self.left:
            self.tier.read([(block, memory[: block.slot_bytes])])
        return memory

    def is_right(self, block: Block, slot: memoryview, *, left: bool | None = None) -> bool:
        if not self.moves:
            return set(slot) == {GUARD}
        left = self.left if left is None else left
        outs = [
            slot[at : at + part.nbytes]
            for part, at in zip(block.parts, self.tier.offsets(block), strict=True)
        ]
        found: Lying = self.tier.view(block) if left else outs
        expected = [self.expected(part) for part in block.parts]
        return [bytes(out) for out in found] == expected


def _row_runs() -> tuple[Block, ...]:
    """A weight of 100 rows of 24 bytes in three blocks."""
    firsts, counts = [0, 40, 64], [40, 24, 36]
    parts = [
        Part(tensor="table", dtype="U8", shape=(num, 24), nbytes=num * 24, first_row=first)
        for first, num in zip(firsts, counts, strict=True)
    ]
    return tuple(
        Block(name=f"table[{part.first_row}]", parts=(part,), module=None, looked_up=True)
        for part in parts
    )


def _file_source(data: Mapping[str, bytes], path: Path) -> FileSource:
    """Return the tensors in one file, in another order, at odd offsets."""
    names = sorted(data, key=lambda name: random.Random(name).random())  # noqa: S311  an order
    offsets = accumulate((len(data[name]) + 3 for name in names), initial=0)
    path.write_bytes(b"".join(data[name] + b"pad" for name in names))
    infos = {
        name: TensorInfo(name, "U8", (len(data[name]),), offset, len(data[name]), path)
        for name, offset in zip(names, offsets, strict=False)
    }
    return FileSource(infos)


def _open_tier(kind: str, folder: Path, blocks: Sequence[Block]) -> Store:
    """Return an empty tier for these blocks."""
    tiers: dict[str, Callable[[], Store]] = {
        "null": lambda: NullTier("null"),
        "host": lambda: HostTier("cpu"),
        "disk in place": lambda: DiskTier("disk"),
        "disk spill": lambda: DiskTier("disk", folder),
        "pinned host": lambda: HostTier("cpu", blocks, Pins("vgpu")),
        "vgpu": lambda: AcceleratorTier("vgpu:0", blocks, Pins("vgpu")),
    }
    return tiers[kind]()


def _bytes_left() -> list[int]:
    """Bytes on virtual devices and in pinned memory."""
    if not vgpu.is_installed():
        return []
    found = vgpu.counters()
    return [*(device.live_bytes for device in found.devices), found.pinned_bytes]


@pytest.fixture(params=KINDS)
def memory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Memory]:
    kind = request.param
    is_direct = kind in {"pinned host", "vgpu"}
    if is_direct:
        if not os.environ.get("DISTORCH_VGPU"):
            pytest.skip("needs a virtual GPU: DISTORCH_VGPU=2gb,2gb,2gb pytest tests/tiers")
        vgpu.install()
    before = _bytes_left()
    blocks = (*many_parts(6), *_row_runs())
    data = contents(blocks)
    source: Source = memory_source(data)
    if kind == "disk in place":
        source = _file_source(data, tmp_path / "weights")
    open_tier = partial(_open_tier, kind, tmp_path)
    made = Memory(open_tier(blocks), source, blocks, data, kind != "null", open_tier, is_direct)
    yield made
    made.tier.close()
    source.close()
    assert _bytes_left() == before


def test_it_counts_the_bytes_at_rest(memory: Memory) -> None:
    assert memory.tier.name
    for num, block in enumerate(memory.blocks):
        assert memory.tier.nbytes == sum(b.nbytes for b in memory.blocks[:num])
        memory.tier.put(block, memory.source)
    memory.tier.close()
    assert memory.tier.nbytes == 0


def test_every_part_comes_back_at_its_offset(memory: Memory) -> None:
    memory.fill()
    for block in reversed(memory.blocks):
        assert memory.is_right(block, memory.read(block))


def test_what_a_device_copies_by_itself_is_the_block_as_it_is_laid_out(memory: Memory) -> None:
    memory.fill()
    for block in memory.blocks:
        flat = memory.tier.direct(block)
        assert (flat is not None) == memory.is_direct
        if flat is not None:
            assert flat.numel() == block.nbytes
            assert memory.is_right(block, view_bytes(flat.cpu()), left=False)


def test_nothing_behind_the_slot_is_written(memory: Memory) -> None:
    memory.fill()
    for block in memory.blocks:
        slot = memory.read(block, spare_bytes=200)
        assert memory.is_right(block, slot)
        assert set(slot[block.slot_bytes :]) == {GUARD}


def test_a_slot_too_small_for_the_block_is_our_mistake(memory: Memory) -> None:
    memory.fill()
    if memory.moves:
        block = memory.blocks[0]
        with pytest.raises((AssertionError, ValueError, RuntimeError)):
            memory.tier.read([(block, view_bytes(allocate(block.nbytes - 64)))])


def test_forgetting_a_block_leaves_it_readable(memory: Memory) -> None:
    memory.fill()
    for block in memory.blocks:
        assert memory.is_right(block, memory.read(block))
        if memory.left:
            memory.tier.forget(block)
        assert memory.is_right(block, memory.read(block))


def test_large_blocks_come_back_the_same_read_or_in_place(memory: Memory, tmp_path: Path) -> None:
    blocks = equal_blocks(5, 200_000)
    data = contents(blocks, seed=1)
    tier = memory.open_tier(blocks)
    large = Memory(tier, memory_source(data), blocks, data, memory.moves, memory.open_tier)
    if isinstance(memory.source, FileSource):
        large.source = _file_source(data, tmp_path / "large")
    large.fill()
    for block in (*blocks, *blocks):
        assert large.is_right(block, large.read(block))
    large.tier.close()
    large.source.close()


def test_blocks_that_are_read_together_come_as_each_alone(memory: Memory) -> None:
    """In another order than they lie in, too: a run of neighbours is one read."""
    memory.fill()
    for blocks in (memory.blocks, memory.blocks[::-1], memory.blocks[::2], ()):
        slots = [view_bytes(allocate_pages(block.slot_bytes)) for block in blocks]
        for slot in slots:
            slot[:] = bytes([GUARD]) * len(slot)
        memory.tier.read([*zip(blocks, slots, strict=True)])
        for block, slot in zip(blocks, slots, strict=True):
            assert memory.is_right(block, slot, left=False)


def test_a_block_can_be_read_again_and_again(memory: Memory) -> None:
    memory.fill()
    for _ in range(3):
        assert memory.is_right(memory.blocks[0], memory.read(memory.blocks[0]))


def test_blocks_can_be_read_while_others_are_still_put(memory: Memory) -> None:
    for block in memory.blocks:
        memory.tier.put(block, memory.source)
        assert memory.is_right(memory.blocks[0], memory.read(memory.blocks[0]))
        assert memory.is_right(block, memory.read(block))


def test_reading_works_from_many_threads_at_once(memory: Memory) -> None:
    memory.fill()

    def read(number: int) -> bool:
        block = memory.blocks[number % len(memory.blocks)]
        slot = view_bytes(allocate(block.slot_bytes))
        slot[:] = bytes([GUARD]) * len(slot)
        memory.tier.read([(block, slot)])
        return memory.is_right(block, slot, left=False)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(200)))


@pytest.mark.parametrize("rows", [[0], [3, 1, 2], [5, 5, 5], list(range(24)), [23, 0], []])
def test_single_rows_come_in_the_order_asked(memory: Memory, rows: list[int]) -> None:
    memory.fill()
    for block in memory.blocks[-3:]:
        out = view_bytes(allocate(len(rows) * 24))
        out[:] = bytes([GUARD]) * len(out)
        memory.tier.read_rows(block, rows, out)
        whole = memory.expected(block.parts[0])
        if memory.moves:
            assert bytes(out) == b"".join(whole[row * 24 : row * 24 + 24] for row in rows)
        else:
            assert set(out) <= {GUARD}


def test_it_works_in_inference_mode(memory: Memory) -> None:
    with torch.inference_mode():
        memory.fill()
        block = memory.blocks[-1]
        assert memory.is_right(block, memory.read(block))
        out = allocate(2 * 24)
        memory.tier.read_rows(block, [1, 0], view_bytes(out))
    assert memory.is_right(block, memory.read(block))


class _Broken(Copied):
    """A source whose file went away."""

    def read(self, wanted: Sequence[Destination]) -> None:
        raise StorageError(f"{len(wanted)} parts are gone")

    def read_blocks(self, wanted: Sequence[Delivery]) -> None:
        raise NotImplementedError

    def read_rows(self, part: Part, rows: Sequence[int], out: memoryview) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Nothing is open."""


def test_a_block_that_could_not_be_put_is_not_counted(memory: Memory) -> None:
    memory.tier.put(memory.blocks[0], memory.source)
    before = memory.tier.nbytes
    try:
        memory.tier.put(memory.blocks[1], _Broken())
    except StorageError:
        assert memory.tier.nbytes == before
        assert memory.is_right(memory.blocks[0], memory.read(memory.blocks[0]))


def test_closing_twice_is_harmless(memory: Memory) -> None:
    memory.fill()
    memory.tier.close()
    memory.tier.close()


def test_the_host_keeps_every_block_at_a_multiple_of_64() -> None:
    blocks = many_parts(6)
    tier, source = HostTier("cpu"), memory_source(contents(blocks))
    for block in blocks:
        tier.put(block, source)
        assert tier.memory(block).data_ptr() % 64 == 0
        assert tier.memory(block).numel() == block.nbytes


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 5 << 20])
def test_pages_begin_with_a_page_and_are_ordinary_memory(nbytes: int) -> None:
    with torch.inference_mode():
        memory = allocate_pages(nbytes)
    assert not memory.is_inference()
    assert memory.numel() == memory.untyped_storage().nbytes() == nbytes
    assert memory.data_ptr() % 4096 == 0
    memory.fill_(7)
    assert bytes(view_bytes(memory)) == bytes([7]) * nbytes


def test_the_host_counts_what_it_adopts_and_keeps_no_copy_of_it() -> None:
    (block,) = many_parts(1)
    tier = HostTier("cpu")
    tier.adopt(block)
    assert tier.nbytes == block.nbytes
    assert not tier._blocks


def test_the_null_tier_passes_the_time_that_its_link_would_take() -> None:
    waited: list[float] = []
    tier = NullTier("disk", bytes_per_second=1e6, wait=waited.append)
    blocks = many_parts(3)
    for block in blocks:
        tier.read([(block, memoryview(b""))])
    assert waited == [block.nbytes / 1e6 for block in blocks]
    assert tier.reads == [block.name for block in blocks]
