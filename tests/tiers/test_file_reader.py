"""The file reader: slices of a file by every way there is, and a page cache left as it was."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distorch.errors import StorageError
from distorch.tiers.file_reader import FileReader, drop_from_cache
from tests.plan_strategies import KIB, MIB
from tests.tiers.make import WAYS, num_cached, open_reader, read_segments

FILE_BYTES = 600 * KIB + 123  # more than one page, and an end that is no page's
LARGE_BYTES = 20 * MIB + 77
PAGE = mmap.PAGESIZE
CONTENT = random.Random(0).randbytes(FILE_BYTES)  # noqa: S311  weights, not secrets
FDS = Path("/proc/self/fd")
needs_fds = pytest.mark.skipif(not FDS.exists(), reason="no /proc/self/fd to count handles in")


@pytest.fixture(scope="module")
def content() -> bytes:
    return CONTENT


@pytest.fixture(scope="module")
def path(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reader") / "weights"
    path.write_bytes(content)
    return path


@st.composite
def segment_lists(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Offsets and lengths: neighbours with small gaps and large ones, overlaps, any order."""
    segments, end = [], draw(st.integers(0, FILE_BYTES // 2))
    gaps = st.sampled_from([0, 0, 1, 24, 63, 4096, 4097, 20_000, -10])
    sizes = st.one_of(st.integers(0, 100), st.sampled_from([4095, 4096, 4097, 65_536, 150_000]))
    for _ in range(draw(st.integers(1, 12))):
        begin = min(max(0, end + draw(gaps)), FILE_BYTES)
        end = min(begin + draw(sizes), FILE_BYTES)
        segments.append((begin, end - begin))
    return draw(st.permutations(segments))


@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=25, deadline=None)
@given(wanted=segment_lists())
def test_segments_are_slices_of_the_file(
    way: str,
    cold: bool,  # noqa: FBT001  a parameter of the test
    wanted: list[tuple[int, int]],
    path: Path,
) -> None:
    with open_reader(path, way) as reader:
        if cold:
            drop_from_cache(path)
        assert read_segments(reader, wanted) == [CONTENT[at : at + size] for at, size in wanted]


@pytest.mark.parametrize("way", WAYS)
def test_more_neighbours_than_one_call_may_take_are_slices_too(
    way: str, path: Path, content: bytes
) -> None:
    wanted = [(3 + number * 40, 33) for number in range(2500)]
    drop_from_cache(path)
    with open_reader(path, way) as reader:
        assert read_segments(reader, wanted) == [content[at : at + size] for at, size in wanted]


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_ends_with_the_file_is_read_to_its_last_byte(
    way: str, path: Path, content: bytes
) -> None:
    wanted = [(FILE_BYTES - 5000, 5000), (FILE_BYTES - 1, 1), (FILE_BYTES, 0)]
    drop_from_cache(path)
    with open_reader(path, way) as reader:
        assert read_segments(reader, wanted) == [content[-5000:], content[-1:], b""]


@pytest.mark.parametrize("way", ["as it comes", "direct", "read and drop", "no preadv"])
def test_more_than_one_call_reads_is_read_by_several(way: str, large: Path) -> None:
    expected = large.read_bytes()
    drop_from_cache(large)
    out = bytearray(LARGE_BYTES - 1)
    with open_reader(large, way) as reader:
        reader.read([(1, memoryview(out)[: 9 * MIB]), (9 * MIB + 1, memoryview(out)[9 * MIB :])])
    assert out == expected[1:]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "weights"
    path.write_bytes(random.Random(1).randbytes(LARGE_BYTES))  # noqa: S311  not secrets
    with path.open("rb+") as file:
        os.fsync(file.fileno())  # only clean pages can be dropped
    return path


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("most", [1, 4097, 70_000])
def test_a_call_that_reads_less_than_asked_is_carried_on(
    way: str, most: int, path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "no preadv" or (way == "direct" and most == 1):
        pytest.skip("this way does not read so")
    preadv = os.preadv

    def less(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        count, left = 0, most
        for buffer in buffers:
            view = memoryview(buffer)[:left]
            part = preadv(fd, [view], offset + count, flags) if len(view) else 0
            count, left = count + part, left - part
            if part < len(view):
                break
        return count

    monkeypatch.setattr(os, "preadv", less)
    size = 300 if most == 1 else 200_000
    wanted = [(100, size), (100 + size + 7, 50)]
    with open_reader(path, way) as reader:
        assert read_segments(reader, wanted) == [content[at : at + size] for at, size in wanted]


@pytest.mark.parametrize("way", WAYS)
def test_many_threads_read_at_once(way: str, path: Path, content: bytes) -> None:
    def one(seed: int) -> bool:
        rng = random.Random(seed)  # noqa: S311  places
        at, size = rng.randrange(FILE_BYTES // 2), rng.randrange(200_000)
        out = bytearray(64)
        reader.read_small(at, memoryview(out))
        found = read_segments(reader, [(at, size), (at + size + 9, 20)])
        expected = [content[at : at + size], content[at + size + 9 :][:20]]
        return out == content[at : at + 64] and found == expected

    with open_reader(path, way) as reader, ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(100)))


@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_became_shorter_is_a_storage_error(way: str, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(50_000))
    with open_reader(path, way) as reader:
        os.truncate(path, 20_001)
        for at, size in [(0, 50_000), (20_001, 1), (30_000, 10), (4096, 20_000)]:
            with pytest.raises(StorageError, match=r"ends at (20001|30000)") as caught:
                read_segments(reader, [(at, size)])
            assert "weights" in str(caught.value)
        with pytest.raises(StorageError, match="ends at"):
            reader.read_small(20_000, memoryview(bytearray(2)))
        assert read_segments(reader, [(20_000, 1)]) == [b"\0"]


def test_a_file_whose_name_is_removed_is_still_read(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"abcd")
    with closing(FileReader(path)) as reader:
        path.unlink()
        assert read_segments(reader, [(1, 2)]) == [b"bc"]


@pytest.mark.parametrize("way", WAYS)
def test_a_disk_that_fails_is_a_storage_error(way: str, path: Path) -> None:
    def fail(*_args: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with open_reader(path, way) as reader, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "read" if way == "no preadv" else "preadv", fail)
        with pytest.raises(StorageError, match=r"cannot be read: Input/output error") as caught:
            read_segments(reader, [(0, 100)])
        assert isinstance(caught.value.__cause__, OSError)


def test_a_missing_file_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"missing cannot be opened: No such file"):
        FileReader(tmp_path / "missing")


@needs_fds
@pytest.mark.parametrize("num_opened", [1, 2])
def test_a_reader_that_cannot_open_all_its_handles_keeps_none(
    num_opened: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, open_file = 0, os.open

    def fail(*args: Any) -> int:
        nonlocal opened
        opened += 1
        if opened > num_opened:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return open_file(*args)

    before = len(list(FDS.iterdir()))
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail)
        if num_opened == 1:
            with pytest.raises(StorageError, match="open files"):
                FileReader(path)
        else:
            FileReader(path).close()  # reads without O_DIRECT
    assert len(list(FDS.iterdir())) == before


@needs_fds
def test_close_gives_every_handle_back(path: Path) -> None:
    before = len(list(FDS.iterdir()))
    reader = FileReader(path)
    assert len(list(FDS.iterdir())) > before
    reader.close()
    reader.close()
    assert len(list(FDS.iterdir())) == before
    with pytest.raises(StorageError):
        read_segments(reader, [(0, 1)])


@needs_fds
def test_a_forgotten_reader_gives_every_handle_back(path: Path) -> None:
    gc.collect()
    before = len(list(FDS.iterdir()))
    reader = FileReader(path)
    del reader
    gc.collect()
    assert len(list(FDS.iterdir())) == before


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc/self/maps")
def test_the_shards_of_a_model_share_the_buffer_of_a_thread(path: Path) -> None:
    def num_mapped() -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmSize")) * KIB

    with open_reader(path, "direct") as first:
        read_segments(first, [(0, 10)])
        before, kept = num_mapped(), []
        for _ in range(8):  # a reader for each of eight shards
            with open_reader(path, "direct") as shard:
                drop_from_cache(path)
                read_segments(shard, [(0, 10)])
                kept.append(shard)
        assert num_mapped() - before < 8 * MIB


@pytest.fixture
def cold(large: Path) -> Path:
    """Return the large file, with nothing of it in the page cache."""
    drop_from_cache(large)
    if num_cached(large):
        pytest.skip("this file system keeps all of a file in the page cache")
    return large


FILLING = 1024  # pages of the 5,140 that may stay: edges, and what the kernel read ahead


@pytest.mark.parametrize("way", [way for way in WAYS if way not in {"plain", "no preadv"}])
def test_reading_leaves_the_page_cache_as_empty_as_it_was(way: str, cold: Path) -> None:
    out = memoryview(bytearray(LARGE_BYTES))
    with open_reader(cold, way) as reader:
        reader.read([(at, out[at : at + MIB]) for at in range(0, 16 * MIB, MIB)])
        for at in range(16 * MIB, 20 * MIB, 100_001):
            reader.read([(at, out[at : at + 100_001])])
    assert num_cached(cold) <= FILLING


@pytest.mark.parametrize("way", [way for way in WAYS if way not in {"plain", "no preadv"}])
def test_one_cached_page_does_not_bring_the_block_behind_it(way: str, cold: Path) -> None:
    with closing(FileReader(cold)) as rows:  # a row of an embedding was looked up
        rows.read_small(MIB, memoryview(bytearray(100)))
    out = memoryview(bytearray(8 * MIB))
    with open_reader(cold, way) as reader:
        for _ in range(2):
            reader.read([(MIB, out)])
    assert num_cached(cold) <= FILLING


def test_a_row_brings_its_own_pages_and_no_more(cold: Path) -> None:
    with closing(FileReader(cold)) as reader:
        for number in range(20):
            reader.read_small(number * MIB + 4000, memoryview(bytearray(300)))
    assert num_cached(cold) <= FILLING


def _noting(reader: FileReader, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return where direct reads begin, from now on."""
    begins: list[int] = []
    preadv = os.preadv

    def watch(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if fd == reader._direct_fd:
            begins.append(offset)
        return preadv(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", watch)
    return begins


@pytest.mark.parametrize("way", ["as it comes", "direct", "flag unknown to the kernel"])
def test_what_is_in_the_page_cache_is_served_from_there(
    way: str, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = large.read_bytes()
    if num_cached(large) < LARGE_BYTES // PAGE:
        pytest.skip("the page cache does not keep a file that was just read")
    out = bytearray(LARGE_BYTES)
    with open_reader(large, way) as reader:
        direct_reads = _noting(reader, monkeypatch)
        reader.read([(0, memoryview(out))])
    assert out == expected
    assert not direct_reads
    assert num_cached(large) >= LARGE_BYTES // PAGE


def test_a_gap_in_what_is_cached_is_filled(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = large.read_bytes()
    with open_reader(large, "as it comes") as reader:
        if not reader.cache.has(0, 8 * MIB):
            pytest.skip("this system does not tell what it caches")
        direct_reads = _noting(reader, monkeypatch)
        with large.open("rb") as file:
            os.posix_fadvise(file.fileno(), 2 * MIB, 2 * MIB, os.POSIX_FADV_DONTNEED)
        if reader.cache.has(0, 8 * MIB) or not reader.cache.has_most(0, 8 * MIB):
            pytest.skip("no gap can be made in what this system caches")
        for _ in range(2):
            assert read_segments(reader, [(100, 8 * MIB)]) == [expected[100 : 100 + 8 * MIB]]
            assert reader.cache.has(0, 8 * MIB)  # from now on it can be used in place
    assert not direct_reads
