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

from distorch.errors import ModelError

__all__ = ["LazyWeight"]


class LazyWeight(Tensor):
    """A tensor with a shape, a dtype and a device, and no memory of its own."""

    is_matrix: bool
    _is_param = True  # isinstance(weight, nn.Parameter) holds, as model code expects of a weight

    def __new__(
        cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str, **_: Any
    ) -> Self:
        """Wrap: the tensor that torch sees; what it stands for is the subclass's own."""
        self: Self = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=torch.device(device), requires_grad=False
        )
        self.is_matrix = len(shape) == 2  # noqa: PLR2004
        return self

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x @ self.T + bias``."""
        return F.linear(x, self.materialize(), bias)

    def embedding(self, ids: Tensor) -> Tensor:
        """Return the rows that ``ids`` names, of shape ``(*ids.shape, columns)``."""
        return F.embedding(ids, self.materialize())

    def materialize(self) -> Tensor:
        """Return the whole weight as an ordinary tensor that stays valid."""
        raise NotImplementedError

    def decoded(self) -> Tensor:
        """Return the whole weight as an ordinary tensor that may be written to, for use at once."""
        return self.materialize()

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
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub is not its documentation
        cls,
        func: Callable[..., Any],
        _types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run any other operation on the whole weight."""
        if func is torch.ops.aten.detach.default:
            with torch.inference_mode(args[0].is_inference()):  # a twin in this too
                return copy.copy(args[0])
        if _writes(func) and isinstance(args[0], LazyWeight):
            raise ModelError(
                f"{func} would change a weight in place, and this one is not in memory as such",
                hint="distorch.handle_of(model).remove() first, then change it",
            )
        tracked = torch.is_grad_enabled()
        # outside inference mode, in which a view could not be given back
        with torch.inference_mode(mode=False), torch.set_grad_enabled(tracked):
            args, kwargs = tree_map_only(
                LazyWeight, lambda weight: weight.materialize(), (args, dict(kwargs or {}))
            )
            return func(*args, **kwargs)

    def __deepcopy__(self, _memo: Any) -> Self:
        """Refuse: a copy of the model would share what this one may let go of."""
        raise _not_here("copied")

    def __reduce_ex__(self, _protocol: Any) -> Any:
        """Refuse: the checkpoint is where weights are kept."""
        raise _not_here("pickled or saved")

    def __copy__(self) -> Self:
        """Another wrapper of the same weight."""
        twin = type(self).__new__(type(self), self.shape, self.dtype, self.device)
        twin.__dict__.update(self.__dict__)
        return twin

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Describe the weight without reading it."""
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype})"


def _writes(operation: Any) -> bool:
    return bool(operation._schema.is_mutable)  # noqa: SLF001  (nor another way to ask)


def _not_here(what: str) -> ModelError:
    return ModelError(
        f"a weight that is not in memory as such cannot be {what}",
        hint="distorch.handle_of(model).remove() first",
    )


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:  # noqa: A002
    # autocast chooses another dtype: that is for the ordinary path
    if not isinstance(weight, LazyWeight) or torch.is_autocast_enabled(input.device.type):
        return None
    return weight.linear(input, bias) if weight.is_matrix else None


def _embedding(
    input: Tensor,  # noqa: A002  the argument's name in torch
    weight: Tensor,
    padding_idx: int | None = None,  # noqa: ARG001  only matters to gradients
    max_norm: float | None = None,
    *_: Any,
    **__: Any,
) -> Tensor | None:
    # max_norm rewrites rows in place: that is for the ordinary path
    if not isinstance(weight, LazyWeight) or max_norm is not None:
        return None
    return weight.embedding(input) if weight.is_matrix else None


_ANSWERS: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    F.linear: _linear,
    F.embedding: _embedding,
}
