"""Streams: where those who read one byte after the other have got to.

A read that begins where another one of the same value ended goes on with it, so a value may have several readers, each somewhere else.
Those who have read on, and ends from which nobody has, are kept apart: who reads here and there leaves an end with each read, and drives
out nobody who reads on.
"""

from __future__ import annotations

#: Values remembered; readers of each that are followed, and ends that nobody has gone on from.
VALUES = 128
FOLLOWED, FRESH = 8, 16


class _Ends:
    """Of one value."""

    __slots__ = ("followed", "fresh")

    def __init__(self) -> None:
        #: Where the reader's last read ended -> the sector for which read-ahead was asked for, 0: for none. The last that read on is last.
        self.followed: dict[int, int] = {}
        self.fresh: dict[int, None] = {}


class Streams:
    """See the module. The event loop's; nothing here awaits."""

    __slots__ = ("_values",)

    def __init__(self) -> None:
        self._values: dict[int, _Ends] = {}

    def take(self, value_id: int, at: int) -> int | None:
        """A read begins at `at`. The sector for which its reader had read-ahead asked for, 0: for none; None: no read ended there. It is
        forgotten until `put` says where it ended."""
        ends = self._values.get(value_id)
        if ends is None:
            return None
        if at in ends.fresh:
            del ends.fresh[at]
            return ends.followed.pop(at, 0)
        return ends.followed.pop(at, None)

    def put(self, value_id: int, stop: int, sector_id: int | None) -> None:
        """A read ended there, of somebody who has read on, and had read-ahead asked for that sector, 0: for none. None: of anybody."""
        ends = self._values.pop(value_id, None)
        if ends is None:
            ends = _Ends()
            if len(self._values) >= VALUES:
                del self._values[next(iter(self._values))]
        self._values[value_id] = ends
        if sector_id is None:
            ends.fresh[stop] = None
            if len(ends.fresh) > FRESH:
                del ends.fresh[next(iter(ends.fresh))]
            return
        # Of two that have got to the same place, one goes on.
        ends.followed.pop(stop, None)
        ends.followed[stop] = sector_id
        if len(ends.followed) > FOLLOWED:
            del ends.followed[next(iter(ends.followed))]

    def goes_on(self, value_id: int, at: int, stop: int, sector_id: int) -> bool:
        """A read of [at, stop) falls into the sector for which its reader has read-ahead asked for. It is put where it ends then."""
        ends = self._values.get(value_id)
        if ends is None or ends.followed.get(at) != sector_id:
            return False
        del ends.followed[at]
        ends.followed[stop] = sector_id
        return True
