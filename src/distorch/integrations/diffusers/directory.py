"""A pipeline's directory: which models are in it, and diffusers' way of putting them together."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from torch import nn

from distorch.errors import ModelError

__all__ = ["assemble", "models_in"]

_WEIGHTS = {".safetensors", ".gguf"}


def models_in(path: Path, elsewhere: Collection[str] = ()) -> list[str]:
    """Return the names of the models with weights in a pipeline's directory, or ``elsewhere``.

    Raises:
        ModelError: its ``model_index.json`` is no index of a pipeline, or lacks such a model.
    """
    entries = _entries(path)
    strange = [name for name in elsewhere if name not in entries]
    if strange:
        raise ModelError(
            f"the pipeline in {path} has no model {strange[0]!r}: it has {', '.join(entries)}",
            hint='files={"transformer": "flux1-dev-Q4_K.gguf"}',
        )
    return [
        name
        for name, is_there in entries.items()
        if name in elsewhere
        or (is_there and any(it.suffix in _WEIGHTS for it in (path / name).glob("*")))
    ]


def assemble(path: Path, models: Mapping[str, nn.Module]) -> Any:
    """Let diffusers put a pipeline together around models that are built already.

    Raises:
        ModelError: it cannot.
    """
    absent = {name: None for name, is_there in _entries(path).items() if not is_there}
    given: dict[str, Any] = absent | dict(models)
    make: Any = _class(path).from_pretrained  # diffusers has no types
    try:
        return make(path, local_files_only=True, **given)
    except Exception as error:
        raise ModelError(
            f"diffusers cannot make a pipeline of {path}: {error}",
            hint="the directory as it was saved: each component in a folder of its own",
        ) from error


def _class(path: Path) -> type[DiffusionPipeline]:
    """The pipeline's own class: asked of a base, diffusers loads what is optional once more."""
    name = str(_index(path).get("_class_name"))
    found = getattr(diffusers, name, None)
    if not isinstance(found, type) or not issubclass(found, DiffusionPipeline):
        raise ModelError(
            f"{path} is a {name}, which is no pipeline of diffusers {diffusers.__version__}",
            hint="a newer diffusers, if it has one; code in a directory is not run",
        )
    return found


def _entries(path: Path) -> dict[str, bool]:
    """A pipeline's components by name, and whether it was saved with them."""
    return {name: any(entry) for name, entry in _index(path).items() if isinstance(entry, list)}


def _index(path: Path) -> dict[str, Any]:
    index = path / "model_index.json"
    try:
        return dict(json.loads(index.read_bytes()))
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{index} is no index of a pipeline: {error}",
            hint="the file may be damaged; download it again",
        ) from error
