"""A checkpoint in another format: safetensors to GGUF, or to another dtype, a chunk at a time.

    convert(source, target, "Q4_K") -> Converted     what was written, and what the user should know

`asked` reads what the user wants, `architectures` knows models by the names of their tensors, and
`recipe` decides what each tensor becomes, in which of `shapes`: all without a byte of a weight.
`write` moves the bytes.
"""

from __future__ import annotations

from distorch.convert.write import Converted, convert

__all__ = ["Converted", "convert"]
