"""The device that is measured: its clock, its memory, a cap on it, and what it is."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

Figures = dict[str, Any]
"""What was found, as JSON."""


class Device:
    """An accelerator, by the functions that `torch.cuda` and its likes have in common."""

    def __init__(self, name: str) -> None:
        if name.startswith("vgpu"):
            from distorch import vgpu

            if not vgpu.is_installed():
                vgpu.install()
        self.torch = torch.device(name)
        self.name = name
        self.kind = self.torch.type
        self._module: Any = torch.get_device_module(self.torch)
        self._module.set_device(self.torch)
        torch.empty(1, device=self.torch)  # a context, before anything is on a clock
        self.total_bytes = int(self._module.mem_get_info(self.torch)[1])

    def synchronize(self) -> None:
        """Wait for all that was asked of it."""
        self._module.synchronize(self.torch)

    def seconds(self, job: Callable[[], object]) -> float:
        """Run ``job`` on the clock, from an idle device to an idle device."""
        self.synchronize()
        began = time.perf_counter()
        job()
        self.synchronize()
        return time.perf_counter() - began

    def stream(self) -> Any:
        """Return a stream beside the current one."""
        return torch.Stream(device=self.torch)

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Make a stream the current one; streams are no context managers before torch 2.7."""
        if hasattr(stream, "__enter__"):
            return stream  # type: ignore[no-any-return]
        chosen: AbstractContextManager[Any] = self._module.stream(stream)
        return chosen

    def current_stream(self) -> Any:
        """Return the stream that computes."""
        return self._module.current_stream(self.torch)

    def reset_peaks(self) -> None:
        """Let the peaks be what is in use now, with nothing kept for later."""
        self.synchronize()
        self._module.empty_cache()
        self._module.reset_peak_memory_stats(self.torch)

    @property
    def allocated_bytes(self) -> int:
        """Bytes in tensors now."""
        return int(self._module.memory_allocated(self.torch))

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were in tensors."""
        return int(self._module.max_memory_allocated(self.torch))

    @property
    def peak_reserved_bytes(self) -> int:
        """The most bytes that torch took from the device."""
        return int(self._module.max_memory_reserved(self.torch))

    @property
    def retries(self) -> int:
        """How often it was so full that torch gave back what it kept, and asked again."""
        return int(self._module.memory_stats(self.torch).get("num_alloc_retries", 0))

    def tidy(self) -> None:
        """Let go of what nobody uses."""
        gc.collect()
        self.synchronize()
        self._module.empty_cache()

    @contextmanager
    def cap(self, nbytes: int) -> Iterator[str]:
        """Let torch have so much of the device; yields how that is held to.

        CUDA counts all that torch reserves. Its context and its libraries' code come on top, and
        cuBLAS' workspaces are in it.
        """
        before = self.total_bytes
        nbytes = min(nbytes, before)
        if self.kind == "vgpu":
            change: Callable[[int], None] = self._set_capacity
            held = "the virtual card is that small"
        elif hasattr(self._module, "set_per_process_memory_fraction"):
            change = self._set_fraction
            held = "set_per_process_memory_fraction"
        else:
            yield f"torch.{self.kind} has no cap: nothing holds the contenders to it"
            return
        change(nbytes)
        try:
            yield held
        finally:
            change(before)

    def _set_fraction(self, nbytes: int) -> None:
        self._module.set_per_process_memory_fraction(nbytes / self.total_bytes, self.torch)

    def _set_capacity(self, nbytes: int) -> None:
        from distorch import vgpu

        vgpu.set_capacity(self.torch.index or 0, nbytes)

    def works(self) -> bool:
        """Whether it still computes: some errors of CUDA stay until the process ends."""
        try:
            return int(torch.ones(2, device=self.torch).sum().item()) == 2
        except RuntimeError:
            return False

    def model_name(self) -> str:
        """Return what the maker calls it."""
        with suppress(AttributeError, RuntimeError):
            return str(self._module.get_device_name(self.torch))
        return self.name


def find(wanted: str) -> str | None:
    """Return the device to measure: the one named, or the first accelerator there is."""
    if wanted:
        return wanted
    with suppress(AttributeError, RuntimeError):
        found = torch.accelerator.current_accelerator()
        if found is not None and torch.accelerator.device_count():
            return f"{found.type}:0"
    return "cuda:0" if torch.cuda.is_available() else None


def hardware(device: Device, commit: str = "") -> Figures:
    """Describe the machine, its software, and the commit that is measured."""
    found: Figures = {
        "device": device.model_name(),
        "device_bytes": device.total_bytes,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "host_bytes": host_memory()[0],
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "torch_threads": torch.get_num_threads(),
        "commit": commit or _commit(),
    }
    with suppress(OSError, subprocess.SubprocessError):
        asked = "name,driver_version,pcie.link.gen.current,pcie.link.width.current,memory.total"
        command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
        found["nvidia_smi"] = _run(command)
    with suppress(OSError):
        huge = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="utf-8")
        found["huge_pages"] = huge.strip()
    with suppress(OSError):
        found["numa_nodes"] = len([*Path("/sys/devices/system/node").glob("node[0-9]*")])
    return found


def host_memory() -> tuple[int, int]:
    """Return the host's memory and what is free of it, within what this process may use."""
    try:
        from distorch._machine_detect import read_memories
    except ImportError:
        return 0, 0
    memory = read_memories()["cpu"]
    return memory.capacity_bytes, memory.free_bytes


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _commit() -> str:
    root = Path(__file__).parents[2]
    with suppress(OSError, subprocess.SubprocessError):
        changed = _run(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
        commit = _run(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"])
        return commit + (" (changed)" if changed else "")
    return "unknown"


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()
