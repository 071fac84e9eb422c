"""The cut of the history that is to be published next (storage/history/draft.py), and which sectors of staging it waits for.

A cut that knows a sector which is only on this machine must not be published before the sector is on its write quorum: superblocks never
speak of what only this machine has. One that is freed while a cut waits for it stays in staging, and goes to hosts all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import trio
from sortedcontainers import SortedDict

from storage.errors import Unavailable
from storage.sealing import sealed_length
from storage.sectors.records import ShardRecord
from storage.sectors.redundancy import layout_of

#: Sectors up to this many bytes go before larger ones: they are ends of logs and many small files, and what is published waits for them.
SMALL = 512 * 1024


@dataclass(slots=True, eq=False)
class Staged:
    """A sector below full replication whose shards are here."""

    sector_id: int
    replication: str
    length: int
    shards: tuple[ShardRecord, ...]
    #: On its write quorum of hosts.
    reached: bool = False
    #: Freed, while a cut waits for it.
    gone: bool = False
    #: Its shards are on their way to hosts.
    under_way: bool = False
    #: Not before this monotonic time is it tried.
    due: float = 0.0

    @property
    def bytes(self) -> int:
        """Sealed, of all its distinct shards."""
        return sum(sealed_length(shard.length) for shard in self.shards)

    @property
    def to_send(self) -> int:
        """Sealed bytes on all hosts together."""
        return self.bytes * layout_of(self.replication, self.length).hosts_each

    @property
    def rank(self) -> tuple[bool, int]:
        """Small ones first, then the oldest."""
        return self.length > SMALL, self.sector_id


class Cut:
    """The one that is to be published next; another takes its place with `begin`. What is not async is atomic."""

    def __init__(self, path: Path) -> None:
        """`path`: of staging, for messages."""
        self._path = path
        #: Sectors of it that are on too few hosts, in the order in which they go.
        self._missing: SortedDict = SortedDict()
        #: The same, by number.
        self._numbers: set[int] = set()
        self._changed = trio.Event()
        #: Told when it waits for something, and when the last of that has got to its hosts.
        self.on_begun: Callable[[], None] = lambda: None
        self.on_reached: Callable[[], None] = lambda: None
        #: Why nothing gets to the hosts now; "" while it does, or nothing is to.
        self.stalled: Callable[[], str] = lambda: ""

    def __contains__(self, sector_id: int) -> bool:
        """Does it wait for the sector?"""
        return sector_id in self._numbers

    def __iter__(self) -> Iterator[Staged]:
        """In the order in which they go."""
        return iter(self._missing.values())

    def __len__(self) -> int:
        return len(self._numbers)

    def begin(self, entries: Iterable[Staged]) -> None:
        """It waits for these. No await."""
        self._missing = SortedDict((entry.rank, entry) for entry in entries)
        self._numbers = {entry.sector_id for entry in self._missing.values()}
        if self._numbers:
            self.on_begun()

    def left(self, entry: Staged) -> None:
        """It needs not to wait for that one any more, if it did."""
        if entry.sector_id in self._numbers:
            self._numbers.discard(entry.sector_id)
            del self._missing[entry.rank]
            self.attempted()
            if not self._numbers:
                self.on_reached()

    async def reached_all(self) -> None:
        """Until it waits for none. Unavailable: hosts do not take them now."""
        while self._numbers:
            why = self.stalled()
            if why:
                raise Unavailable(f"sectors in {self._path} and not on enough hosts yet: {len(self._numbers):,}: {why}")
            await self.changed()

    async def changed(self) -> None:
        """Until a sector has got to its hosts, or an attempt has failed; each attempt has HostIO's time limit."""
        await self._changed.wait()

    def attempted(self) -> None:
        """An attempt to bring a sector to its hosts has ended, this way or that."""
        self._changed.set()
        self._changed = trio.Event()
