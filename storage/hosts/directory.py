"""The directory host: `dir:/mnt/disk1`. See `tree` for what lies where and what is durable when.

All blocking work is one hop into a thread per call. Calls that hang (a dead network mount, a dying disk) can be given up by cancelling
them; at most `SLOTS` threads are ever caught in one host.

Whoever gives up a put, conditional put or deletion does not know whether it happens. It does not, if it hung before the step that counts
(rename, unlink), and it is the only change of that object while it hangs: others are refused with Unavailable until its thread has
ended. So a deletion that was given up never takes away what was put afterwards.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

import trio

from storage.errors import BadArgument, Busy, Unavailable
from storage.hosts.layout import check_name, check_prefix
from storage.hosts.tree import Abandoned, Locked, Tree
from storage.interfaces import Buffer, HostCapabilities, HostSpace, Level
from storage.seams import Seams

T = TypeVar("T")

#: Threads working for one directory at a time.
SLOTS = 6
#: Another process's conditional put is waited for, in steps of this many seconds, this many times (10 s).
LOCK_STEP = 0.02
LOCK_STEPS = 500


class DirectoryHost:
    """See `interfaces.Host`. Open with `DirectoryHost.open`."""

    def __init__(self, tree: Tree, seams: Seams) -> None:
        self._tree = tree
        self._seams = seams
        self._slots = trio.CapacityLimiter(SLOTS)
        #: Objects with a change whose caller has given up and whose thread has not ended.
        self._hanging: list[str] = []

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
        parts = check_name(name)
        slot = self._changing(name)
        return await self._in_slot(slot, self._tree.put, parts, data, self._temporary(), slot.wanted)

    async def put_if(self, name: str, data: Buffer, expected: str | None) -> str:
        """As `interfaces.Host`. Cancelled: read what is there, it may have happened."""
        parts = check_name(name)
        for _ in range(LOCK_STEPS):
            slot = self._changing(name)
            try:
                return await self._in_slot(slot, self._tree.put_if, parts, data, self._temporary(), expected, slot.wanted)
            except Locked:
                await self._seams.clock.sleep(LOCK_STEP)
        raise Busy(f"host {self.url}: {name}: another process holds the lock {self._tree.path}/~lock; try again")

    async def tag(self, name: str) -> str | None:
        return await self._abandonable(self._tree.tag, check_name(name))

    async def delete(self, name: str) -> None:
        parts = check_name(name)
        slot = self._changing(name)
        await self._in_slot(slot, self._tree.delete, parts, slot.wanted)

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
        return await self._in_slot(_Slot(self._slots), fn, *args)

    def _changing(self, name: str) -> _Slot:
        """For a change of that object. Unavailable while an earlier one hangs."""
        if name in self._hanging:
            raise Unavailable(f"host {self.url}: an earlier change of {name} hangs; see whether its disk answers")
        return _Slot(self._slots, name, self._hanging)

    async def _in_slot(self, slot: _Slot, fn: Callable[..., T], *args: object) -> T:
        """Run in a thread, in one of the host's slots, which is free again when the *thread* ends, not when the caller gives up."""
        await self._slots.acquire_on_behalf_of(slot)
        try:
            return await self._seams.threads.run_abandonable(slot.work, fn, *args)
        except BaseException:
            slot.give_up()
            raise

    def __repr__(self) -> str:
        return f"<DirectoryHost {self.url}, {self._slots.borrowed_tokens} at work>"


class _Slot:
    """One borrowed slot. Given back exactly once: by the thread when it ends, or by the caller if the thread never began."""

    def __init__(self, slots: trio.CapacityLimiter, name: str = "", hanging: list[str] | None = None) -> None:
        """`name` is in `hanging`, which belongs to the event loop, from when the caller gives up until the thread ends."""
        self._slots = slots
        self._name = name
        self._hanging = hanging
        self._loop = trio.lowlevel.current_trio_token()
        #: Guards the decision who gives back.
        self._lock = threading.Lock()
        self._begun = False
        self._ended = False
        self._given_up = False

    def work(self, fn: Callable[..., T], *args: object) -> T:
        with self._lock:
            if self._given_up:
                raise Abandoned
            self._begun = True
        try:
            return fn(*args)
        finally:
            with self._lock:
                self._ended = True
            try:
                self._loop.run_sync_soon(self._give_back)
            except trio.RunFinishedError:
                # The program ended while the call hung; the slots ended with it.
                pass

    def wanted(self) -> None:
        """Abandoned once the caller has given up."""
        with self._lock:
            if self._given_up:
                raise Abandoned

    def give_up(self) -> None:
        """In the event loop, after the call failed or was cancelled."""
        with self._lock:
            if self._given_up or self._ended:
                return
            self._given_up = True
            begun = self._begun
        if not begun:
            self._slots.release_on_behalf_of(self)
        elif self._hanging is not None:
            self._hanging.append(self._name)

    def _give_back(self) -> None:
        """In the event loop, after the thread has ended."""
        self._slots.release_on_behalf_of(self)
        if self._hanging is not None and self._given_up:
            self._hanging.remove(self._name)
