"""A null filesystem on pyfuse3: answers as fusefs does, with the same mount options, and keeps nothing but names and sizes.

What a filesystem in Python costs at the very least. Run as `python -m scripts.benchmarks.nullfs MOUNTPOINT`.
"""

# ruff: noqa: ARG002  handlers have the signatures that pyfuse3 calls

from __future__ import annotations

import errno
import os
import stat
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import pyfuse3
import trio

#: What reads get; longer ones get it again.
_ZEROS = bytes(1 << 20)


@dataclass(slots=True)
class _Inode:
    mode: int
    size: int = 0
    names: dict[bytes, int] = field(default_factory=dict)
    #: Of the entries, for readdir that goes on.
    order: list[bytes] = field(default_factory=list)
    time_ns: int = field(default_factory=time.time_ns)
    target: bytes = b""


class NullOperations(pyfuse3.Operations):
    """See the module."""

    enable_writeback_cache = True
    supports_dot_lookup = False

    def __init__(self) -> None:
        super().__init__()
        self._inodes = {pyfuse3.ROOT_INODE: _Inode(stat.S_IFDIR | 0o755)}
        self._next = 2

    def _entry(self, ino: int) -> pyfuse3.EntryAttributes:
        inode = self._inodes[ino]
        entry = pyfuse3.EntryAttributes()
        entry.st_ino, entry.st_mode, entry.st_size, entry.st_nlink = ino, inode.mode, inode.size, 1
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = inode.time_ns
        entry.entry_timeout = entry.attr_timeout = 3600
        return entry

    def _new(self, parent: int, name: bytes, mode: int) -> int:
        ino, self._next = self._next, self._next + 1
        self._inodes[ino] = _Inode(mode)
        directory = self._inodes[parent]
        directory.names[name] = ino
        directory.order.append(name)
        return ino

    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        ino = self._inodes[parent_inode].names.get(name)
        if ino is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._entry(ino)

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._entry(inode)

    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        if fields.update_size:
            self._inodes[inode].size = attr.st_size
        return self._entry(inode)

    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        raise pyfuse3.FUSEError(errno.ENOSYS)

    def _info(self, fh: int, flags: int) -> pyfuse3.FileInfo:
        writing = flags & os.O_ACCMODE != os.O_RDONLY
        cached = flags & (os.O_ACCMODE | os.O_APPEND) == os.O_WRONLY | os.O_APPEND
        return pyfuse3.FileInfo(fh=fh, direct_io=writing and not cached, keep_cache=True)

    async def create(
        self,
        parent_inode: int,
        name: bytes,
        mode: int,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        ino = self._new(parent_inode, name, stat.S_IFREG | stat.S_IMODE(mode))
        return self._info(ino, flags), self._entry(ino)

    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._entry(self._new(parent_inode, name, stat.S_IFDIR | stat.S_IMODE(mode)))

    async def symlink(
        self,
        parent_inode: int,
        name: bytes,
        target: bytes,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        ino = self._new(parent_inode, name, stat.S_IFLNK | 0o777)
        self._inodes[ino].target = target
        return self._entry(ino)

    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        return self._inodes[inode].target

    async def _remove(self, parent: int, name: bytes) -> None:
        directory = self._inodes[parent]
        ino = directory.names.pop(name, None)
        if ino is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        self._inodes[ino].names.clear()
        if not directory.names:
            directory.order.clear()

    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._remove(parent_inode, name)

    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._remove(parent_inode, name)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        return None

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        if flags & os.O_TRUNC:
            self._inodes[inode].size = 0
        return self._info(inode, flags)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        left = max(0, min(size, self._inodes[fh].size - off))
        return _ZEROS[:left] if left <= len(_ZEROS) else bytes(left)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        inode = self._inodes[fh]
        inode.size = max(inode.size, off + len(buf))
        return len(buf)

    async def flush(self, fh: int) -> None:
        raise pyfuse3.FUSEError(errno.ENOSYS)

    async def release(self, fh: int) -> None:
        return None

    async def fsync(self, fh: int, datasync: bool) -> None:
        return None

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        return None

    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        return inode

    async def releasedir(self, fh: int) -> None:
        return None

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        directory = self._inodes[fh]
        for at in range(start_id, len(directory.order)):
            name = directory.order[at]
            ino = directory.names.get(name)
            if ino is not None and not pyfuse3.readdir_reply(token, name, self._entry(ino), at + 1):
                return

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        told = pyfuse3.StatvfsData()
        told.f_bsize = told.f_frsize = 4096
        told.f_blocks = told.f_bfree = told.f_bavail = told.f_files = told.f_ffree = told.f_favail = 1 << 30
        told.f_namemax = 255
        return told


def main() -> None:
    """Serve until it is unmounted."""
    mountpoint = sys.argv[1]
    pyfuse3.init(NullOperations(), mountpoint, {"default_permissions", "fsname=null", "subtype=null", "allow_other"})
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=True)


if __name__ == "__main__":
    main()
