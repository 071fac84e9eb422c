"""Is every sector all there? From the records, and from what each host really has."""

from __future__ import annotations

from storage.errors import FusefsError
from storage.metadata.keys import SECTOR, UNDERREPLICATED, prefix_end, read_u64
from storage.sectors.records import SectorRecord, decode_sector, layout_for
from storage.volume import Volume


def records(volume: Volume) -> dict[int, SectorRecord]:
    """Every sector's."""
    found = volume.store.scan(SECTOR, prefix_end(SECTOR), 100_000)
    return {read_u64(key, 1): decode_sector(raw, read_u64(key, 1)) for key, raw in found}


async def incomplete(volume: Volume) -> list[str]:
    """What is missing for every sector to be at its replication on distinct hosts that keep what they have: each shard on record is
    fetched whole from its host and opened. Nothing missing: an empty list."""
    wrong: list[str] = []
    keeping = volume.standing.keeping()
    for sector_id, record in records(volume).items():
        layout = layout_for(record, sector_id)
        hosts = [host for shard in record.shards for host in shard.hosts]
        if len(set(hosts)) != len(hosts) or any(len(shard.hosts) != layout.hosts_each for shard in record.shards):
            wrong.append(f"sector {sector_id}, {record.replication}: on record on {[shard.hosts for shard in record.shards]}")
        if gone := set(hosts) - keeping:
            wrong.append(f"sector {sector_id}: on record on hosts {sorted(gone)}, which do not keep it")
        for number, shard in enumerate(record.shards):
            for host in shard.hosts:
                contract = volume.contractor.contract_for(host)
                try:
                    if contract is None:
                        wrong.append(f"sector {sector_id}: no contract with host {host}")
                        continue
                    layout.check(sector_id, number, await volume.host_io.read(contract.contract_id, shard.root.hex(), shard.shard_id))
                except FusefsError as error:
                    wrong.append(f"sector {sector_id}, shard {number} on host {host}: {error}")
    listed = [read_u64(key, 1) for key, _ in volume.store.scan(UNDERREPLICATED, prefix_end(UNDERREPLICATED), 100_000)]
    return [*wrong, *([f"still on the list of what is to be mended: {listed}"] if listed else [])]
