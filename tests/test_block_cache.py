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


def test_what_streams_have_passed_takes_a_part_of_the_budget_and_goes_first_come_first() -> None:
    cache = BlockCache(20 * BLOCK)
    cache.put(OTHER, 7, bytes(BLOCK))
    roots = [bytes(30) + bytes([1, number]) for number in range(30)]
    for root in roots:
        cache.put_whole(root, bytes(2 * BLOCK))
        cache.passed(root)
    assert [root for root in roots if (root, WHOLE) in cache] == roots[-5:]  # 11 of 20 blocks
    assert (OTHER, 7) in cache  # it would long be gone otherwise
    assert cache.size == 11 * BLOCK
    # Passed once more, or not here at all: counted once.
    cache.passed(roots[-1])
    cache.passed(roots[0])
    assert cache.size == 11 * BLOCK
    # What nobody has passed may take all of it; what was passed goes like everything else then.
    for number in range(10):
        cache.put_whole(bytes(30) + bytes([2, number]), bytes(2 * BLOCK))
    assert cache.size == 20 * BLOCK
    assert not any((root, WHOLE) in cache for root in roots)
    again = roots[:6]
    for root in again:
        cache.put_whole(root, bytes(2 * BLOCK))
        cache.passed(root)
    assert [root for root in again if (root, WHOLE) in cache] == again[-5:]
    assert cache.size == 20 * BLOCK - 2 * BLOCK
