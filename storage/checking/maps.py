"""File maps against the values they point into; extended attributes against their inodes.

What a map says beyond its value after a crash is void (N4), and nothing wrong.
"""

from __future__ import annotations

from storage.checking.patient import Patient, attempt
from storage.checking.scanning import Tally, pages, windows
from storage.interfaces import Batch
from storage.metadata.keys import INODE, MAP, ORPHAN, XATTR, prefix_end, read_u64, u64
from storage.namespace.records import (
    HAS_XATTRS,
    ORPHAN_MAP,
    InodeRecord,
    decode_map,
    encode_inode,
    inode_key,
    orphan_key,
)
from storage.wording import counted

#: Runs of a map that are sorted by their place in the value, to find overlaps there; of a larger map only the sum is checked.
MAX_SORTED = 500_000


async def check_maps(patient: Patient) -> None:
    """After `check_extents`: sizes are true."""
    patient.stage("file maps")
    async for page in pages(patient.store, INODE):
        for key, _ in page:
            ino = read_u64(key, 1)
            rec = patient.inode(ino)
            if rec is not None and rec.map:
                await _check_map(patient, ino, rec)
                patient.report.looked_at["file maps"] += 1
        patient.progress.done += len(page)
    async for tally in windows(patient.store, MAP, lambda key: read_u64(key, 1)):
        await _check_owners(patient, tally)
    await _check_marks(patient)
    await _check_xattrs(patient)
    await patient.commit()


async def _check_map(patient: Patient, ino: int, rec: InodeRecord) -> None:
    value = patient.value(rec.value)
    if value is None:
        return
    stored = patient.size_of(rec.value, value.sealed)
    total = end = reach = 0
    runs: list[tuple[int, int]] = []
    troubles: list[str] = []
    async for page in pages(patient.store, MAP + u64(rec.map)):
        for key, raw in page:
            offset = read_u64(key, 9)
            entry = attempt(decode_map, rec.map, offset, raw)
            if entry is None:
                continue
            if offset < end:
                troubles.append(f"two runs of it stand at offset {offset}")
            end = offset + entry.length
            reach = max(reach, entry.value_offset + entry.length)
            length = min(entry.length, stored - entry.value_offset)
            if length > 0:
                total += length
                if len(runs) <= MAX_SORTED:
                    runs.append((entry.value_offset, length))
    if len(runs) <= MAX_SORTED:
        troubles += _holes(runs, stored)
    elif total != stored:
        troubles.append(f"its runs have {total} of the {stored} bytes of its content")
    for trouble in troubles[:5]:
        await patient.found("map", patient.path(ino), trouble)
    if reach > rec.map_bound and reach > stored:
        batch = Batch()
        rec.map_bound = reach
        batch.put(inode_key(ino), encode_inode(rec))
        await patient.found("map-bound", patient.path(ino), "its map reaches further than the inode says", batch)


def _holes(runs: list[tuple[int, int]], stored: int) -> list[str]:
    """Every byte of the value is in exactly one run (N3)."""
    troubles = []
    at = 0
    for offset, length in sorted(runs):
        if offset > at:
            troubles.append(f"bytes {at} to {offset} of its content are at no place in it")
        elif offset < at:
            troubles.append(f"bytes {offset} to {min(at, offset + length)} of its content are at two places in it")
        at = max(at, offset + length)
    if at < stored:
        troubles.append(f"bytes {at} to {stored} of its content are at no place in it")
    return troubles


async def _check_owners(patient: Patient, tally: Tally) -> None:
    async for page in pages(patient.store, INODE):
        for key, _ in page:
            rec = patient.inode(read_u64(key, 1))
            if rec is not None and rec.map:
                tally.add(rec.map)
    for map_id in tally.keys:
        owners = tally.get(map_id)
        mark = patient.store.get(orphan_key(map_id))
        if owners > 1:
            await patient.found("shared", f"file map {map_id}", f"it has {counted(owners, 'inode')}")
        if owners == 0 and mark == ORPHAN_MAP:
            patient.note("pending", f"file map {map_id}", "it is the rest of a removed file's; the next mount removes it")
        elif owners == 0:
            await _unowned(patient, map_id)
        elif mark == ORPHAN_MAP:
            batch = Batch()
            batch.delete(orphan_key(map_id))
            await patient.found("orphan-mark", f"file map {map_id}", "a file uses it, and it is marked as a removed file's", batch)


async def _unowned(patient: Patient, map_id: int) -> None:
    """It is that of a file whose inode was made anew, if there is just one it fits; else it goes as a removed file's does."""
    end = total = reach = 0
    async for page in pages(patient.store, MAP + u64(map_id)):
        for key, raw in page:
            entry = attempt(decode_map, map_id, read_u64(key, 9), raw)
            if entry is not None:
                end, total, reach = read_u64(key, 9) + entry.length, total + entry.length, max(reach, entry.value_offset + entry.length)
    fits: list[tuple[int, InodeRecord]] = []
    for ino in patient.rebuilt:
        rec = patient.inode(ino)
        value = patient.value(rec.value) if rec is not None and rec.value and not rec.map else None
        if rec is not None and value is not None and patient.size_of(rec.value, value.sealed) == total == reach:
            fits.append((ino, rec))
    batch = Batch()
    if len(fits) == 1:
        ino, rec = fits[0]
        rec.map, rec.map_bound, rec.size = map_id, reach, end
        batch.put(inode_key(ino), encode_inode(rec))
        await patient.found("unowned-map", patient.path(ino), f"file map {map_id} is its own, and was lost with its inode", batch)
        return
    if not patient.rebuilt:
        batch.put(orphan_key(map_id), ORPHAN_MAP)
    await patient.found("unowned-map", f"file map {map_id}", f"it places {total} bytes, and no inode has it", batch)


async def _check_marks(patient: Patient) -> None:
    async for page in pages(patient.store, ORPHAN):
        for key, kind in page:
            map_id = read_u64(key, 1)
            start = MAP + u64(map_id)
            if kind == ORPHAN_MAP and not patient.store.scan(start, prefix_end(start), 1):
                patient.note("pending", f"file map {map_id}", "it is removed but for its mark; the next mount takes that away")


async def _check_xattrs(patient: Patient) -> None:
    patient.stage("extended attributes")
    async for page in pages(patient.store, XATTR):
        for key, _ in page:
            if len(key) <= 9:
                continue
            ino = read_u64(key, 1)
            rec = patient.inode(ino)
            batch = Batch()
            if rec is None:
                patient.set_aside(batch, key)
                await patient.found("xattr", f"inode {ino}", "it has an extended attribute, and does not exist", batch)
            elif not rec.flags & HAS_XATTRS:
                rec.flags |= HAS_XATTRS
                batch.put(inode_key(ino), encode_inode(rec))
                await patient.found("xattr", patient.path(ino), "it has extended attributes, and says it has none", batch)
        patient.progress.done += len(page)
