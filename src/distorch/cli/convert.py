"""``distorch convert``: a checkpoint in another format."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from distorch.cli.options import JsonOption
from distorch.cli.output import Bar, printable, show_table
from distorch.plan.plan import gib

if TYPE_CHECKING:
    from distorch.convert import Converted

__all__ = ["HELP", "convert"]

HELP = """
Write a checkpoint in another format: safetensors to GGUF, or to another dtype.

The suffix of OUT says what is written. A GGUF file takes F32, F16, BF16, Q4_0, Q5_0, Q8_0, Q2_K ...
Q6_K and most others; a safetensors file F32, F16, BF16, fp8_e4m3fn and fp8_e5m2. It works on a few
MiB at a time, and OUT is whole or not there.

A GGUF file is for models of images and videos in their authors' names, such as ComfyUI-GGUF and
diffusers load: flux, sd3, wan, qwen_image, hyvid, ltxv, sdxl and others. Vectors, convolutions and
the first and last layers stay precise, as in ComfyUI-GGUF's own files.

\b
Examples:
  distorch convert flux1-dev.safetensors flux1-dev-Q4_K.gguf --format Q4_K
  distorch convert wan.safetensors wan-fp8.safetensors --format fp8_e4m3fn --keep "*.modulation"
  distorch convert FLUX.1-dev/transformer flux-for-diffusers.gguf --format Q8_0
"""

_SHOWN: Final = 10  # tensors of one warning


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN",
            help="A safetensors file, index or directory, or a GGUF file.",
            show_default=False,
        ),
    ],
    target: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="A .gguf or .safetensors file.", show_default=False),
    ],
    *,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="NAME",
            help="How weights are stored: Q4_K, Q8_0, BF16, fp8_e4m3fn, ...",
            show_default=False,
        ),
    ],
    architecture: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The model, if its tensors do not tell: flux, wan, ..."),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help='Tensors that stay as they are: "final_layer.*". May be given more than once.',
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it is there.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Convert a checkpoint, and say what became of it."""
    with Bar() as bar:
        bar.begin("reading the header")
        from distorch.convert import convert as run

        done = run(
            source,
            target,
            form,
            architecture=architecture,
            keep=tuple(keep or ()),
            overwrite=overwrite,
            progress=bar.counting(f"writing {target.name}"),
        )
    for line in _remarks(done):
        print(printable(line), file=sys.stderr)  # noqa: T201
    if as_json:
        typer.echo(json.dumps(_facts(done)))
    else:
        _show(done)


def _remarks(done: Converted) -> list[str]:
    return [
        *(f"note: {note}" for note in done.recipe.notes),
        *_warnings(done.nonfinite, "NaN or infinite"),
        *_warnings(done.overflowed, f"too large for {done.recipe.format}"),
    ]


def _warnings(counts: Mapping[str, int], what: str) -> list[str]:
    bad = [(name, count) for name, count in counts.items() if count]
    lines = [f"warning: {name}: {count:,} weights are {what}" for name, count in bad[:_SHOWN]]
    return lines + [f"warning: and so in {len(bad) - _SHOWN} more tensors"] * (len(bad) > _SHOWN)


def _by_dtype(done: Converted) -> dict[str, dict[str, int]]:
    num_tensors: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for output in done.recipe.outputs:
        num_tensors[output.dtype.name] += 1
        nbytes[output.dtype.name] += output.nbytes
    return {
        name: {"num_tensors": num_tensors[name], "nbytes": total}
        for name, total in nbytes.most_common()
    }


def _facts(done: Converted) -> dict[str, Any]:
    return {
        "architecture": done.recipe.architecture,
        "format": done.recipe.format,
        "dtypes": _by_dtype(done),
        "read_bytes": done.read_bytes,
        "written_bytes": done.written_bytes,
        "seconds": done.seconds,
        "notes": list(done.recipe.notes),
        "nonfinite": dict(+done.nonfinite),
        "overflowed": dict(+done.overflowed),
    }


def _show(done: Converted) -> None:
    rows = [
        (name, f"{row['num_tensors']:,}", gib(row["nbytes"]))
        for name, row in _by_dtype(done).items()
    ]
    show_table(("stored as", "tensors", "bytes"), rows)
    kind = f" of the architecture {done.recipe.architecture}" if done.recipe.architecture else ""
    typer.echo(
        f"\nread {gib(done.read_bytes)}, wrote {gib(done.written_bytes)}{kind} "
        f"in {done.seconds:,.1f} s"
    )
