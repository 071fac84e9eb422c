"""The directory host: `dir:/mnt/disk1`. See `tree` for what lies where and what is durable when.

All blocking work is one hop into a thread per call, or none where the coprocess does it and ends soon. Calls that hang (a dead network
mount, a dying disk) can be given up by cancelling them; at most `SLOTS` threads are ever caught in one host, and the one that opens files
briefly (see `held`).
What becomes of changes that were given up: see `slots`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import TypeVar

import trio

from storage.errors import BadArgument, Busy
from storage.hosts.delegating import DelegatingTree
from storage.hosts.layout import check_name, check_prefix
from storage.hosts.slots import Slots
from storage.hosts.tree_lock import Locked
from storage.interfaces import Buffer, HostCapabilities, HostSpace, Level, RangeOpening
from storage.seams import Seams

T = TypeVar("T")

#: Threads working for one directory at a time.
SLOTS = 6
#: Another process's conditional put is waited for, in steps of this many seconds, this many times (10 s).
LOCK_STEP = 0.02
LOCK_STEPS = 500


class DirectoryHost:
    """See `interfaces.Host`. Open with `DirectoryHost.open`."""

    def __init__(self, tree: DelegatingTree, seams: Seams) -> None:
        self._tree = tree
        self._seams = seams
        #: What its temporary files' names begin with, and how many there were.
        self._own = seams.random.token_bytes(8).hex()
        self._temporaries = 0
        self._slots = Slots(tree.url, SLOTS, seams.threads.run_abandonable, "see whether its disk answers")

    @classmethod
    async def open(cls, path: str, seams: Seams, *, url: str = "", create: bool = False) -> DirectoryHost:
        """`path`: absolute. Unavailable if it is missing (unless `create`), no directory, or not accessible."""
        now, url = seams.clock.time_ns(), url or f"dir:{path}"
        return cls(await seams.threads.run_abandonable(url, DelegatingTree.open, path, url, seams.failpoints, now, create), seams)

    @property
    def url(self) -> str:
        return self._tree.url

    @property
    def capabilities(self) -> HostCapabilities:
        return HostCapabilities(conditional_put=True, ranges=True)

    async def get(self, name: str, limit: int) -> bytes:
        return await self._slots.read(self._tree.get, check_name(name), limit)

    async def get_range(self, name: str, offset: int, length: int) -> bytes:
        if offset < 0 or length < 0:
            raise BadArgument(f"host {self.url}: {name}: {length} bytes at {offset} is no range")
        return await self._slots.read(self._tree.get_range, name, check_name(name), offset, length)

    async def get_range_opened(self, name: str, offset: int, length: int, step: int, opening: RangeOpening) -> int:
        """See `interfaces.QuickHost`."""
        parts = check_name(name)
        begin = partial(self._tree.begin_reading, parts, offset, length, step, opening) if self._seams.threads.apart else None
        return await self._slots.read(self._tree.get_range_opened, parts, offset, length, step, opening, begin=begin)

    def get_range_now(self, name: str, offset: int, length: int) -> memoryview | None:
        """See `interfaces.QuickHost`."""
        return self._tree.read_now(name, offset, length)

    def soon(self, name: str, patience: float = 0.0) -> bool:
        """See `interfaces.QuickHost`."""
        return self._tree.holds(name, patience)

    async def put(self, name: str, data: Buffer) -> str:
        parts = check_name(name)
        slot = self._slots.changing(name)
        temporary = self._temporary()
        begin = partial(self._tree.begin_put, parts, data, temporary, slot.wanted, slot.tell) if self._seams.threads.apart else None
        return await self._slots.run(slot, self._tree.put, parts, data, temporary, slot.wanted, slot.tell, begin=begin)

    async def put_if(self, name: str, data: Buffer, expected: str | None) -> str:
        """As `interfaces.Host`. Cancelled: read what is there, it may have happened."""
        parts = check_name(name)
        for _ in range(LOCK_STEPS):
            slot = self._slots.changing(name)
            try:
                return await self._slots.run(slot, self._tree.put_if, parts, data, self._temporary(), expected, slot.wanted)
            except Locked:
                await self._seams.clock.sleep(LOCK_STEP)
        raise Busy(f"host {self.url}: {name}: another process holds the lock {self._tree.path}/~lock; try again")

    async def tag(self, name: str) -> str | None:
        return await self._slots.read(self._tree.tag, check_name(name))

    async def delete(self, name: str) -> None:
        parts = check_name(name)
        slot = self._slots.changing(name)
        await self._slots.run(slot, self._tree.delete, parts, slot.wanted)

    async def list(self, prefix: str) -> AsyncIterator[tuple[str, int]]:
        pending = [check_prefix(prefix)]
        while pending:
            parts = pending.pop()
            objects, directories = await self._slots.read(self._tree.entries, parts)
            pending.extend([*parts, directory] for directory in directories)
            for name, size in objects:
                yield "/".join([*parts, name]), size

    async def level(self, prefix: str) -> Level:
        objects, folders = await self._slots.read(self._tree.entries, check_prefix(prefix))
        return Level(dict(objects), sorted(folders))

    async def tidy(self, prefix: str) -> None:
        """See `interfaces.TidyHost`."""
        await self._slots.read(self._tree.tidy, check_prefix(prefix))

    async def space(self) -> HostSpace | None:
        return await self._slots.read(self._tree.space)

    async def aclose(self) -> None:
        self._tree.close()
        await trio.lowlevel.checkpoint()

    def _temporary(self) -> str:
        """A name nobody else uses (who does all the same is noticed when it is made)."""
        self._temporaries += 1
        return f"{self._own}-{self._temporaries:x}"

    def __repr__(self) -> str:
        return f"<DirectoryHost {self.url}, {self._slots.at_work} at work>"
