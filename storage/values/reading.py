"""Reading values: extents up to `sealed`, then flights and the buffer of the tail. Who reads one after the other is read ahead for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from storage.errors import Corrupt, FusefsError, NotFound, Unavailable
from storage.interfaces import Buffer, MetadataStore
from storage.sectors.manager import SectorManager
from storage.values.places import Places
from storage.values.records import Extent, decode_value, extents_between, find_value, value_key
from storage.values.streams import Streams
from storage.values.tail import Tail

#: Extents looked up in one go while reading.
EXTENTS_PER_SCAN = 64
#: ... and for a sequential reader, beyond what it reads now.
EXTENTS_AHEAD = 16
#: A read whose sector was merged away under it looks the extents up again; each time means a whole merge finished in between.
READ_ATTEMPTS = 8
#: A read from a value's beginning of so many bytes, or more, is taken for that of somebody who reads all of it.
FROM_START = 64 * 1024


class Reader:
    """See the module."""

    def __init__(self, store: MetadataStore, sectors: SectorManager, tails: Mapping[int, Tail]) -> None:
        """`tails`: by value, as `Values` has them."""
        self._store, self._sectors, self._tails = store, sectors, tails
        self._streams = Streams()
        self._places = Places()

    def forget(self, value_id: int) -> None:
        """The value is freed."""
        self._places.forget(value_id)

    def read_now(self, value_id: int, offset: int, size: int) -> Buffer | None:
        """See `Values.read_now`."""
        if offset < 0 or size <= 0:
            return None
        stop = offset + size
        extent = self._places.find(value_id, offset)
        if extent is None or extent.end < stop:
            tail = self._tails.get(value_id)
            if tail is not None and stop > tail.sealed:
                return self._tail_now(tail, offset, stop)
            if tail is None:
                raw = self._store.get(value_key(value_id))
                if raw is None:
                    return None
                stop = min(stop, decode_value(raw, value_id).sealed)
                if stop <= offset:
                    return b""
        data = self._stored_now(value_id, extent, offset, stop)
        if data is not None:
            known = extent or self._places.find(value_id, offset)
            if known is not None and not self._streams.goes_on(value_id, offset, stop, known.sector_id):
                self._read_ahead(value_id, offset, stop, [known])
        return data

    def _stored_now(self, value_id: int, extent: Extent | None, offset: int, stop: int) -> Buffer | None:
        """Out of extents, of which `extent` is the first, if it is known."""
        pieces: list[Buffer] = []
        at = offset
        while True:
            if extent is None:
                found = extents_between(self._store, value_id, at, at + 1, 1)
                if not found or found[0].offset > at:
                    return None
                extent = found[0]
                self._places.add(found)
            length = min(extent.end, stop) - at
            # Only what lies in one piece is worth waiting for right here: a step of the event loop may not wait for one after the other.
            whole = at == offset and at + length == stop
            piece = self._sectors.read_now(extent.sector_id, extent.position + at - extent.offset, length, wait=whole)
            if piece is None:
                return None
            at += length
            if at == stop and not pieces:
                return piece
            pieces.append(piece)
            if at == stop:
                return b"".join(pieces)
            extent = self._places.find(value_id, at)

    @staticmethod
    def _tail_now(tail: Tail, offset: int, stop: int) -> Buffer | None:
        """From the tail's end alone, where nothing is in flight before."""
        stop = min(stop, tail.size)
        if stop <= offset:
            return b""
        if offset < tail.buffer_start:
            return None
        return b"".join(tail.buffer.read(offset - tail.buffer_start, stop - offset))

    async def read(self, value_id: int, offset: int, size: int) -> Buffer:
        """See `Values.read`."""
        known = self._places.find(value_id, offset)
        if known is not None and 0 < size <= known.end - offset:
            # Without looking it up: nearly all that random readers miss in the cache.
            self._read_ahead(value_id, offset, offset + size, [known])
            await self._sectors.fetched(known.sector_id)
            now = self._sectors.read_now(known.sector_id, known.position + offset - known.offset, size, wait=False)
            if now is not None:
                # Without a copy.
                return now
            try:
                piece = await self._sectors.insecure_read_sector_at(known.sector_id, known.position + offset - known.offset, size)
                if len(piece) == size:
                    return piece
            except FusefsError:
                if self._still_there(known):
                    raise
        for _ in range(READ_ATTEMPTS):
            pieces, missing, failure = await self._read(value_id, offset, size)
            if not missing:
                return pieces[0] if len(pieces) == 1 and type(pieces[0]) is bytes else b"".join(pieces)
            if failure is not None and self._still_there(missing):
                raise failure
        raise Unavailable(f"value {value_id}: its sectors kept moving while it was read; try again")

    async def _read(self, value_id: int, offset: int, size: int) -> tuple[list[Buffer], Extent | None, FusefsError | None]:
        """(pieces, the extent that could not be read, why)."""
        tail = self._tails.get(value_id)
        sealed = find_value(self._store, value_id).sealed if tail is None else tail.sealed
        stop = min(offset + size, sealed if tail is None else tail.size)
        if offset < 0 or stop <= offset:
            return [b""], None, None
        # What is in memory is taken now: while extents are awaited, flights may land and the tail may be cut.
        memory: list[Buffer] = []
        if tail is not None and stop > sealed:
            for flight in tail.flights:
                if flight.end > offset and flight.offset < stop:
                    memory.extend(flight.read(offset, stop))
            if stop > tail.buffer_start:
                start = max(offset, tail.buffer_start)
                memory.extend(tail.buffer.read(start - tail.buffer_start, stop - start))
        pieces: list[Buffer] = []
        at, extents_stop = offset, min(stop, sealed)
        while at < extents_stop:
            extents = extents_between(self._store, value_id, at, extents_stop, EXTENTS_PER_SCAN)
            if not extents or extents[0].offset > at:
                if self._store.get(value_key(value_id)) is None:
                    raise NotFound(f"value {value_id} was removed while it was read")
                raise Corrupt(f"value {value_id}: no extent for offset {at}; run fusefs check")
            self._places.add(extents)
            self._read_ahead(value_id, at, extents_stop, extents)
            for extent in extents:
                if extent.offset > at:
                    break
                length = min(extent.end, extents_stop) - at
                try:
                    piece = await self._sectors.insecure_read_sector_at(extent.sector_id, extent.position + at - extent.offset, length)
                except FusefsError as error:
                    return pieces, extent, error
                if len(piece) != length:
                    return pieces, extent, Corrupt(f"sector {extent.sector_id} is shorter than value {value_id} needs")
                pieces.append(piece)
                at += length
        pieces.extend(memory)
        return pieces, None, None

    def _still_there(self, extent: Extent) -> bool:
        """False if the extent has moved since it was looked up (merged, or its value freed)."""
        if self._store.get(value_key(extent.value_id)) is None:
            raise NotFound(f"value {extent.value_id} was removed while it was read")
        return self._store.get(extent.key) == extent.encode()

    def _read_ahead(self, value_id: int, at: int, stop: int, extents: Sequence[Extent]) -> None:
        """Whoever reads on where a read of the value ended is sequential: the sector at hand and the next ones are fetched whole."""
        asked = self._streams.take(value_id, at)
        if asked is None and at == 0 and stop >= FROM_START:
            asked = 0
        if asked is not None and asked != extents[0].sector_id:
            if asked:
                self._sectors.passed(asked)
            # Once for each sector: many reads fall into one.
            last = extents[-1]
            following = self._following(value_id, last.end, self._sectors.ahead(last.sector_id))
            begun = [self._sectors.prefetch(extent.sector_id) for extent in (extents[0], *following)]
            asked = extents[0].sector_id if all(begun) else 0
        self._streams.put(value_id, stop, asked)

    def _following(self, value_id: int, at: int, count: int) -> list[Extent]:
        """The extents from `at` on, at most `count`. A reader gets to each of them: they are looked up many at a time, and remembered."""
        found: list[Extent] = []
        while len(found) < count:
            extent = self._places.find(value_id, at)
            if extent is None:
                more = extents_between(self._store, value_id, at, at + EXTENTS_AHEAD * self._sectors.sector_size, EXTENTS_AHEAD)
                if not more:
                    break
                self._places.add(more)
                found += more[: count - len(found)]
                break
            found.append(extent)
            at = extent.end
        return found

    def local_at(self, value_id: int, offset: int) -> bool:
        """See `Values.local_at`."""
        tail = self._tails.get(value_id)
        sealed = find_value(self._store, value_id).sealed if tail is None else tail.sealed
        if offset >= sealed:
            return True
        found = extents_between(self._store, value_id, offset, offset + 1, 1)
        return bool(found) and self._sectors.cached(found[0].sector_id, found[0].position + offset - found[0].offset)
