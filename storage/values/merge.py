"""Merging: partly filled sectors are copied together into fuller ones, each value's bytes side by side.

What a sector holds says its own table; what of it is live, the extents. So merging needs no index from sectors to values. A value freed
meanwhile is left out, or becomes garbage in the new sector like anywhere else.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import trio

from storage.errors import Fenced, FusefsError, NotFound
from storage.interfaces import Batch, Buffer, MetadataStore
from storage.metadata.keys import EXTENT, u64
from storage.sectors.manager import SectorManager
from storage.sectors.partial import Partial
from storage.values.packing import ENTRY_BYTES, TABLE_BYTES, TableEntry, encode_table, parse_table
from storage.values.records import Extent, decode_value, value_key
from storage.values.shipping import Shipper

log = logging.getLogger("fusefs.values")

#: Seconds to wait after a merge failed.
RETRY_SECONDS = 30.0
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

    parts: list[Buffer]
    entries: list[TableEntry]
    replaced: list[Extent]
    length: int = 0
    table_bytes: int = 0
    sector_id: int = 0


class Merger:
    """One loop; one merge at a time, so at most about two sectors of plaintext in memory for each of its two sides (I7)."""

    def __init__(self, store: MetadataStore, sectors: SectorManager, shipper: Shipper) -> None:
        self._store = store
        self._sectors = sectors
        self._shipper = shipper
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
            while (group := self._sectors.partials.due()) is not None:
                try:
                    await self.merge(group)
                except Fenced:
                    return
                except FusefsError as error:
                    # Nothing is lost by it: the old sectors stand until the new one does.
                    log.warning("merging sectors is postponed: %s", error)
                    if self._sectors.partials.set_aside.isdisjoint(partial.sector_id for partial in group):
                        await trio.sleep(RETRY_SECONDS)

    async def merge(self, group: list[Partial]) -> None:
        """Copy what is live in the group into new sectors, point the extents there, delete the old ones."""
        held = self._sectors.partials.held
        sources = [partial.sector_id for partial in group]
        held.update(sources)
        try:
            pieces = await self._live_pieces(sources)
            for output in self._pack(pieces):
                await self._write(output, group[0].replication)
                try:
                    self._switch(output)
                finally:
                    held.discard(output.sector_id)
        finally:
            held.difference_update(sources)
            # Also after a failure: what was emptied meanwhile nobody else deletes while it is held.
            self._delete_empty(sources)

    def _delete_empty(self, sources: list[int]) -> None:
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

    async def _live_pieces(self, sources: list[int]) -> list[_Piece]:
        """In order of (value, offset)."""
        pieces: list[_Piece] = []
        for sector_id in sources:
            try:
                data = memoryview(await self._sectors.read_sector(sector_id))
                entries = parse_table(data)
            except FusefsError:
                # One damaged sector must not keep all others from being merged, or their number would grow without bound (I7).
                self._sectors.partials.set_aside.add(sector_id)
                self._set_aside_at = trio.current_time()
                raise
            for entry in entries:
                # Merges of k sectors leave extents as long as their table entries, so an entry is either one extent, or dead.
                extent = Extent(entry.value_id, entry.offset, sector_id, entry.position, entry.length)
                if self._is_live(extent):
                    pieces.append(_Piece(extent, data[entry.position : entry.position + entry.length]))
        pieces.sort(key=lambda piece: (piece.extent.value_id, piece.extent.offset))
        return pieces

    def _is_live(self, extent: Extent) -> bool:
        return self._store.get(extent.key) == extent.encode() and self._store.get(value_key(extent.value_id)) is not None

    def _pack(self, pieces: list[_Piece]) -> list[_Output]:
        """Next fit in order; what adjoins in a value becomes one entry. A piece is never cut: so every old extent moves to one place."""
        limit = self._sectors.sector_size - TABLE_BYTES
        outputs: list[_Output] = []
        commit = self._store.applied_sequence
        for piece in pieces:
            extent = piece.extent
            if not self._is_live(extent):
                # Freed while the other sectors were read.
                continue
            owner = decode_value(self._store.get(value_key(extent.value_id)) or b"", extent.value_id).owner
            path = self._shipper.name_of(owner)
            output = outputs[-1] if outputs else None
            cost = extent.length + ENTRY_BYTES + len(path)
            if output is None or output.length + output.table_bytes + cost > limit:
                output = _Output([], [], [])
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

    async def _write(self, output: _Output, replication: str) -> None:
        output.sector_id = await self._sectors.allocate_sector(replication)
        self._sectors.partials.held.add(output.sector_id)
        try:
            await self._sectors.write_sector(output.sector_id, [*output.parts, encode_table(output.entries)], replication)
        except BaseException:
            self._sectors.partials.held.discard(output.sector_id)
            raise

    def _switch(self, output: _Output) -> None:
        """Point the extents to the new sector (I2: it is durable). No await: what is live is looked at and changed in one step."""
        batch = Batch()
        deltas: dict[int, int] = {}
        live = 0
        alive = {extent.key for extent in output.replaced if self._is_live(extent)}
        for extent in output.replaced:
            if extent.key in alive:
                batch.delete(extent.key)
                deltas[extent.sector_id] = deltas.get(extent.sector_id, 0) - extent.length
        for entry in output.entries:
            if EXTENT + u64(entry.value_id) + u64(entry.offset) not in alive:
                # The value was freed meanwhile; a value is freed whole, so none of the entry's extents is live.
                continue
            merged = Extent(entry.value_id, entry.offset, output.sector_id, entry.position, entry.length)
            batch.put(merged.key, merged.encode())
            live += entry.length
        if live:
            deltas[output.sector_id] = live
        for sector_id in self._sectors.account(batch, deltas):
            if sector_id not in self._sectors.partials.held:
                self._sectors.delete_now(batch, sector_id)
        if not live:
            self._sectors.delete_now(batch, output.sector_id)
        self._store.apply(batch)
