"""Attributes as the kernel wants them."""

from __future__ import annotations

from collections.abc import Iterator

import pyfuse3

from storage import Attributes, Listed

#: Seconds the kernel may trust names and attributes: this process is the only writer, and every change comes through the kernel.
CACHE_SECONDS = 86_400.0


def entry_of(attributes: Attributes) -> pyfuse3.EntryAttributes:
    """Attributes in pyfuse3's form. What that has from the beginning is not set: blocks of 4096 bytes, and mostly one name, root and no
    device. Each costs 80 ns of 600."""
    entry = _blank()
    entry.st_ino = attributes.ino
    entry.st_mode = attributes.mode
    if attributes.nlink != 1:
        entry.st_nlink = attributes.nlink
    if attributes.uid:
        entry.st_uid = attributes.uid
    if attributes.gid:
        entry.st_gid = attributes.gid
    if attributes.rdev:
        entry.st_rdev = attributes.rdev
    entry.st_size = attributes.size
    entry.st_blocks = (attributes.stored + 511) // 512
    entry.st_atime_ns = attributes.atime_ns
    entry.st_mtime_ns = attributes.mtime_ns
    entry.st_ctime_ns = attributes.ctime_ns
    return entry


def shown(listed: Listed) -> Iterator[pyfuse3.EntryAttributes]:
    """As `entry_of` each that is listed; but all are one object, which is another's by the time the next one is asked for.

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
