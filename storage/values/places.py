"""Places: extents that were looked up lately, for reads that repeat themselves.

Nothing here can mislead: a value's bytes never change, sector ids are never reused, and what a sector holds never changes either. A place
that is out of date (merged away since) names bytes that are the same, or a sector that is not there any more; who finds it so asks the
store.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable

from storage.values.records import Extent

#: Values remembered, and extents of each: some 10 MB at the very most, since few files have many.
VALUES = 1024
EXTENTS = 64


class Places:
    """By value and offset. The event loop's."""

    __slots__ = ("_values",)

    def __init__(self) -> None:
        #: Value -> offsets of its extents, ascending, and the extents; they never overlap. The last used value is last.
        self._values: dict[int, tuple[list[int], list[Extent]]] = {}

    def find(self, value_id: int, offset: int) -> Extent | None:
        """The extent that holds the byte; None: not known."""
        known = self._values.get(value_id)
        if known is None:
            return None
        at = bisect_right(known[0], offset) - 1
        if at < 0:
            return None
        extent = known[1][at]
        return extent if offset < extent.offset + extent.length else None

    def add(self, extents: Iterable[Extent]) -> None:
        """As the store has them now: what they overlap with is forgotten."""
        for extent in extents:
            known = self._values.pop(extent.value_id, None)
            if known is None:
                known = ([], [])
                if len(self._values) >= VALUES:
                    del self._values[next(iter(self._values))]
            self._values[extent.value_id] = known
            starts, found = known
            if len(starts) >= EXTENTS:
                starts.clear()
                found.clear()
            first = bisect_left(starts, extent.offset)
            if first and found[first - 1].end > extent.offset:
                first -= 1
            last = bisect_left(starts, extent.end)
            starts[first:last] = [extent.offset]
            found[first:last] = [extent]

    def forget(self, value_id: int) -> None:
        """The value is freed."""
        self._values.pop(value_id, None)
