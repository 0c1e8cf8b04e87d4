"""Weights that ComfyUI makes in inference mode, as ordinary ones: only those can be moved."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["make_ordinary"]


def make_ordinary(module: nn.Module) -> None:
    """Put an ordinary parameter in place of each that was made in inference mode; no byte moves.

    ComfyUI runs every node in inference mode, so that all of a loader's weights are such.
    """
    made: dict[int, nn.Parameter] = {}  # a weight that several layers share stays one
    with torch.inference_mode(mode=False):
        for owner in module.modules():
            for name, weight in owner._parameters.items():
                if weight is not None and weight.is_inference() and type(weight) is nn.Parameter:
                    owner._parameters[name] = made.setdefault(id(weight), _over(weight))


def _over(weight: Tensor) -> nn.Parameter:
    """An ordinary parameter over the same memory."""
    empty = torch.empty(0, dtype=weight.dtype, device=weight.device)
    place = weight.storage_offset(), weight.size(), weight.stride()
    return nn.Parameter(empty.set_(weight.untyped_storage(), *place), requires_grad=False)
