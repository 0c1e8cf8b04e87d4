"""Sources: the bytes of a checkpoint's files, or of memory, part by part."""

from __future__ import annotations

import errno
import os
import random
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from distorch.errors import StorageError
from distorch.formats import TensorInfo, open_checkpoint
from distorch.plan.blocks import SECTOR_BYTES, Block, Node, Part, TensorSpec, cut
from distorch.tiers.file_reader import FileReader
from distorch.tiers.memory import allocate_pages, view_bytes
from distorch.tiers.sources import FileSource, MemorySource
from tests.formats.make import Stored, write_safetensors, write_sharded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from distorch.tiers import Source

    Infos = Mapping[str, TensorInfo]

FDS = Path("/proc/self/fd")
needs_fds = pytest.mark.skipif(not FDS.exists(), reason="no /proc/self/fd to count handles in")
ROWS, ROW_BYTES = 60, 12
TABLE = random.Random(0).randbytes(ROWS * ROW_BYTES)  # noqa: S311  weights, not secrets


@pytest.fixture(scope="module", params=["file", "memory"])
def table(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Source]:
    """Yield a source of one matrix, which begins at an odd place of its file."""
    if request.param == "memory":
        yield MemorySource({"w": memoryview(TABLE)})
        return
    path = tmp_path_factory.mktemp("table") / "weights"
    path.write_bytes(b"header!" + TABLE)
    source = FileSource({"w": TensorInfo("w", "U8", (ROWS, ROW_BYTES), 7, len(TABLE), path)})
    yield source
    source.close()


def _part(first_row: int, num_rows: int) -> Part:
    nbytes = num_rows * ROW_BYTES
    return Part(
        tensor="w", dtype="U8", shape=(num_rows, ROW_BYTES), nbytes=nbytes, first_row=first_row
    )


def _tensors(stored: Mapping[str, Stored]) -> list[Part]:
    return [
        Part(tensor=name, dtype=kept.dtype, shape=kept.shape, nbytes=len(kept.data))
        for name, kept in stored.items()
        if kept.data
    ]


@given(st.integers(0, ROWS - 1), st.data())
def test_a_run_of_rows_is_that_slice_of_the_tensor(
    table: Source, first: int, data: st.DataObject
) -> None:
    part = _part(first, data.draw(st.integers(1, ROWS - first)))
    out = bytearray(part.nbytes)
    table.read([(part, memoryview(out))])
    assert out == TABLE[first * ROW_BYTES :][: part.nbytes]


@given(st.integers(0, ROWS - 1), st.data())
def test_single_rows_count_from_the_first_of_their_part(
    table: Source, first: int, data: st.DataObject
) -> None:
    part = _part(first, data.draw(st.integers(1, ROWS - first)))
    rows = data.draw(st.lists(st.integers(0, part.shape[0] - 1), max_size=9))
    out = bytearray(len(rows) * ROW_BYTES)
    table.read_rows(part, rows, memoryview(out))
    assert out == b"".join(TABLE[(first + row) * ROW_BYTES :][:ROW_BYTES] for row in rows)


def test_the_runs_of_a_cut_weight_make_up_the_whole(tmp_path: Path) -> None:
    rows = 50_000
    data = random.Random(1).randbytes(rows * 3)  # noqa: S311  weights, not secrets
    path = tmp_path / "weights"
    path.write_bytes(data)
    spec = TensorSpec(name="w", dtype="U8", shape=(rows, 3), nbytes=len(data))
    blocks = cut(Node(name="head", tensors=(spec,)))
    assert len(blocks) > 1
    source = FileSource({"w": TensorInfo("w", "U8", (rows, 3), 0, len(data), path)})
    whole = b""
    for block in blocks:
        out = bytearray(block.parts[0].nbytes)
        source.read([(block.parts[0], memoryview(out))])
        whole += out
    source.close()
    assert whole == data


@pytest.mark.parametrize("write", [write_safetensors, write_sharded])
def test_the_tensors_of_a_real_checkpoint_come_as_they_were_written(
    tmp_path: Path, write: Callable[[Path], dict[str, Stored]]
) -> None:
    path = tmp_path / "model.safetensors" if write is write_safetensors else tmp_path
    stored = write(path)
    parts = _tensors(stored)
    with open_checkpoint(path) as checkpoint:
        source = FileSource(checkpoint)
        outs = [bytearray(part.nbytes) for part in parts]
        wanted = [(part, memoryview(out)) for part, out in zip(parts, outs, strict=True)]
        random.Random(0).shuffle(wanted)  # noqa: S311  an order
        source.read(wanted)
        source.close()
    assert outs == [stored[part.tensor].data for part in parts]


def test_what_is_amended_is_changed_once_and_nothing_else_is(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"\x01\x02\x03\x04\x05\x06")
    infos = {
        name: TensorInfo(name, "U8", (2,), offset, 2, path) for offset, name in ((0, "a"), (2, "b"))
    }

    def add_one(memory: memoryview) -> None:
        memory[:] = bytes(value + 1 for value in memory)

    source = FileSource(infos, {"b": add_one})
    outs = {name: bytearray(2) for name in infos}
    for _ in range(2):
        source.read(
            [
                (Part(tensor=name, dtype="U8", shape=(2,), nbytes=2), memoryview(out))
                for name, out in outs.items()
            ]
        )
    source.close()
    assert outs == {"a": b"\x01\x02", "b": b"\x04\x05"}


def test_rows_of_an_amended_tensor_are_amended_too_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(8))

    def fill(memory: memoryview) -> None:
        memory[:] = b"\xff" * len(memory)

    source = FileSource({"a": TensorInfo("a", "U8", (4, 2), 0, 8, path)}, {"a": fill})
    part, out = Part(tensor="a", dtype="U8", shape=(4, 2), nbytes=8), bytearray(2)
    try:
        source.read_rows(part, [1], memoryview(out))
    except AssertionError:
        return
    finally:
        source.close()
    assert out == b"\xff\xff"


SLOT_WAYS = ["direct", "direct reads invalid", "through the cache", "no sectors", "read and drop"]
PACKED = ("Q8_0", (61, 1024), 61 * 32 * 34)  # more than the 64 KiB that are worth a layout
DENSE = ("F32", (61, 277), 61 * 277 * 4)
NOISE = random.Random(2).randbytes(500_123)  # noqa: S311  weights, not secrets
ZEROS = bytes(len(NOISE))


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("noise") / "weights"
    path.write_bytes(NOISE)
    return path


def _laid(path: Path, *parts: tuple[tuple[str, tuple[int, int], int], int]) -> tuple[Block, Infos]:
    """Return a block of parts of these kinds at these offsets of a file."""
    infos = {
        f"w{place}": TensorInfo(f"w{place}", dtype, shape, at, nbytes, path)
        for place, ((dtype, shape, nbytes), at) in enumerate(parts)
    }
    made = [
        Part(tensor=info.name, dtype=info.dtype, shape=info.shape, nbytes=info.nbytes)
        for info in infos.values()
    ]
    return Block(name="layer", parts=tuple(made), module="layer"), infos


@contextmanager
def _source(path: Path, infos: Infos, way: str) -> Iterator[FileSource]:
    """A source that reads this way and no other."""
    with pytest.MonkeyPatch.context() as patch:
        preadv = os.preadv

        def refuse(fd: int, buffers: Any, offset: int) -> int:
            if fd == reader._direct_fd:
                raise OSError(errno.EINVAL, "refused")
            return preadv(fd, buffers, offset)

        source = FileSource(infos)
        reader = source._readers[path]
        patch.setattr(reader.cache, "has_most", lambda *_: way == "through the cache")
        if way == "direct":
            if reader._direct_fd < 0:
                pytest.skip("this file system has no O_DIRECT")
        elif way == "direct reads invalid":
            patch.setattr(os, "preadv", refuse)
        elif way == "read and drop":
            reader._is_direct = False
        yield source
        source.close()


def _slot(block: Block, way: str) -> memoryview:
    """A slot of a ring; or one of memory that no direct read can write to."""
    memory = view_bytes(allocate_pages(2 * block.slot_bytes))
    start = 64 if way == "no sectors" else 0
    return memory[start : start + block.slot_bytes]


def _in_slot(source: FileSource, block: Block, slot: memoryview) -> list[bytes]:
    return [
        bytes(slot[at : at + part.nbytes])
        for part, at in zip(block.parts, source.offsets(block), strict=True)
    ]


@pytest.mark.parametrize("way", SLOT_WAYS)
@given(st.integers(0, 3 * SECTOR_BYTES), st.sampled_from([0, 1, 30, 64, 4096, 5000]), st.booleans())
@example(0, 0, False)  # noqa: FBT003
@example(1, 0, True)  # noqa: FBT003
@example(SECTOR_BYTES - 1, 0, False)  # noqa: FBT003
def test_packed_parts_come_right_at_every_offset_from_a_sector(
    noise: Path,
    way: str,
    begin: int,
    gap: int,
    swapped: bool,  # noqa: FBT001
) -> None:
    places = [begin, begin + PACKED[2] + gap]
    block, infos = _laid(noise, *((PACKED, at) for at in places[:: -1 if swapped else 1]))
    with _source(noise, infos, way) as source:
        slot = _slot(block, way)
        source.read_blocks([(block, slot)])
        expected = [NOISE[info.offset :][: info.nbytes] for info in infos.values()]
        assert _in_slot(source, block, slot) == expected
        assert all(0 <= at <= block.slot_bytes for at in source.offsets(block))


@given(st.integers(0, 3 * SECTOR_BYTES))
def test_one_run_of_a_file_is_read_straight_into_its_slot(noise: Path, begin: int) -> None:
    block, infos = _laid(noise, (PACKED, begin), (PACKED, begin + PACKED[2] + 30))
    with _source(noise, infos, "direct") as source, pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileReader, "_read_and_copy", None)
        slot = _slot(block, "direct")
        source.read_blocks([(block, slot)])
        assert source.offsets(block)[0] == begin % SECTOR_BYTES
        assert _in_slot(source, block, slot)[0] == NOISE[begin:][: PACKED[2]]


@pytest.mark.parametrize("way", SLOT_WAYS)
@pytest.mark.parametrize("spare", [0, 1, 4095, 4096])
def test_a_run_that_ends_with_its_file_comes_to_its_last_byte(
    noise: Path, way: str, spare: int
) -> None:
    begin = len(NOISE) - spare - PACKED[2]
    block, infos = _laid(noise, (PACKED, begin))
    with _source(noise, infos, way) as source:
        slot = _slot(block, way)
        source.read_blocks([(block, slot)])
        assert _in_slot(source, block, slot) == [NOISE[begin:][: PACKED[2]]]


@pytest.mark.parametrize("way", SLOT_WAYS)
@given(st.integers(0, 3 * SECTOR_BYTES), st.integers(0, 130))
@example(64, 128 - DENSE[2] % 64)
@example(0, -PACKED[2] % 64)
def test_dense_parts_are_aligned_in_memory(noise: Path, way: str, begin: int, gap: int) -> None:
    for kinds in ((DENSE, DENSE), (PACKED, DENSE), (DENSE, PACKED)):
        second = begin + kinds[0][2] + gap
        block, infos = _laid(noise, (kinds[0], begin), (kinds[1], second))
        with _source(noise, infos, way) as source:
            slot = _slot(block, way)
            source.read_blocks([(block, slot)])
            for kind, at in zip(kinds, source.offsets(block), strict=True):
                assert kind is PACKED or at % 64 == 0
            expected = [NOISE[info.offset :][: info.nbytes] for info in infos.values()]
            assert _in_slot(source, block, slot) == expected


def test_amended_parts_and_parts_of_several_files_lie_as_the_block_says(
    noise: Path, tmp_path: Path
) -> None:
    other = tmp_path / "weights"
    other.write_bytes(NOISE)
    block, infos = _laid(noise, (PACKED, 100), (PACKED, 100 + PACKED[2]))

    def clear(memory: memoryview) -> None:
        memory[:] = ZEROS[: len(memory)]

    expected = [NOISE[info.offset :][: info.nbytes] for info in infos.values()]
    apart = {**infos, "w1": replace(infos["w1"], path=other)}
    for source, second in (
        (FileSource(infos, {"w1": clear}), ZEROS[: PACKED[2]]),
        (FileSource(apart), expected[1]),
    ):
        slot = _slot(block, "direct")
        source.read_blocks([(block, slot)])
        assert tuple(source.offsets(block)) == block.offsets
        assert _in_slot(source, block, slot) == [expected[0], second]
        source.close()


def test_a_run_of_rows_lies_where_the_file_has_it(noise: Path) -> None:
    row_bytes = PACKED[2] // 61
    infos = {"w": TensorInfo("w", "Q8_0", (400, 1024), 77, 400 * row_bytes, noise)}
    part = Part(tensor="w", dtype="Q8_0", shape=(61, 1024), nbytes=PACKED[2], first_row=200)
    block = Block(name="w[200:261]", parts=(part,), module=None)
    with _source(noise, infos, "direct") as source:
        slot = _slot(block, "direct")
        source.read_blocks([(block, slot)])
        begin = 77 + 200 * row_bytes
        assert list(source.offsets(block)) == [begin % SECTOR_BYTES]
        assert _in_slot(source, block, slot) == [NOISE[begin:][: PACKED[2]]]


@needs_fds
def test_a_missing_shard_is_a_storage_error_and_leaves_no_handle(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.write_bytes(b"abcd")
    infos = {
        "a": TensorInfo("a", "U8", (2,), 0, 2, there),
        "b": TensorInfo("b", "U8", (2,), 0, 2, tmp_path / "missing"),
    }
    before = len(list(FDS.iterdir()))
    with pytest.raises(StorageError, match="missing"):
        FileSource(infos)
    assert len(list(FDS.iterdir())) == before


@needs_fds
def test_a_closed_source_holds_no_handle_and_says_so(tmp_path: Path) -> None:
    before = len(list(FDS.iterdir()))
    path = tmp_path / "weights"
    path.write_bytes(b"abcd")
    source = FileSource({"w": TensorInfo("w", "U8", (4,), 0, 4, path)})
    source.close()
    source.close()
    assert len(list(FDS.iterdir())) == before
    part = Part(tensor="w", dtype="U8", shape=(4,), nbytes=4)
    with pytest.raises(StorageError):
        source.read([(part, memoryview(bytearray(4)))])
