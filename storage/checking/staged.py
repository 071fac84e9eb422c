"""What stands in staging: a shard that is damaged or gone there is made again of what hosts have of its sector, if that is enough.

| the sector is | damaged, or gone, in staging | repair |
|---|---|---|
| on no host | its files are named; a damaged file stays, for what is good of it | none |
| on hosts that its record does not name: the upload was cut short | what hosts have is found by root | put there again, from hosts |
| on its write quorum, not at full replication | damaged | put there again; hosts get what they lack, as anywhere |
| at full replication | damaged | removed: it was read cache |

Nothing is told of what is gone where hosts have the sector: nobody needs it here.
"""

from __future__ import annotations

from storage.checking.copies import sealed_again
from storage.checking.patient import Patient
from storage.errors import Corrupt, FusefsError, NotFound
from storage.interfaces import SealedShard
from storage.metadata.keys import u64
from storage.sectors.records import SectorRecord
from storage.sectors.redundancy import layout_of
from storage.sectors.staging import STAGED, Staging


async def find_damaged(patient: Patient, staging: Staging, record: SectorRecord, *, data: bool) -> dict[int, str]:
    """Index of each shard that is damaged in staging -> why; it does not count as being there from then on. `data`: each is read, else its
    size alone is looked at."""
    damaged: dict[int, str] = {}
    for index, shard in enumerate(record.shards):
        if staging.files.has(shard.root) and (data or not staging.files.is_whole_length(shard)):
            try:
                await staging.files.sealed(shard)
            except (Corrupt, NotFound) as error:
                damaged[index] = str(error)
            except FusefsError as error:
                # The disk does not give it; it may yet.
                await patient.found("staged-copy", f"shard {shard.root.hex()[:12]}", str(error))
    return damaged


async def conclude_waiting(patient: Patient, staging: Staging, sector_id: int, record: SectorRecord, *, data: bool) -> tuple[bool, bool]:
    """A sector that is on too few hosts yet, by its record. Returns whether all of it is here, and whether it can be read."""
    bad = await find_damaged(patient, staging, record, data=data)
    for index, shard in enumerate(record.shards):
        if not staging.files.has(shard.root):
            bad.setdefault(index, f"shard {shard.root.hex()[:12]} is not in {staging.path}")
    if not bad:
        return True, True
    good = await _whereabouts(patient, sector_id, record)
    there = sum(1 for shard in record.shards if staging.files.has(shard.root))
    for index, why in bad.items():
        what = f"it is on too few hosts yet, and {why}"
        try:
            sealed = await sealed_again(patient, sector_id, record, index, good)
        except FusefsError:
            await patient.found("staged-copy", f"sector {sector_id}", what)
            continue
        there += 1
        await _put_back(patient, staging, sector_id, what, sealed)
    return not bad, there >= layout_of(record.replication, record.length).needed


async def conclude_cached(patient: Patient, staging: Staging, sector_id: int, record: SectorRecord, damaged: dict[int, str]) -> None:
    """A sector that hosts have. `damaged`: of `find_damaged`. After its copies on hosts have been seen to: `record` is as it is now."""
    good = [list(shard.hosts) for shard in record.shards]
    needed = patient.store.get(STAGED + u64(sector_id)) is not None
    for index, why in damaged.items():
        shard = record.shards[index]
        try:
            sealed = await sealed_again(patient, sector_id, record, index, good)
        except FusefsError as error:
            # What is good of the file may be all there is.
            patient.report.add("staged-copy", f"sector {sector_id}", f"{why}, and hosts do not give it now ({error})")
            continue
        if needed:
            await _put_back(patient, staging, sector_id, why, sealed)
            continue
        told, repaired = "", False
        if patient.repair:
            try:
                await staging.files.remove(shard.root)
                told, repaired = "; it was only cached, and is removed", True
            except FusefsError as error:
                told = f" ({error})"
        patient.report.add("staged-damage", f"sector {sector_id}", why + told, repaired=repaired)


async def _whereabouts(patient: Patient, sector_id: int, record: SectorRecord) -> list[list[int]]:
    """Per shard, hosts that have it, whether or not the record says so."""
    located = record if patient.strays is None else await patient.strays.locate(sector_id, record)
    return [list(shard.hosts) for shard in located.shards]


async def _put_back(patient: Patient, staging: Staging, sector_id: int, what: str, sealed: SealedShard) -> None:
    told, repaired = "", False
    if patient.repair:
        try:
            await staging.files.put_back(sealed)
            told, repaired = "; it is there again, made of what hosts have", True
        except FusefsError as error:
            told = f" ({error})"
    patient.report.add("staged-damage", f"sector {sector_id}", what + told, repaired=repaired)
