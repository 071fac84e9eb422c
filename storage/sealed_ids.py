"""Sealed ids (I1): which data an id was sealed with, within this process."""

from __future__ import annotations

import threading

from storage.errors import BadArgument

#: Sector ids sealed lately whose roots are remembered (I1); about 4 MB.
REMEMBERED = 16384


class SealedIds:
    """From threads.

    Ids come in ascending order, nearly, so the oldest of those remembered stand for all below: they count as spent.
    """

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self._remembered = remembered
        #: Guards the two below.
        self._lock = threading.Lock()
        self._roots: dict[int, bytes] = {}
        #: Every id below it that is not in _roots counts as spent.
        self._floor = 0

    def spend(self, sector_id: int, root: bytes) -> None:
        """BadArgument unless the id is unused, or was used for the very same shard."""
        with self._lock:
            known = self._roots.get(sector_id)
            if known == root:
                return
            if known is not None or sector_id < self._floor:
                raise BadArgument(f"sector {sector_id}: other data has been sealed under this id, which is a nonce (I1); allocate another")
            self._roots[sector_id] = root
            if len(self._roots) > self._remembered:
                oldest = next(iter(self._roots))
                del self._roots[oldest]
                self._floor = max(self._floor, oldest + 1)
