"""Values: see `storage.interfaces.Values`, and the package's docstring for the picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import trio

from storage.errors import FusefsError
from storage.history.objects import Tail as LogTail
from storage.interfaces import Batch, Buffer, FlushProgress, FlushReport, MetadataStore, TailPiece
from storage.metadata.counters import Counter
from storage.metadata.keys import GARBAGE, VALUE, u64
from storage.metadata.together import by_number, complete
from storage.replication import parse_replication
from storage.seams import Seams
from storage.sectors.manager import SectorManager
from storage.values.admission import Admission
from storage.values.blocks import LARGE, STREAM, Blocks
from storage.values.merge import Merger
from storage.values.reading import Reader
from storage.values.reclaim import Reclaimer
from storage.values.records import VERSION, ValueRecord, decode_sealed, decode_value, find_value, value_key
from storage.values.rewrite import Rewriter
from storage.values.shipping import BREATH, Shipper
from storage.values.tail import Flight, Tail

#: Bytes of a tail that a commit puts into the journal although they are in flight. Waiting for a sector of very many small files to come
#: down takes seconds, and those bytes are hardly any.
LITTLE = 4096


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
        self._counter = counter
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
        self._blocks = Blocks(tail_budget)
        self.admission = admission = Admission(store, self.shipper, self._tails, seams)
        self._reader = reader = Reader(store, sectors, self._tails)
        # No call in between: each request goes through one of them.
        self.hold_back, self.keep_pace = admission.hold_back, admission.keep_pace
        self.check_room, self.accepting = admission.check_room, admission.accepting
        self.reserve, self.reserve_now = admission.reserve, admission.reserve_now
        self.read, self.read_now, self.local_at = reader.read, reader.read_now, reader.local_at

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
        record = find_value(self._store, value_id)
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
        self._reader.forget(value_id)
        self.rewriter.forget(batch, value_id)
        tail = self._tails.pop(value_id, None)
        if tail is not None:
            if tail.handed > tail.sealed:
                self.admission.removed()
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

    def size_of(self, value_id: int) -> int:
        tail = self._tails.get(value_id)
        return find_value(self._store, value_id).sealed if tail is None else tail.size

    def sizes_of(self, value_ids: Sequence[int]) -> list[int | None]:
        found = by_number(self._store, VALUE, value_ids)
        raws = complete(found)
        sizes: list[int | None]
        if raws is not None:
            sizes = cast("list[int | None]", decode_sealed(raws, value_ids))
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
        return find_value(self._store, value_id).replication if tail is None else tail.replication

    async def stored_as(self, value_id: int) -> dict[str, int]:
        return await self.rewriter.stored_as(value_id)

    # ------------------------------------------------------------------------------------------------------------
    # Appending

    def append_now(self, value_id: int, data: Buffer) -> int:
        tail = self._tails.get(value_id)
        if tail is None:
            record = find_value(self._store, value_id)
            tail = self._tails[value_id] = Tail(value_id, record.owner, record.replication, record.sealed)
        offset, size = tail.size, len(data)
        if size < LARGE or offset < STREAM or not self._blocks.append(tail, data, size):
            tail.buffer.append(data)
        self.shipper.accepted(tail, size)
        return offset

    def ends_with(self, value_id: int, data: bytes) -> bool:
        tail = self._tails.get(value_id)
        return tail is not None and tail.buffer.ends_with(data)

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
            find_value(self._store, value_id)
        elif tail.journaled < tail.size:
            if tail.flights and self._awaited(tail):
                await self.settle(value_id, tail.size)
            self._hand_over(value_id)
        await self.admission.commit()

    async def commit_all(self) -> None:
        # Only those that have something the journal has not: of very many small files most wait for nothing but their sector.
        for number, (value_id, size) in enumerate([(value_id, tail.size) for value_id, tail in self.shipper.uncommitted.items()], 1):
            tail = self._tails.get(value_id)
            if tail is not None and self._awaited(tail):
                await self.settle(value_id, size)
            self._hand_over(value_id)
            if number % BREATH == 0:
                await trio.lowlevel.checkpoint()
        await self.admission.commit()

    @staticmethod
    def _awaited(tail: Tail) -> bool:
        """Is so much of it in flight, and not in the journal, that it is better to wait until it has landed?"""
        return bool(tail.flights) and tail.size - tail.journaled > LITTLE

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
        await self.admission.commit()
        return report

    async def run(self) -> None:
        """The loops: gather, merge, reclaim, rewrite. Until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.shipper.run)
            nursery.start_soon(self.admission.run)
            nursery.start_soon(self._reclaimer.run)
            nursery.start_soon(self._merger.run)
            nursery.start_soon(self.rewriter.run)
