"""The block cache: what it holds is what it counts, whole shards as well as blocks."""

from __future__ import annotations

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
