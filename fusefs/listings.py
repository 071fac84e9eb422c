"""What a READDIR sends: fetched from the namespace while the kernel is busy with the reply before, where it goes on.

A reply takes the kernel and the program as long as it takes us to put the next one together, on another core. What was fetched ahead is
only sent if nothing at all has changed since.
"""

from __future__ import annotations

import logging

import trio

from storage import Attributes, Namespace

log = logging.getLogger(__name__)

#: Entries fetched at first, and the bounds of it later: what a READDIRPLUS of 4 KiB takes, of 32 KiB (Linux 6.18 asks for so much), and of
#: 1 MiB would take. What is fetched and does not fit is fetched again for the next reply, so it is learnt from each how many fit.
FETCH_FIRST, FETCH_LEAST, FETCH_MOST = 204, 30, 1024

Page = list[tuple[int, bytes, Attributes]]


class Listings:
    """One mount's. `run` is a task; without it nothing is fetched ahead."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        #: Entries to fetch for the next reply.
        self._count = FETCH_FIRST
        #: (directory, cookie it goes on after) of the page to fetch; None: none is.
        self._wanted: tuple[int, int] | None = None
        #: What was fetched ahead, where, and the namespace's version then. One page: who lists alone is the usual case.
        self._ahead: tuple[tuple[int, int], int, Page] | None = None
        self._wake = trio.Event()

    def first(self, ino: int, after: int) -> Page:
        """The entries to begin a reply with. Raises as `Namespace.listing`."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == (ino, after) and ahead[1] == self._namespace.version:
            return ahead[2]
        return self._namespace.listing(ino, after, self._count)

    def more(self, ino: int, after: int) -> Page:
        """Where those were not enough."""
        return self._namespace.listing(ino, after, FETCH_LEAST)

    def full(self, ino: int, after: int, sent: int) -> None:
        """A reply took `sent` entries, up to cookie `after`: the next will take about as many, and be asked for."""
        # One more, so that it is found to be full by the entries at hand.
        self._count = min(max(sent + 1, FETCH_LEAST), FETCH_MOST)
        self._wanted = (ino, after)
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            if self._wanted is None:
                continue
            place, self._wanted = self._wanted, None
            try:
                self._ahead = (place, self._namespace.version, self._namespace.listing(*place, self._count))
            except Exception as error:  # noqa: BLE001  whatever it is, the handler that needs the page meets it, and answers
                log.debug("inode %d could not be listed ahead of need: %s", place[0], error)
