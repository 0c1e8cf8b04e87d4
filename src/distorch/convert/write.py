"""The bytes: read, decoded, stored in another dtype and written, a few MiB at a time.

Files are read rather than mapped, since pages of a map count as memory of the process. Blocks of
every format are decoded and packed independently of each other, so chunks do not change a bit.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

import gguf
import numpy as np
import torch
from torch import Tensor

from distorch.convert.asked import is_packed
from distorch.convert.recipe import Output, Recipe, recipe_for
from distorch.convert.shapes import SHAPE_KEY
from distorch.errors import StorageError
from distorch.files import replacing
from distorch.formats import DTYPES, Checkpoint, open_checkpoint
from distorch.quant.block_formats import block_format
from distorch.quant.dequantize import dequantize
from distorch.quant.quantize import Encode, encoder

__all__ = ["Converted", "convert"]

_CHUNK_ELEMENTS: Final = 1 << 22  # 16 MiB as float32
_ALIGNMENT: Final = gguf.GGUF_DEFAULT_ALIGNMENT
_LARGEST: Final = {
    "F32": torch.finfo(torch.float32).max,
    "F16": torch.finfo(torch.float16).max,
    "BF16": torch.finfo(torch.bfloat16).max,
    "F8_E4M3": torch.finfo(torch.float8_e4m3fn).max,
    "F8_E5M2": torch.finfo(torch.float8_e5m2).max,
}
"""The dense dtypes that weights are stored in, and the largest number of each."""
_ELEMENTS: Final = np.dtype(np.float32)  # tells gguf that a shape counts elements, not bytes
_MAX_CONFIG_BYTES: Final = 1 << 20

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Converted:
    """What was written, and what is wrong with it: weights that are no numbers now, by tensor.

    ``nonfinite`` counts those that the source has, ``overflowed`` those that the format is too
    narrow for: torch's cast made them its largest number, infinite or NaN, by dtype and version.
    """

    recipe: Recipe
    read_bytes: int = 0
    written_bytes: int = 0
    seconds: float = 0.0
    nonfinite: Counter[str] = field(default_factory=Counter)
    overflowed: Counter[str] = field(default_factory=Counter)


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    format: str,  # noqa: A002  what users call it
    *,
    architecture: str | None = None,
    keep: tuple[str, ...] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Write the checkpoint at ``source`` to the file ``target``, its weights in ``format``.

    ``keep`` are patterns of names that stay as they are; ``progress`` is called with the bytes
    that were read and all that there are. Until all is written there is no file ``target``.

    Raises:
        StorageError: a file cannot be read or written, or is there already.
        FormatError: the source is no checkpoint.
        ModelError: the model cannot be stored so.
        MissingExtraError: packing needs libgguf, which is not installed.

    >>> import tempfile
    >>> from safetensors.torch import save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     source, target = Path(folder, "a.safetensors"), Path(folder, "b.safetensors")
    ...     save_file({"w": torch.ones(64, 64)}, source)
    ...     convert(source, target, "fp8_e4m3fn").written_bytes < 5000
    True
    """
    target, began = Path(target), time.perf_counter()
    with open_checkpoint(source) as checkpoint:
        recipe = recipe_for(
            checkpoint,
            target,
            format,
            architecture=architecture,
            keep=keep,
            class_name=_class_name(checkpoint.path),
        )
        _check_target(checkpoint, target, overwrite=overwrite)
    encoders = {name: _encoder(name) for name in {o.dtype.name for o in recipe.outputs}}
    _check_room(recipe, target)
    done = Converted(recipe)
    with replacing(target) as file:
        begin = _begin_gguf if recipe.container == "gguf" else _begin_safetensors
        begin(file, recipe)
        _write_tensors(file, done, encoders, progress or (lambda _done, _total: None))
        done.written_bytes = file.tell()
    done.seconds = time.perf_counter() - began
    return done


def _class_name(path: Path) -> str | None:
    """Return what the diffusers configuration beside a file calls the model, if there is one."""
    try:
        with path.with_name("config.json").open("rb") as file:
            found = json.loads(file.read(_MAX_CONFIG_BYTES)).get("_class_name")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return found if isinstance(found, str) else None


def _check_target(checkpoint: Checkpoint, target: Path, *, overwrite: bool) -> None:
    folder = target.parent
    if not folder.is_dir():
        raise StorageError(f"{folder} is no folder", hint=f"mkdir -p {folder}")
    if not os.access(folder, os.W_OK):
        raise StorageError(f"{folder} cannot be written to", hint="another folder for OUT")
    if not target.exists():
        return
    if target.is_dir():
        raise StorageError(f"{target} is a folder", hint=f"{target / 'model'}{target.suffix}")
    if any(target.samefile(path) for path in {info.path for info in checkpoint.values()}):
        raise StorageError(f"{target} is IN itself", hint="another name for OUT")
    if not overwrite:
        raise StorageError(f"{target} is there already", hint="--overwrite, or another name")


def _check_room(recipe: Recipe, target: Path) -> None:
    needed_bytes = sum(output.nbytes + _ALIGNMENT for output in recipe.outputs)
    free_bytes = shutil.disk_usage(target.parent).free
    if needed_bytes > free_bytes:
        raise StorageError(
            f"{target} takes {needed_bytes:,} bytes, and {free_bytes:,} are free in its folder",
            hint="a folder on another disk, or a smaller format",
        )


def _begin_gguf(file: BinaryIO, recipe: Recipe) -> None:
    """Write a GGUF file's header, all of it but the weights."""
    writer = gguf.GGUFWriter(None, recipe.architecture or "")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(_file_type(recipe.format))
    for output in recipe.outputs:
        if output.logical_shape is not None:
            writer.add_array(SHAPE_KEY + output.name, list(output.logical_shape))
        kind = gguf.GGMLQuantizationType[output.dtype.name]
        writer.add_tensor_info(output.name, output.shape, _ELEMENTS, output.nbytes, kind)
    writer.write_header_to_file(Path(file.name))
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    file.seek(0, os.SEEK_END)


def _file_type(name: str) -> gguf.LlamaFileType:
    """Return llama.cpp's number for a file of mostly one format.

    >>> _file_type("Q4_K").name, _file_type("BF16").name
    ('MOSTLY_Q4_K_S', 'MOSTLY_BF16')
    """
    known = gguf.LlamaFileType.__members__
    names = (f"ALL_{name}", f"MOSTLY_{name}", f"MOSTLY_{name}_S", f"MOSTLY_{name}_MOE", "GUESSED")
    return next(known[candidate] for candidate in names if candidate in known)


def _begin_safetensors(file: BinaryIO, recipe: Recipe) -> None:
    """Write a safetensors file's header, padded so that the weights begin 8-byte aligned."""
    header: dict[str, object] = {"__metadata__": dict(recipe.metadata)}
    end = 0
    for output in recipe.outputs:
        start, end = end, end + output.nbytes
        header[output.name] = {
            "dtype": output.dtype.name,
            "shape": output.shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


def _encoder(name: str) -> Encode | None:
    """Return what stores weights in a dtype; None for one that is only copied."""
    if name not in _LARGEST and not is_packed(name):
        return None
    block_format(name)  # which can also be decoded again
    return encoder(name)


def _write_tensors(
    file: BinaryIO, done: Converted, encoders: dict[str, Encode | None], progress: Progress
) -> None:
    outputs = done.recipe.outputs
    alignment = _ALIGNMENT if done.recipe.container == "gguf" else 1
    total_bytes = sum(output.source.nbytes for output in outputs)
    for output in outputs:
        file.write(bytes(-file.tell() % alignment))
        for raw in _chunks(output):
            stored = _stored(raw, output, encoders[output.dtype.name], done)
            file.write(stored.numpy().data)
            done.read_bytes += raw.numel()
            progress(done.read_bytes, total_bytes)
    file.write(bytes(-file.tell() % alignment))


def _chunks(output: Output) -> Iterator[Tensor]:
    """Read a tensor's bytes by runs that are whole blocks of both dtypes."""
    source = output.source
    dtype = DTYPES[source.dtype]
    run_elements = math.lcm(dtype.block_elements, output.dtype.block_elements)
    run_bytes = run_elements // dtype.block_elements * dtype.block_bytes
    chunk_bytes = max(1, _CHUNK_ELEMENTS // run_elements) * run_bytes
    with source.path.open("rb", buffering=0) as file:
        file.seek(source.offset)
        for start in range(0, source.nbytes, chunk_bytes):
            raw = torch.empty(min(chunk_bytes, source.nbytes - start), dtype=torch.uint8)
            if file.readinto(raw.numpy().data) != raw.numel():
                raise StorageError(
                    f"{source.path} has shrunk since it was opened", hint="convert it again"
                )
            yield raw


def _stored(raw: Tensor, output: Output, encode: Encode | None, done: Converted) -> Tensor:
    """Return the bytes that take the place of ``raw``, and count what is not finite."""
    source, stored = output.source.dtype, output.dtype.name
    if output.is_copy and source not in _LARGEST:
        return raw
    weights = _decoded(raw, source)
    num_nonfinite = _count_beyond(weights, _LARGEST["F32"])
    done.nonfinite[output.name] += num_nonfinite
    if output.is_copy:
        return raw
    assert encode is not None, f"{source} became {stored}"
    encoded = encode(weights.view(-1, output.dtype.block_elements))
    if stored in _LARGEST:
        num_beyond = _count_beyond(weights, _LARGEST[stored]) - num_nonfinite
    elif num_nonfinite:
        num_beyond = 0  # a scale of a block that has NaN says nothing of the others
    else:
        num_beyond = _count_beyond(_decoded(encoded, stored), _LARGEST["F32"])
    done.overflowed[output.name] += num_beyond
    return encoded


def _decoded(raw: Tensor, name: str) -> Tensor:
    form = block_format(name)
    out = torch.empty(raw.numel() // form.nbytes * form.elements, dtype=torch.float32)
    return dequantize(raw, form, out)


def _count_beyond(weights: Tensor, limit: float) -> int:
    """Count the weights that are larger than ``limit``, either way, or NaN."""
    low, high = weights.aminmax()  # NaN if there is one: one quick pass for all that is well
    if -limit <= low and high <= limit:
        return 0
    return weights.numel() - int((weights.abs() <= limit).sum())
