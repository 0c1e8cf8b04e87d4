"""Describes a module for the planner: its tree, its weights, and who uses each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from distorch.integrations.foreign import Foreign, foreign
from distorch.integrations.resting import TORCH_DTYPES, Form, Packed, RestingWeight
from distorch.plan.blocks import Node, TensorSpec
from distorch.plan.plan import gib
from distorch.quant.scale import Scale
from distorch.quant.tensor import QuantTensor

__all__ = ["Stored", "Tree", "Weight", "as_parameter", "describe", "whole"]

_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_THREAD_ROWS = 128  # a matrix product adds in one order over whole groups of so many rows
_RUN_ROWS = 512  # runs are multiples of this (plan/blocks.py)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass(slots=True)
class Weight:
    """One tensor of a model: its parameter as found, and every place that names it."""

    name: str
    original: nn.Parameter | QuantTensor
    users: list[tuple[nn.Module, str]] = field(default_factory=list)
    shape: tuple[int, ...] = ()
    form: Form = field(init=False)

    @property
    def is_away(self) -> bool:
        """Whether what the model finds under its name now is not in memory, or not where it was."""
        owner, attribute = self.users[0]
        found = owner._parameters[attribute]
        assert found is not None, "a weight stays where it was named"
        return isinstance(found, RestingWeight) or found.device != _home(self.original)

    @property
    def memory(self) -> Tensor:
        """What holds the parameter's values: of a packed weight, its blocks."""
        weight = self.original
        if isinstance(self.form, Foreign):
            return self.form.gather()
        return weight.packed if isinstance(weight, QuantTensor) else weight.data

    def empty(self) -> None:
        """Let go of the parameter's values: they rest elsewhere now."""
        if isinstance(self.form, Foreign):
            self.form.empty()
        else:
            self._hold(self.memory.new_empty(0))

    def fill(self, raw: Tensor) -> None:
        """Give the parameter its values again, from their bytes."""
        if isinstance(self.form, Foreign):
            self.form.fill(raw.to(_home(self.original)))
            return
        if not isinstance(self.original, QuantTensor):
            raw = raw.view(self.original.dtype).view(self.shape)
        self._hold(raw.to(self.original.device))

    def _hold(self, memory: Tensor) -> None:
        if isinstance(self.original, QuantTensor):
            self.original.packed = memory
        else:
            self.original.data = memory

    def restore(self, resting: RestingWeight) -> None:
        """Bring the weight to where it was: into the parameter from before, if that had values."""
        found: Tensor = self.original
        if self.original.is_meta:
            found = as_parameter(resting.whole(_home(self.original)))
        else:
            self.fill(resting.raw(_home(self.original)))
        for owner, attribute in self.users:
            owner._parameters[attribute] = found  # type: ignore[assignment]  # may be lazy

    def give_up(self) -> None:
        """Put the parameter from before where it was, without its values: those are gone."""
        for owner, attribute in self.users:
            owner._parameters[attribute] = self.original  # type: ignore[assignment]  # may be packed


def _home(parameter: Tensor) -> torch.device:
    """Where a weight is when it is not distributed."""
    return torch.device("cpu") if parameter.is_meta else parameter.device


@dataclass(frozen=True, slots=True)
class Tree:
    """A module as the planner sees it; ``notes`` tell what stays where it is, and why.

    ``beside_bytes`` are to be left free on the device that computes.
    """

    root: Node
    weights: dict[str, Weight]
    notes: tuple[str, ...]
    beside_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Stored:
    """How a tensor is stored, where that is not how the model computes with it."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    whole: bool = False
    scale: Scale | None = None


def describe(module: nn.Module, stored: Mapping[str, Stored] | None = None) -> Tree:
    """Describe ``module``; ``stored`` says how a checkpoint keeps each tensor, by model name.

    A weight that several modules share is named once, by its first user, and rests in free blocks;
    so does an embedding's.
    """
    weights: dict[int, Weight] = {}
    notes: list[str] = []
    changed: set[int] = set()
    for prefix, owner in module.named_modules():
        for attribute, parameter in owner._parameters.items():
            if parameter is None:
                continue
            name = f"{prefix}.{attribute}" if prefix else attribute
            weight = weights.setdefault(id(parameter), Weight(name, parameter))
            weight.users.append((owner, attribute))
            if isinstance(owner, nn.Embedding) and owner.max_norm is not None and stored is None:
                changed.add(id(parameter))
    for key, weight in list(weights.items()):
        made_of = foreign(weight.original, [owner for owner, _ in weight.users])
        reason = "max_norm changes it" if key in changed else _immovable(weight.original)
        if stored is None and made_of is not None:
            weight.shape, weight.form = tuple(weight.original.shape), made_of
        elif reason and stored is None:
            notes.append(f"{weight.name} stays where it is: {reason}")
            del weights[key]
        else:
            weight.shape = tuple(weight.original.shape)
            weight.form = _form(weight.original, stored[weight.name] if stored else None)
    names = {key: weight.name for key, weight in weights.items()}
    root = _node("", module, names, weights, stored)
    return Tree(
        root=root,
        weights={weight.name: weight for weight in weights.values()},
        notes=(*notes, *_note_of_scales(weights.values())),
    )


def _form(parameter: Tensor, stored: Stored | None) -> Form:
    """What a weight is made of: as a checkpoint has it, else as the module has it."""
    if stored is not None:
        return Packed(stored.dtype, parameter.dtype, stored.scale)
    if isinstance(parameter, QuantTensor):
        return Packed(parameter.form.name, parameter.compute_dtype, parameter.scale)
    return Packed(_DTYPE_NAMES[parameter.dtype], parameter.dtype)


def _note_of_scales(weights: Iterable[Weight]) -> list[str]:
    """Scales are small, and are not placed: the plan says so."""
    sizes = [weight.form.nbytes for weight in weights if weight.form.nbytes]
    if not sizes:
        return []
    return [f"{gib(sum(sizes))} of scales, of {len(sizes)} weights, stay on the compute device"]


def _node(
    prefix: str,
    module: nn.Module,
    names: Mapping[int, str],
    weights: Mapping[int, Weight],
    stored: Mapping[str, Stored] | None,
) -> Node:
    tensors = [
        _spec(weights[id(parameter)], stored)
        for attribute, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in names
    ]
    children = [
        _node(f"{prefix}.{name}" if prefix else name, child, names, weights, stored)
        for name, child in module.named_children()
    ]
    return Node(
        name=prefix,
        tensors=tuple(tensors),
        children=tuple(children),
        callable=not isinstance(module, _CONTAINERS),
        atomic=isinstance(module, nn.MultiheadAttention),
    )


def whole(node: Node) -> Node:
    """Return the tree with weights that are not cut by rows."""
    return replace(
        node,
        tensors=tuple(replace(spec, whole=True) for spec in node.tensors),
        children=tuple(whole(child) for child in node.children),
    )


def _spec(weight: Weight, stored: Mapping[str, Stored] | None) -> TensorSpec:
    parameter = weight.original
    looked_up = all(_looks_up(owner, attribute) for owner, attribute in weight.users)
    looked_up = looked_up and not (isinstance(parameter, QuantTensor) and not parameter.is_matrix)
    looked_up = looked_up and not isinstance(weight.form, Foreign)
    kept = stored[weight.name] if stored is not None else _as_packed(weight)
    return TensorSpec(
        name=weight.name,
        dtype=kept.dtype if kept else _DTYPE_NAMES[parameter.dtype],
        shape=kept.shape if kept else tuple(parameter.shape),
        nbytes=kept.nbytes if kept else parameter.numel() * parameter.element_size(),
        free=looked_up or len(weight.users) > 1,
        looked_up=looked_up,
        whole=kept.whole if kept else not _cuts_exactly(parameter),
    )


def _as_packed(weight: Weight) -> Stored | None:
    """How a weight that is packed in memory is stored; none that is not."""
    parameter = weight.original
    if isinstance(weight.form, Foreign):
        nbytes = weight.form.stored_bytes
        return Stored(dtype="U8", shape=(nbytes,), nbytes=nbytes, whole=True)
    if not isinstance(parameter, QuantTensor):
        return None
    return Stored(
        dtype=parameter.form.name,
        shape=tuple(parameter.shape),
        nbytes=parameter.nbytes,
        whole=not (parameter.is_matrix and _cuts_exactly(parameter)),
    )


def _cuts_exactly(parameter: Tensor) -> bool:
    """Whether runs of rows give the bits of the whole: if threads share both at the same places.

    A module that was loaded by us computes by runs in every placement, so it need not ask.
    """
    share = _THREAD_ROWS * torch.get_num_threads()
    return _RUN_ROWS % share == 0 and parameter.dim() > 0 and parameter.shape[0] % share == 0


def _looks_up(owner: nn.Module, attribute: str) -> bool:
    return isinstance(owner, nn.Embedding) and attribute == "weight" and owner.max_norm is None


def _immovable(parameter: Tensor) -> str:
    """Why a parameter cannot be moved as flat bytes; empty where it can."""
    if isinstance(parameter, QuantTensor):
        return ""
    if type(parameter) not in {nn.Parameter, Tensor}:
        return f"it is a {type(parameter).__name__}"
    if parameter.layout != torch.strided or not parameter.is_contiguous():
        return "it is not contiguous"
    if parameter.is_conj() or parameter.is_neg() or parameter.is_inference():
        return "it is lazily conjugated or negated, or was made in inference mode"
    if parameter.dtype not in _DTYPE_NAMES:
        return f"its dtype is {parameter.dtype}"
    return ""


def as_parameter(weight: Tensor) -> Tensor:
    """Make a dense weight a parameter that wants no gradient; a lazy one passes for one already."""
    dense = type(weight) is Tensor
    return nn.Parameter(weight, requires_grad=False) if dense else weight
