"""Tiny checkpoints for tests: valid ones by the official packages, broken ones by hand.

    stored = write_safetensors(path)        {name: Stored(dtype, shape, data)}
    stored = write_sharded(directory)       the same, in two files and an index
    stored = write_gguf(path)               a tensor of every GGML type, some metadata

``safetensors_file`` and ``gguf_parts`` build files field by field, so that a test can spoil one.
Block-quantised data are random bytes below 0x40: every float in them is finite.
"""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from typing import TYPE_CHECKING, Any, NamedTuple

import gguf
import numpy as np
import pytest
import safetensors
from hypothesis import strategies as st
from safetensors.numpy import save_file

from distorch.errors import FormatError
from distorch.formats import open_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

MAX_OPEN_BYTES = 64 * 2**20  # of memory, to open any file whatsoever
HUGE_BYTES = 2**31  # of a file that is mostly a hole: large enough for any limit to matter
EXTREMES = (0, 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


class Stored(NamedTuple):
    """What a file should say of a tensor, and the bytes it should hold."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def write_safetensors(
    path: Path, *, shapes: Mapping[str, tuple[int, ...]] | None = None, seed: int = 0
) -> dict[str, Stored]:
    """Write dense tensors with the safetensors package: F32 of ``shapes``, or one of each dtype."""
    rng = np.random.default_rng(seed)
    if shapes is None:
        dtypes = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?")
        arrays = {f"layer.{d}": rng.normal(0, 40, (3, 5)).astype(d) for d in dtypes}
        arrays |= {"scalar": np.array(3.5, "f4"), "empty": np.empty((0, 4), "f4")}
    else:
        arrays = {name: rng.normal(0, 0.02, shape).astype("f4") for name, shape in shapes.items()}
    save_file(arrays, path, metadata={"format": "pt", "note": "tiny"})
    names = {"b": "BOOL", "f": "F", "i": "I", "u": "U"}
    return {
        name: Stored(
            names[a.dtype.kind] + (str(8 * a.itemsize) if a.dtype.kind != "b" else ""),
            a.shape,
            a.tobytes(),
        )
        for name, a in arrays.items()
    }


def read_safetensors(file: bytes) -> dict[str, Stored]:
    """Read a file with the safetensors package; raises its SafetensorError."""
    tensors = safetensors.deserialize(file)  # type: ignore[no-untyped-call]
    return {name: Stored(t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in tensors}


def write_sharded(directory: Path, *, stem: str = "model", seed: int = 0) -> dict[str, Stored]:
    """Write two shards and their index, with the names that ``save_pretrained`` gives them."""
    weight_map: dict[str, str] = {}
    stored: dict[str, Stored] = {}
    for part in (1, 2):
        shard = f"{stem}-{part:05}-of-00002.safetensors"
        shapes = {f"blocks.{part}.weight": (4, 8), f"blocks.{part}.bias": (4,)}
        stored |= write_safetensors(directory / shard, shapes=shapes, seed=seed + part)
        weight_map |= dict.fromkeys(shapes, shard)
    index = {"metadata": {"total_size": 288}, "weight_map": weight_map}
    (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    return stored


def write_gguf(
    path: Path,
    *,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]] | None = None,
    vocabulary: Sequence[str] = ("<s>", "a", "é", ""),
    seed: int = 0,
) -> dict[str, Stored]:
    """Write a GGUF with the gguf package: ``tensors`` of {name: (type, shape)}, or every type."""
    rng = np.random.default_rng(seed)
    if tensors is None:
        tensors = {f"blk.{t.name}": (t.name, (3, 256)) for t in gguf.GGMLQuantizationType}
        tensors |= {"norm": ("F32", (7,)), "conv3d": ("F16", (2, 1, 3, 2, 2))}
    writer = gguf.GGUFWriter(path, "tiny")
    writer.add_uint32("tiny.block_count", 2)
    writer.add_float32("tiny.epsilon", 0.5)
    writer.add_bool("tiny.tied", val=True)
    writer.add_int64("tiny.negative", -5)
    writer.add_array("tokenizer.ggml.tokens", list(vocabulary))
    writer.add_array("tokenizer.ggml.scores", [0.5 * i for i in range(len(vocabulary))])
    writer.add_array("tiny.flags", [True, False, True])
    stored = {}
    for name, (dtype, shape) in tensors.items():
        kind = gguf.GGMLQuantizationType[dtype]
        data = rng.integers(0, 0x40, gguf.quant_shape_to_byte_shape(shape, kind), np.uint8)
        writer.add_tensor(name, data, raw_dtype=kind)
        stored[name] = Stored(dtype, shape, data.tobytes())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def safetensors_file(header: object, data: bytes = b"") -> bytes:
    """Build a safetensors file from any header: an object for JSON, or the text itself."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def string(text: str | bytes) -> list[bytes]:
    """Return the parts of a GGUF string."""
    raw = text.encode() if isinstance(text, str) else text
    return [struct.pack("<Q", len(raw)), raw]


def key(name: str | bytes, kind: int, *value: bytes) -> list[bytes]:
    """Return the parts of a GGUF metadata entry."""
    return [*string(name), struct.pack("<I", kind), *value]


def array(kind: int, count: int, *items: bytes) -> list[bytes]:
    """Return the parts of a GGUF array value."""
    return [struct.pack("<I", kind), struct.pack("<Q", count), *items]


def tensor(
    name: str | bytes = "w", dims: Sequence[int] = (8,), kind: int = 0, offset: int = 0
) -> list[bytes]:
    """Return the parts of a GGUF tensor description; ``dims`` in the file's order."""
    sizes = [struct.pack("<Q", size) for size in dims]
    return [
        *string(name),
        struct.pack("<I", len(dims)),
        *sizes,
        struct.pack("<I", kind),
        struct.pack("<Q", offset),
    ]


def gguf_parts(
    keys: Iterable[list[bytes]] = (),
    tensors: Iterable[list[bytes]] = (),
    *,
    data: bytes = b"",
    version: bytes = b"\3\0\0\0",
    alignment: int = 32,
    padding: int | None = None,
) -> list[bytes]:
    """Return a GGUF file as a list of its fields; join them for the file."""
    keys, tensors = list(keys), list(tensors)
    parts = [b"GGUF", version, struct.pack("<Q", len(tensors)), struct.pack("<Q", len(keys))]
    parts += [part for entry in (*keys, *tensors) for part in entry]
    if padding is None:
        padding = -sum(map(len, parts)) % alignment
    return [*parts, bytes(padding), data]


def mutations(max_ops: int = 3) -> st.SearchStrategy[list[tuple[Any, ...]]]:
    """Strategy of what can happen to the bytes of a header; ``mutate`` applies it."""
    place = st.integers(0, 2**16)
    return st.lists(
        st.one_of(
            st.tuples(st.just("flip"), place, st.integers(0, 7)),
            st.tuples(st.just("truncate"), place),
            st.tuples(st.just("integer"), place, st.sampled_from((1, 4, 8)), extremes()),
            st.tuples(st.just("insert"), place, st.binary(min_size=1, max_size=24)),
            st.tuples(st.just("delete"), place, st.integers(1, 24)),
        ),
        min_size=1,
        max_size=max_ops,
    )


def extremes() -> st.SearchStrategy[int]:
    """Strategy of integers that break sizes: the extremes, their neighbours, small ones."""
    return st.sampled_from(EXTREMES) | st.integers(0, 300) | st.integers(0, 2**64 - 1)


def mutate(data: bytes, ops: Iterable[tuple[Any, ...]], header_bytes: int) -> bytes:
    """Apply ``mutations`` to the first ``header_bytes`` of a file."""
    spoiled = bytearray(data)
    for op, place, *more in ops:
        at = place % header_bytes
        if op == "truncate":
            del spoiled[at:]
        elif op == "insert":
            spoiled[at:at] = more[0]
        elif op == "delete":
            del spoiled[at : at + more[0]]
        elif op == "integer":
            width, value = more
            spoiled[at : at + width] = (value % 2 ** (8 * width)).to_bytes(width, "little")
        elif at < len(spoiled):
            spoiled[at] ^= 1 << more[0]
    return bytes(spoiled)


def refuse(path: Path, file: bytes) -> str:
    """Return the problem with a file, which must be refused, by its name and with a hint."""
    path.write_bytes(file)
    with pytest.raises(FormatError) as caught:
        open_checkpoint(path)
    assert caught.value.hint
    assert str(path) in caught.value.problem
    return caught.value.problem


def open_or_refuse(path: Path, *, huge: bool = False) -> bool:
    """Open a spoiled file, and say whether it was read: in full, or refused; in little memory.

    ``huge`` makes the file so large that wrong sizes point into it, and not past its end.
    """
    if huge:
        os.truncate(path, HUGE_BYTES)
    tracemalloc.start()
    try:
        with open_checkpoint(path) as checkpoint:
            file_bytes = path.stat().st_size
            for name, info in checkpoint.items():
                assert 0 <= info.offset <= info.offset + info.nbytes <= file_bytes
                assert checkpoint.view(name).nbytes == info.nbytes
            if file_bytes < MAX_OPEN_BYTES:
                dict(checkpoint.metadata)
        refusal = None
    except FormatError as error:
        refusal = error
    finally:
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak_bytes < MAX_OPEN_BYTES
    if refusal:
        assert refusal.hint
        assert str(path) in refusal.problem
    return refusal is None
