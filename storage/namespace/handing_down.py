"""Handing down: the files that are below a directory are given a replication, in slices, after a restart from where it was.

    mark on the directory  ->  its files are given it, its directories marked in turn, slice by slice  ->  mark gone

Each slice is one batch with the note of how far it has come, so it does not matter where a crash comes in between. Directories below lose
a replication of their own: as with chmod -R, afterwards one holds for all. What is moved into a part that has been done meanwhile stays
as it is. A file with several names is one file.

| key | value |
|---|---|
| `j` + directory inode u64 | version byte (1), MessagePack array: replication, cookie of the last entry done |
"""

from __future__ import annotations

import logging
import stat

import trio

from storage.errors import FusefsError, NotADirectory, NotFound
from storage.interfaces import Entry, MetadataStore, Values
from storage.metadata.keys import HANDING_DOWN, prefix_end, read_u64
from storage.namespace.directories import Directories
from storage.namespace.inodes import Change, InodeTable
from storage.namespace.records import HandingDownRecord, decode_handing_down, encode_handing_down, handing_down_key
from storage.seams import Failpoints

log = logging.getLogger("fusefs.namespace")

#: Entries per batch.
SLICE = 64


class HandingDown:
    """The marks, and what walks them. `finish` may be called by several tasks at a time."""

    def __init__(self, store: MetadataStore, inodes: InodeTable, directories: Directories, values: Values, failpoints: Failpoints) -> None:
        self._store = store
        self._inodes = inodes
        self._directories = directories
        self._values = values
        self._hit = failpoints.hit

    def begin(self, change: Change, directory: int, spec: str) -> None:
        """In the change: everything below is to be given `spec`."""
        change.batch.put(handing_down_key(directory), encode_handing_down(HandingDownRecord(spec, 0)))

    def pending(self, limit: int = 100_000) -> int:
        """Directories whose files are still to be told, as far as they are found; at most `limit` are counted."""
        return len(self._store.scan(HANDING_DOWN, prefix_end(HANDING_DOWN), limit))

    async def finish(self) -> None:
        """No mark is left when it returns. Fenced."""
        while self.step():
            await trio.lowlevel.checkpoint()

    def step(self) -> bool:
        """One slice of one directory, one batch. False if there was nothing to do. No await."""
        found = self._store.scan(HANDING_DOWN, prefix_end(HANDING_DOWN), 1)
        if not found:
            return False
        key, raw = found[0]
        self._inodes.check_writable()
        change = Change(self._inodes)
        try:
            ino = read_u64(key, 1)
            record = decode_handing_down(ino, raw)
            entries = self._directories.entries(ino, record.after, SLICE)
        except (NotFound, NotADirectory):
            # Removed meanwhile.
            entries, record = [], None
        except FusefsError as error:
            # One damaged directory must not keep all others from being told.
            log.error("what is below a damaged directory keeps its replication: %s", error)
            entries, record = [], None
        if record is None or not entries:
            change.batch.delete(key)
        else:
            told: set[int] = set()
            for entry in entries:
                if entry.ino not in told:
                    told.add(entry.ino)
                    self._tell(change, entry, record.replication)
            change.batch.put(key, encode_handing_down(HandingDownRecord(record.replication, entries[-1].cookie)))
        self._hit("handing_down.before_apply")
        change.apply()
        return True

    def _tell(self, change: Change, entry: Entry, spec: str) -> None:
        try:
            if stat.S_ISDIR(entry.mode):
                inode = self._inodes.directory(entry.ino)
                if inode.rec.replication:
                    change.edit(inode).replication = ""
                self.begin(change, entry.ino, spec)
            elif stat.S_ISREG(entry.mode):
                self._values.set_replication(change.batch, self._inodes.regular(entry.ino).rec.value, spec)
        except FusefsError as error:
            log.error("%s keeps its replication: %s", self._directories.describe(entry.ino), error)
