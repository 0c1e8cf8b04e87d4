"""What tests change: settings, links, capacities; and the devices' misfortunes."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from distorch.errors import MachineError
from distorch.vgpu.library import call, library
from distorch.vgpu.spec import Spec

if TYPE_CHECKING:
    import torch

__all__ = [
    "apply_spec",
    "host_access",
    "lose",
    "memory_index",
    "register",
    "reset",
    "set_bus",
    "set_capacity",
    "set_link",
    "settings",
    "unregister",
]

RaceMode = Literal["off", "count", "raise"]
_RACES: tuple[RaceMode, ...] = ("off", "count", "raise")
_HOST = -1
_NO_LIMIT = 2**64 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    enqueued: bool = False
    races: RaceMode = "off"
    delay_seconds: float = 0.0
    seed: int = 0
    op_seconds: float = 0.0
    poison: bool = True
    pinned_limit_bytes: int | None = None
    refuse_peers: tuple[tuple[int, int], ...] = ()


_current = [_Settings()]  # the last is in force
_spec: list[Spec] = []


def memory_index(name: str) -> int:
    """Return the number of a memory: that of ``vgpu:1`` is 1, the host's is -1.

    Raises:
        MachineError: there is no such memory.

    >>> memory_index("cpu"), memory_index("vgpu:1")
    (-1, 1)
    """
    kind, _, index = str(name).partition(":")
    if kind == "cpu":
        return _HOST
    if kind != "vgpu" or not index.isdecimal():
        raise MachineError(f"{name!r} is not a memory of the virtual GPU", hint="cpu, or vgpu:0")
    return int(index)


def _apply(wanted: _Settings) -> None:
    pairs = [index for pair in wanted.refuse_peers for index in pair]
    limit = wanted.pinned_limit_bytes
    call(
        "configure",
        wanted.enqueued,
        _RACES.index(wanted.races),
        wanted.delay_seconds,
        wanted.seed,
        wanted.op_seconds,
        wanted.poison,
        _NO_LIMIT if limit is None else limit,
        (ctypes.c_int * len(pairs))(*pairs),
        len(wanted.refuse_peers),
    )


@contextmanager
def settings(
    *,
    enqueued: bool = False,
    races: RaceMode = "off",
    delay_seconds: float = 0.0,
    seed: int = 0,
    op_seconds: float = 0.0,
    poison: bool = True,
    pinned_limit_bytes: int | None = None,
    refuse_peers: Iterable[tuple[int, int]] = (),
) -> Iterator[None]:
    """Behave in a way within a block; what is not named has its default. Blocks nest.

    Entering and leaving wait for all devices. Leaving raises what went wrong on a stream.

    Args:
        enqueued: Whether operators run on their stream's thread, as on a GPU; else on the calling
            thread, after the stream is done. Copies between memories are always asynchronous.
        races: Whether accesses that nothing orders are ignored, counted (see `races`), or raise at
            the call.
        delay_seconds: Each copy and each queued operator waits a random time up to this.
        seed: Of the random delays.
        op_seconds: What each operator takes longer.
        poison: Whether fresh, freed and incomplete memory is filled with NaN.
        pinned_limit_bytes: How much host memory can be pinned or registered; None: all.
        refuse_peers: Pairs of devices that cannot copy to each other directly, either way.

    Raises:
        MachineError: the virtual GPU is not installed, or a value makes no sense.
        RuntimeError: an operation on a stream failed, or a race was found, in ``"raise"``, where a
            block was freed.
    """
    if races not in _RACES:
        raise MachineError(f"races={races!r} is not a mode", hint="off, count or raise")
    for name, value in (("delay_seconds", delay_seconds), ("op_seconds", op_seconds)):
        if not 0 <= value < float("inf"):
            raise MachineError(f"{name}={value!r} is not a time", hint=f"{name}=0.001")
    if pinned_limit_bytes is not None and pinned_limit_bytes < 0:
        raise MachineError(f"pinned_limit_bytes={pinned_limit_bytes} is negative", hint="0 or more")
    wanted = _Settings(
        enqueued=enqueued,
        races=races,
        delay_seconds=delay_seconds,
        seed=seed,
        op_seconds=op_seconds,
        poison=poison,
        pinned_limit_bytes=pinned_limit_bytes,
        refuse_peers=tuple((a, b) for a, b in refuse_peers),
    )
    _apply(wanted)
    before, _current[0] = _current[0], wanted
    try:
        yield
        call("synchronize_all")
    finally:
        _current[0] = before
        _apply(before)


def reset() -> None:
    """Wait for everything and begin anew: for the beginning or the end of a test.

    Counters, peaks, traces, races, errors of streams and lost devices are forgotten; settings get
    their defaults; capacities, links and buses are those of the line. Tensors stay.
    """
    call("reset")
    _current[0] = _Settings()
    _apply(_current[0])
    apply_spec(_spec[0])


def apply_spec(spec: Spec) -> None:
    """Give capacities, links and buses the values of a line."""
    _spec[:] = [spec]
    call("clear_links")
    for index, device in enumerate(spec.devices):
        set_capacity(index, device.capacity_bytes)
    for name, speed in spec.buses().items():
        set_bus(name, speed)
    for link in spec.links():
        set_link(link.source, link.target, link.bytes_per_second, link.bus or None)


def set_capacity(device_index: int, nbytes: int) -> None:
    """Change how many bytes a device has; what is allocated stays.

    Raises:
        RuntimeError: there is no such device.
    """
    if nbytes < 0:
        raise MachineError(f"{nbytes} bytes are negative", hint="set_capacity(0, 2**30)")
    call("set_capacity", device_index, nbytes)


def _speed(bytes_per_second: float | None) -> float:
    if bytes_per_second is None:
        return 0.0
    if not 0 < bytes_per_second < float("inf"):
        raise MachineError(f"{bytes_per_second!r} is not a speed", hint="4e9; None: no limit")
    return bytes_per_second


def set_link(
    source: str, target: str, bytes_per_second: float | None, bus: str | None = None
) -> None:
    """Change how fast bytes travel from one memory to another, and the bus they share.

    Args:
        source: ``"cpu"`` or ``"vgpu:0"``.
        target: Likewise.
        bytes_per_second: None: infinitely fast.
        bus: Its speed is set by `set_bus`; until then it has no limit.
    """
    text = (bus or "").encode()
    call("set_link", memory_index(source), memory_index(target), _speed(bytes_per_second), text)


def set_bus(name: str, bytes_per_second: float | None) -> None:
    """Change how fast a bus is: transfers that meet on it share its speed fairly."""
    call("set_bus", name.encode(), _speed(bytes_per_second))


def lose(device_index: int) -> None:
    """Let a device disappear: all that uses it raises from now on, and nothing hangs.

    Queued work on it is dropped. `reset` brings it back; its tensors hold poison or old values.
    """
    call("lose", device_index)


def register(ptr: int, nbytes: int) -> None:
    """Make host memory of somebody else count as pinned: copies of it are asynchronous.

    Raises:
        RuntimeError: it is over the limit of pinned memory, or pinned already.
    """
    call("register", ptr, nbytes)


def unregister(ptr: int) -> None:
    """Undo `register`, after the copies that use the memory.

    Raises:
        RuntimeError: nothing that was registered begins there.
    """
    call("unregister", ptr)


def host_access(tensor: torch.Tensor, *, write: bool) -> None:
    """Tell the race detector that the host reads or writes a pinned CPU tensor now.

    It cannot see what the host does by itself: a buffer that is filled again while a copy still
    reads it.

    Raises:
        RuntimeError: the copies that use it are not waited for, where races raise.
    """
    call("host_access", tensor.data_ptr(), tensor.nbytes, write)


def num_devices() -> int:
    """Return how many devices there are."""
    count: int = library().vgpu_num_devices()
    return count
