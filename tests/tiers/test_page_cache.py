"""The page cache in place: what is cached, views that stay valid, and maps that go."""

from __future__ import annotations

import mmap
import os
import random
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distorch.tiers import page_cache
from distorch.tiers.page_cache import PageCache
from tests.plan_strategies import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = mmap.PAGESIZE
NUM_BYTES = 16 * MIB + 5
CONTENT = random.Random(3).randbytes(NUM_BYTES)  # noqa: S311  weights, not secrets
SMAPS = Path("/proc/self/smaps")
needs_smaps = pytest.mark.skipif(not SMAPS.exists(), reason="no /proc/self/smaps")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "weights"
    path.write_bytes(CONTENT)
    with path.open("rb+") as file:
        os.fsync(file.fileno())  # only clean pages can be dropped
    return path


@pytest.fixture
def cache(path: Path) -> Iterator[PageCache]:
    """Yield a cache of a file that the system holds all of."""
    assert path.read_bytes() == CONTENT
    with closing(PageCache(path)) as cache:
        if not cache.has(0, NUM_BYTES):
            pytest.skip("this system does not tell what is cached, or keeps no file that was read")
        yield cache


def _drop(path: Path, begin: int, end: int) -> None:
    """Drop a range of a file from the page cache; whole MiB, since a system drops whole folios."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, begin, end - begin, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    with closing(PageCache(path)) as cache:
        if any(cache.has(place, PAGE) for place in range(begin, end, MIB)):
            pytest.skip("this file system keeps all of a file in the page cache")


def _mapped_bytes(path: Path) -> int:
    """How much of a file this process has mapped and touched."""
    lines = iter(SMAPS.read_text(encoding="utf-8", errors="replace").splitlines())
    rss = (
        next(line for line in lines if line.startswith("Rss:")) for at in lines if path.name in at
    )
    return sum(int(line.split()[1]) * KIB for line in rss)


def test_a_cached_file_is_held_wherever_one_asks(cache: PageCache) -> None:
    for begin, nbytes in ((0, 1), (0, NUM_BYTES), (NUM_BYTES - 1, 1), (PAGE - 1, 2), (777, MIB)):
        assert cache.has(begin, nbytes)
        assert cache.has_most(begin, nbytes)


def test_nothing_is_held_beside_the_file_nor_of_no_bytes(cache: PageCache) -> None:
    for begin, nbytes in ((0, 0), (5, 0), (NUM_BYTES - 1, 2), (NUM_BYTES, 1), (0, 1 << 40)):
        assert not cache.has(begin, nbytes)
        assert not cache.has_most(begin, nbytes)


def test_a_gap_is_noticed_and_most_is_more_than_half(cache: PageCache, path: Path) -> None:
    _drop(path, 4 * MIB, 8 * MIB)
    for begin, end, has, has_most in (
        (0, 4, True, True),
        (8, 16, True, True),
        (4, 8, False, False),
        (3, 5, False, False),  # 1 MiB of 2, and the last page is gone
        (7, 9, False, True),  # 1 MiB of 2, and the last page is there
        (0, 16, False, True),
        (2, 8, False, False),
        (2, 10, False, True),
    ):
        asked = begin * MIB, (end - begin) * MIB
        assert (cache.has(*asked), cache.has_most(*asked)) == (has, has_most), (begin, end)


def test_asking_brings_nothing(cache: PageCache, path: Path) -> None:
    _drop(path, 4 * MIB, 8 * MIB)
    for _ in range(3):
        assert not cache.has(4 * MIB, 4 * MIB)
        assert not cache.has_most(4 * MIB, 4 * MIB)
        assert not any(cache.has(place, PAGE) for place in range(4 * MIB, 8 * MIB, 64 * KIB))


@given(st.integers(0, NUM_BYTES), st.integers(0, 3 * MIB))
def test_a_view_is_that_slice_of_the_file(path: Path, begin: int, nbytes: int) -> None:
    with closing(PageCache(path)) as cache:
        if cache._map is None:
            pytest.skip("this system does not tell what is cached")
        cache.populate(begin, min(nbytes, NUM_BYTES - begin))
        assert cache.view(begin, nbytes) == CONTENT[begin:][:nbytes]


def test_a_view_stays_valid_when_it_is_forgotten_dropped_and_closed(
    cache: PageCache, path: Path
) -> None:
    views = [cache.view(place * MIB, MIB) for place in range(16)]
    for place in range(16):
        cache.forget(place * MIB, MIB)
    assert b"".join(views) == CONTENT[: 16 * MIB]
    _drop_all_quietly(path)
    assert b"".join(views) == CONTENT[: 16 * MIB]
    cache.close()
    assert b"".join(views) == CONTENT[: 16 * MIB]


def _drop_all_quietly(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def test_what_is_written_to_a_view_stays_here(cache: PageCache, path: Path) -> None:
    cache.view(0, 3)[:] = b"abc"
    assert bytes(cache.view(0, 3)) == b"abc"
    assert path.read_bytes() == CONTENT


def test_neighbours_are_unmapped_together(
    cache: PageCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    unmapped: list[tuple[int, int]] = []
    monkeypatch.setattr(cache, "_unmap", lambda begin, end: unmapped.append((begin, end)))
    begin = first = PAGE + 100
    for _ in range(9):  # 100 bytes of padding between two, as files have it
        cache.forget(begin, MIB)
        begin += MIB + 100
    batch = (first, first + 8 * (MIB + 100) - 100)
    assert [run for run in unmapped if run != (0, 0)] == [batch]
    cache.forget(0, PAGE)  # another place
    cache.forget(PAGE + PAGE, PAGE)  # a page lies between
    assert unmapped[-2:] == [(begin - MIB - 100, begin - 100), (0, PAGE)]


@needs_smaps
def test_what_is_forgotten_is_mapped_no_more_but_cached_as_before(
    cache: PageCache, path: Path
) -> None:
    for place in range(16):
        cache.populate(place * MIB, MIB)
        assert len(bytes(cache.view(place * MIB, MIB))) == MIB
        cache.forget(place * MIB, MIB)
        assert _mapped_bytes(path) <= 12 * MIB  # what waits, the next, and the system's edges
    cache.forget(0, PAGE)
    assert _mapped_bytes(path) <= 2 * MIB
    assert cache.has(0, NUM_BYTES)


@needs_smaps
def test_closing_unmaps_what_no_view_is_left_of(cache: PageCache, path: Path) -> None:
    cache.populate(0, NUM_BYTES)
    view = cache.view(0, 10)
    assert path.name in SMAPS.read_text(encoding="utf-8", errors="replace")
    cache.close()
    assert view == CONTENT[:10]
    del view
    assert path.name not in SMAPS.read_text(encoding="utf-8", errors="replace")
    cache.close()
    cache.forget(0, PAGE)
    assert not cache.has(0, 10)


@pytest.mark.parametrize("content", [b"", b"abc"])
def test_where_the_system_does_not_tell_nothing_is_held(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_cache, "_tells", lambda _: not content)  # an empty file has no map
    path = tmp_path / "weights"
    path.write_bytes(content)
    with closing(PageCache(path)) as cache:
        assert not cache.has(0, len(content))
        assert not cache.has_most(0, len(content))
        cache.populate(0, 3)
        cache.forget(0, 3)
        cache.forget(1 << 30, 3)
