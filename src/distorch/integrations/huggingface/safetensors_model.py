"""A directory of safetensors and a configuration as a transformers model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import transformers
from transformers import GenerationConfig, PretrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from distorch.errors import ModelError
from distorch.formats import Checkpoint
from distorch.formats.scales import Scaled, pair_scales
from distorch.integrations.huggingface.classes import model_class, read_config
from distorch.integrations.huggingface.computing import stored_dtype
from distorch.integrations.huggingface.scales import read_scales
from distorch.integrations.huggingface.skeleton import Built, build_empty, check_layers, match
from distorch.integrations.resting import TORCH_DTYPES

__all__ = ["build"]


def build(checkpoint: Checkpoint, dtype: torch.dtype | None) -> Built:
    """Build the model of a safetensors directory, on the meta device.

    It computes in ``dtype``, or else in the one of its configuration.

    Raises:
        ModelError: there is no configuration, or it and the tensors do not agree.
    """
    folder = checkpoint.path.parent
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} has no config.json: a safetensors file alone does not say what model it is",
            hint="the directory as it was saved: config.json beside the weights",
        )
    config = read_config(folder)
    check_layers(config.to_dict(), checkpoint)
    tile = _forget_quantization(config)
    model = build_empty(model_class(config), config, dtype or _dtype(config, checkpoint))
    if (folder / "generation_config.json").is_file():
        model.generation_config = _generation_config(folder)
    scaled = pair_scales(checkpoint)
    names = _names(model, scaled.tensors)
    infos = {names[name]: info for name, info in scaled.tensors.items()}
    found = read_scales(checkpoint, scaled, tile)
    scales = {names[name]: scale for name, scale in found.items()}
    buffers = dict(model.named_buffers())
    for name in buffers.keys() & infos.keys():
        value = torch.frombuffer(bytearray(checkpoint.view(infos[name].name)), dtype=torch.uint8)
        buffers[name].copy_(value.view(TORCH_DTYPES[infos[name].dtype]).view(buffers[name].shape))
    ignored = [*buffers, *_tied(model)]
    return Built(
        model=model,
        infos=match(model, infos, checkpoint.path, ignored=ignored, scaled=scales),
        scales=scales,
        notes=_notes(scaled),
    )


def _forget_quantization(config: PretrainedConfig) -> tuple[int, int] | None:
    """Return how many rows and columns one scale is for, if the configuration says so.

    The model is built of plain layers, whatever else it says: their weights answer for themselves.
    """
    said = config.__dict__.pop("quantization_config", None)
    tile = said.get("weight_block_size") if isinstance(said, dict) else None
    if not isinstance(tile, list) or len(tile) != 2:  # noqa: PLR2004  rows and columns
        return None
    rows, columns = tile
    known = all(type(size) is int and size > 0 for size in tile)
    return (rows, columns) if known else None


def _notes(scaled: Scaled) -> tuple[str, ...]:
    unused = [name for name in scaled.unused if not name.endswith("scaled_fp8")]
    if not unused:
        return ()
    more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
    return (f"{unused[0]}{more} is not used: activations are not rounded",)


def _generation_config(folder: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ModelError(
            f"transformers cannot read {folder / 'generation_config.json'}: {error}",
            hint="remove the file: it only holds defaults",
        ) from error


def _dtype(config: PretrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of the configuration, else the one most of the bytes are stored in."""
    configured = getattr(config, "dtype", None)
    if isinstance(configured, torch.dtype):
        return configured
    return stored_dtype(checkpoint.values()) or torch.float32


def _names(model: transformers.PreTrainedModel, tensors: Iterable[str]) -> dict[str, str]:
    """The model's names of tensors: transformers has renamed modules since files were written.

    And a base model's checkpoint lacks the prefix of a model with a head, or the other way about.
    """
    names = {*dict(model.named_parameters()), *dict(model.named_buffers())}
    prefix = f"{model.base_model_prefix}."
    changes = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightRenaming)]
    renamed = {}
    for name in tensors:
        now, _ = rename_source_key(name, changes, [])
        tries = (now, prefix + now, now.removeprefix(prefix))
        renamed[name] = next((t for t in tries if t in names), name)
    return renamed


def _tied(model: transformers.PreTrainedModel) -> Mapping[str, str] | list[str]:
    """Names of weights that are another's: a file may hold them all the same."""
    return list(getattr(model, "all_tied_weights_keys", None) or ())
