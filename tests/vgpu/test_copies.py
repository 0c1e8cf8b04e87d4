"""Copies: between which memories, how many bytes, how fast, and what is converted on the way."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from distorch import vgpu
from distorch.errors import MachineError
from distorch.vgpu import LinkCounters, Span

pytestmark = pytest.mark.vgpu

MIB = 2**20


def pinned(nbytes: int = MIB) -> torch.Tensor:
    return torch.arange(nbytes, dtype=torch.int64).to(torch.uint8).pin_memory()


def on(device: str, nbytes: int = MIB) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def copies(spans: list[Span]) -> list[Span]:
    return [span for span in spans if span.operation == "copy"]


def bring(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> list[Span]:
    """Copy from the host, each pair on a stream of its own."""
    streams = [torch.Stream(device=target.device) for _, target in pairs]
    torch.accelerator.synchronize()
    with vgpu.trace() as spans:
        for stream, (source, target) in zip(streams, pairs, strict=True):
            with stream:
                target.copy_(source, non_blocking=True)
    for source, target in pairs:
        assert torch.equal(target.cpu(), source.cpu())
    return copies(spans)


def total(spans: list[Span]) -> float:
    return max(span.end for span in spans) - min(span.begin for span in spans)


def test_bytes_and_copies_are_counted_for_each_link() -> None:
    x = on("vgpu:0", 100).fill_(1)
    x.copy_(pinned(100), non_blocking=True)
    y = on("vgpu:1", 100)
    y.copy_(x)
    on("vgpu:0", 50).copy_(x[:50])  # within a device: no link
    y[:10].cpu()
    assert vgpu.counters().links == {
        ("cpu", "vgpu:0"): LinkCounters(num_copies=1, nbytes=100),
        ("vgpu:0", "vgpu:1"): LinkCounters(num_copies=1, nbytes=100),
        ("vgpu:1", "cpu"): LinkCounters(num_copies=1, nbytes=10),
    }


def test_operators_move_no_bytes_between_memories() -> None:
    x = torch.zeros(64, 64, device="vgpu:0")
    for _ in range(5):
        x = torch.nn.functional.linear(x, x).view(-1, 64) + 1
    assert vgpu.counters().links == {}


def test_a_link_takes_its_time_and_only_that_way() -> None:
    vgpu.set_link("cpu", "vgpu:0", MIB / 0.02)
    (span,) = bring([(pinned(), on("vgpu:0"))])
    assert 0.02 <= span.seconds < 0.06
    with vgpu.trace() as spans:
        on("vgpu:0").to("cpu", non_blocking=True)
    assert copies(spans)[0].seconds < 0.01


def test_a_links_speed_is_shared_by_its_streams() -> None:
    vgpu.set_link("cpu", "vgpu:0", MIB / 0.04)
    spans = bring([(pinned(), on("vgpu:0")), (pinned(), on("vgpu:0"))])
    assert 0.08 <= total(spans) < 0.16
    assert min(span.seconds for span in spans) > 0.06  # both at once, half as fast


@pytest.mark.parametrize(("bus", "slower"), [(None, 1), ("shared", 2)])
def test_two_devices_share_a_bus_or_do_not(bus: str | None, slower: int) -> None:
    for index in (0, 1):
        vgpu.set_link("cpu", f"vgpu:{index}", MIB / 0.04, bus)
    vgpu.set_bus("shared", MIB / 0.04)
    spans = bring([(pinned(), on("vgpu:0")), (pinned(), on("vgpu:1"))])
    assert 0.99 < total(spans) / (0.04 * slower) < 1.8
    assert min(span.seconds for span in spans) > 0.03 * slower  # both at once


def test_a_bus_gives_the_fast_what_the_slow_cannot_use() -> None:
    """A quarter of the bus is all that one link can take: the other gets three quarters."""
    vgpu.set_link("cpu", "vgpu:0", MIB / 0.2, "shared")
    vgpu.set_link("cpu", "vgpu:1", MIB / 0.05, "shared")
    vgpu.set_bus("shared", MIB / 0.05)
    slow, fast = sorted(
        bring([(pinned(), on("vgpu:0")), (pinned(), on("vgpu:1"))]), key=lambda span: span.target
    )
    assert 0.99 < slow.seconds / 0.2 < 1.2
    assert 0.9 < fast.seconds / (0.05 * 4 / 3) < 1.4  # by halves it would take 0.1


def test_who_comes_later_shares_the_rest() -> None:
    """The first has the bus alone for a while, then half of it; the bus is never idle."""
    for index in (0, 1):
        vgpu.set_link("cpu", f"vgpu:{index}", MIB / 0.04, "shared")
    vgpu.set_bus("shared", MIB / 0.04)
    pairs = [(pinned(), on("vgpu:0")), (pinned(), on("vgpu:1"))]
    with vgpu.trace() as spans:
        for source, target in pairs:
            target.copy_(source, non_blocking=True)
            time.sleep(0.02)
    first, second = copies(spans)
    alone = second.begin - first.begin
    assert 0.95 < first.seconds / (2 * 0.04 - alone) < 1.5
    assert 0.99 < total([first, second]) / (2 * 0.04) < 1.5


@pytest.mark.parametrize("source_of", [pinned, lambda: on("vgpu:1").fill_(9)])
def test_a_peer_and_the_host_bring_the_same_bytes(source_of: Callable[[], torch.Tensor]) -> None:
    source, target = source_of(), on("vgpu:0")
    target.copy_(source, non_blocking=True)
    torch.accelerator.synchronize()
    assert torch.equal(target.cpu(), source.cpu())


def test_a_peer_copy_waits_on_both_sides_and_not_on_the_host() -> None:
    vgpu.set_link("vgpu:1", "vgpu:0", MIB / 0.02)
    with vgpu.settings(enqueued=True, races="raise", op_seconds=0.01):
        source = on("vgpu:1").fill_(1)
        target = on("vgpu:0").fill_(0)
        target.copy_(source)
        source.fill_(2)
        result = target + 1
        assert not torch.accelerator.current_stream(0).query()
        assert vgpu.counters().num_host_syncs == 0
        assert result.cpu().eq(2).all()


def test_peers_that_are_refused_must_go_through_the_host() -> None:
    module = torch.get_device_module("vgpu")
    assert module.can_device_access_peer(0, 1)
    with vgpu.settings(refuse_peers=[(0, 1)]):
        assert not module.can_device_access_peer(1, 0)
        assert module.can_device_access_peer(1, 2)
        x = on("vgpu:1").fill_(3)
        with pytest.raises(RuntimeError, match="vgpu:1 and vgpu:0 cannot reach each other"):
            on("vgpu:0").copy_(x)
        with pytest.raises(RuntimeError, match="cannot reach"):
            x.to("vgpu:0")
        assert x.to("vgpu:2").eq(3).all().item()
        assert x.cpu().to("vgpu:0").eq(3).all().item()
    assert x.to("vgpu:0").eq(3).all().item()


WAYS = [("cpu", "vgpu:0"), ("vgpu:0", "cpu"), ("vgpu:0", "vgpu:1"), ("vgpu:0", "vgpu:0")]


@pytest.mark.parametrize(("source", "target"), WAYS)
def test_dtypes_strides_and_sizes_are_converted(
    source: str,
    target: str,
    enqueued: bool,  # noqa: FBT001 (a fixture)
) -> None:
    x = torch.randn(6, 4)
    with vgpu.settings(enqueued=enqueued, races="raise"):
        y = x.to(source)
        assert torch.equal(y.to(target, torch.bfloat16).cpu(), x.bfloat16())
        assert torch.equal(y.t().to(target).cpu(), x.t())
        assert torch.equal(y[::2, 1:].to(target).cpu(), x[::2, 1:])
        wide = torch.zeros(4, 12, device=target)
        wide[:, ::2].copy_(y.t())
        assert torch.equal(wide[:, ::2].cpu(), x.t())
        assert wide[:, 1::2].eq(0).all().item()
        assert torch.equal(torch.zeros(5, 6, 4, device=target).copy_(y).cpu(), x.expand(5, 6, 4))
        z = torch.view_as_complex(x.view(6, 2, 2)).to(source)
        assert torch.equal(z.conj().to(target).cpu(), z.cpu().conj().resolve_conj())
        into = torch.zeros(6, 2, dtype=torch.complex64, device=target)
        into.conj().copy_(z)
        assert torch.equal(into.cpu(), z.cpu().conj().resolve_conj())
        assert y[:0].to(target).shape == (0, 4)


def test_a_tensor_from_the_device_is_pinned_and_comes_later() -> None:
    vgpu.set_link("vgpu:0", "cpu", MIB / 0.02)
    x = torch.ones(MIB // 4, device="vgpu:0")
    y = x.to("cpu", non_blocking=True)
    assert y.is_pinned()
    assert y.isnan().any()  # read too early
    torch.accelerator.synchronize()
    assert y.eq(1).all()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("cpu", "cuda:0", 1e9), MachineError),
        (("cpu", "vgpu:99", 1e9), RuntimeError),
        (("cpu", "vgpu", 1e9), MachineError),
        (("cpu", "vgpu:0", 0), MachineError),
        (("cpu", "vgpu:0", float("nan")), MachineError),
    ],
)
def test_wrong_links_are_refused(arguments: tuple[str, str, float], error: type[Exception]) -> None:
    with pytest.raises(error):
        vgpu.set_link(*arguments)
