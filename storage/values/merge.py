"""Merging: partly filled sectors are copied together into fuller ones, each value's bytes side by side.

What a sector holds says its own table; what of it is live, the extents. So merging needs no index from sectors to values. A value freed
meanwhile is left out, or becomes garbage in the new sector like anywhere else. What is copied goes into sectors of its value's
replication, which may be another than that of the sector it comes from: `move` copies that alone (values.rewrite).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import trio

from storage.errors import Fenced, FusefsError, NotFound
from storage.interfaces import Batch, Buffer, MetadataStore
from storage.replication import parse_replication
from storage.seams import Seams
from storage.sectors.manager import SectorManager
from storage.sectors.partial import Partial
from storage.values.packing import ENTRY_BYTES, TABLE_BYTES, TableEntry, encode_table, parse_table
from storage.values.records import Extent, ValueRecord, decode_value, value_key
from storage.values.shipping import BREATH, Shipper

log = logging.getLogger("fusefs.values")

#: Pieces from which on a merge takes in no further sector: each is some three kilobytes of objects until what moves it is taken over.
MANY = 32_768
#: Extents that are pointed elsewhere in one step of the event loop, about: one or two milliseconds.
SWITCHED = 96
#: Seconds to wait after a merge failed.
RETRY_SECONDS = 30.0
#: Seconds to wait where a merge changed nothing.
FREED_SECONDS = 1.0
#: Seconds after which sectors that could not be read are tried again.
SET_ASIDE_SECONDS = 600.0


@dataclass(slots=True)
class _Piece:
    """A live extent and its bytes."""

    extent: Extent
    data: memoryview


@dataclass(slots=True)
class _Output:
    """A sector being put together: (extent it will hold, the old extents it replaces)."""

    replication: str
    parts: list[Buffer]
    entries: list[TableEntry]
    replaced: list[Extent]
    length: int = 0
    table_bytes: int = 0
    sector_id: int = 0


class Merger:
    """One merge or move at a time, so at most about two sectors of plaintext in memory for each of its two sides (I7)."""

    def __init__(self, store: MetadataStore, sectors: SectorManager, shipper: Shipper, seams: Seams) -> None:
        self._store = store
        self._sectors = sectors
        self._shipper = shipper
        self._threads = seams.threads
        self._hit = seams.failpoints.hit
        self._lock = trio.Lock()
        #: In the batch that points extents elsewhere: value id -> bytes that came out of sectors of another replication.
        self.on_moved: Callable[[Batch, dict[int, int]], None] = lambda _batch, _moved: None
        self._wake = trio.Event()
        self._wake.set()
        #: When sectors were last set aside.
        self._set_aside_at = 0.0

    def wake(self) -> None:
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            if trio.current_time() >= self._set_aside_at + SET_ASIDE_SECONDS:
                self._sectors.partials.set_aside.clear()
            try:
                while await self._merge_due():
                    pass
            except Fenced:
                return

    async def _merge_due(self) -> bool:
        """Merge one group; False if none is due. Waits where nothing came of it, and after a failure that has set no sector aside."""
        async with self._lock:
            group = self._sectors.partials.due()
            if group is None:
                return False
            pause = 0.0
            try:
                await self.merge(group)
                if self._sectors.partials.due() == group:
                    # What their records call live is of values that were freed, and is reclaimed in a moment; till then there is no
                    # use in reading it again and again.
                    pause = FREED_SECONDS
            except Fenced:
                raise
            except FusefsError as error:
                # Nothing is lost by it: the old sectors stand until the new one does.
                log.warning("merging sectors is postponed: %s", error)
                if self._sectors.partials.set_aside.isdisjoint(partial.sector_id for partial in group):
                    pause = RETRY_SECONDS
        if pause:
            await trio.sleep(pause)
        return True

    async def merge(self, group: list[Partial]) -> None:
        """Copy what is live in the group into new sectors, point the extents there, delete the old ones."""
        await self._copy([partial.sector_id for partial in group], None)

    async def move(self, extents: Sequence[Extent]) -> None:
        """Copy these extents, and whatever else in their sectors belongs to values of another replication, into sectors of their values'.

        At most about a sector's worth in all. Sectors that cannot be read are set aside, and the others' are moved all the same: then
        it raises what was wrong with the first.
        """
        async with self._lock:
            # Some may be held by the shipper: what has landed from these can be copied too, but nobody else lets go of them.
            await self._copy(sorted({extent.sector_id for extent in extents}), extents)

    async def _copy(self, sources: list[int], only: Sequence[Extent] | None) -> None:
        """All that is live in the sources; or `only` what is misplaced, these extents in any case."""
        held = self._sectors.partials.held
        ours = [sector_id for sector_id in sources if sector_id not in held]
        held.update(ours)
        try:
            pieces, failure = await self._live_pieces(sources, only)
            for output in await self._pack(pieces):
                # As for what lands: many extents change, and the journal must have room for them all.
                await self._store.catch_up()
                self._hit("merge.before_write")
                await self._write(output)
                try:
                    await self._switch(output)
                finally:
                    held.discard(output.sector_id)
                    # All of it was freed meanwhile, or it was given up before anything pointed to it.
                    self._delete_empty([output.sector_id])
        finally:
            held.difference_update(ours)
            # Also after a failure: what was emptied meanwhile nobody else deletes while it is held.
            self._delete_empty(ours)
        if failure is not None:
            raise failure

    def _delete_empty(self, sources: list[int]) -> None:
        """Of these sectors, those in which nothing is live."""
        batch = Batch()
        for sector_id in sources:
            try:
                empty = self._sectors.record(sector_id).live == 0
            except NotFound:
                continue
            if empty:
                self._sectors.delete_now(batch, sector_id)
        if batch.ops:
            self._store.apply(batch)

    async def _live_pieces(self, sources: list[int], only: Sequence[Extent] | None) -> tuple[list[_Piece], FusefsError | None]:
        """In order of (value, offset); and, with `only`, what was wrong with a sector that is left out."""
        pieces: dict[bytes, _Piece] = {}
        failure: FusefsError | None = None
        full = False
        weight = 0
        for number, sector_id in enumerate(sources):
            if only is None and number > 1 and (weight >= self._sectors.sector_size or len(pieces) >= MANY):
                # Enough for one that is full, or for memory (I7). The others' turn comes.
                break
            wanted = [extent for extent in only or () if extent.sector_id == sector_id]
            try:
                data = memoryview(await self._sectors.read_sector(sector_id))
                # In a thread: of very many small files that takes long.
                entries = await self._threads.run(parse_table, data)
            except FusefsError as error:
                # One damaged sector must not keep all others from being merged, or their number would grow without bound (I7).
                self._sectors.partials.set_aside.add(sector_id)
                self._set_aside_at = trio.current_time()
                if only is None:
                    raise
                failure = failure or error
                continue
            # Merges of k sectors leave extents as long as their table entries, so an entry is either one extent, or dead.
            found = (Extent(entry.value_id, entry.offset, sector_id, entry.position, entry.length) for entry in entries)
            own = 0
            for count, extent in enumerate(chain(wanted, found), 1):
                if count % BREATH == 0:
                    await trio.lowlevel.checkpoint()
                if only is not None and count > len(wanted) and not self._misplaced(extent):
                    continue
                if extent.key not in pieces and self._is_live(extent):
                    own += self._weight(extent)
                    piece = data[extent.position : extent.position + extent.length]
                    # Of many sectors a little each: not all of them stay in memory for it.
                    pieces[extent.key] = _Piece(extent, piece if only is None else memoryview(bytes(piece)))
            if only is None:
                weight += own
                # By the same measure as `_pack`: what it closes is full then. Else the same bytes would be merged for ever.
                if own > (self._sectors.sector_size - TABLE_BYTES) // 2:
                    batch = Batch()
                    self._sectors.partials.mark_full(batch, sector_id)
                    self._store.apply(batch)
                    full = True
                if full:
                    # Another group is due, without these. The rest is read all the same, to know which of it is full.
                    pieces.clear()
                    weight = 0
        # Keys are in the order of (value, offset).
        return [pieces[key] for key in sorted(pieces)], failure

    def _weight(self, extent: Extent) -> int:
        """Bytes of a sector that it takes, with its entry in the table."""
        value = self._value(extent)
        return extent.length + ENTRY_BYTES + (0 if value is None else len(self._shipper.name_of(value.owner)))

    def _misplaced(self, extent: Extent) -> bool:
        """Has its value another replication than the sector?"""
        value = self._value(extent)
        if value is None:
            return False
        try:
            spec = self._sectors.record(extent.sector_id).replication
        except NotFound:
            # Deleted meanwhile.
            return False
        return parse_replication(value.replication) != parse_replication(spec)

    def _value(self, extent: Extent) -> ValueRecord | None:
        raw = self._store.get(value_key(extent.value_id))
        return None if raw is None else decode_value(raw, extent.value_id)

    def _is_live(self, extent: Extent) -> bool:
        return self._store.get(extent.key) == extent.encode() and self._store.get(value_key(extent.value_id)) is not None

    async def _pack(self, pieces: list[_Piece]) -> list[_Output]:
        """Next fit in order, for each replication; what adjoins in a value becomes one entry. A piece is never cut: so every old extent
        moves to one place."""
        limit = self._sectors.sector_size - TABLE_BYTES
        outputs: list[_Output] = []
        current: dict[str, _Output] = {}
        commit = self._store.applied_sequence
        for count, piece in enumerate(pieces, 1):
            if count % BREATH == 0:
                await trio.lowlevel.checkpoint()
            extent = piece.extent
            value = self._value(extent)
            if value is None or not self._is_live(extent):
                # Freed while the other sectors were read.
                continue
            path = self._shipper.name_of(value.owner)
            spec = str(parse_replication(value.replication))
            output = current.get(spec)
            cost = extent.length + ENTRY_BYTES + len(path)
            if output is None or output.length + output.table_bytes + cost > limit:
                output = current[spec] = _Output(spec, [], [], [])
                outputs.append(output)
            last = output.entries[-1] if output.entries else None
            if last is not None and last.value_id == extent.value_id and last.offset + last.length == extent.offset:
                output.entries[-1] = TableEntry(
                    last.path, last.value_id, last.offset, last.length + extent.length, last.position, last.commit
                )
            else:
                output.entries.append(TableEntry(path, extent.value_id, extent.offset, extent.length, output.length, commit))
                output.table_bytes += ENTRY_BYTES + len(path)
            output.parts.append(piece.data)
            output.replaced.append(extent)
            output.length += extent.length
        return outputs

    async def _write(self, output: _Output) -> None:
        # I1: new content, so a new id, and new ones for its shards.
        output.sector_id = await self._sectors.allocate_sector(output.replication)
        self._sectors.partials.held.add(output.sector_id)
        try:
            table = await self._threads.run(encode_table, output.entries)
            await self._sectors.write_sector(output.sector_id, [*output.parts, table], output.replication)
        except BaseException:
            self._sectors.partials.held.discard(output.sector_id)
            raise

    async def _switch(self, output: _Output) -> None:
        """Point the extents to the new sector (I2: it is durable), so many at a time.

        Between two parts everything is as it should be, and may be committed, published, or left so by a crash: each extent points to a
        sector that has its bytes, the records of old and new say how much of them is live, and what is read, freed or appended meanwhile
        meets nothing unusual. A sector of which one part alone was pointed to is a partly filled one with garbage in it, like any other,
        and old ones stay until nothing in them is live: so merging just takes them up once more. While it goes on all of them are held.
        """
        replaced, done = output.replaced, 0
        part: list[tuple[TableEntry, list[Extent]]] = []
        size = 0
        for entry in output.entries:
            # What was side by side in a value is one entry: never cut, since the table knows it as one.
            extents = [replaced[done]]
            while extents[-1].end < entry.offset + entry.length:
                extents.append(replaced[done + len(extents)])
            done += len(extents)
            part.append((entry, extents))
            size += len(extents)
            if size >= SWITCHED:
                await self._switch_part(output, part)
                part, size = [], 0
        if part:
            await self._switch_part(output, part)

    async def _switch_part(self, output: _Output, part: Sequence[tuple[TableEntry, list[Extent]]]) -> None:
        # As for what lands: who appends is held back by it, and this has no need to be quicker than the journal.
        await self._store.catch_up()
        self._hit("merge.before_switch")
        # No await to the end of the batch: what is live is looked at and changed in one step.
        batch = Batch()
        deltas: dict[int, int] = {}
        moved: dict[int, int] = {}
        live = 0
        spec = parse_replication(output.replication)
        #: Is the sector one of another replication?
        other: dict[int, bool] = {}
        for entry, extents in part:
            # A value is freed whole, so none of an entry's extents is live, or all are.
            if not all(map(self._is_live, extents)):
                continue
            # Given another replication meanwhile: whoever moves it there looks for it where it is now.
            value = self._value(extents[0])
            if value is None or parse_replication(value.replication) != spec:
                continue
            for extent in extents:
                batch.delete(extent.key)
                deltas[extent.sector_id] = deltas.get(extent.sector_id, 0) - extent.length
                if extent.sector_id not in other:
                    other[extent.sector_id] = parse_replication(self._sectors.record(extent.sector_id).replication) != spec
                if other[extent.sector_id]:
                    moved[extent.value_id] = moved.get(extent.value_id, 0) + extent.length
            merged = Extent(entry.value_id, entry.offset, output.sector_id, entry.position, entry.length)
            batch.put(merged.key, merged.encode())
            live += entry.length
        if live:
            deltas[output.sector_id] = live
        for sector_id in self._sectors.account(batch, deltas):
            if sector_id not in self._sectors.partials.held:
                self._sectors.delete_now(batch, sector_id)
        if moved:
            self.on_moved(batch, moved)
        self._store.apply(batch)
        await trio.lowlevel.checkpoint()
