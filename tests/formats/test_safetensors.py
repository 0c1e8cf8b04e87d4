"""The safetensors reader: agrees with the safetensors package, and distrusts every number."""

from __future__ import annotations

import copy
import json
import os
import struct
import tracemalloc
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distorch.errors import FormatError, StorageError
from distorch.formats import SAFETENSORS_DTYPES, open_checkpoint
from distorch.formats.safetensors import read_header
from tests.formats.make import (
    EXTREMES,
    HUGE_BYTES,
    mutate,
    mutations,
    open_or_refuse,
    read_safetensors,
    refuse,
    safetensors_file,
    write_safetensors,
    write_sharded,
)

FUZZ = settings(max_examples=2000, deadline=timedelta(seconds=5))
HEADER: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "U8", "shape": [], "data_offsets": [32, 33]},
}
DATA = bytes(range(33))


def spoil(*keys: str | int, value: object) -> dict[str, Any]:
    """Return HEADER with one value replaced."""
    header = copy.deepcopy(HEADER)
    place: Any = header
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    return header


def test_reads_what_the_package_wrote(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    stored = write_safetensors(path)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.format == "safetensors"
        assert checkpoint.metadata == {"format": "pt", "note": "tiny"}
        assert set(checkpoint) == set(stored)
        for name, (dtype, shape, data) in stored.items():
            info = checkpoint[name]
            assert (info.name, info.dtype, info.shape, info.path) == (name, dtype, shape, path)
            assert checkpoint.view(name) == data
        assert checkpoint.nbytes == sum(len(tensor.data) for tensor in stored.values())


def test_reads_every_dtype_as_the_package_does(tmp_path: Path) -> None:
    header, end = {}, 0
    for dtype in SAFETENSORS_DTYPES.values():
        begin, end = end, end + dtype.nbytes((2, 4))
        header[dtype.name] = {"dtype": dtype.name, "shape": [2, 4], "data_offsets": [begin, end]}
    path = tmp_path / "all"
    path.write_bytes(safetensors_file(header, os.urandom(end)))
    with open_checkpoint(path) as checkpoint:
        for name, (theirs, shape, data) in read_safetensors(path.read_bytes()).items():
            assert checkpoint[name].dtype == theirs == name
            assert checkpoint[name].shape == shape
            assert checkpoint.view(name) == data


def test_reads_shards_by_their_index(tmp_path: Path) -> None:
    stored = write_sharded(tmp_path)
    with open_checkpoint(tmp_path / "model.safetensors.index.json") as checkpoint:
        assert checkpoint.metadata == {"total_size": 288}
        assert list(checkpoint) == list(stored)
        assert len({info.path for info in checkpoint.values()}) == 2
        assert all(checkpoint.view(name) == stored[name].data for name in stored)


@pytest.mark.parametrize(
    ("keys", "value", "problem"),
    [
        (("a", "dtype"), "F31", "dtype 'F31'"),
        (("a", "dtype"), "Q4_0", "dtype 'Q4_0'"),
        (("a", "dtype"), 3, "whole numbers"),
        (("a", "shape"), "23", "whole numbers"),
        (("a", "shape"), [2, -3], "whole numbers"),
        (("a", "shape"), [True, 6], "whole numbers"),
        (("a", "shape"), [2.0, 3], "whole numbers"),
        (("a", "shape"), [2**63], "whole numbers"),
        (("a", "shape"), [2**62, 4, 0], "impossible"),
        (("a", "shape"), [1] * 65, "dimensions"),
        (("a", "shape"), [2, 4], "takes 32"),
        (("a", "data_offsets"), [0], "whole numbers"),
        (("a", "data_offsets"), [0, 24, 24], "whole numbers"),
        (("a", "data_offsets"), [-1, 23], "whole numbers"),
        (("a", "data_offsets"), [24, 0], "takes 24"),
        (("a", "data_offsets"), [2**63 - 25, 2**63 - 1], "hole"),
        (("a", "data_offsets"), [1, 25], "hole"),
        (("b", "data_offsets"), [20, 28], "overlaps"),
        (("c", "data_offsets"), [33, 34], "hole"),
        (("b", "data_offsets"), [16, 32], "takes 8"),
        (("a",), [1, 2], "whole numbers"),
        (("a",), {"dtype": "F32"}, "whole numbers"),
        (("__metadata__",), {"a": 1}, "table of strings"),
        (("__metadata__",), ["a"], "table of strings"),
    ],
)
def test_contradictions_are_refused(
    tmp_path: Path, keys: tuple[str, ...], value: object, problem: str
) -> None:
    assert problem in refuse(tmp_path / "m", safetensors_file(spoil(*keys, value=value), DATA))


def test_the_header_to_spoil_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(safetensors_file(HEADER, DATA))
    with open_checkpoint(path) as checkpoint:
        assert [checkpoint.view(name).nbytes for name in checkpoint] == [24, 8, 1]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b'{"a": {}, "a": {}}', "'a' twice"),
        (b'{"a": {"dtype": "U8", "dtype": "U8"}}', "'dtype' twice"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep"),
        (b'{"a": ', "not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"\\ud800": 1}', "not JSON"),
        (b'{"\xff": 1}', "not UTF-8"),
        (b'{"\xc3', "not UTF-8"),
        (b'{"a": "\0"}', "not text"),
    ],
)
def test_bad_json_is_refused(tmp_path: Path, text: bytes, problem: str) -> None:
    assert problem in refuse(tmp_path / "m", safetensors_file(text, DATA))


def test_a_header_that_is_no_object_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(safetensors_file([1, 2], b""))
    with pytest.raises(FormatError, match="not an object"):
        read_header(path)


@pytest.mark.parametrize("cut", [1, 20, 40, 100])
def test_a_truncated_file_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(safetensors_file(HEADER, DATA)[:-cut])
    with pytest.raises(FormatError, match="cut short"):
        open_checkpoint(path)


def test_bytes_after_the_last_tensor_are_refused(tmp_path: Path) -> None:
    problem = refuse(tmp_path / "m", safetensors_file(HEADER, DATA + b"PK"))
    assert "last 2 bytes" in problem


def test_a_header_beyond_the_limit_of_the_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_001) + b"{")
    os.truncate(path, HUGE_BYTES)
    with pytest.raises(FormatError, match="100000000 are allowed"):
        open_checkpoint(path)


@pytest.mark.parametrize("length", EXTREMES)
def test_a_wrong_header_length_costs_no_memory(tmp_path: Path, length: int) -> None:
    """The file is 2 GiB (of holes), so that the length alone does not exceed it."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", length) + safetensors_file(HEADER, DATA)[8:])
    os.truncate(path, HUGE_BYTES)
    tracemalloc.start()
    with pytest.raises(FormatError):
        read_header(path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 4 * 2**20


@pytest.mark.parametrize(
    "shard", ["../a", "/etc/passwd", "", ".", "..", "d/a", "d\\a", "C:a", "a\0"]
)
def test_a_shard_is_a_plain_file_name(tmp_path: Path, shard: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(FormatError, match="not a file name"):
        open_checkpoint(path)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    stored = write_sharded(tmp_path)
    index_path = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    first = index["weight_map"]["blocks.1.weight"]

    index["weight_map"]["blocks.2.weight"] = first
    index_path.write_text(json.dumps(index))
    with pytest.raises(FormatError, match=r"'blocks.2.weight' is not in 'model-00001"):
        open_checkpoint(tmp_path)

    del index["weight_map"]["blocks.2.weight"]  # the index decides: the shard's tensor is left out
    index_path.write_text(json.dumps(index))
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint) == set(stored) - {"blocks.2.weight"}

    (tmp_path / first).write_bytes((tmp_path / first).read_bytes()[:-1])
    with pytest.raises(FormatError, match=f"shard '{first}': the file is cut short"):
        open_checkpoint(tmp_path)
    (tmp_path / first).unlink()
    with pytest.raises(StorageError, match=f"'{first}' is missing"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": {}, "metadata": 1}]
)
def test_other_json_is_no_index(tmp_path: Path, index: object) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(index))
    with pytest.raises(FormatError, match="not the index"):
        open_checkpoint(path)


def assert_package_agrees(path: Path) -> None:
    """Check that what DisTorch read, the package reads too, and as the same tensors."""
    with open_checkpoint(path) as checkpoint:
        assert read_safetensors(path.read_bytes()) == {
            name: (info.dtype, info.shape, bytes(checkpoint.view(name)))
            for name, info in checkpoint.items()
        }


@FUZZ
@given(ops=mutations())
def test_mutated_bytes(
    tmp_path_factory: pytest.TempPathFactory, ops: list[tuple[Any, ...]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.safetensors"
    file = safetensors_file(HEADER, DATA)
    path.write_bytes(mutate(file, ops, header_bytes=len(file) - len(DATA)))
    if open_or_refuse(path):
        assert_package_agrees(path)


VALUES: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(
        [*EXTREMES, -1, 2**64, 10**30, 1.5, True, None, "", "F4", "I8", [], {}, [[[]]]]
    ),
    st.integers(0, 40),
    st.lists(st.integers(0, 40), max_size=3),
    st.sampled_from([*SAFETENSORS_DTYPES]),
)
PLACES = st.sampled_from(
    [("__metadata__",), ("__metadata__", "format"), ("a",), ("new",)]
    + [(name, field) for name in "abc" for field in ("dtype", "shape", "data_offsets", "more")]
    + [(name, field, i) for name in "ab" for field in ("shape", "data_offsets") for i in (0, -1)]
)


@FUZZ
@given(changes=st.lists(st.tuples(PLACES, VALUES), min_size=1, max_size=3))
def test_mutated_json(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[tuple[Any, ...], Any]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "json.safetensors"
    header = copy.deepcopy(HEADER)
    for keys, value in changes:
        place: Any = header
        try:
            for key in keys[:-1]:
                place = place[key]
            place[keys[-1]] = copy.deepcopy(value)  # a later change may go into it
        except (TypeError, LookupError):
            continue  # an earlier change took this place away
    path.write_bytes(safetensors_file(header, DATA))
    if open_or_refuse(path):
        assert_package_agrees(path)
