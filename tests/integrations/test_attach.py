"""A distributed module survives what goes wrong, moves its weights, and can be undone."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distorch
from distorch.errors import DistorchError, ModelError, StorageError
from distorch.machine import Machine
from distorch.tiers.disk import DiskTier
from tests.integrations.make import (
    ALLOCATIONS,
    check_bytes,
    equal,
    leaving_nothing_open,
    num_hooks,
    num_readers,
    open_files,
    stores,
)
from tests.integrations.modules import Bag, Own

MIB = 1 << 20
pytestmark = pytest.mark.usefixtures("seed")


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("then", ["pass", "remove", "rebudget"])
def test_a_forward_that_is_interrupted_leaves_a_usable_model(
    kind: type[BaseException], then: str, machine: Machine
) -> None:
    """Torch runs hooks after an Exception, but not after Ctrl-C."""

    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Parameter(torch.randn(24))
            self.layers = nn.ModuleList([nn.Linear(24, 24) for _ in range(4)])
            self.fails = False

        def forward(self, x: Tensor) -> Tensor:
            for index, layer in enumerate(self.layers):
                x = layer(x) * self.own
                if self.fails and index == 2:
                    raise kind
            return x

    module, x = Fails(), torch.randn(2, 24)
    parameters = dict(module.named_parameters())
    with torch.inference_mode():
        expected = module(x)
        handle = distorch.distribute(module, "cpu,0b;disk,*", machine=machine)
        for _ in range(5):  # more often than the ring has slots
            assert equal(module(x), expected)
            module.fails = True
            with pytest.raises(kind):
                module(x)
            module.fails = False
        if then == "rebudget":
            handle.rebudget("cpu,50%;disk,50%", machine=machine)
        if then != "remove":
            assert equal(module(x), expected)
    handle.remove()
    after = dict(module.named_parameters())
    assert after.keys() == parameters.keys()
    assert all(after[name] is parameters[name] for name in after)
    assert all(p.numel() for p in module.parameters())
    with torch.inference_mode():
        assert equal(module(x), expected)


def test_a_read_that_fails_is_raised_where_the_block_is_needed_and_the_next_pass_works(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = Own(), torch.randn(2, 32)
    with torch.inference_mode():
        expected = module(x)
        handle = distorch.distribute(module, "cpu,0b;disk,*", machine=machine)
        with monkeypatch.context() as patched:

            def fail(*_: object) -> None:
                raise StorageError("the disk was unplugged", hint="plug it in")

            patched.setattr(DiskTier, "read", fail)
            with pytest.raises(DistorchError, match="unplugged") as caught:
                module(x)
            assert "plug it in" in str(caught.value)
        for _ in range(2):
            assert equal(module(x), expected)
    handle.remove()
    with torch.inference_mode():
        assert equal(module(x), expected)


@pytest.mark.parametrize("wanted", ALLOCATIONS)
def test_what_moves_in_inference_mode_can_be_trained_after(
    wanted: dict[str, Any], machine: Machine
) -> None:
    module = Own()
    with torch.inference_mode():
        handle = distorch.distribute(module, "cpu,50%;disk,*", machine=machine)
        handle.rebudget(machine=machine, **wanted)
        handle.remove()
    assert not any(each.is_inference() for each in module.parameters())
    module(torch.randn(2, 32)).sum().backward()
    assert any(each.grad is not None for each in module.parameters())


def test_rebudget_moves_the_weights_and_keeps_the_bits(machine: Machine) -> None:
    module, x = nn.Sequential(Own(), Bag()), torch.randn(2, 32)
    with leaving_nothing_open(), torch.inference_mode():
        expected = module(x)
        handle = distorch.distribute(module, "cpu,0b;disk,*", machine=machine)
        for wanted in (*ALLOCATIONS, *reversed(ALLOCATIONS)):
            handle.rebudget(machine=machine, **wanted)
            assert distorch.handle_of(module) is handle
            assert equal(module(x), expected)
            check_bytes(handle)
        handle.remove()
    assert equal(module(x), expected)


@pytest.mark.parametrize(
    "line", ["cpu,70%", "cpu,2gbb;disk,*", "cuda:7,*", "cpu,0b;disk:/nowhere/at/all,*x"]
)
def test_rebudget_with_a_line_that_does_not_fit_changes_nothing(
    line: str, machine: Machine
) -> None:
    module, x = Own(), torch.randn(2, 32)
    with torch.inference_mode():
        expected = module(x)
        handle = distorch.distribute(module, "cpu,0b;disk,*", machine=machine)
        plan = handle.plan
        with pytest.raises(DistorchError):
            handle.rebudget(line, machine=machine)
        assert handle.plan is plan
        assert equal(module(x), expected)
    handle.remove()


def test_rebudget_with_an_unknown_argument_says_which(machine: Machine) -> None:
    module = nn.Linear(8, 8)
    handle = distorch.distribute(module, "cpu,*", machine=machine)
    with pytest.raises(TypeError, match="donro"):
        handle.rebudget(virtual_vram_gb=1, donro="disk", machine=machine)
    assert handle.plan.allocation == "cpu,*"
    handle.remove()


def test_distributing_twice_is_refused_with_the_way_out(machine: Machine) -> None:
    module = nn.Linear(8, 8)
    handle = distorch.distribute(module, "cpu,0b;disk,*", machine=machine)
    with pytest.raises(ModelError, match="distributed already") as caught:
        distorch.distribute(module, "cpu,*", machine=machine)
    assert "rebudget" in caught.value.hint
    handle.remove()
    distorch.distribute(module, "cpu,*", machine=machine).remove()


@pytest.mark.parametrize("which", ["inner", "outer"])
def test_a_module_that_is_distributed_in_part_is_refused_or_right(which: str) -> None:
    """The submodule of a distributed module, or the module around one."""
    inner = nn.Linear(32, 32)
    outer = nn.Sequential(inner, nn.Linear(32, 32))
    x = torch.randn(2, 32)
    with torch.inference_mode():
        expected = outer(x)
        first = distorch.distribute(inner if which == "inner" else outer, "cpu,0b;disk,*")
        second = None
        try:
            second = distorch.distribute(outer if which == "inner" else inner, "cpu,0b;disk,*")
        except ModelError as error:
            assert "distributed" in str(error)  # noqa: PT017  either is right
        assert equal(outer(x), expected)
        if second is not None:
            second.remove()
        assert equal(outer(x), expected)
        first.remove()
        assert equal(outer(x), expected)


def test_a_removed_handle_says_so(machine: Machine) -> None:
    handle = distorch.distribute(nn.Linear(8, 8), "cpu,0b;disk,*", machine=machine)
    handle.remove()
    for use in (handle.stats, handle.remove, lambda: handle.rebudget("cpu,*")):
        with pytest.raises(ModelError, match="removed"):
            use()


def test_a_forgotten_module_leaves_no_thread_and_no_file(machine: Machine) -> None:
    with leaving_nothing_open():
        readers, module = num_readers(), Bag()
        distorch.distribute(module, "cpu,0b;disk,*", machine=machine)
        module(torch.randn(2, 32))
        assert num_readers() > readers
        del module
        gc.collect()


def test_what_is_discarded_leaves_no_memory_no_hook_no_thread_and_no_file(machine: Machine) -> None:
    gc.collect()
    gc.disable()  # it is all gone at once, and not when Python next looks for cycles
    try:
        for wanted in ALLOCATIONS:
            readers, files, hooks = num_readers(), open_files(), num_hooks(module := Own())
            names = dict(module.named_parameters()).keys()
            handle = distorch.distribute(module, machine=machine, **wanted)
            module(torch.randn(2, 32))
            held = [weakref.ref(store) for store in stores(handle).values()]
            handle.discard()
            assert not any(ref() for ref in held)
            assert (num_readers(), open_files(), num_hooks(module)) == (readers, files, hooks)
            assert dict(module.named_parameters()).keys() == names
            assert sum(p.nbytes for p in module.parameters()) == 0
            with pytest.raises(ModelError, match="removed"):
                handle.stats()
            with pytest.raises(ModelError, match="not distributed"):
                distorch.handle_of(module)
    finally:
        gc.enable()


def test_what_is_not_a_module_is_an_error_that_says_so() -> None:
    with pytest.raises((ModelError, TypeError), match=r"nn\.Module"):
        distorch.distribute("model.gguf", "cpu,*")  # type: ignore[call-overload]


def test_a_module_without_values_is_refused_with_the_way_out() -> None:
    with pytest.raises(ModelError, match="meta device") as caught:
        distorch.distribute(nn.Linear(8, 8, device="meta"), "cpu,*")
    assert "distorch.load" in caught.value.hint


def test_a_handle_of_a_plain_module_is_an_error() -> None:
    with pytest.raises(ModelError, match="not distributed"):
        distorch.handle_of(nn.Linear(8, 8))


def test_weights_that_cannot_move_stay_and_a_note_says_why(machine: Machine) -> None:
    module = nn.Module()
    module.strided = nn.Parameter(torch.randn(8, 8).t())
    module.wide = nn.Parameter(torch.randn(8, dtype=torch.complex128))
    module.usual = nn.Parameter(torch.randn(8, 8))
    before = dict(module.named_parameters())
    handle = distorch.distribute(module, "cpu,0b;disk,*", machine=machine)
    assert module.strided is before["strided"]
    assert module.wide is before["wide"]
    assert module.usual is not before["usual"]
    notes = " ".join(handle.plan.notes)
    assert "strided stays" in notes
    assert "not contiguous" in notes
    assert "complex128" in notes
    handle.remove()


def test_a_long_parameter_list_does_not_need_a_slot_of_its_whole_size(machine: Machine) -> None:
    """A ParameterList is never called, so nothing asks for all of it at once."""

    class Lists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList([torch.randn(1024, 1024) for _ in range(8)])

        def forward(self, x: Tensor) -> Tensor:
            for weight in self.weights:
                x = x @ weight
            return x

    module = Lists()
    handle = distorch.distribute(module, "cpu,0b;disk,*", machine=machine)
    assert handle.plan.ring.slot_bytes <= 8 * MIB
    handle.remove()


def test_a_ring_bounds_the_bytes_on_the_compute_device(machine: Machine) -> None:
    module = nn.Sequential(*(nn.Linear(1500, 1500) for _ in range(5)))
    x = torch.randn(1, 1500)
    with torch.inference_mode():
        expected = module(x)
        for ring in ("26mb", 26 * MIB):
            handle = distorch.distribute(module, "cpu,0b;disk,*", ring=ring, machine=machine)
            assert handle.weight_bytes <= 26 * MIB
            assert equal(module(x), expected)
            assert handle.weight_bytes <= 26 * MIB
            handle.remove()
