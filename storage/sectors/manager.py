"""SectorManager: sectors out of shards on distinct hosts. See the package's docstring for the picture."""

from __future__ import annotations

import logging
from collections import Counter as Counted
from collections.abc import Mapping, Sequence
from dataclasses import replace

import trio

from storage.errors import BadArgument, Corrupt, Exists, Fenced, FusefsError, NoSpace, NotFound, Unavailable
from storage.host_io import HostIO
from storage.interfaces import Batch, Buffer, FlushProgress, HostSpace, MetadataStore, SealedShard
from storage.metadata.counters import Counter
from storage.metadata.keys import DOUBTED, FRESH, SECTOR, SETTING, UNDERREPLICATED, prefix_end, read_u64, u64
from storage.replication import Replication
from storage.seams import Seams
from storage.sectors.cache import BlockCache
from storage.sectors.deleter import Deleter
from storage.sectors.drain import Drain
from storage.sectors.mending import MOVING
from storage.sectors.partial import PartialIndex
from storage.sectors.placement import Placement
from storage.sectors.reader import SectorReader
from storage.sectors.records import VERSION, SectorRecord, ShardRecord
from storage.sectors.redundancy import Layout, layout_of
from storage.sectors.regenerate import Regenerate
from storage.sectors.shards import ShardReader
from storage.sectors.staging import Staging
from storage.sectors.upload import Upload, Way
from storage.sectors.walking import below_full, walk
from storage.wording import counted

log = logging.getLogger("fusefs.sectors")

_COUNT = SETTING + b"sectors"

#: Sealed shards in memory at most: at 4 MiB each, 48 MiB (I7). A writer beyond it waits.
UPLOADS = 12
#: Sectors whose records `status` looks at each time it is asked.
MAX_LOOKED_AT = 10_000

#: Sectors up to this many bytes are kept in the block cache as they are written: they hold small files and the ends of logs,
#: which are the ones read again soon, and whose last page an appender needs.
KEEP_WRITTEN = 256 * 1024


class SectorManager:
    """See `storage.interfaces.SectorManager`. Tasks run in `nursery`, which belongs to the volume."""

    def __init__(
        self,
        *,
        store: MetadataStore,
        host_io: HostIO,
        placement: Placement,
        reader: SectorReader,
        shards: ShardReader,
        deleter: Deleter,
        cache: BlockCache,
        counter: Counter,
        seams: Seams,
        nursery: trio.Nursery,
        sector_size: int,
        staging: Staging,
        regenerate: Regenerate,
    ) -> None:
        self._store = store
        self._host_io = host_io
        self._placement = placement
        self._reader = reader
        self._deleter = deleter
        self._counter = counter
        self._seams = seams
        self._nursery = nursery
        self._uploads = trio.CapacityLimiter(UPLOADS)
        #: Sectors some shard of which is on its way, each with an event for the end of the last one.
        self._under_way: dict[Upload, trio.Event] = {}
        #: Ids allocated in this process that write_sector was not called with: it takes no others, so a second call raises, also when the
        #: sector has been deleted since, or never came to be (I1).
        #: Each with how many ids follow for its shards, itself included.
        self._unused: dict[int, int] = {}
        self.sector_size = sector_size
        self.cache = cache
        self.partials = PartialIndex(store, sector_size)
        #: Sectors on record; kept in the store with each change, so that nobody ever counts.
        self.count = read_u64(store.get(_COUNT) or bytes(8))
        #: What went wrong lately and was survived, for `status`.
        self.notes = shards.notes
        shards.in_flight = self._in_flight
        self._way = Way(host_io, placement, deleter, store, self._landed, self.notes.add)
        self.staging = staging
        self.drain = Drain(
            staging=staging,
            way=Way(host_io, placement, deleter, store, self._drained, self.notes.add),
            regenerate=regenerate,
            store=store,
            seams=seams,
        )

    # ------------------------------------------------------------------------------------------------------------
    # Reading

    def record(self, sector_id: int) -> SectorRecord:
        """The sector's record; NotFound if there is no such sector."""
        return self._reader.record(sector_id)

    async def read_sector(self, sector_id: int) -> bytes:
        return await self._reader.read_sector(sector_id)

    async def insecure_read_sector_at(self, sector_id: int, offset: int, length: int) -> bytes:
        return await self._reader.read_range(sector_id, offset, length)

    def read_now(self, sector_id: int, offset: int, length: int, *, wait: bool = True) -> Buffer | None:
        return self._reader.read_now(sector_id, offset, length, wait=wait)

    def cached(self, sector_id: int, offset: int) -> bool:
        """True if the byte at `offset` of the sector is in the block cache, or on the local disk."""
        return self._reader.cached(sector_id, offset)

    def prefetch(self, sector_id: int) -> bool:
        """Start bringing a whole sector into the cache, unless it is there or on its way. Never fails; False: not now, ask again."""
        return self._reader.prefetch(sector_id, self._nursery)

    async def fetched(self, sector_id: int) -> None:
        """Until the whole sector is in the cache, if it is on its way there. Bounded as a read of it is."""
        await self._reader.fetched(sector_id)

    def ahead(self, sector_id: int) -> int:
        """How many sectors after this one are worth a prefetch, where somebody reads them one after the other."""
        return self._reader.ahead(sector_id)

    def passed(self, sector_id: int) -> None:
        """A sequential reader has got to the sector's end, and reads on."""
        self._reader.passed(sector_id)

    # ------------------------------------------------------------------------------------------------------------
    # Writing

    async def allocate_sector(self, replication: str = "1") -> int:
        count = layout_of(replication, 0).shards
        sector_id = await self._counter.next_durable(count)
        self._unused[sector_id] = count
        return sector_id

    async def write_sector(self, sector_id: int, data: Buffer | Sequence[Buffer], replication: str) -> None:
        parts: list[Buffer] = [data] if isinstance(data, (bytes, bytearray, memoryview)) else list(data)
        length = sum(len(part) for part in parts)
        layout = layout_of(replication, length)
        if length > self.sector_size:
            raise BadArgument(f"sector {sector_id}: {length} bytes are more than the volume's sector size {self.sector_size}")
        failure = self._store.failure
        if failure is not None:
            # Nothing could ever point to it or delete it: each attempt would stay on the hosts for good.
            raise Fenced(failure)
        # No await between the check and the mark: two writers of one id never both pass (I1).
        if sector_id not in self._unused:
            raise Exists(f"sector {sector_id} is written already, or was not allocated; a sector is written once, allocate another")
        if self._unused[sector_id] < layout.shards:
            raise BadArgument(f"sector {sector_id} was not allocated for replication {replication!r}, whose shards each have an id")
        del self._unused[sector_id]
        # Acquired here, released by whoever ends the last shard: sealed bytes never pile up behind a slow host (I7).
        slot = object()
        try:
            # The usual case, without a checkpoint.
            self._uploads.acquire_on_behalf_of_nowait(slot)
        except trio.WouldBlock:
            await self._uploads.acquire_on_behalf_of(slot)
        upload = Upload(self._way, sector_id, replication, layout, lambda: self._end_upload(upload, slot))
        self._under_way[upload] = trio.Event()
        tried = False
        try:
            shards, plaintexts = await self._seal(sector_id, layout, parts)
            if self._staged_first(layout.spec):
                tried = True
                if await self._stage(sector_id, replication, layout, shards):
                    upload.finish()
                    self._keep_written(shards, plaintexts, layout)
                    return
            upload.start(shards, self._nursery)
        except Unavailable as error:
            upload.finish()
            raise self._refused(error) from error
        except BaseException:
            upload.finish()
            raise
        try:
            await upload.wait_quorum()
        except Unavailable as error:
            if tried or not await self._stage(sector_id, replication, layout, shards):
                raise self._refused(error) from error
        self._keep_written(shards, plaintexts, layout)

    def _keep_written(self, shards: Sequence[SealedShard], plaintexts: Sequence[Sequence[Buffer]], layout: Layout) -> None:
        """What is likely to be read again soon stays in the block cache."""
        if layout.length > KEEP_WRITTEN:
            return
        for shard, buffers in list(zip(shards, plaintexts, strict=True))[: layout.needed]:
            self.cache.put_whole(bytes.fromhex(shard.root), b"".join(buffers))

    def _staged_first(self, spec: Replication) -> bool:
        """Where a host is remote, or too few can be reached. Not while hosts are full: then who writes is to know at once."""
        if not self.staging.files.limit or self.drain.full:
            return False
        try:
            return any(map(self._placement.remote, self._placement.candidates(spec)[: spec.hosts_needed]))
        except Unavailable:
            return True

    async def _stage(self, sector_id: int, replication: str, layout: Layout, shards: Sequence[SealedShard]) -> bool:
        """True: the sector is durable in staging, on record, and goes to its hosts from there (I2)."""
        if not await self.staging.files.take(shards):
            return False
        there = [ShardRecord(shard.sector_id, shard.plaintext_length, bytes.fromhex(shard.root), []) for shard in shards]
        try:
            self._landed(sector_id, replication, layout.length, there, full=False, staged=True)
        except BaseException:
            self.staging.files.release(shards)
            raise
        return True

    def _refused(self, error: Unavailable) -> FusefsError:
        """Why a sector is stored nowhere: neither on hosts nor, for want of room, in staging."""
        staging = self.staging
        if not staging.files.limit or not staging.below:
            return error
        why = staging.files.trouble or f"{staging.files.size:,} of {staging.files.limit:,} bytes are used"
        return NoSpace(f"staging takes no more until hosts do ({why}; {error})")

    async def _seal(self, sector_id: int, layout: Layout, parts: Sequence[Buffer]) -> tuple[list[SealedShard], list[list[Buffer]]]:
        """The shards, sealed, and their plaintexts. Shard i goes under the sector's id + i (I1)."""
        if layout.spec.coded:
            # To encode takes a while, so there is a thread in any case.
            shards, plaintexts = await self._seams.threads.run(self._encode_and_seal, sector_id, layout, parts)
        else:
            plaintexts = layout.plaintexts(sector_id, parts)
            shards = await self._host_io.sealed(plaintexts, sector_id)
        # What is less than half full is soon merged with others.
        lasting = 2 * layout.length > self.sector_size
        return [replace(shard, lasting=lasting) for shard in shards], plaintexts

    def _encode_and_seal(self, sector_id: int, layout: Layout, parts: Sequence[Buffer]) -> tuple[list[SealedShard], list[list[Buffer]]]:
        """Blocking."""
        plaintexts = layout.plaintexts(sector_id, parts)
        return self._host_io.seal_all(plaintexts, sector_id), plaintexts

    async def wait_uploads(self, progress: FlushProgress | None = None) -> None:
        """Until none of the copies that are on their way now is any more. Each has the time limit of HostIO. What is in staging is at write
        quorum, or hosts do not take it."""
        for ended in list(self._under_way.values()):
            await ended.wait()
        self.drain.kick()
        await self.drain.wait(self.staging.entries(), progress or FlushProgress())

    def waiting(self) -> str:
        """What is in staging and on too few hosts, and why; "" if nothing is. What is lost waits for nothing."""
        left = [entry for entry in self.staging.entries() if not entry.reached and entry.sector_id not in self.staging.losses]
        why = self.drain.stalled()
        if not left or not why:
            return ""
        size = sum(entry.to_send for entry in left)
        return f"sectors in {self.staging.path} and not on enough hosts yet: {len(left):,} ({counted(size, 'byte')} to send): {why}"

    def uploading(self, sector_id: int) -> bool:
        """Is some shard of its first upload still on its way, or in staging?"""
        return self.staging.on_its_way(sector_id) or any(upload.sector_id == sector_id for upload in self._under_way)

    def _in_flight(self, sector_id: int, number: int) -> SealedShard | None:
        """For the reader: a shard's sealed bytes while its sector's upload goes on."""
        return next((upload.sealed(number) for upload in self._under_way if upload.sector_id == sector_id), None)

    def _end_upload(self, upload: Upload, slot: object) -> None:
        self._uploads.release_on_behalf_of(slot)
        self._under_way.pop(upload).set()

    # ------------------------------------------------------------------------------------------------------------
    # What is live

    def account(self, batch: Batch, deltas: Mapping[int, int]) -> list[int]:
        """Change the live bytes of sectors, in `batch`. Returns the sectors left with nothing live: the caller deletes them.

        At most one call per sector and batch: it reads the records as they are before the batch.
        """
        dead: list[int] = []
        for sector_id, delta in deltas.items():
            record = self._reader.record(sector_id)
            record.live = max(0, record.live + delta)
            record.data = max(record.data, record.live)
            batch.put(SECTOR + u64(sector_id), record.encode())
            self.partials.update(batch, sector_id, record)
            if record.live == 0:
                # The mark in the same batch: a crash before the deletion leaves it to `drop_fresh`.
                batch.put(FRESH + u64(sector_id), b"")
                dead.append(sector_id)
            elif delta > 0:
                batch.delete(FRESH + u64(sector_id))
        return dead

    def delete_now(self, batch: Batch, sector_id: int) -> None:
        """Forget the sector in `batch`; after the batch is durable its shards are deleted on the hosts (I3)."""
        record = self._reader.record(sector_id)
        batch.delete(SECTOR + u64(sector_id))
        batch.delete(FRESH + u64(sector_id))
        batch.delete(UNDERREPLICATED + u64(sector_id))
        for doubt, _ in self._store.scan(DOUBTED + u64(sector_id), prefix_end(DOUBTED + u64(sector_id)), 1000):
            batch.delete(doubt)
        self.partials.remove(batch, sector_id)
        self._counted(batch, -1)
        self.staging.freed(batch, sector_id, record)
        if any(shard.hosts for shard in record.shards):
            self._deleter.enqueue(batch, sector_id, record)

    def _counted(self, batch: Batch, change: int) -> None:
        self.count += change
        batch.put(_COUNT, u64(self.count))

    async def delete(self, sector_id: int) -> None:
        batch = Batch()
        self.delete_now(batch, sector_id)
        self._store.apply(batch)
        await trio.lowlevel.checkpoint()

    def drop_fresh(self) -> int:
        """At open: sectors that were written and never pointed to are deleted. Returns how many."""
        batch, dropped = Batch(), 0
        for key, _ in self._store.scan(FRESH, prefix_end(FRESH), 100_000):
            try:
                self.delete_now(batch, read_u64(key, 1))
            except (Corrupt, NotFound) as error:
                # Its shards stay: no reason not to open the volume.
                log.error("%s", error)
                continue
            dropped += 1
        self._store.apply(batch)
        return dropped

    def degraded(self, limit: int = 1_000_000) -> int:
        """How many sectors are below full replication."""
        return sum(1 for _, mark in self._store.scan(UNDERREPLICATED, prefix_end(UNDERREPLICATED), limit) if mark != MOVING)

    async def stored_as(self) -> dict[str, int]:
        """How many sectors there are of each replication; empty where they are more than `status` should look at."""
        if self.count > MAX_LOOKED_AT:
            return {}
        return dict(Counted([record.replication async for _, record in walk(self._store)]))

    async def lacking(self) -> int:
        """How many sectors are below full replication, those on their way to their hosts for the first time not counted."""
        found = 0
        async for sector_id in below_full(self._store):
            found += self._store.get(UNDERREPLICATED + u64(sector_id)) not in (None, MOVING) and not self.uploading(sector_id)
        return found

    # ------------------------------------------------------------------------------------------------------------
    # Tasks

    async def poll_room(self, replication: Replication) -> HostSpace | None:
        """Look at the hosts' room now; the room of the one that would be the last to take a copy, None where hosts do not tell."""
        await self._placement.poll_space()
        return self._placement.room(replication)

    async def run(self) -> None:
        """The manager's own loop: deletes freed sectors on their hosts. Runs until cancelled."""
        await self._deleter.run()

    def _landed(
        self, sector_id: int, replication: str, length: int, shards: list[ShardRecord], *, full: bool, staged: bool = False
    ) -> None:
        """Write or rewrite the record after a shard has become durable. No await: one task at a time sees the record."""
        batch = Batch()
        raw = self._store.get(SECTOR + u64(sector_id))
        if raw is None:
            record = SectorRecord(VERSION, replication, length, 0, 0, [])
            self._counted(batch, 1)
            batch.put(FRESH + u64(sector_id), b"")
        else:
            record = self._reader.record(sector_id)
        record.shards = shards
        batch.put(SECTOR + u64(sector_id), record.encode())
        if full and self._placement.keep(host for shard in shards for host in shard.hosts):
            batch.delete(UNDERREPLICATED + u64(sector_id))
            self.staging.settled(batch, sector_id)
        elif full:
            # Some on a host whose contract is ending, for want of another; or it was left, or lost, while they were on their way.
            there = self._placement.present(host for shard in shards for host in shard.hosts)
            batch.put(UNDERREPLICATED + u64(sector_id), MOVING if there else b"")
        else:
            batch.put(UNDERREPLICATED + u64(sector_id), b"")
        if staged:
            self.staging.enter(batch, sector_id, record)
        self._store.apply(batch)

    def settled(self, batch: Batch, sector_id: int) -> None:
        """In the batch that says the sector is at full replication, after it was not."""
        self.staging.settled(batch, sector_id)
        # What `Upload` said of it is not so any more.
        self.notes.settle(sector_id)

    def _drained(self, sector_id: int, replication: str, length: int, shards: list[ShardRecord], *, full: bool) -> None:
        """As `_landed`, for a sector that comes out of staging: it may have been freed meanwhile."""
        if self._store.get(SECTOR + u64(sector_id)) is not None:
            self._landed(sector_id, replication, length, shards, full=full)
        else:
            # A cut that is to be published knows it: the gate keeps its shards until none that is kept does (I3).
            batch = Batch()
            self._deleter.enqueue(batch, sector_id, SectorRecord(VERSION, replication, length, 0, 0, shards))
            self._store.apply(batch)
        self.staging.reached(sector_id)
