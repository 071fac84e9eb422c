"""Values: see `storage.interfaces.Values`, and the package's docstring for the picture."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from weakref import ref

import trio

from storage.coprocess.pair import ARENA
from storage.errors import Corrupt, Fenced, FusefsError, NoSpace, NotFound, Unavailable
from storage.history.objects import Tail as LogTail
from storage.interfaces import Batch, Buffer, FlushProgress, FlushReport, MetadataStore, TailPiece
from storage.metadata.counters import Counter
from storage.metadata.keys import GARBAGE, VALUE, u64
from storage.metadata.together import by_number, complete
from storage.replication import parse_replication
from storage.seams import Seams
from storage.sectors.manager import SectorManager
from storage.values.merge import Merger
from storage.values.places import Places
from storage.values.reclaim import Reclaimer
from storage.values.records import VERSION, Extent, ValueRecord, decode_value, decode_values, extents_between, value_key
from storage.values.rewrite import Rewriter
from storage.values.shipping import BREATH, Shipper
from storage.values.streams import Streams
from storage.values.tail import Block, Flight, Tail

log = logging.getLogger("fusefs.values")

#: Extents looked up in one go while reading.
EXTENTS_PER_SCAN = 64
#: ... and for a sequential reader, beyond what it reads now.
EXTENTS_AHEAD = 16
#: A read whose sector was merged away under it looks the extents up again; each time means a whole merge finished in between.
READ_ATTEMPTS = 8
#: What the metadata of a tail's value and file take in the journal beside its bytes (inode, extent, value, sector), at most.
BESIDE = 448
#: ... and what of that comes only as its bytes land (extent, value): so it is still to come of what the journal has.
LANDED = 160
#: Shares of a journal segment left over by appends, and by what makes new names: so that renames, deletions and the records of what lands
#: in sectors find room when the disk has none any more.
APPEND_KEPT, CREATE_KEPT = 0.5, 0.25
#: Bytes of appends (and of what stands beside them) for which the journal's room is looked at once.
ALLOWANCE = 32 * 1024
#: The same of large appends, and what is to be left over besides then, as a share of a segment.
LARGE_ALLOWANCE, STREAM_KEPT = 1024 * 1024, 1.0
#: Bytes of a tail that a commit puts into the journal although they are in flight. Waiting for a sector of very many small files to come
#: down takes seconds, and those bytes are hardly any.
LITTLE = 4096
#: Seconds an append on a full disk waits for what was appended before to get to the hosts.
ROOM_WAIT = 30.0
#: Seconds between two looks whether a full disk is full still.
FULL_INTERVAL = 3.0
#: Appends of this size and more, to values of that size and more, go to where the coprocess can seal them.
LARGE, STREAM = 64 * 1024, 1024 * 1024
#: Bytes of such memory that a value gets at a time.
BLOCK = 4 * 1024 * 1024
#: Seconds in which those who come after one that was refused for want of room are refused as well.
REFUSED_PAUSE = 2.0
#: A read from a value's beginning of so many bytes, or more, is taken for that of somebody who reads all of it.
FROM_START = 64 * 1024


class Values:
    """Tails, extents and what moves bytes from the ones to the others. Tasks run in `nursery`, the volume's."""

    def __init__(
        self,
        *,
        store: MetadataStore,
        sectors: SectorManager,
        counter: Counter,
        seams: Seams,
        nursery: trio.Nursery,
        tail_budget: int,
        flush_interval: float,
        default_replication: str,
        rewrite_rate: float | None = None,
    ) -> None:
        """`rewrite_rate`: bytes per second that changing the replication of what is stored may send; None: no limit."""
        self._store = store
        self._sectors = sectors
        self._counter = counter
        self._seams = seams
        #: Invariant: a value is here if and only if it has bytes outside of extents (or is about to get some).
        self._tails: dict[int, Tail] = {}
        self.shipper = Shipper(
            store=store,
            sectors=sectors,
            seams=seams,
            nursery=nursery,
            tails=self._tails,
            budget=tail_budget,
            flush_interval=flush_interval,
            default_replication=default_replication,
        )
        self._reclaimer = Reclaimer(store, sectors)
        self._merger = Merger(store, sectors, self.shipper, seams)
        self.rewriter = Rewriter(store, sectors, self._merger, self.shipper, seams, rewrite_rate)
        self.shipper.on_landed = self._merger.wake
        self._reclaimer.on_freed = self._merger.wake
        self._streams = Streams()
        self._places = Places()
        #: Why the last commit could not be made (the local disk or the journal is full); None since one could.
        self.local_trouble: FusefsError | None = None
        #: Why the journal's files could not grow by what more appends need (the local disk is full or fails); None since they could.
        self.full: FusefsError | None = None
        self._cramped = trio.Event()
        #: Blocks of shared memory that pieces of tails stand in.
        self._blocks: list[ref[object]] = []
        self._most_blocks = max(1, tail_budget // BLOCK)
        #: Why nothing could be caught up with, and until when nobody else tries.
        self._refused: tuple[FusefsError, float] | None = None
        #: Values freed that had bytes in the journal, and how many of them there were when a commit was begun that was made.
        self._removed = self._removed_durably = 0

    def set_path_of(self, path_of: Callable[[int], bytes | None]) -> None:
        """How sector tables name the owner of a value: wired by the volume, since names stand above values."""
        self.shipper.path_of = path_of

    # ------------------------------------------------------------------------------------------------------------
    # Life of a value

    def create(self, batch: Batch, owner: int, replication: str) -> int:
        parse_replication(replication)
        value_id = self._counter.next_now()
        batch.put(value_key(value_id), ValueRecord(VERSION, owner, replication, 0).encode())
        return value_id

    def set_replication(self, batch: Batch, value_id: int, replication: str) -> None:
        spec = parse_replication(replication)
        record = self._record(value_id)
        if parse_replication(record.replication) == spec:
            return
        record.replication = str(spec)
        batch.put(value_key(value_id), record.encode())
        tail = self._tails.get(value_id)
        if tail is not None:
            # What is put together from now on. What is on its way is marked when it lands.
            tail.replication = record.replication
        if record.sealed:
            self.rewriter.mark(batch, value_id, record.sealed)

    def free(self, batch: Batch, value_id: int) -> None:
        # No await between here and the caller's apply: nobody appends to a value that is half freed.
        batch.delete(value_key(value_id))
        batch.put(GARBAGE + u64(value_id), b"")
        self._places.forget(value_id)
        self.rewriter.forget(batch, value_id)
        tail = self._tails.pop(value_id, None)
        if tail is not None:
            if tail.handed > tail.sealed:
                self._removed += 1
                self._store.empties()
            self.shipper.drop(tail)
            tail.block = None
        self._reclaimer.freed(value_id)

    def recover(self, pieces: Mapping[int, Sequence[tuple[int, bytes]]], *, ship: bool = True) -> int:
        """At open: tails as the journal has them; pieces may overlap, and then agree. Returns the bytes taken back.

        `ship` False: they are for reading only, and never leave memory.
        """
        recovered = 0
        for value_id, parts in pieces.items():
            raw = self._store.get(value_key(value_id))
            if raw is None:
                continue
            record = decode_value(raw, value_id)
            tail = Tail(value_id, record.owner, record.replication, record.sealed)
            # By offset: what was written to the journal once more stands behind its own end there.
            for offset, data in sorted(parts, key=lambda part: part[0]):
                at = tail.size
                if offset <= at < offset + len(data):
                    tail.buffer.append(data[at - offset :])
            if tail.buffer.length:
                tail.journaled = tail.handed = tail.size
                self._tails[value_id] = tail
                recovered += tail.buffer.length
                if ship:
                    self.shipper.added(tail, tail.buffer.length)
                else:
                    self.shipper.kept(tail, tail.buffer.length)
        return recovered

    def _record(self, value_id: int) -> ValueRecord:
        raw = self._store.get(value_key(value_id))
        if raw is None:
            raise NotFound(f"value {value_id} does not exist")
        return decode_value(raw, value_id)

    def size_of(self, value_id: int) -> int:
        tail = self._tails.get(value_id)
        return self._record(value_id).sealed if tail is None else tail.size

    def sizes_of(self, value_ids: Sequence[int]) -> list[int | None]:
        found = by_number(self._store, VALUE, value_ids)
        raws = complete(found)
        sizes: list[int | None]
        if raws is not None:
            sizes = [record.sealed for record in decode_values(raws, value_ids)]
        else:
            sizes = [None if raw is None else decode_value(raw, value_id).sealed for raw, value_id in zip(found, value_ids, strict=True)]
        if self._tails:
            for at, value_id in enumerate(value_ids):
                tail = self._tails.get(value_id)
                if tail is not None:
                    sizes[at] = tail.size
        return sizes

    def replication_of(self, value_id: int) -> str:
        tail = self._tails.get(value_id)
        return self._record(value_id).replication if tail is None else tail.replication

    async def stored_as(self, value_id: int) -> dict[str, int]:
        return await self.rewriter.stored_as(value_id)

    # ------------------------------------------------------------------------------------------------------------
    # Appending

    async def hold_back(self) -> None:
        if self.local_trouble is not None or not self._store.overdue:
            return  # In trouble `check_room` refuses at once.
        refused = self._refused
        if refused is not None and trio.current_time() < refused[1]:
            # Not each of very many has to wait for the same answer.
            raise type(refused[0])(str(refused[0]))
        try:
            await self._store.catch_up()
        except Fenced:
            raise
        except FusefsError as error:
            self._refused = error, trio.current_time() + REFUSED_PAUSE
            raise
        self._refused = None

    async def keep_pace(self, removing: bool = False) -> None:
        if not self._store.overdue:
            return
        try:
            if self._emptying():
                removed, sequence = self._removed, self._store.applied_sequence
                await self._store.catch_up(urgent=True)
                # It makes no commit where only LMDB was behind.
                if self._store.durable_sequence >= sequence:
                    self._removed_durably = max(removed, self._removed_durably)
            else:
                await self.hold_back()
        except Fenced:
            raise
        except FusefsError as error:
            # Said to who makes something new.
            log.debug("not waited for: %s", error)
        if not removing and self._store.overfull:
            raise NoSpace("more changes wait for a commit than the journal has room for; nothing more is changed until one is made")

    def _emptying(self) -> bool:
        """Does what waits for a commit remove some of what fills the journal? Then, of the room that is kept for what lands, it may have
        what that does not need: where hosts are full nothing lands, and only removals can help, once they are committed."""
        return self._removed > self._removed_durably and self._store.can_spare(LANDED * len(self._tails))

    async def reserve(self, value_id: int, length: int) -> None:
        if self.reserve_now(value_id, length):
            return
        failure = self._store.failure
        if failure is not None:
            raise Fenced(failure)
        if self.local_trouble is not None:
            self.check_room()
        await self._wait_room(length)

    def reserve_now(self, value_id: int, length: int) -> bool:  # noqa: ARG002 (the Protocol's: a budget per value may come)
        if self.local_trouble is not None or self._store.failure is not None or self._store.overdue:
            return False
        cost = length + BESIDE
        shipper = self.shipper
        if cost > shipper.granted:
            # Looked at for several appends at a time: what comes between them is within what is kept.
            shipper.granted = 0
            if length >= LARGE and self._assured(cost + LARGE_ALLOWANCE, STREAM_KEPT):
                shipper.granted = cost + LARGE_ALLOWANCE
            elif self._assured(length + ALLOWANCE, APPEND_KEPT):
                shipper.granted = cost + ALLOWANCE
            else:
                return False
        if not shipper.has_room(length):
            return False
        shipper.granted -= cost
        return True

    def _assured(self, length: int, kept: float) -> bool:
        """Would everything accepted so far, and `length` bytes more, find room in the journal as it stands on the disk? Arithmetic only."""
        tails = self.shipper.unsafe_tails + 1
        return self._store.has_room(self._beside(tails), self.shipper.spoken_for + length, tails, kept)

    def _beside(self, unsafe: int) -> int:
        """Bytes of operations that tails have yet to bring, of which so many have bytes the journal does not have. What takes them out of a
        full journal is counted as they go in: else no commit could say one day where they went."""
        return BESIDE * unsafe + LANDED * max(len(self._tails) - unsafe, 0)

    async def _wait_room(self, length: int) -> None:
        """Until there is room for `length` bytes in memory, and in the journal (I7: what is accepted can be made durable)."""
        shipper = self.shipper
        shipper.granted = 0
        deadline = trio.current_time() + ROOM_WAIT
        while True:
            await shipper.wait_room(length)
            if self._store.overdue:
                # New names come without waiting, so whoever fills them waits for both.
                await self._store.catch_up()
                continue
            if self._assured(length, APPEND_KEPT):
                return
            error = await self._grow(length)
            if self._store.failure is not None:
                raise Fenced(self._store.failure)
            # No await from here to the return: others append, too.
            if self._assured(length, APPEND_KEPT) and shipper.has_room(length):
                return
            if not shipper.pending and error is None:
                # Full of what has landed; or the append is larger than the whole journal: then its commit waits for room.
                if not await self._store.clear() or trio.current_time() >= deadline:
                    return
                continue
            if error is not None and (not shipper.pending or shipper.trouble is not None or trio.current_time() >= deadline):
                raise error
            # Room comes as bytes get to the hosts.
            await shipper.wait_landing()

    async def _grow(self, length: int) -> FusefsError | None:
        """Have the journal's files grow by what `length` bytes need. Returns why they cannot; None: they did, or their limit is reached."""
        tails = self.shipper.unsafe_tails + 1
        try:
            await self._store.make_room(self._beside(tails), self.shipper.spoken_for + length, tails, APPEND_KEPT)
        except Fenced:
            raise
        except FusefsError as error:
            if self.full is None:
                log.error("nothing that cannot be made durable is accepted: %s", error)
            self.full = error
            return type(error)(f"{error}; nothing more is accepted until there is room for it")
        self.full = None
        return None

    async def _grow_loop(self) -> None:
        """Room ahead of creations, which cannot wait for it; and find out when a full disk is full no more."""
        while True:
            with trio.move_on_after(math.inf if self.full is None else FULL_INTERVAL):
                await self._cramped.wait()
            self._cramped = trio.Event()
            if self._store.failure is None:
                await self._grow(0)
            # At most so often, whatever asks.
            await self._seams.clock.sleep(0.1)

    def append_now(self, value_id: int, data: Buffer) -> int:
        tail = self._tails.get(value_id)
        if tail is None:
            record = self._record(value_id)
            tail = self._tails[value_id] = Tail(value_id, record.owner, record.replication, record.sealed)
        offset, size = tail.size, len(data)
        if size < LARGE or offset < STREAM or not self._shared(tail, data, size):
            tail.buffer.append(data)
        self.shipper.accepted(tail, size)
        return offset

    def _shared(self, tail: Tail, data: Buffer, size: int) -> bool:
        """Append to the tail's buffer where the coprocess sees it. False: there is no room there."""
        block = tail.block
        # What goes into one sector stands together: it is told in fewer places.
        if block is None or block.left < size or not tail.buffer.length:
            tail.block = None
            # Few of them, since a little of one is all of it: no more than the budget of tails has room for (I7).
            self._blocks = [lent for lent in self._blocks if lent() is not None]
            memory = ARENA.spare(BLOCK) if size <= BLOCK and len(self._blocks) < self._most_blocks else None
            if memory is None:
                return False
            self._blocks.append(ref(memory.obj))
            tail.block = block = Block(memory)
        tail.buffer.append_in(block, data)
        return True

    # ------------------------------------------------------------------------------------------------------------
    # Reading

    def ends_with(self, value_id: int, data: bytes) -> bool:
        tail = self._tails.get(value_id)
        return tail is not None and tail.buffer.ends_with(data)

    def read_now(self, value_id: int, offset: int, size: int) -> Buffer | None:
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
        sealed = self._record(value_id).sealed if tail is None else tail.sealed
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
        tail = self._tails.get(value_id)
        sealed = self._record(value_id).sealed if tail is None else tail.sealed
        if offset >= sealed:
            return True
        found = extents_between(self._store, value_id, offset, offset + 1, 1)
        return bool(found) and self._sectors.cached(found[0].sector_id, found[0].position + offset - found[0].offset)

    # ------------------------------------------------------------------------------------------------------------
    # Durability

    async def settle(self, value_id: int, upto: int) -> None:
        while (tail := self._tails.get(value_id)) is not None and tail.journaled < upto and self._awaited(tail):
            flight = tail.first_flying(upto)
            if flight is None:
                return
            if flight.cargo is None:
                raise RuntimeError("a flight without cargo is flying")
            # Bounded by the time limits of HostIO; after a failure the flight is parked, which ends the wait too.
            await flight.cargo.done.wait()

    def uncommitted_tail(self, value_id: int) -> list[TailPiece]:
        tail = self._tails.get(value_id)
        if tail is None:
            return []
        return self._untaken(tail)

    def _untaken(self, tail: Tail) -> list[TailPiece]:
        size = tail.size
        if tail.journaled >= size:
            return []
        # Exactly what `settle` does not wait for: a flight behind a parked one is tail like any other, or an fsync would leave it out.
        return self._taken(tail, tail.first_flying(size) if tail.flights and self._awaited(tail) else None)

    def _taken(self, tail: Tail, flying: Flight | None) -> list[TailPiece]:
        """What the journal does not have, up to that flight; it counts as handed over."""
        size, value_id = tail.size, tail.value_id
        if not tail.flights:
            # The usual case, of what follows.
            start = max(tail.journaled, tail.sealed)
            position = start - tail.sealed
            data = tail.buffer.read(position, size - start)
            self.shipper.mark(tail, size)
            return [TailPiece(value_id, start, tuple(data))]
        start, at = max(tail.journaled, tail.sealed), tail.sealed
        data = []
        for flight in tail.flights:
            if flight is flying:
                break
            if flight.end > start:
                data.extend(flight.read(start, flight.end))
            at = flight.end
        else:
            if tail.size > start:
                position = max(start - tail.buffer_start, 0)
                data.extend(tail.buffer.read(position, tail.buffer.length - position))
            at = tail.size
        if at <= start:
            return []
        self.shipper.mark(tail, at)
        return [TailPiece(value_id, start, tuple(data))]

    async def commit(self, value_id: int) -> None:
        tail = self._tails.get(value_id)
        if tail is None:
            # It exists, or that is the error.
            self._record(value_id)
        elif tail.journaled < tail.size:
            if tail.flights and self._awaited(tail):
                await self.settle(value_id, tail.size)
            self._hand_over(value_id)
        await self._commit_store()

    async def commit_all(self) -> None:
        # Only those that have something the journal has not: of very many small files most wait for nothing but their sector.
        for number, (value_id, size) in enumerate([(value_id, tail.size) for value_id, tail in self.shipper.uncommitted.items()], 1):
            tail = self._tails.get(value_id)
            if tail is not None and self._awaited(tail):
                await self.settle(value_id, size)
            self._hand_over(value_id)
            if number % BREATH == 0:
                await trio.lowlevel.checkpoint()
        await self._commit_store()

    @staticmethod
    def _awaited(tail: Tail) -> bool:
        """Is so much of it in flight, and not in the journal, that it is better to wait until it has landed?"""
        return bool(tail.flights) and tail.size - tail.journaled > LITTLE

    async def _commit_store(self) -> None:
        """Commit; and remember whether it could be done, for `check_room`."""
        removed = self._removed
        try:
            try:
                await self._store.commit()
            except NoSpace:
                if not self._emptying():
                    raise
                await self._store.commit(urgent=True)
        except Fenced:
            raise
        except FusefsError as error:
            if self.local_trouble is None:
                log.error("what was written lately is not durable, and nothing more is accepted until it is: %s", error)
            self.local_trouble = error
            raise
        self.local_trouble = None
        self._removed_durably = max(removed, self._removed_durably)
        if self._store.room_to_spare:
            shipper = self.shipper
            self._store.keep_room(self._beside(shipper.unsafe_tails), shipper.spoken_for, shipper.unsafe_tails, APPEND_KEPT)

    def check_room(self) -> None:
        local = self.local_trouble
        if local is not None:
            raise type(local)(f"{local}; nothing more is accepted until what was written before is durable")
        if not self._assured(0, CREATE_KEPT):
            self._cramped.set()
            if self.full is not None:
                raise type(self.full)(f"{self.full}; nothing new is accepted until there is room for it")
            if self._store.overfull:
                raise NoSpace("more changes wait for a commit than the journal has room for; nothing new is accepted until one is made")

    def _hand_over(self, value_id: int) -> None:
        """Give the store what it does not have of the tail. No await between taking and applying: `journaled` says the store has it."""
        tail = self._tails.get(value_id)
        if tail is None:
            return
        pieces = self._untaken(tail)
        if pieces:
            try:
                self._store.apply(Batch(), pieces)
            except FusefsError:
                # It does not: the next commit must offer the bytes again, not report them as safe.
                self.shipper.mark(self._tails[value_id], pieces[0].offset)
                raise

    def take_unlogged(self, anew: bool) -> list[LogTail]:
        """For the log on the hosts: bytes that are in the journal, in no extent, and were not given before (`anew`: or were). No await."""
        found: list[LogTail] = []
        for tail in self._tails.values():
            start = tail.sealed if anew else max(tail.sealed, tail.logged)
            if tail.handed > start:
                found.append(LogTail(tail.value_id, start, b"".join(tail.read(start, tail.handed))))
            tail.logged = max(start, tail.handed)
        return found

    def log_published(self) -> None:
        """A majority of the hosts has all that `take_unlogged` gave so far. No await."""
        for tail in self._tails.values():
            tail.published = tail.logged

    def accepting(self) -> bool:
        return self.local_trouble is None and self.full is None and self.shipper.accepting()

    @property
    def pending_bytes(self) -> int:
        """Bytes that are in no sector yet."""
        return self.shipper.pending

    def logged_bytes(self) -> int:
        """Those of them that hosts have in the log. Looks at every tail."""
        return sum(max(0, tail.published - tail.sealed) for tail in self._tails.values())

    async def flush(self, progress: FlushProgress | None = None) -> FlushReport:
        try:
            report = await self.shipper.flush(progress if progress is not None else FlushProgress())
        except FusefsError:
            # What counts first is whether it is safe here: if it is not, that is the error.
            await self.commit_all()
            raise
        await self._commit_store()
        return report

    async def run(self) -> None:
        """The loops: gather, merge, reclaim, rewrite. Until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.shipper.run)
            nursery.start_soon(self._grow_loop)
            nursery.start_soon(self._reclaimer.run)
            nursery.start_soon(self._merger.run)
            nursery.start_soon(self.rewriter.run)
