"""The disk tier's own file: without a name, written whole or not at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from distorch.errors import StorageError
from distorch.plan.blocks import Block
from distorch.tiers import destinations
from distorch.tiers import disk as disk_module
from distorch.tiers.disk import DiskTier
from distorch.tiers.memory import allocate_pages, view_bytes
from tests.plan_strategies import MIB, contents, equal_blocks, many_parts, memory_source

if TYPE_CHECKING:
    from collections.abc import Callable

FDS = Path("/proc/self/fd")
needs_fds = pytest.mark.skipif(not FDS.exists(), reason="no /proc/self/fd to count handles in")
needs_posix = pytest.mark.skipif(os.name != "posix", reason="only POSIX unlinks an open file")


def _num_fds() -> int:
    return len(list(FDS.iterdir()))


def _is_right(tier: DiskTier, block: Block, data: dict[str, bytes]) -> bool:
    slot = memoryview(bytearray(block.nbytes))
    tier.read([(block, slot)])
    return all(bytes(out) == data[part.tensor] for part, out in destinations(block, slot))


def test_our_file_is_read_straight_into_a_slot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = (*many_parts(5), *equal_blocks(2, MIB + 77))
    data = contents(blocks)
    tier = DiskTier("disk", tmp_path)
    for block in blocks:
        tier.put(block, memory_source(data))
    reader = tier._read_from._reader  # type: ignore[attr-defined]  # our own file's
    if not reader._is_direct:
        pytest.skip("this file system has no O_DIRECT")
    monkeypatch.setattr(reader, "_read_and_copy", None)
    monkeypatch.setattr(reader.cache, "has_most", lambda *_: False)
    for block in blocks:
        slot = view_bytes(allocate_pages(block.slot_bytes))
        tier.read([(block, slot)])
        assert all(bytes(out) == data[part.tensor] for part, out in destinations(block, slot))
    tier.close()


@needs_posix
def test_our_file_has_no_name_while_it_is_in_use(tmp_path: Path) -> None:
    blocks = many_parts(5)
    data = contents(blocks)
    tier = DiskTier("disk", tmp_path)
    for block in blocks:
        tier.put(block, memory_source(data))
        assert not list(tmp_path.iterdir())
    assert all(_is_right(tier, block, data) for block in blocks)
    tier.close()


def test_where_a_file_must_have_a_name_it_goes_when_the_tier_closes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = many_parts(5)
    data = contents(blocks)
    with monkeypatch.context() as patch:
        patch.setattr(disk_module, "os", _Windows())
        tier = DiskTier("disk", tmp_path)
        for block in blocks:
            tier.put(block, memory_source(data))
        assert len(list(tmp_path.iterdir())) == 1
        assert all(_is_right(tier, block, data) for block in blocks)
        tier.close()
    assert not list(tmp_path.iterdir())


class _Windows:
    """The os module of a system that cannot unlink an open file, nor sync, nor advise."""

    name = "nt"

    def __getattr__(self, name: str) -> Any:
        if name in {"fdatasync", "posix_fadvise"}:
            raise AttributeError(name)
        return getattr(os, name)


@needs_fds
def test_closing_gives_the_handles_and_the_room_back(tmp_path: Path) -> None:
    before = _num_fds()
    blocks = equal_blocks(4, MIB)
    data = contents(blocks)
    for _ in range(3):
        tier = DiskTier("disk", tmp_path)
        for block in blocks:
            tier.put(block, memory_source(data))
        tier.close()
        assert _num_fds() == before


def _put_all(tier: DiskTier, blocks: tuple[Block, ...]) -> None:
    for block in blocks:
        tier.put(block, memory_source(contents(blocks)))


def _refusing(number: int, after_bytes: int) -> Callable[[int, Any], int]:
    """Return an os.write that writes so many bytes, in odd pieces, and then fails."""
    write, written = os.write, 0

    def refuse(fd: int, data: Any) -> int:
        nonlocal written
        if written >= after_bytes:
            raise OSError(number, os.strerror(number))
        count = write(fd, data[: min(77, after_bytes - written)])
        written += count
        return count

    return refuse


@needs_fds
@pytest.mark.parametrize("after_bytes", [0, 100, 5000])
@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the disk is full"), (errno.EIO, "error")],
)
def test_a_write_that_fails_is_a_storage_error_and_leaves_nothing(
    number: int, words: str, after_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _num_fds()
    blocks = many_parts(9)
    tier = DiskTier("disk", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", _refusing(number, after_bytes))
        with pytest.raises(StorageError, match=words) as caught:
            _put_all(tier, blocks)
    assert str(tmp_path) in str(caught.value)
    assert caught.value.hint
    tier.close()
    assert not list(tmp_path.iterdir())
    assert _num_fds() == before


def test_short_writes_are_carried_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = many_parts(3)
    data = contents(blocks)
    tier = DiskTier("disk", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", _refusing(errno.ENOSPC, 1 << 40))
        for block in blocks:
            tier.put(block, memory_source(data))
    assert all(_is_right(tier, block, data) for block in blocks)
    tier.close()


LIMITED = """
    import resource, sys
    from pathlib import Path
    from distorch.errors import StorageError
    from distorch.tiers.disk import DiskTier
    from tests.plan_strategies import MIB, contents, equal_blocks, memory_source

    resource.setrlimit(resource.RLIMIT_FSIZE, (5 * MIB // 2, 5 * MIB // 2))
    blocks = equal_blocks(4, MIB)
    data = contents(blocks)
    tier = DiskTier("disk", Path(sys.argv[1]))
    try:
        for num, block in enumerate(blocks):
            tier.put(block, memory_source(data))
    except StorageError as error:
        print(num, error.exit_code, "File too large" in str(error))
"""


@needs_posix
def test_a_real_limit_of_the_system_is_a_storage_error(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LIMITED), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.split() == ["2", "2", "True"], done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["missing", "file"])
def test_a_folder_that_cannot_be_written_in_is_a_storage_error(what: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=what) as caught:
        DiskTier("disk", tmp_path / what)
    assert "another folder" in caught.value.hint


@needs_fds
def test_a_tier_that_cannot_open_its_file_for_reading_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise StorageError(f"{path} cannot be opened: Too many open files")

    before = _num_fds()
    monkeypatch.setattr(disk_module, "FileReader", fail)
    with pytest.raises(StorageError):
        DiskTier("disk", tmp_path)
    assert not list(tmp_path.iterdir())
    assert _num_fds() == before


def test_a_read_before_any_put_is_our_mistake() -> None:
    (block,) = many_parts(1)
    with pytest.raises(AssertionError, match="after it was put"):
        DiskTier("disk").read([(block, memoryview(bytearray(block.nbytes)))])
