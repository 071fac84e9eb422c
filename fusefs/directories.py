"""Handlers on names: lookup, making, removing, renaming and linking, reading directories, lookup counts."""

# ruff: noqa: ARG002  handlers have the signatures that pyfuse3 calls

from __future__ import annotations

import errno
import logging
import stat
from collections.abc import Sequence
from functools import partial
from itertools import repeat
from operator import length_hint

import pyfuse3

from fusefs.base import HandlerBase, check_name, negative_entry
from fusefs.entries import entry_of
from fusefs.guard import guarded
from fusefs.listings import FETCH_MOST
from storage.errors import NotFound, NotPermitted

log = logging.getLogger(__name__)

#: Cookies 1 and 2 stand behind "." and ".."; an entry's own cookie is moved up by this.
DOT_COOKIES = 2


class DirectoryHandlers(HandlerBase):
    """pyfuse3 handlers; see `pyfuse3.Operations` for their contracts."""

    @guarded
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        check_name(name)
        if name == b".":  # NFS export and open_by_handle_at
            return self.pinned_entry(parent_inode)
        if name == b"..":
            return self.pinned_entry(self.namespace.parent_of(parent_inode))
        ino = self.namespace.find(parent_inode, name)
        return negative_entry() if ino is None else self.pinned_entry(ino)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        # There is no request to answer, so nothing at all may be raised (R1).
        for ino, count in inode_list:
            try:
                self.namespace.unpin(ino, count)
            except Exception:
                log.exception("bug in the handler of forget, inode %d", ino)

    @guarded
    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        check_name(name)
        await self.namespace.hold_back()
        return self.pinned_entry(self.namespace.create(parent_inode, name, mode, ctx.uid, ctx.gid, rdev))

    @guarded
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        check_name(name)
        await self.namespace.hold_back()
        return self.pinned_entry(self.namespace.mkdir(parent_inode, name, stat.S_IMODE(mode), ctx.uid, ctx.gid))

    @guarded
    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        check_name(name)
        await self.namespace.hold_back()
        return self.pinned_entry(self.namespace.symlink(parent_inode, name, target, ctx.uid, ctx.gid))

    @guarded
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        return self.namespace.readlink(inode)

    @guarded
    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        if self.options.link_denied:
            raise NotPermitted("hard links are off on this mount (-o link=deny)")
        check_name(new_name)
        await self.namespace.hold_back()
        self.namespace.link(inode, new_parent_inode, new_name)
        return self.pinned_entry(inode)

    @guarded
    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self.namespace.keep_pace(removing=True)
        self.namespace.unlink(parent_inode, name)

    @guarded
    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self.namespace.keep_pace(removing=True)
        self.namespace.rmdir(parent_inode, name)

    @guarded
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        if flags & ~(pyfuse3.RENAME_NOREPLACE | pyfuse3.RENAME_EXCHANGE):
            raise pyfuse3.FUSEError(errno.EINVAL)
        check_name(name_new)
        await self.namespace.keep_pace()
        exchange = bool(flags & pyfuse3.RENAME_EXCHANGE)
        await self._write_back(parent_inode_old, name_old)
        if exchange:
            await self._write_back(parent_inode_new, name_new)
        await self.namespace.rename(
            parent_inode_old,
            name_old,
            parent_inode_new,
            name_new,
            noreplace=bool(flags & pyfuse3.RENAME_NOREPLACE),
            exchange=exchange,
        )

    async def _write_back(self, parent: int, name: bytes) -> None:
        """Before a rename: what programs have written to the file by now is written here, so that it goes with the rename.

        The kernel sends RENAME without waiting for dirty pages. A page that is refused fails the rename: else it would replace good
        content by less than the program wrote.
        """
        inode = self.handles.inode(self.namespace.lookup(parent, name))
        if inode is None or not inode.cached_writers:
            return  # no cached handle: no dirty page
        await self.kernel.invalidate(inode.ino)
        if inode.taint is not None:
            raise pyfuse3.FUSEError(inode.taint)

    # ----------------------------------------------------------------------------------------------------------------
    # Reading directories. The handle is the inode number: there is nothing to keep between calls, cookies say where to go on.

    @guarded
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        return inode

    @guarded
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        # No await from here on: an entry's attributes, its place in the reply and its pin belong together (R4). An error that is
        # answered sends no entry, and so nothing is pinned.
        sent: list[int] = []
        try:
            self._fill(fh, start_id, token, sent)
        except NotFound:
            pass  # removed while open: empty, as POSIX has it
        self.namespace.pin_listed(sent)

    def _fill(self, ino: int, start_id: int, token: pyfuse3.ReaddirToken, sent: list[int]) -> None:
        """`sent` takes the inode numbers of what the reply took, without the dots."""
        if start_id < 1 and not pyfuse3.readdir_reply(token, b".", entry_of(self.namespace.attributes(ino)), 1):
            return
        if start_id < DOT_COOKIES:
            parent = entry_of(self.namespace.attributes(self.namespace.parent_of(ino)))
            if not pyfuse3.readdir_reply(token, b"..", parent, DOT_COOKIES):
                return
        after = max(0, start_id - DOT_COOKIES)
        page = self.listings.first(ino, after)
        while page.names:
            cookies = iter([cookie + DOT_COOKIES for cookie in page.cookies])
            # Until one does not fit. Without a loop of Python's: with one, this takes twice as long.
            fitted = all(map(pyfuse3.readdir_reply, repeat(token), page.names, page.entries, cookies))
            count = len(page.names) - length_hint(cookies) - (not fitted)
            sent += page.inos[:count]
            if count:
                after = page.cookies[count - 1]
            if not fitted:
                self._go_on_ahead(ino, after, len(sent))
                return
            if self.listings.ended:
                self.listings.done(ino, after)
                return
            if len(sent) >= FETCH_MOST:
                # A program that asks for a megabyte gets it in several replies: others have their turn in between.
                self._go_on_ahead(ino, after, len(sent))
                return
            page = self.listings.more(ino, after)

    def _go_on_ahead(self, ino: int, after: int, sent: int) -> None:
        """The kernel has enough to do with this reply, and we with the next."""
        self.receiver.afterwards(partial(self.listings.go_on, ino, after, sent))

    @guarded
    async def releasedir(self, fh: int) -> None:
        return None

    @guarded
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self.namespace.commit(fh)
        if self.options.fsync_hosts:
            await self.volume.publish()
