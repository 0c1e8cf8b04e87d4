"""Configurations as transformers reads them, and its class that one is of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from distorch.errors import ModelError

__all__ = ["model_class", "read_config"]


def read_config(folder: Path) -> PretrainedConfig:
    """Return the configuration in a directory.

    Raises:
        ModelError: the installed transformers cannot read it.
    """
    try:
        found: PretrainedConfig = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise ModelError(
            f"transformers cannot read {folder / 'config.json'}: {error}",
            hint="a model that the installed transformers knows; code in a directory is not run",
        ) from error
    return found


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """Return the class that a configuration names, or else the language model of its kind.

    Raises:
        ModelError: transformers has none.

    >>> model_class(transformers.LlamaConfig()).__name__
    'LlamaForCausalLM'
    """
    for name in config.architectures or ():
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    mapped: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if mapped is None:
        raise ModelError(
            f"transformers has no model class {config.architectures} for {config.model_type!r}",
            hint="a configuration whose 'architectures' names a class of transformers",
        )
    found_class: type[PreTrainedModel] = mapped
    return found_class
