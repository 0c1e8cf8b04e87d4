"""What goes wrong is said or gone around, and leaves nothing behind."""

from __future__ import annotations

import copy
import gc
import logging
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

import distorch
from distorch import vgpu
from distorch.errors import AllocationError, DistorchError, ExecutorError
from distorch.tiers import slabs
from tests.accelerator.conftest import NOTHING, left
from tests.accelerator.make import MACHINE, chain, distributed, examples, same

if TYPE_CHECKING:
    from collections.abc import Callable

DEVICE, PEER = "vgpu:0", "vgpu:1"
RING_BYTES = 810_000  # three slots of the largest blocks: streamed ones come again in each step
LINES = ["vgpu:0,30%;vgpu:1,70%", "vgpu:0,20%;cpu,30%;vgpu:1,30%;disk,20%"]


@pytest.fixture(autouse=True)
def _many_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails can fail half way: a slab has room for a few blocks."""
    monkeypatch.setattr(slabs, "_SLAB_BYTES", 300_000)


class Plain:
    """A module, a copy of it that stays as it is, and what both compute."""

    def __init__(self, module: nn.Module | None = None) -> None:
        torch.manual_seed(0)
        self.module = module or chain(6)
        self.twin = copy.deepcopy(self.module)
        self.x = torch.randn(2, 256)
        self.parameters = dict(self.module.named_parameters())

    def distribute(
        self, line: str, progress: Callable[[int, int], None] | None = None
    ) -> distorch.Handle:
        return distorch.distribute(
            self.module,
            line,
            compute=DEVICE,
            ring=RING_BYTES,
            machine=MACHINE,
            progress=progress,
        )

    def check_brought_back(self, handle: distorch.Handle, lost: int) -> None:
        """What rested on the lost device is said to be gone, the rest has its values again."""
        held = {
            part.tensor: placed.tier
            for placed in handle.plan.placements
            for part in placed.block.parts
        }
        gone = {name for name, tier in held.items() if tier == f"vgpu:{lost}"}
        if gone:
            with pytest.raises(DistorchError, match=f"cannot be brought back.*vgpu:{lost}"):
                handle.remove()
        else:
            handle.remove()
        for name, found in self.module.named_parameters():
            assert found is self.parameters[name]
            assert found.numel() == (0 if name in gone else self.twin.get_parameter(name).numel())
            assert name in gone or same(found, self.twin.get_parameter(name))
        assert not self.module._forward_hooks
        gc.collect()  # tracebacks
        assert left() == NOTHING

    def check_as_before(self) -> None:
        """It is on the CPU, plain, with its own values, and nothing else is left."""
        assert all(found is self.parameters[n] for n, found in self.module.named_parameters())
        assert not self.module._forward_hooks
        assert not self.module._forward_pre_hooks
        with torch.inference_mode():
            assert same(self.module(self.x), self.twin(self.x))
        assert left() == NOTHING

    def check_computes(self) -> None:
        with torch.inference_mode():
            for _ in range(2):
                assert same(self.module(self.x.to(DEVICE)), self.twin(self.x))


@pytest.mark.parametrize("share", [0, 0.2])
@pytest.mark.parametrize("line", ["vgpu:0,0b;cpu,*", LINES[1]])
def test_where_no_more_can_be_pinned_the_rest_is_copied_through_buffers_and_it_is_said(
    line: str, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    plain = Plain()
    limit = int(share * sum(each.nbytes for each in plain.parameters.values()))
    with (
        vgpu.settings(races="raise", pinned_limit_bytes=limit),
        caplog.at_level(logging.WARNING, "distorch"),
    ):
        handle = plain.distribute(line)
        assert vgpu.counters().pinned_bytes <= limit
        plain.check_computes()
        handle.remove()
        plain.check_as_before()
    said = [text for text in caplog.messages if "no more pinned memory" in text]
    assert len(said) == 1


@pytest.mark.parametrize("room", [0, 320_000])
def test_a_donor_that_is_full_is_said_and_the_module_is_as_before(room: int) -> None:
    plain = Plain()
    vgpu.set_capacity(1, room)
    with pytest.raises(AllocationError, match="vgpu:1 has no room") as caught:
        plain.distribute("vgpu:0,30%;vgpu:1,70%")
    assert "vgpu:1" in caught.value.hint
    del caught
    plain.check_as_before()


@pytest.mark.parametrize("room", [0, 200_000, 1_000_000])
def test_a_device_without_room_for_ring_or_weights_is_said(room: int) -> None:
    plain = Plain()
    vgpu.set_capacity(0, room)
    with pytest.raises(AllocationError, match="vgpu:0 has no room"):
        plain.distribute("vgpu:0,50%;cpu,50%")
    plain.check_as_before()


def test_a_device_without_room_for_buffers_is_said() -> None:
    module = nn.Sequential(chain(4), nn.BatchNorm1d(256)).eval()
    module.register_buffer("table", torch.zeros(1 << 20))
    plain = Plain(module)
    vgpu.set_capacity(0, 3_000_000)
    with pytest.raises(AllocationError, match="vgpu:0 has no room"):
        plain.distribute("vgpu:0,30%;cpu,70%")
    plain.check_as_before()


@pytest.mark.parametrize("line", LINES)
def test_a_peer_without_access_is_reached_through_the_host(line: str) -> None:
    plain = Plain()
    with vgpu.settings(races="raise", delay_seconds=1e-3, refuse_peers=[(0, 1)]):
        handle = plain.distribute(line)
        before = vgpu.counters().links
        plain.check_computes()
        torch.accelerator.synchronize()
        moved = vgpu.counters().links
        outward = moved[PEER, "cpu"].nbytes
        inward = moved["cpu", DEVICE].nbytes - before["cpu", DEVICE].nbytes
        assert (PEER, DEVICE) not in moved
        assert outward >= 2 * handle.plan.bytes_by_tier[PEER]
        assert inward >= outward
        handle.remove()
        plain.check_as_before()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("line", [*LINES, "vgpu:0,100%"])
def test_a_load_that_is_interrupted_leaves_the_module_as_before(
    line: str, error: type[BaseException]
) -> None:
    plain = Plain()

    def stop(done_bytes: int, total_bytes: int) -> None:
        if done_bytes > total_bytes / 2:
            raise error

    with vgpu.settings(races="raise"):
        with pytest.raises(error):
            plain.distribute(line, stop)
        plain.check_as_before()
    plain.distribute(line).remove()


@pytest.mark.parametrize("lost", [0, 1])
def test_a_device_that_is_lost_while_loading_is_said(lost: int) -> None:
    plain = Plain()

    def lose(done_bytes: int, total_bytes: int) -> None:
        if done_bytes > total_bytes / 2:
            vgpu.lose(lost)

    with pytest.raises(DistorchError, match=f"vgpu:{lost} is lost"):
        plain.distribute(LINES[0], lose)
    gc.collect()  # tracebacks
    assert left() == NOTHING


@pytest.mark.parametrize("line", LINES)
def test_a_donor_that_is_lost_between_steps_is_said_where_its_block_is_needed(line: str) -> None:
    plain = Plain()
    handle = plain.distribute(line)
    plain.check_computes()
    torch.accelerator.synchronize()
    vgpu.lose(1)
    x = plain.x.to(DEVICE)
    with torch.inference_mode(), pytest.raises(ExecutorError, match="vgpu:1 is lost"):
        plain.module(plain.module(x))  # what had come before may be enough for once
    del x
    plain.check_brought_back(handle, 1)


@pytest.mark.parametrize("line", ["vgpu:0,0b;cpu,*", LINES[1]])
def test_a_device_that_is_lost_between_steps_ends_the_run_and_hangs_nothing(line: str) -> None:
    plain = Plain()
    handle = plain.distribute(line)
    plain.check_computes()
    x = plain.x.to(DEVICE)
    vgpu.lose(0)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="vgpu:0 is lost"):
        plain.module(x)
    del x
    plain.check_brought_back(handle, 0)


class Loses(nn.Module):
    """A device disappears in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.lost: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.lost is not None:
            vgpu.lose(self.lost)
        return x


@pytest.mark.parametrize("enqueued", [False, True], ids=["eager", "enqueued"])
@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("refused", [False, True], ids=["peers", "relayed"])
def test_a_device_that_is_lost_during_a_step_raises_and_hangs_nothing(
    lost: int,
    enqueued: bool,  # noqa: FBT001
    refused: bool,  # noqa: FBT001
) -> None:
    loses = Loses()
    plain = Plain(nn.Sequential(chain(1), loses, chain(8)))  # more to come than the ring holds
    for ends in ((PEER, DEVICE), ("cpu", DEVICE), (PEER, "cpu")):
        vgpu.set_link(*ends, 5e7)
    with vgpu.settings(enqueued=enqueued, refuse_peers=[(0, 1)] if refused else []):
        handle = plain.distribute(LINES[0])
        plain.check_computes()
        loses.lost = lost
        with torch.inference_mode(), pytest.raises(RuntimeError, match=f"vgpu:{lost} is lost"):
            plain.module(plain.x.to(DEVICE)).cpu()
        plain.check_brought_back(handle, lost)


def test_a_model_of_a_checkpoint_moves_on_after_its_donor_is_lost() -> None:
    """What comes from files is read again."""
    module, handle = distributed("Q8_0", "vgpu:0,30%;vgpu:1,70%", compute=DEVICE)
    vgpu.lose(1)
    handle.rebudget("vgpu:0,30%;cpu,70%", machine=MACHINE)
    x, expected = examples("Q8_0")[0]
    with torch.inference_mode():
        assert same(module(x.to(DEVICE)), expected)
    handle.remove()
