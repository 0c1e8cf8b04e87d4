"""Builds a transformers model without memory for its weights, and finds where each one lies."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distorch.errors import ModelError
from distorch.formats import Checkpoint, TensorInfo
from distorch.integrations.module_tree import Stored
from distorch.integrations.resting import TORCH_DTYPES
from distorch.plan.storage import converted, format_named
from distorch.quant.block_formats import block_format
from distorch.quant.scale import Scale
from distorch.tiers import Source
from distorch.tiers.converted import ConvertedSource
from distorch.tiers.sources import Amend, FileSource

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["Built", "build_empty", "check_layers", "match"]

_SHOWN_NAMES = 3
_QUICK_LAYERS = 1000  # are built in seconds, and refused by their tensors if there are fewer


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A model on the meta device, and for each of its weights where and how it is stored."""

    model: nn.Module
    infos: Mapping[str, TensorInfo]
    amend: Mapping[str, Amend] = field(default_factory=dict)
    scales: Mapping[str, Scale] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def stored(self) -> dict[str, Stored]:
        """What the planner needs to know of each weight; an amended one is never cut."""
        return {
            name: Stored(
                dtype=info.dtype,
                shape=info.shape,
                nbytes=info.nbytes,
                whole=name in self.amend,
                scale=self.scales.get(name),
            )
            for name, info in self.infos.items()
        }

    def open(self, weight_dtype: str | None = None) -> tuple[Built, Source]:
        """Open the files; with ``weight_dtype``, weights come from them in that format.

        Returns this, with each weight as it is when it comes, and the source.

        Raises:
            ModelError, MissingExtraError: weights cannot be stored so.
            StorageError: a file cannot be opened.
        """
        if weight_dtype is None:
            return self, FileSource(self.infos, self.amend)
        from distorch.integrations.converting import conversion  # noqa: PLC0415  brings gguf

        wanted = converted(self.infos, format_named(weight_dtype), self.scales)
        conversions = {
            name: conversion(info, wanted[name].dtype, self.scales.get(name))
            for name, info in self.infos.items()
            if info.dtype != wanted[name].dtype
        }
        source = FileSource(self.infos, self.amend)
        if not conversions:
            return self, source
        scales = {name: each for name, each in self.scales.items() if name not in conversions}
        built = replace(self, infos=wanted, scales=scales)
        return built, ConvertedSource(source, conversions, self.amend)


def check_layers(config: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Refuse a number of layers that the tensors deny: a model of 2**31 layers takes for ever.

    Raises:
        ModelError: there are fewer tensors than layers.
    """
    most = max(_QUICK_LAYERS, len(checkpoint))
    for key, value in config.items():
        if isinstance(value, dict):
            check_layers(value, checkpoint)
        elif (
            str(key).endswith(("layer", "layers", "depth"))
            and isinstance(value, int)
            and value > most
        ):
            raise ModelError(
                f"{checkpoint.path} has {len(checkpoint)} tensors, and the config.json beside it "
                f"says {key}: {value}",
                hint="the configuration and the weights belong to different models",
            )


def build_empty(
    model_class: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    """Build a model whose parameters are on the meta device and whose buffers are real.

    Buffers that no checkpoint holds (rotary frequencies, scales) are computed by transformers' own
    initialisation, which does nothing to parameters without memory. Each is filled with a mark
    first: one that nobody computed is an error, not noise in the output.

    Raises:
        ModelError: the configuration makes no model, or a buffer has no value.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = model_class._from_config(config, dtype=dtype)
    except Exception as error:
        raise ModelError(
            f"transformers cannot build a {model_class.__name__} from this configuration: {error}",
            hint="the file may be damaged; download it again",
        ) from error
    marked = []
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = _mark(torch.empty_like(buffer, device="cpu"))
                marked.append((module, name, f"{prefix}.{name}"))
    model.initialize_weights()
    blank = [full for module, name, full in marked if _is_marked(module._buffers[name])]
    if blank:
        raise ModelError(
            f"{model_class.__name__} does not compute its buffer {blank[0]}",
            hint="build the model with transformers, then distorch.distribute(model, line)",
        )
    model.eval().requires_grad_(requires_grad=False)
    return model


def match(
    model: nn.Module,
    infos: Mapping[str, TensorInfo],
    path: object,
    *,
    ignored: Iterable[str] = (),
    scaled: Container[str] = (),
) -> dict[str, TensorInfo]:
    """Return the place of every weight of ``model``, whose shapes must agree.

    Raises:
        ModelError: a weight is missing, has another shape, or nobody wants one that is there; or
            one is stored as integers and is not among the ``scaled``.
    """
    wanted = dict(model.named_parameters())
    missing = [name for name in wanted if name not in infos]
    strange = [name for name in infos if name not in wanted and name not in set(ignored)]
    if missing or strange:
        what = f"lacks {_names(missing)}" if missing else f"holds {_names(strange)} besides"
        raise ModelError(
            f"{path} {what}: it is not a whole {type(model).__name__}",
            hint="a whole file or directory of this class; fused experts are not read yet",
        )
    for name, parameter in wanted.items():
        if _squeezed(infos[name].shape) != _squeezed(parameter.shape):
            raise ModelError(
                f"{name} has shape {list(infos[name].shape)} in {path}, "
                f"{list(parameter.shape)} in {type(model).__name__}",
                hint="the configuration and the weights belong to different models",
            )
        if infos[name].dtype == "I8" and name not in scaled:
            raise ModelError(
                f"{name} in {path} is stored as I8, and no tensor is its scale",
                hint="a file of int8 weights with their scales",
            )
        if TORCH_DTYPES.get(infos[name].dtype) != parameter.dtype:
            # raises now, rather than when the weight is used
            block_format(infos[name].dtype, f"{name} in {path}")
    return {name: infos[name] for name in wanted}


def _mark(buffer: Tensor) -> Tensor:
    if buffer.is_floating_point() or buffer.is_complex():
        return buffer.fill_(float("nan"))
    return buffer.fill_(True if buffer.dtype == torch.bool else torch.iinfo(buffer.dtype).max)


def _is_marked(buffer: Tensor | None) -> bool:
    if buffer is None or not buffer.numel() or buffer.dtype == torch.bool:
        return False
    if buffer.is_floating_point() or buffer.is_complex():
        return bool(buffer.isnan().any())
    return bool((buffer == torch.iinfo(buffer.dtype).max).any())


def _squeezed(shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _names(names: list[str]) -> str:
    rest = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(names[:_SHOWN_NAMES]) + rest
