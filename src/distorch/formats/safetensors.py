"""The safetensors format: a u64 length, a JSON header, and the tensors without a gap.

Written from "Format" in the README of huggingface/safetensors. A header is the work of a
stranger: every number in it is checked before it is used, and the reason stands beside the check.
Errors here name no file; ``open_checkpoint`` puts the file's name in front.
"""

from __future__ import annotations

import codecs
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, Final, TypeGuard

from distorch.errors import FormatError, StorageError
from distorch.formats.dtypes import SAFETENSORS_DTYPES, TensorInfo

__all__ = ["read_header", "read_index"]

_MAX_HEADER_BYTES: Final = 100_000_000  # the format's own limit; 90,000 tensors need 11 MB
_LENGTH_BYTES: Final = 8
_PIECE_BYTES: Final = 2**20


def read_header(path: Path) -> tuple[Mapping[str, object], dict[str, TensorInfo]]:
    """Return the ``__metadata__`` and the tensors of one safetensors file, reading its header only.

    Raises FormatError when the header contradicts itself or the file, OSError when reading fails.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     path = Path(directory, "empty.safetensors")
    ...     _ = path.write_bytes(bytes([2, 0, 0, 0, 0, 0, 0, 0]) + b"{}")
    ...     read_header(path)
    ({}, {})
    """
    with path.open("rb") as file:
        file_bytes = os.fstat(file.fileno()).st_size
        header_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if _LENGTH_BYTES + header_bytes > file_bytes:
            raise FormatError(
                f"a header of {header_bytes} bytes in a file of {file_bytes}: "
                "cut short, or not safetensors"
            )
        header = _parse(_read_text(file, header_bytes))
    metadata = header.pop("__metadata__", {})
    if not _is_table_of_strings(metadata):
        raise FormatError("'__metadata__' is not a table of strings")
    data_start = _LENGTH_BYTES + header_bytes
    tensors = {name: _check_tensor(name, entry, data_start, path) for name, entry in header.items()}
    _check_layout(tensors.values(), data_start, file_bytes)
    return metadata, tensors


def read_index(path: Path) -> tuple[Mapping[str, object], dict[str, TensorInfo]]:
    """Return the metadata and the tensors of a sharded checkpoint, from its ``*.index.json``.

    The index decides: a tensor that a shard holds but the index does not list is left out.
    Raises FormatError when index and shards disagree, StorageError when a shard is missing.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     path = Path(directory, "model.safetensors.index.json")
    ...     _ = path.write_text('{"metadata": {"total_size": 0}, "weight_map": {}}')
    ...     read_index(path)
    ({'total_size': 0}, {})
    """
    with path.open("rb") as file:
        index = _parse(_read_text(file, os.fstat(file.fileno()).st_size))
    metadata, shard_of = index.get("metadata", {}), index.get("weight_map")
    if not isinstance(metadata, dict) or not _is_table_of_strings(shard_of):
        raise FormatError(
            "JSON without a 'weight_map' of strings: not the index of a sharded checkpoint",
            hint="name the .safetensors.index.json, or the directory that holds it",
        )
    for shard in shard_of.values():
        _check_shard_name(shard)
    shards = {shard: _read_shard(path.with_name(shard)) for shard in set(shard_of.values())}
    for name, shard in shard_of.items():
        if name not in shards[shard]:
            raise FormatError(f"tensor {name!r:.100} is not in {shard!r}, where the index has it")
    return metadata, {name: shards[shard][name] for name, shard in shard_of.items()}


def _read_text(file: BinaryIO, size_bytes: int) -> str:
    """Read JSON text, in pieces."""
    if size_bytes > _MAX_HEADER_BYTES:
        raise FormatError(f"a header of {size_bytes} bytes, where {_MAX_HEADER_BYTES} are allowed")
    decode = codecs.getincrementaldecoder("utf-8")().decode
    pieces = []
    while size_bytes:
        piece = file.read(min(size_bytes, _PIECE_BYTES))
        size_bytes -= len(piece)
        # A wrong length reaches into the weights, and weights are not text: the first piece of
        # them shows it, before megabytes have been read.
        if not piece or b"\0" in piece:
            raise FormatError("the header is not text: its length is wrong")
        try:
            pieces.append(decode(piece, final=not size_bytes))
        except UnicodeDecodeError as error:
            raise FormatError(f"the header is not UTF-8 text: {error.reason}") from error
    return "".join(pieces)


def _parse(text: str) -> dict[str, object]:
    """Parse a JSON object in which every key is unique and every string is text."""
    try:
        header = json.loads(text, object_pairs_hook=_unique)
        if "\\u" in text:
            # JSON may escape half a surrogate pair: a str that can be neither printed nor written.
            json.dumps(header, ensure_ascii=False).encode()
    except FormatError:
        raise
    except RecursionError as error:
        raise FormatError("the header's JSON is nested too deep") from error
    except ValueError as error:  # JSONDecodeError, half surrogates, integers of 5,000 digits
        raise FormatError(f"the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise FormatError("the header's JSON is not an object")
    return header


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Build a JSON object; two readers may not see two different tensors under one name."""
    table = dict(pairs)
    if len(table) != len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise FormatError(f"the header has {twice!r:.100} twice")
    return table


def _is_table_of_strings(table: object) -> TypeGuard[dict[str, str]]:
    return isinstance(table, dict) and all(isinstance(value, str) for value in table.values())


def _check_tensor(name: str, entry: object, data_start: int, path: Path) -> TensorInfo:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]} if all(
            map(_is_size, (begin, end, *shape))
        ):
            pass
        case _:
            raise FormatError(
                f"tensor {name!r:.100} is not described by a dtype, a shape and two data_offsets "
                "of whole numbers >= 0"
            )
    if dtype not in SAFETENSORS_DTYPES:
        raise FormatError(
            f"tensor {name!r:.100} has the dtype {dtype!r:.100}, which DisTorch does not know",
            hint=f"convert it to one of {', '.join(SAFETENSORS_DTYPES)}",
        )
    try:
        nbytes = SAFETENSORS_DTYPES[dtype].nbytes(shape)
    except FormatError as error:
        raise FormatError(f"tensor {name!r:.100}: {error.problem}") from error
    # The one number is for reading, the other for computing: where they differ, a consumer of
    # one overruns a buffer sized by the other.
    if end - begin != nbytes:
        raise FormatError(
            f"tensor {name!r:.100} has {end - begin} bytes, but {dtype} {shape} takes {nbytes}"
        )
    return TensorInfo(name, dtype, tuple(shape), data_start + begin, nbytes, path)


def _is_size(value: object) -> bool:
    # By `type`, since JSON's true is an int to isinstance; up to an int64, since torch counts so.
    return type(value) is int and 0 <= value < 2**63


def _check_layout(tensors: Iterable[TensorInfo], data_start: int, file_bytes: int) -> None:
    """Check that the tensors fill the data area, as the format demands: no overlap, no hole."""
    position = data_start
    for info in sorted(tensors, key=lambda info: (info.offset, info.nbytes)):
        if info.offset < position:
            raise FormatError(f"tensor {info.name!r:.100} overlaps another one")
        if info.offset > position:  # a hole can hide a second file in this one
            raise FormatError(f"a hole in the file, before tensor {info.name!r:.100}")
        position += info.nbytes
    if position > file_bytes:
        raise FormatError(f"the file is cut short: {position - file_bytes} bytes are missing")
    if position < file_bytes:
        raise FormatError(f"the last {file_bytes - position} bytes belong to no tensor")


def _check_shard_name(shard: str) -> None:
    # A shard is a file beside its index: a path in its name would make a download read elsewhere.
    if shard in {"", ".", ".."} or set(shard) & set("/\\:\0"):
        raise FormatError(f"the index names the shard {shard!r:.100}, which is not a file name")


def _read_shard(path: Path) -> dict[str, TensorInfo]:
    if not path.is_file():
        raise StorageError(
            f"the shard {path.name!r} is missing",
            hint="download every file that the index names into its directory",
        )
    try:
        return read_header(path)[1]
    except FormatError as error:
        raise FormatError(f"shard {path.name!r}: {error.problem}", hint=error.hint) from error
