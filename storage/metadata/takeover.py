"""Housekeeping of the store: LMDB takes over what is durable, segments nobody needs are recycled, the next one is made ahead of need.

One task (`run`) makes passes; a pass that has nothing to do costs nothing. A failed takeover keeps the frozen layer and the journal, says
so and is tried again later: nothing depends on it but room.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import trio

from storage.errors import Fenced, FusefsError, NoSpace
from storage.interfaces import MetadataReader
from storage.metadata.ballast import Ballast
from storage.metadata.journal import Journal
from storage.metadata.lmdb_base import LmdbBase
from storage.metadata.memtable import Layer, Memtable
from storage.metadata.segments import Segment
from storage.seams import Seams, Worker

log = logging.getLogger(__name__)

#: A takeover is due when the active layer has this many bytes or keys, or its oldest change is this many seconds old.
MAX_COST = 8 * 1024 * 1024
MAX_KEYS = 65_536
MAX_AGE = 10.0
#: ... or when this share of the journal is in use and LMDB lacks what its oldest segment holds.
_FILL = 0.25
#: Segments whose commits are on no host yet are kept up to this share of the journal.
_RETAIN = 0.4
#: Changes that are not in a commit yet are split off by hand up to this many; for more a commit is asked for, which makes it free.
_SPLIT = 4096
#: Seconds until a failed pass is tried again: doubling.
_RETRY_FIRST, _RETRY_LAST = 1.0, 60.0
#: ... or, where it is only room that is missing, at the latest after so many.
_RETRY_FULL = 4.0
#: Seconds that a pass is waited for.
_PASS_WAIT = 5.0
#: Tails asked about between two checkpoints.
_SLICE = 256

TailNeeded = Callable[[MetadataReader, int, int], bool]


class Flight(Protocol):
    """The commit being written."""

    async def wait(self) -> None:
        """Until it is durable, or has failed."""
        ...


@dataclass(slots=True)
class Progress:
    """How far the commits are. Written by the store alone."""

    #: The last commit that was taken from the memtable, and the last durable one with the chain hash there.
    taken: int
    durable: int
    chain: bytes
    #: None: none is being written.
    flight: Flight | None = None
    #: Why nothing may be written any more.
    failure: str | None = None

    def check(self) -> None:
        """Fenced: nothing may be written any more."""
        if self.failure is not None:
            raise Fenced(self.failure)


class Takeover:
    """See the module. `ask_commit` makes the store commit soon."""

    def __init__(
        self,
        memtable: Memtable,
        base: LmdbBase,
        journal: Journal,
        progress: Progress,
        seams: Seams,
        worker: Worker,
        tail_needed: TailNeeded,
        ask_commit: Callable[[], None],
    ) -> None:
        self._memtable, self._base, self._journal, self._progress = memtable, base, journal, progress
        self._seams, self._worker = seams, worker
        self._ask_commit = ask_commit
        self.tail_needed = tail_needed
        #: A commit waits for room in the journal.
        self.pressed = False
        #: The disk, or the journal's limit, has no room for another segment.
        self.cramped = False
        self._ballast = Ballast(journal.directory, journal.segment_size, seams.failpoints)
        self._ballast_at = -math.inf
        #: Freeze when the next commit is taken.
        self.freeze_next = False
        #: When the active layer got its oldest change (monotonic seconds); None: it has none.
        self.since: float | None = None
        #: Passes begun and ended so far, and an event that the end of each replaces.
        self.begun = self.ended = 0
        self.passed = trio.Event()
        self._kick = trio.Event()
        self._retry_at = -math.inf
        self._retry_in = _RETRY_FIRST
        #: Why the last pass failed.
        self.trouble: FusefsError | None = None
        self._broken = False
        #: Waiting without a limit.
        self._idle = False
        #: What the hosts have of the history reaches up to this commit; None: nobody publishes it. Later segments are kept for a while.
        self.shipped: int | None = None

    @property
    def pausing(self) -> bool:
        """The last attempt failed, and the next one is not due yet."""
        return self._seams.clock.monotonic() < self._retry_at

    def kick(self) -> None:
        """Look soon whether something is to be done."""
        self._kick.set()

    async def look(self) -> None:
        """Have a pass made, and wait for its end; not for ever."""
        wanted = self.begun + 1
        self.kick()
        with trio.move_on_after(_PASS_WAIT):
            while self.ended < wanted:
                await self.passed.wait()

    def consider(self) -> None:
        """As `kick`, if something is, or if the age of what was just committed has to be watched from now on: `run` sees to that."""
        due = self._full() and self._seams.clock.monotonic() >= self._retry_at
        if due or self._journal.wants_segment or (self._idle and self.since is not None):
            self._kick.set()

    async def run(self) -> None:
        """For ever."""
        while True:
            limit = self._wait()
            self._idle = limit == math.inf
            with trio.move_on_after(limit):
                await self._kick.wait()
            self._kick = trio.Event()
            try:
                await self._pass()
            except trio.Cancelled:
                # The store is closing. Only checkpoints and waits are cancelled, never a write in the thread: `finish` can go on from here.
                raise
            except BaseException:
                self._broken = True
                raise
            finally:
                self.ended = self.begun
                self.passed.set()
                self.passed = trio.Event()

    def _wait(self) -> float:
        """Seconds until the next pass that nobody asks for."""
        now = self._seams.clock.monotonic()
        if self._retry_at > now:
            return self._retry_at - now
        if self.since is None or self._memtable.frozen is not None or self._progress.failure is not None or not self._behind:
            return math.inf
        return max(self.since + MAX_AGE - now, 0.5)

    @property
    def _behind(self) -> bool:
        """There are commits LMDB does not have, and that are not in a frozen layer."""
        return self._base.sequence < self._progress.taken

    async def _pass(self) -> None:
        self.begun += 1
        try:
            if self._due():
                await self._take_over(gentle=True)
            await self._recycle()
            await self._journal.tidy(self._worker)
            await self._journal.prepare_ahead(self._worker)
            await self._take_ballast()
        except FusefsError as error:
            if isinstance(error, NoSpace):
                self._retry_in = min(self._retry_in, _RETRY_FULL)
            self.trouble = error
            now = self._seams.clock.monotonic()
            if now >= self._retry_at:
                # Not when a pass that somebody asked for in between fails, too: asked for often enough, nothing would ever be tried again.
                self._retry_at = now + self._retry_in
                log.warning("%s; trying again in %.0f s", error, self._retry_in)
                self._retry_in = min(self._retry_in * 2, _RETRY_LAST)
        else:
            self.trouble = None
            self._retry_in = _RETRY_FIRST

    async def finish(self) -> None:
        """At close, when `run` has ended and no commit is being written: take over all that is durable.

        A failure only costs time at the next open.
        """
        try:
            while not self._broken and (self._memtable.frozen is not None or self._behind):
                if not await self._take_over(gentle=False):
                    break
            if not self._broken and self._progress.failure is None:
                await self._recycle()
        except FusefsError as error:
            log.warning("%s; the journal keeps it", error)

    # ---- taking over

    def _due(self) -> bool:
        now = self._seams.clock.monotonic()
        if now < self._retry_at:
            return False
        return self._full() or (self.since is not None and now >= self.since + MAX_AGE and self._behind and self._progress.failure is None)

    def _full(self) -> bool:
        """A takeover is under way, or due, whatever the age."""
        if self._memtable.frozen is not None:
            return True
        if not self._behind or self._progress.failure is not None:
            return False
        active = self._memtable.active
        if active.cost >= MAX_COST or len(active.values) >= MAX_KEYS or self.pressed:
            return True
        oldest = self._journal.oldest()
        return oldest is not None and oldest.last_sequence > self._base.sequence and self._journal.fill > _FILL

    async def _take_over(self, *, gentle: bool) -> bool:
        """LMDB holds the frozen layer, or what can be frozen now, when it returns True. FusefsError: all is as before."""
        layer = self._memtable.frozen
        if layer is None:
            if self._progress.failure is not None:
                return False  # what is not durable can no longer be told apart, and never will be
            if len(self._memtable.pending) > _SPLIT and not self.pressed and gentle:
                self.freeze_next = True
                self._ask_commit()
                return False
            layer = self.freeze()
        while self._progress.durable < layer.sequence:
            if self._progress.flight is None or self._progress.failure is not None:
                return False
            await self._progress.flight.wait()
        chain = layer.chain
        if chain is None:
            raise RuntimeError("a frozen layer without the chain hash of its last commit")
        oldest = self._journal.oldest_number
        await self._write_base(self._write, layer, chain, gentle, oldest)
        # No await between these: readers see the layer in one place or the other.
        self._base.renew()
        self._memtable.drop_frozen()
        return True

    async def _write_base(self, fn: Callable[..., None], *args: object) -> None:
        """In the thread that writes LMDB; on a full disk once more without the ballast. FusefsError: all is as before."""
        try:
            await self._worker.run(fn, *args)
        except NoSpace:
            spares = await self._journal.give_up_spares(self._worker)
            if not await self._worker.run(self._ballast.drop) and not spares:
                raise
            await self._worker.run(fn, *args)

    async def give_up_ballast(self) -> bool:
        """Something else needs the room more. True if there was any."""
        return await self._worker.run(self._ballast.drop)

    async def _take_ballast(self) -> None:
        """Have it again, looked at now and then."""
        now = self._seams.clock.monotonic()
        if self._journal.ready and not self._ballast.aboard and now >= self._ballast_at:
            self._ballast_at = now + _RETRY_LAST
            await self._worker.run(self._ballast.take)

    def freeze(self) -> Layer:
        """Split off what was taken into commits so far. No await inside."""
        progress = self._progress
        layer = self._memtable.freeze(progress.taken)
        if progress.taken == progress.durable:
            layer.chain = progress.chain
        self.since = self._seams.clock.monotonic() if self._memtable.active.values else None
        self.freeze_next = False
        return layer

    def _write(self, layer: Layer, chain: bytes, gentle: bool, oldest: int) -> None:
        """In the thread that writes LMDB."""
        self._seams.failpoints.hit("lmdb.takeover.before")
        self._base.take_over(layer.ordered(), layer.values, layer.sequence, chain, gentle, oldest)
        self._seams.failpoints.hit("lmdb.takeover.after")

    # ---- recycling

    async def _recycle(self) -> None:
        """Every segment that is not needed, oldest first."""
        # All but the newest, which says where the log ends.
        unneeded = 0
        for segment in self._journal.live[:-1]:
            if segment.last_sequence > self._base.sequence or self._unshipped(segment) or not await self._released(segment):
                break
            unneeded += 1
        if not unneeded:
            return
        # Recorded first: a segment that is missing at open without this was lost, and with it maybe tails that are nowhere else.
        await self._write_base(self._record_oldest, self._journal.live[unneeded].number)
        for _ in range(unneeded):
            await self._journal.recycle(self._worker)

    def _record_oldest(self, number: int) -> None:
        """In the thread that writes LMDB."""
        self._seams.failpoints.hit("lmdb.oldest.before")
        self._base.record_oldest(number)
        self._seams.failpoints.hit("lmdb.oldest.after")

    def _unshipped(self, segment: Segment) -> bool:
        """Is it worth keeping for the hosts? After a crash the log goes on from it; without it a checkpoint is needed, no more."""
        if self.shipped is None or segment.last_sequence < self.shipped or self.pressed or self.cramped:
            return False
        return self._journal.fill < _RETAIN

    async def _released(self, segment: Segment) -> bool:
        """I3: does no value need its tail from this segment, going by LMDB alone? What is found unneeded stays so: not asked again."""
        asked = 0
        while segment.tails:
            value_id = next(reversed(segment.tails))
            if self._needed_here(self._base, segment, value_id):
                return False
            del segment.tails[value_id]
            asked += 1
            if asked % _SLICE == 0:
                await trio.lowlevel.checkpoint()
        return True

    def _needed_here(self, reader: MetadataReader, segment: Segment, value_id: int) -> bool:
        """Is this segment the only one that has bytes of the tail that are needed?"""
        end = segment.tails[value_id].end
        if not self.tail_needed(reader, value_id, end):
            return False
        # Later segments may have it once more. [start, end) is what they hold without a gap.
        start = end
        runs = [other.tails[value_id] for other in self._journal.live if other.number > segment.number and value_id in other.tails]
        moved = True
        while moved:
            moved = False
            for run in runs:
                if run.run_start < start <= run.run_end:
                    start, moved = run.run_start, True
        return start == end or self.tail_needed(reader, value_id, start)

    def lets_go(self, reader: MetadataReader, size: int) -> bool:
        """Would segments of `size` bytes in all be recycled, once LMDB holds what `reader` shows, and another follows the newest?"""
        for segment in self._journal.live:
            if any(self._needed_here(reader, segment, value_id) for value_id in reversed(segment.tails)):
                return False
            size -= segment.size
            if size <= 0:
                return True
        return False

    def pinned(self, reader: MetadataReader) -> list[tuple[int, int]]:
        """(value id, end) of the tails only the oldest segment has, as `reader` sees it."""
        segment = self._journal.oldest()
        if segment is None:
            return []
        return [(value_id, held.end) for value_id, held in segment.tails.items() if self._needed_here(reader, segment, value_id)]
