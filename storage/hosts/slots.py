"""Slots: how many threads may work for one host at a time, and what becomes of those whose callers have given up.

A call in a slot can be given up by cancelling it; the slot is free again when the *thread* ends. So one host that hangs never holds more
than its own threads.

Whoever gives up a change does not know whether it happens. It does not, if it hung before its thread began (or before the step that
counts, where the call asks `Slot.wanted` there), and it is the only change of that object while it hangs: others are refused with
Unavailable until its thread has ended. So a deletion that was given up never takes away what was put afterwards.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import trio

from storage.abandoned import Abandoned
from storage.errors import Unavailable

T = TypeVar("T")


class Slots:
    """The slots of one host. Belongs to the event loop."""

    def __init__(self, url: str, count: int, run: Callable[..., Awaitable[Any]], remedy: str) -> None:
        """`run`: `run_abandonable` of the seams' threads. `remedy`: what a person can do about a change that hangs."""
        self._url, self._run, self._remedy = url, run, remedy
        self._limiter = trio.CapacityLimiter(count)
        #: Objects with a change whose caller has given up and whose thread has not ended.
        self._hanging: list[str] = []

    @property
    def at_work(self) -> int:
        """Threads that have not ended, given up or not."""
        return int(self._limiter.borrowed_tokens)

    async def read(self, fn: Callable[..., T], *args: object) -> T:
        """Run in a slot what changes nothing."""
        return await self.run(Slot(self._limiter), fn, *args)

    def changing(self, name: str) -> Slot:
        """For a change of that object, with `run`. Unavailable while an earlier one hangs."""
        self._refuse_if_hanging(name)
        return Slot(self._limiter, name, self._hanging)

    def _refuse_if_hanging(self, name: str) -> None:
        if name in self._hanging:
            raise Unavailable(f"host {self._url}: an earlier change of {name} hangs; {self._remedy}")

    async def run(self, slot: Slot, fn: Callable[..., T], *args: object) -> T:
        """Run in a thread, in that slot. Unavailable: while it waited for the slot, an earlier change of the object has come to hang."""
        try:
            # The usual case, without a checkpoint.
            self._limiter.acquire_on_behalf_of_nowait(slot)
        except trio.WouldBlock:
            await self._limiter.acquire_on_behalf_of(slot)
        try:
            if slot.name:
                self._refuse_if_hanging(slot.name)
            result: T = await self._run(self._url, slot.work, fn, *args)
            return result
        except BaseException:
            slot.give_up()
            raise


class Slot:
    """One borrowed slot. Given back exactly once: by the thread when it ends, or by the caller if the thread never began."""

    def __init__(self, slots: trio.CapacityLimiter, name: str = "", hanging: list[str] | None = None) -> None:
        """`name` is in `hanging`, which belongs to the event loop, from when the caller gives up until the thread ends."""
        self._slots = slots
        self.name = name
        self._hanging = hanging
        self._loop = trio.lowlevel.current_trio_token()
        #: Guards the decision who gives back.
        self._lock = threading.Lock()
        self._begun = False
        self._ended = False
        self._given_up = False
        self._told: Callable[[], None] | None = None

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

    def tell(self, told: Callable[[], None] | None) -> None:
        """`told`, which is quick and waits for nothing, is called once the caller has given up; None: not any more."""
        with self._lock:
            self._told = told
            if told is not None and self._given_up:
                told()

    def give_up(self) -> None:
        """In the event loop, after the call failed or was cancelled."""
        with self._lock:
            if self._given_up or self._ended:
                return
            self._given_up = True
            begun = self._begun
            if self._told is not None:
                self._told()
        if not begun:
            self._slots.release_on_behalf_of(self)
        elif self._hanging is not None:
            self._hanging.append(self.name)

    def _give_back(self) -> None:
        """In the event loop, after the thread has ended."""
        self._slots.release_on_behalf_of(self)
        if self._hanging is not None and self._given_up:
            self._hanging.remove(self.name)
