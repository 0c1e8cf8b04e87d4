"""Text from a model, token by token: shown as it comes, timed, and drawn by a seed of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distorch.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Generated", "continue_text"]

_CUT_CHARACTER = "\N{REPLACEMENT CHARACTER}"  # what half a character decodes to


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """A continuation, and the time of its tokens: the first, which reads the prompt, and others."""

    text: str
    num_tokens: int
    seconds_to_first_token: float
    seconds_per_token: float


def continue_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    show: Callable[[str], None],
) -> Generated:
    """Continue ``prompt``, showing text as it comes; greedy at a temperature of 0.

    Raises:
        ModelError: the prompt has no tokens.
    """
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    if not inputs["input_ids"].numel():
        raise ModelError(
            "the prompt is empty, and this model needs a token to begin with",
            hint='--prompt "Once upon a time"',
        )
    live = _Live(tokenizer, show)
    generate: Any = model.generate  # typed as what a module may hold
    generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        logits_processor=[_gumbel(temperature, seed)] if temperature > 0 else [],
        streamer=live,
    )
    return live.generated()


def _gumbel(temperature: float, seed: int) -> Callable[[Any, Any], Any]:
    """Make the largest score a draw from the distribution of all, by noise from a private seed.

    Gumbel's trick: ``argmax(log p + noise)`` is distributed as ``p``. So sampling is greedy search,
    and neither torch's global generator nor its version has a say in the text.
    """
    import numpy as np

    noise = np.random.default_rng(seed)

    def draw(_ids: Any, scores: Any) -> Any:
        return scores.float() / temperature + scores.new_tensor(noise.gumbel(size=scores.shape))

    return draw


class _Live:
    """What transformers calls a streamer: it is given the prompt's tokens, then each new one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None]) -> None:
        self._tokenizer = tokenizer
        self._show = show
        self._ids: list[int] = []
        self._times: list[float] = []
        self._prompt_length = 0
        self._shown = ""

    def put(self, tokens: Any) -> None:
        """Take tokens, and show what can no longer change."""
        self._ids += tokens.flatten().tolist()
        self._times.append(time.perf_counter())
        if len(self._times) == 1:
            self._prompt_length = len(self._text())
        elif not (text := self._new_text()).endswith(_CUT_CHARACTER):
            self._show_up_to(text)

    def end(self) -> None:
        """Show what is left."""
        self._show_up_to(self._new_text())

    def generated(self) -> Generated:
        """Return all of it."""
        began, first, *_ = self._times
        num_tokens = len(self._times) - 1
        rest = self._times[-1] - first
        return Generated(
            text=self._shown,
            num_tokens=num_tokens,
            seconds_to_first_token=first - began,
            seconds_per_token=rest / (num_tokens - 1) if num_tokens > 1 else first - began,
        )

    def _show_up_to(self, text: str) -> None:
        self._show(text[len(self._shown) :])
        self._shown = text

    def _new_text(self) -> str:
        # Decoded behind its prompt, since a tokenizer drops the space that a text begins with.
        return self._text()[self._prompt_length :]

    def _text(self) -> str:
        text = self._tokenizer.decode(
            self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str), "what decode gives for one list of tokens"
        return text
