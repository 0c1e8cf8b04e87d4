"""Lost and mixed devices, forked children, wrong arguments: errors, never a hang or a crash."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest
import torch

from distorch import vgpu
from distorch.errors import MachineError

pytestmark = pytest.mark.vgpu

MIB = 2**20


def test_devices_do_not_mix() -> None:
    zero, one, host = (torch.zeros(3, device=name) for name in ("vgpu:0", "vgpu:1", "cpu"))
    for other in (one, host):
        with pytest.raises(RuntimeError, match="same device"):
            zero + other
        with pytest.raises(RuntimeError, match="same device"):
            torch.cat([zero, other])
        with pytest.raises(RuntimeError, match="same device"):
            torch.nn.functional.linear(zero, other.expand(3, 3))


def uses(device: str) -> dict[str, Callable[[], object]]:
    x = torch.zeros(8, device=device)
    host, other = torch.zeros(8).pin_memory(), torch.zeros(8, device="vgpu:0")
    stream = torch.Stream(device=device)
    event = stream.record_event()
    return {
        "operator": lambda: x + 1,
        "in place": lambda: x.add_(1),
        "allocation": lambda: torch.empty(1, device=device),
        "from the host": lambda: x.copy_(host, non_blocking=True),
        "to the host": x.cpu,
        "to a peer": lambda: other.copy_(x),
        "from a peer": lambda: x.copy_(other),
        "stream": stream.synchronize,
        "stream query": stream.query,
        "event": event.synchronize,
        "event query": event.query,
        "event of another device": lambda: torch.accelerator.current_stream(0).wait_event(event),
        "record": lambda: event.record(stream),
        "device": lambda: torch.accelerator.synchronize(device),
    }


def test_all_that_uses_a_lost_device_raises_and_names_it(enqueued: bool) -> None:  # noqa: FBT001
    with vgpu.settings(enqueued=enqueued):
        tries = uses("vgpu:1")
        torch.accelerator.synchronize(1)
        vgpu.lose(1)
        for name, use in tries.items():
            with pytest.raises(RuntimeError, match="vgpu:1 is lost"):
                assert use() is None, name
        assert torch.ones(3, device="vgpu:0").sum().item() == 3
    del tries
    vgpu.reset()
    assert torch.ones(3, device="vgpu:1").sum().item() == 3


def test_a_device_that_is_lost_on_the_way_lets_nobody_wait() -> None:
    vgpu.set_link("cpu", "vgpu:1", MIB / 100)
    target = torch.empty(MIB, dtype=torch.uint8, device="vgpu:1")
    target.copy_(torch.zeros(MIB, dtype=torch.uint8).pin_memory(), non_blocking=True)
    found: list[BaseException] = []

    def wait() -> None:
        try:
            torch.accelerator.synchronize(1)
        except RuntimeError as error:
            found.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.05)
    vgpu.lose(1)
    thread.join(timeout=5)
    assert not thread.is_alive()
    assert "vgpu:1 is lost" in str(found[0])


def test_who_waits_for_a_lost_device_is_told() -> None:
    """A peer copy is dropped: its target may not pass for filled."""
    vgpu.set_link("vgpu:1", "vgpu:0", MIB / 100)
    source = torch.zeros(MIB, dtype=torch.uint8, device="vgpu:1")
    target = torch.zeros(MIB, dtype=torch.uint8, device="vgpu:0")
    target.copy_(source)
    vgpu.lose(1)
    with pytest.raises(RuntimeError, match="vgpu:1 is lost"):
        torch.accelerator.synchronize(0)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_gets_an_error() -> None:
    x = torch.ones(3, device="vgpu:0").add_(1)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            assert torch.get_device_module("vgpu")._is_in_bad_fork()
            assert torch.ones(3).add_(1).sum().item() == 6  # the CPU goes on
            x.add_(1).sum().item()
        except RuntimeError as error:
            status = 0 if "forked child" in str(error) else 2
        finally:
            os._exit(status)
    deadline = time.monotonic() + 10
    while (done := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    if done[0] == 0:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert done[0] == child, "the child hangs"
    assert os.waitstatus_to_exitcode(done[1]) == 0


@pytest.mark.parametrize(
    "use",
    [
        lambda: torch.empty(1, device="vgpu:15"),
        lambda: torch.Stream(device="vgpu:15"),
        lambda: torch.accelerator.set_device_index(15),
        lambda: torch.accelerator.synchronize(15),
        lambda: torch.accelerator.memory_allocated(15),
        lambda: torch.Stream(stream_id=99, device_index=0, device_type=20).synchronize(),
        lambda: torch.zeros(3, device="vgpu:0").to_sparse(),
        lambda: torch.zeros(3, device="vgpu:0").numpy(),
        lambda: torch.zeros(3, device="vgpu:0").copy_(torch.zeros(4)),
        lambda: vgpu.lose(99),
        lambda: vgpu.lose(-1),
        lambda: vgpu.set_capacity(99, 1),
        lambda: vgpu.set_capacity(0, -1),
        lambda: vgpu.settings(refuse_peers=[(0, 99)]).__enter__(),
        lambda: vgpu.settings(races="sometimes").__enter__(),  # type: ignore[arg-type]
        lambda: vgpu.settings(delay_seconds=-1.0).__enter__(),
        lambda: vgpu.register(0, 10),
        lambda: vgpu.unregister(12345),
        lambda: torch.vgpu.current_stream("cpu"),  # type: ignore[attr-defined]
    ],
)
def test_wrong_arguments_raise(use: Callable[[], object]) -> None:
    with pytest.raises((RuntimeError, ValueError, MachineError, TypeError, NotImplementedError)):
        use()
    assert torch.ones(3, device="vgpu:0").sum().item() == 3


def test_settings_nest_and_come_back() -> None:
    x = torch.zeros(3, device="vgpu:0")

    def is_asynchronous() -> bool:
        x.add_(1)
        return not torch.accelerator.current_stream().query()

    with vgpu.settings(enqueued=True, op_seconds=0.02):
        assert is_asynchronous()
        with vgpu.settings():
            assert not is_asynchronous()
        assert is_asynchronous()
        with pytest.raises(KeyError), vgpu.settings():
            raise KeyError
        assert is_asynchronous()
    assert not is_asynchronous()


def test_reset_begins_anew() -> None:
    capacity = vgpu.counters().devices[0].capacity_bytes
    vgpu.set_capacity(0, 10)
    vgpu.set_link("cpu", "vgpu:1", 1)
    torch.zeros(3, device="vgpu:1").cpu()
    vgpu.lose(2)
    vgpu.reset()
    counters = vgpu.counters()
    assert counters.devices[0].capacity_bytes == capacity
    assert counters.devices[1].peak_bytes == counters.num_ops == counters.num_host_syncs == 0
    assert counters.links == {}
    assert torch.zeros(3).to("vgpu:1").to("vgpu:2").sum().item() == 0


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, **environment}
    if "DISTORCH_VGPU" not in environment:  # torch would install ours as soon as it is imported
        variables.pop("DISTORCH_VGPU", None)
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=variables)


def test_a_process_ends_while_work_is_queued() -> None:
    done = run(
        "from distorch import vgpu; import torch; vgpu.install('1gb')\n"
        "vgpu.set_link('cpu', 'vgpu:0', 1)\n"
        "vgpu.control._apply(vgpu.control._Settings(enqueued=True, op_seconds=60))\n"
        "x = torch.zeros(9, device='vgpu:0')\n"
        "x.add_(1).copy_(torch.zeros(9).pin_memory(), non_blocking=True)\n"
        "print('left')"
    )
    assert (done.returncode, done.stdout) == (0, "left\n"), done.stderr


def test_autoload_says_in_one_line_what_is_wrong() -> None:
    code = "from distorch import vgpu; vgpu.autoload(); print(vgpu.is_installed())"
    done = run(code, DISTORCH_VGPU="12")
    assert done.stdout == "False\n"
    assert done.stderr.startswith("distorch: no virtual GPU: '12'")
    assert done.stderr.count("\n") == 1
    done = run(
        code, DISTORCH_VGPU="1gb", PATH="", CXX="no-such-compiler", XDG_CACHE_HOME="/nowhere"
    )
    assert done.stdout == "False\n"
    assert done.stderr.count("\n") == 1


def test_one_line_per_process() -> None:
    vgpu.install()
    with pytest.raises(MachineError, match="other virtual devices"):
        vgpu.install("77mb")
