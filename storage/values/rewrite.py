"""Rewriting: a value was given another replication, and what it has in sectors of the old one moves into sectors of the new.

    mark (`a` + value id)  ->  its extents are walked, misplaced ones copied into new sectors (merge.move)  ->  mark gone

New bytes go into sectors of the new replication at once. The mark is put in the batch that changes the value's record, and again where
bytes land that were on their way already; so bytes are misplaced only in values that are marked, at any moment and after any crash. A walk
begins anew after a restart: what is in its place already costs a look at its extent, no more.

| key | value |
|---|---|
| `a` + value id u64 | how many of the value's bytes are, or may be, misplaced: u64, big-endian |
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import trio

from storage.errors import Corrupt, Fenced, FusefsError, NotFound
from storage.interfaces import Batch, MetadataStore
from storage.metadata.keys import EXTENT, MISPLACED, VALUE, prefix_end, read_u64, u64
from storage.pacing import Pace
from storage.replication import parse_replication
from storage.seams import Seams
from storage.sectors.manager import SectorManager
from storage.status import RewriteStatus
from storage.values.merge import Merger
from storage.values.records import Extent, decode_extent, decode_value, value_key
from storage.values.shipping import Shipper

log = logging.getLogger("fusefs.values")

#: Records looked at between two checkpoints.
SLICE = 200
#: What is moved together, at most: a sector's worth of bytes, out of so many sectors, of so many values (I7).
MAX_SOURCES, MAX_VALUES = 64, 1000
#: Seconds until what could not be moved is tried again.
RETRY_SECONDS = 60.0


@dataclass(slots=True)
class _Group:
    """What is moved next. `values`: those whose walk has come in here -> whether something has changed or stays behind since."""

    values: dict[int, bool] = field(default_factory=dict)
    #: Values not walked to their end yet.
    unfinished: set[int] = field(default_factory=set)
    extents: list[Extent] = field(default_factory=list)
    sources: set[int] = field(default_factory=set)
    length: int = 0


class Rewriter:
    """One loop; one round at a time. `run` once, in the volume's nursery."""

    def __init__(
        self, store: MetadataStore, sectors: SectorManager, merger: Merger, shipper: Shipper, seams: Seams, rate: float | None
    ) -> None:
        """`rate`: bytes per second that may be moved; None: no limit."""
        self._store = store
        self._sectors = sectors
        self._merger = merger
        self._shipper = shipper
        self._seams = seams
        self.pace = Pace(seams.clock, rate)
        merger.on_moved = self._moved
        shipper.on_misplaced = self.mark
        self._lock = trio.Lock()
        self._wake = trio.Event()
        self._wake.set()
        self._group = _Group()
        #: As far as known: marks, and the sum of what they say. Counted anew with each round.
        self._files = self._pending = 0
        #: There may be marks in the store. Invariant: False only while there are none.
        self._marks = True
        self._done = 0
        self._trouble = ""

    # ---- marks: all synchronous, in the caller's batch

    def mark(self, batch: Batch, value_id: int, length: int) -> None:
        """`length` bytes more of the value may be misplaced once the batch is applied. At most one call per value and batch."""
        known = self._marked(value_id)
        self._marks = True
        batch.put(MISPLACED + u64(value_id), u64(min((known or 0) + length, 2**64 - 1)))
        self._files += known is None
        self._pending += length
        if value_id in self._group.values:
            self._group.values[value_id] = True
        self._wake.set()

    def forget(self, batch: Batch, value_id: int) -> None:
        """The value is freed."""
        known = self._marked(value_id)
        if known is not None:
            batch.delete(MISPLACED + u64(value_id))
            self._files, self._pending = max(0, self._files - 1), max(0, self._pending - known)

    def _marked(self, value_id: int) -> int | None:
        raw = self._store.get(MISPLACED + u64(value_id)) if self._marks else None
        return None if raw is None else _misplaced(raw)

    def _moved(self, batch: Batch, moved: dict[int, int]) -> None:
        for value_id, length in moved.items():
            known = self._marked(value_id)
            if known is not None:
                batch.put(MISPLACED + u64(value_id), u64(max(0, known - length)))
                self._pending = max(0, self._pending - min(known, length))
            self._done += length

    # ---- looking

    def status(self) -> RewriteStatus:
        return RewriteStatus(files=self._files, pending_bytes=self._pending, bytes=self._done, trouble=self._trouble)

    async def stored_as(self, value_id: int) -> dict[str, int]:
        """Replication -> bytes of the value in sectors of it. Empty where the value is gone."""
        raw = self._store.get(value_key(value_id))
        if raw is None:
            return {}
        record = decode_value(raw, value_id)
        if self._marked(value_id) is None:
            return {record.replication: record.sealed} if record.sealed else {}
        found: dict[str, int] = {}
        async for extent in self._extents(value_id):
            spec = self._spec_of(extent)
            if spec is not None:
                found[spec] = found.get(spec, 0) + extent.length
        return found

    async def _extents(self, value_id: int) -> AsyncIterator[Extent]:
        prefix = EXTENT + u64(value_id)
        start = prefix
        while found := self._store.scan(start, prefix_end(prefix), SLICE):
            for key, raw in found:
                yield decode_extent(key, raw)
            start = found[-1][0] + b"\0"
            await trio.lowlevel.checkpoint()

    def _spec_of(self, extent: Extent) -> str | None:
        """The replication of the extent's sector; None if the extent is no longer what it was."""
        if self._store.get(extent.key) != extent.encode():
            return None
        return str(parse_replication(self._sectors.record(extent.sector_id).replication))

    # ---- moving

    async def run(self) -> None:
        """Until cancelled, or the volume can be written no more."""
        while True:
            self._wake = trio.Event()
            try:
                await self.round()
            except Fenced as error:
                log.info("rewriting ends: %s", error)
                return
            except FusefsError as error:
                self._failed(error)
            if self._trouble:
                with trio.move_on_after(RETRY_SECONDS):
                    await self._wake.wait()
            else:
                await self._wake.wait()

    async def make_over(self) -> RewriteStatus:
        """Everything that can be moved now is when it returns; what could not be, and why, it says. Fenced, NoSpace, Unavailable."""
        while True:
            # What could not be read lately is tried again.
            self._sectors.partials.set_aside.clear()
            await self.round()
            # Bytes that were on their way when their value's replication changed come down in sectors of the old one, and are marked then.
            await self._shipper.wait_misplaced()
            if self._trouble or not self._store.scan(MISPLACED, prefix_end(MISPLACED), 1):
                return self.status()

    async def round(self) -> None:
        """Walk every value that is marked, and move what is misplaced. Raises what keeps it from going on."""
        async with self._lock:
            await self._count()
            self._trouble = ""
            self._group = _Group()
            start = MISPLACED
            while found := self._store.scan(start, prefix_end(MISPLACED), SLICE):
                for key, _ in found:
                    try:
                        value_id = read_u64(key, 1)
                    except Corrupt as error:
                        log.error("%s", error)
                        self._drop(key)
                        continue
                    await self._walk(value_id)
                start = found[-1][0] + b"\0"
                await trio.lowlevel.checkpoint()
            await self._move()

    async def _count(self) -> None:
        files = pending = 0
        start = MISPLACED
        # No await between looking and saying so. Where a batch with a mark is under way, it is applied before anything else is done.
        self._marks = bool(self._store.scan(start, prefix_end(MISPLACED), 1))
        while found := self._store.scan(start, prefix_end(MISPLACED), SLICE):
            files += len(found)
            pending += sum(_misplaced(raw) for _, raw in found)
            start = found[-1][0] + b"\0"
            await trio.lowlevel.checkpoint()
        self._files, self._pending = files, pending

    async def _walk(self, value_id: int) -> None:
        """The value's misplaced extents into the group; groups that are full are moved."""
        raw = self._store.get(VALUE + u64(value_id))
        if raw is None:
            self._drop(MISPLACED + u64(value_id))
            return
        self._group.values[value_id] = False
        self._group.unfinished.add(value_id)
        try:
            wanted = str(parse_replication(decode_value(raw, value_id).replication))
            async for extent in self._extents(value_id):
                if self._spec_of(extent) in (wanted, None):
                    continue
                if extent.sector_id in self._sectors.partials.set_aside:
                    self._group.values[value_id] = True
                    self._trouble = self._trouble or f"sector {extent.sector_id} cannot be read"
                    continue
                if self._full(extent):
                    await self._move()
                group = self._group
                group.values.setdefault(value_id, False)
                group.extents.append(extent)
                group.sources.add(extent.sector_id)
                group.length += extent.length
        except (Corrupt, NotFound) as error:
            # One damaged record must not keep all others from being moved.
            self._failed(error)
            self._group.values[value_id] = True
        self._group.unfinished.discard(value_id)

    def _drop(self, key: bytes) -> None:
        """A mark of no value, as a damaged database may have one: with it there would be something to do for ever."""
        batch = Batch()
        batch.delete(key)
        self._store.apply(batch)

    def _full(self, following: Extent) -> bool:
        group = self._group
        return (
            len(group.values) >= MAX_VALUES
            or (len(group.sources) >= MAX_SOURCES and following.sector_id not in group.sources)
            or (group.length > 0 and group.length + following.length > self._sectors.sector_size)
        )

    async def _move(self) -> None:
        group = self._group
        if group.extents:
            await self.pace.take(group.length)
            try:
                await self._merger.move(group.extents)
            except (Corrupt, NotFound) as error:
                self._failed(error)
        if group.values:
            self._seams.failpoints.hit("rewrite.before_unmark")
        # No await from here on: what is still misplaced is looked at, and the marks of the others go, in one step.
        behind = {extent.value_id for extent in group.extents if self._store.get(extent.key) == extent.encode()}
        if behind and not self._trouble:
            self._trouble = f"value {min(behind)}: some of it stays in sectors of another replication for now"
        batch = Batch()
        for value_id, touched in group.values.items():
            if value_id not in group.unfinished and value_id not in behind and not touched:
                self.forget(batch, value_id)
        if batch.ops:
            self._store.apply(batch)
        # What has been seen of the value that is being walked goes on counting.
        self._group = _Group(
            {value_id: group.values[value_id] or value_id in behind for value_id in group.unfinished}, set(group.unfinished)
        )

    def _failed(self, error: FusefsError) -> None:
        if self._trouble != str(error):
            log.warning("what was given another replication is not moved yet: %s", error)
        self._trouble = str(error)


def _misplaced(raw: bytes) -> int:
    """What a mark says; a damaged one says nothing but that there is something."""
    return int.from_bytes(raw, "big") if len(raw) == 8 else 0
