"""What one tensor on disk is: its dtype, how many bytes a shape takes in it, and where it lies.

Dense dtypes go by their safetensors names, block formats by their GGML names; a dense GGML type
is the same ``DType`` as its safetensors twin. The block sizes are those of ``GGML_QUANT_SIZES`` in
the ``gguf`` package, copied because importing it costs 0.1 s and numpy; a test compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from distorch.errors import FormatError

__all__ = ["DTYPES", "GGML_DTYPES", "SAFETENSORS_DTYPES", "DType", "TensorInfo"]

_MAX_DIMS: Final = 64  # numpy's and torch's own limit; also keeps the product below cheap
_MAX_ELEMENTS: Final = 2**63 - 1  # numpy and torch count elements in an int64


@dataclass(frozen=True, slots=True)
class DType:
    """A storage format: ``block_elements`` consecutive elements of a row in ``block_bytes`` bytes.

    A dense dtype has blocks of one element (F4 and F6, which pack elements into whole bytes, of a
    few).

    >>> DTYPES["Q4_K"]
    DType(name='Q4_K', block_elements=256, block_bytes=144)
    """

    name: str
    block_elements: int
    block_bytes: int

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes that a tensor of ``shape`` (outermost dimension first) takes on disk.

        Raises FormatError when the shape is impossible, or a row is not a whole number of blocks.

        >>> DTYPES["Q4_K"].nbytes((3, 512))
        864
        """
        if len(shape) > _MAX_DIMS:
            raise FormatError(f"{len(shape)} dimensions, where at most {_MAX_DIMS} are possible")
        # The zeros are left out: torch multiplies the other dimensions even when one is empty.
        if min(shape, default=0) < 0 or math.prod(filter(None, shape)) > _MAX_ELEMENTS:
            raise FormatError(f"the shape {tuple(shape)} has a negative or impossible size")
        row_elements = shape[-1] if shape else 1
        if row_elements % self.block_elements:
            raise FormatError(
                f"a row of {row_elements} elements is not a whole number of "
                f"{self.name} blocks of {self.block_elements}"
            )
        return math.prod(shape) // self.block_elements * self.block_bytes


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint, as its header describes it; ``dtype`` is a name in ``DTYPES``.

    ``shape`` is in torch's order, outermost dimension first (a GGUF file stores the reverse).
    ``offset`` is the byte at which the tensor starts in the file ``path``, ``nbytes`` its size.

    >>> info = TensorInfo("embed", "Q8_0", (10, 64), 4096, 680, Path("tiny.gguf"))
    >>> info.dtype == "Q8_0", info.nbytes == DTYPES[info.dtype].nbytes(info.shape)
    (True, True)
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    path: Path


def _by_name(*dtypes: DType) -> dict[str, DType]:
    return {dtype.name: dtype for dtype in dtypes}


SAFETENSORS_DTYPES: Final[Mapping[str, DType]] = MappingProxyType(
    _by_name(
        DType("BOOL", 1, 1),
        DType("F4", 2, 1),
        DType("F6_E2M3", 4, 3),
        DType("F6_E3M2", 4, 3),
        DType("U8", 1, 1),
        DType("I8", 1, 1),
        DType("F8_E5M2", 1, 1),
        DType("F8_E4M3", 1, 1),
        DType("F8_E8M0", 1, 1),
        DType("F8_E4M3FNUZ", 1, 1),
        DType("F8_E5M2FNUZ", 1, 1),
        DType("I16", 1, 2),
        DType("U16", 1, 2),
        DType("F16", 1, 2),
        DType("BF16", 1, 2),
        DType("I32", 1, 4),
        DType("U32", 1, 4),
        DType("F32", 1, 4),
        DType("C64", 1, 8),
        DType("F64", 1, 8),
        DType("I64", 1, 8),
        DType("U64", 1, 8),
    )
)
"""The dtypes of a safetensors header, by name (enum ``Dtype`` of the safetensors crate, 0.8)."""

GGML_DTYPES: Final[Mapping[int, DType]] = MappingProxyType(
    {
        0: SAFETENSORS_DTYPES["F32"],
        1: SAFETENSORS_DTYPES["F16"],
        2: DType("Q4_0", 32, 18),
        3: DType("Q4_1", 32, 20),
        6: DType("Q5_0", 32, 22),
        7: DType("Q5_1", 32, 24),
        8: DType("Q8_0", 32, 34),
        9: DType("Q8_1", 32, 40),
        10: DType("Q2_K", 256, 84),
        11: DType("Q3_K", 256, 110),
        12: DType("Q4_K", 256, 144),
        13: DType("Q5_K", 256, 176),
        14: DType("Q6_K", 256, 210),
        15: DType("Q8_K", 256, 292),
        16: DType("IQ2_XXS", 256, 66),
        17: DType("IQ2_XS", 256, 74),
        18: DType("IQ3_XXS", 256, 98),
        19: DType("IQ1_S", 256, 50),
        20: DType("IQ4_NL", 32, 18),
        21: DType("IQ3_S", 256, 110),
        22: DType("IQ2_S", 256, 82),
        23: DType("IQ4_XS", 256, 136),
        24: SAFETENSORS_DTYPES["I8"],
        25: SAFETENSORS_DTYPES["I16"],
        26: SAFETENSORS_DTYPES["I32"],
        27: SAFETENSORS_DTYPES["I64"],
        28: SAFETENSORS_DTYPES["F64"],
        29: DType("IQ1_M", 256, 56),
        30: SAFETENSORS_DTYPES["BF16"],
        34: DType("TQ1_0", 256, 54),
        35: DType("TQ2_0", 256, 66),
        39: DType("MXFP4", 32, 17),
        40: DType("NVFP4", 64, 36),
        41: DType("Q1_0", 128, 18),
    }
)
"""The types of a GGUF file, by ``enum ggml_type``; the numbers in between are no longer in ggml."""

DTYPES: Final[Mapping[str, DType]] = MappingProxyType(
    {**SAFETENSORS_DTYPES, **_by_name(*GGML_DTYPES.values())}
)
"""Every dtype a checkpoint may hold, by name."""
