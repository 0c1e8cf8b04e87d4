"""What a low-rank adapter adds to the output of a module, whose weight it does not touch.

An adapter holds its own few weights and is called with the module, its input and its output. Sums
are formed as peft forms them: beside the module's product, scaled last, cast back to its dtype.

    LoRA  up(down(x))                      https://arxiv.org/abs/2106.09685
    LoHa  (w1_a w1_b) * (w2_a w2_b)        https://arxiv.org/abs/2108.06098
    LoKr  w1 (x) w2, a Kronecker product   https://arxiv.org/abs/2309.14859 (LyCORIS)
    DoRA  any of these, and the weight's rows brought to a learned length
                                           https://arxiv.org/abs/2402.09353
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from distorch.errors import ModelError
from distorch.quant.applying import (
    CONVOLUTIONS,
    along,
    apply,
    convolve,
    weight_of,
    weight_shape,
)

__all__ = ["Adapter", "Difference", "LoHa", "LoKr", "LoRA"]


class Adapter(nn.Module):
    """One adapter of one module; ``tensors`` are its weights by role, ``scale`` is alpha / rank.

    Raises:
        ModelError: its tensors do not fit the module.
    """

    length: Tensor | None

    def __init__(self, base: nn.Module, tensors: Mapping[str, Tensor], scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("length", None)
        self._take(base, tensors)
        if "magnitude" in tensors or "dora_scale" in tensors:
            self._measure(base, tensors)

    def forward(self, base: nn.Module, x: Tensor, y: Tensor, strength: float) -> Tensor:
        """Return the module's output ``y`` with this adapter on top."""
        dtype = _wider(y.dtype, next(self.parameters()).dtype)
        side = self.side(base, x if isinstance(base, nn.Embedding) else x.to(dtype), dtype)
        if self.length is None:
            return (y + side * (self.scale * strength)).to(y.dtype)
        # DoRA's whole change is what is weighted, as ComfyUI does it: its norms stay what they are.
        length, longer = (along(base, y, each.to(dtype)) for each in (self.length, self.length - 1))
        bias = getattr(base, "bias", None)
        plain = y if bias is None else y - along(base, y, bias)
        change = longer * plain + length * side * self.scale
        return (y + change * strength).to(y.dtype)

    def side(self, base: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
        """What the module would add with its weight's difference alone, not scaled."""
        return apply(base, x, self.delta(base, dtype))

    def delta(self, base: nn.Module, dtype: torch.dtype) -> Tensor:
        """The difference of the module's weight, not scaled."""
        raise NotImplementedError

    def _take(self, base: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Register the tensors that this kind has, in the shapes that it computes with."""
        raise NotImplementedError

    def _keep(self, role: str, tensor: Tensor, shape: Sequence[int], weight: Sequence[int]) -> None:
        """Register a tensor as a parameter of a shape; ones may be missing at its end."""
        if tensor.numel() != math.prod(shape) or tensor.shape[:1] != torch.Size(shape[:1]):
            raise ModelError(
                f"the LoRA's {role} has the shape {tuple(tensor.shape)}, where a module whose "
                f"weight is {tuple(weight)} takes {tuple(shape)}",
                hint="a LoRA that was made for this model",
            )
        parameter = nn.Parameter(tensor.reshape(tuple(shape)).contiguous(), requires_grad=False)
        self.register_parameter(role, parameter)

    def _measure(self, base: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Find what each output is multiplied by: the only time that the base weight is read."""
        weight = weight_of(base)
        magnitude = tensors.get("magnitude", tensors.get("dora_scale"))
        assert magnitude is not None, "one of them is there"
        axis = 1 if isinstance(base, nn.Embedding) else 0
        wanted = weight.shape[axis]
        by_inputs = "dora_scale" in tensors and magnitude.shape[0] != wanted
        if by_inputs or magnitude.numel() != wanted:
            raise ModelError(
                f"DoRA's magnitude has the shape {tuple(magnitude.shape)}, where a module whose "
                f"weight is {tuple(weight.shape)} has {wanted} outputs",
                hint="a DoRA that was made for this model, with magnitudes of its outputs",
            )
        delta = self.delta(base, torch.float32).to(weight.device)
        changed = weight.float() + delta * self.scale
        norm = changed.transpose(0, axis).flatten(1).norm(dim=1)
        self.length = magnitude.to(weight.device).float().flatten() / norm


class LoRA(Adapter):
    """Two thin matrices in a row; of a convolution the first has the kernel, or a third one has."""

    def side(self, base: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: D102
        down, up, mid, bias = (self._in(dtype, role) for role in ("down", "up", "mid", "up_bias"))
        assert down is not None and up is not None, "a LoRA has both"  # noqa: PT018
        if isinstance(base, nn.Embedding):
            return F.linear(apply(base, x, down), up)
        if isinstance(base, nn.Linear):
            return F.linear(F.linear(x, down), up, bias)
        convolution = CONVOLUTIONS[down.dim() - 2]
        if mid is None:
            thin = convolve(base, x, down, groups=1)
        else:
            thin = convolve(base, convolution(x, down), mid, groups=1)
        return cast("Tensor", convolution(thin, up, bias, groups=cast("int", base.groups)))

    def delta(self, base: nn.Module, dtype: torch.dtype) -> Tensor:  # noqa: D102
        down, up, mid, _ = (self._in(dtype, role) for role in ("down", "up", "mid", "up_bias"))
        assert down is not None and up is not None, "a LoRA has both"  # noqa: PT018
        if isinstance(base, nn.Embedding):
            return down @ up.T
        if mid is not None:
            return torch.einsum("rs...,or,si->oi...", mid, up.flatten(1), down.flatten(1))
        return (up.flatten(1) @ down.flatten(1)).view(up.shape[0], *down.shape[1:])

    def _in(self, dtype: torch.dtype, role: str) -> Tensor | None:
        parameter = self._parameters.get(role)
        return None if parameter is None else parameter.to(dtype)

    def _take(self, base: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        shape = weight_shape(base)
        if "embedding_down" in tensors:
            down, up = tensors["embedding_down"].mT, tensors["embedding_up"]
        elif isinstance(base, nn.Embedding):  # of a matrix, as the weight is one
            down, up = tensors["up"], tensors["down"].mT
        else:
            down, up = tensors["down"], tensors["up"]
        if isinstance(base, nn.Embedding):
            self._keep("down", down, (shape[0], down.shape[-1]), shape)
            self._keep("up", up, (shape[1], down.shape[-1]), shape)
            return
        rank, ones = down.shape[0], (1,) * (len(shape) - 2)
        groups = base.groups if isinstance(base, _ConvNd) else 1
        inputs = shape[1] * groups
        if "mid" in tensors:
            self._keep("mid", tensors["mid"], (rank, rank, *shape[2:]), shape)
            self._keep("down", down, (rank, inputs, *ones), shape)
        else:
            self._keep("down", down, (rank, inputs, *shape[2:]), shape)
        self._keep("up", up, (shape[0], rank // groups, *ones), shape)
        if "up_bias" in tensors:
            self._keep("up_bias", tensors["up_bias"], shape[:1], shape)


class LoHa(Adapter):
    """The elementwise product of two products."""

    def delta(self, base: nn.Module, dtype: torch.dtype) -> Tensor:  # noqa: D102
        found = {name: each.to(dtype) for name, each in self.named_parameters(recurse=False)}
        products = [
            _product(found[f"{w}_a"], found[f"{w}_b"], found.get(t))
            for w, t in (("hada_w1", "hada_t1"), ("hada_w2", "hada_t2"))
        ]
        return (products[0] * products[1]).view(weight_shape(base))

    def _take(self, base: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        shape = weight_shape(base)
        for w, t in (("hada_w1", "hada_t1"), ("hada_w2", "hada_t2")):
            a, b = tensors[f"{w}_a"], tensors[f"{w}_b"]
            rank = b.shape[0]
            if t in tensors:
                self._keep(t, tensors[t], (rank, rank, *shape[2:]), shape)
                self._keep(f"{w}_a", a, (rank, shape[0]), shape)
                self._keep(f"{w}_b", b, (rank, shape[1]), shape)
            else:
                self._keep(f"{w}_a", a, (shape[0], rank), shape)
                self._keep(f"{w}_b", b, (rank, math.prod(shape[1:])), shape)


class LoKr(Adapter):
    """A Kronecker product, which a linear layer or a convolution applies factor by factor."""

    def side(self, base: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: D102
        first, second = self._factors(dtype)
        if isinstance(base, nn.Linear):
            thin = F.linear(x.unflatten(-1, (first.shape[1], -1)), second)
            return (first @ thin).flatten(-2)
        return super().side(base, x, dtype)

    def delta(self, base: nn.Module, dtype: torch.dtype) -> Tensor:  # noqa: D102
        first, second = self._factors(dtype)
        first = first.view(*first.shape, *(1,) * (second.dim() - 2))
        return torch.kron(first, second.contiguous()).view(weight_shape(base))

    def _factors(self, dtype: torch.dtype) -> list[Tensor]:
        found = {name: each.to(dtype) for name, each in self.named_parameters(recurse=False)}
        return [
            found[w] if w in found else _product(found[f"{w}_a"], found[f"{w}_b"], found.get(t))
            for w, t in (("lokr_w1", ""), ("lokr_w2", "lokr_t2"))
        ]

    def _take(self, base: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        shape = weight_shape(base)
        sizes = [_sizes(tensors, "lokr_w1", ""), _sizes(tensors, "lokr_w2", "lokr_t2")]
        whole = [math.prod(pair) for pair in zip(*sizes, strict=True)]
        if whole != [shape[0], math.prod(shape[1:])]:
            raise ModelError(
                f"the LoRA's lokr_w1 and lokr_w2 make a matrix of {tuple(whole)}, where the "
                f"module's weight is {tuple(shape)}",
                hint="a LoRA that was made for this model",
            )
        for role, tensor in tensors.items():
            if role.startswith("lokr_"):
                self._keep(role, tensor, tensor.shape, shape)


class Difference(Adapter):
    """A whole difference of the weight, of the bias, or of both."""

    def side(self, base: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: D102
        weight, bias = (self._parameters.get(role) for role in ("weight", "bias"))
        if weight is None:
            assert bias is not None, "one of them is there"
            return along(base, x, bias.to(dtype))
        added = apply(base, x, weight.to(dtype))
        return added if bias is None else added + along(base, added, bias.to(dtype))

    def _take(self, base: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        shape = weight_shape(base)
        for role, tensor in tensors.items():
            self._keep(role, tensor, shape if role == "weight" else shape[:1], shape)


def _wider(first: torch.dtype, second: torch.dtype) -> torch.dtype:
    """The dtype that holds both; eight bits are only how a weight is stored."""
    return first if second.itemsize == 1 else torch.promote_types(first, second)


def _product(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    """A matrix of two factors, or a kernel of two factors around a core (Tucker)."""
    return a @ b if core is None else torch.einsum("ij...,ip,jr->pr...", core, a, b)


def _sizes(tensors: Mapping[str, Tensor], role: str, core: str) -> tuple[int, int]:
    """Rows and columns of one Kronecker factor, its kernel counted as columns."""
    if role in tensors:
        return tensors[role].shape[0], tensors[role][0].numel()
    a, b = tensors[f"{role}_a"], tensors[f"{role}_b"]
    if core in tensors:
        return a.shape[1], b.shape[1] * tensors[core][0, 0].numel()
    return a.shape[0], b.shape[1]
