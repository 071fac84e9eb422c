"""Reading sectors, whole or in ranges, through the cache, and ahead of who reads one after the other.

Where the bytes of a shard come from is for storage/sectors/shards.py.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import trio

from storage.errors import Corrupt, FusefsError, NotFound, Unavailable
from storage.host_io import HostIO
from storage.hosts.hostdb import HostDB
from storage.interfaces import Buffer, MetadataReader
from storage.metadata.keys import SECTOR, u64
from storage.sealing import BLOCK, block_count
from storage.sectors.cache import WHOLE, BlockCache
from storage.sectors.records import SectorRecord, ShardRecord, decode_sector, layout_for
from storage.sectors.redundancy import Layout, Part
from storage.sectors.shards import SOON, TOGETHER, ShardReader
from storage.sectors.strays import Strays

log = logging.getLogger("fusefs.sectors")

B = TypeVar("B", bound=Buffer)

#: Sectors being prefetched at once: less than the slots of a directory, so that who wants a block does not wait for all of them.
PREFETCHES = 5
#: Of those from one disk of this machine: one is read, one is opened, and one is on its way there or back. With more of them all come
#: later, the first of a stream as well, and all of their memory is touched for the first time.
AT_ONCE = 3
#: Sectors fetched ahead of a sequential reader; and from a disk of this machine where threads of this process open them, which take
#: turns for the interpreter's lock: the event loop wants it as well, and two keep the disk busy.
AHEAD = 4
AHEAD_NEAR = 2
#: Sectors whose roots are remembered; about 10 MB.
ROOTS = 65536
#: Sectors whose records are kept as they were decoded; less than 1 MB.
RECORDS = 1024


@dataclass(slots=True)
class _Lane:
    """Sectors that are to be brought from one host, and how many tasks are at it."""

    #: Each with its record and the shards that hold data, in the order in which they are wanted: trio starts tasks in any order, and who
    #: reads waits for the first.
    wanted: deque[tuple[int, SectorRecord, list[int]]] = field(default_factory=deque)
    tasks: int = 0


class SectorReader:
    """Serves ranges and whole sectors. Keeps no state but the cache and what is being fetched."""

    def __init__(self, store: MetadataReader, host_io: HostIO, hostdb: HostDB, cache: BlockCache, shards: ShardReader) -> None:
        self._store = store
        self._host_io = host_io
        self._hostdb = hostdb
        self._cache = cache
        self._shards = shards
        #: Sector -> the root of its one shard, b"" where it has several, and its length. None of it ever changes.
        self._roots: dict[int, tuple[bytes, int]] = {}
        #: Sector -> its record as it was decoded last, and what it was decoded from.
        self._records: dict[int, tuple[bytes, SectorRecord]] = {}
        #: Whole sectors on their way into the cache: others who want a block of one wait for it instead of asking again.
        self._fetching: dict[int, trio.Event] = {}
        #: By the host that is asked first, so that none waits for another that hangs.
        self._lanes: dict[int, _Lane] = {}
        #: Shards that no record says where they are; None: there are none.
        self.strays: Strays | None = None

    def record(self, sector_id: int) -> SectorRecord:
        raw = self._store.get(SECTOR + u64(sector_id))
        if raw is None:
            raise NotFound(f"sector {sector_id} does not exist")
        return decode_sector(raw, sector_id)

    def _same_record(self, sector_id: int) -> SectorRecord:
        """As `record`, decoded only if it has changed. Whoever gets it changes nothing in it."""
        raw = self._store.get(SECTOR + u64(sector_id))
        known = self._records.get(sector_id)
        if known is not None and known[0] == raw:
            return known[1]
        record = self.record(sector_id)
        if raw is not None:
            if len(self._records) >= RECORDS:
                self._records.clear()
            self._records[sector_id] = (raw, record)
        return record

    async def _located(self, sector_id: int) -> SectorRecord:
        record = self.record(sector_id)
        if self.strays is None or not self.strays.is_stray(record):
            return record
        return await self.strays.locate(sector_id, record)

    def cached(self, sector_id: int, offset: int) -> bool:
        try:
            record = self.record(sector_id)
        except NotFound:
            return False
        if offset >= record.length:
            return False
        (part,) = layout_for(record, sector_id).locate(offset, 1)
        root = record.shards[part.shard].root
        return (root, part.offset // BLOCK) in self._cache or self._shards.is_staged(root)

    def read_now(self, sector_id: int, offset: int, length: int, *, wait: bool = True) -> Buffer | None:
        """A range that lies within a sector that is one shard, out of the cache or, with `wait`, at once from a disk; None: not so, or not
        there."""
        known = self._roots.get(sector_id)
        if known is None:
            raw = self._store.get(SECTOR + u64(sector_id))
            if raw is None:
                return None
            record = decode_sector(raw, sector_id)
            known = (record.shards[0].root if len(record.shards) == 1 else b"", record.length)
            if len(self._roots) >= ROOTS:
                self._roots.clear()
            self._roots[sector_id] = known
        root, end = known
        # Behind the sector stands its label.
        if not root or offset + length > end:
            return None
        found = self._cache.read(root, offset, length)
        return self._read_at_once(sector_id, offset, length) if found is None and wait else found

    def _read_at_once(self, sector_id: int, offset: int, length: int) -> bytes | None:
        """Of a sector that is one shard: from a disk that answers while one waits for it; what it was asked for is cached."""
        first, last = offset // BLOCK, (offset + length - 1) // BLOCK
        if length <= 0 or last - first >= SOON or sector_id in self._fetching:
            return None
        try:
            record = self._same_record(sector_id)
        except (NotFound, Corrupt):
            return None
        host = self._shards.soon_from(sector_id, record, 0)
        if host is None:
            return None
        shard = record.shards[0]
        blocks = self._host_io.quick.read_at_once(host, shard.root.hex(), shard.shard_id, shard.length, first, last + 1 - first)
        if blocks is None:
            return None
        for block, plain in enumerate(blocks, first):
            self._cache.put(shard.root, block, plain)
        self._cache.statistics.misses += len(blocks)
        begin = offset - first * BLOCK
        if first == last:
            return blocks[0][begin : begin + length]
        if begin:
            blocks[0] = blocks[0][begin:]
        blocks[-1] = blocks[-1][: offset + length - last * BLOCK]
        return b"".join(blocks)

    async def read_sector(self, sector_id: int) -> bytes:
        """The whole sector, each shard from the first host whose copy verifies, or else made of others."""
        record = await self._located(sector_id)
        layout = layout_for(record, sector_id)
        parts = layout.whole()
        if len(parts) == 1:
            plain = await self._shards.read_shard(sector_id, record, 0)
            return memoryview(plain)[: record.length].tobytes()
        plains = await _together([partial(self._shards.read_shard, sector_id, record, part.shard) for part in parts])
        views = [memoryview(plain)[part.offset : part.offset + part.length] for plain, part in zip(plains, parts, strict=True)]
        return b"".join(views)

    async def read_range(self, sector_id: int, offset: int, length: int) -> bytes:
        """Bytes [offset, offset + length) of the sector, clipped, block by block from the cache or one request per gap."""
        record = await self._located(sector_id)
        if offset < 0 or length <= 0 or offset >= record.length:
            return b""
        layout = layout_for(record, sector_id)
        parts = layout.locate(offset, min(length, record.length - offset))
        pending = self._fetching.get(sector_id)
        if pending is not None and not all(self._has(record.shards[part.shard], part) for part in parts):
            await pending.wait()
        if len(parts) == 1:
            return await self._read_part(sector_id, record, layout, parts[0])
        return b"".join(await _together([partial(self._read_part, sector_id, record, layout, part) for part in parts]))

    def _has(self, shard: ShardRecord, part: Part) -> bool:
        if (shard.root, WHOLE) in self._cache:
            return True
        first, last = part.offset // BLOCK, (part.offset + part.length - 1) // BLOCK
        return all((shard.root, block) in self._cache for block in range(first, last + 1))

    async def _read_part(self, sector_id: int, record: SectorRecord, layout: Layout, part: Part) -> bytes:
        """A range of one shard's plaintext."""
        root = record.shards[part.shard].root
        plain = self._cache.whole(root)
        if plain is not None:
            return bytes(memoryview(plain)[part.offset : part.offset + part.length])
        first, last = part.offset // BLOCK, (part.offset + part.length - 1) // BLOCK
        blocks: dict[int, Buffer] = {}
        missing: list[int] = []
        for block in range(first, last + 1):
            found = self._cache.get(root, block)
            if found is None:
                missing.append(block)
            else:
                blocks[block] = found
        for start, count in _runs(missing):
            start, plain = await self._fetch_about(sector_id, record, layout, part.shard, start, count)
            for at in range(0, len(plain), BLOCK):
                block = start + at // BLOCK
                # Of its own: a view would keep all that came with it.
                blocks[block] = piece = bytes(plain[at : at + BLOCK])
                self._cache.put(root, block, piece)
        begin = part.offset - first * BLOCK
        if first == last:
            return bytes(blocks[first][begin : begin + part.length])
        return b"".join([blocks[block] for block in range(first, last + 1)])[begin : begin + part.length]

    async def _fetch_about(
        self, sector_id: int, record: SectorRecord, layout: Layout, number: int, first: int, count: int
    ) -> tuple[int, Buffer]:
        """As `ShardReader.fetch`; with blocks beside them where these come along for little. The first is told."""
        shard = record.shards[number]
        if not self._shards.at_hand(shard):
            start = first // TOGETHER * TOGETHER
            end = min(-(-(first + count) // TOGETHER) * TOGETHER, block_count(shard.length))
            if end - start > count:
                try:
                    return start, await self._shards.fetch(sector_id, record, layout, number, start, end - start)
                except (Corrupt, Unavailable):
                    # Maybe only of what nobody has asked for, which cannot be made again now.
                    pass
        return first, await self._shards.fetch(sector_id, record, layout, number, first, count)

    async def fetched(self, sector_id: int) -> None:
        """Until the sector is not on its way into the cache any more. Not a checkpoint where it is not."""
        pending = self._fetching.get(sector_id)
        if pending is not None:
            await pending.wait()

    def passed(self, sector_id: int) -> None:
        """A sequential reader has got to the sector's end, and reads on. It need not stay where it is quickly had again: on a disk here."""
        try:
            shards = self.record(sector_id).shards
        except (NotFound, Corrupt):
            return
        for shard in shards:
            if self._shards.near(shard):
                self._cache.passed(shard.root)

    def ahead(self, sector_id: int) -> int:
        """How many sectors after this one are worth a prefetch for a sequential reader. By what the metadata says of it alone."""
        try:
            shards = self.record(sector_id).shards
        except (NotFound, Corrupt):
            return AHEAD
        return AHEAD_NEAR if not self._host_io.beside and all(self._shards.near(shard) for shard in shards) else AHEAD

    def prefetch(self, sector_id: int, nursery: trio.Nursery) -> bool:
        """Bring a whole sector into the cache in the background. False: not now, since too many are on their way."""
        if sector_id in self._fetching:
            return True
        if len(self._fetching) >= PREFETCHES:
            return False
        try:
            record = self.record(sector_id)
            parts = layout_for(record, sector_id).whole()
        except (NotFound, Corrupt):
            return True
        if record.length * 4 > self._cache.limit or all(self._has(record.shards[part.shard], part) for part in parts):
            return True
        self._fetching[sector_id] = trio.Event()
        hosts = record.shards[parts[0].shard].hosts
        lane = self._lanes.setdefault(self._hostdb.rank(hosts)[0] if hosts else 0, _Lane())
        lane.wanted.append((sector_id, record, [part.shard for part in parts]))
        if lane.tasks < (AT_ONCE if all(self._shards.near(shard) for shard in record.shards) else PREFETCHES):
            lane.tasks += 1
            nursery.start_soon(self._bring_all, lane)
        return True

    async def _bring_all(self, lane: _Lane) -> None:
        """What is wanted, one after the other, for as long as there is anything."""
        try:
            while lane.wanted:
                await self._bring(*lane.wanted.popleft())
        finally:
            lane.tasks -= 1
            if not lane.tasks:
                # Cancelled: nobody brings them any more, and nobody is to wait for it.
                while lane.wanted:
                    self._fetching.pop(lane.wanted.popleft()[0]).set()

    async def _bring(self, sector_id: int, record: SectorRecord, shards: list[int]) -> None:
        try:
            record = await self._located(sector_id)
            layout = layout_for(record, sector_id)
            # By its blocks' tags alone: hashing all of it again would tell nothing more of what is read, and take a third of the time.
            counts = [block_count(record.shards[shard].length) for shard in shards]
            fetch = partial(self._shards.fetch, sector_id, record, layout)
            plains = await _together([partial(fetch, shard, 0, count) for shard, count in zip(shards, counts, strict=True)])
            for shard, plain in zip(shards, plains, strict=True):
                self._cache.put_whole(record.shards[shard].root, plain)
        except FusefsError as error:
            # Whoever needs the bytes asks for them and gets the error then.
            log.info("read-ahead of sector %d failed: %s", sector_id, error)
        finally:
            self._fetching.pop(sector_id).set()


async def _together(reads: Sequence[Callable[[], Awaitable[B]]]) -> list[B]:
    """All at once; the first error, if any has one, once all have ended."""
    if len(reads) == 1:
        return [await reads[0]()]
    results: dict[int, B] = {}
    errors: list[FusefsError] = []

    async def one(at: int) -> None:
        try:
            results[at] = await reads[at]()
        except FusefsError as error:
            errors.append(error)

    async with trio.open_nursery() as nursery:
        for at in range(len(reads)):
            nursery.start_soon(one, at)
    if errors:
        raise errors[0]
    return [results[at] for at in range(len(reads))]


def _runs(blocks: list[int]) -> list[tuple[int, int]]:
    """Ascending block numbers as (first, count) of contiguous runs."""
    runs: list[tuple[int, int]] = []
    for block in blocks:
        if runs and runs[-1][0] + runs[-1][1] == block:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((block, 1))
    return runs
