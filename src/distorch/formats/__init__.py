"""What is on disk: checkpoints described from their headers, no weight read, no byte copied.

    open_checkpoint(path) -> Checkpoint     a Mapping of tensor name -> TensorInfo
    checkpoint.view(name) -> memoryview     the stored bytes, mapped

Both file formats are read here rather than by the ``gguf`` and ``safetensors`` packages, because
a header from the internet is judged before any of its numbers is used, and because a plan must be
printed without importing numpy or torch.
"""

from __future__ import annotations

from distorch.formats.checkpoint import Checkpoint, open_checkpoint
from distorch.formats.dtypes import (
    DTYPES,
    GGML_DTYPES,
    SAFETENSORS_DTYPES,
    DType,
    TensorInfo,
)

__all__ = [
    "DTYPES",
    "GGML_DTYPES",
    "SAFETENSORS_DTYPES",
    "Checkpoint",
    "DType",
    "TensorInfo",
    "open_checkpoint",
]
