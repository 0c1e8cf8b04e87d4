"""The names that users import, which do not change without a line in the changelog."""

from __future__ import annotations

import pytest

import distorch

PUBLIC = [
    "Allocation",
    "DistorchError",
    "Handle",
    "Machine",
    "Plan",
    "dequantize",
    "distribute",
    "handle_of",
    "load",
    "load_tokenizer",
    "open_checkpoint",
]


def test_the_public_names_are_these() -> None:
    assert distorch.__all__ == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_there_and_says_what_it_is(name: str) -> None:
    doc = getattr(distorch, name).__doc__
    assert doc
    assert not doc.startswith(f"{name}("), "the docstring that a dataclass writes itself"


def test_another_name_is_not_there() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'anything_else'"):
        _ = distorch.anything_else
