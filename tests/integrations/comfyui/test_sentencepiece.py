"""A tokenizer that went through GGUF metadata splits text as it did before."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from typing import Any

import pytest

from distorch.integrations.comfyui import sentencepiece as ours

theirs: Any = pytest.importorskip("sentencepiece", reason="needs sentencepiece: pip install it")

SYMBOL = "<extra_0>"
TEXTS = ["a red fox", "  two  spaces ", "Ünïcödé ﬁne", "猫が好き", "xylophone 12345", "", "\ttab"]


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_model_made_from_metadata_gives_the_same_pieces(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "_BUILT_IN", 0)
    rng, model = random.Random(0), io.BytesIO()  # noqa: S311  not a secret
    words = ["".join(rng.choices("abcdefgh é猫", k=rng.randint(2, 9))) for _ in range(500)]
    theirs.SentencePieceTrainer.train(
        sentence_iterator=(" ".join(rng.choices(words, k=12)) for _ in range(400)),
        model_writer=model,
        vocab_size=400,
        model_type=kind,
        byte_fallback=True,
        pad_id=3,
        user_defined_symbols=[SYMBOL],
        minloglevel=2,
    )
    before = theirs.SentencePieceProcessor(model_proto=model.getvalue())
    found = ours.model_of(metadata_of(before, kind))
    after = theirs.SentencePieceProcessor(model_proto=found)
    for text in [*TEXTS, *words, f"a {SYMBOL} b"]:
        assert after.encode(text) == before.encode(text)
    specials = ("unk_id", "bos_id", "eos_id", "pad_id", "get_piece_size")
    assert [getattr(after, each)() for each in specials] == [
        getattr(before, each)() for each in specials
    ]


def metadata_of(model: Any, kind: str) -> dict[str, object]:
    """What llama.cpp's converter writes of a tokenizer."""
    normalizer = dict(fields(dict(fields(model.serialized_model_proto()))[3]))
    prefix, count = "tokenizer.ggml.", model.get_piece_size()
    return {
        f"{prefix}model": {"unigram": "t5", "bpe": "llama"}[kind],
        f"{prefix}tokens": [model.id_to_piece(index) for index in range(count)],
        f"{prefix}scores": [model.get_score(index) for index in range(count)],
        f"{prefix}token_type": [kind_of(model, index) for index in range(count)],
        f"{prefix}unknown_token_id": model.unk_id(),
        f"{prefix}bos_token_id": model.bos_id(),
        f"{prefix}eos_token_id": model.eos_id(),
        f"{prefix}padding_token_id": model.pad_id(),
        f"{prefix}precompiled_charsmap": list(normalizer[2]),
    }


def kind_of(model: Any, index: int) -> int:
    if model.id_to_piece(index) == SYMBOL:
        return 4
    kinds = {2: model.is_unknown, 3: model.is_control, 5: model.is_unused, 6: model.is_byte}
    return next((kind for kind, holds in kinds.items() if holds(index)), 1)


def fields(raw: bytes) -> Iterator[tuple[int, Any]]:
    """Read a message's fields, with those that are messages as bytes."""
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            value |= (raw[at] & 127) << shift
            shift, at = shift + 7, at + 1
            if raw[at - 1] < 128:
                return value

    while at < len(raw):
        key = number()
        size = {0: None, 5: 4}.get(key & 7, -1)
        size = number() if size == -1 else size
        if size is None:
            yield key >> 3, number()
        else:
            yield key >> 3, raw[at : at + size]
            at += size
