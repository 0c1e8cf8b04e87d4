"""Writes a GGUF of Wan 2.1's 14B architecture, with random weights: about 8 GB in Q4_K."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from distorch.formats.dtypes import DTYPES
from distorch.plan.storage import format_named

Bytes = NDArray[np.uint8]
Progress = Callable[[int, int], None]

WIDTH, FEED_FORWARD, TEXT = 5120, 13824, 4096
_FREQUENCIES, _CHANNELS, _PATCH = 256, 16, (1, 2, 2)
_SCALE = 6e-5  # of a block: weights of a spread of about 0.02, as in trained models
_MIDDLE = 7.5  # of the numbers 0 to 15
_POOL_BLOCKS = 1 << 17  # random bytes take longer to make than to write: one draw serves all
_SEED = 0


def tensors(num_layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of the model, as its authors have them."""
    patch = (WIDTH, _CHANNELS, *_PATCH)
    yield from (("patch_embedding.weight", patch), ("patch_embedding.bias", (WIDTH,)))
    yield from _linear("text_embedding.0", WIDTH, TEXT)
    yield from _linear("text_embedding.2", WIDTH, WIDTH)
    yield from _linear("time_embedding.0", WIDTH, _FREQUENCIES)
    yield from _linear("time_embedding.2", WIDTH, WIDTH)
    yield from _linear("time_projection.1", 6 * WIDTH, WIDTH)
    for layer in range(num_layers):
        yield from _block(f"blocks.{layer}")
    yield "head.modulation", (1, 2, WIDTH)
    yield from _linear("head.head", _CHANNELS * np.prod(_PATCH, dtype=int).item(), WIDTH)


def _block(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.modulation", (1, 6, WIDTH)
    for attention in ("self_attn", "cross_attn"):
        for projection in "qkvo":
            yield from _linear(f"{name}.{attention}.{projection}", WIDTH, WIDTH)
        for norm in ("norm_q", "norm_k"):
            yield f"{name}.{attention}.{norm}.weight", (WIDTH,)
    yield from ((f"{name}.norm3.weight", (WIDTH,)), (f"{name}.norm3.bias", (WIDTH,)))
    yield from _linear(f"{name}.ffn.0", FEED_FORWARD, WIDTH)
    yield from _linear(f"{name}.ffn.2", WIDTH, FEED_FORWARD)


def _linear(name: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from ((f"{name}.weight", (rows, columns)), (f"{name}.bias", (rows,)))


def file_bytes(num_layers: int) -> int:
    """Bytes of all tensors."""
    form = format_named("Q4_K")
    return sum(form.dtype(shape).nbytes(shape) for _, shape in tensors(num_layers))


def write(path: Path, num_layers: int, progress: Progress) -> None:
    """Write the file, tensor by tensor."""
    random = np.random.default_rng(_SEED)
    pool, form = _blocks(random), format_named("Q4_K")
    writer = gguf.GGUFWriter(path, "wan")
    shapes = dict(tensors(num_layers))
    for name, shape in shapes.items():
        dtype = form.dtype(shape)
        kind = gguf.GGMLQuantizationType[dtype.name]
        stored = gguf.quant_shape_to_byte_shape(shape, kind) if dtype.block_elements > 1 else shape
        numpy_dtype = np.dtype(np.uint8 if dtype.block_elements > 1 else np.float32)
        writer.add_tensor_info(name, stored, numpy_dtype, dtype.nbytes(shape), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    done, total = 0, file_bytes(num_layers)
    for name, shape in shapes.items():
        nbytes = form.dtype(shape).nbytes(shape)
        dense = form.dtype(shape) is DTYPES["F32"]
        writer.write_tensor_data(
            _dense(name, shape, random) if dense else _drawn(pool, nbytes, random)
        )
        progress(done := done + nbytes, total)
    writer.close()


def _blocks(random: np.random.Generator) -> Bytes:
    """Random blocks of Q4_K whose weights are centred on 0."""
    blocks = random.integers(0, 256, (_POOL_BLOCKS, DTYPES["Q4_K"].block_bytes), np.uint8)
    blocks[:, 0:2] = np.full((1,), _SCALE, np.float16).view(np.uint8)
    blocks[:, 2:4] = np.full((1,), _SCALE * _MIDDLE, np.float16).view(np.uint8)
    return blocks.reshape(-1)


def _drawn(pool: Bytes, nbytes: int, random: np.random.Generator) -> Bytes:
    """As many bytes of whole blocks, from another place of the pool each time."""
    first = int(random.integers(_POOL_BLOCKS)) * DTYPES["Q4_K"].block_bytes
    turned = np.concatenate((pool[first:], pool[:first]))
    return np.resize(turned, nbytes)


def _dense(name: str, shape: tuple[int, ...], random: np.random.Generator) -> NDArray[np.float32]:
    """Norms of 1, and small numbers for all else."""
    if "norm" in name and name.endswith("weight"):
        return np.ones(shape, np.float32)
    return random.standard_normal(shape, np.float32) * np.float32(0.02)
