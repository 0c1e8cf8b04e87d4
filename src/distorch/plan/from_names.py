"""The tree of a model, as the names of its tensors tell it: a plan needs no torch and no classes.

What the names cannot tell is left to the module tree of a loaded model. For the decoders that
DisTorch loads, both trees are cut into the same blocks (``tests/cli/test_plan.py``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Final

from distorch.formats import TensorInfo
from distorch.formats.scales import pair_scales
from distorch.plan.blocks import Block, Node, TensorSpec
from distorch.plan.cost import Profile

__all__ = ["profile_from_names", "tree_from_names"]

_EMBEDDINGS: Final = {"token_embd", "embed_tokens", "wte"}
_HEADS: Final = {"output", "lm_head"}
_COMPUTED: Final = {"rope_freqs.weight"}  # in the file, but computed by the model
_IN_LAYER: Final = re.compile(r"(attn|ffn)_(?!norm)")  # llama.cpp names no modules inside a layer
_MAX_DEPTH: Final = 32  # of modules; a name of 30,000 dots must not exhaust the stack

_ORDER: Final = """
    model token_embd embed_tokens blk layers attn self_attn mlp ffn
    attn_q q_proj attn_k k_proj attn_v v_proj attn_output o_proj
    ffn_gate gate_proj ffn_up up_proj ffn_down down_proj
    attn_norm input_layernorm post_attention_layernorm output_norm norm output lm_head
"""
_RANK: Final = {name: rank for rank, name in enumerate(_ORDER.split())}


@dataclass(slots=True)
class _Branch:
    """A module while its tree is being built."""

    tensors: list[TensorSpec] = field(default_factory=list)
    children: dict[str, _Branch] = field(default_factory=dict)


def tree_from_names(tensors: Mapping[str, TensorInfo]) -> Node:
    """Build the tree that `distorch.plan.blocks.cut` cuts, in execution order as far as known.

    Dots part modules. A module whose children are all numbered is a list of layers, which has no
    forward of its own. An embedding without an output head in the file is the head as well.
    Scales are no weights of their own.

    >>> from pathlib import Path
    >>> names = ["output_norm.weight", "blk.10.ffn_up.weight", "blk.9.ffn_up.weight"]
    >>> file = Path("tiny.gguf")
    >>> infos = {name: TensorInfo(name, "F32", (4, 4), 0, 64, file) for name in names}
    >>> [node.name for node in tree_from_names(infos).walk() if node.tensors]
    ['blk.9.ffn.ffn_up', 'blk.10.ffn.ffn_up', 'output_norm']
    """
    tied = not any(path[-2:-1] and path[-2] in _HEADS for path in map(_path, tensors))
    root = _Branch()
    for tensor, info in pair_scales(tensors).tensors.items():
        if tensor in _COMPUTED:
            continue
        *modules, leaf = _path(tensor)
        branch = root
        for name in modules:
            branch = branch.children.setdefault(name, _Branch())
        embedding = leaf == "weight" and bool(modules) and modules[-1] in _EMBEDDINGS
        spec = TensorSpec(
            name=tensor,
            dtype=info.dtype,
            shape=info.shape,
            nbytes=info.nbytes,
            free=embedding,
            looked_up=embedding and not tied,
        )
        branch.tensors.append(spec)
    return _node("", root)


def _path(name: str) -> list[str]:
    """Part a tensor's name into modules and its own name; group what llama.cpp keeps flat."""
    path = name.split(".", _MAX_DEPTH)
    if path[0] == "blk" and len(path) > 3 and (group := _IN_LAYER.match(path[2])):  # noqa: PLR2004
        path.insert(2, group[1])
    return path


def _node(name: str, branch: _Branch) -> Node:
    children = tuple(
        _node(f"{name}.{child}" if name else child, branch.children[child])
        for child in sorted(branch.children, key=_place)
    )
    numbered = bool(children) and all(map(str.isdecimal, branch.children))
    return Node(
        name=name,
        tensors=tuple(branch.tensors),
        children=children,
        callable=bool(branch.tensors) or not numbered,
    )


def _place(name: str) -> tuple[int, int, str]:
    """Sort known names as they are executed, numbers by size, and the others by their letters."""
    return _RANK.get(name, len(_RANK)), len(name) if name.isdecimal() else 0, name


def profile_from_names(
    name: str, blocks: Sequence[Block], num_tokens: int, compute_dtype: str
) -> Profile:
    """Estimate a language model's step from its blocks: two operations a weight and token.

    Attention over earlier tokens, and activations, are not counted: a header does not tell them.
    """
    flops = tuple(
        0
        if block.looked_up
        else sum(2 * prod(part.shape) * num_tokens for part in block.parts if len(part.shape) > 1)
        for block in blocks
    )
    return Profile(
        name=f"{name}, {num_tokens} tokens",
        blocks=tuple(blocks),
        flops=flops,
        activation_bytes=0,
        compute_dtype=compute_dtype,
    )
