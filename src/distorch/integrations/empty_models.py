"""Models of diffusers and transformers without memory: classes and configurations are their own."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distorch.errors import MissingExtraError, ModelError

__all__ = ["diffusers_model", "language_model"]


def diffusers_model(class_name: str, config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Build a diffusers model without memory, all of it in one dtype.

    Raises:
        ModelError: the configuration makes no such model.
        MissingExtraError: diffusers is not installed.

    >>> diffusers_model("FluxTransformer2DModel", {"num_layers": 1}, torch.float16).dtype
    torch.float16
    """
    model_class = getattr(_need("diffusers"), class_name)
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
    transformers = _need("transformers")
    skeleton = import_module("distorch.integrations.huggingface.skeleton")
    try:
        config = transformers.AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
        classes = [getattr(transformers, name, None) for name in config.architectures or ()]
        mapping = transformers.AutoModelForCausalLM._model_mapping
        model_class = next(filter(None, classes), None) or mapping[type(config)]
    except Exception as error:
        raise ModelError(
            f"transformers cannot read {path / 'config.json'}: {error}",
            hint="a model that the installed transformers knows; code in a directory is not run",
        ) from error
    model: nn.Module = skeleton.build_empty(model_class, config, dtype)
    return model.to("meta")


def _need(package: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise MissingExtraError(
            f"this profile needs {package}, which is not installed",
            hint=f'pip install "distorch[{package}]"',
        ) from error
