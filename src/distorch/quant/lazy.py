"""A weight that is not there in floating point until an operation asks for it.

Model code stays untouched: it calls ``F.linear(x, self.weight)`` or ``F.embedding(ids,
self.weight)`` as ever, and the weight answers. ``linear`` and ``embedding`` are what subclasses do
well; every other operation gets the whole weight, made for that one use: slower, never wrong.

The mechanism is torch's own for foreign tensors: ``__torch_function__`` and ``__torch_dispatch__``
on a wrapper subclass (https://docs.pytorch.org/docs/stable/notes/extending.html).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows
from torch import Tensor
from torch.utils._pytree import tree_map_only

__all__ = ["LazyWeight"]


class LazyWeight(Tensor):
    """A tensor with a shape, a dtype and a device, and no memory of its own."""

    _is_param = True  # isinstance(weight, nn.Parameter) holds, as model code expects of a weight

    def __new__(
        cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str, **_: Any
    ) -> Self:
        """Wrap: the tensor that torch sees; what it stands for is the subclass's own."""
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls, tuple(shape), dtype=dtype, device=torch.device(device), requires_grad=False
        )

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x @ self.T + bias``."""
        return F.linear(x, self.materialize(), bias)

    def embedding(self, ids: Tensor) -> Tensor:
        """Return the rows that ``ids`` names, of shape ``(*ids.shape, columns)``."""
        return F.embedding(ids, self.materialize())

    def materialize(self) -> Tensor:
        """Return the whole weight as an ordinary tensor that stays valid."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        _types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer what a lazy weight does well; leave the rest to ``__torch_dispatch__``."""
        kwargs = kwargs or {}
        answer = _ANSWERS.get(func)
        if answer is not None:
            result = answer(*args, **kwargs)
            if result is not None:
                return result
        with torch._C.DisableTorchFunctionSubclass():  # results are ordinary tensors
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Callable[..., Any],
        _types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run any other operation on the whole weight."""
        if func is torch.ops.aten.detach.default:
            return copy.copy(args[0])
        args, kwargs = tree_map_only(
            LazyWeight, lambda weight: weight.materialize(), (args, dict(kwargs or {}))
        )
        return func(*args, **kwargs)

    def __copy__(self) -> Self:
        """Another wrapper of the same weight."""
        twin = type(self).__new__(type(self), self.shape, self.dtype, self.device)
        twin.__dict__.update(self.__dict__)
        return twin

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Describe the weight without reading it."""
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype})"


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    return weight.linear(x, bias) if isinstance(weight, LazyWeight) else None


def _embedding(
    ids: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,  # noqa: ARG001  only matters to gradients
    max_norm: float | None = None,
    *_: Any,
    **__: Any,
) -> Tensor | None:
    # max_norm rewrites rows in place: that is for the ordinary path
    lazy = isinstance(weight, LazyWeight) and max_norm is None
    return weight.embedding(ids) if lazy else None  # type: ignore[attr-defined]


_ANSWERS: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    F.linear: _linear,
    F.embedding: _embedding,
}
