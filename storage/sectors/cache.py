"""The block cache: verified plaintext blocks in memory, least recently used first out.

Keyed by (root, block number), never by sector id: what a root names can never change, so nothing here can be stale.
"""

from __future__ import annotations

from dataclasses import dataclass

from cachetools import LRUCache


@dataclass(slots=True)
class CacheStatistics:
    """Counts since the volume was opened."""

    hits: int = 0
    misses: int = 0


class BlockCache:
    """Blocks up to `limit` bytes together. Single-threaded: the event loop's."""

    def __init__(self, limit: int) -> None:
        self._blocks: LRUCache[tuple[bytes, int], bytes] = LRUCache(maxsize=max(limit, 1), getsizeof=len)
        self.statistics = CacheStatistics()

    @property
    def limit(self) -> int:
        """Bytes it may hold."""
        return int(self._blocks.maxsize)

    @property
    def size(self) -> int:
        """Bytes it holds."""
        return int(self._blocks.currsize)

    def get(self, root: bytes, block: int) -> bytes | None:
        """The block, counted as a hit or a miss."""
        found: bytes | None = self._blocks.get((root, block))
        if found is None:
            self.statistics.misses += 1
        else:
            self.statistics.hits += 1
        return found

    def __contains__(self, key: tuple[bytes, int]) -> bool:
        return key in self._blocks

    def put(self, root: bytes, block: int, data: bytes) -> None:
        """Keep a block; one larger than the whole budget is not kept."""
        if len(data) <= self._blocks.maxsize:
            self._blocks[root, block] = data
