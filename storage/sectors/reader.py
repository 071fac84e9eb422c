"""Reading sectors: cache, best host first, the next one on failure."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable

import trio

from storage.contractor import Contractor
from storage.errors import Corrupt, FusefsError, NotFound, Unavailable
from storage.host_io import HostIO
from storage.hosts.hostdb import HostDB
from storage.interfaces import MetadataReader
from storage.metadata.keys import SECTOR, u64
from storage.sealing import BLOCK
from storage.seams import Seams
from storage.sectors.cache import BlockCache
from storage.sectors.records import PREAMBLE_SIZE, SectorRecord, ShardRecord, check_preamble, decode_sector

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
        self.notes: deque[str] = deque(maxlen=50)

    def record(self, sector_id: int) -> SectorRecord:
        raw = self._store.get(SECTOR + u64(sector_id))
        if raw is None:
            raise NotFound(f"sector {sector_id} does not exist")
        return decode_sector(raw, sector_id)

    def cached(self, sector_id: int, offset: int) -> bool:
        try:
            shard = self.record(sector_id).shards[0]
        except NotFound:
            return False
        return (shard.root, (offset + PREAMBLE_SIZE) // BLOCK) in self._cache

    async def read_sector(self, sector_id: int) -> bytes:
        """The whole sector from the first host whose copy verifies."""
        record = self.record(sector_id)
        shard = record.shards[0]

        async def whole(contract_id: str) -> bytes:
            plain = await self._host_io.read(contract_id, shard.root.hex(), shard.shard_id)
            check_preamble(plain, sector_id, record.length)
            return plain

        plain = await self._from_best_host(sector_id, shard, whole)
        return memoryview(plain)[PREAMBLE_SIZE:].tobytes()

    async def read_range(self, sector_id: int, offset: int, length: int) -> bytes:
        """Bytes [offset, offset + length) of the sector, clipped, block by block from the cache or one request per gap."""
        record = self.record(sector_id)
        if offset < 0 or length <= 0 or offset >= record.length:
            return b""
        shard = record.shards[0]
        length = min(length, record.length - offset)
        first = (offset + PREAMBLE_SIZE) // BLOCK
        last = (offset + PREAMBLE_SIZE + length - 1) // BLOCK
        pending = self._fetching.get(sector_id)
        if pending is not None and any((shard.root, block) not in self._cache for block in range(first, last + 1)):
            await pending.wait()
        blocks: dict[int, bytes] = {}
        missing: list[int] = []
        for block in range(first, last + 1):
            found = self._cache.get(shard.root, block)
            if found is None:
                missing.append(block)
            else:
                blocks[block] = found
        for start, count in _runs(missing):
            plain = await self._fetch(sector_id, shard, start, count)
            for i in range(count):
                blocks[start + i] = piece = plain[i * BLOCK : (i + 1) * BLOCK]
                self._cache.put(shard.root, start + i, piece)
        begin = offset + PREAMBLE_SIZE - first * BLOCK
        if first == last:
            return blocks[first][begin : begin + length]
        return b"".join([blocks[block] for block in range(first, last + 1)])[begin : begin + length]

    def prefetch(self, sector_id: int, nursery: trio.Nursery) -> None:
        """Bring a whole sector into the cache in the background."""
        if sector_id in self._fetching or len(self._fetching) >= PREFETCHES:
            return
        try:
            record = self.record(sector_id)
        except NotFound:
            return
        shard = record.shards[0]
        blocks = -(-shard.length // BLOCK)
        if shard.length * 4 > self._cache.limit or all((shard.root, block) in self._cache for block in range(blocks)):
            return
        self._fetching[sector_id] = trio.Event()
        nursery.start_soon(self._prefetch, sector_id, shard, blocks)

    async def _prefetch(self, sector_id: int, shard: ShardRecord, blocks: int) -> None:
        try:
            plain = await self._from_best_host(
                sector_id, shard, lambda contract: self._host_io.read(contract, shard.root.hex(), shard.shard_id)
            )
            for block in range(blocks):
                self._cache.put(shard.root, block, plain[block * BLOCK : (block + 1) * BLOCK])
        except FusefsError as error:
            # Whoever needs the bytes asks for them and gets the error then.
            log.info("read-ahead of sector %d failed: %s", sector_id, error)
        finally:
            self._fetching.pop(sector_id).set()

    async def _fetch(self, sector_id: int, shard: ShardRecord, first: int, count: int) -> bytes:
        wanted = min(count * BLOCK, shard.length - first * BLOCK)

        async def part(contract_id: str) -> bytes:
            plain = await self._host_io.insecure_read(
                contract_id, shard.root.hex(), shard.shard_id, first * BLOCK, wanted, plaintext_length=shard.length
            )
            if len(plain) != wanted:
                raise Corrupt(f"sector {sector_id}: {len(plain)} bytes where {wanted} should be")
            return plain

        return await self._from_best_host(sector_id, shard, part)

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


def _runs(blocks: list[int]) -> list[tuple[int, int]]:
    """Ascending block numbers as (first, count) of contiguous runs."""
    runs: list[tuple[int, int]] = []
    for block in blocks:
        if runs and runs[-1][0] + runs[-1][1] == block:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((block, 1))
    return runs
