"""``distorch run``: text from a model whose weights rest where they were told to."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import distorch
from distorch.cli.demo import find_model
from distorch.cli.generate import Generated, continue_text
from distorch.cli.options import (
    AllocationOption,
    ComputeDtypeOption,
    ComputeOption,
    DonorOption,
    JsonOption,
    ModelArgument,
    Placement,
    RingOption,
    VirtualVramOption,
    WeightDtypeOption,
)
from distorch.cli.output import Bar, printable, show_pairs
from distorch.cli.plan import read_plan
from distorch.errors import AllocationError
from distorch.formats import open_checkpoint
from distorch.plan.plan import Plan, gib

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["HELP", "run"]

HELP = """
Generate text with a language model whose weights rest in several memories.

\b
Examples:
  distorch run demo --allocation "cpu,64mb;disk,*" --prompt "The capital of France is"
  distorch run model.gguf --virtual-vram 8 --donor disk --prompt "Once upon a time"
  distorch run model.gguf --plan plan.json --prompt "Once upon a time"
  distorch run model-directory --weight-dtype fp8_e4m3fn --prompt "Once upon a time"
  distorch run model-directory --prompt "Hello" --temperature 0.8 --seed 7 --json
"""

PromptOption = Annotated[
    str, typer.Option(metavar="TEXT", help="The text to continue.", show_default=False)
]
NumOption = Annotated[int, typer.Option(metavar="N", min=1, help="At most so many tokens more.")]
TemperatureOption = Annotated[
    float, typer.Option(metavar="T", min=0, help="Draw tokens at random; 0 takes the likeliest.")
]
PlanOption = Annotated[
    Path | None,
    typer.Option("--plan", metavar="FILE", help="A plan that `distorch plan --save` wrote."),
]
SeedOption = Annotated[int, typer.Option(metavar="N", min=0, help="What the drawing begins with.")]


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


def run(
    model: ModelArgument,
    *,
    prompt: PromptOption,
    allocation: AllocationOption = None,
    virtual_vram: VirtualVramOption = None,
    donor: DonorOption = None,
    compute: ComputeOption = None,
    ring: RingOption = None,
    weight_dtype: WeightDtypeOption = None,
    compute_dtype: ComputeDtypeOption = None,
    plan: PlanOption = None,
    max_new_tokens: NumOption = 64,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Load a model, continue the prompt, and say how it went."""
    began = time.perf_counter()
    placement = Placement(
        allocation=allocation, virtual_vram=virtual_vram, donor=donor, compute=compute, ring=ring
    )
    loaded, tokenizer = _load(
        model,
        placement,
        None if plan is None else _saved(plan, placement),
        weight_dtype=weight_dtype,
        compute_dtype=compute_dtype,
    )
    seconds_to_ready = time.perf_counter() - began
    show = _ignore if as_json else _show_now
    try:
        show(prompt)
        said = continue_text(
            loaded,
            tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            show=show,
        )
    finally:
        show("\n")
    report = Report.of(loaded, prompt, said, seconds_to_ready)
    if as_json:
        typer.echo(json.dumps(asdict(report)))
    else:
        _show_now("\n")
        used = distorch.handle_of(loaded).plan
        foretold = used.prediction
        show_pairs(used.table() + (foretold.table() if foretold else []) + report.table())


def _saved(path: Path, placement: Placement) -> Plan:
    if placement != Placement():
        raise AllocationError(
            "--plan says all of where the weights rest, and another option says it too",
            hint=f"--plan {path} alone",
        )
    return read_plan(path)


def _load(
    model: str,
    placement: Placement,
    plan: Plan | None,
    *,
    weight_dtype: str | None,
    compute_dtype: str | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    with Bar() as bar:
        path = find_model(model, bar)
        with open_checkpoint(path):
            pass  # a file that cannot be read says so at once, not after torch has been imported
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice is for programmers
        bar.begin("starting torch and transformers")
        loaded = distorch.load(
            path,
            plan or placement.allocation,
            virtual_vram_gb=placement.virtual_vram,
            donor=placement.donor,
            compute=placement.compute,
            ring=placement.ring_bytes,
            weight_dtype=weight_dtype,
            compute_dtype=compute_dtype,
            progress=bar.counting("loading the weights"),
        )
        bar.begin("tokenizer (half a minute, the first time)")
        return loaded, distorch.load_tokenizer(path)


def _show_now(text: str) -> None:
    print(printable(text), end="", flush=True)  # noqa: T201


def _ignore(_text: str) -> None:
    pass
