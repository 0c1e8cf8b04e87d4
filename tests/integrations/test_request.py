"""What a user may ask for, and what is refused; a plan made before is one way to ask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import distorch
from distorch.allocation import Allocation
from distorch.errors import AllocationError, DistorchError, ModelError, StorageError
from distorch.integrations.module_tree import describe
from distorch.machine import Machine
from distorch.plan.blocks import cut
from distorch.plan.plan import Plan
from distorch.plan.planner import make_plan
from tests.integrations.make import equal, leaving_nothing_open, num_hooks, values

pytestmark = pytest.mark.usefixtures("seed")


@pytest.mark.parametrize(
    ("wanted", "error"),
    [
        ({"allocation": "cpu,*", "virtual_vram_gb": 1}, AllocationError),
        ({"allocation": "cpu,*", "donor": "disk"}, AllocationError),
        ({"allocation": 12}, AllocationError),
        ({"allocation": ""}, AllocationError),
        ({"allocation": "cpu"}, AllocationError),
        ({"allocation": "cuda:0,1gb;cpu,*"}, DistorchError),
        ({"allocation": "cpu,*", "compute": "cuda:0"}, DistorchError),
        ({"allocation": "cpu,*;disk,0b", "compute": "disk"}, DistorchError),
        ({"virtual_vram_gb": "much"}, AllocationError),
        ({"virtual_vram_gb": -1}, AllocationError),
        ({"virtual_vram_gb": 1, "donor": "tape"}, DistorchError),
        ({"allocation": "cpu,0b;disk,*", "ring": "banana"}, AllocationError),
        ({"allocation": "cpu,0b;disk,*", "ring": "50%"}, AllocationError),
        ({"allocation": "cpu,0b;disk,*", "ring": "*"}, AllocationError),
        ({"allocation": "cpu,0b;disk,*", "ring": 1}, AllocationError),
        ({"allocation": "cpu,0b;disk,*", "ring": -5}, AllocationError),
        ({"allocation": "cpu,0b;disk:/nowhere/at/all,*"}, StorageError),
    ],
    ids=str,
)
def test_wrong_arguments_are_our_errors_and_leave_the_module_alone(
    wanted: dict[str, Any], error: type[DistorchError], machine: Machine
) -> None:
    module = nn.Linear(8, 8)
    before = values(module)
    with leaving_nothing_open(), pytest.raises(error) as caught:
        distorch.distribute(module, machine=machine, **wanted)
    assert caught.value.exit_code == 2
    if isinstance(wanted.get("ring"), str):
        assert "ring" in str(caught.value), "the message is about the ring, not about a line"
    assert all(equal(p, before[name]) for name, p in module.named_parameters())
    assert num_hooks(module) == 0


def test_a_plan_made_before_is_the_plan_that_runs(machine: Machine) -> None:
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(6))).eval()
    x = torch.randn(2, 256)
    with torch.inference_mode():
        expected = model(x)
        blocks = cut(describe(model).root)
        plan = make_plan(blocks, Allocation.parse("cpu,500kb;disk,*"), machine)
        moved = Plan.from_json(plan.to_json())
        handle = distorch.distribute(model, moved, machine=machine)
        assert handle.plan.placements == plan.placements
        assert handle.plan.ring == plan.ring
        assert torch.equal(model(x), expected)
        handle.rebudget("cpu,*", machine=machine)
        handle.rebudget(moved, machine=machine)
        assert handle.plan.placements == plan.placements
        assert torch.equal(model(x), expected)
        handle.remove()


def test_a_plan_of_another_model_is_refused_and_changes_nothing(machine: Machine) -> None:
    model, other = nn.Linear(256, 256).eval(), nn.Linear(256, 128).eval()
    plan = make_plan(cut(describe(other).root), Allocation.parse("cpu,0b;disk,*"), machine)
    with pytest.raises(AllocationError, match="another model"):
        distorch.distribute(model, plan, machine=machine)
    with pytest.raises(ModelError):
        distorch.handle_of(model)


@pytest.mark.parametrize("more", [{"ring": "1mb"}, {"compute": "cpu"}, {"virtual_vram_gb": 1}])
def test_a_plan_with_another_argument_beside_it_is_refused(
    machine: Machine, more: dict[str, Any]
) -> None:
    model = nn.Linear(256, 256).eval()
    plan = make_plan(cut(describe(model).root), Allocation.parse("cpu,0b;disk,*"), machine)
    with pytest.raises(AllocationError, match="plan"):
        distorch.distribute(model, plan, machine=machine, **more)
