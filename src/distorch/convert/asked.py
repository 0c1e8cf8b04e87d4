"""What a user asks for: a kind of file by its suffix, and a format of weights that it can hold."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

from distorch.errors import ModelError, StorageError
from distorch.formats import DTYPES, GGML_DTYPES
from distorch.plan.storage import Format, format_named

__all__ = ["GGUF_NAMES", "Container", "container_of", "form_for", "is_packed"]

Container = Literal["gguf", "safetensors"]

GGUF_NAMES: Final = frozenset(dtype.name for dtype in GGML_DTYPES.values())
"""The dtypes that a GGUF file can hold."""

_DENSE: Final = {
    "fp32": "F32",
    "f32": "F32",
    "fp16": "F16",
    "f16": "F16",
    "bf16": "BF16",
    "fp8": "F8_E4M3",
    "fp8_e4m3fn": "F8_E4M3",
    "fp8_e5m2": "F8_E5M2",
}
"""What users call the dense dtypes."""


def is_packed(name: str) -> bool:
    """Whether a dtype is one of GGUF's block formats.

    >>> is_packed("Q4_K"), is_packed("BF16")
    (True, False)
    """
    return name in GGUF_NAMES and DTYPES[name].block_elements > 1


def container_of(target: Path) -> Container:
    """Return the kind of file that a name's suffix says.

    Raises:
        StorageError: the suffix says none.

    >>> container_of(Path("flux-Q4_K.gguf"))
    'gguf'
    """
    match target.suffix.lower():
        case ".gguf":
            return "gguf"
        case ".safetensors":
            return "safetensors"
    raise StorageError(
        f"{target} ends in neither .gguf nor .safetensors, which says what to write",
        hint=str(target.with_suffix(".gguf")),
    )


def form_for(text: str, container: Container) -> Format:
    """Return what matrices are stored in, and all else, by the name that users have for it.

    Raises:
        ModelError: there is no such format, or files of this kind cannot hold it.

    >>> form = form_for("bf16", "gguf")
    >>> form.name, form.matrix.name, form.other.name
    ('BF16', 'BF16', 'F32')
    """
    dense = DTYPES.get(_DENSE.get(text.lower(), ""))
    matrix = dense or format_named(text).matrix
    if container == "gguf":
        if matrix.name not in GGUF_NAMES:
            raise ModelError(f"a GGUF file cannot hold {text}", hint="--format Q8_0")
        return Format(matrix.name, matrix, DTYPES["F32"], "F32")
    if dense is None:
        raise ModelError(
            f"a safetensors file cannot hold {text}",
            hint="an OUT that ends in .gguf, or --format fp8_e4m3fn",
        )
    other = DTYPES["BF16"] if dense.block_bytes == 1 else dense
    return Format(text.lower(), dense, other, "F32")
