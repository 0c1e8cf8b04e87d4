"""What the bytes mean: one class per block format, each with one method that decodes it.

Every format that a GGUF file stores weights in, and the plain floating point of safetensors.
"""

from distorch.quant.block_formats import (  # noqa: F401  (each class registers itself)
    dense,
    i_quants,
    k_quants,
    microscaling,
    simple,
    ternary,
)
from distorch.quant.block_formats.base import BLOCK_FORMATS, BlockFormat, block_format

__all__ = ["BLOCK_FORMATS", "BlockFormat", "block_format"]
