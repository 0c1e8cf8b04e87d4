"""A pipeline's directory: which models are in it, and diffusers' way of putting them together."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import diffusers
import transformers
from diffusers import DiffusionPipeline
from torch import nn
from transformers import PreTrainedModel

from distorch.errors import ModelError, one_line

__all__ = ["assemble", "models_in", "needed_by"]

_WEIGHTS = {".safetensors", ".gguf"}


def models_in(path: Path, elsewhere: Collection[str] = ()) -> list[str]:
    """Return the names of the models with weights in a pipeline's directory, or ``elsewhere``.

    Raises:
        ModelError: its ``model_index.json`` is no index of a pipeline, or lacks such a model; or
            the directory lacks what the index or its class names.
    """
    index = _index(path)
    entries, pipeline_class = _entries(index, path), _class(index, path)
    strange = [name for name in elsewhere if name not in entries]
    if strange:
        raise ModelError(
            f"the pipeline in {path} has no model {strange[0]!r}: it has {', '.join(entries)}",
            hint='files={"transformer": "flux1-dev-Q4_K.gguf"}',
        )
    lacking = [name for name in needed_by(pipeline_class) if name not in entries]
    if lacking:
        raise ModelError(
            f"{path / 'model_index.json'} names no {lacking[0]}, which a "
            f"{pipeline_class.__name__} has",
            hint="the directory as it was saved",
        )
    saved = [name for name, entry in entries.items() if entry is not None]
    models = [
        name
        for name in entries
        if name in elsewhere or (name in saved and _weights_in(path / name))
    ]
    for name in saved:
        if name not in models and not any((path / name).glob("*config.json")):
            raise ModelError(
                f"{path} lacks its {name}: there is no folder of that name, or nothing in it",
                hint="download all of it; for a model's weights also --file NAME=FILE, or files=",
            )
    return models


def assemble(path: Path, models: Mapping[str, nn.Module]) -> Any:
    """Let diffusers put a pipeline together around models that are built already.

    Raises:
        ModelError: it cannot, or a model is of another class than the pipeline's.
    """
    index = _index(path)
    entries = _entries(index, path)
    for name, model in models.items():
        _check_class(name, model, entries[name])
    absent = {name: None for name, entry in entries.items() if entry is None}
    given: dict[str, Any] = absent | dict(models)
    make: Any = _class(index, path).from_pretrained  # diffusers has no types
    try:
        return make(path, local_files_only=True, use_safetensors=True, **given)
    except Exception as error:
        raise ModelError(
            f"diffusers cannot make a pipeline of {path}: {one_line(error)}",
            hint="the directory as it was saved: each component in a folder of its own",
        ) from error


def needed_by(pipeline_class: type[DiffusionPipeline]) -> list[str]:
    """Return the components that a class of pipelines cannot do without."""
    optional = pipeline_class._optional_components  # noqa: SLF001  (diffusers' only list of them)
    return [
        name
        for name, parameter in list(signature(pipeline_class.__init__).parameters.items())[1:]
        if parameter.default is Parameter.empty and name not in optional
    ]


def _check_class(name: str, model: nn.Module, entry: tuple[str, str] | None) -> None:
    """Refuse a model of another family."""
    if entry is None or entry[1].startswith("AutoModel"):
        return
    wanted = _class_of(*entry)
    if not isinstance(model, wanted) and not _are_kin(type(model), wanted):
        raise ModelError(
            f"the pipeline's {name} is a {entry[1]}, and the file for it holds a "
            f"{type(model).__name__}",
            hint="a file of the pipeline's own family",
        )


def _are_kin(one: type, other: type) -> bool:
    """Whether two of transformers' models are of one family.

    One with a head may stand for one without, and a text model for one that sees as well.
    """
    if not issubclass(one, PreTrainedModel) or not issubclass(other, PreTrainedModel):
        return False
    kinds = [getattr(each.config_class, "model_type", "") for each in (one, other)]
    return kinds[0].startswith(kinds[1]) or kinds[1].startswith(kinds[0])


def _class(index: Mapping[str, Any], path: Path) -> type[DiffusionPipeline]:
    """The pipeline's own class: asked of a base, diffusers loads what is optional once more."""
    name = index.get("_class_name")
    found = getattr(diffusers, str(name), None)
    if isinstance(found, type) and DiffusionPipeline in found.__mro__[1:]:
        return found
    raise ModelError(
        f"{path / 'model_index.json'} names the class {name!r}, which is no pipeline of "
        f"diffusers {diffusers.__version__}",
        hint="a newer diffusers, if it has one; code in a directory is not run",
    )


def _entries(index: Mapping[str, Any], path: Path) -> dict[str, tuple[str, str] | None]:
    """A pipeline's components: the library and the class of each, or None if it is left out."""
    found: dict[str, tuple[str, str] | None] = {}
    for name, entry in index.items():
        match entry:
            case [None, None]:
                found[name] = None
            case [str(library), str(class_name)] if name.isidentifier() and isinstance(
                _class_of(library, class_name), type
            ):
                found[name] = library, class_name
            case [*_] if not name.startswith("_"):
                raise ModelError(
                    f"{path / 'model_index.json'} has {json.dumps(entry)[:80]} for its {name}, "
                    "which is no class of diffusers or transformers",
                    hint="newer libraries, if they have it; code in a directory is not run",
                )
    return found


def _class_of(library: str, class_name: str) -> Any:
    """A class of transformers, of diffusers, or of a module beside one of its pipelines."""
    homes = {"diffusers": diffusers, "transformers": transformers}
    home = homes.get(library) or getattr(diffusers.pipelines, library, None)
    return getattr(home, class_name, None)


def _weights_in(folder: Path) -> bool:
    return any(each.suffix in _WEIGHTS for each in folder.glob("*"))


def _index(path: Path) -> dict[str, Any]:
    index = path / "model_index.json"
    try:
        found = json.loads(index.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        problem = str(error)
    else:
        if isinstance(found, dict):
            return found
        problem = f"it is a {type(found).__name__}, not an object"
    raise ModelError(
        f"{index} is no index of a pipeline: {problem}",
        hint="the file may be damaged; download it again",
    )
