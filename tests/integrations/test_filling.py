"""Weights leave the module's memory as they find their place; a full disk changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import distorch
from distorch.errors import ModelError, StorageError
from distorch.integrations.attach import Handle
from distorch.integrations.resting import RestingWeight
from distorch.machine import Machine
from tests.integrations.make import equal, fill_the_disk, leaving_nothing_open, num_hooks, stores
from tests.integrations.modules import Own, Tied

pytestmark = pytest.mark.usefixtures("seed")


@pytest.mark.parametrize("after_blocks", [0, 1])
def test_a_full_disk_leaves_the_module_as_it_was(
    after_blocks: int, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = Tied(20000), torch.randint(0, 64, (2, 3))
    parameters, expected = dict(module.named_parameters()), module(x)
    fill_the_disk(monkeypatch, after_blocks)
    with leaving_nothing_open(), pytest.raises(StorageError, match="disk is full"):
        distorch.distribute(module, "cpu,0b;disk,*", machine=machine)
    assert all(p is parameters[name] for name, p in module.named_parameters())
    assert equal(module(x), expected)
    assert num_hooks(module) == 0
    with pytest.raises(ModelError):
        distorch.handle_of(module)
    distorch.distribute(module, "cpu,*", machine=machine).remove()


def test_rebudget_onto_a_full_disk_leaves_a_module_that_computes_and_can_be_distributed(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = Own(), torch.randn(2, 32)
    with torch.inference_mode():
        expected = module(x)
        handle = distorch.distribute(module, "cpu,*", machine=machine)
        with monkeypatch.context() as patched:
            fill_the_disk(patched)
            with pytest.raises(StorageError):
                handle.rebudget("cpu,0b;disk,*", machine=machine)
        assert equal(module(x), expected)
        again: Handle | None = getattr(module, "_distorch_handle", None)
        if again is None:
            again = distorch.distribute(module, "cpu,0b;disk,*", machine=machine)
        else:  # it is as it was before the attempt
            assert again.plan.allocation == "cpu,*"
        assert equal(module(x), expected)
        again.remove()
        assert equal(module(x), expected)


def test_streamed_weights_leave_the_modules_memory(machine: Machine) -> None:
    """No second copy: what rests on disk is not also held by the Parameter from before."""
    module = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(4)))
    parameters = list(module.parameters())
    handle = distorch.distribute(module, "cpu,0b;disk,*", machine=machine)
    assert sum(p.untyped_storage().nbytes() for p in parameters) == 0
    assert all(isinstance(p, RestingWeight) for p in module.parameters())
    handle.remove()
    handle = distorch.distribute(module, "cpu,*", machine=machine)
    assert [p.data_ptr() for p in module.parameters()] == [p.data_ptr() for p in parameters]
    assert not stores(handle)["cpu"]._blocks, "what stays is not copied"
    handle.remove()


def test_progress_ends_at_the_models_bytes(machine: Machine) -> None:
    seen: list[tuple[int, int]] = []
    module = Tied(20000)
    handle = distorch.distribute(
        module, "cpu,50%;disk,50%", machine=machine, progress=lambda *now: seen.append(now)
    )
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (handle.plan.model_bytes, handle.plan.model_bytes)
    handle.remove()
