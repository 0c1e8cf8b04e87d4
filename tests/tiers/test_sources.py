"""Sources: the bytes of a checkpoint's files, or of memory, part by part."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distorch.errors import StorageError
from distorch.formats import TensorInfo, open_checkpoint
from distorch.plan.blocks import Node, Part, TensorSpec, cut
from distorch.tiers.sources import FileSource, MemorySource
from tests.formats.make import Stored, write_safetensors, write_sharded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from distorch.tiers import Source

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
