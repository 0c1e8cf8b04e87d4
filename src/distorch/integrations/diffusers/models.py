"""A diffusers model from a directory or a single file, without memory for its weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import diffusers
import torch
from accelerate import init_empty_weights
from torch import nn

from distorch.errors import ModelError
from distorch.formats import Checkpoint, TensorInfo
from distorch.formats.scales import pair_scales
from distorch.integrations.diffusers.configs import CONFIGS, ZERO_CONDITION_MARKER
from distorch.integrations.diffusers.layouts import (
    LAYOUTS,
    Layout,
    Renamed,
    bare,
    layout_of,
    renamed,
)
from distorch.integrations.huggingface.scales import read_scales
from distorch.integrations.huggingface.skeleton import Built, check_layers, match
from distorch.quant.of_checkpoint import dequantize

__all__ = ["build"]

_LORA: Final = re.compile(r"\.lora[._](A|B|down|up)\b")


def build(checkpoint: Checkpoint, dtype: torch.dtype) -> Built:
    """Build the model on the meta device, to compute in ``dtype``; its buffers are real.

    What the class keeps in float32 stays so, as when diffusers loads it.

    Raises:
        ModelError: the class is not one of diffusers, or it and the tensors do not agree.
    """
    config = _config_in(checkpoint.path.parent)
    scaled = pair_scales(bare(checkpoint))
    layout = layout_of(scaled.tensors)
    model_class = _model_class(checkpoint, config, layout)
    if layout is not None and layout.class_name == model_class.__name__:
        found = renamed(layout, scaled.tensors, read_scales(checkpoint, scaled))
    else:
        found = Renamed(infos=dict(checkpoint))
    check_layers(config, checkpoint)
    config = config or _guessed(model_class.__name__, found.infos, checkpoint.path)
    model = _empty(model_class, config, dtype)
    ignored = [
        *_fill_buffers(model, found.infos, checkpoint, dtype),
        *(name for name in found.infos if _is_ignored(model_class, name)),
    ]
    try:
        infos = match(model, found.infos, checkpoint.path, ignored=ignored, scaled=found.scales)
    except ModelError as error:
        if layout is None or layout.class_name == model_class.__name__:
            raise
        raise ModelError(
            f"{checkpoint.path} holds a {layout.class_name}, and the config.json beside it is of a "
            f"{model_class.__name__}",
            hint="the file in a folder of its own, or with its own config.json",
        ) from error
    return Built(model=model, infos=infos, amend=found.amend, scales=found.scales)


def _model_class(
    checkpoint: Checkpoint, config: Mapping[str, Any], layout: Layout | None
) -> type[diffusers.ModelMixin]:
    """The class that the configuration names, or else that the tensors tell."""
    known = ", ".join(sorted(each.class_name for each in LAYOUTS))
    if any(_LORA.search(name) for name in checkpoint):
        raise ModelError(
            f"{checkpoint.path} is a LoRA, not a model",
            hint=f"distorch.handle_of(model).add_lora({checkpoint.path.name!r})",
        )
    named = config.get("_class_name")
    if named is None and layout is None:
        said = checkpoint.metadata.get("general.architecture")
        kind = f", of the architecture {said!r}" if said else ""
        raise ModelError(
            f"{checkpoint.path} is no model that is known by its tensors{kind}",
            hint=f"a directory with its config.json, or a file of one of these: {known}",
        )
    class_name = str(named if layout is None or named is not None else layout.class_name)
    found = getattr(diffusers, class_name, None)
    if not isinstance(found, type) or not issubclass(found, diffusers.ModelMixin):
        raise ModelError(
            f"{checkpoint.path.parent / 'config.json'} names {class_name!r}, which is no model of "
            f"diffusers {diffusers.__version__}",
            hint=f"a model of one of its classes, such as {known}",
        )
    return found


def _config_in(folder: Path) -> Mapping[str, Any]:
    """Return the configuration that lies beside a checkpoint; nothing if there is none."""
    try:
        found = json.loads((folder / "config.json").read_bytes())
    except OSError:
        return {}
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{folder / 'config.json'} is no configuration: {error}",
            hint="the file may be damaged; download it again",
        ) from error
    return found if isinstance(found, dict) and "_class_name" in found else {}


def _guessed(class_name: str, infos: Mapping[str, TensorInfo], path: Path) -> dict[str, Any]:
    try:
        return CONFIGS[class_name]({name: info.shape for name, info in infos.items()})
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise ModelError(
            f"{path} is not a whole {class_name}: {error} tells its size, and is not there",
            hint="download it again, or put its config.json beside it",
        ) from error


def _empty(
    model_class: type[diffusers.ModelMixin], config: Mapping[str, Any], dtype: torch.dtype
) -> nn.Module:
    """Build the model: parameters on the meta device, buffers as its class computes them."""
    try:
        with init_empty_weights(include_buffers=False), _default_dtype(dtype):
            make: Any = model_class.from_config  # diffusers has no types
            model: nn.Module = make(dict(config))
    except Exception as error:
        raise ModelError(
            f"diffusers cannot build a {model_class.__name__} of this configuration: {error}",
            hint="the configuration may be damaged, or be that of another model",
        ) from error
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                wanted = _dtype_of(f"{prefix}.{name}", model, dtype)
                module._parameters[name] = nn.Parameter(parameter.to(wanted), requires_grad=False)
    return model.eval()


def _dtype_of(name: str, model: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a tensor of a model that computes in ``dtype``."""
    exact = getattr(model, "_keep_in_fp32_modules", None) or ()  # as diffusers has it
    return dtype if set(exact).isdisjoint(name.split(".")) else torch.float32


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Let buffers be computed in ``dtype``, as when diffusers loads a model."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _fill_buffers(
    model: nn.Module, infos: Mapping[str, TensorInfo], checkpoint: Checkpoint, dtype: torch.dtype
) -> set[str]:
    """Give buffers that the checkpoint holds their values, in the dtype of parameters."""
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in infos}
    for name, buffer in buffers.items():
        value = dequantize(checkpoint, infos[name].name, _dtype_of(name, model, dtype))
        if value.numel() != buffer.numel():
            raise ModelError(
                f"{name} has shape {list(value.shape)} in {checkpoint.path}, "
                f"{list(buffer.shape)} in {type(model).__name__}",
                hint="the configuration and the weights belong to different models",
            )
        owner, _, attribute = name.rpartition(".")
        model.get_submodule(owner)._buffers[attribute] = value.view(buffer.shape)
    return set(buffers)


def _is_ignored(model_class: type[diffusers.ModelMixin], name: str) -> bool:
    """Whether diffusers too drops a tensor that its class has no place for, or it is a mark."""
    patterns = model_class._keys_to_ignore_on_load_unexpected or ()  # noqa: SLF001  (as above)
    return name == ZERO_CONDITION_MARKER or any(re.search(each, name) for each in patterns)
