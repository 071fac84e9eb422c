"""Handlers on content: create, open, read, write, flush, release, fsync."""

# ruff: noqa: ARG002  handlers have the signatures that pyfuse3 calls

from __future__ import annotations

import errno
import os
import re
import stat

import pyfuse3
import trio

from fusefs.attributes import without_setuid
from fusefs.base import HandlerBase, check_name
from fusefs.entries import entry_of
from fusefs.errno_map import errno_of
from fusefs.guard import guarded
from fusefs.handles import Handle, OpenInode
from storage import Attributes
from storage.errors import FusefsError, NotFound


def drops_pages_under_direct_writes(release: str) -> bool:
    """Whether Linux `release` drops the cached pages that a direct write covers. It does since 6.6; before, a reader may see zeros
    there."""
    version = re.match(r"(\d+)\.(\d+)", release)
    return version is not None and (int(version[1]), int(version[2])) >= (6, 6)


class ContentHandlers(HandlerBase):
    """pyfuse3 handlers; see `pyfuse3.Operations` for their contracts."""

    #: False on kernels that leave stale pages under direct writes: then we drop them.
    kernel_drops_pages = drops_pages_under_direct_writes(os.uname().release)

    @guarded
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        check_name(name)
        await self.namespace.hold_back()
        ino = self.namespace.create(parent_inode, name, stat.S_IFREG | stat.S_IMODE(mode), ctx.uid, ctx.gid)
        # No await up to the return: an error after the pin would leave it behind.
        attributes = self.namespace.attributes(ino)
        info, entry = self._file_info(attributes, flags, ctx), entry_of(attributes)
        self.namespace.pin_seen(ino)
        return info, entry

    @guarded
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        if flags & os.O_TRUNC:
            await self.namespace.keep_pace(removing=True)
        before = self.namespace.attributes(inode)
        if not flags & os.O_TRUNC:
            return self._file_info(before, flags, ctx)
        if before.size:
            self.namespace.truncate(inode, 0)
        info = self._file_info(self.namespace.attributes(inode), flags, ctx, truncated=before.size > 0)
        if ctx.uid != 0 and without_setuid(before.mode) != before.mode:
            self.namespace.set_attributes(inode, mode=stat.S_IMODE(without_setuid(before.mode)))
        return info

    def _file_info(self, attributes: Attributes, flags: int, ctx: pyfuse3.RequestContext, *, truncated: bool = False) -> pyfuse3.FileInfo:
        """Open a handle, cached or direct, on what these are the attributes of now. No await."""
        ino = attributes.ino
        writing = flags & os.O_ACCMODE != os.O_RDONLY
        cached = (
            writing
            and self.options.writeback
            and flags & (os.O_ACCMODE | os.O_APPEND) == os.O_WRONLY | os.O_APPEND
            and self.volume.values.accepting()
            and self.namespace.last_page_local(ino)
        )
        handle = self.handles.open(ino, ctx.pid, attributes.mtime_ns, writing=writing, cached=cached)
        handle.clears_setuid = writing and ctx.uid != 0 and without_setuid(attributes.mode) != attributes.mode
        if truncated:
            handle.inode.taint = None  # the kernel's size is 0 as well now
            handle.inode.commit_at_release = True
        # Stored bytes never change, so pages may outlive the handle; except under O_TRUNC, and where the kernel keeps stale ones.
        keep = not truncated and self.kernel_drops_pages
        return pyfuse3.FileInfo(fh=handle.fh, direct_io=writing and not cached, keep_cache=keep)

    @guarded
    async def read(self, fh: int, off: int, size: int) -> bytes | bytearray | memoryview:  # type: ignore[override]  # pyfuse3 takes any buffer
        # May come on a write-only handle: the kernel completes a page it is about to write.
        inode = self.handles.get(fh).inode
        if inode.taint is not None and off + size > self.namespace.attributes(inode.ino).size:
            # R3: the kernel believes that there is more, and would show zeros for what was refused.
            raise pyfuse3.FUSEError(inode.taint)
        now = self.namespace.read_now(inode.ino, off, size)
        return await self.namespace.read(inode.ino, off, size) if now is None else now

    @guarded
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        handle = self.handles.get(fh)  # perhaps not the handle that was written to, with cached handles: only the inode counts
        inode = handle.inode
        try:
            # NO AWAIT between the look at the lock and the end of the write: nobody comes between, and it need not be taken.
            if inode.write_lock.locked() or not self._write_now(inode, off, buf):
                await self._write_in_turn(inode, off, buf)
        except pyfuse3.FUSEError:
            raise
        except FusefsError as error:
            self.coherence.write_refused(inode, off, len(buf), errno_of(error))
            raise
        except Exception:
            self.coherence.write_refused(inode, off, len(buf), errno.EIO)
            raise
        if not inode.cached_writers:
            inode.written_ns = self.volume.seams.clock.time_ns()
            if handle.clears_setuid:
                self._clear_setuid(handle)
        if not self.kernel_drops_pages and (inode.readers or inode.cached_writers) and not handle.cached:
            await self.kernel.invalidate(inode.ino)
        return len(buf)

    def _write_now(self, inode: OpenInode, off: int, buf: bytes) -> bool:
        """False: it has to wait for something. Who calls it has the lock, or knows that nobody has."""
        # R3. Also where it begins within the file: the kernel may have dropped what was refused, and have read its page anew, with zeros.
        if inode.taint is not None and off + len(buf) > self.namespace.attributes(inode.ino).size:
            raise pyfuse3.FUSEError(inode.taint)
        return self.namespace.write_now(inode.ino, off, buf)

    async def _write_in_turn(self, inode: OpenInode, off: int, buf: bytes) -> None:
        """Right after `write` looked at the lock: where nobody has it, `_write_now` was tried."""
        lock = inode.write_lock
        tried = not lock.locked()
        if tried:
            lock.acquire_nowait()  # without a checkpoint
        else:
            await lock.acquire()
        try:
            if tried or not self._write_now(inode, off, buf):
                await self.namespace.write(inode.ino, off, buf)
        finally:
            lock.release()

    def _clear_setuid(self, handle: Handle) -> None:
        handle.clears_setuid = False
        mode = self.namespace.attributes(handle.ino).mode
        self.namespace.set_attributes(handle.ino, mode=stat.S_IMODE(without_setuid(mode)))

    @guarded
    async def flush(self, fh: int) -> None:
        # ENOSYS once: the kernel then writes dirty pages at close(2) and reports their errors, but asks us no more.
        raise pyfuse3.FUSEError(errno.ENOSYS)

    @guarded
    async def release(self, fh: int) -> None:
        handle = self.handles.close(fh)
        if not handle.writing:
            return
        inode = handle.inode
        self.coherence.settle_times(inode)
        if inode.commit_at_release:
            await self._commit_truncated(inode)

    async def _commit_truncated(self, inode: OpenInode) -> None:
        """The file was emptied and written anew: the new content becomes durable, so that a crash does not leave it empty for long.

        close(2) does not wait for it. Not to be interrupted by an unmount that follows at once.
        """
        inode.commit_at_release = False
        with trio.CancelScope(shield=True):
            try:
                await self.namespace.commit(inode.ino)
            except NotFound:
                pass  # removed meanwhile

    @guarded
    async def fsync(self, fh: int, datasync: bool) -> None:
        self.receiver.awake.asked()
        handle = self.handles.get(fh)
        if handle.lost is not None:
            number, handle.lost = handle.lost, None
            raise pyfuse3.FUSEError(number)
        await self.namespace.commit(handle.ino)
        if self.options.fsync_hosts:
            await self.volume.publish()
