"""A pipeline's directory: which models are in it, and diffusers' way of putting them together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from distorch.errors import ModelError

__all__ = ["assemble", "models_in"]

_WEIGHTS = {".safetensors", ".gguf"}


def models_in(path: Path) -> list[str]:
    """Return the names of the models with weights in a pipeline's directory.

    Raises:
        ModelError: its ``model_index.json`` is no index of a pipeline.
    """
    return [
        name
        for name, is_there in _entries(path).items()
        if is_there and any(it.suffix in _WEIGHTS for it in (path / name).glob("*"))
    ]


def assemble(path: Path, models: Mapping[str, nn.Module]) -> Any:
    """Let diffusers put a pipeline together around models that are built already.

    Raises:
        ModelError: it cannot.
    """
    given: dict[str, Any] = dict(models)
    given |= {name: None for name, is_there in _entries(path).items() if not is_there}
    make: Any = DiffusionPipeline.from_pretrained  # diffusers has no types
    try:
        return make(path, local_files_only=True, **given)
    except Exception as error:
        raise ModelError(
            f"diffusers cannot make a pipeline of {path}: {error}",
            hint="the directory as it was saved: each component in a folder of its own",
        ) from error


def _entries(path: Path) -> dict[str, bool]:
    """A pipeline's components by name, and whether it was saved with them."""
    index = path / "model_index.json"
    try:
        said = json.loads(index.read_bytes())
        return {name: any(entry) for name, entry in said.items() if isinstance(entry, list)}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{index} is no index of a pipeline: {error}",
            hint="the file may be damaged; download it again",
        ) from error
