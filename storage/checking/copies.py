"""Making a copy or a shard again. I1: sealed bytes are copied as they are, or made of the same plaintext, and only if they have the root on
record; nothing new is sealed."""

from __future__ import annotations

import logging

import trio

from storage.checking.patient import Patient
from storage.errors import Corrupt, FusefsError, Unavailable
from storage.hosts.layout import shard_name
from storage.hosts.locking import locking
from storage.interfaces import Batch, SealedShard
from storage.metadata.keys import DOUBTED, SECTOR, UNDERREPLICATED, u32, u64
from storage.sealing import MAX_SEALED, root_of, sealed_length
from storage.sectors.mending import MOVING
from storage.sectors.records import SectorRecord, ShardRecord, layout_for
from storage.sectors.redundancy import layout_of
from storage.sectors.staging import STAGED

log = logging.getLogger("fusefs.check")

#: Seconds a host has to give a whole shard.
TIMEOUT = 90.0


async def remake(patient: Patient, sector_id: int, index: int, bad: int | None, good: list[list[int]], away: set[int]) -> tuple[str, bool]:
    """Shard `index` goes to the host whose copy is bad, or else to another (`bad` None: to another in any case).

    `good`: per shard, the hosts whose copies are good. Durable on the host before the record says so (I2). Returns what was done, for the
    finding, and whether there are now as many copies as before, or one more where none was bad. The record loses the bad host only once
    another has the shard.
    """
    record = patient.sector(sector_id)
    if record is None or patient.host_io is None or patient.contractor is None or patient.registry is None:
        return "", False
    try:
        sealed = await sealed_again(patient, sector_id, record, index, good)
    except FusefsError as error:
        return f" ({error})", False
    taken = {host for shard in record.shards for host in shard.hosts}
    others = [n for n in patient.registry.numbers() if n not in taken and n not in away and patient.registry.available(n)]
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
        await _note(patient, sector_id, index, bad, host)
        return f"; a new one is on {patient.url(host)}", True
    return f" ({'; '.join(errors) or 'no other host can take one'})", False


async def kept_by_lock(patient: Patient, sector_id: int, shard: ShardRecord, host: int) -> bool:
    """Of a name that somebody deleted or overwrote: does the host have a locked version with the shard, whole?"""
    registry = patient.registry
    if registry is None or not registry.available(host) or locking(registry.get(host)) is None:
        return False
    try:
        await _fetch(patient, sector_id, shard, [host])
    except FusefsError:
        return False
    return True


async def sealed_again(patient: Patient, sector_id: int, record: SectorRecord, index: int, good: list[list[int]]) -> SealedShard:
    """The shard as it was sealed once: a copy, in staging or on a host, or made of other shards. Corrupt, Unavailable."""
    shard = record.shards[index]
    try:
        return await _stored(patient, sector_id, shard, good[index])
    except FusefsError:
        layout = layout_for(record, sector_id)
        if layout.needed >= layout.shards or patient.host_io is None:
            raise
    found: dict[int, bytes] = {}
    for other, hosts in enumerate(good):
        if other == index or len(found) >= layout.needed:
            continue
        try:
            part = await _stored(patient, sector_id, record.shards[other], hosts)
        except FusefsError as error:
            log.info("%s", error)
        else:
            found[other] = await patient.seams.threads.run(patient.host_io.open_sealed, part)
    if len(found) < layout.needed:
        raise Corrupt(f"sector {sector_id}: {len(found)} of its other shards are good, {layout.needed} are needed")
    plain = await patient.seams.threads.run(layout.rebuild, sector_id, index, 0, found)
    return await patient.seams.threads.run(patient.host_io.seal_again, [plain], shard.shard_id, shard.root.hex())


async def _stored(patient: Patient, sector_id: int, shard: ShardRecord, good: list[int]) -> SealedShard:
    """From staging, or from a host. Corrupt, Unavailable."""
    if patient.staging is not None and patient.staging.files.has(shard.root):
        try:
            return await patient.staging.files.sealed(shard)
        except FusefsError as error:
            log.info("sector %d: %s", sector_id, error)
    return await _fetch(patient, sector_id, shard, good)


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


async def _note(patient: Patient, sector_id: int, index: int, bad: int | None, host: int) -> None:
    record = patient.sector(sector_id)
    if record is None:
        return
    shard = record.shards[index]
    shard.hosts = sorted({*shard.hosts, host} - ({bad} if bad is not None and bad != host else set()))
    batch = Batch()
    batch.put(SECTOR + u64(sector_id), record.encode())
    mark_copies(patient, batch, sector_id, record)
    batch.delete(DOUBTED + u64(sector_id) + u32(host))
    await patient.fix(batch)


def mark_copies(patient: Patient, batch: Batch, sector_id: int, record: SectorRecord) -> None:
    """In `batch`: the index of sectors with too few copies follows the record."""
    if has_fewer(record):
        batch.put(UNDERREPLICATED + u64(sector_id), b"")
    elif patient.store.get(STAGED + u64(sector_id)) is not None:
        # Reconcile takes it off both lists, once it has seen that these hosts keep what they have (I3).
        batch.put(UNDERREPLICATED + u64(sector_id), MOVING)
    else:
        batch.delete(UNDERREPLICATED + u64(sector_id))


def has_fewer(record: SectorRecord) -> bool:
    """Is some shard on fewer hosts than it should be?"""
    each = layout_of(record.replication, record.length).hosts_each
    return any(len(set(shard.hosts)) < each for shard in record.shards)
