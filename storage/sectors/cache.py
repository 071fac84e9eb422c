"""The block cache: verified plaintext in memory, least recently used first out.

Keyed by root, never by sector id: what a root names can never change, so nothing here can be stale. What was read or written as a whole
is one entry, since cutting it into blocks and joining them again for each reader took most of the event loop's time in sequential reads.

| key | entry |
|---|---|
| (root, number) | a block |
| (root, `WHOLE`) | the whole shard's plaintext: it comes and goes as one, so what is counted is what is held |

What a stream has passed is kept only where that has been of use before: where its blocks were read singly, or it is streamed once more. A
long file that is read from end to end once goes through the same few buffers again and again (memory touched for the first time is what
costs most in it), and what others have here stays. Whoever reads a part of it once more a moment later finds it in the page cache of the
mount, as a rule.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from storage.interfaces import Buffer
from storage.sealing import BLOCK

#: In place of a block's number.
WHOLE = -1
#: The part of the budget that may be taken by what was read as a stream, and passed.
STREAMED = 0.55
#: Bytes of it that are kept in any case: what is asked for again at once, as requests of one stream may come out of order.
JUST_PASSED = 4 * 1024 * 1024
#: Shards remembered that were wanted before.
REMEMBERED = 8192
#: From this many bytes on, a reader gets a view of the entry instead of a copy.
VIEWED = 16 * 1024


@dataclass(slots=True)
class CacheStatistics:
    """Counts since the volume was opened."""

    hits: int = 0
    misses: int = 0


class BlockCache:
    """Blocks up to `limit` bytes together. Single-threaded: the event loop's."""

    # An OrderedDict and not cachetools: warm random reads ask twice each, and it answers in a quarter of the time.

    def __init__(self, limit: int) -> None:
        self._blocks: OrderedDict[tuple[bytes, int], Buffer] = OrderedDict()
        #: Bytes it may hold; bytes it holds.
        self.limit = max(limit, 1)
        self.size = 0
        #: What readers have passed and is still here.
        once = min(JUST_PASSED, self.limit * STREAMED / 2)
        self._passed = _Passed(self.limit * STREAMED - once)
        #: The same of what had not been wanted before, so that it is not kept for long.
        self._once = _Passed(once)
        #: Roots, oldest first, of what was passed, and of what was read block by block.
        self._wanted: OrderedDict[bytes, None] = OrderedDict()
        self.statistics = CacheStatistics()

    def _find(self, key: tuple[bytes, int]) -> Buffer | None:
        found = self._blocks.get(key)
        if found is not None:
            self._blocks.move_to_end(key)
        return found

    def whole(self, root: bytes) -> Buffer | None:
        """All of the shard's plaintext, counted as a hit; None, not counted: it is not here as a whole."""
        found = self._find((root, WHOLE))
        if found is not None:
            self.statistics.hits += 1
        return found

    def get(self, root: bytes, block: int) -> Buffer | None:
        """The block, counted as a hit or a miss."""
        found = self._find((root, block))
        if found is None:
            plain = self._find((root, WHOLE))
            if plain is not None:
                found = plain[block * BLOCK : (block + 1) * BLOCK]
        if found is None:
            self.statistics.misses += 1
        else:
            self.statistics.hits += 1
        return found

    def read(self, root: bytes, offset: int, length: int) -> Buffer | None:
        """Bytes [offset, offset + length) of the shard's plaintext, counted as a hit; None, not counted: they are not all here. What is
        long is a view, which keeps the entry in memory, out of the budget, for as long as somebody has it."""
        plain = self._find((root, WHOLE))
        end = offset + length
        if plain is None:
            block = offset // BLOCK
            base = block * BLOCK
            if end > base + BLOCK:
                return self._join(root, offset, end)
            plain = self._find((root, block))
            if plain is None:
                return None
            offset, end = offset - base, end - base
        if end > len(plain):
            return None
        self.statistics.hits += 1
        return bytes(plain[offset:end]) if length < VIEWED else memoryview(plain)[offset:end]

    def _join(self, root: bytes, offset: int, end: int) -> bytes | None:
        first, pieces = offset // BLOCK, []
        for block in range(first, -(-end // BLOCK)):
            piece = self._find((root, block))
            if piece is None:
                return None
            pieces.append(memoryview(piece)[max(0, offset - block * BLOCK) : end - block * BLOCK])
        found = b"".join(pieces)
        if len(found) != end - offset:
            return None
        self.statistics.hits += len(pieces)
        return found

    def __contains__(self, key: tuple[bytes, int]) -> bool:
        return key in self._blocks or (key[0], WHOLE) in self._blocks

    def put(self, root: bytes, block: int, data: Buffer) -> None:
        """Keep a block; one larger than the whole budget is not kept."""
        if len(data) > self.limit:
            return
        key = (root, block)
        if block != WHOLE:
            self._remember(root)
        old = self._blocks.pop(key, None)
        if old is not None:
            self.size -= len(old)
        self._blocks[key] = data
        self.size += len(data)
        while self.size > self.limit:
            gone, data = self._blocks.popitem(last=False)
            self.size -= len(data)
            if gone[1] == WHOLE:
                self._passed.remove(gone[0])
                self._once.remove(gone[0])

    def put_whole(self, root: bytes, plain: Buffer) -> None:
        """Keep a whole shard's plaintext, without copying it; one larger than the whole budget is not kept."""
        self.put(root, WHOLE, plain)

    def passed(self, root: bytes) -> None:
        """Somebody has read the whole shard, which is here as a whole, to its end, and reads on."""
        plain = self._blocks.get((root, WHOLE))
        if plain is None:
            return
        # Never in both: each would let go of it.
        passed = self._passed if root in self._passed or (root in self._wanted and root not in self._once) else self._once
        for gone, size in passed.add(root, len(plain)):
            self.size -= size
            del self._blocks[gone, WHOLE]
        self._remember(root)

    def _remember(self, root: bytes) -> None:
        if root in self._wanted:
            self._wanted.move_to_end(root)
        else:
            self._wanted[root] = None
            if len(self._wanted) > REMEMBERED:
                self._wanted.popitem(last=False)


class _Passed:
    """Shards that were passed, up to `limit` bytes together (or a single one), the first ones first out."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._sizes: OrderedDict[bytes, int] = OrderedDict()
        self._size = 0

    def __contains__(self, root: bytes) -> bool:
        return root in self._sizes

    def remove(self, root: bytes) -> None:
        """It is not here any more, if it was."""
        self._size -= self._sizes.pop(root, 0)

    def add(self, root: bytes, size: int) -> list[tuple[bytes, int]]:
        """It is the last one. Returns those for which there is no room now."""
        self.remove(root)
        self._sizes[root] = size
        self._size += size
        gone = []
        while self._size > self._limit and len(self._sizes) > 1:
            gone.append(self._sizes.popitem(last=False))
            self._size -= gone[-1][1]
        return gone
