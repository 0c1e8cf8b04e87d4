"""transformers: a file or a directory becomes a model whose weights are distributed as stored."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from distorch.allocation import Allocation
from distorch.errors import MissingExtraError
from distorch.formats import open_checkpoint
from distorch.integrations.attach import Handle, Progress
from distorch.integrations.module_tree import describe
from distorch.integrations.request import Request
from distorch.machine import Machine
from distorch.plan.plan import Plan
from distorch.tiers.sources import FileSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["load", "load_tokenizer"]


def load(
    path: str | os.PathLike[str],
    allocation: str | Allocation | Plan | None = None,
    *,
    virtual_vram_gb: float | None = None,
    donor: str | Sequence[str] | None = None,
    compute: str | None = None,
    ring: str | int | None = None,
    machine: Machine | None = None,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Build the language model in a GGUF file or a safetensors directory, distributed.

    The model is transformers' own class, built without memory; each weight is read once, straight
    to where the plan has it rest, in the form it has on disk. A GGUF computes in float32, a
    safetensors model in the dtype of its configuration. Other arguments are those of `distribute`;
    ``distorch.handle_of(model)`` is the handle. Nothing is fetched from a network, and no code that
    comes with a model is run.

    Raises:
        StorageError, FormatError: the path holds no whole checkpoint.
        ModelError: its architecture or its tensors are not ones that can be loaded.
        AllocationError: the line does not fit this machine.
        MissingExtraError: transformers is not installed.
    """
    _need_transformers()
    from distorch.integrations.huggingface import gguf_model, safetensors_model  # noqa: PLC0415  heavy

    with open_checkpoint(path) as checkpoint:
        build = gguf_model.build if checkpoint.format == "gguf" else safetensors_model.build
        built = build(checkpoint)
    source = FileSource(built.infos, built.amend)
    request = Request(
        allocation=allocation,
        virtual_vram_gb=virtual_vram_gb,
        donor=donor,
        compute=compute,
        ring=ring,
    )
    try:
        tree = describe(built.model, built.stored)
        tree = replace(tree, notes=built.notes + tree.notes)
        handle = Handle(built.model, tree, source)
        handle.bind(request, machine, progress)
    except BaseException:
        source.close()
        raise
    return built.model


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a GGUF file or a model directory.

    transformers takes 10-20 s to convert a large vocabulary from a GGUF: that happens once, and the
    result is kept in the user's cache under the checksum of the file's header.

    Raises:
        StorageError, FormatError: the path holds no checkpoint.
        ModelError: it has no tokenizer that transformers can read.
        MissingExtraError: transformers is not installed.
    """
    _need_transformers()
    from distorch.integrations.huggingface import tokenizer  # noqa: PLC0415  heavy

    return tokenizer.load(path)


def _need_transformers() -> None:
    try:
        import transformers  # noqa: F401, PLC0415  only to see that it is there
    except ImportError as error:
        raise MissingExtraError(
            "loading a model needs transformers, which is not installed",
            hint='pip install "distorch[transformers]"',
        ) from error
