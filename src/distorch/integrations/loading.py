"""Loads models that have never been in memory: of transformers, of diffusers, whole pipelines."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distorch.allocation import Allocation
from distorch.errors import ModelError
from distorch.formats import Checkpoint, open_checkpoint
from distorch.integrations.attach import Handle, Progress
from distorch.integrations.extras import need
from distorch.integrations.huggingface.computing import read_dtype, stored_dtype, usual_dtype
from distorch.integrations.module_tree import Tree, describe
from distorch.integrations.request import Request
from distorch.machine import Machine
from distorch.plan.plan import Plan
from distorch.tiers import Source

if TYPE_CHECKING:
    import torch

    from distorch.integrations.huggingface.skeleton import Built

__all__ = ["load"]

_INDEX = "model_index.json"  # of a pipeline of diffusers


def load(  # noqa: PLR0913  (each is one thing that a user may ask for)
    path: str | os.PathLike[str],
    allocation: str | Allocation | Plan | None = None,
    *,
    virtual_vram_gb: float | None = None,
    donor: str | Sequence[str] | None = None,
    compute: str | None = None,
    ring: str | int | None = None,
    weight_dtype: str | None = None,
    compute_dtype: str | torch.dtype | None = None,
    cache_tokens: int | None = None,
    components: Mapping[str, str] | None = None,
    files: Mapping[str, str | os.PathLike[str]] | None = None,
    machine: Machine | None = None,
    progress: Progress | None = None,
) -> Any:
    """Build the model or the pipeline at ``path``, distributed; it is never whole in memory.

    ``path`` is a GGUF or safetensors file, a directory of transformers or diffusers, or the
    directory of a whole pipeline of diffusers. Single files of image and video models may be in
    the layout of their authors (as for ComfyUI) or in diffusers' own. What comes is of
    transformers' or diffusers' own class. Each weight is read once, straight to where the plan has
    it rest, in the form it has on disk. Other arguments are those of `distorch.distribute`;
    ``distorch.handle_of(model)`` is the handle. Nothing is fetched from a network, and no code that
    comes with a model is run.

    ``files`` takes some models of a pipeline from elsewhere:
    ``{"transformer": "flux1-dev-Q4_K.gguf"}``; the directory then need not hold their weights.

    ``weight_dtype`` brings matrices into another format while they are read, a few MiB at a time:
    ``"fp8_e4m3fn"``, ``"fp8_e5m2"``, ``"fp16"``, ``"bf16"``, ``"f32"``, ``"q8_0"`` or another of
    GGUF's. What then rests on disk is a copy in that format, in the folder that the line names or
    the temporary one. ``compute_dtype`` is what the model computes in: by default the dtype of the
    configuration beside safetensors, and of a GGUF float32 on the CPU, bfloat16 on an accelerator.

    ``cache_tokens`` leaves room on the device that computes for what a language model keeps of a
    text of so many tokens (its KV cache), in every plan until the handle is removed.

    Raises:
        StorageError, FormatError: the path holds no whole checkpoint.
        ModelError: its architecture or its tensors are not ones that can be loaded.
        AllocationError: the line does not fit this machine.
        MissingExtraError: transformers or diffusers is not installed.
    """
    request = Request(
        allocation=allocation,
        virtual_vram_gb=virtual_vram_gb,
        donor=donor,
        compute=compute,
        ring=ring,
    )
    dtype = read_dtype(compute_dtype)
    opened = partial(
        _opened, request=request, dtype=dtype, weight_dtype=weight_dtype, machine=machine
    )
    if (Path(path) / _INDEX).is_file():
        return _pipeline(
            Path(path), dict(files or {}), opened, request, components, machine, progress
        )
    if components is not None or files is not None:
        raise ModelError(
            f"components are of a pipeline, and {path} is a single model",
            hint="distorch.load(path, line)",
        )
    module, tree, source = opened(path)
    with ExitStack() as undone:
        undone.callback(source.close)
        tree = replace(tree, beside_bytes=_cache_bytes(module, cache_tokens))
        Handle(module, tree, source).bind(request, machine, progress)
        undone.pop_all()
    return module


def _opened(
    path: str | os.PathLike[str],
    *,
    request: Request,
    dtype: torch.dtype | None,
    weight_dtype: str | None,
    machine: Machine | None,
) -> tuple[Any, Tree, Source]:
    """Build a model without memory and open its files.

    What was read of the headers (a vocabulary) is let go of here, before the weights come.
    """
    with open_checkpoint(path) as checkpoint:
        built = _built(checkpoint, request, dtype, machine)
    built, source = built.open(weight_dtype)
    tree = describe(built.model, built.stored)
    return built.model, replace(tree, notes=built.notes + tree.notes), source


def _built(
    checkpoint: Checkpoint, request: Request, dtype: torch.dtype | None, machine: Machine | None
) -> Built:
    """Build a checkpoint's model without memory, by the library whose model it is."""
    if _is_of_diffusers(checkpoint):
        dtype = dtype or stored_dtype(checkpoint.values())
        dtype = dtype or usual_dtype(request, checkpoint.nbytes, machine)
        models = _needed("diffusers", "distorch.integrations.diffusers.models")
        return models.build(checkpoint, dtype)  # type: ignore[no-any-return]  # imported by name
    kind = "safetensors"
    if checkpoint.format == "gguf":
        kind, dtype = "gguf", dtype or usual_dtype(request, checkpoint.nbytes, machine)
    builder = _needed("transformers", f"distorch.integrations.huggingface.{kind}_model")
    return builder.build(checkpoint, dtype)  # type: ignore[no-any-return]  # imported by name


def _cache_bytes(model: Any, num_tokens: int | None) -> int:
    if not num_tokens or not hasattr(model, "can_generate"):
        return 0
    cache = _needed("transformers", "distorch.integrations.huggingface.cache")
    return int(cache.cache_bytes(model, num_tokens))


def _is_of_diffusers(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is an image or video model's: nothing heavy is imported to tell."""
    if checkpoint.format == "gguf":
        return "token_embd.weight" not in checkpoint
    try:
        config = json.loads((checkpoint.path.parent / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return not any(name.startswith(("model.layers.", "encoder.")) for name in checkpoint)
    return isinstance(config, dict) and "_class_name" in config


def _pipeline(
    path: Path,
    files: Mapping[str, str | os.PathLike[str]],
    opened: Callable[[str | os.PathLike[str]], tuple[Any, Tree, Source]],
    request: Request,
    components: Mapping[str, str] | None,
    machine: Machine | None,
    progress: Progress | None,
) -> Any:
    """Build a pipeline whose models have no memory, and distribute them."""
    pipelines = _needed("diffusers", "distorch.integrations.diffusers.pipelines")
    directory = _needed("diffusers", "distorch.integrations.diffusers.directory")
    with ExitStack() as undone:
        found = {}
        for name in directory.models_in(path, files):
            module, tree, source = opened(files.get(name, path / name))
            undone.callback(source.close)
            found[name] = pipelines.Component(name, module, tree, source)
        pipe = directory.assemble(path, {name: model.module for name, model in found.items()})
        pipelines.distribute_pipeline(
            pipe, request, components=components, machine=machine, progress=progress, found=found
        )
        undone.pop_all()
    return pipe


def _needed(library: str, module: str) -> Any:
    """Import one of our modules that needs a library."""
    need(library, "loading this model")
    return import_module(module)
