"""What the planner is told about a module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distorch.integrations.module_tree import Stored, as_parameter, describe
from distorch.integrations.resting import TORCH_DTYPES
from distorch.plan.blocks import Node, cut


def specs(node: Node) -> dict[str, object]:
    return {spec.name: spec for inner in node.walk() for spec in inner.tensors}


def test_every_weight_is_described_once_with_all_its_users() -> None:
    module = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.LayerNorm(4)})
    module["b"].weight = module["a"].weight
    tree = describe(module)
    assert list(tree.weights) == ["a.weight", "a.bias", "b.bias", "c.weight", "c.bias"]
    assert tree.weights["a.weight"].users == [(module["a"], "weight"), (module["b"], "weight")]
    assert {spec.name for node in tree.root.walk() for spec in node.tensors} == set(tree.weights)


def test_names_are_those_of_named_parameters() -> None:
    layer = nn.Linear(4, 4)
    module = nn.Sequential(nn.Sequential(layer, nn.ReLU()), layer, nn.MultiheadAttention(4, 2))
    assert list(describe(module).weights) == [name for name, _ in module.named_parameters()]


def test_a_shared_weight_is_free_and_so_is_a_table_that_is_only_looked_up() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 4)
            self.tied = nn.Embedding(10, 4)
            self.head = nn.Linear(4, 10, bias=False)
            self.head.weight = self.tied.weight
            self.normed = nn.Embedding(10, 4, max_norm=1.0)
            self.plain = nn.Linear(4, 4)

    found = {
        spec.name: (spec.free, spec.looked_up)
        for node in describe(Model()).root.walk()
        for spec in node.tensors
    }
    assert found["table.weight"] == (True, True)
    assert found["tied.weight"] == (True, False)
    assert "normed.weight" not in found  # max_norm changes it in place
    assert found["plain.weight"] == (False, False)


def test_containers_are_not_called_and_attention_is_not_taken_apart() -> None:
    module = nn.ModuleDict(
        {
            "list": nn.ModuleList([nn.Linear(4, 4)]),
            "weights": nn.ParameterList([torch.ones(3)]),
            "attention": nn.MultiheadAttention(4, 2),
            "sequence": nn.Sequential(nn.Linear(4, 4)),
        }
    )
    nodes = {node.name: node for node in describe(module).root.walk()}
    assert not any(nodes[name].callable for name in ("", "list", "weights"))
    assert nodes["attention"].callable
    assert nodes["attention"].atomic
    assert nodes["sequence"].callable


def test_modules_that_bracket_a_block_can_be_called() -> None:
    """A hook on a module that nobody calls would never bring its block."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList([torch.ones(64) for _ in range(3)])
            self.layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(2)])

    tree = describe(Model())
    callable_names = {node.name for node in tree.root.walk() if node.callable}
    for target_bytes in (1, 1 << 23):
        blocks = cut(tree.root, target_bytes=target_bytes)
        assert {b.module for b in blocks if b.module is not None} <= callable_names


@pytest.mark.parametrize(
    ("weight", "why"),
    [
        (torch.randn(4, 4).t(), "contiguous"),
        (torch.randn(4, dtype=torch.complex128), "complex128"),
        (torch.eye(3).to_sparse(), "contiguous"),
    ],
)
def test_what_cannot_move_is_left_out_with_a_note(weight: torch.Tensor, why: str) -> None:
    module = nn.Module()
    module.weight = nn.Parameter(weight, requires_grad=False)
    tree = describe(module)
    assert not tree.weights
    assert not specs(tree.root)
    assert len(tree.notes) == 1
    assert tree.notes[0].startswith("weight stays")
    assert why in tree.notes[0]


def test_a_parameter_of_a_foreign_class_is_left_alone() -> None:
    module = nn.LazyLinear(4)
    assert all("UninitializedParameter" in note for note in describe(module).notes)
    assert not describe(module).weights


@pytest.mark.parametrize("name", TORCH_DTYPES)
def test_bytes_are_those_of_the_dtype(name: str) -> None:
    module = nn.Module()
    dtype = TORCH_DTYPES[name]
    module.weight = nn.Parameter(torch.zeros(3, 5).to(dtype), requires_grad=False)
    (spec,) = describe(module).root.tensors
    assert (spec.dtype, spec.shape, spec.nbytes) == (name, (3, 5), 15 * dtype.itemsize)


def test_a_checkpoints_form_comes_before_the_modules() -> None:
    with torch.device("meta"):
        module = nn.Linear(32, 8, bias=False)
    stored = {"weight": Stored(dtype="Q8_0", shape=(8, 32), nbytes=8 * 34, whole=True)}
    (spec,) = describe(module, stored).root.tensors
    assert (spec.dtype, spec.shape, spec.nbytes, spec.whole) == ("Q8_0", (8, 32), 272, True)


def test_a_dense_weight_becomes_a_parameter_without_a_gradient() -> None:
    weight = torch.ones(3)
    found = as_parameter(weight)
    assert isinstance(found, nn.Parameter)
    assert not found.requires_grad
    assert found.data_ptr() == weight.data_ptr()
