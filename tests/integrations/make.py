"""What the tests ask of a module that is, or was, distributed; and a disk that fills up."""

from __future__ import annotations

import errno
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distorch.integrations.attach import Handle

ALLOCATIONS: list[dict[str, Any]] = [
    {"allocation": "cpu,0b;disk,*"},
    {"allocation": "cpu,50%;disk,50%"},
    {"allocation": "cpu,*"},
    {"virtual_vram_gb": 1e-4, "donor": "disk"},
]


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def equal(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and bool(torch.equal(bits(first), bits(second)))


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def num_hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def num_readers() -> int:
    return sum(thread.name.startswith("distorch") for thread in threading.enumerate())


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").is_dir() else 0


@contextmanager
def leaving_nothing_open() -> Iterator[None]:
    """See that what follows leaves no file open and no thread of ours running."""
    gc.collect()  # what earlier tests have forgotten could go meanwhile
    before = num_readers(), open_files()
    yield
    assert (num_readers(), open_files()) == before


def stores(handle: Handle) -> dict[str, Any]:
    return dict(handle._running()._stores)


def check_bytes(handle: Handle) -> None:
    """What is held is what was planned."""
    planned = handle.plan.bytes_by_tier
    held = {name: store.nbytes for name, store in stores(handle).items()}
    assert held == {name: planned[name] for name in held}
    assert handle.weight_bytes == planned["cpu"] + handle.plan.ring.nbytes


def fill_the_disk(monkeypatch: pytest.MonkeyPatch, after_blocks: int = 0) -> None:
    from distorch.tiers import disk

    real, written = disk._write_all, []

    def write(fd: int, memory: memoryview) -> None:
        written.append(1)
        if len(written) > after_blocks:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd, memory)

    monkeypatch.setattr(disk, "_write_all", write)
