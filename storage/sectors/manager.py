"""SectorManager: sectors out of copies on distinct hosts. See the package's docstring for the picture."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence

import trio

from storage.errors import BadArgument, Corrupt, Exists, Fenced, FusefsError, NoSpace, NotFound, Unavailable
from storage.host_io import HostIO
from storage.interfaces import Batch, Buffer, HostSpace, MetadataStore, SealedShard
from storage.metadata.counters import Counter
from storage.metadata.keys import FRESH, SECTOR, SETTING, UNDERREPLICATED, prefix_end, read_u64, u64
from storage.replication import Replication, parse_replication
from storage.sealing import BLOCK
from storage.seams import Seams
from storage.sectors.cache import BlockCache
from storage.sectors.deleter import Deleter
from storage.sectors.partial import PartialIndex
from storage.sectors.placement import Placement
from storage.sectors.reader import SectorReader
from storage.sectors.reconcile import MOVING
from storage.sectors.records import VERSION, SectorRecord, ShardRecord, encode_preamble

log = logging.getLogger("fusefs.sectors")

_COUNT = SETTING + b"sectors"

#: Sealed shards in memory at most: at 4 MiB each, 48 MiB (I7). A writer beyond it waits.
UPLOADS = 12

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
        deleter: Deleter,
        cache: BlockCache,
        counter: Counter,
        seams: Seams,
        nursery: trio.Nursery,
        sector_size: int,
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
        #: Sectors some copy of which is on its way, each with an event for the end of the last one.
        self._under_way: dict[_Upload, trio.Event] = {}
        #: Ids allocated in this process that write_sector was not called with: it takes no others, so a second call raises, also when the
        #: sector has been deleted since, or never came to be (I1).
        self._unused: set[int] = set()
        self.sector_size = sector_size
        self.cache = cache
        self.partials = PartialIndex(store, sector_size)
        #: Sectors on record; kept in the store with each change, so that nobody ever counts.
        self.count = read_u64(store.get(_COUNT) or bytes(8))
        #: What went wrong lately and was survived, for `status`.
        self.notes: deque[str] = reader.notes

    # ------------------------------------------------------------------------------------------------------------
    # Reading

    def record(self, sector_id: int) -> SectorRecord:
        """The sector's record; NotFound if there is no such sector."""
        return self._reader.record(sector_id)

    async def read_sector(self, sector_id: int) -> bytes:
        return await self._reader.read_sector(sector_id)

    async def insecure_read_sector_at(self, sector_id: int, offset: int, length: int) -> bytes:
        return await self._reader.read_range(sector_id, offset, length)

    def cached(self, sector_id: int, offset: int) -> bool:
        """True if the byte at `offset` of the sector is in the block cache."""
        return self._reader.cached(sector_id, offset)

    def prefetch(self, sector_id: int) -> None:
        """Start bringing a whole sector into the cache, unless it is there or on its way. Never fails."""
        self._reader.prefetch(sector_id, self._nursery)

    # ------------------------------------------------------------------------------------------------------------
    # Writing

    async def allocate_sector(self) -> int:
        sector_id = await self._counter.next_durable()
        self._unused.add(sector_id)
        return sector_id

    async def write_sector(self, sector_id: int, data: Buffer | Sequence[Buffer], replication: str) -> None:
        spec = parse_replication(replication)
        if spec.coded:
            raise BadArgument(f"replication {replication!r}: data+parity is not supported by this version, use a number of copies")
        parts: list[Buffer] = [data] if isinstance(data, (bytes, bytearray, memoryview)) else list(data)
        length = sum(len(part) for part in parts)
        if length > self.sector_size:
            raise BadArgument(f"sector {sector_id}: {length} bytes are more than the volume's sector size {self.sector_size}")
        failure = self._store.failure
        if failure is not None:
            # Nothing could ever point to it or delete it: each attempt would stay on the hosts for good.
            raise Fenced(failure)
        # No await between the check and the mark: two writers of one id never both pass (I1).
        if sector_id not in self._unused:
            raise Exists(f"sector {sector_id} is written already, or was not allocated; a sector is written once, allocate another")
        self._unused.remove(sector_id)
        # Acquired here, released by whoever ends the last copy: sealed bytes never pile up behind a slow host (I7).
        slot = object()
        await self._uploads.acquire_on_behalf_of(slot)
        upload = _Upload(self, slot, sector_id, length, spec, replication)
        try:
            preamble = encode_preamble(sector_id, length)
            shard = await self._seams.threads.run(self._host_io.seal, [preamble, *parts], sector_id)
            upload.start(shard, self._nursery)
        except BaseException:
            upload.finish()
            raise
        await upload.wait_quorum()
        if length <= KEEP_WRITTEN:
            plain = b"".join([preamble, *parts])
            root = bytes.fromhex(shard.root)
            for block in range(0, len(plain), BLOCK):
                self.cache.put(root, block // BLOCK, plain[block : block + BLOCK])

    async def wait_uploads(self) -> None:
        """Until none of the copies that are on their way now is any more. Each has the time limit of HostIO."""
        for ended in list(self._under_way.values()):
            await ended.wait()

    def uploading(self, sector_id: int) -> bool:
        """Is some shard of its first upload still on its way?"""
        return any(upload.sector_id == sector_id for upload in self._under_way)

    def _begin_upload(self, upload: _Upload) -> None:
        self._under_way[upload] = trio.Event()

    def _end_upload(self, upload: _Upload, slot: object) -> None:
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
        self.partials.remove(batch, sector_id)
        self._counted(batch, -1)
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

    # ------------------------------------------------------------------------------------------------------------
    # Tasks

    async def poll_room(self, replication: Replication) -> HostSpace | None:
        """Look at the hosts' room now; the room of the one that would be the last to take a copy, None where hosts do not tell."""
        await self._placement.poll_space()
        return self._placement.room(replication)

    async def run(self) -> None:
        """The manager's own loop: deletes freed sectors on their hosts. Runs until cancelled."""
        await self._deleter.run()

    def _landed(self, sector_id: int, shard: SealedShard, spec: str, length: int, hosts: list[int], full: bool) -> None:
        """Write or rewrite the record after a copy has become durable. No await: one task at a time sees the record."""
        batch = Batch()
        raw = self._store.get(SECTOR + u64(sector_id))
        if raw is None:
            record = SectorRecord(VERSION, spec, length, 0, 0, [])
            self._counted(batch, 1)
            batch.put(FRESH + u64(sector_id), b"")
        else:
            record = self._reader.record(sector_id)
        record.shards = [ShardRecord(shard.sector_id, shard.plaintext_length, bytes.fromhex(shard.root), sorted(hosts))]
        batch.put(SECTOR + u64(sector_id), record.encode())
        if full:
            batch.delete(UNDERREPLICATED + u64(sector_id))
        else:
            batch.put(UNDERREPLICATED + u64(sector_id), b"")
        self._store.apply(batch)


class _Upload:
    """One sector on its way to its hosts: as many at a time as there are copies, the next host after a failure."""

    def __init__(self, manager: SectorManager, slot: object, sector_id: int, length: int, spec: Replication, replication: str) -> None:
        self._manager = manager
        self._slot = slot
        self.sector_id = sector_id
        self._length = length
        self._spec = spec
        self._replication = replication
        self._done: list[int] = []
        self._errors: list[FusefsError] = []
        self._running = 0
        self._decided = trio.Event()
        self._quorum = False
        self._finished = False
        manager._begin_upload(self)

    def start(self, shard: SealedShard, nursery: trio.Nursery) -> None:
        self._shard = shard
        self._left = self._manager._placement.candidates(self._spec)
        self._running = min(self._spec.copies, len(self._left))
        for contract in [self._left.pop(0) for _ in range(self._running)]:
            nursery.start_soon(self._copy, contract.contract_id, contract.host_number)

    async def wait_quorum(self) -> None:
        """Returns at write quorum; raises what kept it from being reached."""
        await self._decided.wait()
        if self._quorum:
            return
        for error in self._errors:
            if isinstance(error, Fenced):
                raise error
        if any(isinstance(error, NoSpace) for error in self._errors):
            raise NoSpace(f"sector {self.sector_id}: hosts are full ({'; '.join(map(str, self._errors))}); free space or add a host")
        raise Unavailable(f"sector {self.sector_id}: too few hosts took it ({'; '.join(map(str, self._errors))})")

    async def _copy(self, contract_id: str, host: int) -> None:
        try:
            while True:
                try:
                    await self._manager._host_io.write_sealed(contract_id, self._shard)
                    self._stored(host)
                    return
                except FusefsError as error:
                    self._errors.append(error)
                    log.warning("sector %d: host %d did not take a copy: %s", self.sector_id, host, error)
                    if not self._left or isinstance(error, Fenced):
                        return
                    following = self._left.pop(0)
                    contract_id, host = following.contract_id, following.host_number
        finally:
            self._running -= 1
            if not self._running:
                self.finish()

    def _stored(self, host: int) -> None:
        self._done.append(host)
        if len(self._done) < self._spec.write_quorum:
            return
        # After quorum the sector may have been freed already, while this copy was on its way: then it goes the way of the others.
        if self._quorum and self._manager._store.get(SECTOR + u64(self.sector_id)) is None:
            record = SectorRecord(VERSION, self._replication, self._length, 0, 0, [self._as_record([host])])
            batch = Batch()
            self._manager._deleter.enqueue(batch, self.sector_id, record)
            self._manager._store.apply(batch)
            return
        full = len(self._done) >= self._spec.copies
        self._manager._landed(self.sector_id, self._shard, self._replication, self._length, self._done, full)
        self._quorum = True
        self._decided.set()

    def _as_record(self, hosts: list[int]) -> ShardRecord:
        return ShardRecord(self._shard.sector_id, self._shard.plaintext_length, bytes.fromhex(self._shard.root), hosts)

    def finish(self) -> None:
        """No copy is on its way any more."""
        if self._finished:
            return
        self._finished = True
        if not self._quorum and self._done:
            # Nothing points to these: they are deleted, like a freed sector's.
            batch = Batch()
            record = SectorRecord(VERSION, self._replication, self._length, 0, 0, [self._as_record(self._done)])
            self._manager._deleter.enqueue(batch, self.sector_id, record)
            try:
                self._manager._store.apply(batch)
            except FusefsError as error:
                log.warning("sector %d: copies that nothing points to stay on their hosts: %s", self.sector_id, error)
        elif self._quorum and len(self._done) < self._spec.copies:
            self._manager.notes.append(
                f"sector {self.sector_id} has {len(self._done)} of {self._spec.copies} copies: {'; '.join(map(str, self._errors))}"
            )
        self._decided.set()
        self._manager._end_upload(self, self._slot)
