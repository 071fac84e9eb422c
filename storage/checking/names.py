"""Names, places, links and directories: who can be reached, and from where.

First each name by itself (its directory, its inode, its place), then the directories' way up, then how many names each inode has.
"""

from __future__ import annotations

import stat

from storage.checking import lostfound
from storage.checking.patient import Patient, attempt
from storage.checking.scanning import Tally, pages, under, windows
from storage.interfaces import Batch
from storage.metadata.keys import COOKIE, INODE, NAME, ORPHAN, read_u64, u64
from storage.namespace.directories import show
from storage.namespace.records import (
    COUNTS_KEY,
    ORPHAN_INODE,
    ROOT,
    CountsRecord,
    Dirent,
    InodeRecord,
    cookie_key,
    decode_counts,
    decode_place,
    encode_counts,
    encode_dirent,
    encode_inode,
    inode_key,
    name_key,
    orphan_key,
)
from storage.wording import counted

#: Directories known to be reachable that are remembered, so that a deep tree is not walked again for each of its directories.
_REACHED = 100_000


async def check_names(patient: Patient) -> None:
    """After this, under repair, every inode has as many names as it says, and all are below the root, or it is an orphan."""
    await _check_root(patient)
    await _check_hints(patient)
    await _check_each_name(patient)
    await _check_places(patient)
    await _check_ways_up(patient)
    patient.stage("links")
    async for tally in windows(patient.store, INODE, lambda key: read_u64(key, 1), columns=2):
        await _check_links(patient, tally)
    await _check_counts(patient)
    await patient.commit()


async def _check_root(patient: Patient) -> None:
    root = patient.inode(ROOT)
    if root is not None and root.is_dir and root.parent == ROOT:
        return
    batch = Batch()
    lostfound.new_directory(patient, batch, ROOT, ROOT, b"")
    await patient.found("root-directory", "/", "the record of the root directory is missing or is none", batch)


async def _check_hints(patient: Patient) -> None:
    """The (parent, name) that a file remembers is not another's. One that nobody has is looked at when its names are counted."""
    patient.stage("inodes")
    async for page in pages(patient.store, INODE):
        for key, _ in page:
            ino = read_u64(key, 1)
            rec = patient.inode(ino)
            if rec is not None and not rec.is_dir and rec.parent and rec.nlink:
                entry = patient.dirent(rec.parent, rec.name)
                if entry is not None and entry.ino != ino:
                    await _forget_hint(patient, ino, rec)
        patient.progress.done += len(page)
    patient.report.looked_at["inodes"] = patient.progress.done


async def _forget_hint(patient: Patient, ino: int, rec: InodeRecord) -> None:
    batch = Batch()
    what = f"it remembers the name {show(rec.name)!r} in {patient.path(rec.parent)}, which is not its own"
    rec.parent, rec.name = 0, b""
    batch.put(inode_key(ino), encode_inode(rec))
    await patient.found("hint", f"inode {ino}", what, batch)


def _lost_its_name(patient: Patient, rec: InodeRecord) -> bool:
    """It remembers a name in a directory that is there, and has none of that name."""
    if not (rec.parent and rec.name and rec.nlink):
        return False
    return _is_directory(patient, rec.parent) and patient.dirent(rec.parent, rec.name) is None


async def _give_back(patient: Patient, ino: int, rec: InodeRecord) -> None:
    batch = Batch()
    if patient.repair:
        lostfound.link(patient, batch, rec.parent, rec.name, ino, rec.mode)
    what = f"it should be {show(rec.name)!r} in {patient.path(rec.parent)}, which has no such name"
    await patient.found("lost-name", f"inode {ino}", what, batch)


async def _check_each_name(patient: Patient) -> None:
    patient.stage("names")
    async for page in pages(patient.store, NAME):
        for key, _ in page:
            if len(key) > 9:
                await _check_name(patient, read_u64(key, 1), key[9:])
        patient.progress.done += len(page)
    patient.report.looked_at["names"] = patient.progress.done


async def _check_name(patient: Patient, parent: int, name: bytes) -> None:
    entry = patient.dirent(parent, name)
    if entry is None:
        return
    where = f"{patient.path(parent).rstrip('/')}/{show(name)}"
    above = patient.inode(parent)
    if above is not None and not above.is_dir:
        batch = Batch()
        patient.set_aside(batch, name_key(parent, name))
        batch.delete(cookie_key(parent, entry.cookie))
        await patient.found("dangling-name", where, f"{patient.path(parent)}, which it is in, is not a directory", batch)
        return
    if above is None:
        batch = Batch()
        lostfound.new_directory(patient, batch, parent, ROOT, b"")
        await patient.found("lost-inode", f"inode {parent}", f"the directory that {show(name)!r} is in has no record", batch)
    rec = patient.inode(entry.ino)
    if rec is None:
        batch = Batch()
        if entry.type == stat.S_IFDIR and _has_entries(patient, entry.ino):
            lostfound.new_directory(patient, batch, entry.ino, parent, name)
            await patient.found("lost-inode", where, f"the directory's inode {entry.ino} is missing, its entries are there", batch)
        else:
            patient.set_aside(batch, name_key(parent, name))
            batch.delete(cookie_key(parent, entry.cookie))
            await patient.found("dangling-name", where, f"its inode {entry.ino} does not exist, nor any content of it", batch)
        return
    there = patient.place(parent, entry.cookie)
    if rec.type != entry.type:
        batch = Batch()
        right = Dirent(entry.ino, rec.type, entry.cookie)
        batch.put(name_key(parent, name), encode_dirent(right))
        if there == (name, entry):  # which says the same: one finding
            there = (name, right)
            lostfound.put(batch, parent, name, right)
        entry = right
        await patient.found("entry-type", where, "the directory says it is of another type than it is", batch)
    if rec.is_dir and (rec.parent, rec.name) != (parent, name):
        await _check_directory_name(patient, entry.ino, rec, parent, name, where)
        return
    await _check_place(patient, parent, name, entry, there, where)


async def _check_directory_name(patient: Patient, ino: int, rec: InodeRecord, parent: int, name: bytes, where: str) -> None:
    """A name of a directory that is not the one the directory knows."""
    batch = Batch()
    own = patient.dirent(rec.parent, rec.name)
    if ino != ROOT and (own is None or own.ino != ino):
        rec.parent, rec.name = parent, name
        batch.put(inode_key(ino), encode_inode(rec))
        await patient.found("hint", where, "the directory remembers another parent or name", batch)
        return
    entry = patient.dirent(parent, name)
    patient.set_aside(batch, name_key(parent, name))
    if entry is not None and _has_place(patient, parent, name, entry):
        batch.delete(cookie_key(parent, entry.cookie))
    await patient.found("directory-names", where, f"it is a second name of the directory {patient.path(ino)}", batch)


async def _check_place(patient: Patient, parent: int, name: bytes, entry: Dirent, there: tuple[bytes, Dirent] | None, where: str) -> None:
    """`there`: what is on record at the place of `entry`."""
    if there == (name, entry):
        return
    batch = Batch()
    if there is None:
        lostfound.put(batch, parent, name, entry)
        await patient.found("place", where, "it has no place in its directory", batch)
        return
    if there[0] == name:
        lostfound.put(batch, parent, name, entry)
        await patient.found("place", where, "its place in the directory says something else of it", batch)
        return
    other = patient.dirent(parent, there[0])
    if other is None or other.cookie != entry.cookie:
        lostfound.put(batch, parent, name, entry)
    elif patient.repair:
        lostfound.link(patient, batch, parent, name, entry.ino, entry.type)
    await patient.found("place", where, f"its place in the directory is said to be that of {show(there[0])!r}", batch)


def _has_place(patient: Patient, parent: int, name: bytes, entry: Dirent) -> bool:
    """The place of `entry` is that of `name`."""
    there = patient.place(parent, entry.cookie)
    return there is not None and there[0] == name


async def _check_places(patient: Patient) -> None:
    patient.stage("places")
    async for page in pages(patient.store, COOKIE):
        for key, raw in page:
            place = attempt(decode_place, key, raw)
            if place is None:
                continue  # told with the records
            parent, name, cookie = read_u64(key, 1), place[0], place[1].cookie
            entry = patient.dirent(parent, name)
            # One that differs was told with its name, which has a place of its own now.
            if entry is None or (entry.cookie != cookie and _has_place(patient, parent, name, entry)):
                batch = Batch()
                patient.set_aside(batch, key)
                where = f"{patient.path(parent).rstrip('/')}/{show(name)}"
                await patient.found("place", where, "there is a place for it in its directory, and no such name", batch)
        patient.progress.done += len(page)


def _is_directory(patient: Patient, ino: int) -> bool:
    rec = patient.inode(ino)
    return rec is not None and rec.is_dir


def _has_entries(patient: Patient, ino: int) -> bool:
    return any(patient.store.scan(prefix + u64(ino), prefix + u64(ino + 1), 1) for prefix in (NAME, COOKIE))


# ---- up


async def _check_ways_up(patient: Patient) -> None:
    """Every directory's parents lead to the root, or to one without a name, which is found next. A circle is opened."""
    patient.stage("directories")
    reached: dict[int, None] = {ROOT: None}
    async for page in pages(patient.store, INODE):
        for key, _ in page:
            ino = read_u64(key, 1)
            rec = patient.inode(ino)
            if rec is not None and rec.is_dir:
                if ino != ROOT and _lost_its_name(patient, rec):
                    # Any other name of it would have been found, and remembered, with the names.
                    await _give_back(patient, ino, rec)
                await _walk_up(patient, ino, reached)
        patient.progress.done += len(page)


async def _walk_up(patient: Patient, ino: int, reached: dict[int, None]) -> None:
    way: dict[int, None] = {}
    at = ino
    while at not in reached:
        rec = patient.inode(at)
        if at in way:
            await _open_circle(patient, at)
            break
        entry = patient.dirent(rec.parent, rec.name) if rec is not None and rec.is_dir else None
        if rec is None or entry is None or entry.ino != at:
            break
        way[at] = None
        at = rec.parent
    reached |= way
    while len(reached) > _REACHED:
        del reached[next(iter(reached))]
    reached[ROOT] = None


async def _open_circle(patient: Patient, ino: int) -> None:
    rec = patient.inode(ino)
    batch = Batch()
    where = f"inode {ino}"
    if rec is not None and patient.repair:
        entry = patient.dirent(rec.parent, rec.name)
        batch.delete(name_key(rec.parent, rec.name))
        if entry is not None:
            batch.delete(cookie_key(rec.parent, entry.cookie))
        where = await lostfound.attach(patient, batch, ino, rec)
    await patient.found("circle", where, f"directory inode {ino} is below itself", batch)


# ---- how many names


async def _check_links(patient: Patient, tally: Tally) -> None:
    async for page in pages(patient.store, NAME):
        for key, _ in page:
            parent = read_u64(key, 1)
            entry = patient.dirent(parent, key[9:])
            if entry is not None:
                tally.add(entry.ino)
                if entry.type == stat.S_IFDIR:
                    tally.add(parent, column=1)
    for at, ino in enumerate(tally.keys):
        rec = patient.inode(ino)
        if rec is not None:
            await _check_inode_links(patient, ino, rec, tally.columns[0][at], tally.columns[1][at])
        patient.progress.done += 1
        if at % 500 == 0:
            await patient.seams.clock.sleep(0)


async def _check_inode_links(patient: Patient, ino: int, rec: InodeRecord, names: int, below: int) -> None:
    mark = patient.store.get(orphan_key(ino))
    if not rec.is_dir and _lost_its_name(patient, rec):
        if names < rec.nlink:
            await _give_back(patient, ino, rec)
            names += 1
        else:
            await _forget_hint(patient, ino, rec)
    if names == 0 and ino != ROOT:
        if rec.nlink == 0 and mark == ORPHAN_INODE:
            patient.note("pending", f"inode {ino}", "it was removed while it was open; the next mount removes it")
            return
        await _reattach(patient, ino, rec, below)
        return
    if mark == ORPHAN_INODE:
        batch = Batch()
        batch.delete(orphan_key(ino))
        await patient.found("orphan-mark", patient.path(ino), "it has a name and is marked as one without", batch)
    expected = 2 + below if rec.is_dir else names
    if rec.nlink != expected:
        batch = Batch()
        where = patient.path(ino)
        what = f"it says it has {rec.nlink} links, and has {expected}"
        rec.nlink = expected
        batch.put(inode_key(ino), encode_inode(rec))
        await patient.found("links", where, what, batch)


async def _reattach(patient: Patient, ino: int, rec: InodeRecord, below: int) -> None:
    if rec.is_dir and _lost_its_name(patient, rec):
        return  # Told already; under repair it has the name by now.
    batch = Batch()
    what = "it has no name"
    if patient.repair:
        rec.nlink = 2 + below if rec.is_dir else 1
        path = await lostfound.attach(patient, batch, ino, rec)
        batch.delete(orphan_key(ino))
        what += f"; it is {path} now"
    await patient.found("unreachable", f"inode {ino}", what, batch)


async def _check_counts(patient: Patient) -> None:
    inodes = files = size = 0
    async for page in pages(patient.store, INODE):
        for key, _ in page:
            rec = patient.inode(read_u64(key, 1))
            if rec is not None:
                inodes, files, size = inodes + 1, files + rec.is_regular, size + rec.counted
    patient.report.looked_at["files"] = files
    patient.report.looked_at["bytes"] = size
    now = CountsRecord(inodes=inodes, files=files, bytes=size)
    raw = patient.store.get(COUNTS_KEY)
    said = attempt(decode_counts, raw) if raw is not None else None
    if said != now:
        batch = Batch()
        batch.put(COUNTS_KEY, encode_counts(now))
        told = (
            "nothing" if said is None else f"{counted(said.inodes, 'inode')}, {counted(said.files, 'file')}, {counted(said.bytes, 'byte')}"
        )
        await patient.found("counts", "totals", f"they say {told}; there are {inodes}, {files}, {size}", batch)


async def check_orphans(patient: Patient) -> None:
    """Marks of inodes that are gone."""
    for key, kind in under(patient.store, ORPHAN):
        ino = read_u64(key, 1)
        if kind == ORPHAN_INODE and patient.store.get(inode_key(ino)) is None:
            batch = Batch()
            batch.delete(key)
            await patient.found("stale-mark", f"inode {ino}", "it is marked as one without a name, and does not exist", batch)
