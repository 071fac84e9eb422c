"""Scanning in slices, and sums over another order of keys in bounded memory."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable, Iterator

import trio

from storage.interfaces import MetadataReader
from storage.metadata.keys import prefix_end

#: Records per slice: about a millisecond.
SLICE = 500
#: Keys that are summed up at a time: 8 bytes each, and 8 per column. More keys take more scans of the other side, not more memory.
WINDOW = 1_000_000

Pair = tuple[bytes, bytes]


async def pages(store: MetadataReader, prefix: bytes, start: bytes | None = None) -> AsyncIterator[list[Pair]]:
    """Everything below `prefix`, from `start` on, slice by slice. What was changed meanwhile is seen as it is then."""
    at, stop = prefix if start is None else start, prefix_end(prefix)
    while found := store.scan(at, stop, SLICE):
        yield found
        at = found[-1][0] + b"\0"
        await trio.lowlevel.checkpoint()


def under(store: MetadataReader, prefix: bytes) -> Iterator[Pair]:
    """As `pages` for what is small: without checkpoints, pair by pair."""
    at, stop = prefix, prefix_end(prefix)
    while found := store.scan(at, stop, SLICE):
        yield from found
        if len(found) < SLICE:
            return
        at = found[-1][0] + b"\0"


class Tally:
    """Sums for a sorted run of keys (u64), in columns. Keys that are not among them are not summed up."""

    __slots__ = ("columns", "keys")

    def __init__(self, keys: array[int], columns: int) -> None:
        self.keys = keys
        self.columns = [array("q", bytes(8 * len(keys))) for _ in range(columns)]

    def add(self, key: int, number: int = 1, column: int = 0) -> None:
        at = bisect_left(self.keys, key)
        if at < len(self.keys) and self.keys[at] == key:
            self.columns[column][at] += number

    def get(self, key: int, column: int = 0) -> int:
        at = bisect_left(self.keys, key)
        return self.columns[column][at] if at < len(self.keys) and self.keys[at] == key else 0

    def __len__(self) -> int:
        return len(self.keys)


async def windows(
    store: MetadataReader, prefix: bytes, key_of: Callable[[bytes], int], columns: int = 1, size: int | None = None
) -> AsyncIterator[Tally]:
    """The keys below `prefix`, as many at a time as fit; `key_of` must ascend with the keys, and may repeat."""
    size = WINDOW if size is None else size
    keys: array[int] = array("Q")
    async for page in pages(store, prefix):
        for key, _ in page:
            number = key_of(key)
            if keys and keys[-1] == number:
                continue
            if len(keys) >= size:
                yield Tally(keys, columns)
                keys = array("Q")
            keys.append(number)
    if keys:
        yield Tally(keys, columns)
