"""/lost+found: where repairs put inodes that have no name."""

from __future__ import annotations

import stat

from storage.checking.patient import Patient
from storage.interfaces import Batch
from storage.namespace.records import (
    ROOT,
    Dirent,
    InodeRecord,
    cookie_key,
    encode_dirent,
    encode_inode,
    encode_place,
    inode_key,
    name_key,
)

LOST_FOUND = b"lost+found"
_FILE = stat.S_IFREG | 0o600
_DIRECTORY = stat.S_IFDIR | 0o700


def new_record(patient: Patient, mode: int, nlink: int) -> InodeRecord:
    """An inode made up: its attributes are nobody's, so only the volume's owner may look."""
    now = patient.seams.clock.time_ns()
    root = patient.inode(ROOT)
    uid, gid = (root.uid, root.gid) if root is not None else (0, 0)
    return InodeRecord(mode, nlink, uid, gid, 0, 0, 0, 0, 0, 0, now, now, now, 0, b"", 0, "", b"")


def new_file(patient: Patient, batch: Batch, ino: int, value_id: int, size: int) -> InodeRecord:
    """In `batch`: a regular file over the value, without a name; the pass over names gives it those that point to it, or one here."""
    rec = new_record(patient, _FILE, 1)
    rec.value, rec.counted = value_id, size
    batch.put(inode_key(ino), encode_inode(rec))
    return rec


def new_directory(patient: Patient, batch: Batch, ino: int, parent: int, name: bytes) -> InodeRecord:
    """In `batch`: a directory record for entries that have lost theirs."""
    rec = new_record(patient, _DIRECTORY, 2)
    rec.parent, rec.name = parent, name
    batch.put(inode_key(ino), encode_inode(rec))
    return rec


def link(patient: Patient, batch: Batch, parent: int, name: bytes, ino: int, mode: int) -> None:
    """In `batch`: a name with a new place. Only while repairing."""
    cookie = patient.number(b"cookie")
    put(batch, parent, name, Dirent(ino, stat.S_IFMT(mode), cookie))


def put(batch: Batch, parent: int, name: bytes, entry: Dirent) -> None:
    """In `batch`: a name and its place."""
    batch.put(cookie_key(parent, entry.cookie), encode_place(name, entry.ino, entry.type))
    batch.put(name_key(parent, name), encode_dirent(entry))


async def attach(patient: Patient, batch: Batch, ino: int, rec: InodeRecord, name: bytes | None = None) -> str:
    """In `batch`: the inode, with `rec` changed for it, gets its only name in /lost+found. Returns the path."""
    directory = await _directory(patient)
    above = patient.inode(directory)
    if above is None:
        raise RuntimeError("/lost+found is gone right after it was made")
    base = name or str(ino).encode()
    name, tries = base, 0
    while patient.dirent(directory, name) is not None:
        tries += 1
        name = base + b".%d" % tries
    rec.parent, rec.name = directory, name
    if rec.is_dir:
        above.nlink += 1
        batch.put(inode_key(directory), encode_inode(above))
        rec.nlink = max(rec.nlink, 2)
    else:
        rec.nlink = 1
    batch.put(inode_key(ino), encode_inode(rec))
    link(patient, batch, directory, name, ino, rec.mode)
    return f"/{LOST_FOUND.decode()}/{name.decode('utf-8', 'backslashreplace')}"


async def _directory(patient: Patient) -> int:
    """/lost+found's inode, made if need be; another name where that is taken by something else."""
    name, tries = LOST_FOUND, 0
    while (entry := patient.dirent(ROOT, name)) is not None:
        found = patient.inode(entry.ino)
        if found is not None and found.is_dir:
            return entry.ino
        tries += 1
        name = LOST_FOUND + b".%d" % tries
    root = patient.inode(ROOT)
    batch = Batch()
    ino = patient.number(b"inode")
    new_directory(patient, batch, ino, ROOT, name)
    link(patient, batch, ROOT, name, ino, _DIRECTORY)
    if root is not None:
        root.nlink += 1
        batch.put(inode_key(ROOT), encode_inode(root))
    await patient.fix(batch)
    return ino
