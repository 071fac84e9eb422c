"""The block cache: verified plaintext in memory, least recently used first out.

Keyed by root, never by sector id: what a root names can never change, so nothing here can be stale. What was read or written as a whole
is one entry, since cutting it into blocks and joining them again for each reader took most of the event loop's time in sequential reads.

| key | entry |
|---|---|
| (root, number) | a block |
| (root, `WHOLE`) | the whole shard's plaintext: it comes and goes as one, so what is counted is what is held |
"""

from __future__ import annotations

from dataclasses import dataclass

from cachetools import LRUCache

from storage.sealing import BLOCK

#: In place of a block's number.
WHOLE = -1


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

    def whole(self, root: bytes) -> bytes | None:
        """All of the shard's plaintext, counted as a hit; None, not counted: it is not here as a whole."""
        found: bytes | None = self._blocks.get((root, WHOLE))
        if found is not None:
            self.statistics.hits += 1
        return found

    def get(self, root: bytes, block: int) -> bytes | None:
        """The block, counted as a hit or a miss."""
        found: bytes | None = self._blocks.get((root, block))
        if found is None:
            plain: bytes | None = self._blocks.get((root, WHOLE))
            if plain is not None:
                found = plain[block * BLOCK : (block + 1) * BLOCK]
        if found is None:
            self.statistics.misses += 1
        else:
            self.statistics.hits += 1
        return found

    def __contains__(self, key: tuple[bytes, int]) -> bool:
        return key in self._blocks or (key[0], WHOLE) in self._blocks

    def put(self, root: bytes, block: int, data: bytes) -> None:
        """Keep a block; one larger than the whole budget is not kept."""
        if len(data) <= self._blocks.maxsize:
            self._blocks[root, block] = data

    def put_whole(self, root: bytes, plain: bytes) -> None:
        """Keep a whole shard's plaintext, without copying it; one larger than the whole budget is not kept."""
        self.put(root, WHOLE, plain)
