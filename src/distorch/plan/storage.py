"""How the weights of a model would be stored in a format: the rule, without a file.

The rule is that of the tools that write such files, llama.cpp's and ComfyUI-GGUF's converters,
without their mixtures (``Q4_K_M`` stores some matrices as Q6_K).
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from math import prod
from typing import Final

from distorch.errors import ModelError
from distorch.formats.dtypes import DTYPES, GGML_DTYPES, DType, TensorInfo
from distorch.plan.blocks import Node, TensorSpec

__all__ = ["FORMATS", "Format", "converted", "format_named", "stored_as"]

_SMALL_ELEMENTS: Final = 1024  # what is not larger is not worth packing (ComfyUI-GGUF's threshold)
_OF_WEIGHTS: Final = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I8"}
_MATRIX_DIMS: Final = (2, 3)  # more than one of each: a dimension of one is none to ggml


@dataclass(frozen=True, slots=True)
class Format:
    """A storage format by the name that users give it, and the dtypes it stores weights in.

    ``matrix`` is for matrices, ``other`` for all else; ``compute`` is what the model computes in.
    """

    name: str
    matrix: DType
    other: DType
    compute: str

    def dtype(self, shape: tuple[int, ...]) -> DType:
        """Return the dtype of a weight of ``shape``.

        A matrix of more than 1,024 elements, or a stack of them (the experts of a layer), has the
        format; if its rows are not whole blocks, it is BF16. All else is ``other``: vectors, small
        tensors, convolutions of images and videos.

        >>> [format_named("Q4_K").dtype(shape).name for shape in ((64, 256), (64, 32), (256,))]
        ['Q4_K', 'BF16', 'F32']
        """
        matrix = len(shape) in _MATRIX_DIMS and min(shape) > 1
        if not matrix or prod(shape) <= _SMALL_ELEMENTS:
            return self.other
        return DTYPES["BF16"] if shape[-1] % self.matrix.block_elements else self.matrix


def _formats() -> dict[str, Format]:
    dense = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
    found = {key: Format(key, DTYPES[name], DTYPES[name], name) for key, name in dense.items()}
    for key, name in {"fp8": "F8_E4M3", "fp8_e5m2": "F8_E5M2"}.items():
        found[key] = Format(key, DTYPES[name], DTYPES["BF16"], "BF16")
    for dtype in GGML_DTYPES.values():
        if dtype.block_elements > 1:
            found[dtype.name] = Format(dtype.name, dtype, DTYPES["F32"], "BF16")
    return found


FORMATS: Final = _formats()
"""Every format by name: ``bf16``, ``f16``, ``f32``, ``fp8``, ``fp8_e5m2``, and GGUF's."""

_ALIASES: Final = {
    "fp8_e4m3fn": "fp8",
    "fp16": "f16",
    "float16": "f16",
    "bfloat16": "bf16",
    "fp32": "f32",
    "float32": "f32",
}


def format_named(text: str) -> Format:
    """Return the format that a user calls ``text``, in capitals or not.

    Raises:
        ModelError: there is none of that name.

    >>> format_named("q4_k").matrix.block_bytes
    144
    """
    by_lower = {name.lower(): found for name, found in FORMATS.items()}
    by_lower |= {alias: FORMATS[name] for alias, name in _ALIASES.items()}
    if found := by_lower.get(text.lower()):
        return found
    close = get_close_matches(text.lower(), by_lower, n=1, cutoff=0)
    raise ModelError(
        f"{text!r} is no format of weights; there are {', '.join(FORMATS)}",
        hint=by_lower[close[0]].name,
    )


def stored_as(root: Node, form: Format) -> Node:
    """Return the tree with every weight stored in a format, as a file of that format would be.

    Weights of a file are multiplied by runs of rows wherever they rest, so none is ``whole``.

    >>> weight = TensorSpec(name="w", dtype="F32", shape=(64, 64), nbytes=16384)
    >>> stored_as(Node(name="", tensors=(weight,)), format_named("Q8_0")).tensors[0].nbytes
    4352
    """
    return replace(
        root,
        tensors=tuple(_stored(spec, form) for spec in root.tensors),
        children=tuple(stored_as(child, form) for child in root.children),
    )


def _stored(spec: TensorSpec, form: Format) -> TensorSpec:
    dtype = form.dtype(spec.shape)
    return replace(spec, dtype=dtype.name, nbytes=dtype.nbytes(spec.shape), whole=False)


def converted(
    tensors: Mapping[str, TensorInfo], form: Format, scaled: Container[str] = ()
) -> dict[str, TensorInfo]:
    """Return the tensors of a checkpoint as they are once the weights are brought into a format.

    Those that the format's own dtype is for, large matrices of whole blocks, are stored in it; all
    others stay as they are, as do stacks of matrices among the ``scaled``.

    >>> from pathlib import Path
    >>> info = TensorInfo("w", "BF16", (64, 64), 0, 8192, Path("tiny.safetensors"))
    >>> converted({"w": info}, format_named("Q8_0"))["w"].nbytes
    4352
    """
    return {
        name: replace(info, dtype=form.matrix.name, nbytes=form.matrix.nbytes(info.shape))
        if _is_converted(info, form) and (name not in scaled or len(info.shape) == _MATRIX_DIMS[0])
        else info
        for name, info in tensors.items()
    }


def _is_converted(info: TensorInfo, form: Format) -> bool:
    matrix = len(info.shape) in _MATRIX_DIMS and min(info.shape) > 1
    weights = info.dtype in _OF_WEIGHTS or DTYPES[info.dtype].block_elements > 1
    return matrix and weights and form.dtype(info.shape) == form.matrix
