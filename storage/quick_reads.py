"""Quick reads: of a few blocks, on the event loop itself, from hosts that are disks of this machine.

To hand a read to a thread, leave its task and come back to it takes as long as a good disk does. So such a disk is asked without a thread:
what is in the page cache is there at once, and what is not it starts to fetch (`RWF_NOWAIT`), and is asked again.

    read_at_once    waited for right there, `SPUN` at most: while nobody else wants anything
    read_soon       waited for between other tasks, `POLLED` at most
    None            neither: whoever wants it asks `HostIO` as for anything else, which says what is wrong, too

A disk that was not quick enough is left alone for a while, longer each time.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import trio

from storage.epochs import Epochs
from storage.errors import Corrupt
from storage.hosts.hostdb import HostDB
from storage.hosts.layout import shard_name
from storage.hosts.locked_shards import LockedShards
from storage.hosts.registry import HostRegistry
from storage.interfaces import Host, QuickHost
from storage.keys import Keys
from storage.sealing import BLOCK, Opener, block_range, open_range

#: Seconds a read of a few blocks is waited for in the event loop. Where that was in vain the next read goes straight to a thread; where
#: it is again, the next two, and so on up to so many.
POLLED = 0.0005
UNPOLLED = 64
#: Seconds a read of a few blocks is waited for without anything else being done, where nothing else is to be done: less than half of what
#: a step of the event loop may take.
SPUN = 0.0003
#: Shards whose openers are kept, about 2 KB each.
OPENERS = 1024


class QuickReads:
    """Of one volume. The event loop's."""

    def __init__(self, volume_id: bytes, keys: Keys, epochs: Epochs, registry: HostRegistry, hostdb: HostDB, locked: LockedShards) -> None:
        self._volume_id = volume_id
        self._keys = keys
        self._epochs = epochs
        self._registry = registry
        self._hostdb = hostdb
        self._locked = locked
        #: Per host, where it did not answer soon: reads for which it is not waited in the event loop now, and were the last time.
        self._polling: dict[int, tuple[int, int]] = {}
        self._quick_hosts: dict[int, tuple[Host, QuickHost | None]] = {}
        #: Reads that the event loop looks after now.
        self._polled = 0
        self._openers: dict[int, tuple[Opener, str]] = {}
        #: Is the event loop about to be asked for something else? Where nobody can say that, no read is waited for without a pass of it.
        self.more_coming: Callable[[], bool] | None = None

    async def read_soon(
        self, number: int, sector_root: str, sector_id: int, offset: int, length: int, plaintext_length: int
    ) -> bytes | None:
        """As `HostIO.insecure_read`, of a few blocks that the host may have at hand; None: it has not, and is to be asked as usual.

        A disk that answers within `POLLED` is waited for in the event loop, which looks again and again between other tasks: a thread would
        have to be woken, and to wake the loop, for what takes no longer than that. A disk that does not is left alone for some reads.
        """
        host = self.host(number)
        name = shard_name(self._volume_id, sector_root)
        if host is None or not host.soon(name) or self._locked.known(number, sector_root):
            return None
        header = self._epochs.header_for(self._volume_id, sector_id, plaintext_length)
        _, _, at, size = block_range(offset, length, plaintext_length)
        left, pause = self._polling.get(number, (0, 0))
        if left:
            # Not even asked: to start a disk that is behind can take time by itself.
            self._polling[number] = (left - 1, pause)
            return None
        # Of the real clock, whatever the seams' says: a real disk is waited for, and the event loop meanwhile does not sleep.
        started = time.perf_counter()
        raw = host.get_range_now(name, at, size)
        self._polled += 1
        try:
            while raw is None and time.perf_counter() - started < POLLED:
                await trio.lowlevel.checkpoint()
                raw = host.get_range_now(name, at, size)
        finally:
            self._polled -= 1
        if raw is None:
            pause = min(UNPOLLED, 2 * pause or 1)
            self._polling[number] = (pause, pause)
            return None
        if pause:
            self._polling[number] = (0, 0)
        # No await from the answer to here: it is good until the next one.
        try:
            plain = open_range(self._epochs.key_for(sector_id, self._keys), header, offset, length, raw)
        except Corrupt:
            # Whoever asks as usual finds that out, and says so.
            return None
        self._hostdb.requested(number, 0, size)
        self._hostdb.succeeded(number, "read", size, time.perf_counter() - started)
        return plain

    def read_at_once(
        self, number: int, sector_root: str, sector_id: int, plaintext_length: int, first: int, count: int
    ) -> list[bytes] | None:
        """As `read_soon`, of blocks, each by itself, and without an await: waited for no longer than `SPUN`, nor when anybody else wants
        something. None: ask in another way.

        For one reader that asks one thing after the other this is what a miss costs beside the disk: to let the event loop go round
        meanwhile, and to be come back to, takes as long as the disk does.
        """
        more_coming = self.more_coming
        if more_coming is None or self._polled or self._polling.get(number, (0, 0))[0]:
            return None
        host = self.host(number)
        known = self._openers.get(sector_id)
        if known is None:
            if len(self._openers) >= OPENERS:
                self._openers.clear()
            header = self._epochs.header_for(self._volume_id, sector_id, plaintext_length)
            opener = Opener(self._epochs.key_for(sector_id, self._keys), header)
            known = self._openers[sector_id] = (opener, shard_name(self._volume_id, sector_root))
        opener, name = known
        if host is None or self._locked.known(number, sector_root):
            return None
        started = time.perf_counter()
        if not host.soon(name) and (more_coming() or not host.soon(name, SPUN)):
            return None
        _, _, at, size = block_range(first * BLOCK, count * BLOCK, plaintext_length)
        raw, asked = host.get_range_now(name, at, size), 1
        while raw is None:
            # Whether others wait costs a quarter of asking the disk; a disk is asked some twenty times.
            if time.perf_counter() - started > SPUN or (asked % 4 == 1 and more_coming()):
                return None
            raw, asked = host.get_range_now(name, at, size), asked + 1
        try:
            blocks = opener.blocks(first, raw)
        except Corrupt:
            return None
        self._polling.pop(number, None)
        self._hostdb.requested(number, 0, size)
        self._hostdb.succeeded(number, "read", size, time.perf_counter() - started)
        return blocks

    def near(self, number: int) -> bool:
        """Is the host so near that what is read from it again costs little?"""
        return self.host(number) is not None

    def host(self, number: int) -> QuickHost | None:
        """The host, if it is one of those and can be used now."""
        if not self._registry.available(number):
            return None
        host = self._registry.get(number)
        known, quick = self._quick_hosts.get(number, (None, None))
        if known is not host:
            # Looked at once: `isinstance` of a Protocol takes as long as reading from the page cache.
            quick = host if isinstance(host, QuickHost) else None
            self._quick_hosts[number] = (host, quick)
        return quick
