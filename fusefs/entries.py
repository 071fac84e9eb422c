"""Attributes as the kernel wants them."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pyfuse3

from storage import Attributes, Listed

#: Seconds the kernel may trust names and attributes: this process is the only writer, and every change comes through the kernel.
CACHE_SECONDS = 86_400.0


def entry_of(attributes: Attributes) -> pyfuse3.EntryAttributes:
    """Attributes in pyfuse3's form."""
    return _entry(*msgspec.structs.astuple(attributes))


def _entry(
    ino: int, mode: int, nlink: int, uid: int, gid: int, rdev: int, size: int, stored: int, atime_ns: int, mtime_ns: int, ctime_ns: int
) -> pyfuse3.EntryAttributes:
    """What pyfuse3 has from the beginning is not set: blocks of 4096 bytes, and mostly one name, root and no device. Each costs 80 ns of
    600."""
    entry = _blank()
    entry.st_ino = ino
    entry.st_mode = mode
    if nlink != 1:
        entry.st_nlink = nlink
    if uid:
        entry.st_uid = uid
    if gid:
        entry.st_gid = gid
    if rdev:
        entry.st_rdev = rdev
    entry.st_size = size
    entry.st_blocks = (stored + 511) // 512
    entry.st_atime_ns = atime_ns
    entry.st_mtime_ns = mtime_ns
    entry.st_ctime_ns = ctime_ns
    return entry


def entries_of(listed: Listed) -> list[pyfuse3.EntryAttributes]:
    """Each that is listed in pyfuse3's form, to be kept."""
    return [
        # By place: with names it takes twice as long.
        _entry(ino, inode.mode, inode.nlink, inode.uid, inode.gid, inode.rdev, size, stored, inode.atime, inode.mtime, inode.ctime)
        for ino, inode, size, stored in zip(listed.inos, listed.inodes, listed.sizes, listed.stored, strict=True)
    ]


def shown(listed: Listed) -> Iterator[pyfuse3.EntryAttributes]:
    """As `entries_of`, to be used at once: all are one object, which is another's by the time the next one is asked for.

    So what is as before is not set again: of a directory's files that is most.
    """
    entry = _blank()
    mode = nlink = uid = gid = rdev = size = stored = -1
    atime: int | None = None
    mtime: int | None = None
    ctime: int | None = None
    for ino, inode, new_size, new_stored in zip(listed.inos, listed.inodes, listed.sizes, listed.stored, strict=True):
        entry.st_ino = ino
        if inode.mode != mode:
            entry.st_mode = mode = inode.mode
        if inode.nlink != nlink:
            entry.st_nlink = nlink = inode.nlink
        if inode.uid != uid:
            entry.st_uid = uid = inode.uid
        if inode.gid != gid:
            entry.st_gid = gid = inode.gid
        if inode.rdev != rdev:
            entry.st_rdev = rdev = inode.rdev
        if new_size != size:
            entry.st_size = size = new_size
        if new_stored != stored:
            entry.st_blocks = ((stored := new_stored) + 511) // 512
        if inode.atime != atime:
            entry.st_atime_ns = atime = inode.atime
        if inode.mtime != mtime:
            entry.st_mtime_ns = mtime = inode.mtime
        if inode.ctime != ctime:
            entry.st_ctime_ns = ctime = inode.ctime
        yield entry


def _blank() -> pyfuse3.EntryAttributes:
    entry = pyfuse3.EntryAttributes()
    entry.entry_timeout = CACHE_SECONDS
    entry.attr_timeout = CACHE_SECONDS
    return entry
