"""A model computes on its caller's stream, in its caller's mode, from any thread."""

from __future__ import annotations

import copy
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

import distorch
from distorch import vgpu
from distorch.errors import ExecutorError
from tests.accelerator.make import FORMS, MACHINE, chain, distributed, examples, same

if TYPE_CHECKING:
    from collections.abc import Callable

DEVICE = "vgpu:1"
LINE = "vgpu:1,20%;cpu,20%;vgpu:0,30%;disk,30%"
MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "grad": nullcontext,
    "autocast": lambda: torch.autocast("vgpu", torch.bfloat16),
}


@pytest.fixture(params=[False, True], ids=["eager", "enqueued"])
def enqueued(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.parametrize("form", FORMS)
def test_a_pass_on_another_stream_gives_the_same_bits(form: str, *, enqueued: bool) -> None:
    with vgpu.settings(enqueued=enqueued, races="raise", delay_seconds=5e-4):
        module, handle = distributed(form, LINE, compute=DEVICE)
        side = torch.Stream(device=DEVICE)
        with side, torch.inference_mode():
            for x, expected in examples(form):
                assert same(module(x.to(DEVICE)), expected)
            assert torch.accelerator.current_stream(DEVICE) == side
        handle.remove()


@pytest.mark.parametrize("line", [LINE, "vgpu:1,0%;vgpu:0,100%", "vgpu:1,0%;disk,100%"])
def test_each_step_on_another_stream_gives_the_same_bits(line: str, *, enqueued: bool) -> None:
    """Nothing orders the streams but the model."""
    with vgpu.settings(enqueued=enqueued, races="raise", op_seconds=5e-4):
        module, handle = distributed("bf16", line, compute=DEVICE)
        streams = [torch.Stream(device=DEVICE) for _ in range(3)]
        found = []
        with torch.inference_mode():
            for number in range(7):
                x, expected = examples("bf16")[number % 3]
                with streams[number % 3]:
                    found.append((module(x.to(DEVICE)), expected))
        torch.accelerator.synchronize(DEVICE)
        assert all(same(y, expected) for y, expected in found)
        del found
        handle.remove()


def test_a_model_is_removed_while_a_stream_still_computes(*, enqueued: bool) -> None:
    with vgpu.settings(enqueued=enqueued, races="raise", op_seconds=1e-3):
        module, handle = distributed("bf16", LINE, compute=DEVICE)
        x, expected = examples("bf16")[0]
        with torch.Stream(device=DEVICE) as side, torch.inference_mode():
            found = module(x.to(DEVICE))
        handle.remove()
        side.synchronize()
        assert same(found, expected)
        with torch.inference_mode():
            assert same(module(x), expected)


@pytest.mark.parametrize("mode", MODES)
def test_a_pass_in_any_mode_gives_the_bits_of_the_module_on_the_device(
    mode: str, *, enqueued: bool
) -> None:
    torch.manual_seed(0)
    module, x = chain(), torch.randn(3, 256, device=DEVICE)
    plain = copy.deepcopy(module).to(DEVICE)
    with vgpu.settings(enqueued=enqueued, races="raise", delay_seconds=3e-4):
        handle = distorch.distribute(module, LINE, machine=MACHINE)
        with MODES[mode]():
            for _ in range(2):
                expected, found = plain(x), module(x)
                assert found.dtype == expected.dtype
                assert found.is_inference() == expected.is_inference()
                assert same(found, expected)
        handle.remove()


@pytest.mark.parametrize("own_streams", [False, True], ids=["one stream", "own streams"])
def test_threads_take_turns_on_one_model(own_streams: bool, *, enqueued: bool) -> None:  # noqa: FBT001
    wrong: list[object] = []

    def work(module: nn.Module, number: int) -> None:
        try:
            stream = torch.Stream(device=DEVICE) if own_streams else nullcontext()
            with stream, torch.inference_mode():
                for turn in range(4):
                    x, expected = examples("bf16")[(number + turn) % 3]
                    if not same(module(x.to(DEVICE)), expected):
                        wrong.append((number, turn))
        except BaseException as error:  # noqa: BLE001  a thread's errors are told here
            wrong.append(error)

    with vgpu.settings(enqueued=enqueued, races="raise", delay_seconds=3e-4):
        module, handle = distributed("bf16", LINE, compute=DEVICE)
        threads = [threading.Thread(target=work, args=(module, n)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        handle.remove()
    assert wrong == []


def test_two_models_on_the_same_devices_do_not_meet(*, enqueued: bool) -> None:
    """The second computes where the first's weights rest, and lends where it computes."""
    with vgpu.settings(enqueued=enqueued, races="raise", delay_seconds=3e-4):
        one, first = distributed("bf16", "vgpu:0,20%;vgpu:1,40%;cpu,40%", compute="vgpu:0")
        two, second = distributed("Q8_0", "vgpu:1,20%;vgpu:0,40%;disk,40%", compute="vgpu:1")
        with torch.inference_mode():
            for (x, expected), (y, other) in zip(examples("bf16"), examples("Q8_0"), strict=True):
                found = one(x.to("vgpu:0")), two(y.to("vgpu:1"))
                assert same(found[0], expected)
                assert same(found[1], other)
        first.remove()
        with torch.inference_mode():
            assert same(two(y.to("vgpu:1")), other)
        second.remove()


class Fails(nn.Module):
    """Raises in the middle when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))
        self.error: type[BaseException] | None = None

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = torch.tanh(layer(x))
            if self.error is not None and index == 2:
                raise self.error
        return x


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_pass_that_is_interrupted_leaves_a_usable_model(
    error: type[BaseException], *, enqueued: bool
) -> None:
    torch.manual_seed(0)
    module, x = Fails(), torch.randn(2, 64)
    parameters = dict(module.named_parameters())
    with torch.inference_mode():
        expected = module(x)
    with vgpu.settings(enqueued=enqueued, races="raise", delay_seconds=3e-4):
        handle = distorch.distribute(module, LINE, machine=MACHINE)
        with torch.inference_mode():
            for _ in range(5):
                assert same(module(x.to(DEVICE)), expected)
                module.error = error
                with pytest.raises(error):
                    module(x.to(DEVICE))
                module.error = None
        handle.remove()
    assert all(found is parameters[name] for name, found in module.named_parameters())
    with torch.inference_mode():
        assert same(module(x), expected)


def test_a_streamed_block_inside_a_captured_graph_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A virtual device captures nothing, so it only says that it does."""
    says = {"capturing": False}
    monkeypatch.setattr(
        torch.get_device_module("vgpu"),
        "is_current_stream_capturing",
        lambda: says["capturing"],
        raising=False,
    )
    for line, streams in (("vgpu:1,0b;cpu,*", True), ("vgpu:1,*", False)):
        module = chain(4)
        handle = distorch.distribute(module, line, machine=MACHINE)
        x = torch.randn(2, 256, device=DEVICE)
        with torch.inference_mode():
            expected = module(x)
            says["capturing"] = True
            if streams:
                with pytest.raises(ExecutorError, match="while a graph is captured"):
                    module(x)
            else:
                assert torch.equal(module(x), expected)
            says["capturing"] = False
            assert torch.equal(module(x), expected)
        handle.remove()
