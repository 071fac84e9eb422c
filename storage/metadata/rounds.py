"""Rounds: what callers of `commit` wait for. One is everything pending now, and whatever is applied before it is taken.

While one is being written (the flight), the next one gathers. A round that finds no room ends with NoSpace; what is pending stays pending,
in the next round.
"""

from __future__ import annotations

import trio

from storage.errors import FusefsError
from storage.metadata.journal import Journal


class Round:
    """Callers waiting for one commit."""

    __slots__ = ("_done", "ended", "error", "patient", "sequence", "urgent", "wanted")

    def __init__(self) -> None:
        self.ended = False
        #: Made when somebody waits.
        self._done: trio.Event | None = None
        self.error: FusefsError | None = None
        self.sequence = 0
        #: Somebody waits for it; somebody who may use the reserve does.
        self.wanted = self.urgent = False
        #: How many wait for it who may not, and have time.
        self.patient = 0

    def end(self, error: FusefsError | None = None) -> None:
        self.error = error
        self.ended = True
        if self._done is not None:
            self._done.set()

    async def wait(self) -> None:
        """Until it has ended. A checkpoint, too, if it has."""
        if self._done is None:
            self._done = trio.Event()
            if self.ended:
                self._done.set()
        await self._done.wait()


class Rounds:
    """The one that gathers, and the one being written. Nothing here awaits."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.next = Round()
        self.flight: Round | None = None
        #: Set when the next one is wanted, or wanted by somebody else; replaced by whoever waits for that.
        self.wake = trio.Event()

    def ask(self) -> None:
        """Have a commit made that nobody waits for."""
        if self._journal.ready:
            self.next.wanted = True
            self.wake.set()

    def asleep(self) -> trio.Event:
        """The event to be woken by from now on."""
        self.wake = trio.Event()
        return self.wake

    def turn(self) -> Round:
        """The one that gathered, which is over; another gathers from now on."""
        this, self.next = self.next, Round()
        return this
