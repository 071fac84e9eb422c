"""The block cache: what it holds is what it counts, whole shards as well as blocks."""

from __future__ import annotations

import pytest

from storage.sealing import BLOCK
from storage.sectors.cache import WHOLE, BlockCache

ROOT, OTHER = bytes(32), bytes(31) + b"\1"


def test_a_whole_shard_serves_its_blocks_and_is_counted_once() -> None:
    cache = BlockCache(4 * BLOCK)
    plain = bytes(BLOCK) + b"\1" * BLOCK + b"\2" * 100
    cache.put_whole(ROOT, plain)
    assert cache.size == len(plain)
    assert cache.whole(ROOT) is plain
    assert [cache.get(ROOT, number) for number in range(3)] == [bytes(BLOCK), b"\1" * BLOCK, b"\2" * 100]
    assert (ROOT, 2) in cache
    assert (OTHER, 2) not in cache
    assert cache.get(OTHER, 0) is None
    assert (cache.statistics.hits, cache.statistics.misses) == (4, 1)


def test_a_whole_shard_goes_as_a_whole_least_recently_used_first() -> None:
    cache = BlockCache(4 * BLOCK)
    cache.put_whole(ROOT, bytes(2 * BLOCK))
    cache.put(OTHER, 0, bytes(BLOCK))
    assert cache.get(ROOT, 1) is not None  # a block of it keeps all of it
    cache.put(OTHER, 1, bytes(BLOCK))
    cache.put(OTHER, 2, bytes(BLOCK))
    assert (ROOT, WHOLE) in cache
    assert (OTHER, 0) not in cache
    cache.put_whole(OTHER, bytes(3 * BLOCK))
    assert (ROOT, WHOLE) not in cache
    assert cache.size <= cache.limit
    cache.put_whole(ROOT, bytes(5 * BLOCK))
    assert (ROOT, WHOLE) not in cache  # larger than the budget
    assert cache.size <= cache.limit


def stream(cache: BlockCache, roots: list[bytes], blocks: int) -> list[bytes]:
    """Reads shards of so many blocks from end to end; those that are here then."""
    for root in roots:
        if (root, WHOLE) not in cache:
            cache.put_whole(root, bytes(blocks * BLOCK))
        cache.passed(root)
    return [root for root in roots if (root, WHOLE) in cache]


def roots_of(number: int, count: int) -> list[bytes]:
    return [bytes(30) + bytes([number, each]) for each in range(count)]


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> BlockCache:
    """Of 40 blocks: 22 for what was passed, 4 of them for what was passed once; and a block that nobody has passed is in it."""
    monkeypatch.setattr("storage.sectors.cache.JUST_PASSED", 4 * BLOCK)
    cache = BlockCache(40 * BLOCK)
    cache.put(OTHER, 7, bytes(BLOCK))
    return cache


def test_what_a_stream_has_passed_once_makes_room_for_what_comes(cache: BlockCache) -> None:
    roots = roots_of(1, 30)
    assert stream(cache, roots, 2) == roots[-2:]
    assert cache.size == 5 * BLOCK
    # Passed again while it is here, by a second reader of the same stream.
    cache.passed(roots[-2])
    cache.passed(roots[-2])
    cache.passed(roots[0])  # gone
    assert cache.size == 5 * BLOCK
    assert (OTHER, 7) in cache
    # One is left at least, however large.
    large = roots_of(2, 3)
    assert stream(cache, large, 6) == large[-1:]


def test_what_is_streamed_again_is_kept_and_so_is_what_was_read_in_parts(cache: BlockCache) -> None:
    roots = roots_of(1, 8)
    assert stream(cache, roots, 2) == roots[-2:]
    assert stream(cache, roots, 2) == roots
    parts = roots_of(2, 9)
    for root in parts:
        cache.put(root, 1, bytes(BLOCK))
    assert stream(cache, parts, 1) == parts
    # Up to a part of the budget, first come first; what others have in it stays.
    assert stream(cache, roots, 2) == roots
    roots = roots_of(3, 40)
    stream(cache, roots, 2)
    assert stream(cache, roots, 2) == roots[-11:]
    assert (OTHER, 7) in cache
    assert cache.size == 32 * BLOCK


def test_what_is_remembered_of_it_is_bounded(cache: BlockCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.sectors.cache.REMEMBERED", 3)
    roots = roots_of(1, 6)
    for _ in range(3):
        assert stream(cache, roots, 2) == roots[-2:]
    assert len(cache._wanted) == 3


def test_what_was_passed_forgotten_and_is_passed_once_more_is_let_go_of_once(cache: BlockCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.sectors.cache.REMEMBERED", 3)
    (kept,) = roots_of(1, 1)

    def wanted_and_streamed(root: bytes) -> None:
        cache.put(root, 1, bytes(BLOCK))
        stream(cache, [root], 2)

    wanted_and_streamed(kept)
    # It is not remembered any more, but still here.
    for root in roots_of(2, 3):
        cache.put(root, 1, bytes(BLOCK))
    cache.passed(kept)
    stream(cache, roots_of(3, 8), 2)
    for root in roots_of(4, 12):
        wanted_and_streamed(root)
    assert cache.size == sum(len(data) for data in cache._blocks.values())


def test_what_was_passed_goes_like_everything_else_where_others_want_the_room(cache: BlockCache) -> None:
    roots = roots_of(1, 9)
    stream(cache, roots, 2)
    stream(cache, roots, 2)
    for root in roots_of(2, 20):
        cache.put_whole(root, bytes(2 * BLOCK))
    assert cache.size == 40 * BLOCK
    assert not any((root, WHOLE) in cache for root in roots)
    other = roots_of(3, 5)
    assert stream(cache, other, 2) == other[-2:]
    assert stream(cache, roots, 2) == roots
    assert cache.size == 40 * BLOCK
