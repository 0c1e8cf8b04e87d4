"""Tokenizers: from a directory as they are, from a GGUF converted once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import transformers
from platformdirs import user_cache_path
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from distorch.errors import ModelError
from distorch.formats import Checkpoint, open_checkpoint

__all__ = ["load"]

_NOT_SETTINGS = {"backend", "tokenizer_class", "is_local", "local_files_only", "name_or_path"}


def load(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Return the tokenizer beside or inside the checkpoint at ``path``."""
    with open_checkpoint(path) as checkpoint:
        if checkpoint.format == "gguf":
            return _from_gguf(checkpoint)
        return _convert(checkpoint.path.parent, gguf_file=None)


def _from_gguf(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    folder = user_cache_path("distorch") / "tokenizers" / _key(checkpoint)
    if not (folder / "tokenizer.json").is_file():
        tokenizer = _convert(checkpoint.path.parent, gguf_file=checkpoint.path.name)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as half_made:
            tokenizer.save_pretrained(half_made)
            shutil.rmtree(folder, ignore_errors=True)
            Path(half_made).rename(folder)
            Path(half_made).mkdir()  # what the context manager removes
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    return PreTrainedTokenizerFast(  # three times as fast as AutoTokenizer, which reads it thrice
        tokenizer_file=str(folder / "tokenizer.json"),
        **{key: value for key, value in settings.items() if key not in _NOT_SETTINGS},
    )


def _convert(folder: Path, gguf_file: str | None) -> PreTrainedTokenizerBase:
    extra = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **extra
        )
    except Exception as error:  # tokenizers raises bare Exception
        raise ModelError(
            f"transformers finds no tokenizer in {folder / (gguf_file or '')}: {error}",
            hint="a file or directory that holds the tokenizer with the weights",
        ) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase), "what AutoTokenizer returns"
    return tokenizer


def _key(checkpoint: Checkpoint) -> str:
    """A checksum of all that the conversion depends on: the header, and the converter."""
    end = min((info.offset for info in checkpoint.values()), default=0)
    with checkpoint.path.open("rb") as file:
        header = file.read(end)
    return hashlib.sha256(transformers.__version__.encode() + header).hexdigest()[:32]
