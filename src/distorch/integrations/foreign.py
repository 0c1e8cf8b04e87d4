"""Weights that another library has quantised: their bytes are moved as they are.

torchao's are wrappers of inner tensors, which torch can take apart and put together. Those of
diffusers' GGUF and of bitsandbytes are parameters of a class of their own, with attributes. None of
these libraries is imported: who has such a weight has done that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from distorch.plan.blocks import aligned
from distorch.quant.lazy import LazyWeight

__all__ = ["Foreign", "foreign"]


@dataclass(frozen=True, slots=True, eq=False)
class Foreign:
    """What a foreign weight is made of: its tensors, one after another, each aligned.

    ``make`` puts a weight together from tensors of the same dtypes and shapes on a device;
    ``hold`` gives the original one others. ``nbytes`` is what it keeps beside them.
    """

    dtype: torch.dtype
    layout: tuple[tuple[torch.dtype, tuple[int, ...]], ...]
    tensors: Callable[[], list[Tensor]]
    make: Callable[[Sequence[Tensor]], Tensor]
    hold: Callable[[Sequence[Tensor]], None]
    nbytes: int = 0

    @property
    def lasts(self) -> bool:
        """Its own forward may change it: it is made anew each time."""
        return False

    @property
    def stored_bytes(self) -> int:
        """Bytes of all the tensors."""
        return sum(
            aligned(dtype.itemsize * torch.Size(shape).numel()) for dtype, shape in self.layout
        )

    def gather(self) -> Tensor:
        """Copy the tensors into flat bytes."""
        tensors = self.tensors()
        raw = torch.zeros(self.stored_bytes, dtype=torch.uint8, device=tensors[0].device)
        for place, tensor in zip(self._cut(raw), tensors, strict=True):
            place.copy_(tensor)
        return raw

    def fill(self, raw: Tensor) -> None:
        """Give the original weight its tensors again, from flat bytes."""
        self.hold([*self._cut(raw)])

    def empty(self) -> None:
        """Let go of the original weight's tensors."""
        self.hold([tensor.new_empty(0) for tensor in self.tensors()])

    def weight(
        self,
        raw: Tensor,
        shape: Sequence[int],  # noqa: ARG002  it has one
        rows: slice | Tensor | None = None,
    ) -> Tensor:
        """Put a weight together over flat bytes."""
        assert rows is None, "it is not cut"
        return self.make([*self._cut(raw)])

    def on(self, device: torch.device) -> Foreign:  # noqa: ARG002
        """Return itself: what it is made of says where it is."""
        return self

    def _cut(self, raw: Tensor) -> Iterator[Tensor]:
        begin = 0
        for dtype, shape in self.layout:
            nbytes = dtype.itemsize * torch.Size(shape).numel()
            yield raw[begin : begin + nbytes].view(dtype).view(shape)
            begin += aligned(nbytes)


def foreign(parameter: Tensor, owners: Sequence[nn.Module]) -> Foreign | None:
    """Return what a foreign weight of some modules is made of; None if that is not known."""
    kind = type(parameter).__name__ if isinstance(parameter, nn.Parameter) else ""
    library = type(parameter).__module__.partition(".")[0]
    if isinstance(parameter, LazyWeight):
        return None  # ours
    if is_traceable_wrapper_subclass(parameter):
        return _wrapper(parameter)
    if (library, kind) in {("diffusers", "GGUFParameter"), ("bitsandbytes", "Params4bit")}:
        return _with_attributes(parameter)
    if (library, kind) == ("bitsandbytes", "Int8Params"):
        return _int8(parameter, owners)
    return None


def _of(
    parameter: Tensor,
    tensors: Callable[[], list[Tensor]],
    make: Callable[[Sequence[Tensor]], Tensor],
    hold: Callable[[Sequence[Tensor]], None],
    nbytes: int = 0,
) -> Foreign | None:
    found = tensors()
    if not found or not all(each.is_contiguous() and each.numel() for each in found):
        return None
    layout = tuple((each.dtype, tuple(each.shape)) for each in found)
    return Foreign(parameter.dtype, layout, tensors, make, hold, nbytes)


def _wrapper(parameter: Any) -> Foreign | None:
    names, context = parameter.__tensor_flatten__()
    if any(type(getattr(parameter, name)) is not Tensor for name in names):
        return None  # wrappers of wrappers
    kind, size, stride = type(parameter), parameter.shape, parameter.stride()

    def make(tensors: Sequence[Tensor]) -> Tensor:
        parts = dict(zip(names, tensors, strict=True))
        made = kind.__tensor_unflatten__(parts, context, size, stride)
        return nn.Parameter(made, requires_grad=False)

    def hold(tensors: Sequence[Tensor]) -> None:
        for name, tensor in zip(names, tensors, strict=True):
            setattr(parameter, name, tensor)

    return _of(parameter, lambda: [getattr(parameter, name) for name in names], make, hold)


def _with_attributes(parameter: Any) -> Foreign | None:
    """A parameter whose attributes say what its bytes mean; a table of scales stays with them."""
    state = getattr(parameter, "quant_state", None)
    if type(parameter).__name__ == "Params4bit" and state is None:
        return None  # not quantised yet

    def make(tensors: Sequence[Tensor]) -> Tensor:
        made: Any = _plain(type(parameter), tensors[0])
        made.__dict__.update(parameter.__dict__)
        if state is not None:  # moving one changes it in place
            made.quant_state = copy.copy(state)
            if nested := getattr(state, "state2", None):
                made.quant_state.state2 = copy.copy(nested)
            made.quant_state.to(tensors[0].device)
        return made  # type: ignore[no-any-return]

    def hold(tensors: Sequence[Tensor]) -> None:
        _set(parameter, tensors[0])

    nbytes = 0 if state is None else state.absmax.nbytes
    return _of(parameter, lambda: [_plain(Tensor, parameter)], make, hold, nbytes)


def _int8(parameter: Any, owners: Sequence[Any]) -> Foreign | None:
    """Rows of bytes and their scales, which the module takes over when its forward first runs."""
    states = [owner.state for owner in owners if hasattr(owner, "state")]
    scales = [parameter.SCB, *(state.SCB for state in states)]
    scale = next((each for each in scales if each is not None), None)
    if scale is None:
        return None  # not quantised yet

    def fit(target: Any, tensors: Sequence[Tensor]) -> None:
        target.CB, target.SCB = tensors

    def make(tensors: Sequence[Tensor]) -> Tensor:
        made: Any = _plain(type(parameter), tensors[0])
        made.__dict__.update(parameter.__dict__)
        fit(made, tensors)
        return made  # type: ignore[no-any-return]

    def hold(tensors: Sequence[Tensor]) -> None:
        _set(parameter, tensors[0])
        fit(parameter, tensors)
        held[:] = tensors
        for state in states:
            state.CB = state.SCB = None

    held = [_plain(Tensor, parameter), scale]
    return _of(parameter, lambda: held, make, hold)


def _plain(kind: type[Tensor], tensor: Tensor) -> Any:
    """The same memory as a tensor of a class, which is asked nothing."""
    with torch._C.DisableTorchFunctionSubclass():
        return torch.Tensor._make_subclass(kind, tensor.detach())  # noqa: SLF001  (as they do)


def _set(parameter: Tensor, tensor: Tensor) -> None:
    with torch._C.DisableTorchFunctionSubclass():
        parameter.data = tensor
