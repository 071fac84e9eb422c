"""The directory host: `dir:/mnt/disk1`. See `tree` for what lies where and what is durable when.

All blocking work is one hop into a thread per call. Calls that hang (a dead network mount, a dying disk) can be given up by cancelling
them, except conditional puts and deletions, whose outcome must be known; at most `SLOTS` threads are ever caught in one host.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

import trio

from storage.errors import BadArgument, Busy
from storage.hosts.layout import check_name, check_prefix
from storage.hosts.tree import Locked, Tree
from storage.interfaces import Buffer, HostCapabilities, HostSpace, Level
from storage.seams import Seams

T = TypeVar("T")

#: Threads working for one directory at a time.
SLOTS = 6
#: Another process's conditional put is waited for, in steps of this many seconds, this many times (10 s).
LOCK_STEP = 0.02
LOCK_STEPS = 500


class _Abandoned(Exception):
    """The thread came to its turn after the caller had given up: nothing was done."""


class DirectoryHost:
    """See `interfaces.Host`. Open with `DirectoryHost.open`."""

    def __init__(self, tree: Tree, seams: Seams) -> None:
        self._tree = tree
        self._seams = seams
        self._slots = trio.CapacityLimiter(SLOTS)

    @classmethod
    async def open(cls, path: str, seams: Seams, *, url: str = "", create: bool = False) -> DirectoryHost:
        """`path`: absolute. Unavailable if it is missing (unless `create`), no directory, or not accessible."""
        now = seams.clock.time_ns()
        return cls(await seams.threads.run_abandonable(Tree.open, path, url or f"dir:{path}", seams.failpoints, now, create), seams)

    @property
    def url(self) -> str:
        return self._tree.url

    @property
    def capabilities(self) -> HostCapabilities:
        return HostCapabilities(conditional_put=True, ranges=True)

    async def get(self, name: str, limit: int) -> bytes:
        return await self._abandonable(self._tree.get, check_name(name), limit)

    async def get_range(self, name: str, offset: int, length: int) -> bytes:
        if offset < 0 or length < 0:
            raise BadArgument(f"host {self.url}: {name}: {length} bytes at {offset} is no range")
        return await self._abandonable(self._tree.get_range, check_name(name), offset, length)

    async def put(self, name: str, data: Buffer) -> str:
        # Given up, it may still happen: the caller names objects by their content, or does not know anyway.
        return await self._abandonable(self._tree.put, check_name(name), data, self._temporary())

    async def put_if(self, name: str, data: Buffer, expected: str | None) -> str:
        parts = check_name(name)
        for _ in range(LOCK_STEPS):
            try:
                return await self._seams.threads.run(self._tree.put_if, parts, data, self._temporary(), expected)
            except Locked:
                await self._seams.clock.sleep(LOCK_STEP)
        raise Busy(f"host {self.url}: {name}: another process holds the lock {self._tree.path}/~lock; try again")

    async def tag(self, name: str) -> str | None:
        return await self._abandonable(self._tree.tag, check_name(name))

    async def delete(self, name: str) -> None:
        await self._seams.threads.run(self._tree.delete, check_name(name))

    async def list(self, prefix: str) -> AsyncIterator[tuple[str, int]]:
        pending = [check_prefix(prefix)]
        while pending:
            parts = pending.pop()
            objects, directories = await self._abandonable(self._tree.entries, parts)
            pending.extend([*parts, directory] for directory in directories)
            for name, size in objects:
                yield "/".join([*parts, name]), size

    async def level(self, prefix: str) -> Level:
        objects, folders = await self._abandonable(self._tree.entries, check_prefix(prefix))
        return Level(dict(objects), sorted(folders))

    async def space(self) -> HostSpace | None:
        return await self._abandonable(self._tree.space)

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()

    def _temporary(self) -> str:
        return self._seams.random.token_bytes(8).hex()

    async def _abandonable(self, fn: Callable[..., T], *args: object) -> T:
        """Run in a thread, in one of the host's slots, which is free again when the *thread* ends, not when the caller gives up."""
        borrower = _Slot(self._slots)
        await self._slots.acquire_on_behalf_of(borrower)
        try:
            return await self._seams.threads.run_abandonable(borrower.work, fn, *args)
        except BaseException:
            borrower.give_up()
            raise

    def __repr__(self) -> str:
        return f"<DirectoryHost {self.url}, {self._slots.borrowed_tokens} at work>"


class _Slot:
    """One borrowed slot. Given back exactly once: by the thread when it ends, or by the caller if the thread never began."""

    def __init__(self, slots: trio.CapacityLimiter) -> None:
        self._slots = slots
        self._loop = trio.lowlevel.current_trio_token()
        #: Guards the decision who gives back.
        self._lock = threading.Lock()
        self._begun = False
        self._given_up = False

    def work(self, fn: Callable[..., T], *args: object) -> T:
        with self._lock:
            if self._given_up:
                raise _Abandoned
            self._begun = True
        try:
            return fn(*args)
        finally:
            try:
                self._loop.run_sync_soon(self._slots.release_on_behalf_of, self)
            except trio.RunFinishedError:
                # The program ended while the call hung; the slots ended with it.
                pass

    def give_up(self) -> None:
        """In the event loop, after the call failed or was cancelled."""
        with self._lock:
            if self._begun or self._given_up:
                return
            self._given_up = True
        self._slots.release_on_behalf_of(self)
