"""The GGUF format, versions 2 and 3: magic, counts, metadata, tensor descriptions, aligned data.

Written from docs/gguf.md in ggml-org/ggml. A header is the work of a stranger: every count and
length in it is checked against the file before it is used as a size, and the reason stands beside
the check. Errors here name no file; ``open_checkpoint`` puts the file's name in front.

All integers are little-endian, as are the machines DisTorch runs on.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Final

from distorch.errors import FormatError
from distorch.formats.dtypes import GGML_DTYPES, TensorInfo

__all__ = ["read_header"]

# The largest header known (Llama 4: 202k tokens, 440k merges) has 16 MB. The limit bounds memory
# and time when a wrong count would have the weights read as metadata.
_MAX_HEADER_BYTES: Final = 48 * 2**20
_MAX_ENTRIES: Final = 2**16  # of tensors and of keys; an entry costs 30 times its bytes in Python
_MAX_NAME_BYTES: Final = 2**16 - 1  # the format's limit for keys; diffusion tensors exceed its 64
_MAX_DIMS: Final = 8  # the format says 4, but Wan and Hunyuan files hold 5-D convolutions
_MAX_DEPTH: Final = 4  # of arrays in arrays
_PIECE_BYTES: Final = 2**20

_BOOL, _STRING, _ARRAY = 7, 8, 9  # numbers of metadata types, as of the scalars below
_SCALARS: Final = dict(zip((0, 1, 2, 3, 4, 5, 6, _BOOL, 10, 11, 12), "BbHhIif?Qqd", strict=True))
"""The number of a scalar type -> its code in the modules ``struct`` and ``array``."""
_U64: Final = struct.Struct("<Q")
_ARRAY_HEAD: Final = struct.Struct("<IQ")  # type of the items, number of them


def read_header(path: Path) -> tuple[Mapping[str, object], dict[str, TensorInfo]]:
    """Return the metadata and the tensors of a GGUF file, reading its header only.

    Metadata values are int, float, bool or str; an array is an ``array.array`` of numbers or a
    list, decoded at each access. Raises FormatError when the header contradicts itself or the
    file, OSError when reading fails.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     path = Path(directory, "empty.gguf")
    ...     _ = path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    ...     metadata, tensors = read_header(path)
    >>> dict(metadata), tensors
    ({}, {})
    """
    with path.open("rb") as file:
        header = _Header(file)
        num_tensors, num_keys = _read_counts(header)
        metadata = _Metadata(path, header.data, _scan_metadata(header, num_keys))
        alignment_bytes = _check_metadata(metadata)
        tensors = _read_tensors(header, num_tensors, path)
    del header.data[header.position :]  # the piece that was read last reaches into the weights
    data_start = -(-header.position // alignment_bytes) * alignment_bytes
    tensors = {
        name: replace(info, offset=data_start + info.offset) for name, info in tensors.items()
    }
    _check_layout(tensors, alignment_bytes, header.file_bytes)
    return metadata, tensors


class _Header:
    """The front of a file: read in pieces, as far as it is asked for, from ``position`` on."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.file_bytes = os.fstat(file.fileno()).st_size
        self.data = bytearray()
        self.position = 0

    def reach(self, end: int) -> None:
        """Have ``data`` hold the first ``end`` bytes of the file; the one check of every size."""
        if end > self.file_bytes:
            raise FormatError(f"cut short: a header of {end} bytes in a file of {self.file_bytes}")
        if end > _MAX_HEADER_BYTES:  # a wrong size that reaches into the weights
            raise FormatError(f"the header is larger than {_MAX_HEADER_BYTES} bytes")
        while len(self.data) < end:
            piece = self.file.read(_PIECE_BYTES)
            if not piece:
                raise FormatError("the file was cut short while it was read")
            self.data += piece

    def skip(self, size_bytes: int) -> int:
        """Move past ``size_bytes`` bytes that are there, and return where they start."""
        start, self.position = self.position, self.position + size_bytes
        self.reach(self.position)
        return start

    def unpack(self, layout: str) -> tuple[int, ...]:
        """Read numbers by a ``struct`` layout."""
        return struct.unpack_from(layout, self.data, self.skip(struct.calcsize(layout)))

    def name(self) -> str:
        """Read the name of a key or a tensor: u64 length, UTF-8."""
        (size_bytes,) = self.unpack("<Q")
        if size_bytes > _MAX_NAME_BYTES:
            raise FormatError(f"a name of {size_bytes} bytes, where {_MAX_NAME_BYTES} are allowed")
        return _text(self.data, self.skip(size_bytes), size_bytes)


class _Metadata(Mapping[str, object]):
    """The metadata of a header, decoded at access: most is a vocabulary that no plan needs."""

    def __init__(self, path: Path, data: bytearray, places: dict[str, tuple[int, int]]) -> None:
        self._path = path
        self._data = data
        self._places = places  # key -> type, position of the value in data

    def __getitem__(self, key: str) -> object:
        kind, position = self._places[key]
        try:
            return _decode(self._data, kind, position)[0]
        except FormatError as error:
            problem = f"{self._path}: metadata {key!r:.100}: {error.problem}"
            raise FormatError(problem, hint="convert the model again") from error

    def integer(self, key: str, default: int) -> int:
        """Return an integer that this reader needs; a hostile array is not decoded for it."""
        if key not in self:
            return default
        value = self[key] if self._places[key][0] in _SCALARS else None
        if not isinstance(value, int):
            raise FormatError(f"metadata {key!r} is not an integer")
        return value

    def __contains__(self, key: object) -> bool:
        return key in self._places  # Mapping's own would decode the value

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _read_counts(header: _Header) -> tuple[int, int]:
    """Read magic, version and the two counts."""
    if bytes(header.data[header.skip(4) : header.position]) != b"GGUF":
        raise FormatError("not a GGUF file: it does not start with 'GGUF'")
    (version,) = header.unpack("<I")
    if version not in {2, 3}:
        # A big-endian file has its version's bytes at the other end.
        found = "big-endian GGUF" if version and not version % 2**16 else f"GGUF version {version}"
        raise FormatError(
            f"{found}, where little-endian version 2 or 3 can be read",
            hint="convert the model again with a current llama.cpp",
        )
    num_tensors, num_keys = header.unpack("<QQ")
    if max(num_tensors, num_keys) > _MAX_ENTRIES:
        raise FormatError(f"{num_tensors} tensors, {num_keys} keys: {_MAX_ENTRIES} are allowed")
    return num_tensors, num_keys


def _scan_metadata(header: _Header, num_keys: int) -> dict[str, tuple[int, int]]:
    """Move past the metadata, and return the type and the position of each value."""
    header.reach(header.position + num_keys * 13)  # each has a u64 length, a u32 type, one byte
    places: dict[str, tuple[int, int]] = {}
    for _ in range(num_keys):
        key = header.name()
        if key in places:  # readers would differ in which of the two they believe
            raise FormatError(f"the metadata has {key!r:.100} twice")
        (kind,) = header.unpack("<I")
        places[key] = kind, header.position
        try:
            _scan_value(header, kind, depth=0)
        except FormatError as error:
            raise FormatError(f"metadata {key!r:.100}: {error.problem}") from error
    return places


def _scan_value(header: _Header, kind: int, depth: int) -> None:
    """Move past a value; after this, ``_decode`` can trust its sizes."""
    if kind in _SCALARS:
        _scan_scalars(header, kind, 1)
    elif kind == _STRING:
        header.skip(*header.unpack("<Q"))
    elif kind == _ARRAY:
        item_kind, count = header.unpack(_ARRAY_HEAD.format)
        if item_kind in _SCALARS:
            _scan_scalars(header, item_kind, count)
        elif item_kind == _STRING:
            _scan_strings(header, count)
        elif depth == _MAX_DEPTH:  # recursion must end before Python's does
            raise FormatError(f"arrays are nested more than {_MAX_DEPTH} deep")
        else:
            header.reach(header.position + count * _ARRAY_HEAD.size)
            for _ in range(count):
                _scan_value(header, item_kind, depth + 1)
    else:
        raise FormatError(f"a value of the unknown type {kind}")


def _scan_scalars(header: _Header, kind: int, count: int) -> None:
    start = header.skip(count * struct.calcsize(_SCALARS[kind]))
    if kind == _BOOL and max(memoryview(header.data)[start : header.position], default=0) > 1:
        raise FormatError("a bool that is neither 0 nor 1")  # invalid by the format


def _scan_strings(header: _Header, count: int) -> None:
    """Move past strings: the hot loop, with 262,144 turns for Gemma's vocabulary."""
    header.reach(header.position + count * _U64.size)  # n strings have at least their n lengths
    position, data, length_at = header.position, header.data, _U64.unpack_from
    for _ in range(count):
        if position + _U64.size > len(data):
            header.reach(position + _U64.size)
        position += _U64.size + length_at(data, position)[0]
    header.reach(position)
    header.position = position


def _decode(data: bytearray, kind: int, position: int) -> tuple[object, int]:
    """Return the value at ``position``, which ``_scan_value`` has passed, and where it ends."""
    if kind in _SCALARS:
        layout = struct.Struct("<" + _SCALARS[kind])
        return layout.unpack_from(data, position)[0], position + layout.size
    if kind == _STRING:
        (size_bytes,) = _U64.unpack_from(data, position)
        position += _U64.size
        return _text(data, position, size_bytes), position + size_bytes
    item_kind, count = _ARRAY_HEAD.unpack_from(data, position)
    position += _ARRAY_HEAD.size
    if item_kind in _SCALARS:
        end = position + count * struct.calcsize(_SCALARS[item_kind])
        if item_kind == _BOOL:
            return [byte == 1 for byte in data[position:end]], end
        return array(_SCALARS[item_kind], bytes(data[position:end])), end
    items = []
    for _ in range(count):
        item, position = _decode(data, item_kind, position)
        items.append(item)
    return items, position


def _text(data: bytearray, start: int, size_bytes: int) -> str:
    try:
        return data[start : start + size_bytes].decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"a string that is not UTF-8 at byte {start}") from error


def _check_metadata(metadata: _Metadata) -> int:
    """Return ``general.alignment``, once the metadata says that the file stands on its own."""
    num_parts = metadata.integer("split.count", default=1)
    if num_parts > 1:
        hint = "join them: llama-gguf-split --merge FIRST-PART OUTPUT.gguf"
        raise FormatError(f"one of {num_parts} parts of a model", hint=hint)
    alignment = metadata.integer("general.alignment", default=32)
    # A divisor: not 0. A rounding: beyond reason, it would move the data section out of the file.
    if not 0 < alignment <= 2**20 or alignment.bit_count() != 1:
        raise FormatError("general.alignment is not a power of two up to 1 MiB")
    return alignment


def _read_tensors(header: _Header, num_tensors: int, path: Path) -> dict[str, TensorInfo]:
    """Read the tensors' descriptions; their offsets still count from the data section."""
    tensors: dict[str, TensorInfo] = {}
    for _ in range(num_tensors):
        name = header.name()
        if name in tensors:
            raise FormatError(f"there are two tensors {name!r:.100}")
        try:
            tensors[name] = _read_tensor(header, name, path)
        except FormatError as error:
            raise FormatError(f"tensor {name!r:.100}: {error.problem}", hint=error.hint) from error
    return tensors


def _read_tensor(header: _Header, name: str, path: Path) -> TensorInfo:
    (num_dims,) = header.unpack("<I")
    if num_dims > _MAX_DIMS:
        raise FormatError(f"{num_dims} dimensions, where {_MAX_DIMS} are allowed")
    shape = header.unpack(f"<{num_dims}Q")[::-1]  # GGUF lists the innermost dimension first
    kind, offset = header.unpack("<IQ")
    if kind not in GGML_DTYPES:
        raise FormatError(f"the GGML type {kind} is unknown", hint="use a Q4_K or Q8_0 version")
    dtype = GGML_DTYPES[kind]
    return TensorInfo(name, dtype.name, shape, offset, dtype.nbytes(shape), path)


def _check_layout(tensors: Mapping[str, TensorInfo], alignment_bytes: int, file_bytes: int) -> None:
    """Check that every tensor is aligned and in the file, and that no two share a byte."""
    position, previous = 0, ""
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset % alignment_bytes:
            raise FormatError(f"tensor {info.name!r:.100} is not {alignment_bytes}-byte aligned")
        if info.offset < position:
            raise FormatError(f"tensors {previous!r:.100} and {info.name!r:.100} overlap")
        position, previous = info.offset + info.nbytes, info.name
    if position > file_bytes:
        raise FormatError(f"the file is cut short: {position - file_bytes} bytes are missing")
