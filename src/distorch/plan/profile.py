"""Profiles a model without its weights: one forward pass on torch's meta device.

Meta tensors have shapes and no memory, so a pass of 14 billion weights takes about a second. The
pass tells which block is used when, what each operation costs, and which tensors are alive.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from distorch.errors import ModelError
from distorch.plan.blocks import Block, Node, cut
from distorch.plan.cost import Profile
from distorch.plan.storage import format_named, stored_as

__all__ = ["profile_module"]

_DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16"}  # else BF16


def _experts_flops(rows: Sequence[int], experts: Sequence[int], *_: object, **__: object) -> int:
    """FLOPs of a product of each row with one matrix of a stack, from the two shapes."""
    return 2 * prod(rows) * experts[-1]


_COUNTED_TOO = {torch.ops.aten._grouped_mm: _experts_flops}  # noqa: SLF001  its only name


def profile_module(
    module: nn.Module,
    root: Node,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    name: str,
    format: str | None = None,  # noqa: A002  what users call it
) -> Profile:
    """Return what one call ``module(*args, **kwargs)`` asks of a machine.

    ``module`` and the tensors it is given are on the meta device. ``root`` is its tree, as
    ``integrations.module_tree.describe(module).root`` has it: the blocks are those that run.
    ``format`` is how its weights would be stored (`distorch.plan.storage`); by default they are
    stored in the dtypes of its parameters.

    - *Blocks* come in the order of their first use; those that the pass does not use come last.
    - *FLOPs* are counted by torch's ``FlopCounterMode``: matrix products (those of experts too),
      convolutions and attention, a multiplication and an addition as two. Those of an operation on
      a weight go to the weight's block, to the runs of a long weight by their rows; those of any
      other (attention) to the block begun last, since that is when they are computed.
    - *Activations* are the peak of bytes in all tensors beside weights: inputs, buffers, and what
      the pass makes, for as long as the model refers to it. An operation that torch has a fused
      kernel for holds its inputs and output only; attention never holds its matrix of scores.

    Raises:
        ModelError: the module has weights with values, or none, or its forward needs values.

    >>> from distorch.plan.blocks import TensorSpec
    >>> layer = nn.Linear(8, 4, bias=False, device="meta")
    >>> spec = TensorSpec(name="weight", dtype="F32", shape=(4, 8), nbytes=128)
    >>> x = torch.empty(2, 8, device="meta")
    >>> profile = profile_module(layer, Node(name="", tensors=(spec,)), (x,), name="tiny")
    >>> profile.flops, profile.activation_bytes  # 2 * 2 * 8 * 4, and 4 * (2 * 8 + 2 * 4)
    ((128,), 96)
    """
    _check_empty(module)
    blocks = cut(stored_as(root, format_named(format)) if format else root)
    if not blocks:
        raise ModelError("the module has no weights", hint="a module with parameters")
    kwargs = dict(kwargs or {})
    counter = FlopCounterMode(display=False, custom_mapping=_COUNTED_TOO)
    recorder = _Recorder(module, blocks, counter)
    recorder.begin_tensors((args, kwargs, list(module.buffers())))
    hooks = recorder.attach(module)
    try:
        with torch.inference_mode(), counter, recorder:
            module(*args, **kwargs)
    except Exception as error:
        raise ModelError(
            f"{type(module).__name__} cannot be run without its weights: {error}",
            hint="inputs of the shapes that it takes; a forward that does not look at values",
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    order = recorder.order
    return Profile(
        name=name,
        blocks=tuple(blocks[index] for index in order),
        flops=tuple(recorder.flops[index] for index in order),
        activation_bytes=recorder.peak_bytes,
        compute_dtype=_compute_dtype(module),
    )


class _Recorder(TorchDispatchMode):
    """Sees every operation of a pass, before it is taken apart into simpler ones.

    In inference mode, operations like ``linear`` and attention arrive whole. ``counter`` takes them
    apart below, and its total before and after each says what it cost.
    """

    def __init__(
        self, module: nn.Module, blocks: Sequence[Block], counter: FlopCounterMode
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types here
        self.flops = [0] * len(blocks)
        self.peak_bytes = 0
        self._live_bytes = 0
        self._blocks = blocks
        self._counter = counter
        self._begun: dict[int, None] = {}  # in order
        self._last = 0
        of_tensor: dict[str, list[int]] = {}
        for index, block in enumerate(blocks):
            for part in block.parts:
                of_tensor.setdefault(part.tensor, []).append(index)
        # A storage has one Python object for as long as it lives, so its id names it.
        self._storages = {
            name: parameter.untyped_storage() for name, parameter in module.named_parameters()
        }
        self._weights = {id(storage): name for name, storage in self._storages.items()}
        self._of_tensor = of_tensor
        self._live: set[int] = set()

    @property
    def order(self) -> list[int]:
        """Indices of all blocks, as they began; then those that did not."""
        return [*self._begun, *(i for i in range(len(self._blocks)) if i not in self._begun)]

    def attach(self, module: nn.Module) -> list[RemovableHandle]:
        """Have the modules that bracket blocks say when their forward begins."""
        bracketed: dict[str, list[int]] = {}
        for index, block in enumerate(self._blocks):
            if block.module is not None:
                bracketed.setdefault(block.module, []).append(index)
        modules = dict(module.named_modules())

        def hook(indices: list[int]) -> Callable[..., None]:
            return lambda *_: self._begin(indices)

        return [
            modules[name].register_forward_pre_hook(hook(indices))
            for name, indices in bracketed.items()
        ]

    def begin_tensors(self, tree: object) -> None:
        """Count the tensors in a tree of arguments or results, each memory once while it lives."""
        for tensor in _tensors(tree):
            storage = tensor.untyped_storage()
            key = id(storage)
            if not tensor.is_meta or key in self._live or key in self._weights:
                continue
            nbytes = storage.nbytes()
            self._live.add(key)
            self._live_bytes += nbytes
            weakref.finalize(storage, self._end, key, nbytes).atexit = False
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)

    def _end(self, key: int, nbytes: int) -> None:
        self._live.discard(key)
        self._live_bytes -= nbytes

    def _begin(self, indices: Iterable[int]) -> None:
        for index in indices:
            self._begun.setdefault(index)
            self._last = index

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        _types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        weights = self._weights_of((args, kwargs))
        for name in weights:
            found = self._of_tensor.get(name, [])
            rows_only = func is torch.ops.aten.embedding.default  # no visit: see Block.looked_up
            self._begin(i for i in found if self._blocks[i].looked_up or not rows_only)
        before = self._counter.get_total_flops()
        result = func(*args, **kwargs)
        if flops := self._counter.get_total_flops() - before:
            self._share(flops, weights)
        self.begin_tensors(result)
        return result

    def _weights_of(self, tree: object) -> list[str]:
        """Names of the weights that an operation uses, the largest last."""
        keys = [id(tensor.untyped_storage()) for tensor in _tensors(tree)]
        names = {self._weights[key] for key in keys if key in self._weights}
        return sorted(names, key=lambda name: (self._storages[name].nbytes(), name))

    def _share(self, flops: int, weights: Sequence[str]) -> None:
        """Add an operation's FLOPs to the blocks of its largest weight, else to the last begun."""
        indices = self._of_tensor.get(weights[-1], []) if weights else []
        if len(indices) <= 1:
            self.flops[indices[0] if indices else self._last] += flops
            return
        parts = [self._blocks[index].parts[0] for index in indices]
        rows = parts[-1].first_row + parts[-1].shape[0]
        for index, part in zip(indices, parts, strict=True):
            end = part.first_row + part.shape[0]
            self.flops[index] += flops * end // rows - flops * part.first_row // rows


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _check_empty(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if not parameter.is_meta:
            raise ModelError(
                f"{name} is on {parameter.device}: a profile is made without weights",
                hint='build the module under torch.device("meta")',
            )


def _compute_dtype(module: nn.Module) -> str:
    """The dtype of most weights, in which the module computes."""
    totals: Counter[str] = Counter({"BF16": 0})
    for parameter in module.parameters():
        totals[_DTYPE_NAMES.get(parameter.dtype, "BF16")] += parameter.numel()
    return max(totals, key=lambda name: totals[name])
