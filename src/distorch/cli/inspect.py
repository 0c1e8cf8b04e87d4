"""``distorch inspect``: what a checkpoint holds."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, Final

import typer

from distorch.cli.demo import find_model
from distorch.cli.options import JsonOption, ModelArgument
from distorch.cli.output import Bar, show_pairs, show_table
from distorch.formats import Checkpoint, TensorInfo, open_checkpoint
from distorch.plan.plan import gib

__all__ = ["HELP", "inspect"]

HELP = """
Show what a checkpoint holds: its tensors, by the form they are stored in.

Reads the header only.

\b
Examples:
  distorch inspect demo
  distorch inspect model.gguf --json
"""

_MAX_CONFIG_BYTES: Final = 1 << 20
_MAX_NAME: Final = 100
_NUMBERED: Final = re.compile(r"(?:.*?\.)?[0-9]+(?=\.)")


def inspect(model: ModelArgument, as_json: JsonOption = False) -> None:
    """Describe a checkpoint."""
    with Bar() as bar:
        path = find_model(model, bar)
    with open_checkpoint(path) as checkpoint:
        facts = _facts(checkpoint)
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        _show(facts)


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "architecture": _architecture(checkpoint),
        "num_layers": _num_layers(checkpoint),
        "num_tensors": len(checkpoint),
        "num_parameters": sum(math.prod(info.shape) for info in checkpoint.values()),
        "nbytes": checkpoint.nbytes,
        "dtypes": _by_dtype(checkpoint.values()),
    }


def _by_dtype(infos: Iterable[TensorInfo]) -> dict[str, dict[str, int]]:
    """Count tensors and bytes of each form, the one with most bytes first."""
    num_tensors: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for info in infos:
        num_tensors[info.dtype] += 1
        nbytes[info.dtype] += info.nbytes
    return {
        dtype: {"num_tensors": num_tensors[dtype], "nbytes": total}
        for dtype, total in nbytes.most_common()
    }


def _num_layers(names: Iterable[str]) -> int:
    """Count the modules of the longest numbered list: ``blk.0``, ``blk.1``, ..."""
    layers = {found[0] for name in names if (found := _NUMBERED.match(name))}
    lists = Counter(layer.rpartition(".")[0] for layer in layers)
    return max(lists.values(), default=0)


def _architecture(checkpoint: Checkpoint) -> str | None:
    """Return what a GGUF's metadata or the ``config.json`` beside the weights calls the model."""
    if checkpoint.format == "gguf":
        named: object = checkpoint.metadata.get("general.architecture")
    else:
        named = _configured(checkpoint)
    return named[:_MAX_NAME] if isinstance(named, str) else None


def _configured(checkpoint: Checkpoint) -> object:
    try:
        with checkpoint.path.with_name("config.json").open("rb") as file:
            config = json.loads(file.read(_MAX_CONFIG_BYTES))
        return (config.get("architectures") or [config.get("_class_name")])[0]
    except (OSError, ValueError, AttributeError, LookupError, TypeError, RecursionError):
        return None  # a checkpoint is read well without one


def _show(facts: dict[str, Any]) -> None:
    show_pairs(
        [
            ("file", facts["path"]),
            ("format", facts["format"]),
            ("architecture", facts["architecture"] or "not said"),
            ("layers", f"{facts['num_layers']:,}"),
            ("tensors", f"{facts['num_tensors']:,}"),
            ("parameters", f"{facts['num_parameters']:,}"),
            ("bytes", gib(facts["nbytes"])),
        ]
    )
    print()  # noqa: T201
    total = max(facts["nbytes"], 1)
    show_table(
        ("stored as", "tensors", "bytes", "share"),
        [
            (name, f"{row['num_tensors']:,}", gib(row["nbytes"]), f"{row['nbytes'] / total:.1%}")
            for name, row in facts["dtypes"].items()
        ],
    )
