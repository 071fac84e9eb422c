"""Reclaim: walks the extents of freed values, and deletes the sectors that hold nothing live any more.

Freeing is one key, whatever the size of the file; the walk goes on here in slices, and after a crash from where it was.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from itertools import islice

import trio

from storage.errors import Corrupt, FusefsError, NotFound
from storage.interfaces import Batch, MetadataStore
from storage.metadata.keys import EXTENT, GARBAGE, prefix_end, read_u64, u64
from storage.sectors.manager import SectorManager
from storage.values.records import decode_extent

log = logging.getLogger("fusefs.values")

#: Extents per slice: the loop is given back after each, within about a millisecond.
SLICE = 24
#: Seconds in which what is freed comes together, unless it is a slice already.
GATHER_SECONDS = 0.05
#: Freed values remembered; beyond that their marks are looked for in the store, as those of earlier processes are.
REMEMBERED = 100_000


class Reclaimer:
    """One loop over the garbage."""

    def __init__(self, store: MetadataStore, sectors: SectorManager) -> None:
        self._store = store
        self._sectors = sectors
        self._wake = trio.Event()
        self._wake.set()
        #: Freed by this process, oldest first. Looked for in the store they would cost ever more: the marks of those that are done stay in
        #: the memtable as deletions, which each scan passes one by one.
        self._freed: deque[int] = deque()
        #: Marks from here on that are not in `_freed` may be in the store; None: there are none.
        self._others: bytes | None = GARBAGE
        #: Told after sectors lost live bytes, for merging.
        self.on_freed: Callable[[], None] = lambda: None

    def wake(self) -> None:
        self._wake.set()

    def freed(self, value_id: int) -> None:
        """Its mark is about to be applied. No await until it is."""
        if len(self._freed) < REMEMBERED:
            self._freed.append(value_id)
        else:
            self._others = GARBAGE
        self.wake()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._wake.wait()
            if self._others is None and len(self._freed) < SLICE:
                # Files are removed one after the other; each by itself would cost as much as a slice of them.
                await trio.sleep(GATHER_SECONDS)
            self._wake = trio.Event()
            try:
                while self.step():
                    await trio.lowlevel.checkpoint()
            except FusefsError as error:
                log.warning("reclaiming freed files is postponed until the next mount or deletion: %s", error)

    def step(self) -> bool:
        """One slice, one batch: so many extents of as many values as it takes. False if there was nothing to do.

        No await: the live bytes in the sector records always match the extents.
        """
        garbage = self._marked()
        if not garbage and not self._freed and self._others is None:
            return False
        batch = Batch()
        deltas: dict[int, int] = {}
        left = SLICE
        for key in garbage:
            if len(key) != 9:
                log.error("metadata: %s names no freed value; what it held stays; run fusefs check", key[:24].hex())
                batch.delete(key)
                continue
            prefix = EXTENT + u64(read_u64(key, 1))
            found = self._store.scan(prefix, prefix_end(prefix), left)
            for extent_key, raw in found:
                # Also if it is damaged: nobody needs it any more, and it must not keep the others from going.
                batch.delete(extent_key)
                try:
                    extent = decode_extent(extent_key, raw)
                except Corrupt as error:
                    log.error("of a freed value, what a damaged extent points to stays: %s", error)
                    continue
                deltas[extent.sector_id] = deltas.get(extent.sector_id, 0) - extent.length
            left -= len(found)
            if left <= 0:
                # Maybe not all of this value's: its mark stays for the next slice.
                break
            batch.delete(key)
        known = {sector_id: delta for sector_id, delta in deltas.items() if self._known(sector_id)}
        for sector_id in self._sectors.account(batch, known):
            if sector_id not in self._sectors.partials.held:
                self._sectors.delete_now(batch, sector_id)
        self._store.apply(batch)
        while self._freed and self._store.get(GARBAGE + u64(self._freed[0])) is None:
            self._freed.popleft()
        self.on_freed()
        return True

    def _marked(self) -> list[bytes]:
        """Marks of freed values, at most `SLICE`."""
        if self._freed:
            # Without a mark it was not freed after all: its batch was refused.
            keys = (GARBAGE + u64(value_id) for value_id in islice(self._freed, SLICE))
            return [key for key in keys if self._store.get(key) is not None]
        if self._others is None:
            return []
        found = [key for key, _ in self._store.scan(self._others, prefix_end(GARBAGE), SLICE)]
        # No mark is left behind: what is not done in this slice is first in the next one.
        self._others = found[0] if found else None
        return found

    def _known(self, sector_id: int) -> bool:
        try:
            self._sectors.record(sector_id)
        except (NotFound, Corrupt) as error:
            # One damaged record must not keep what all others hold from being reclaimed.
            log.error("a freed value pointed to sector %d, which stays: %s; run fusefs check", sector_id, error)
            return False
        return True
