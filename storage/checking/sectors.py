"""Sectors against the extents that point to them, and the indexes over sectors against sectors."""

from __future__ import annotations

from storage.checking.copies import has_fewer
from storage.checking.patient import Patient
from storage.checking.rescue import Rescue, add_live, holder_number
from storage.checking.scanning import Tally, pages, windows
from storage.errors import Corrupt
from storage.hosts.holders import Holders, holders_key
from storage.interfaces import Batch
from storage.metadata.keys import (
    FREED,
    FRESH,
    GARBAGE,
    HOLDERS,
    PARTIAL,
    SECTOR,
    SETTING,
    UNDERREPLICATED,
    VALUE,
    read_u32,
    read_u64,
    u64,
)
from storage.sectors.mending import MOVING
from storage.sectors.partial import PartialIndex
from storage.sectors.records import SectorRecord, decode_sector
from storage.sectors.staging import STAGED
from storage.values.packing import TableEntry
from storage.values.records import Extent
from storage.wording import counted

COUNT = SETTING + b"sectors"


async def check_sectors(patient: Patient) -> None:
    """After `check_extents`: what points to a sector is true."""
    rescue = Rescue(patient)
    index = PartialIndex(patient.store, patient.config.sector_size)
    patient.stage("sectors")
    count = 0
    async for tally in windows(patient.store, SECTOR, lambda key: read_u64(key, 1)):
        await add_live(patient, tally.add)
        for at, sector_id in enumerate(tally.keys):
            record = patient.sector(sector_id)
            if record is not None:
                await _check_sector(patient, rescue, index, sector_id, record, tally.columns[0][at])
            patient.progress.done += 1
            if at % 500 == 0:
                await patient.seams.clock.sleep(0)
        count += len(tally)
    patient.report.looked_at["sectors"] = count
    raw = patient.store.get(COUNT)
    if (read_u64(raw) if raw is not None and len(raw) == 8 else 0) != count:
        batch = Batch()
        batch.put(COUNT, u64(count))
        await patient.found("sector-count", "totals", f"another number than {counted(count, 'sector')} is on record", batch)
    await _check_indexes(patient, index)
    await _check_freed(patient)
    await _check_garbage(patient)
    await _check_holders(patient)
    await patient.commit()


# ---- a sector


async def _check_sector(patient: Patient, rescue: Rescue, index: PartialIndex, sector_id: int, record: SectorRecord, live: int) -> None:
    where = f"sector {sector_id}"
    if live != record.live and not await _fix_live(patient, rescue, sector_id, record, live):
        return
    fresh = patient.store.get(FRESH + u64(sector_id)) is not None
    if fresh and live:
        batch = Batch()
        batch.delete(FRESH + u64(sector_id))
        await patient.found("fresh-mark", where, f"it is marked as unused, and {live} bytes of files are in it", batch)
    elif live == 0 and record.live == 0 and not fresh:
        batch = Batch()
        batch.put(FRESH + u64(sector_id), b"")
        await patient.found("leaked-sector", where, "no file has bytes in it, and nobody will delete it", batch)
    size_class = index.class_of(record)
    if size_class is not None:
        key = PARTIAL + bytes([size_class]) + u64(sector_id)
        if patient.store.get(key) != record.replication.encode():
            batch = Batch()
            batch.put(key, record.replication.encode())
            await patient.found("partial-index", where, "it is small, and not in the index of sectors to be merged", batch)
    await _check_copies_mark(patient, sector_id, record)
    for shard in record.shards:
        for host in shard.hosts:
            if patient.store.get(holders_key(shard.root, host)) is None:
                await _fix_holder(patient, where, shard.root, host)


async def _fix_live(patient: Patient, rescue: Rescue, sector_id: int, record: SectorRecord, live: int) -> bool:
    """False: left as it is, and better not looked at any further."""
    what = f"its record says {record.live} bytes of files are in it, extents say {live}"
    if live == 0 and patient.repair:
        # The next mount deletes it then: only if its own table shows that it has nothing of any value there is.
        table = await rescue.table(sector_id)
        if table is None or any(_wanted(patient, rescue, entry) for entry in table):
            what += "; it is kept as it is, since it may have bytes of files"
            await patient.found("live", f"sector {sector_id}", what)
            return False
    batch = Batch()
    record.live = live
    record.data = max(record.data, live)
    batch.put(SECTOR + u64(sector_id), record.encode())
    if live == 0:
        batch.put(FRESH + u64(sector_id), b"")
    await patient.found("live", f"sector {sector_id}", what, batch)
    return True


def _wanted(patient: Patient, rescue: Rescue, entry: TableEntry) -> bool:
    """Bytes of a value there is, that no extent of it has."""
    there = patient.store.get(VALUE + u64(entry.value_id)) is not None
    return there and not rescue.covered(Extent(entry.value_id, entry.offset, 0, entry.position, entry.length))


async def _check_copies_mark(patient: Patient, sector_id: int, record: SectorRecord) -> None:
    """A mark where every copy is on record is none too many: a host is lost, doubted, or was away for long. Reconcile looks at each."""
    mark = patient.store.get(UNDERREPLICATED + u64(sector_id))
    if not has_fewer(record) or (mark is not None and mark != MOVING):
        return
    batch = Batch()
    batch.put(UNDERREPLICATED + u64(sector_id), b"")
    what = "it has fewer copies than it should, and is not in the index of those"
    await patient.found("copies-index", f"sector {sector_id}", what, batch)


async def _fix_holder(patient: Patient, where: str, root: bytes, host: int) -> None:
    batch = Batch()
    contract = patient.contractor.contract_for(host) if patient.contractor is not None else None
    if contract is not None:
        holders = Holders()
        holders.write(contract.lineage)
        batch.put(holders_key(root, host), holders.encode())
    what = f"there is no record of the contract that holds its copy on {patient.url(host)}"
    await patient.found("holders", where, what, batch)


# ---- indexes


async def _check_indexes(patient: Patient, index: PartialIndex) -> None:
    patient.stage("indexes")
    for prefix, at, kind, said in (
        (PARTIAL, 2, "partial-index", "the index of sectors to be merged has it"),
        (UNDERREPLICATED, 1, "copies-index", "the index of sectors with too few copies has it"),
        (FRESH, 1, "fresh-mark", "it is marked as unused"),
        (STAGED, len(STAGED), "staged-mark", "it is marked as being in staging alone"),
    ):
        async for page in pages(patient.store, prefix):
            for key, _ in page:
                if len(key) != at + 8:
                    continue
                sector_id = read_u64(key, at)
                record = patient.sector(sector_id)
                batch = Batch()
                batch.delete(key)
                if record is None:
                    if patient.store.get(SECTOR + u64(sector_id)) is None:
                        await patient.found(kind, f"sector {sector_id}", f"{said}, and there is no such sector", batch)
                elif prefix == STAGED:
                    if not has_fewer(record) and patient.store.get(UNDERREPLICATED + u64(sector_id)) is None:
                        # Reconcile takes it off both lists: it knows which hosts keep what they have (I3).
                        batch = Batch()
                        batch.put(UNDERREPLICATED + u64(sector_id), MOVING)
                        await patient.found(kind, f"sector {sector_id}", f"{said}, and every copy is on its hosts", batch)
                elif prefix == PARTIAL and key[1] != index.class_of(record):
                    await patient.found(kind, f"sector {sector_id}", f"{said} in a class it is not of", batch)
            patient.progress.done += len(page)


async def _check_freed(patient: Patient) -> None:
    """The queue. It may name a copy that is in use: one that came back to its host before its deletion was due. The deletion, when its time
    comes, looks whether the record names the copy, and then leaves it (storage/sectors/deleter.py)."""
    waiting = 0
    async for page in pages(patient.store, FREED):
        waiting += len(page)
    if waiting:
        patient.note("pending", "queue of freed sectors", f"{waiting} wait for being deleted on their hosts")


async def _check_garbage(patient: Patient) -> None:
    """Marks of freed values; that one is in use after all is told with the file."""
    waiting = 0
    async for page in pages(patient.store, GARBAGE):
        waiting += len(page)
    if waiting:
        patient.note("pending", "freed values", f"{waiting} are still to be reclaimed")


async def _check_holders(patient: Patient) -> None:
    """Shards on record as held by a contract that neither a sector nor the queue has: those of a lost host are left so."""
    patient.stage("holders")
    unknown = 0
    async for tally in windows(patient.store, HOLDERS, lambda key: holder_number(key[1:33], read_u32(key, 33))):
        await _count_holders(patient, tally)
        unknown += sum(1 for number in tally.columns[0] if number == 0)
    if unknown:
        patient.note("unknown-holder", "holders", f"on record, and no sector's: {counted(unknown, 'shard')}")


async def _count_holders(patient: Patient, tally: Tally) -> None:
    for prefix, at in ((SECTOR, 1), (FREED, 9)):
        async for page in pages(patient.store, prefix):
            for key, raw in page:
                try:
                    record = decode_sector(raw, read_u64(key, at))
                except Corrupt:
                    continue
                for shard in record.shards:
                    for host in shard.hosts:
                        tally.add(holder_number(shard.root, host))
