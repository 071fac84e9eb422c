"""Open file handles, and what is known of an inode while any is open on it."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

import pyfuse3

from storage import Turn


@dataclass(slots=True)
class OpenInode:
    """State of an inode with an open handle, or tainted; forgotten when it is neither."""

    ino: int
    #: The modification time the kernel has (R5): what it was told when the handle was opened, or what it set since.
    kernel_mtime_ns: int
    #: Time of the last direct WRITE that nobody set a modification time after; 0: none.
    written_ns: int = 0
    handles: int = 0
    #: Handles whose writes may be dirty pages in the kernel. 0: every WRITE is direct, and no page is dirty.
    cached_writers: int = 0
    #: Handles that read through the page cache.
    readers: int = 0
    #: errno of the refused cached WRITE that left the kernel ahead of us; None: not tainted. Set and read without an await between.
    taint: int | None = None
    #: A repair task runs, or will before long.
    repairing: bool = False
    #: Truncated to 0 through a handle or with O_TRUNC, and the new tail not committed yet.
    commit_at_release: bool = False
    #: Times at which a repair could not be done; it is tried again by the periodic task.
    failed_repairs: int = 0
    #: WRITEs of one inode one after the other, in the order they came: a later one must see whether an earlier one was refused (R3), and
    #: files stay one straight run.
    write_lock: Turn = field(default_factory=Turn)


@dataclass(slots=True)
class Handle:
    """One open file description."""

    fh: int
    inode: OpenInode
    pid: int
    writing: bool
    cached: bool
    #: A writer who is not root clears the setuid and setgid bits with his first write.
    clears_setuid: bool = False
    #: errno for the next fsync(2): a repair may have dropped what was written through this handle.
    lost: int | None = None

    @property
    def ino(self) -> int:
        return self.inode.ino


@dataclass(slots=True)
class HandleTable:
    """fh -> Handle, ino -> OpenInode. All methods are synchronous: handlers rely on nothing happening in between."""

    _handles: dict[int, Handle] = field(default_factory=dict)
    _inodes: dict[int, OpenInode] = field(default_factory=dict)
    _last_fh: int = 0

    def open(self, ino: int, pid: int, mtime_ns: int, *, writing: bool, cached: bool) -> Handle:
        inode = self._inodes.get(ino)
        if inode is None:
            inode = self._inodes[ino] = OpenInode(ino, kernel_mtime_ns=mtime_ns)
        inode.handles += 1
        inode.cached_writers += cached
        inode.readers += not writing
        self._last_fh += 1
        handle = Handle(self._last_fh, inode, pid, writing, cached)
        self._handles[handle.fh] = handle
        return handle

    def get(self, fh: int) -> Handle:
        handle = self._handles.get(fh)
        if handle is None:
            raise pyfuse3.FUSEError(errno.EBADF)
        return handle

    def close(self, fh: int) -> Handle:
        handle = self.get(fh)
        del self._handles[fh]
        inode = handle.inode
        inode.handles -= 1
        inode.cached_writers -= handle.cached
        inode.readers -= not handle.writing
        self.forget_if_idle(inode)
        return handle

    def forget_if_idle(self, inode: OpenInode) -> None:
        """Drop the inode's state once no handle is open on it; a taint keeps it, because the kernel stays ahead of us beyond the last
        close."""
        if not inode.handles and inode.taint is None:
            self._inodes.pop(inode.ino, None)

    def inode(self, ino: int) -> OpenInode | None:
        """None unless a handle is open on it, or it is tainted."""
        return self._inodes.get(ino)

    def cached_handles(self, inode: OpenInode) -> list[Handle]:
        return [handle for handle in self._handles.values() if handle.inode is inode and handle.cached]

    def inodes(self) -> list[OpenInode]:
        return list(self._inodes.values())

    @property
    def cached_writers(self) -> int:
        """Handles, over all inodes, that may have dirty pages in the kernel."""
        return sum(inode.cached_writers for inode in self._inodes.values())

    def __len__(self) -> int:
        return len(self._handles)
