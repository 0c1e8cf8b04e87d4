"""A tokenizer as GGUF metadata has it, as the sentencepiece model that ComfyUI asks for.

Written from sentencepiece_model.proto in google/sentencepiece. GGUF keeps pieces, scores and kinds
under the same numbers, so that a model is a list of them and the few settings beside it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Any, Final

__all__ = ["model_of"]

_KINDS: Final = {"t5": 1, "llama": 2}  # tokenizer.ggml.model -> unigram, byte pairs
_BUILT_IN: Final = 33_000  # pieces: a smaller vocabulary is the first T5's, which ComfyUI has
_BYTE: Final = 6
_VARINT, _BYTES, _FLOAT = 0, 2, 5  # how a field is encoded


def model_of(metadata: Mapping[str, object]) -> bytes | None:
    """Return the sentencepiece model of a GGUF file; None if it has no vocabulary of that kind.

    >>> model_of({"tokenizer.ggml.model": "gpt2"})
    >>> pieces = {"tokenizer.ggml.tokens": ["a"] * 40_000, "tokenizer.ggml.scores": [0.0] * 40_000}
    >>> len(model_of({"tokenizer.ggml.model": "t5", **pieces})) > 40_000
    True
    """
    kind = _KINDS.get(str(metadata.get("tokenizer.ggml.model")))
    pieces: Any = metadata.get("tokenizer.ggml.tokens", ())
    if kind is None or len(pieces) < _BUILT_IN:
        return None
    count = len(pieces)
    scores: Any = metadata.get("tokenizer.ggml.scores") or [0.0] * count
    kinds: Any = metadata.get("tokenizer.ggml.token_type") or [1] * count
    model = b"".join(
        _field(
            1,
            _BYTES,
            _field(1, _BYTES, piece.encode())
            + _field(2, _FLOAT, struct.pack("<f", score))
            + _field(3, _VARINT, _varint(number)),
        )
        for piece, score, number in zip(pieces, scores, kinds, strict=True)
    )
    return model + _field(2, _BYTES, _trainer(metadata, kind, kinds)) + _normalizer(metadata)


def _trainer(metadata: Mapping[str, object], kind: int, kinds: Iterable[int]) -> bytes:
    """What a model says of its making: its kind, and which pieces are special."""
    specials = {40: "unknown", 41: "bos", 42: "eos", 43: "padding"}
    settings = {3: kind, 35: int(_BYTE in kinds)}
    for number, name in specials.items():
        found = metadata.get(f"tokenizer.ggml.{name}_token_id")
        settings[number] = found if isinstance(found, int) else -1
    if settings[40] < 0:
        settings[40] = next((index for index, each in enumerate(kinds) if each == 2), 0)  # noqa: PLR2004  the kind of an unknown piece
    return b"".join(_field(number, _VARINT, _varint(value)) for number, value in settings.items())


def _normalizer(metadata: Mapping[str, object]) -> bytes:
    """How text is prepared: its character map, and what happens to spaces."""
    charsmap: Any = metadata.get("tokenizer.ggml.precompiled_charsmap")
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    shrink = bool(metadata.get("tokenizer.ggml.remove_extra_whitespaces", True))
    found = b"" if charsmap is None else _field(2, _BYTES, bytes(x & 255 for x in charsmap))
    found += _field(3, _VARINT, _varint(prefix)) + _field(4, _VARINT, _varint(shrink))
    return _field(3, _BYTES, found + _field(5, _VARINT, _varint(True)))  # noqa: FBT003  a number


def _field(number: int, encoding: int, value: bytes) -> bytes:
    length = _varint(len(value)) if encoding == _BYTES else b""
    return _varint(number << 3 | encoding) + length + value


def _varint(value: int) -> bytes:
    value &= 2**64 - 1
    found = bytearray()
    while value > 127:  # noqa: PLR2004  seven bits a byte
        found.append(value & 127 | 128)
        value >>= 7
    return bytes((*found, value))
