"""What the system says about this machine, on made-up file systems and cards."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from distorch import _machine_detect as module
from distorch.machine import Machine

if TYPE_CHECKING:
    from pathlib import Path

MIB = 2**20
UNLIMITED = 9223372036854771712

# --- control groups ---------------------------------------------------------------------------


def write(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def within(root: Path, physical_mib: int = 1000, free_mib: int = 900) -> tuple[float, float]:
    memory = module.Memory(physical_mib * MIB, free_mib * MIB)
    found = module._within(memory, module._cgroup_limits(root))
    return found.capacity_bytes / MIB, found.free_bytes / MIB


def test_version_2_counts_the_page_cache_as_free(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/user/job"
    files = {
        "proc/self/cgroup": "0::/user/job",
        f"{group}/memory.max": 400 * MIB,
        f"{group}/memory.current": 300 * MIB,
        f"{group}/memory.stat": f"anon 7\nfile {250 * MIB}\nshmem {100 * MIB}\n"
        f"active_file {50 * MIB}\ninactive_file {100 * MIB}",
    }
    assert within(write(tmp_path, files)) == (400, 250)


def test_version_1_reads_the_memory_controller(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/memory/job"
    files = {
        "proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/job\n3:cpuset:/elsewhere\n0::/",
        f"{group}/memory.limit_in_bytes": 400 * MIB,
        f"{group}/memory.usage_in_bytes": 300 * MIB,
        f"{group}/memory.stat": f"inactive_file 1\ntotal_inactive_file {30 * MIB}",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": UNLIMITED,
        "sys/fs/cgroup/memory/memory.usage_in_bytes": 500 * MIB,
    }
    assert within(write(tmp_path, files)) == (400, 130)


def test_the_tightest_ancestor_binds(tmp_path: Path) -> None:
    top = "sys/fs/cgroup"
    files = {
        "proc/self/cgroup": "0::/a/b/c",
        f"{top}/a/b/c/memory.max": "max",
        f"{top}/a/b/c/memory.current": 10 * MIB,
        f"{top}/a/b/memory.max": 500 * MIB,
        f"{top}/a/b/memory.current": 480 * MIB,
        f"{top}/a/memory.max": 300 * MIB,
        f"{top}/a/memory.current": 100 * MIB,
    }
    assert within(write(tmp_path, files)) == (300, 20)


@pytest.mark.parametrize("path", ["/docker/0123abc", "/../../other", "/"])
def test_a_container_sees_its_group_as_the_top(tmp_path: Path, path: str) -> None:
    files = {
        "proc/self/cgroup": f"0::{path}",
        "sys/fs/cgroup/memory.max": 200 * MIB,
        "sys/fs/cgroup/memory.current": 50 * MIB,
        "sys/other/memory.max": 1 * MIB,
        "sys/other/memory.current": 0,
    }
    assert within(write(tmp_path, files)) == (200, 150)


def test_a_hybrid_host_mounts_version_2_apart(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/\n0::/job",
        "sys/fs/cgroup/unified/job/memory.max": 200 * MIB,
        "sys/fs/cgroup/unified/job/memory.current": 50 * MIB,
    }
    assert within(write(tmp_path, files)) == (200, 150)


def test_limits_above_the_physical_memory_change_nothing(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/",
        "sys/fs/cgroup/memory.max": UNLIMITED,
        "sys/fs/cgroup/memory.current": 50 * MIB,
    }
    assert within(write(tmp_path, files)) == (1000, 900)


def test_an_overfull_group_has_nothing_free(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/",
        "sys/fs/cgroup/memory.max": 50 * MIB,
        "sys/fs/cgroup/memory.current": 60 * MIB,
    }
    assert within(write(tmp_path, files)) == (50, 0)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"proc/self/cgroup": "no colons here"},
        {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "lots"},
        {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": MIB},
    ],
)
def test_without_readable_groups_the_host_is_what_it_is(
    tmp_path: Path, files: dict[str, object]
) -> None:
    assert within(write(tmp_path, files)) == (1000, 900)


# --- cards and disks --------------------------------------------------------------------------


class FakeNvml:
    """As much of nvidia-ml-py as is used."""

    class NVMLError(Exception):
        """What every call may raise."""

    def __init__(self, *uuids: str, broken: str = "") -> None:
        self.uuids = uuids
        self.broken = broken
        self.shut = False

    def nvmlInit(self) -> None:  # noqa: N802
        if self.broken == "init":
            raise self.NVMLError

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.shut = True

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.uuids)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:  # noqa: N802
        return self.uuids[handle]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:  # noqa: N802
        if self.broken == "memory":
            raise self.NVMLError
        return SimpleNamespace(total=100 + handle, free=10 + handle)


@pytest.mark.parametrize(
    ("visible", "free"),
    [
        (None, [10, 11, 12]),
        ("2,0", [12, 10]),
        ("", []),
        ("-1", []),
        ("1,9,0", [11]),
        ("GPU-bb", [11]),
        ("GPU-", []),
        ("MIG-1", []),
    ],
)
def test_cards_are_numbered_as_cuda_shows_them(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, free: list[int]
) -> None:
    nvml = FakeNvml("GPU-aaaa", "GPU-bbbb", "GPU-cccc")
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = Machine.detect()
    assert [tier.free_bytes for tier in found.tiers[:-2]] == free
    assert [tier.name for tier in found.tiers[:-2]] == [f"cuda:{i}" for i in range(len(free))]
    assert nvml.shut


@pytest.mark.parametrize(
    "nvml", [None, FakeNvml("GPU-a", broken="init"), FakeNvml("a", broken="memory")]
)
def test_without_a_working_driver_there_are_no_cards(
    monkeypatch: pytest.MonkeyPatch, nvml: Any
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [tier.name for tier in Machine.detect().tiers] == ["cpu", "disk"]


def test_the_disk_need_not_exist_yet(tmp_path: Path) -> None:
    found = Machine.detect(disk=tmp_path / "not" / "yet").tier("disk")
    assert 0 < found.free_bytes <= found.capacity_bytes
    assert found.capacity_bytes == Machine.detect(disk=tmp_path).tier("disk").capacity_bytes


def test_the_host_has_memory() -> None:
    host = Machine.detect().tier("cpu")
    assert 0 < host.free_bytes <= host.capacity_bytes
