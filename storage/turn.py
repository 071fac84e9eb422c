"""Taking turns: a lock that costs next to nothing while nobody waits for it."""

from __future__ import annotations

import trio


class Turn:
    """Held by one at a time; whoever waits gets it in the order of asking (as `trio.StrictFIFOLock`, of which it has the methods).

    A trio lock notes its owner, to find deadlocks and tasks that end with it: three times the work where each WRITE of a small file takes
    two. Here whoever took it gives it back, in a `finally`.
    """

    __slots__ = ("_held", "_waiting")

    def __init__(self) -> None:
        self._held = False
        #: Made when somebody has to wait for the first time.
        self._waiting: trio.lowlevel.ParkingLot | None = None

    def locked(self) -> bool:
        return self._held

    def acquire_nowait(self) -> None:
        """trio.WouldBlock if it is held."""
        if self._held:
            raise trio.WouldBlock
        self._held = True

    async def acquire(self) -> None:
        """A checkpoint only where it has to wait. Cancelled while waiting: it is not held."""
        if not self._held:
            self._held = True
            return
        if self._waiting is None:
            self._waiting = trio.lowlevel.ParkingLot()
        # Whoever gives it back hands it over: it stays held in between.
        await self._waiting.park()

    def release(self) -> None:
        """To the next in line, if there is one."""
        if not self._held:
            raise RuntimeError("a turn that nobody has was given back")
        if self._waiting is None or not self._waiting.unpark():
            self._held = False
