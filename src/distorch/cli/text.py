"""A language model's run: its text as it comes, then what it cost."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import typer

import distorch
from distorch.cli.generate import Generated, continue_text
from distorch.cli.loading import Wanted
from distorch.cli.output import Bar, printable, show_pairs
from distorch.errors import ModelError
from distorch.formats import open_checkpoint
from distorch.plan.plan import Plan, gib

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["write"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a run was and how it went; what cannot be told, since nothing streamed, is None."""

    prompt: str
    text: str
    num_tokens: int
    model_bytes: int
    bytes_by_tier: dict[str, int]
    ring_bytes: int
    peak_weight_bytes: int
    seconds_to_ready: float
    seconds_to_first_token: float
    seconds_per_token: float
    tokens_per_second: float
    transfer_hidden: float | None
    link_bytes_per_second: float | None
    E: float | None
    decoders: dict[str, str]

    @classmethod
    def of(
        cls, model: PreTrainedModel, prompt: str, said: Generated, seconds_to_ready: float
    ) -> Report:
        """Put together what the plan, the counters and the clock say."""
        handle = distorch.handle_of(model)
        plan, stats = handle.plan, handle.stats()
        visited, streamed = stats.num_visits > 0, stats.streamed_bytes > 0
        return cls(
            prompt=prompt,
            text=said.text,
            num_tokens=said.num_tokens,
            model_bytes=plan.model_bytes,
            bytes_by_tier=plan.bytes_by_tier,
            ring_bytes=plan.ring.nbytes,
            peak_weight_bytes=handle.weight_bytes,
            seconds_to_ready=seconds_to_ready,
            seconds_to_first_token=said.seconds_to_first_token,
            seconds_per_token=said.seconds_per_token,
            tokens_per_second=1 / said.seconds_per_token,
            transfer_hidden=stats.transfer_hidden if visited else None,
            link_bytes_per_second=stats.link_bytes_per_second if streamed else None,
            E=stats.efficiency if visited and stats.num_steps else None,
            decoders=_decoders(plan, model.dtype),
        )

    def table(self) -> list[tuple[str, str]]:
        """Return what was measured, as rows of a name and a value."""
        rows = [
            ("peak weight bytes", f"{gib(self.peak_weight_bytes)} on the compute device"),
            ("ready after", f"{self.seconds_to_ready:.2f} s"),
            ("first token after", f"{self.seconds_to_first_token:.3f} s"),
            (
                "each further token",
                f"{self.seconds_per_token:.3f} s ({self.tokens_per_second:.1f} a second)",
            ),
        ]
        if self.transfer_hidden is not None:
            rows.append(("transfer hidden", f"{self.transfer_hidden:.0%}"))
        if self.link_bytes_per_second is not None:
            rows.append(("link", f"{self.link_bytes_per_second / 1e9:.2f} GB/s"))
        if self.E is not None:
            rows.append(("E", f"{self.E:.2f} = max(compute, transfer) / time"))
        if self.decoders:
            rows.append(("decoding", _by_decoder(self.decoders)))
        return rows


def _decoders(plan: Plan, dtype: torch.dtype) -> dict[str, str]:
    """Name what decodes each packed format of the model; torch has been loaded by now."""
    parts = (part for placement in plan.placements for part in placement.block.parts)
    decoders_of = import_module("distorch.quant.dequantize").decoders_of
    found: dict[str, str] = decoders_of({part.dtype for part in parts}, plan.compute, dtype)
    return found


def _by_decoder(decoders: dict[str, str]) -> str:
    """Write ``Q4_K, Q6_K by C kernel; IQ2_S by torch (slower)``."""
    formats: dict[str, list[str]] = {}
    for name, decoder in decoders.items():
        formats.setdefault(decoder, []).append(name)
    slower = {decoder: " (slower)" if decoder == "torch" else "" for decoder in formats}
    return "; ".join(f"{', '.join(names)} by {by}{slower[by]}" for by, names in formats.items())


def _most_tokens(prompt: str) -> int:
    """How many tokens a prompt may have: one a byte, and some that mark where it begins."""
    return len(prompt.encode(errors="replace")) + 8


def write(
    path: Path,
    wanted: Wanted,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    as_json: bool,
) -> None:
    """Load a model, continue the prompt, and say how it went."""
    began = time.perf_counter()
    with open_checkpoint(path):
        pass  # a file that cannot be read says so at once, not after torch has been imported
    with Bar() as bar:
        model = wanted.load(path, bar, cache_tokens=_most_tokens(prompt) + max_new_tokens)
        _check_writes(model, path)
        wanted.add_loras({"model": distorch.handle_of(model)})
        bar.begin("tokenizer (half a minute, the first time)")
        tokenizer = distorch.load_tokenizer(path)
    seconds_to_ready = time.perf_counter() - began
    used = distorch.handle_of(model).plan
    plan = used.table() + (used.prediction.table() if used.prediction else [])
    show = _ignore if as_json else _show_now
    if wanted.explain and not as_json:
        show_pairs(plan)
        _show_now("\n")
    try:
        show(prompt)
        said = continue_text(
            model,
            tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            show=show,
        )
    finally:
        show("\n")
    report = Report.of(model, prompt, said, seconds_to_ready)
    if as_json:
        typer.echo(json.dumps(asdict(report)))
    else:
        _show_now("\n")
        show_pairs(([] if wanted.explain else plan) + report.table())


def _check_writes(model: object, path: Path) -> None:
    """Raise ModelError for a model that writes no text, before a tokenizer is looked for."""
    if hasattr(model, "generate"):
        return
    kind = type(model)
    hint = "a model with a language head, whose class is named ...ForCausalLM"
    if kind.__module__.startswith("diffusers."):
        hint = f"the directory of its whole pipeline, with --file transformer={path}"
    raise ModelError(f"a {kind.__name__} generates no text", hint=hint)


def _show_now(text: str) -> None:
    print(printable(text), end="", flush=True)  # noqa: T201


def _ignore(_text: str) -> None:
    pass
