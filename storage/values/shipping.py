"""Shipping: tails are cut, gathered, put into sectors, and become extents."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

import msgspec
import trio

from storage.errors import Corrupt, Fenced, FusefsError, NoSpace, NotFound, Unavailable
from storage.interfaces import Batch, FlushProgress, FlushReport, MetadataStore
from storage.replication import parse_replication
from storage.seams import Seams
from storage.sectors.manager import SectorManager
from storage.values.packing import ENTRY_BYTES, TABLE_BYTES, TableEntry, encode_table
from storage.values.records import VERSION, Extent, ValueRecord, value_key
from storage.values.tail import Cargo, Flight, FlightState, Tail
from storage.wording import counted

log = logging.getLogger("fusefs.values")

#: Room kept in a full sector for label, table and trailer of one entry: one page, so that a file's pages do not straddle sectors.
RESERVE = 4096
#: What a tail takes of the budget beside its bytes: about the memory of its objects. A million files of a line each are more of these than
#: of bytes.
TAIL_COST = 768
#: Flights that come down in one step of the event loop, at most.
LANDING = 512
#: Share of the budget at which small tails are gathered without waiting for `flush_interval`.
PRESSURE = 0.5
#: Seconds between attempts after hosts refused: doubling from the first to the last.
RETRY_FIRST, RETRY_LAST = 1.0, 30.0
#: A refused writer has parked cargos tried again, at most so often (seconds).
KICK_SECONDS = 1.0
#: Below this much room (or a twentieth of the host, if that is less) on the host that would be the last to take a copy, new handles are
#: direct and write(2) itself says ENOSPC.
SPACE_RESERVE = 64 * 1024 * 1024
#: Seconds between two looks at the hosts' room.
SPACE_INTERVAL = 10.0
#: Tails, or entries of a table, after which the event loop gets a pass: about half a millisecond.
BREATH = 32
#: Share of a journal segment that must be left over when tails are written to the journal once more.
RELOG_KEPT = 0.5
#: How much of a path a sector's table keeps: with its entry and the trailer, less than `RESERVE`.
MAX_PATH = 3072


class Shipper:
    """Owns the budget of all tails, and every cargo on its way. Single-threaded; nothing here blocks."""

    def __init__(
        self,
        *,
        store: MetadataStore,
        sectors: SectorManager,
        seams: Seams,
        nursery: trio.Nursery,
        tails: dict[int, Tail],
        budget: int,
        flush_interval: float,
        default_replication: str,
    ) -> None:
        self._store = store
        self._sectors = sectors
        self._seams = seams
        self._nursery = nursery
        self._tails = tails
        self.payload_limit = sectors.sector_size - RESERVE
        self._budget = max(budget, 4 * sectors.sector_size)
        #: Bytes in buffers from which on they are gathered.
        self._pressing = self._budget * PRESSURE
        self._flush_interval = flush_interval
        self._default = parse_replication(default_replication)
        #: Invariant: the bytes of all buffers and of all flights that have not landed or been dropped.
        self.pending = 0
        #: Bytes of the buffers alone, and how many tails have any.
        self._buffered = self._buffered_tails = 0
        #: Invariant: bytes that neither the journal nor a pending commit has, of all tails (size - journaled), and those tails by value.
        self.unsafe = 0
        self.uncommitted: dict[int, Tail] = {}
        #: Bytes that appends may bring besides before the journal's room is looked at again.
        self.granted = 0
        #: Cargos flying or parked.
        self._cargos: set[Cargo] = set()
        #: What hosts said last, while they refuse; None from the next success on.
        self.trouble: FusefsError | None = None
        self._room = trio.Event()
        self._gather = trio.Event()
        self._retry = trio.Event()
        self._kicked = -KICK_SECONDS
        self._low_space = False
        #: The journal has no room, and a commit waits for some.
        self._pressed = False
        #: Sequence of a commit that has every landing so far; of one that has the tails that were last written to the journal once more.
        self._landed_in = self._relogged_in = 0
        self.path_of: Callable[[int], bytes | None] = lambda _owner: None
        #: In a landing's batch: (batch, value id, bytes that came down in a sector of another replication than the value has by now).
        self.on_misplaced: Callable[[Batch, int, int], None] = lambda _batch, _value, _length: None
        #: Told after each landing, for merging.
        self.on_landed: Callable[[], None] = lambda: None

    # ------------------------------------------------------------------------------------------------------------
    # The budget

    @property
    def unsafe_tails(self) -> int:
        """How many have bytes that neither the journal nor a pending commit has."""
        return len(self.uncommitted)

    @property
    def spoken_for(self) -> int:
        """Bytes that the journal is to have room for in any case, whatever else it takes."""
        return self.unsafe + self.granted

    @property
    def _used(self) -> int:
        """Of the budget."""
        return self.pending + TAIL_COST * len(self._tails)

    def has_room(self, length: int) -> bool:
        # As `_used`, and one tail more.
        return self.pending + TAIL_COST * (len(self._tails) + 1) + length <= self._budget

    async def wait_room(self, length: int) -> None:
        """Until `length` fits (or nothing is pending, for one append larger than the whole budget)."""
        while not self.has_room(length) and self.pending:
            self._gather.set()
            if self.trouble is not None:
                self._kick()
                raise type(self.trouble)(f"{self.trouble}; nothing more can be taken until then")
            # Ends with each landing, each failure and each drop; a cargo on its way has HostIO's time limit.
            await self._room.wait()

    def accepting(self) -> bool:
        return self.trouble is None and not self._low_space and self._used < self._budget

    def kept(self, tail: Tail, length: int) -> None:
        """Bytes stand in a tail's buffer, and stay there."""
        self.pending += length
        self._buffered += length
        self._buffered_tails += 0 < length == tail.buffer.length

    def added(self, tail: Tail, length: int) -> None:
        """Bytes were appended to the tail's buffer: cut what fills a sector."""
        # As `kept`.
        self.pending += length
        self._buffered += length
        there = tail.buffer.length
        if there == length and length:
            self._buffered_tails += 1
        if there >= self.payload_limit:
            self._cut(tail)
        # What is in flight is not to be gathered: else few of those that come meanwhile would make a sector each time.
        if self._buffered + TAIL_COST * self._buffered_tails > self._pressing:
            self._gather.set()

    def _cut(self, tail: Tail) -> None:
        while tail.buffer.length >= self.payload_limit:
            cargo = Cargo(tail.replication)
            self._load(cargo, tail, self.payload_limit)
            self._dispatch(cargo)

    def accepted(self, tail: Tail, length: int) -> None:
        """Bytes were appended to the tail's buffer that are nowhere else."""
        if length:
            self.uncommitted[tail.value_id] = tail
            self.unsafe += length
        self.added(tail, length)

    def mark(self, tail: Tail, journaled: int) -> None:
        """The journal, or an extent, has the tail up to there; or has it only up to there after all."""
        if journaled != tail.journaled:
            self.unsafe += tail.journaled - journaled
            if tail.size > journaled:
                self.uncommitted[tail.value_id] = tail
            else:
                self.uncommitted.pop(tail.value_id, None)
            tail.journaled = journaled
            tail.handed = max(tail.handed, journaled)

    async def wait_landing(self) -> None:
        """For something on its way to the hosts to get there, or not to; for a second at most. Raises what keeps it from getting there."""
        self._gather.set()
        if self.trouble is not None:
            self._kick()
            raise type(self.trouble)(f"{self.trouble}; nothing more can be taken until then")
        with trio.move_on_after(1.0):
            await self._room.wait()

    def drop(self, tail: Tail) -> None:
        """The value is freed: its bytes go, flights still in the air come down empty."""
        self.mark(tail, tail.size)
        released = tail.buffer.length
        self._buffered -= tail.buffer.length
        self._buffered_tails -= tail.buffer.length > 0
        written: set[Cargo] = set()
        for flight in tail.flights:
            released += flight.length
            if flight.state is FlightState.WAITING and flight.cargo is not None:
                written.add(flight.cargo)
            flight.state = FlightState.DROPPED
        tail.flights.clear()
        tail.buffer.take(tail.buffer.length)
        self._release(released)
        self._let_go(written)

    def _kick(self) -> None:
        """Try parked cargos now."""
        now = self._seams.clock.monotonic()
        if now - self._kicked >= KICK_SECONDS:
            self._kicked = now
            self._retry.set()
            self._retry = trio.Event()

    def _release(self, length: int) -> None:
        self.pending -= length
        self._wake_waiters()

    def _wake_waiters(self) -> None:
        self._room.set()
        self._room = trio.Event()

    # ------------------------------------------------------------------------------------------------------------
    # Cutting and gathering

    def name_of(self, owner: int) -> bytes:
        """What a sector's table calls an inode: its path, empty if it has none (any more)."""
        try:
            return (self.path_of(owner) or b"")[:MAX_PATH]
        except FusefsError:
            # Damaged names must not keep bytes from the hosts, nor end the loop that brings them there.
            return b""

    def _load(self, cargo: Cargo, tail: Tail, length: int) -> None:
        flight = Flight(tail, tail.buffer_start, tail.buffer.take(length), length)
        cargo.add(flight, 0)
        tail.flights.append(flight)
        self._buffered -= length
        self._buffered_tails -= not tail.buffer.length

    async def gather(self) -> None:
        """Put every tail in memory into cargos, many files to a sector, each file's bytes together, files of one directory near each
        other. Not those that come meanwhile."""
        open_cargos: dict[str, Cargo] = {}
        for number, tail in enumerate(sorted(self._tails.values(), key=lambda tail: tail.owner), 1):
            if number % BREATH == 0:
                # Not to be cancelled: what is in a cargo flies only once that is dispatched.
                await trio.lowlevel.cancel_shielded_checkpoint()
            length = tail.buffer.length
            if not length or self._tails.get(tail.value_id) is not tail:
                continue
            entry = ENTRY_BYTES + len(self.name_of(tail.owner))
            cargo = open_cargos.get(tail.replication)
            limit = self._sectors.sector_size - TABLE_BYTES
            if cargo is not None and cargo.length + cargo.table_bytes + length + entry > limit:
                self._dispatch(cargo)
                cargo = None
            if cargo is None:
                cargo = open_cargos[tail.replication] = Cargo(tail.replication)
                # From now on a flush waits for it.
                self._cargos.add(cargo)
            self._load(cargo, tail, length)
            cargo.table_bytes += entry
        for cargo in open_cargos.values():
            self._dispatch(cargo)

    def _dispatch(self, cargo: Cargo) -> None:
        self._cargos.add(cargo)
        self._nursery.start_soon(self._fly, cargo)

    # ------------------------------------------------------------------------------------------------------------
    # Flying

    async def _fly(self, cargo: Cargo) -> None:
        """Until the cargo's sector is durable, or nobody needs its bytes any more."""
        delay = RETRY_FIRST
        try:
            while any(flight.state not in (FlightState.DROPPED, FlightState.LANDED) for flight in cargo.flights):
                try:
                    if not self._on_record(cargo):
                        await self._write(cargo)
                    await self._land(cargo)
                    self.trouble = None
                    return
                except Fenced as error:
                    self._park(cargo, error)
                    return
                except FusefsError as error:
                    self._park(cargo, error)
                with trio.move_on_after(delay):
                    await self._retry.wait()
                delay = min(delay * 2, RETRY_LAST)
                self._unpark(cargo)
            # The rest was freed, maybe after some had landed.
            if not any(other.error is not None for other in self._cargos - {cargo}):
                # Nothing is refused any more. Whether hosts have room by now, the next one finds out.
                self.trouble = None
            try:
                if self._on_record(cargo):
                    self._let_go([cargo])
            except FusefsError as error:
                log.warning("sector %d, which nobody needs, stays until the volume is opened again: %s", cargo.sector_id, error)
        finally:
            for flight in cargo.flights:
                if flight.state is FlightState.FLYING:
                    # Cancelled: nobody brings it down any more, and the last commit must not wait for it, but have its bytes.
                    flight.state = FlightState.PARKED
                elif flight.state is FlightState.DROPPED:
                    flight.cargo = None
            self._cargos.discard(cargo)
            cargo.done.set()
            self._wake_waiters()

    async def _write(self, cargo: Cargo) -> None:
        wanted = {flight.tail.replication for flight in cargo.flights if flight.state is not FlightState.DROPPED}
        if len(wanted) == 1:
            # Changed since they were put together, maybe because there are too few hosts for what it was.
            cargo.replication = wanted.pop()
        replication = cargo.replication
        commit = self._store.applied_sequence
        entries: list[TableEntry] = []
        for flight in cargo.flights:
            path = self.name_of(flight.tail.owner)
            entries.append(TableEntry(path, flight.tail.value_id, flight.offset, flight.length, flight.position, commit))
            if len(entries) % BREATH == 0:
                await trio.lowlevel.checkpoint()
        # A dropped flight's bytes go along: positions are fixed, and they are garbage in the sector like any other.
        parts = [part for flight in cargo.flights for part in flight.parts]
        table = encode_table(entries)
        if cargo.length + len(table) > self._sectors.sector_size:
            # Files were renamed to longer paths since they were put together: rather no paths than a sector nobody takes.
            table = encode_table([msgspec.structs.replace(entry, path=b"") for entry in entries])
        sector_id = await self._sectors.allocate_sector(replication)
        # Until every flight has landed, the sector looks emptier than it is; it must not be merged away meanwhile.
        self._sectors.partials.held.add(sector_id)
        # Of an attempt whose record was damaged.
        self._sectors.partials.held.discard(cargo.sector_id)
        cargo.sector_id = sector_id
        try:
            await self._sectors.write_sector(sector_id, [*parts, table], replication)
        except BaseException:
            self._sectors.partials.held.discard(sector_id)
            raise

    def _on_record(self, cargo: Cargo) -> bool:
        """Its sector was written, and another one's damaged record kept it from landing: it is not written once more for that (I7)."""
        if not cargo.sector_id:
            return False
        try:
            self._sectors.record(cargo.sector_id)
        except (NotFound, Corrupt):
            return False
        return True

    def _park(self, cargo: Cargo, error: FusefsError) -> None:
        if self.trouble is None:
            log.warning("what cannot be stored on hosts stays here: %s: %s", counted(cargo.length, "byte"), error)
        self.trouble = error
        cargo.error = error
        for flight in cargo.flights:
            if flight.state is FlightState.FLYING:
                flight.state = FlightState.PARKED
        cargo.done.set()
        self._wake_waiters()

    def _unpark(self, cargo: Cargo) -> None:
        parked = [flight for flight in cargo.flights if flight.state is FlightState.PARKED]
        if cargo.error is None or not parked:
            return
        cargo.error = None
        cargo.done = trio.Event()
        for flight in parked:
            flight.state = FlightState.FLYING

    async def _land(self, cargo: Cargo) -> None:
        """The sector is durable: turn flights into extents, each value's in order (I2), so many at a time.

        The sectors of a full journal have more extents than the part of it that is kept for the commit that points to them could take in
        one (I7): so they are committed while they come down, not when all have.
        """
        refused = False
        for start in range(0, len(cargo.flights), LANDING):
            self._store.empties()
            try:
                # Not tried anew with each part: the answer takes half a minute.
                if not refused:
                    await self._store.catch_up(urgent=True)
            except NoSpace:
                # Only coming down helps: tails that wait to go into the journal are superfluous then, and those in it are let go of.
                refused = True
            # No await from here on: between the look and what is applied.
            stop = start + LANDING
            self._bring_down(cargo, cargo.flights[start:stop], last=stop >= len(cargo.flights))
            if stop < len(cargo.flights):
                await trio.lowlevel.checkpoint()
        self.on_landed()

    def _bring_down(self, cargo: Cargo, flights: Sequence[Flight], *, last: bool) -> None:
        """Some flights of the cargo, `last`: and all others are down. No await: readers see all of it or nothing."""
        # A failed store refuses here, and so does the damaged record of a sector, before anything in memory has changed.
        self._store.apply(Batch())
        # Some may have landed in an attempt before.
        flights = [flight for flight in flights if flight.state not in (FlightState.DROPPED, FlightState.LANDED)]
        if not flights:
            # All were freed meanwhile; perhaps the sector is gone, too.
            if last:
                self._let_go([cargo])
            return
        earlier = {other.cargo for flight in flights for other in flight.tail.flights if other.state is FlightState.WAITING}
        for each in {cargo, *earlier}:
            if each is not None:
                self._sectors.record(each.sector_id)
        for flight in flights:
            flight.state = FlightState.WAITING
        batch = Batch()
        deltas: dict[int, int] = {}
        settled: set[Cargo] = {cargo}
        released = 0
        for flight in flights:
            tail = flight.tail
            landed = False
            misplaced = 0
            while tail.flights and tail.flights[0].state is FlightState.WAITING:
                first = tail.flights[0]
                # Before `sealed` moves: no byte of it needs the journal any more.
                self.mark(tail, max(tail.journaled, first.end))
                del tail.flights[0]
                if first.cargo is None:
                    raise RuntimeError("a waiting flight without cargo")
                extent = Extent(tail.value_id, first.offset, first.cargo.sector_id, first.position, first.length)
                batch.put(extent.key, extent.encode())
                deltas[extent.sector_id] = deltas.get(extent.sector_id, 0) + first.length
                first.state = FlightState.LANDED
                settled.add(first.cargo)
                released += first.length
                if first.cargo.replication != tail.replication:
                    misplaced += first.length
                # They hold each other, and a sector's bytes: nothing of that waits for the collector of cycles.
                first.cargo = None
                tail.sealed = first.end
                landed = True
            if landed:
                batch.put(value_key(tail.value_id), ValueRecord(VERSION, tail.owner, tail.replication, tail.sealed).encode())
                if misplaced:
                    self.on_misplaced(batch, tail.value_id, misplaced)
                if tail.empty:
                    # The invariant of `_tails`: nothing outside of extents, nothing here.
                    self._tails.pop(tail.value_id, None)
        self._sectors.account(batch, deltas)
        self._store.apply(batch)
        self._store.empties()
        self._landed_in = self._store.applied_sequence
        self._release(released)
        if not last:
            # Others of it fly.
            settled.discard(cargo)
        self._let_go(settled)

    def _let_go(self, cargos: Iterable[Cargo]) -> None:
        """Cargos all of whose flights are down may be merged from now on, or, if nothing of them is live, deleted."""
        batch = Batch()
        for cargo in cargos:
            if any(flight.state in (FlightState.FLYING, FlightState.WAITING, FlightState.PARKED) for flight in cargo.flights):
                continue
            if cargo.sector_id not in self._sectors.partials.held:
                continue
            self._sectors.partials.held.discard(cargo.sector_id)
            try:
                live = self._sectors.record(cargo.sector_id).live
            except (NotFound, Corrupt) as error:
                # Whoever frees the last of it has let go of its bytes already, and must not be refused half way.
                log.error("the space of a sector that nobody may need stays: %s", error)
                continue
            if live == 0:
                self._sectors.delete_now(batch, cargo.sector_id)
        if batch.ops:
            self._store.apply(batch)

    async def wait_misplaced(self) -> None:
        """Until what is on its way in sectors of another replication than its value has by now has landed, or was refused."""
        for cargo in list(self._cargos):
            if any(flight.tail.replication != cargo.replication for flight in cargo.flights):
                # Bounded by the time limits of HostIO.
                await cargo.done.wait()

    # ------------------------------------------------------------------------------------------------------------
    # Flush

    async def flush(self, progress: FlushProgress) -> FlushReport:
        """Gather, wait until every cargo has been tried, wait for the last copies, commit. Raises what kept bytes off the hosts."""
        progress.bytes_total = self.pending
        await self.gather()
        goal = set(self._cargos)
        for cargo in goal:
            self._unpark(cargo)
        self._kicked = -KICK_SECONDS
        self._kick()
        # Each once: what is refused is tried again by itself, and while there are several of them, one always is (I7).
        for done in [cargo.done for cargo in goal]:
            await done.wait()
            progress.bytes_done = max(progress.bytes_total - self.pending, progress.bytes_done)
        left = [cargo for cargo in goal if cargo in self._cargos]
        if left:
            await self._store.commit()
            refused = next((cargo.error for cargo in left if cargo.error is not None), self.trouble)
            raise refused or Unavailable("hosts refused what they take now; flush again")
        await self._sectors.wait_uploads(progress)
        await self._store.commit()
        waiting = self._sectors.waiting()
        if waiting:
            # Durable here; whoever flushes wants it to survive this machine.
            raise Unavailable(waiting)
        progress.bytes_done = progress.bytes_total
        degraded = self._sectors.degraded()
        return FlushReport(degraded, tuple(self._sectors.notes) if degraded else ())

    # ------------------------------------------------------------------------------------------------------------
    # Tasks

    async def run(self) -> None:
        """Gather every flush_interval or when memory or the journal asks; look at the hosts' room. Until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._gather_loop)
            nursery.start_soon(self._space_loop)

    def journal_pressure(self) -> None:
        """The journal asks for its oldest tails to be moved out."""
        self._pressed = True
        self._gather.set()

    async def _gather_loop(self) -> None:
        while True:
            with trio.move_on_after(self._flush_interval):
                await self._gather.wait()
            self._gather = trio.Event()
            if self.trouble is None or not self._cargos:
                await self.gather()
            else:
                # What is parked is tried again by itself; more of the same would only make sectors small.
                self._relog()
            if self._pressed and self._store.durable_sequence < self._landed_in:
                self._nursery.start_soon(self._save_landed)
            self._pressed = False
            # At most so often, whatever asks: sectors would become too small.
            await self._seams.clock.sleep(min(0.5, self._flush_interval / 4))

    async def _save_landed(self) -> None:
        """Segments are free again once it is durable that their tails are in sectors; the commit that says so may use the reserve."""
        try:
            await self._store.commit(urgent=True)
        except FusefsError as error:
            log.warning("the journal stays full: %s", error)

    def _relog(self) -> None:
        """Hosts refuse and the journal wants its oldest segment back: the tails that keep it are written to it once more."""
        # Not again before that is durable: commits that find no room would only gather one copy after the other (I7).
        if self._store.journal_fill <= PRESSURE or self._store.durable_sequence < self._relogged_in:
            return
        self._relogged_in = self._store.applied_sequence + 1
        for value_id in dict(self._store.pinned_tails()):
            tail = self._tails.get(value_id)
            if tail is None or not self._store.has_room(
                0, self.spoken_for + tail.journaled - tail.sealed, self.unsafe_tails + 1, RELOG_KEPT
            ):
                # What cannot be written once more stays where it is.
                continue
            self.mark(tail, tail.sealed)

    async def _space_loop(self) -> None:
        while True:
            room = await self._sectors.poll_room(self._default)
            self._low_space = room is not None and room.free < min(SPACE_RESERVE, room.total // 20)
            if isinstance(self.trouble, NoSpace) and not self._low_space:
                self._kick()
            await self._seams.clock.sleep(SPACE_INTERVAL)
