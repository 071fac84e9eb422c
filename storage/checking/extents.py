"""Values: each belongs to one file; its extents go from 0 to `sealed` without a gap, and point into sectors that are on record.

What is lost is looked for before anything is given up: an extent in the tables at the end of the sectors that hold more live bytes than
extents say; a sector's record by the id in the headers of shards that belong to no sector on record.
What stays lost cuts the file off there. What stands behind the gap goes to files of its own in /lost+found: nothing is deleted.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from storage.checking.lostfound import attach
from storage.checking.patient import Patient, attempt
from storage.checking.rescue import Rescue
from storage.checking.scanning import pages
from storage.interfaces import Batch, TailPiece
from storage.metadata.keys import EXTENT, GARBAGE, INODE, MISPLACED, VALUE, read_u64, u64
from storage.replication import parse_replication
from storage.values.records import VERSION, Extent, ValueRecord, decode_extent, value_key


async def check_extents(patient: Patient) -> None:
    """Values and extents; after this, under repair, every file has a value that can be read from its start to its end."""
    rescue = Rescue(patient)
    await _files_have_values(patient)
    await _values_have_files(patient, rescue)
    await _extents_have_values(patient, rescue)
    patient.stage("looking for what is lost")
    if patient.repair:
        await rescue.find_sectors()
        await rescue.find_extents()
    patient.stage("values")
    async for page in pages(patient.store, VALUE):
        for key, _ in page:
            await _check_value(patient, rescue, read_u64(key, 1))
        patient.progress.done += len(page)
    patient.report.looked_at["values"] = patient.progress.done
    await patient.commit()


# ---- whose is what


async def _files_have_values(patient: Patient) -> None:
    patient.stage("files and their values")
    async for page in pages(patient.store, INODE):
        for key, _ in page:
            ino = read_u64(key, 1)
            rec = patient.inode(ino)
            if rec is not None and rec.value:
                await _check_file(patient, ino, rec.value)
        patient.progress.done += len(page)


async def _check_file(patient: Patient, ino: int, value_id: int) -> None:
    batch = Batch()
    record = patient.value(value_id)
    if record is None:
        sealed, sector_id = _run_from_start(patient, value_id)
        sector = patient.sector(sector_id) if sector_id else None
        spec = sector.replication if sector is not None else patient.config.replication
        batch.put(value_key(value_id), ValueRecord(VERSION, ino, spec, sealed).encode())
        batch.delete(GARBAGE + u64(value_id))
        what = f"the record of its content (value {value_id}) is missing; {sealed} bytes of it are there"
        await patient.found("missing-value", patient.path(ino), what, batch)
        return
    if patient.store.get(GARBAGE + u64(value_id)) is not None:
        batch.delete(GARBAGE + u64(value_id))
        await patient.found("garbage-in-use", patient.path(ino), f"its content (value {value_id}) is marked as freed", batch)
    if record.owner == ino:
        return
    other = patient.inode(record.owner)
    if other is not None and other.value == value_id:
        await patient.found("shared", patient.path(ino), f"it has the same content (value {value_id}) as {patient.path(record.owner)}")
        return
    batch = Batch()
    batch.put(value_key(value_id), ValueRecord(VERSION, ino, record.replication, record.sealed).encode())
    await patient.found("value-owner", patient.path(ino), f"its content (value {value_id}) says it belongs to inode {record.owner}", batch)


def _run_from_start(patient: Patient, value_id: int) -> tuple[int, int]:
    """(end of the extents that follow one another from 0, the first one's sector)."""
    at, first = 0, 0
    prefix = EXTENT + u64(value_id)
    while raw := patient.store.get(prefix + u64(at)):
        extent = attempt(decode_extent, prefix + u64(at), raw)
        if extent is None or not extent.length:
            break
        first = first or extent.sector_id
        at = extent.end
    return at, first


async def _values_have_files(patient: Patient, rescue: Rescue) -> None:
    patient.stage("values and their files")
    async for page in pages(patient.store, VALUE):
        for key, _ in page:
            value_id = read_u64(key, 1)
            record = patient.value(value_id)
            if record is None:
                continue
            rec = patient.inode(record.owner)
            if rec is not None and rec.value == value_id:
                continue
            size = patient.size_of(value_id, record.sealed)
            if rec is None and record.owner:
                batch = Batch()
                rescue.new_file(batch, record.owner, value_id, size)
                what = f"the inode is missing, its content of {size} bytes (value {value_id}) is there"
                if await patient.found("lost-inode", f"inode {record.owner}", what, batch):
                    patient.rebuilt.append(record.owner)
                continue
            batch = Batch()
            if patient.repair:
                ino = patient.number(b"inode")
                rescue.new_file(batch, ino, value_id, size)
                batch.put(key, ValueRecord(VERSION, ino, record.replication, record.sealed).encode())
            await patient.found("unowned-value", f"value {value_id}", f"{size} bytes belong to no file", batch)
        patient.progress.done += len(page)


async def _extents_have_values(patient: Patient, rescue: Rescue) -> None:
    """Jumps from value to value."""
    patient.stage("extents and their values")
    at = EXTENT
    while found := patient.store.scan(at, EXTENT + b"\xff" * 20, 1):
        value_id = read_u64(found[0][0], 1)
        at = EXTENT + u64(value_id) + b"\xff" * 9
        patient.progress.done += 1
        if patient.store.get(VALUE + u64(value_id)) is None and patient.store.get(GARBAGE + u64(value_id)) is None:
            first = attempt(decode_extent, *found[0])
            last = attempt(decode_extent, *patient.store.scan(EXTENT + u64(value_id), at, 1, reverse=True)[0])
            if first is None or last is None:
                continue
            end = last.end
            batch = Batch()
            if patient.repair:
                ino = patient.number(b"inode")
                sector = patient.sector(first.sector_id)
                spec = sector.replication if sector is not None else patient.config.replication
                rescue.new_file(batch, ino, value_id, end)
                # As long as the extents reach: where some are missing, `_check_value` says so.
                batch.put(value_key(value_id), ValueRecord(VERSION, ino, spec, end).encode())
            what = f"extents up to {end} bytes have neither a value nor a mark that it was freed"
            await patient.found("unowned-extents", f"value {value_id}", what, batch)
        if patient.progress.done % 500 == 0:
            await patient.seams.clock.sleep(0)


# ---- one value


@dataclass(slots=True)
class _Walk:
    """A value's extents in order. `at`: up to where they follow one another; `behind`: what stands after the first gap."""

    at: int = 0
    gap: int = -1
    behind: list[Extent] = field(default_factory=list)
    #: Replication -> bytes in sectors of it.
    stored: dict[str, int] = field(default_factory=dict)
    bad: list[tuple[bytes, str]] = field(default_factory=list)


def _walk(patient: Patient, page: list[tuple[bytes, bytes]], walk: _Walk) -> None:
    for key, raw in page:
        extent = attempt(decode_extent, key, raw)
        if extent is None:
            continue
        why = _wrong(patient, extent, walk)
        sector = patient.sector(extent.sector_id)
        if sector is not None:
            spec = str(parse_replication(sector.replication))
            walk.stored[spec] = walk.stored.get(spec, 0) + extent.length
        if why:
            walk.bad.append((key, why))
        elif walk.gap < 0 and extent.offset == walk.at:
            walk.at = extent.end
        else:
            if walk.gap < 0:
                walk.gap = extent.offset
            walk.behind.append(extent)


def _wrong(patient: Patient, extent: Extent, walk: _Walk) -> str:
    if not extent.length:
        return "it is empty"
    end = walk.behind[-1].end if walk.behind else walk.at
    if extent.offset < end:
        return f"it begins before {end}, where another ends"
    sector = patient.sector(extent.sector_id)
    if sector is None:
        return f"sector {extent.sector_id} is not on record"
    if extent.position + extent.length > sector.length:
        return f"it points outside sector {extent.sector_id}"
    return ""


async def _check_value(patient: Patient, rescue: Rescue, value_id: int) -> None:
    record = patient.value(value_id)
    if record is None:
        return
    walk = _Walk()
    async for page in pages(patient.store, EXTENT + u64(value_id)):
        _walk(patient, page, walk)
    misplaced = sum(walk.stored.values()) - walk.stored.get(str(parse_replication(record.replication)), 0)
    if misplaced and patient.store.get(MISPLACED + u64(value_id)) is None:
        batch = Batch()
        batch.put(MISPLACED + u64(value_id), u64(misplaced))
        what = f"{misplaced} bytes of it are in sectors of another replication than {record.replication}, and nothing says so"
        await patient.found("misplaced", patient.file_of(value_id), what, batch)
    if walk.at == record.sealed and not walk.behind and not walk.bad:
        return
    where = patient.file_of(value_id)
    if walk.at > record.sealed and not walk.behind and not walk.bad:
        # Extents are there only once their sectors are durable (I2): they are right, the record is not.
        batch = Batch()
        batch.put(value_key(value_id), ValueRecord(VERSION, record.owner, record.replication, walk.at).encode())
        what = f"value {value_id} says {record.sealed} bytes are in sectors, {walk.at} are"
        await patient.found("sealed", where, what, batch)
        return
    # While a host is away, what is missing may be on it: then nothing is given up yet.
    give_up = patient.repair and patient.hosts_complete
    for key, why in walk.bad:
        batch = Batch()
        if give_up:
            patient.set_aside(batch, key)
        await patient.found(
            "bad-extent", where, f"the extent for offset {read_u64(key, 9)} of value {value_id} cannot be used: {why}", batch
        )
    if walk.behind or walk.at < record.sealed:
        upto = walk.behind[0].offset if walk.behind else record.sealed
        what = (
            f"bytes {walk.at} to {upto} of value {value_id} (of {patient.size_of(value_id, record.sealed)}) are in no sector that is known"
        )
        kept = await _cut(patient, rescue, value_id, record, walk) if give_up else []
        if kept:
            what += f"; what comes after is kept in {', '.join(kept)}"
        patient.report.add("gap", where, what, repaired=give_up)


async def _cut(patient: Patient, rescue: Rescue, value_id: int, record: ValueRecord, walk: _Walk) -> list[str]:
    """Cut the value off at the gap; each run behind it becomes a file. One batch: no byte is ever nowhere."""
    batch = Batch()
    runs: list[list[Extent]] = []
    for extent in walk.behind:
        if runs and runs[-1][-1].end == extent.offset:
            runs[-1].append(extent)
        else:
            runs.append([extent])
    batch.put(value_key(value_id), ValueRecord(VERSION, record.owner, record.replication, walk.at).encode())
    tail = [(offset, data) for offset, data in patient.tail_bytes(value_id) if offset + len(data) > record.sealed]
    pieces: list[TailPiece] = []
    kept: list[str] = []
    starts = [run[0].offset for run in runs]
    if tail and (not runs or runs[-1][-1].end != record.sealed):
        runs.append([])
        starts.append(record.sealed)
    for run, start in zip(runs, starts, strict=True):
        new_id, ino = patient.number(b"value"), patient.number(b"inode")
        for extent in run:
            batch.delete(extent.key)
            moved = Extent(new_id, extent.offset - start, extent.sector_id, extent.position, extent.length)
            batch.put(moved.key, moved.encode())
        sealed = (run[-1].end if run else start) - start
        size = sealed
        if tail and start + sealed == record.sealed:
            joined = _joined(tail, record.sealed)
            pieces.append(TailPiece(new_id, sealed, (joined,)))
            size += len(joined)
            patient.tails[new_id] = [(sealed, len(joined))]
        batch.put(value_key(new_id), ValueRecord(VERSION, ino, record.replication, sealed).encode())
        name = f"{record.owner}.from-{start}".encode()
        rec = rescue.new_file(batch, ino, new_id, size)
        kept.append(await attach(patient, batch, ino, rec, name))
    patient.tails.pop(value_id, None)
    await patient.fix(batch, pieces)
    return kept


def _joined(pieces: list[tuple[int, bytes]], start: int) -> bytes:
    """What of a value's tails goes on from `start`, as `Values.recover` does it."""
    out = bytearray()
    for offset, data in sorted(pieces, key=lambda piece: piece[0]):
        at = start + len(out)
        if offset <= at < offset + len(data):
            out += data[at - offset :]
    return bytes(out)
