"""Reading sectors: cache, sealed bytes that are on their way to a host, best host first, the next one on failure."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import trio

from storage.contractor import Contractor
from storage.errors import Corrupt, FusefsError, NotFound, Unavailable
from storage.host_io import HostIO
from storage.hosts.hostdb import HostDB
from storage.interfaces import MetadataReader, SealedShard
from storage.metadata.keys import SECTOR, u64
from storage.sealing import BLOCK
from storage.seams import Seams
from storage.sectors.cache import BlockCache
from storage.sectors.preamble import PREAMBLE_SIZE
from storage.sectors.records import SectorRecord, ShardRecord, decode_sector, layout_for
from storage.sectors.redundancy import Layout, Part

log = logging.getLogger("fusefs.sectors")

_Read = Callable[[str], Awaitable[bytes]]

#: Sectors being prefetched at once.
PREFETCHES = 4


class SectorReader:
    """Serves ranges and whole sectors. Keeps no state but the cache and what is being fetched."""

    def __init__(
        self, store: MetadataReader, host_io: HostIO, contractor: Contractor, hostdb: HostDB, cache: BlockCache, seams: Seams
    ) -> None:
        self._store = store
        self._host_io = host_io
        self._contractor = contractor
        self._hostdb = hostdb
        self._cache = cache
        self._seams = seams
        #: Whole sectors on their way into the cache: others who want a block of one wait for it instead of asking again.
        self._fetching: dict[int, trio.Event] = {}
        #: The sealed bytes of a shard (sector id, number) that is still on its way to a host, for as long as they are in memory anyhow. At
        #: write quorum a sector can be read, and some of its shards are nowhere yet: without this, reading one of k+m would touch k hosts.
        self.in_flight: Callable[[int, int], SealedShard | None] = lambda _sector_id, _number: None
        self.notes: deque[str] = deque(maxlen=50)

    def record(self, sector_id: int) -> SectorRecord:
        raw = self._store.get(SECTOR + u64(sector_id))
        if raw is None:
            raise NotFound(f"sector {sector_id} does not exist")
        return decode_sector(raw, sector_id)

    def cached(self, sector_id: int, offset: int) -> bool:
        try:
            record = self.record(sector_id)
        except NotFound:
            return False
        if offset >= record.length:
            return False
        (part,) = layout_for(record, sector_id).locate(offset, 1)
        return (record.shards[part.shard].root, part.offset // BLOCK) in self._cache

    async def read_sector(self, sector_id: int) -> bytes:
        """The whole sector, each shard from the first host whose copy verifies, or else made of others."""
        record = self.record(sector_id)
        layout = layout_for(record, sector_id)
        parts = layout.whole()
        if len(parts) == 1:
            plain = await self.read_shard(sector_id, record, 0)
            return memoryview(plain)[PREAMBLE_SIZE : PREAMBLE_SIZE + record.length].tobytes()
        plains = await _together([partial(self.read_shard, sector_id, record, part.shard) for part in parts])
        views = [memoryview(plain)[part.offset : part.offset + part.length] for plain, part in zip(plains, parts, strict=True)]
        return b"".join(views)

    async def read_range(self, sector_id: int, offset: int, length: int) -> bytes:
        """Bytes [offset, offset + length) of the sector, clipped, block by block from the cache or one request per gap."""
        record = self.record(sector_id)
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
        first, last = part.offset // BLOCK, (part.offset + part.length - 1) // BLOCK
        return all((shard.root, block) in self._cache for block in range(first, last + 1))

    async def _read_part(self, sector_id: int, record: SectorRecord, layout: Layout, part: Part) -> bytes:
        """A range of one shard's plaintext."""
        root = record.shards[part.shard].root
        first, last = part.offset // BLOCK, (part.offset + part.length - 1) // BLOCK
        blocks: dict[int, bytes] = {}
        missing: list[int] = []
        for block in range(first, last + 1):
            found = self._cache.get(root, block)
            if found is None:
                missing.append(block)
            else:
                blocks[block] = found
        for start, count in _runs(missing):
            plain = await self._fetch(sector_id, record, layout, part.shard, start, count)
            for i in range(count):
                blocks[start + i] = piece = plain[i * BLOCK : (i + 1) * BLOCK]
                self._cache.put(root, start + i, piece)
        begin = part.offset - first * BLOCK
        if first == last:
            return blocks[first][begin : begin + part.length]
        return b"".join([blocks[block] for block in range(first, last + 1)])[begin : begin + part.length]

    def prefetch(self, sector_id: int, nursery: trio.Nursery) -> None:
        """Bring a whole sector into the cache in the background."""
        if sector_id in self._fetching or len(self._fetching) >= PREFETCHES:
            return
        try:
            record = self.record(sector_id)
            parts = layout_for(record, sector_id).whole()
        except (NotFound, Corrupt):
            return
        if record.length * 4 > self._cache.limit or all(self._has(record.shards[part.shard], part) for part in parts):
            return
        self._fetching[sector_id] = trio.Event()
        nursery.start_soon(self._prefetch, sector_id, record, [part.shard for part in parts])

    async def _prefetch(self, sector_id: int, record: SectorRecord, shards: list[int]) -> None:
        try:
            plains = await _together([partial(self.read_shard, sector_id, record, shard) for shard in shards])
            for shard, plain in zip(shards, plains, strict=True):
                for block in range(-(-len(plain) // BLOCK)):
                    self._cache.put(record.shards[shard].root, block, plain[block * BLOCK : (block + 1) * BLOCK])
        except FusefsError as error:
            # Whoever needs the bytes asks for them and gets the error then.
            log.info("read-ahead of sector %d failed: %s", sector_id, error)
        finally:
            self._fetching.pop(sector_id).set()

    # ---- one shard

    async def read_shard(self, sector_id: int, record: SectorRecord, number: int) -> bytes:
        """A whole shard's plaintext: as stored, its root verified, or made of others. Corrupt, Unavailable."""
        layout = layout_for(record, sector_id)
        try:
            return await self._stored_shard(sector_id, record, layout, number)
        except (Corrupt, Unavailable) as error:
            return await self._rebuild(
                sector_id, record, layout, number, 0, lambda other: self._stored_shard(sector_id, record, layout, other), error
            )

    async def _stored_shard(self, sector_id: int, record: SectorRecord, layout: Layout, number: int) -> bytes:
        shard = record.shards[number]
        sealed = self.in_flight(sector_id, number)
        if sealed is not None:
            return await self._host_io.open_part(sealed, 0, shard.length)

        async def whole(contract_id: str) -> bytes:
            plain = await self._host_io.read(contract_id, shard.root.hex(), shard.shard_id)
            layout.check(sector_id, number, plain)
            return plain

        return await self._from_best_host(sector_id, shard, whole)

    async def _fetch(self, sector_id: int, record: SectorRecord, layout: Layout, number: int, first: int, count: int) -> bytes:
        """Blocks of a shard's plaintext, from a host that has it, or the same blocks of others made into them."""
        try:
            return await self._stored_blocks(sector_id, record, number, first, count)
        except (Corrupt, Unavailable) as error:
            return await self._rebuild(
                sector_id,
                record,
                layout,
                number,
                first * BLOCK,
                lambda other: self._stored_blocks(sector_id, record, other, first, count),
                error,
            )

    async def _stored_blocks(self, sector_id: int, record: SectorRecord, number: int, first: int, count: int) -> bytes:
        shard = record.shards[number]
        wanted = min(count * BLOCK, shard.length - first * BLOCK)
        sealed = self.in_flight(sector_id, number)
        if sealed is not None:
            return await self._host_io.open_part(sealed, first * BLOCK, wanted)

        async def part(contract_id: str) -> bytes:
            plain = await self._host_io.insecure_read(
                contract_id, shard.root.hex(), shard.shard_id, first * BLOCK, wanted, plaintext_length=shard.length
            )
            if len(plain) != wanted:
                raise Corrupt(f"sector {sector_id}: {len(plain)} bytes where {wanted} should be")
            return plain

        return await self._from_best_host(sector_id, shard, part)

    async def _rebuild(
        self,
        sector_id: int,
        record: SectorRecord,
        layout: Layout,
        number: int,
        first: int,
        read: Callable[[int], Awaitable[bytes]],
        error: FusefsError,
    ) -> bytes:
        """Bytes of a shard from `first` on that cannot be read, from what `read` reads of as many others as it takes; else `error`."""
        left = self._best_first(record, number)
        if len(left) < layout.needed:
            raise error
        found: dict[int, bytes] = {}
        errors: list[FusefsError] = [error]

        async def one() -> None:
            while left:
                other = left.pop(0)
                try:
                    found[other] = await read(other)
                except FusefsError as failed:
                    errors.append(failed)
                    continue
                return

        async with trio.open_nursery() as nursery:
            for _ in range(layout.needed):
                nursery.start_soon(one)
        if len(found) < layout.needed:
            kind = Corrupt if all(isinstance(each, Corrupt) for each in errors) else Unavailable
            said = "; ".join(dict.fromkeys(map(str, errors)))
            raise kind(f"sector {sector_id}: {len(found)} of its shards can be read, {layout.needed} are needed ({said})")
        return await self._seams.threads.run(layout.rebuild, sector_id, number, first, found)

    def _best_first(self, record: SectorRecord, number: int) -> list[int]:
        """The other shards, those on the best hosts first."""
        of_host = {host: other for other, shard in enumerate(record.shards) if other != number for host in shard.hosts}
        return list(dict.fromkeys(of_host[host] for host in self._hostdb.rank(of_host)))

    async def _from_best_host(self, sector_id: int, shard: ShardRecord, read: _Read) -> bytes:
        """The first good answer. Corrupt if some copy was there and none verified, else Unavailable; both name every host and reason."""
        reasons: list[str] = []
        corrupt = False
        for host in self._hostdb.rank(shard.hosts):
            contract = self._contractor.contract_for(host)
            if contract is None:
                reasons.append(f"host {host} has no contract")
                continue
            try:
                result = await read(contract.contract_id)
            except FusefsError as error:
                corrupt = corrupt or isinstance(error, Corrupt | NotFound)
                reasons.append(f"host {host}: {error}")
                note = f"sector {sector_id}: copy on host {host} could not be used: {error}"
                log.warning("%s", note)
                if note not in self.notes:
                    self.notes.append(note)
                continue
            return result
        kind = Corrupt if corrupt else Unavailable
        raise kind(f"sector {sector_id}: no copy can be read ({'; '.join(reasons) or 'no host holds one'})")


async def _together(reads: Sequence[Callable[[], Awaitable[bytes]]]) -> list[bytes]:
    """All at once; the first error, if any has one, once all have ended."""
    results: list[bytes] = [b""] * len(reads)
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
    return results


def _runs(blocks: list[int]) -> list[tuple[int, int]]:
    """Ascending block numbers as (first, count) of contiguous runs."""
    runs: list[tuple[int, int]] = []
    for block in blocks:
        if runs and runs[-1][0] + runs[-1][1] == block:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((block, 1))
    return runs
