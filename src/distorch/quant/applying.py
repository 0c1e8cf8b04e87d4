"""What a module would make of another weight than its own: for adapters, beside it."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from distorch.errors import ModelError
from distorch.quant.lazy import LazyWeight

__all__ = ["CONVOLUTIONS", "along", "apply", "convolve", "weight_of", "weight_shape"]

CONVOLUTIONS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_SUPPORTED = (
    *(nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
)


def weight_shape(base: nn.Module) -> tuple[int, ...]:
    """The shape of the module's weight, which may rest elsewhere."""
    weight = getattr(base, "weight", None)
    if not isinstance(base, _SUPPORTED) or weight is None:
        raise ModelError(
            f"a LoRA cannot be added to a {type(base).__name__}",
            hint="Linear, Embedding and convolutions take one",
        )
    return tuple(weight.shape)


def weight_of(base: nn.Module) -> Tensor:
    """The whole weight of a module, dense."""
    weight = base.weight
    assert isinstance(weight, Tensor), "its shape was asked for before"
    return weight.materialize() if isinstance(weight, LazyWeight) else weight.detach()


def apply(base: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """What a module would return with another weight and no bias."""
    if isinstance(base, nn.Linear):
        return F.linear(x, weight)
    if isinstance(base, nn.Embedding):
        rows = F.embedding(x, weight)
        scale = getattr(base, "embed_scale", None)  # transformers' scaled embeddings
        return rows if scale is None else rows * torch.as_tensor(scale).to(rows)
    if isinstance(base, nn.LayerNorm):
        return F.layer_norm(x, base.normalized_shape, weight, None, base.eps)
    if isinstance(base, nn.RMSNorm):
        return F.rms_norm(x, base.normalized_shape, weight, base.eps)
    if isinstance(base, nn.GroupNorm):
        return F.group_norm(x, base.num_groups, weight, None, base.eps)
    return convolve(base, x, weight, groups=cast("int", base.groups))


def convolve(base: nn.Module, x: Tensor, weight: Tensor, *, groups: int) -> Tensor:
    """Convolve as a module does: its stride, padding and dilation."""
    assert isinstance(base, _ConvNd), "of all modules that take an adapter"
    padding = base.padding
    if base.padding_mode != "zeros":
        x = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)  # noqa: SLF001  as its own forward does
        padding = (0,) * (weight.dim() - 2)
    convolution = CONVOLUTIONS[weight.dim() - 2]
    result: Tensor = convolution(x, weight, None, base.stride, padding, base.dilation, groups)
    return result


def along(base: nn.Module, y: Tensor, vector: Tensor) -> Tensor:
    """A vector of one number for each output, to go with ``y``."""
    if isinstance(base, _ConvNd):
        return vector.view(-1, *(1,) * len(base.kernel_size))
    return vector.view(-1, *(1,) * (y.dim() - 2)) if isinstance(base, nn.GroupNorm) else vector
