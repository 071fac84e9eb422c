"""How long an inode lives: as long as it has a name or a pin. Without a name and pinned, it is an orphan: removed at the next open."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import trio

from storage.errors import BadArgument, Corrupt
from storage.interfaces import MetadataStore, Values
from storage.metadata.keys import ORPHAN, prefix_end, read_u64
from storage.namespace.filemap import FileMap
from storage.namespace.inodes import Change, Inode, InodeTable
from storage.namespace.records import HAS_XATTRS, ORPHAN_INODE, ORPHAN_MAP, inode_key, orphan_key
from storage.namespace.xattrs import Xattrs

log = logging.getLogger("fusefs.namespace")

_SLICE = 64


class Lifetime:
    """Pins and what follows from the last name and the last pin."""

    def __init__(self, store: MetadataStore, inodes: InodeTable, values: Values, filemap: FileMap, xattrs: Xattrs) -> None:
        self._store = store
        self._inodes = inodes
        self._values = values
        self._filemap = filemap
        self._xattrs = xattrs
        #: ino -> pins, never 0.
        self._pins: dict[int, int] = {}
        #: Invariant: every pinned inode without a name is here; others may be, if the batch that took the last name was refused.
        self._nameless: set[int] = set()

    def pin(self, ino: int) -> None:
        """NotFound."""
        if ino not in self._pins and self._inodes.get(ino).rec.nlink == 0:
            self._nameless.add(ino)
        self.pin_seen(ino)

    def pin_seen(self, ino: int) -> None:
        """As `pin`, of an inode that is known to exist and to have a name, or to be pinned."""
        self._pins[ino] = self._pins.get(ino, 0) + 1

    def pin_listed(self, inos: Sequence[int]) -> None:
        """As `pin_seen` of each."""
        fresh = dict.fromkeys(inos, 1)
        if len(fresh) == len(inos) and self._pins.keys().isdisjoint(inos):
            self._pins.update(fresh)
        else:
            for ino in inos:
                self.pin_seen(ino)

    def unpin(self, ino: int, count: int) -> None:
        """With the last pin of an orphan goes its content. BadArgument: more than were pinned. Fenced: the next open removes it."""
        if count == 0:
            return
        pins = self._pins.get(ino, 0)
        if not 0 < count <= pins:
            raise BadArgument(f"inode {ino} is pinned {pins} times, not {count}")
        if count < pins:
            self._pins[ino] = pins - count
            return
        del self._pins[ino]
        if ino not in self._nameless:
            return  # Nearly always: and nothing is fetched of what the kernel forgets by the thousand.
        self._nameless.discard(ino)
        inode = self._inodes.get(ino)
        if inode.rec.nlink == 0:
            change = Change(self._inodes)
            self._free(change, inode)
            change.apply()

    def lost_name(self, change: Change, inode: Inode, now: int) -> None:
        """In the batch that removes a name of something other than a directory."""
        rec = change.edit(inode)
        rec.nlink -= 1
        rec.ctime = now
        if rec.nlink == 0:
            self._lost_last_name(change, inode)

    def lost_directory(self, change: Change, inode: Inode, now: int) -> None:
        """In the batch that removes an (empty) directory."""
        rec = change.edit(inode)
        rec.nlink = 0
        rec.ctime = now
        self._lost_last_name(change, inode)

    def _lost_last_name(self, change: Change, inode: Inode) -> None:
        if inode.ino in self._pins:
            self._nameless.add(inode.ino)
            change.batch.put(orphan_key(inode.ino), ORPHAN_INODE)
        else:
            self._free(change, inode)

    def _free(self, change: Change, inode: Inode) -> None:
        rec = inode.rec
        self._inodes.check_writable()
        if rec.value:
            self._values.free(change.batch, rec.value)
        if rec.map:
            self._filemap.drop(change.batch, rec.map)
        if rec.flags & HAS_XATTRS:
            self._xattrs.drop_all(change.batch, inode.ino)
        change.batch.delete(orphan_key(inode.ino))
        change.drop(inode)

    async def reap(self) -> int:
        """Remove what an earlier process left without a name, and the rest of large maps, a slice at a time; returns how many."""
        reaped = 0
        at, stop = ORPHAN, prefix_end(ORPHAN)
        while page := self._store.scan(at, stop, _SLICE):
            for key, kind in page:
                # Looked at again: since the scan somebody may have unpinned it, or another reaper have been here.
                try:
                    if self._store.get(key) is not None:
                        reaped += await self._reap_one(read_u64(key, 1), kind)
                except Corrupt as error:
                    # One damaged record must not keep all others' space.
                    log.error("the space of a removed file stays: %s", error)
                await trio.lowlevel.checkpoint()
            at = page[-1][0] + b"\0"
        return reaped

    async def _reap_one(self, number: int, kind: bytes) -> int:
        if kind == ORPHAN_MAP:
            while self._filemap.drop_slice(number):
                await trio.lowlevel.checkpoint()
            return 1
        if number in self._pins:
            return 0
        change = Change(self._inodes)
        if self._store.get(inode_key(number)) is None:
            change.batch.delete(orphan_key(number))
        else:
            self._free(change, self._inodes.get(number))
        change.apply()
        return 1
