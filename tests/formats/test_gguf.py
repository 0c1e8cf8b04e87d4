"""The GGUF reader: agrees with ``gguf.GGUFReader``, and distrusts every count and length."""

from __future__ import annotations

import os
import struct
import tracemalloc
from datetime import timedelta
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distorch.errors import FormatError
from distorch.formats import open_checkpoint
from distorch.formats.gguf import read_header
from tests.formats.make import (
    EXTREMES,
    HUGE_BYTES,
    array,
    extremes,
    gguf_parts,
    key,
    mutate,
    mutations,
    open_or_refuse,
    refuse,
    string,
    tensor,
    write_gguf,
)

FUZZ = settings(max_examples=2000, deadline=timedelta(seconds=5))
U32, F32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9
ONE = struct.pack("<I", 1)

KEYS = [
    key("general.architecture", STRING, *string("tiny")),
    key("general.alignment", U32, struct.pack("<I", 64)),
    key("tiny.tied", BOOL, b"\1"),
    key("tokens", ARRAY, *array(STRING, 3, *string("a"), *string("é"), *string(""))),
    key("scores", ARRAY, *array(F32, 2, struct.pack("<2f", 0.5, -1))),
    key("nested", ARRAY, *array(ARRAY, 2, *array(0, 2, b"\1\2"), *array(BOOL, 1, b"\0"))),
]
TENSORS = [
    tensor("embed", (32, 2), kind=8, offset=0),  # Q8_0: 68 bytes
    tensor("norm", (8,), kind=0, offset=128),  # F32: 32 bytes
    tensor("scalar", (), kind=24, offset=192),  # I8: 1 byte
]
PARTS = gguf_parts(KEYS, TENSORS, data=bytes(range(193)), alignment=64)
FILE = b"".join(PARTS)
HEADER_BYTES = len(FILE) - 193


def of_keys(*keys: list[bytes]) -> bytes:
    return b"".join(gguf_parts(keys))


def of_tensors(*tensors: list[bytes], data: bytes = bytes(256)) -> bytes:
    return b"".join(gguf_parts((), tensors, data=data))


def test_reads_what_the_package_wrote(tmp_path: Path) -> None:
    path = tmp_path / "all.gguf"
    stored = write_gguf(path)
    reader = gguf.GGUFReader(path)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.format == "gguf"
        assert list(checkpoint) == [theirs.name for theirs in reader.tensors] == list(stored)
        for theirs in reader.tensors:
            info = checkpoint[theirs.name]
            assert info.dtype == theirs.tensor_type.name == stored[theirs.name].dtype
            assert info.shape == tuple(theirs.shape.tolist())[::-1] == stored[theirs.name].shape
            assert (info.offset, info.nbytes) == (theirs.data_offset, theirs.n_bytes)
            assert info.path == path
            assert checkpoint.view(theirs.name) == stored[theirs.name].data
        assert checkpoint.nbytes == sum(len(tensor.data) for tensor in stored.values())
        metadata: dict[str, Any] = dict(checkpoint.metadata)
        metadata["tokenizer.ggml.scores"] = list(metadata["tokenizer.ggml.scores"])
        assert metadata == {
            name: field.contents()
            for name, field in reader.fields.items()
            if not name.startswith("GGUF.")
        }


def test_reads_nested_arrays_and_scalars(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(FILE)
    with open_checkpoint(path) as checkpoint:
        metadata: dict[str, Any] = dict(checkpoint.metadata)
        assert metadata.pop("scores").tolist() == [0.5, -1]
        numbers, flags = metadata.pop("nested")
        assert (numbers.tolist(), flags) == ([1, 2], [False])
        assert metadata == {
            "general.architecture": "tiny",
            "general.alignment": 64,
            "tiny.tied": True,
            "tokens": ["a", "é", ""],
        }
        assert [(i.offset % 64, i.shape) for i in checkpoint.values()] == [
            (0, (2, 32)),
            (0, (8,)),
            (0, ()),
        ]


@pytest.mark.parametrize("version", [2, 3])
def test_versions_2_and_3_are_read(tmp_path: Path, version: int) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"".join(gguf_parts(version=struct.pack("<I", version))))
    with open_checkpoint(path) as checkpoint:
        assert len(checkpoint) == len(checkpoint.metadata) == 0


@pytest.mark.parametrize(
    ("version", "problem"),
    [
        (struct.pack("<I", 1), "version 1"),
        (struct.pack("<I", 4), "version 4"),
        (struct.pack("<I", 0), "version 0"),
        (struct.pack(">I", 3), "big-endian"),
    ],
)
def test_other_versions_are_refused(tmp_path: Path, version: bytes, problem: str) -> None:
    file = b"".join(gguf_parts(version=version))
    assert problem in refuse(tmp_path / "m.gguf", file)


def test_other_magic_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGML" + FILE[4:])
    with pytest.raises(FormatError, match="not a GGUF file"):
        read_header(path)


DEEP = array(ARRAY, 1, *array(ARRAY, 1, *array(ARRAY, 1, *array(ARRAY, 1, *array(0, 0)))))


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ([key("a", U32, ONE), key("a", U32, ONE)], "'a' twice"),
        ([key("a" * 65536, U32, ONE)], "65536 bytes"),
        ([key(b"\xff", U32, ONE)], "UTF-8"),
        ([key("a", 13)], "unknown type 13"),
        ([key("a", ARRAY, *array(13, 1))], "unknown type 13"),
        ([key("a", BOOL, b"\2")], "neither 0 nor 1"),
        ([key("a", ARRAY, *array(BOOL, 2, b"\1\2"))], "neither 0 nor 1"),
        ([key("a", ARRAY, *array(ARRAY, 1, *DEEP))], "nested"),
        ([key("general.alignment", U32, struct.pack("<I", 0))], "power of two"),
        ([key("general.alignment", U32, struct.pack("<I", 48))], "power of two"),
        ([key("general.alignment", U32, struct.pack("<I", 2**21))], "power of two"),
        ([key("general.alignment", F32, struct.pack("<f", 32))], "not an integer"),
        ([key("general.alignment", ARRAY, *array(U32, 1, ONE))], "not an integer"),
        ([key("general.alignment", 5, struct.pack("<i", -32))], "power of two"),
        ([key("split.count", 2, b"\3\0")], "one of 3 parts"),
    ],
)
def test_bad_metadata_is_refused(tmp_path: Path, keys: list[list[bytes]], problem: str) -> None:
    assert problem in refuse(tmp_path / "m.gguf", of_keys(*keys))


@pytest.mark.parametrize("count", [2, 2**31, 2**61, 2**63, 2**64 - 1])
@pytest.mark.parametrize("kind", [0, 12, BOOL, STRING, ARRAY])
def test_a_count_beyond_the_file_is_refused(tmp_path: Path, kind: int, count: int) -> None:
    file = b"".join(gguf_parts([key("a", ARRAY, *array(kind, count))], padding=0))
    assert "cut short" in refuse(tmp_path / "m.gguf", file)


@pytest.mark.parametrize("length", [10, 2**31, 2**63, 2**64 - 1])
def test_a_string_beyond_the_file_is_refused(tmp_path: Path, length: int) -> None:
    size = struct.pack("<Q", length)
    for value in ([size], array(STRING, 1, size), array(STRING, 2, size, *string("b"))):
        kind = STRING if len(value) == 1 else ARRAY
        file = b"".join(gguf_parts([key("a", kind, *value)], padding=0))
        assert "cut short" in refuse(tmp_path / "m.gguf", file)


def test_a_string_that_is_not_text_is_refused_at_access(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    text = string(b"\xff")
    path.write_bytes(of_keys(key("a", STRING, *text), key("b", ARRAY, *array(STRING, 1, *text))))
    with open_checkpoint(path) as checkpoint:
        for name in "ab":
            with pytest.raises(FormatError, match=f"m.gguf: metadata '{name}': .*UTF-8"):
                checkpoint.metadata[name]


@pytest.mark.parametrize("place", [8, 16])
@pytest.mark.parametrize("count", [65_537, 2**31, 2**63, 2**64 - 1])
def test_too_many_entries_are_refused(tmp_path: Path, place: int, count: int) -> None:
    file = FILE[:place] + struct.pack("<Q", count) + FILE[place + 8 :]
    assert "65536 are allowed" in refuse(tmp_path / "m.gguf", file)


def test_more_keys_than_bytes_are_refused_at_once(tmp_path: Path) -> None:
    file = b"GGUF" + struct.pack("<IQQ", 3, 0, 60_000)
    assert "a header of 780024 bytes" in refuse(tmp_path / "m.gguf", file)


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ([tensor("a"), tensor("a", offset=32)], "two tensors 'a'"),
        ([tensor("a" * 65536)], "65536 bytes"),
        ([tensor(b"\xff")], "UTF-8"),
        ([tensor(dims=(1,) * 9)], "9 dimensions"),
        ([tensor(dims=(2**32, 2**32))], "impossible"),
        ([tensor(dims=(2**63, 0))], "impossible"),
        ([tensor(dims=(100,), kind=12)], "whole number of Q4_K blocks"),
        ([tensor(dims=(), kind=12)], "whole number of Q4_K blocks"),
        ([tensor(kind=4)], "GGML type 4 is unknown"),
        ([tensor(kind=99)], "GGML type 99 is unknown"),
        ([tensor(offset=8)], "not 32-byte aligned"),
        ([tensor(offset=2**64 - 32)], "cut short"),
        ([tensor(dims=(1000,))], "cut short"),
        ([tensor("a", dims=(16,)), tensor("b", offset=32)], "'a' and 'b' overlap"),
        ([tensor("b", offset=32), tensor("a", dims=(9,))], "'a' and 'b' overlap"),
    ],
)
def test_bad_tensors_are_refused(tmp_path: Path, tensors: list[list[bytes]], problem: str) -> None:
    assert problem in refuse(tmp_path / "m.gguf", of_tensors(*tensors))


@pytest.mark.parametrize("size", range(0, HEADER_BYTES, 7))
def test_a_truncated_header_is_refused(tmp_path: Path, size: int) -> None:
    problem = refuse(tmp_path / "m.gguf", FILE[:size])
    assert "cut short" in problem or size < 4


def test_truncated_data_are_refused(tmp_path: Path) -> None:
    assert "1 bytes are missing" in refuse(tmp_path / "m.gguf", FILE[:-1])


@pytest.mark.parametrize("count", [2**16, 2**20, 2**22, 2**24, *EXTREMES])
@pytest.mark.parametrize("kind", [0, 12, STRING, ARRAY])
def test_a_wrong_count_costs_no_memory(tmp_path: Path, kind: int, count: int) -> None:
    """The file is 2 GiB (of holes, which read as empty strings and no end of them)."""
    path = tmp_path / "m.gguf"
    path.write_bytes(b"".join(gguf_parts([key("a", ARRAY, *array(kind, count))], TENSORS)))
    open_or_refuse(path, huge=True)


@pytest.mark.parametrize("kind", [0, 12, BOOL, STRING, ARRAY])
def test_a_count_beyond_any_header_is_refused_before_reading(tmp_path: Path, kind: int) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"".join(gguf_parts([key("a", ARRAY, *array(kind, 2**26))])))
    os.truncate(path, HUGE_BYTES)
    tracemalloc.start()
    with pytest.raises(FormatError, match="larger than"):
        read_header(path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 4 * 2**20


@pytest.mark.parametrize("value", [[struct.pack("<Q", 40 * 2**20)], array(0, 40 * 2**20)])
@pytest.mark.parametrize("name", ["a", "general.alignment", "split.count"])
def test_a_large_value_is_not_decoded(tmp_path: Path, name: str, value: list[bytes]) -> None:
    path = tmp_path / "m.gguf"
    kind = STRING if len(value) == 1 else ARRAY
    path.write_bytes(b"".join(gguf_parts([key(name, kind, *value)])))
    assert open_or_refuse(path, huge=True) is (name == "a")


def test_only_the_header_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(FILE + bytes(32 * 2**20))
    tracemalloc.start()
    with open_checkpoint(path) as checkpoint:
        kept_bytes, peak_bytes = tracemalloc.get_traced_memory()
        assert len(checkpoint) == 3
    tracemalloc.stop()
    assert kept_bytes < 2**18
    assert peak_bytes < 4 * 2**20


@FUZZ
@given(ops=mutations(), huge=st.booleans())
def test_mutated_bytes(
    tmp_path_factory: pytest.TempPathFactory, ops: list[tuple[Any, ...]], *, huge: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.gguf"
    path.write_bytes(mutate(FILE, ops, HEADER_BYTES))
    open_or_refuse(path, huge=huge)


NUMBERS = [i for i, part in enumerate(PARTS) if len(part) in {4, 8}]


@FUZZ
@given(
    changes=st.lists(st.tuples(st.sampled_from(NUMBERS), extremes()), min_size=1, max_size=2),
    huge=st.booleans(),
)
def test_mutated_fields(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], *, huge: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "fields.gguf"
    parts = list(PARTS)
    for i, value in changes:
        parts[i] = (value % 2 ** (8 * len(parts[i]))).to_bytes(len(parts[i]), "little")
    path.write_bytes(b"".join(parts))
    open_or_refuse(path, huge=huge)
