"""Attributes as the kernel wants them."""

from __future__ import annotations

import msgspec
import pyfuse3

from storage import Attributes

#: Seconds the kernel may trust names and attributes: this process is the only writer, and every change comes through the kernel.
CACHE_SECONDS = 86_400.0


def entry_of(attributes: Attributes) -> pyfuse3.EntryAttributes:
    """Attributes in pyfuse3's form."""
    return shown(*msgspec.structs.astuple(attributes))


def shown(
    ino: int, mode: int, nlink: int, uid: int, gid: int, rdev: int, size: int, stored: int, atime_ns: int, mtime_ns: int, ctime_ns: int
) -> pyfuse3.EntryAttributes:
    """As `entry_of` what `Attributes` holds.

    What pyfuse3 has from the beginning is not set: blocks of 4096 bytes, and mostly one name, root and no device. Each costs 80 ns of 600,
    and a listing is made of these.
    """
    entry = pyfuse3.EntryAttributes()
    entry.entry_timeout = CACHE_SECONDS
    entry.attr_timeout = CACHE_SECONDS
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
