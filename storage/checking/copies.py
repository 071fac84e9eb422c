"""Making a copy again. I1: sealed bytes are copied as they are, and only if they have the root on record; nothing is sealed."""

from __future__ import annotations

import trio

from storage.checking.patient import Patient
from storage.errors import Corrupt, FusefsError, Unavailable
from storage.hosts.layout import shard_name
from storage.interfaces import Batch, SealedShard
from storage.metadata.keys import SECTOR, UNDERREPLICATED, u64
from storage.replication import parse_replication
from storage.sealing import MAX_SEALED, root_of, sealed_length
from storage.sectors.records import SectorRecord, ShardRecord

#: Seconds a host has to give a whole shard.
TIMEOUT = 90.0


async def remake(patient: Patient, sector_id: int, bad: int | None, good: list[int], away: set[int]) -> tuple[str, bool]:
    """A copy from one of `good` goes to the host whose copy is bad, or else to another (`bad` None: to another in any case).

    Durable on the host before the record says so (I2). Returns what was done, for the finding, and whether there are now as many copies as
    before, or one more where none was bad. The record loses the bad host only once another has the copy.
    """
    record = patient.sector(sector_id)
    if record is None or patient.host_io is None or patient.contractor is None or patient.registry is None:
        return "", False
    shard = record.shards[0]
    try:
        sealed = await _fetch(patient, sector_id, shard, good)
    except FusefsError as error:
        return f" ({error})", False
    others = [n for n in patient.registry.numbers() if n not in shard.hosts and n not in away and patient.registry.available(n)]
    errors: list[str] = []
    for host in ([bad] if bad is not None else []) + others:
        contract = patient.contractor.contract_for(host)
        if contract is None:
            continue
        try:
            # The first repair begins the epoch, without which nothing can be committed.
            await patient.fix(Batch())
            await patient.host_io.write_sealed(contract.contract_id, sealed)
        except FusefsError as error:
            errors.append(str(error))
            continue
        await _note(patient, sector_id, bad, host)
        return f"; a new one is on {patient.url(host)}", True
    return f" ({'; '.join(errors) or 'no other host can take one'})", False


async def _fetch(patient: Patient, sector_id: int, shard: ShardRecord, good: list[int]) -> SealedShard:
    """The sealed bytes, as they were sealed once. Corrupt, Unavailable."""
    if patient.registry is None:
        raise Unavailable(f"sector {sector_id}: no host can be used")
    name = shard_name(patient.config.volume_id_bytes, shard.root.hex())
    error: FusefsError = Corrupt(f"sector {sector_id}: no good copy")
    for host in good:
        try:
            with trio.move_on_after(TIMEOUT):
                sealed = await patient.registry.get(host).get(name, MAX_SEALED)
                if len(sealed) != sealed_length(shard.length) or await patient.seams.threads.run(root_of, sealed) != shard.root.hex():
                    raise Corrupt(f"sector {sector_id}: the copy on {patient.url(host)} is not what was sealed")
                return SealedShard(shard.root.hex(), shard.shard_id, shard.length, sealed)
            error = Unavailable(f"{patient.url(host)} did not answer within {TIMEOUT:.0f} s")
        except FusefsError as failed:
            error = failed
    raise error


async def _note(patient: Patient, sector_id: int, bad: int | None, host: int) -> None:
    record = patient.sector(sector_id)
    if record is None:
        return
    shard = record.shards[0]
    shard.hosts = sorted({*shard.hosts, host} - ({bad} if bad is not None and bad != host else set()))
    batch = Batch()
    batch.put(SECTOR + u64(sector_id), record.encode())
    mark_copies(batch, sector_id, record)
    await patient.fix(batch)


def mark_copies(batch: Batch, sector_id: int, record: SectorRecord) -> None:
    """In `batch`: the index of sectors with too few copies follows the record."""
    copies = parse_replication(record.replication).copies
    if all(len(shard.hosts) >= copies for shard in record.shards):
        batch.delete(UNDERREPLICATED + u64(sector_id))
    else:
        batch.put(UNDERREPLICATED + u64(sector_id), b"")
