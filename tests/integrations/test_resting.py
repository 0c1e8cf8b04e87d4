"""A weight that rests elsewhere answers every operation as the dense one would."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import cast

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows
from torch import Tensor, nn

import distorch
from distorch.errors import ModelError
from distorch.integrations.attach import Handle
from distorch.integrations.resting import RestingWeight
from distorch.machine import Machine
from tests.integrations.make import equal, values
from tests.integrations.modules import Own

ROWS, COLUMNS = 2 * 16384, 24


@pytest.fixture(scope="module", params=["cpu,0b;disk,*", "cpu,50%;disk,50%"])
def resting(request: pytest.FixtureRequest) -> Iterator[tuple[Tensor, Tensor, Handle]]:
    """A weight of several runs of rows, some of them at rest in RAM; the dense one; the handle."""
    torch.manual_seed(0)
    module = nn.Linear(COLUMNS, ROWS, bias=False)
    dense = module.weight.detach().clone()
    handle = distorch.distribute(module, request.param)
    yield module.weight, dense, handle
    handle.remove()


Resting = tuple[Tensor, Tensor, Handle]


def test_it_is_made_of_runs_that_cover_every_row_once(resting: Resting) -> None:
    weight = resting[0]
    assert isinstance(weight, RestingWeight)
    assert isinstance(weight, nn.Parameter)
    covered = 0
    for run in weight.runs:
        assert run.part.first_row == covered
        covered += run.part.shape[0]
    assert covered == ROWS
    assert len(weight.runs) > 1


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 16, 33, 100])
def test_linear_gives_the_dense_bits(num_tokens: int, resting: Resting) -> None:
    weight, dense, _ = resting
    bias = torch.randn(ROWS)
    x = torch.randn(num_tokens, COLUMNS)
    with torch.inference_mode():
        for view in (x, x.unsqueeze(0), x[0], x.t().contiguous().t()):
            assert torch.equal(F.linear(view, weight), F.linear(view, dense))
            assert torch.equal(F.linear(view, weight, bias), F.linear(view, dense, bias))


def test_linear_of_no_tokens_and_of_wrong_widths(resting: Resting) -> None:
    weight, dense, _ = resting
    assert F.linear(torch.empty(0, COLUMNS), weight).shape == (0, ROWS)
    for wrong in (torch.randn(2, COLUMNS - 1), torch.randn(2, COLUMNS, dtype=torch.float64)):
        with pytest.raises(RuntimeError):
            F.linear(wrong, dense)
        with pytest.raises(RuntimeError):
            F.linear(wrong, weight)


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor([0, 8191, 8192, 16384, ROWS - 1, 0]),
        torch.randint(0, ROWS, (7, 9)),
        torch.tensor(5),
        torch.tensor([[3]], dtype=torch.int32),
        torch.empty(0, 3, dtype=torch.int64),
    ],
    ids=["borders", "many", "scalar", "int32", "none"],
)
def test_embedding_gives_the_dense_rows(ids: Tensor, resting: Resting) -> None:
    weight, dense, _ = resting
    assert torch.equal(F.embedding(ids, weight), F.embedding(ids, dense))
    assert torch.equal(F.embedding(ids, weight, padding_idx=3), F.embedding(ids, dense))


@pytest.mark.parametrize("wrong", [-1, ROWS])
def test_embedding_out_of_range_is_an_index_error(wrong: int, resting: Resting) -> None:
    with pytest.raises(IndexError):
        F.embedding(torch.tensor([0, wrong]), resting[0])


def test_embedding_reads_rows_and_no_blocks(resting: Resting) -> None:
    weight, _, handle = resting
    before = handle.stats().num_visits, handle.stats().num_unplanned
    F.embedding(torch.arange(10), weight)
    assert (handle.stats().num_visits, handle.stats().num_unplanned) == before


@pytest.mark.parametrize(
    "operation",
    [
        lambda w: w + 1,
        lambda w: torch.ones(2, COLUMNS) @ w.T,
        lambda w: w[100:104],
        lambda w: w.sum(dim=0),
        lambda w: w.view(-1, 2),
        lambda w: torch.cat([w, w], dim=1),
        lambda w: w.double(),
    ],
)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_any_other_operation_gets_the_whole_weight(
    operation: Callable[[Tensor], Tensor], mode: Callable[[], object], resting: Resting
) -> None:
    weight, dense, _ = resting
    with mode():  # type: ignore[attr-defined]
        found, expected = operation(weight), operation(dense)
    assert type(found) is Tensor
    assert torch.equal(found, expected)


def test_copy_and_detach_are_the_same_weight(resting: Resting) -> None:
    weight, dense, _ = resting
    for twin in (copy.copy(weight), weight.detach(), weight.data):
        assert isinstance(twin, RestingWeight)
        assert torch.equal(twin + 0, dense)
    assert repr(weight) == f"RestingWeight(shape=({ROWS}, {COLUMNS}), dtype=torch.float32)"


def test_a_whole_weight_is_memory_of_its_own_and_aligned(resting: Resting) -> None:
    weight, dense, handle = resting
    assert isinstance(weight, RestingWeight)
    first, second = weight.materialize(), weight.materialize()
    assert first.data_ptr() % 64 == 0
    assert first.data_ptr() != second.data_ptr()
    first.zero_()
    assert torch.equal(weight.materialize(), dense)
    assert handle.weight_bytes == handle.plan.bytes_by_tier["cpu"] + handle.plan.ring.nbytes


def test_no_lease_is_left_by_an_operation_that_fails(resting: Resting) -> None:
    weight, dense, handle = resting
    for _ in range(handle.plan.ring.num_slots + 1):
        with pytest.raises(RuntimeError):
            F.linear(torch.randn(2, COLUMNS + 1), weight)
    x = torch.randn(2, COLUMNS)
    assert torch.equal(F.linear(x, weight), F.linear(x, dense))


def test_the_usual_calls_on_a_distributed_module_work(machine: Machine) -> None:
    module, x = nn.Sequential(Own(), nn.Linear(32, 16384)), torch.randn(2, 32)
    with torch.inference_mode():
        expected = module(x)
    before = module.state_dict()
    shapes = {name: (p.shape, p.dtype) for name, p in before.items()}
    before = {name: p.clone() for name, p in before.items()}
    handle = distorch.distribute(module, "cpu,0b;disk,*", machine=machine)
    state = module.state_dict()
    assert {name: (p.shape, p.dtype) for name, p in state.items()} == shapes
    assert all(torch.equal(value + 0, before[name]) for name, value in state.items())
    assert module.to("cpu").to(torch.float32).float().cpu().eval().train() is module
    assert (
        sum(p.numel() for p in module.parameters()) == sum(v.numel() for v in before.values()) - 32
    )
    assert all(isinstance(p, nn.Parameter) for p in module.parameters())
    assert len(repr(module)) < 2000
    module.zero_grad()
    module.requires_grad_(requires_grad=False)
    with torch.inference_mode():
        assert equal(module(x), expected)
    handle.remove()


def test_a_weight_at_rest_is_not_changed_in_place_without_a_word(machine: Machine) -> None:
    """``load_state_dict`` and initialisers write into weights: lost writes would be a trap."""
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 16384))
    other = {name: torch.ones_like(p) for name, p in module.state_dict().items()}
    handle = distorch.distribute(module, "cpu,0b;disk,*", machine=machine)
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        module.load_state_dict(other)
    with pytest.raises((RuntimeError, TypeError, ValueError)), torch.no_grad():
        cast("nn.Linear", module[0]).weight.zero_()
    handle.remove()


@pytest.mark.parametrize(
    "clone",
    [copy.deepcopy, pickle.dumps, lambda m: torch.save(m, io.BytesIO())],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_of_a_distributed_module_are_refused_with_the_way_out(
    clone: Callable[[nn.Module], object], machine: Machine
) -> None:
    module, x = nn.Linear(8, 8), torch.randn(2, 8)
    expected = module(x)
    handle = distorch.distribute(module, "cpu,0b;disk,*", machine=machine)
    with pytest.raises((ModelError, TypeError), match=r"remove\(\)"):
        clone(module)
    assert equal(module(x), expected)
    handle.remove()
    assert equal(copy.deepcopy(module)(x), expected)


def test_a_state_dict_is_saved_or_refused_with_the_way_out(machine: Machine) -> None:
    module = nn.Linear(8, 8)
    before = values(module)
    handle = distorch.distribute(module, "cpu,0b;disk,*", machine=machine)
    file = io.BytesIO()
    try:
        torch.save(module.state_dict(), file)
    except (ModelError, TypeError) as error:
        assert "remove()" in str(error)  # noqa: PT017  either is right
    else:
        file.seek(0)
        loaded = torch.load(file)
        assert all(equal(loaded[name], value) for name, value in before.items())
    handle.remove()
