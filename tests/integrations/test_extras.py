"""What needs a library that is not installed says how to install it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import distorch
from distorch.errors import MissingExtraError


@pytest.mark.parametrize(
    ("library", "tensor"), [("transformers", "model.layers.0.w"), ("diffusers", "w")]
)
def test_loading_names_the_extra_that_it_needs(
    library: str, tensor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({tensor: torch.zeros(1)}, tmp_path / "model.safetensors")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError) as caught:
        distorch.load(tmp_path, "cpu,*")
    assert caught.value.problem == f"loading this model needs {library}, which is not installed"
    assert caught.value.hint == f'pip install "distorch[{library}]"'


def test_a_tokenizer_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match="loading a tokenizer needs transformers"):
        distorch.load_tokenizer(tmp_path)
