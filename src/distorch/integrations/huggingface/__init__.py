"""transformers: files and directories become its models, without memory for their weights."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from distorch.integrations.extras import need

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["load_tokenizer"]


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a GGUF file or a model directory.

    transformers takes 10-20 s to convert a large vocabulary from a GGUF: that happens once, and the
    result is kept in the user's cache under the checksum of the file's header.

    Raises:
        StorageError, FormatError: the path holds no checkpoint.
        ModelError: it has no tokenizer that transformers can read.
        MissingExtraError: transformers is not installed.
    """
    need("transformers", "loading a tokenizer")
    from distorch.integrations.huggingface import tokenizer  # noqa: PLC0415  heavy

    return tokenizer.load(path)
