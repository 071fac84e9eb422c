"""Keeping the kernel's idea of a file and the stored file the same: repair after refused WRITEs, modification times.

With write-back on, the kernel keeps size, times and pages of a cached file itself and does not listen to what handlers answer. It is
wrong in
two situations, and each is set right from a thread (R2):

    a cached WRITE was refused          its size is ahead of ours, and its pages hold bytes that were never stored
                                        -> the inode is tainted: WRITEs beyond the stored end get the same error (R3);
                                           truncate to the stored size; drop the pages
    a direct handle wrote               it did not move its modification time
                                        -> tell it, through the mount (or, for a fraction of a second, take over its time)
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable

import trio

from fusefs.backing import Backing
from fusefs.handles import HandleTable, OpenInode
from fusefs.kernel import KernelCalls
from storage.errors import FusefsError

log = logging.getLogger(__name__)

#: A modification time that is this much ahead of what the kernel shows is told to the kernel; a smaller difference is taken over from it.
NOTICEABLE_NS = 1_000_000_000
#: Inodes whose times are told to the kernel in one round of the periodic task.
TIMES_PER_ROUND = 200
#: Attempts to set the kernel's size back at a moment when nobody appends.
CAREFUL_ATTEMPTS = 20


class Coherence:
    """Tasks started here live in `nursery` and never raise into it."""

    def __init__(self, volume: Backing, handles: HandleTable, kernel: KernelCalls, *, writeback: bool) -> None:
        self._volume = volume
        self._handles = handles
        self._kernel = kernel
        self._writeback = writeback
        self._nursery: trio.Nursery | None = None

    def start(self, nursery: trio.Nursery) -> None:
        """From now on repairs can be done; until then taints stay."""
        self._nursery = nursery

    # ----------------------------------------------------------------------------------------------------------------
    # Refused WRITEs

    def write_refused(self, inode: OpenInode, offset: int, length: int, number: int) -> None:
        """A WRITE got errno `number`. With cached handles open it may have been a dirty page, and the kernel believes it stored.

        A WRITE that lies within the stored file leaves the size right: its pages are dropped, nothing more is to be refused for its sake.
        """
        if not inode.cached_writers:
            return  # every WRITE is direct: its program got the answer, and the kernel's size did not move
        try:
            size = self._volume.namespace.attributes(inode.ino).size
        except FusefsError:
            return  # removed meanwhile
        if offset + length > size:
            inode.taint = number
        self.schedule_repair(inode)

    def schedule_repair(self, inode: OpenInode) -> None:
        """Repair in the background; does nothing while a repair of the inode is under way."""
        if inode.repairing or self._nursery is None:
            return
        inode.repairing = True
        self._nursery.start_soon(self._repair, inode, name=f"repair of inode {inode.ino}")

    async def _repair(self, inode: OpenInode) -> None:
        try:
            if inode.taint is not None:
                await self._shorten(inode, inode.taint)
            await self._kernel.invalidate(inode.ino)
            inode.failed_repairs = 0
            log.warning("inode %d: the kernel's copy was set back to what is stored, after a refused write", inode.ino)
        except OSError as error:
            inode.failed_repairs += 1
            if inode.failed_repairs == 1:
                log.error(
                    "inode %d: the kernel's copy could not be set back to what is stored (%s); writes go on failing", inode.ino, error
                )
        except Exception:
            log.exception("bug in the repair of inode %d", inode.ino)
        finally:
            inode.repairing = False
            self._handles.forget_if_idle(inode)

    async def _shorten(self, inode: OpenInode, number: int) -> None:
        """Make the kernel's size the stored one. The SETATTR handler answers with it and clears the taint in the same step.

        WRITEs of what was dirty before do not come after that: the kernel waits for those it sent and drops the others. So what is dirty
        is written
        first, and refused with an error that programs hear of; only if nobody appended meanwhile is anything dropped. A program that never
        stops appending would keep us from it for ever: in the end it is done in spite of that, and then fsync(2) tells.
        """
        for _ in range(CAREFUL_ATTEMPTS):
            if await self._kernel.truncate_to_stored(inode.ino, self._volume.namespace.path_of(inode.ino), force=False):
                return
        # Before the request, not after: what is dropped must not be confirmed by an fsync in between.
        for handle in self._handles.cached_handles(inode):
            handle.lost = number
        await self._kernel.truncate_to_stored(inode.ino, self._volume.namespace.path_of(inode.ino), force=True)
        for handle in self._handles.cached_handles(inode):
            handle.lost = number

    # ----------------------------------------------------------------------------------------------------------------
    # Modification times

    def settle_times(self, inode: OpenInode) -> None:
        """A writing handle was closed: stored and shown modification time become the same.

        Where the last direct write is noticeably later than what the kernel shows, the kernel is told; else the kernel's is the truth.
        """
        if not self._writeback:
            return  # the kernel takes our times
        try:
            stored = self._volume.namespace.attributes(inode.ino).mtime_ns
        except FusefsError:
            return  # removed meanwhile
        if self._behind(inode) and self._nursery is not None:
            self._nursery.start_soon(self._tell_mtime, inode, stored, name=f"mtime of inode {inode.ino}")
        elif stored != inode.kernel_mtime_ns:
            self._volume.namespace.set_attributes(inode.ino, mtime_ns=inode.kernel_mtime_ns, ctime_ns=inode.kernel_mtime_ns)

    @staticmethod
    def _behind(inode: OpenInode) -> bool:
        return inode.written_ns - inode.kernel_mtime_ns >= NOTICEABLE_NS

    async def _tell_mtime(self, inode: OpenInode, stored_ns: int) -> None:
        """Tell the kernel the time of the last direct write; `stored_ns` is the stored time this was decided on."""
        try:
            path = self._volume.namespace.path_of(inode.ino)
            await self._kernel.set_mtime(inode.ino, path, inode.written_ns, stored_ns)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE, errno.ENOTCONN, errno.ECONNABORTED, errno.ENODEV):
                log.info("inode %d: its modification time could not be told to the kernel: %s", inode.ino, error)
        except Exception:
            log.exception("bug while telling the kernel a modification time")

    # ----------------------------------------------------------------------------------------------------------------

    async def write_back(self, on_error: Callable[[OSError], None]) -> None:
        """Have the kernel write its dirty pages. `on_error` gets what was refused; the programs hear of it from fsync or close."""
        # A tainted inode's pages are refused anyway, and set right by its repair.
        inos = [inode.ino for inode in self._handles.inodes() if inode.cached_writers and inode.taint is None]
        if inos:
            try:
                await self._kernel.write_back(inos)
            except OSError as error:
                on_error(error)

    async def periodic(self, on_error: Callable[[OSError], None]) -> None:
        """One round: dirty pages are written, failed repairs tried again, times of direct writers told.

        Only while a cached handle is open: no other page can be dirty, and an open descriptor of ours would make umount(8) say "busy".
        """
        await self.write_back(on_error)
        told = 0
        for inode in self._handles.inodes():
            if inode.taint is not None:
                self.schedule_repair(inode)
            if not self._writeback or not self._behind(inode) or told >= TIMES_PER_ROUND:
                continue
            try:
                stored = self._volume.namespace.attributes(inode.ino).mtime_ns
            except FusefsError:
                continue
            told += 1
            await self._tell_mtime(inode, stored)
