"""How a command is to load what it runs: where it rests, in which format, with which LoRAs."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

import distorch
from distorch.cli.options import Placement
from distorch.cli.output import Bar
from distorch.errors import AllocationError, ModelError
from distorch.plan.plan import Plan

__all__ = ["Wanted", "named"]

_QUIET = {  # libraries' advice is for programmers, and there is a bar already
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
}
_MAIN = ("model", "transformer", "unet")  # what a LoRA is for, unless it says


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the options say of it; ``loras`` are ``[NAME=]FILE[:STRENGTH]``.

    ``components`` and ``files`` are lines and files of single models of a pipeline, by name.
    """

    placement: Placement
    plan: Plan | None = None
    weight_dtype: str | None = None
    compute_dtype: str | None = None
    loras: Sequence[str] = ()
    components: Mapping[str, str] | None = None
    files: Mapping[str, str] | None = None
    explain: bool = False

    def __post_init__(self) -> None:
        """Refuse two answers to one question."""
        if self.plan is not None and self.placement != Placement():
            raise AllocationError(
                "--plan says all of where the weights rest, and another option says it too",
                hint="--plan alone",
            )

    def load(self, path: Path, bar: Bar, **more: Any) -> Any:
        """Load a model or a pipeline; ``more`` goes to `distorch.load`."""
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        bar.begin("starting torch and its libraries")
        return distorch.load(
            path,
            self.plan or self.placement.allocation,
            virtual_vram_gb=self.placement.virtual_vram,
            donor=self.placement.donor,
            compute=self.placement.compute,
            ring=self.placement.ring_bytes,
            weight_dtype=self.weight_dtype,
            compute_dtype=self.compute_dtype,
            components=self.components,
            files=self.files,
            progress=bar.counting("loading the weights"),
            **more,
        )

    def add_loras(self, models: Mapping[str, distorch.Handle]) -> None:
        """Add the LoRAs, each to the model that it names, or to the one that does the most.

        Raises:
            ModelError: there is no such model, or the LoRA is not for it.
        """
        main = next((name for name in _MAIN if name in models), next(iter(models)))
        for given in self.loras:
            name, is_named, file = given.rpartition("=")
            name = name if is_named else main
            if name not in models:
                raise ModelError(
                    f"--lora {given}: there is no model {name!r}, but {', '.join(models)}",
                    hint=f"--lora {main}={file}",
                )
            path, strength = _strength(file)
            with warnings.catch_warnings(record=True) as notes:
                warnings.simplefilter("always")
                models[name].add_lora(path, strength)
            for note in notes:
                typer.echo(f"note: {note.message}", err=True)


def _strength(file: str) -> tuple[str, float]:
    """Read ``FILE[:STRENGTH]``.

    >>> _strength("style.safetensors:0.8"), _strength("C:/style.safetensors")
    (('style.safetensors', 0.8), ('C:/style.safetensors', 1.0))
    """
    path, _, strength = file.rpartition(":")
    try:
        return (path, float(strength)) if path else (file, 1.0)
    except ValueError:
        return file, 1.0


def named(option: str, given: Sequence[str], example: str) -> dict[str, str] | None:
    """Read ``NAME=VALUE`` of an option that may be given several times; None if it is not.

    >>> named("--component", ["vae=cpu,*"], "vae=cpu,*")
    {'vae': 'cpu,*'}

    Raises:
        ModelError: one has no ``=``.
    """
    pairs = [text.partition("=") for text in given]
    for name, equals, value in pairs:
        if not (name and equals and value):
            raise ModelError(
                f"{option} {name}{equals}{value} is not NAME=VALUE", hint=f'{option} "{example}"'
            )
    return {name: value for name, _, value in pairs} or None
