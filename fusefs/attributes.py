"""Handlers on attributes: getattr, setattr, access, statfs, extended attributes."""

# ruff: noqa: ARG002  handlers have the signatures that pyfuse3 calls

from __future__ import annotations

import errno
import logging
import stat

import pyfuse3

from fusefs.base import HandlerBase
from fusefs.entries import entry_of
from fusefs.guard import guarded
from fusefs.handles import OpenInode
from storage.errors import NotFound

log = logging.getLogger(__name__)


def without_setuid(mode: int) -> int:
    """`mode` as chown(2), write(2) and truncate(2) leave it: no setuid bit, and no setgid bit where the group may execute."""
    mode &= ~stat.S_ISUID
    if mode & stat.S_IXGRP:
        mode &= ~stat.S_ISGID
    return mode


class AttributeHandlers(HandlerBase):
    """pyfuse3 handlers; see `pyfuse3.Operations` for their contracts."""

    @guarded
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return entry_of(self.namespace.attributes(inode))

    @guarded
    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        own = self.kernel.own_request(ctx.pid)
        if own is None:
            # As with O_TRUNC: emptying a file makes room.
            await self.namespace.keep_pace(removing=fields.update_size and attr.st_size == 0)
        # No await from here on: size, taint, times and the answer are one step.
        opened = self.handles.inode(inode)
        if own is not None:
            if own.ino != inode:
                raise pyfuse3.FUSEError(errno.ESTALE)  # reached by path, and another file has that path now
            if own.expected_mtime_ns is None:
                if fields.update_mtime and not own.forced:
                    raise pyfuse3.FUSEError(errno.EAGAIN)  # appended to meanwhile: see `MountCalls.truncate_to_stored`
                if fields.update_mtime:
                    self.namespace.set_attributes(inode, mtime_ns=attr.st_mtime_ns, ctime_ns=attr.st_mtime_ns)
                if opened is not None:
                    opened.taint = None  # with this answer the kernel's size is the stored one again
                    if fields.update_mtime:
                        opened.kernel_mtime_ns = attr.st_mtime_ns
                return entry_of(self.namespace.attributes(inode))
            if self.namespace.attributes(inode).mtime_ns != own.expected_mtime_ns:
                raise pyfuse3.FUSEError(errno.ESTALE)  # written to or touched meanwhile: that is the newer word
        mode: int | None = None
        if fields.update_size:
            mode = self._truncate(inode, attr.st_size, opened, ctx)
        if fields.update_mode:
            mode = stat.S_IMODE(attr.st_mode)
        elif fields.update_uid or fields.update_gid:
            current = self.namespace.attributes(inode).mode
            if not stat.S_ISDIR(current):
                mode = stat.S_IMODE(without_setuid(current))
        mtime_ns = attr.st_mtime_ns if fields.update_mtime else None
        self.namespace.set_attributes(
            inode,
            mode=mode,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=mtime_ns,
            ctime_ns=attr.st_ctime_ns if fields.update_ctime else None,
        )
        if opened is not None and mtime_ns is not None:
            opened.kernel_mtime_ns = mtime_ns
            # The kernel writes back a time of its own (O_TRUNC moved it) as mtime = ctime, without atime. Anything else is a program's
            # word,
            # and newer than the writes before it.
            if fields.update_atime or not fields.update_ctime or attr.st_ctime_ns != mtime_ns:
                opened.written_ns = 0
        return entry_of(self.namespace.attributes(inode))

    def _truncate(self, ino: int, size: int, opened: OpenInode | None, ctx: pyfuse3.RequestContext) -> int | None:
        """Set the size; returns the permission bits it leaves, None for "unchanged".

        Dirty pages may not have been written yet. They cannot be asked for here (the kernel holds them back until we answer), and need not
        be: what becomes a hole now is filled when they come. Only bytes that were refused will never come, so those are no hole (R3).
        """
        before = self.namespace.attributes(ino)
        if opened is not None and opened.taint is not None and size > before.size:
            raise pyfuse3.FUSEError(opened.taint)
        self.namespace.truncate(ino, size)
        if opened is not None:
            opened.taint = None
            if size == 0 and before.size > 0:
                opened.commit_at_release = True
        if ctx.uid != 0 and without_setuid(before.mode) != before.mode:
            return stat.S_IMODE(without_setuid(before.mode))
        return None

    @guarded
    async def access(self, inode: int, mode: int, ctx: pyfuse3.RequestContext) -> bool:
        return True  # never asked: with default_permissions the kernel decides

    # ----------------------------------------------------------------------------------------------------------------

    @guarded
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        # As `du` has it: what files hold, however often it is stored, and with whomever the hosts' disks are shared.
        room = self.volume.room()
        data = pyfuse3.StatvfsData()
        data.f_bsize = 4096
        data.f_frsize = 4096
        data.f_bfree = data.f_bavail = room.free // 4096
        data.f_blocks = -(-room.used // 4096) + data.f_bfree
        data.f_files = room.files + (1 << 32)
        data.f_ffree = data.f_favail = 1 << 32
        data.f_namemax = 255
        return data

    # ----------------------------------------------------------------------------------------------------------------
    # Extended attributes: only with -o xattr. ENOSYS tells the kernel never to ask again, which saves a request with every write(2).

    def _need_xattrs(self, name: bytes = b"user.") -> None:
        if not self.options.xattr:
            raise pyfuse3.FUSEError(errno.ENOSYS)
        if name.startswith(b"system."):
            raise pyfuse3.FUSEError(errno.ENOTSUP)  # ACLs would have to be obeyed, not only stored

    @guarded
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        self._need_xattrs(name)
        try:
            return self.namespace.getxattr(inode, name)
        except NotFound:
            raise pyfuse3.FUSEError(errno.ENODATA) from None

    @guarded
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext) -> None:
        self._need_xattrs(name)
        await self.namespace.keep_pace()
        self.namespace.setxattr(inode, name, value)

    @guarded
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> list[bytes]:
        self._need_xattrs()
        return self.namespace.listxattr(inode)

    @guarded
    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        self._need_xattrs(name)
        await self.namespace.keep_pace()
        try:
            self.namespace.removexattr(inode, name)
        except NotFound:
            raise pyfuse3.FUSEError(errno.ENODATA) from None
