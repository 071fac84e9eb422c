"""The index of partly filled sectors, by size class.

Class c holds the sectors with `sector_size / 8**(c+1) < live <= sector_size / 8**c`, down to class 7; class 0 takes only those of
at most half a sector. Eight of a class (and of one replication) are merged into
the next fuller class, so that a byte is sent at most once per class: four or five times in all for the smallest appends of a 4 MiB sector
(logarithmic method of Bentley and Saxe, 1980, with base eight).

What counts is data, which a sector's record has; of very many small files its table fills a sector just as well. Whoever merges finds that
out and says so (`mark_full`): else sectors of these would be merged into as many, without end. That is kept in this directory alone
(`Lfull.`, sector id u64; value: the live bytes it had then, u64): whoever has lost it finds out again.

Index key `p`, class u8, sector id u64; value: replication (ASCII). Bounded: a class that has its eight is merged away.
"""

from __future__ import annotations

from dataclasses import dataclass

from storage.errors import Corrupt
from storage.interfaces import Batch, MetadataStore
from storage.metadata.keys import LOCAL, PARTIAL, SECTOR, prefix_end, read_u64, u64
from storage.sectors.records import SectorRecord, decode_sector

BASE = 8
CLASSES = 8
FULL = LOCAL + b"full."


@dataclass(frozen=True, slots=True)
class Partial:
    """A candidate for merging; bytes."""

    sector_id: int
    size_class: int
    replication: str
    live: int
    dead: int


class PartialIndex:
    """Kept in memory and, in the batches given, in the store."""

    def __init__(self, store: MetadataStore, sector_size: int) -> None:
        self._store = store
        self._sector_size = sector_size
        self._partials: dict[int, Partial] = {}
        #: Sectors that must not be merged now: some of their extents are still to come, or a merge is on them.
        self.held: set[int] = set()
        #: Sectors that could not be read lately: merging goes on without them.
        self.set_aside: set[int] = set()
        #: Sectors that their tables fill: with the live bytes they had when that was found.
        self._full: dict[int, int] = {}

    def load(self) -> None:
        """At open: read the index back. It is small (see the module's docstring); damage to a record is found when it is merged."""
        start = PARTIAL
        while found := self._store.scan(start, prefix_end(PARTIAL), 1000):
            for key, value in found:
                if len(key) != 10:
                    raise Corrupt(f"metadata: {key[:16].hex()} is no key of a partly filled sector; run fusefs check")
                sector_id = read_u64(key, 2)
                raw = self._store.get(SECTOR + u64(sector_id))
                if raw is not None:
                    record = decode_sector(raw, sector_id)
                    self._partials[sector_id] = Partial(
                        sector_id, key[1], value.decode("ascii", "replace"), record.live, max(record.data - record.live, 0)
                    )
            start = found[-1][0] + b"\0"
        start = FULL
        while found := self._store.scan(start, prefix_end(FULL), 1000):
            for key, value in found:
                if len(key) == len(FULL) + 8 and len(value) == 8:
                    self._full[read_u64(key, len(FULL))] = read_u64(value)
            start = found[-1][0] + b"\0"

    def class_of(self, record: SectorRecord) -> int | None:
        """The class a sector belongs in, None if it is full enough (or empty: then it is deleted)."""
        live = record.live
        if live == 0 or live > self._sector_size // 2:
            return None
        bound, size_class = self._sector_size // BASE, 0
        while live <= bound and size_class < CLASSES - 1:
            bound //= BASE
            size_class += 1
        return size_class

    def update(self, batch: Batch, sector_id: int, record: SectorRecord) -> None:
        """Follow a change of live bytes."""
        size_class = self.class_of(record)
        known = self._partials.get(sector_id)
        if record.live <= self._full.get(sector_id, -1) // 2:
            self._unmark(batch, sector_id)
        if known is not None and known.size_class != size_class:
            batch.delete(self._key(known.size_class, sector_id))
        if size_class is None:
            self._partials.pop(sector_id, None)
            return
        if known is None or known.size_class != size_class:
            batch.put(self._key(size_class, sector_id), record.replication.encode())
        self._partials[sector_id] = Partial(sector_id, size_class, record.replication, record.live, max(record.data - record.live, 0))

    def remove(self, batch: Batch, sector_id: int) -> None:
        known = self._partials.pop(sector_id, None)
        self._unmark(batch, sector_id)
        if known is not None:
            batch.delete(self._key(known.size_class, sector_id))

    def mark_full(self, batch: Batch, sector_id: int) -> None:
        """With its table it is more than half full: not to be merged until half of what is live now is freed."""
        known = self._partials.get(sector_id)
        if known is not None:
            self._full[sector_id] = known.live
            batch.put(FULL + u64(sector_id), u64(known.live))

    def _unmark(self, batch: Batch, sector_id: int) -> None:
        if self._full.pop(sector_id, None) is not None:
            batch.delete(FULL + u64(sector_id))

    def due(self) -> list[Partial] | None:
        """A group that should be merged now: eight of one class, or so many that their dead bytes make up a sector. None if there is
        none."""
        groups: dict[tuple[str, int], list[Partial]] = {}
        wasted: dict[str, list[Partial]] = {}
        for partial in self._partials.values():
            if partial.sector_id in self.held or partial.sector_id in self.set_aside or partial.sector_id in self._full:
                continue
            group = groups.setdefault((partial.replication, partial.size_class), [])
            group.append(partial)
            if len(group) >= BASE:
                return group
            if partial.dead > partial.live:
                wasted.setdefault(partial.replication, []).append(partial)
        for group in wasted.values():
            if len(group) >= 2 and sum(partial.dead for partial in group) >= self._sector_size:
                return group[:BASE]
        return None

    def __len__(self) -> int:
        return len(self._partials)

    @staticmethod
    def _key(size_class: int, sector_id: int) -> bytes:
        return PARTIAL + bytes([size_class]) + u64(sector_id)
