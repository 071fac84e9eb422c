"""Regenerate: a shard as it was sealed, to be put on one more host. I1: never anything but the bytes with the root on record."""

from __future__ import annotations

import logging

from storage.contractor import Contractor
from storage.errors import Corrupt, FusefsError, NotFound, Unavailable
from storage.host_io import HostIO
from storage.hosts.hostdb import HostDB
from storage.hosts.registry import HostRegistry
from storage.interfaces import SealedShard
from storage.seams import Seams
from storage.sectors.reader import SectorReader
from storage.sectors.records import SectorRecord, ShardRecord, layout_for

log = logging.getLogger("fusefs.sectors")


class Regenerator:
    """From any host that still has the shard, whether or not it is to keep it; else of other shards of the sector."""

    def __init__(
        self, host_io: HostIO, contractor: Contractor, registry: HostRegistry, hostdb: HostDB, reader: SectorReader, seams: Seams
    ) -> None:
        self._host_io = host_io
        self._contractor = contractor
        self._registry = registry
        self._hostdb = hostdb
        self._reader = reader
        self._seams = seams

    async def shard(self, sector_id: int, record: SectorRecord, index: int) -> SealedShard:
        """Shard `index` of the record. Corrupt: every copy there is fails to verify; Unavailable: hosts that may have one are away."""
        shard = record.shards[index]
        error: FusefsError | None = None
        staging = self._reader.staging
        if staging is not None and staging.has(shard.root):
            try:
                return await staging.sealed(shard)
            except FusefsError as failed:
                error = failed
        for number in self._hostdb.rank(host for host in shard.hosts if self._registry.available(host)):
            contract = self._contractor.contract_for(number)
            if contract is None:
                continue
            try:
                return await self._host_io.read_sealed(contract.contract_id, shard.root.hex(), shard.shard_id, shard.length)
            except FusefsError as failed:
                error = failed
                if isinstance(failed, Corrupt | NotFound):
                    self._reader.on_damage(sector_id, shard.root, number)
        coded = layout_for(record, sector_id).needed < len(record.shards)
        if coded:
            try:
                return await self._seal_again(await self._reader.read_shard(sector_id, record, index), shard)
            except (Corrupt, Unavailable) as failed:
                error = failed
        away = [self._registry.url(host) for shard in record.shards for host in shard.hosts if not self._registry.available(host)]
        if isinstance(error, NotFound | Corrupt):
            try:
                # Copies, or shards it can be made of, that are damaged at different places are good together.
                return await self._seal_again(await self._reader.read_shard_by_blocks(sector_id, record, index), shard)
            except (Corrupt, Unavailable) as failed:
                if coded and not away:
                    raise
                log.info("%s", failed)
        if away or error is None:
            raise Unavailable(f"sector {sector_id}: no host that has it can be read ({', '.join(away) or 'none is on record'})")
        if isinstance(error, NotFound | Corrupt):
            raise Corrupt(f"sector {sector_id} has no good copy: {error}; see fusefs check")
        raise error

    async def _seal_again(self, plain: bytes, shard: ShardRecord) -> SealedShard:
        """I1: Corrupt unless it comes out with the root on record."""
        return await self._seams.threads.run(self._host_io.seal_again, [plain], shard.shard_id, shard.root.hex())
