"""How what is below a directory is stored: files and bytes by replication, and how much is still in sectors of another."""

from __future__ import annotations

import stat

import trio

from storage.errors import NotFound
from storage.interfaces import Values
from storage.namespace.directories import Directories
from storage.namespace.inodes import InodeTable
from storage.status import StoredAs

#: Entries looked at between two checkpoints.
SLICE = 200
#: Files with several names that are remembered, so that each counts once; beyond these each name counts (I7).
MAX_LINKED = 1_000_000


class Survey:
    """Walks one tree, in slices: what changes meanwhile may be counted or not."""

    def __init__(self, inodes: InodeTable, directories: Directories, values: Values) -> None:
        self._inodes = inodes
        self._directories = directories
        self._values = values
        #: replication -> [files, bytes, misplaced]
        self._found: dict[str, list[int]] = {}
        self._linked: set[int] = set()

    async def below(self, ino: int) -> list[StoredAs]:
        """Of the inode and everything below it, by replication."""
        if self._inodes.get(ino).rec.is_regular:
            await self._file(ino)
        else:
            await self._directory(ino)
        return [StoredAs(spec, *counts) for spec, counts in sorted(self._found.items())]

    async def _directory(self, top: int) -> None:
        stack = [(top, 0)]
        while stack:
            ino, after = stack.pop()
            try:
                entries = self._directories.entries(ino, after, SLICE)
            except NotFound:
                continue
            if entries:
                stack.append((ino, entries[-1].cookie))
            for entry in entries:
                if stat.S_ISREG(entry.mode):
                    await self._file(entry.ino)
                elif stat.S_ISDIR(entry.mode):
                    stack.append((entry.ino, 0))
            await trio.lowlevel.checkpoint()

    async def _file(self, ino: int) -> None:
        try:
            rec = self._inodes.regular(ino).rec
            spec, size = self._values.replication_of(rec.value), self._values.size_of(rec.value)
        except NotFound:
            return
        if rec.nlink > 1:
            if ino in self._linked:
                return
            if len(self._linked) < MAX_LINKED:
                self._linked.add(ino)
        stored = await self._values.stored_as(rec.value)
        counts = self._found.setdefault(spec, [0, 0, 0])
        counts[0] += 1
        counts[1] += size
        counts[2] += sum(length for other, length in stored.items() if other != spec)
