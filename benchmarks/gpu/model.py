"""A model's weights in pinned host memory, as the planner cuts it, and modules that use them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distorch.integrations import planning
from distorch.integrations.module_tree import Stored, Tree, as_parameter, describe, whole
from distorch.integrations.resting import Packed
from distorch.plan.blocks import Block, Part
from distorch.quant.block_formats import block_format
from gpu.arena import Arena
from gpu.shapes import Shape

_planning: Any = planning  # a tiny model is cut more finely there
_TILE = (1 << 24) - 4099  # random numbers take long: one draw for all, of an odd length
_TILE_BLOCKS = 60_007  # of packed ones
_SPREAD = 0.02  # of a bias, and of packed weights


@dataclass(frozen=True, slots=True)
class Span:
    """One weight: its group, where it lies in the group's bytes, and what it is."""

    group: str
    offset: int
    part: Part
    dtype: torch.dtype


class Model:
    """A shape with weights of a format: ``BF16``, ``F8_E4M3``, ``Q8_0``, ``Q4_K``.

    A *group* is what other schemes stream at once: a child of one of the shape's lists; all else
    is the group "". A group's bytes are one run of pinned memory, laid out as the planner's blocks.
    """

    def __init__(self, shape: Shape, form: str, arena: Arena, *, length: int = _TILE) -> None:
        began = time.perf_counter()
        self.shape, self.form = shape, form
        self.name = shape.name if form == "BF16" else f"{shape.name} {form}"
        self.stored = None if form == "BF16" else _stored(shape, form)
        tree = self.tree(self.empty())
        root = tree.root if self.stored else whole(tree.root)
        self.blocks = _planning.cut(root)  # as `distribute` does, whatever it takes for a block
        self.groups: dict[str, Tensor] = {}
        self.block_memory: dict[str, Tensor] = {}
        self.spans: dict[str, Span] = {}
        self._place(tree, arena)
        self.is_pinned = arena.is_pinned
        self._fill(length)
        self.build_seconds = time.perf_counter() - began

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(block.nbytes for block in self.blocks)

    def empty(self) -> nn.Module:
        """Return the module without memory."""
        with torch.device("meta"):
            module = self.shape.build()
        return module.bfloat16().eval().requires_grad_(requires_grad=False)

    def tree(self, module: nn.Module) -> Tree:
        """Describe a module of this model, as its weights are stored."""
        return describe(module, self.stored)

    def raw(self, name: str) -> Tensor:
        """A weight's bytes in host memory."""
        span = self.spans[name]
        return self.groups[span.group][span.offset : span.offset + span.part.nbytes]

    def weight(self, name: str, raw: Tensor) -> Tensor:
        """View bytes, wherever they are, as a weight of this model."""
        span = self.spans[name]
        return as_parameter(Packed(span.part.dtype, span.dtype).weight(raw, span.part.shape))

    def module(self, device: torch.device | None = None) -> nn.Module:
        """Return a module with its weights on a device, or where they lie in host memory."""
        module = self.empty()
        for name, weight in self.tree(module).weights.items():
            raw = self.raw(name)
            tensor = self.weight(name, raw if device is None else raw.to(device))
            for owner, attribute in weight.users:
                owner._parameters[attribute] = tensor  # type: ignore[assignment]  # may be lazy
        return module

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """Return what a step is given, on a device."""
        return {
            name: value.to(device, torch.bfloat16 if value.is_floating_point() else value.dtype)
            for name, value in self.shape.inputs().items()
        }

    def group_of(self, name: str) -> str:
        """Return the group that a weight is in."""
        first, _, rest = name.partition(".")
        return f"{first}.{rest.partition('.')[0]}" if first in self.shape.lists else ""

    def _place(self, tree: Tree, arena: Arena) -> None:
        grouped: dict[str, list[Block]] = {}
        for block in self.blocks:
            grouped.setdefault(self.group_of(block.parts[0].tensor), []).append(block)
        arena.reset()
        for group, blocks in grouped.items():
            memory = self.groups[group] = arena.place(sum(block.nbytes for block in blocks))
            begin = 0
            for block in blocks:
                self.block_memory[block.name] = memory[begin : begin + block.nbytes]
                for part, offset in zip(block.parts, block.offsets, strict=True):
                    if not part.first_row:  # the rows that follow lie behind it
                        self._add_span(tree, group, begin + offset, part)
                begin += block.nbytes

    def _add_span(self, tree: Tree, group: str, offset: int, part: Part) -> None:
        weight = tree.weights[part.tensor]
        kept = self.stored[part.tensor] if self.stored else None
        whole = Part(
            tensor=part.tensor,
            dtype=part.dtype,
            shape=tuple(weight.shape),
            nbytes=kept.nbytes if kept else weight.original.nbytes,
        )
        self.spans[part.tensor] = Span(group, offset, whole, weight.original.dtype)

    def _fill(self, length: int) -> None:
        random = torch.Generator().manual_seed(0)
        tile = torch.randn(length, generator=random).bfloat16()
        packed = None if self.form == "BF16" else _packed_tile(self.form, length, random)
        for number, (name, span) in enumerate(self.spans.items()):
            out = self.raw(name)
            if span.part.dtype == "BF16":
                _fill_dense(out.view(torch.bfloat16), tile, number * 7919, span.part.shape, name)
            else:
                assert packed is not None, "only a packed model has packed weights"
                form_bytes = block_format(self.form).nbytes
                for piece, source in _pieces(out, packed, number * 7919 * form_bytes):
                    piece.copy_(source)


def _pieces(out: Tensor, tile: Tensor, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of ``out``, each with as much of the tile, which begins elsewhere each time."""
    done, at = 0, start % len(tile)
    while done < len(out):
        size = min(len(out) - done, len(tile) - at)
        yield out[done : done + size], tile[at : at + size]
        done, at = done + size, 0


def _fill_dense(out: Tensor, tile: Tensor, start: int, shape: tuple[int, ...], name: str) -> None:
    """Matrices keep the size of what they multiply; norms are about one, biases small."""
    fan_in = out.numel() // shape[0] if len(shape) > 1 else 0
    scale = fan_in**-0.5 if fan_in > 1 else _SPREAD
    for piece, source in _pieces(out, tile, start):
        torch.mul(source, scale, out=piece)
    if len(shape) == 1 and name.endswith("weight"):
        out += 1


def _packed_tile(form: str, length: int, random: torch.Generator) -> Tensor:
    """Random blocks whose scales make weights of about 0.02, flat uint8."""
    num_blocks = max(16, min(_TILE_BLOCKS, length // block_format(form).elements))
    if form == "F8_E4M3":
        weights = torch.randn(length, generator=random) * _SPREAD
        return weights.to(torch.float8_e4m3fn).view(torch.uint8)
    shape = num_blocks, block_format(form).nbytes
    blocks = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)
    scales = {"Q8_0": [2.7e-4], "Q4_K": [1e-4, 7.5e-4]}[form]
    halves = torch.tensor(scales, dtype=torch.float16).view(torch.uint8)
    blocks[:, : len(halves)] = halves
    return blocks.view(-1)


def _stored(shape: Shape, form: str) -> dict[str, Stored]:
    """Matrices of whole blocks are packed, as files have them; all else stays bf16."""
    with torch.device("meta"):
        module = shape.build()
    kind = block_format(form)
    found = {}
    for prefix, owner in module.named_modules():
        for attribute, parameter in owner.named_parameters(recurse=False):
            name, size = f"{prefix}.{attribute}" if prefix else attribute, tuple(parameter.shape)
            packed = isinstance(owner, nn.Linear | nn.Embedding) and len(size) > 1
            if packed and size[-1] % kind.elements == 0:
                nbytes = parameter.numel() // kind.elements * kind.nbytes
                found[name] = Stored(dtype=form, shape=size, nbytes=nbytes)
            else:
                found[name] = Stored(dtype="BF16", shape=size, nbytes=2 * parameter.numel())
    return found
