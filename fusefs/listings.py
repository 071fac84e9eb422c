"""What a READDIR sends: fetched from the namespace while the kernel is busy with the reply before, where it goes on.

A reply takes the kernel and the program as long as it takes us to put the next one together. Where they do that on another core, all of it
is done meanwhile, and what is left for the request is copying; where they do it on ours, one after the other, entries are filled in by the
request itself, which is quicker. Which it is shows by when the next request comes. What was fetched ahead is only sent if nothing at all
has changed since.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from time import perf_counter
from typing import NamedTuple

import pyfuse3

from fusefs.entries import entries_of, shown
from storage import Namespace

log = logging.getLogger(__name__)

#: Entries fetched at first, and the bounds of it later: what a READDIRPLUS of 4 KiB takes, of 32 KiB (Linux 6.18 asks for so much for most
#: programs), and what takes a millisecond, a step of the event loop. What is fetched and does not fit is fetched again for the next reply,
#: so it is learnt from each how many fit.
FETCH_FIRST, FETCH_LEAST, FETCH_MOST = 204, 30, 256

#: Seconds after which the next request comes, at the latest, where the program was at work beside us. What it does with a reply takes
#: longer.
BESIDE = 0.00005


class Page(NamedTuple):
    """Columns, as `Listed`. `entries` can be gone through once."""

    names: Sequence[bytes]
    inos: Sequence[int]
    cookies: Sequence[int]
    entries: Iterable[pyfuse3.EntryAttributes]


NOTHING = Page((), (), (), ())


class Listings:
    """One mount's."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        #: Entries to fetch for the next reply.
        self._count = FETCH_FIRST
        #: What was fetched ahead: where, the namespace's version then, and whether it reaches to the end. One page: who lists alone is the
        #: usual case.
        self._ahead: tuple[tuple[int, int], int, Page, bool] | None = None
        #: When it was there, and whether who asked for the one before was at work at the same time.
        self._since, self._beside = 0.0, False
        #: What was given out last reaches to the directory's end.
        self.ended = False

    def first(self, ino: int, after: int) -> Page:
        """The entries to begin a reply with. Raises as `Namespace.listing`."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == (ino, after) and ahead[1] == self._namespace.version:
            self.ended = ahead[3]
            self._beside = perf_counter() - self._since < BESIDE
            return ahead[2]
        return self._fetch(ino, after, self._count)

    def more(self, ino: int, after: int) -> Page:
        """Where those were not enough."""
        return self._fetch(ino, after, FETCH_LEAST)

    def _fetch(self, ino: int, after: int, count: int) -> Page:
        page = self._page(ino, after, count)
        self.ended = len(page.names) < count
        return page

    def _page(self, ino: int, after: int, count: int, *, ahead: bool = False) -> Page:
        listed = self._namespace.listing(ino, after, count)
        return Page(listed.names, listed.inos, listed.cookies, entries_of(listed) if ahead and self._beside else shown(listed))

    def done(self, ino: int, after: int) -> None:
        """A reply took the last entry, which is at cookie `after`: the kernel asks once more, and is told so."""
        self._ahead = ((ino, after), self._namespace.version, NOTHING, True)

    def go_on(self, ino: int, after: int, sent: int) -> None:
        """A reply took `sent` entries, up to cookie `after`: the next will take about as many, and be asked for. Does not raise."""
        # So that it is found to be full by the entries at hand: one more, and two for "." and ".." which the first reply has besides.
        count = self._count = min(max(sent + 3, FETCH_LEAST), FETCH_MOST)
        try:
            version, page = self._namespace.version, self._page(ino, after, count, ahead=True)
        except Exception as error:  # noqa: BLE001  whatever it is, the handler that needs the page meets it, and answers
            log.debug("inode %d could not be listed ahead of need: %s", ino, error)
        else:
            self._ahead = ((ino, after), version, page, len(page.names) < count)
            self._since = perf_counter()
