"""Regenerate: a shard as it was sealed, to be put on one more host. I1: never anything but the bytes with the root on record."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial

from storage.contractor import Contractor
from storage.errors import Corrupt, FusefsError, NotFound, Unavailable
from storage.host_io import HostIO
from storage.hosts.hostdb import HostDB
from storage.hosts.registry import HostRegistry
from storage.interfaces import SealedShard
from storage.sealing import sealed_length
from storage.seams import Seams
from storage.sectors.hedging import Attempt
from storage.sectors.records import SectorRecord, ShardRecord, layout_for
from storage.sectors.shards import ShardReader

log = logging.getLogger("fusefs.sectors")

#: (sector id, its record, index of the shard) -> the sealed shard, root verified; from a host that has it, or made again from others.
Regenerate = Callable[[int, SectorRecord, int], Awaitable[SealedShard]]


class Regenerator:
    """From any host that still has the shard, whether or not it is to keep it; else of other shards of the sector. Hosts are asked as for
    reading: the best first, another where that fails, hangs or is slow (sectors.hedging)."""

    def __init__(
        self, host_io: HostIO, contractor: Contractor, registry: HostRegistry, hostdb: HostDB, shards: ShardReader, seams: Seams
    ) -> None:
        self._host_io = host_io
        self._contractor = contractor
        self._registry = registry
        self._hostdb = hostdb
        self._shards = shards
        self._seams = seams

    async def shard(self, sector_id: int, record: SectorRecord, index: int) -> SealedShard:
        """Shard `index` of the record. Corrupt: every copy there is fails to verify; Unavailable: hosts that may have one are away."""
        shard = record.shards[index]
        error: FusefsError | None = None
        staging = self._shards.staging
        if staging is not None and staging.files.has(shard.root):
            try:
                return await staging.files.sealed(shard)
            except FusefsError as failed:
                error = failed
        # Another is asked as well where one fails, hangs or is slow. It counts as no read, so that those who wait have what is saved up.
        outcome = await self._shards.hedging.first_good(self._copies(sector_id, shard), earns=False)
        for sealed in outcome.found.values():
            return SealedShard(shard.root.hex(), shard.shard_id, shard.length, sealed)
        if outcome.errors:
            # One that did not answer may have it: then nothing is lost, whatever the others say, and in whatever order.
            error = next((failed for failed in outcome.errors if not isinstance(failed, Corrupt | NotFound)), outcome.errors[-1])
        coded = layout_for(record, sector_id).needed < len(record.shards)
        if coded:
            try:
                return await self._seal_again(await self._shards.read_shard(sector_id, record, index), shard)
            except (Corrupt, Unavailable) as failed:
                error = failed
        away = [self._registry.url(host) for shard in record.shards for host in shard.hosts if not self._registry.available(host)]
        if isinstance(error, NotFound | Corrupt):
            try:
                # Copies, or shards it can be made of, that are damaged at different places are good together.
                return await self._seal_again(await self._shards.read_shard_by_blocks(sector_id, record, index), shard)
            except (Corrupt, Unavailable) as failed:
                if coded and not away:
                    raise
                log.info("%s", failed)
        if away or error is None:
            raise Unavailable(f"sector {sector_id}: no host that has it can be read ({', '.join(away) or 'none is on record'})")
        if isinstance(error, NotFound | Corrupt):
            raise Corrupt(f"sector {sector_id} has no good copy: {error}; see fusefs check --data")
        raise error

    def _copies(self, sector_id: int, shard: ShardRecord) -> list[Attempt]:
        """Ways to get it as it is stored, best first."""
        attempts: list[Attempt] = []
        for number in self._hostdb.rank(host for host in shard.hosts if self._registry.available(host)):
            contract = self._contractor.contract_for(number)
            if contract is not None:
                ask = partial(self._ask, sector_id, shard, number, contract.contract_id)
                attempts.append(Attempt(ask, sealed_length(shard.length), number))
        return attempts

    async def _ask(self, sector_id: int, shard: ShardRecord, host: int, contract_id: str) -> bytes:
        try:
            found = await self._host_io.read_sealed(contract_id, shard.root.hex(), shard.shard_id, shard.length)
        except (Corrupt, NotFound):
            self._shards.on_damage(sector_id, shard.root, host)
            raise
        return bytes(found.sealed)

    async def _seal_again(self, plain: bytes, shard: ShardRecord) -> SealedShard:
        """I1: Corrupt unless it comes out with the root on record."""
        return await self._seams.threads.run(self._host_io.seal_again, [plain], shard.shard_id, shard.root.hex())
