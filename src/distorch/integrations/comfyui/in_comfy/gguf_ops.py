"""Layers for ComfyUI that hold weights as a GGUF file stores them, and decode them where used.

A LoRA is a function that ComfyUI gives to a layer; it is called with the decoded weight, which is
the layer's own for as long as the call takes. What is stored is never written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import comfy.model_patcher
import comfy.ops
import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows
from torch import Tensor, nn

from distorch.quant.lazy import LazyWeight

__all__ = ["PackedOps", "PackedPatcher", "operations"]

_NOTHING = 1  # bytes that ComfyUI may load by itself: with 0 it would load all
_LARGE = 1 << 22  # elements: such a weight is not made only to be replaced by the file's


class _Holds:
    """A layer that takes a file's tensors as they are, and knows how to decode its weight."""

    dequant_dtype: ClassVar[torch.dtype | None] = None
    patch_dtype: ClassVar[torch.dtype | None] = None
    weight: Any
    bias: Any
    weight_function: list[Any]
    bias_function: list[Any]
    _parameters: dict[str, Any]

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        _metadata: Any,
        _strict: bool,
        missing: list[str],
        _unexpected: list[str],
        errors: list[str],
    ) -> None:
        for name, here in list(self._parameters.items()):
            if here is None:
                continue
            found = state_dict.get(prefix + name)
            if found is None:
                missing.append(prefix + name)
                if here.is_meta:
                    empty = torch.zeros(here.shape, dtype=here.dtype)
                    self._parameters[name] = nn.Parameter(empty, requires_grad=False)
            elif found.shape != here.shape:
                shapes = f"{tuple(found.shape)} in the file, {tuple(here.shape)} in the model"
                errors.append(f"size mismatch for {prefix}{name}: {shapes}")
            else:
                self._parameters[name] = nn.Parameter(found, requires_grad=False)

    def _apply(self, function: Any, *args: Any, **more: Any) -> Any:
        def apply(tensor: Tensor) -> Tensor:
            found: Tensor = tensor if tensor.is_meta else function(tensor)
            return found  # what is still to be read from the file has nowhere to go

        return super()._apply(apply, *args, **more)  # type: ignore[misc]

    def _decoded(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Return the weight and the bias to compute with now, LoRA included."""
        weight: Tensor = _at(self.weight, device)
        weight = weight.decoded() if isinstance(weight, LazyWeight) else weight
        if self.dequant_dtype is not None:
            weight = weight.to(self.dequant_dtype)
        if self.weight_function:
            weight = weight.to(self.patch_dtype or dtype)
            for function in self.weight_function:
                weight = function(weight)
        bias = self.bias
        if bias is not None:
            bias = bias.to(device=device, dtype=dtype, copy=bool(self.bias_function))
            for function in self.bias_function:
                bias = function(bias)
        return weight.to(dtype), bias


class _Convolves(_Holds):
    def forward_comfy_cast_weights(self, input: Tensor, *args: Any, **more: Any) -> Any:  # noqa: A002  ComfyUI's name
        """Convolve with the decoded weight."""
        if not isinstance(self.weight, LazyWeight):
            return super().forward_comfy_cast_weights(input, *args, **more)  # type: ignore[misc]
        weight, bias = self._decoded(input.device, input.dtype)
        return self._conv_forward(input, weight, bias, *args, **more)  # type: ignore[attr-defined]


def _making(device: Any, *sizes: int) -> Any:
    """Where to make a weight that the file's is about to replace: nowhere, if it is large."""
    return "meta" if math.prod(sizes) >= _LARGE else device


class PackedOps(comfy.ops.manual_cast):  # type: ignore[misc]
    """ComfyUI's layers; those with large weights hold them packed."""

    class Linear(_Holds, comfy.ops.manual_cast.Linear):  # type: ignore[misc]
        """A matrix."""

        def __init__(
            self,
            in_features: int,
            out_features: int,
            bias: bool = True,
            device: Any = None,
            dtype: torch.dtype | None = None,
        ) -> None:
            device = _making(device, in_features, out_features)
            super().__init__(in_features, out_features, bias, device, dtype)

        def forward_comfy_cast_weights(self, input: Tensor) -> Any:  # noqa: A002  ComfyUI's name
            """Multiply by the decoded weight."""
            if not isinstance(self.weight, LazyWeight):
                return super().forward_comfy_cast_weights(input)
            return F.linear(input, *self._decoded(input.device, input.dtype))

    class Embedding(_Holds, comfy.ops.manual_cast.Embedding):  # type: ignore[misc]
        """Rows, of which only those are decoded that are looked up."""

        def __init__(
            self,
            num_embeddings: int,
            embedding_dim: int,
            *args: Any,
            device: Any = None,
            **more: Any,
        ) -> None:
            device = _making(device, num_embeddings, embedding_dim)
            super().__init__(num_embeddings, embedding_dim, *args, device=device, **more)
            self.bias = None

        def forward_comfy_cast_weights(
            self,
            input: Tensor,  # noqa: A002  ComfyUI's name
            out_dtype: torch.dtype | None = None,
        ) -> Any:
            """Look rows up; with a LoRA, in the whole decoded weight."""
            if not isinstance(self.weight, LazyWeight):
                return super().forward_comfy_cast_weights(input, out_dtype)
            dtype = out_dtype or self.weight.dtype
            if self.weight_function:
                return F.embedding(input, self._decoded(input.device, dtype)[0], self.padding_idx)
            rows = F.embedding(input, _at(self.weight, input.device), self.padding_idx)
            return rows.to(dtype=self.dequant_dtype).to(dtype=dtype)

    class Conv1d(_Convolves, comfy.ops.manual_cast.Conv1d):  # type: ignore[misc]
        """A convolution."""

    class Conv2d(_Convolves, comfy.ops.manual_cast.Conv2d):  # type: ignore[misc]
        """A convolution."""

    class Conv3d(_Convolves, comfy.ops.manual_cast.Conv3d):  # type: ignore[misc]
        """A convolution."""


def operations(dequant: torch.dtype | None, patch: torch.dtype | None) -> type[PackedOps]:
    """Return layers that round decoded weights to one dtype, and apply LoRA in another.

    None leaves the dtype to the layer's input.
    """
    if dequant is None and patch is None:
        return PackedOps
    dtypes = {"dequant_dtype": dequant, "patch_dtype": patch}
    layers = {
        name: type(name, (layer,), dtypes)
        for name, layer in vars(PackedOps).items()
        if isinstance(layer, type)
    }
    return type("PackedOps", (PackedOps,), layers)


class PackedPatcher(comfy.model_patcher.ModelPatcher):  # type: ignore[misc]
    """ComfyUI's owner of a model with packed weights: they stay packed wherever they go."""

    size: int

    def load(
        self,
        device_to: torch.device | None = None,
        lowvram_model_memory: int = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
        **more: Any,
    ) -> Any:
        """Let each LoRA be a function of its layer; bring the layers that there is room for."""
        result = super().load(device_to, _NOTHING, False, False, **more)
        if not full_load and lowvram_model_memory <= _NOTHING:
            return result
        used = 0
        for path, layer in self.model.named_modules():
            nbytes = sum(each.nbytes for each in layer.parameters(recurse=False))
            takes_functions = hasattr(layer, "comfy_cast_weights")
            if takes_functions and not full_load and used + nbytes > lowvram_model_memory:
                continue
            for name, _ in () if takes_functions else layer.named_parameters(path, recurse=False):
                if name in self.patches:
                    self.patch_weight_to_device(name, device_to)
            _bring(layer, device_to)
            used += nbytes
        self.model.model_loaded_weight_memory = used
        return result

    def model_size(self) -> int:
        """Return the bytes of the model's tensors as they are stored."""
        if not self.size:
            own = (*self.model.parameters(), *self.model.buffers())
            self.size = sum(tensor.nbytes for tensor in own)
        return int(self.size)

    def pin_weight_to_device(self, key: str) -> None:
        """Pin nothing: a packed weight has no dense memory."""


def _bring(layer: nn.Module, device: torch.device | None) -> None:
    """Move a layer's own tensors, and not those of its children."""
    layer._apply(lambda tensor: tensor.to(device), recurse=False)  # noqa: SLF001  as .to() does


def _at(weight: LazyWeight, device: torch.device) -> Tensor:
    return weight if weight.device == device else weight.to(device)
