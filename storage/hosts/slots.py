"""Slots: how many calls may be at work for one host at a time, and what becomes of those whose callers have given up.

A call in a slot can be given up by cancelling it; the slot is free again when the *thread* ends. So one host that hangs never holds more
than its own threads. What a coprocess does takes a slot as well, and a thread only where it does not end soon, or is given up.

Whoever gives up a change does not know whether it happens. It does not, if it hung before its thread began (or before the step that
counts, where the call asks `Slot.wanted` there), and it is the only change of that object while it hangs: others are refused with
Unavailable until its thread has ended. So a deletion that was given up never takes away what was put afterwards.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Protocol, TypeVar

import trio

from storage.abandoned import Abandoned
from storage.errors import Unavailable

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


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
        """Calls that have not ended, given up or not."""
        return int(self._limiter.borrowed_tokens)

    async def read(self, fn: Callable[..., T], *args: object, begin: Callable[[], Begun[T] | None] | None = None) -> T:
        """Run in a slot what changes nothing."""
        return await self.run(Slot(self._limiter), fn, *args, begin=begin)

    def changing(self, name: str) -> Slot:
        """For a change of that object, with `run`. Unavailable while an earlier one hangs."""
        self._refuse_if_hanging(name)
        return Slot(self._limiter, name, self._hanging)

    def _refuse_if_hanging(self, name: str) -> None:
        if name in self._hanging:
            raise Unavailable(f"host {self._url}: an earlier change of {name} hangs; {self._remedy}")

    async def run(self, slot: Slot, fn: Callable[..., T], *args: object, begin: Callable[[], Begun[T] | None] | None = None) -> T:
        """Run in a thread, in that slot; or what `begin` has begun elsewhere, if it has: then a thread waits for its end only where it does
        not come soon. Unavailable: while it waited for the slot, an earlier change of the object has come to hang."""
        try:
            # The usual case, without a checkpoint.
            self._limiter.acquire_on_behalf_of_nowait(slot)
        except trio.WouldBlock:
            await self._limiter.acquire_on_behalf_of(slot)
        try:
            if slot.name:
                self._refuse_if_hanging(slot.name)
            begun = None if begin is None else begin()
            result: T = await (self._run(self._url, slot.work, fn, *args) if begun is None else self._end(slot, begun))
            return result
        except BaseException:
            slot.give_up()
            raise

    async def _end(self, slot: Slot, begun: Begun[T]) -> T:
        slot.begin()
        try:
            if await begun.soon():
                # No await from here on.
                return slot.end(begun.end)
            result: T = await self._run(self._url, slot.end_in_thread, begun.end)
            return result
        except BaseException:
            slot.give_up()
            if slot.claim():
                # Somebody has to wait for it: what it works in is lent to nobody else before it ends, and the slot is its until then.
                try:
                    trio.lowlevel.start_thread_soon(partial(slot.work_on, begun.end), _nobody_hears)
                except RuntimeError:
                    # There are no threads to be had.
                    slot.end(begun.forsake)
            raise


class Begun(Protocol[T_co]):
    """Work that is done elsewhere."""

    async def soon(self) -> bool:
        """In the event loop: True once `end` returns at once; False: a thread is to call it."""
        ...

    def end(self) -> T_co:
        """Called once, and waits for it."""
        ...

    def forsake(self) -> None:
        """In place of `end`, in the event loop: nobody can wait for it. What it works in is lent to nobody else until it has ended."""
        ...


def _nobody_hears(_: object) -> None:
    return None


class Slot:
    """One borrowed slot. Given back exactly once: by the thread when it ends, by the event loop when what was begun elsewhere has ended in
    time, or by the caller if nothing ever began."""

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
        #: Somebody waits for the end of what was begun elsewhere; set once.
        self._awaited = False
        self._given_up = False
        self._told: Callable[[], None] | None = None

    def work(self, fn: Callable[..., T], *args: object) -> T:
        with self._lock:
            if self._given_up:
                raise Abandoned
            self._begun = True
        return self.work_on(fn, *args)

    def begin(self) -> None:
        """In the event loop: the work is done elsewhere from now on."""
        with self._lock:
            self._begun = True

    def claim(self) -> bool:
        """Of what was begun elsewhere. True: it has not ended, and who asks is the one who waits for its end from now on."""
        with self._lock:
            if self._ended or self._awaited:
                return False
            self._awaited = True
            return True

    def end(self, end: Callable[[], T]) -> T:
        """In the event loop: it has been done."""
        try:
            return end()
        finally:
            with self._lock:
                self._ended = True
            self._give_back()

    def end_in_thread(self, end: Callable[[], T]) -> T:
        """Wait for its end. Abandoned if another thread does."""
        if not self.claim():
            raise Abandoned
        return self.work_on(end)

    def work_on(self, fn: Callable[..., T], *args: object) -> T:
        """In a thread: it has begun, and has ended when this returns."""
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
