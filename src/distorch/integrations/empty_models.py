"""Models of diffusers and transformers without memory: classes and configurations are their own."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distorch.errors import ModelError
from distorch.integrations.extras import need

__all__ = ["diffusers_model", "language_model"]


def diffusers_model(class_name: str, config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Build a diffusers model without memory, all of it in one dtype.

    Raises:
        ModelError: the configuration makes no such model.
        MissingExtraError: diffusers is not installed.

    >>> diffusers_model("FluxTransformer2DModel", {"num_layers": 1}, torch.float16).dtype
    torch.float16
    """
    model_class = getattr(need("diffusers", "this profile"), class_name)
    try:
        with torch.device("meta"):
            module: nn.Module = model_class.from_config(dict(config))
    except Exception as error:
        raise ModelError(
            f"diffusers cannot build a {class_name} from this configuration: {error}",
            hint="the file may be damaged; download it again",
        ) from error
    # Not the class's own `to`, which warns that a checkpoint may keep some parts in float32.
    return nn.Module.to(module, dtype).eval()


def language_model(path: Path, dtype: torch.dtype) -> nn.Module:
    """Build a transformers model without memory, buffers included.

    ``path`` is a directory with a ``config.json``, whose ``architectures`` names the class; without
    that, it is the class for causal language modelling.

    Raises:
        ModelError: the configuration makes no model.
        MissingExtraError: transformers is not installed.
    """
    need("transformers", "this profile")
    classes = import_module("distorch.integrations.huggingface.classes")
    skeleton = import_module("distorch.integrations.huggingface.skeleton")
    config = classes.read_config(path)
    model: nn.Module = skeleton.build_empty(classes.model_class(config), config, dtype)
    return model.to("meta")
