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
from distorch.integrations.huggingface.computing import read_dtype, usual_dtype
from distorch.integrations.module_tree import describe
from distorch.integrations.request import Request
from distorch.machine import Machine
from distorch.plan.plan import Plan

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["load", "load_tokenizer"]


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
    machine: Machine | None = None,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Build the language model in a GGUF file or a safetensors directory, distributed.

    The model is transformers' own class, built without memory; each weight is read once, straight
    to where the plan has it rest, in the form it has on disk. Other arguments are those of
    `distribute`; ``distorch.handle_of(model)`` is the handle. Nothing is fetched from a network,
    and no code that comes with a model is run.

    ``weight_dtype`` brings matrices into another format while they are read, a few MiB at a time:
    ``"fp8_e4m3fn"``, ``"fp8_e5m2"``, ``"fp16"``, ``"bf16"``, ``"f32"``, ``"q8_0"`` or another of
    GGUF's. What then rests on disk is a copy in that format, in the folder that the line names or
    the temporary one. ``compute_dtype`` is what the model computes in: by default the dtype of the
    configuration beside safetensors, and of a GGUF float32 on the CPU, bfloat16 on an accelerator.

    Raises:
        StorageError, FormatError: the path holds no whole checkpoint.
        ModelError: its architecture or its tensors are not ones that can be loaded.
        AllocationError: the line does not fit this machine.
        MissingExtraError: transformers is not installed.
    """
    _need_transformers()
    from distorch.integrations.huggingface import gguf_model, safetensors_model  # noqa: PLC0415  heavy

    request = Request(
        allocation=allocation,
        virtual_vram_gb=virtual_vram_gb,
        donor=donor,
        compute=compute,
        ring=ring,
    )
    dtype = read_dtype(compute_dtype)
    with open_checkpoint(path) as checkpoint:
        if checkpoint.format == "gguf":
            dtype = dtype or usual_dtype(request, checkpoint.nbytes, machine)
            built = gguf_model.build(checkpoint, dtype)
        else:
            built = safetensors_model.build(checkpoint, dtype)
    built, source = built.open(weight_dtype)
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
