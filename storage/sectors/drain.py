"""Drain: what is in staging goes to its hosts, for the first time.

    staging.following -> sealed bytes from the disk -> Upload (as for a sector that goes to its hosts directly) -> record names its hosts
       the cut that waits to be published, then small sectors, then the oldest; several at a time, within a budget of bytes (I7), and no
       more than the line takes in some seconds

At write quorum its part is done: what is missing to full replication then is reconcile's. While hosts fail, one sector at a time is tried,
less and less often; when they are back it goes on by itself. A volume that is fenced or failed keeps what it staged.

Sectors that share a slow line all end late, and a held cut, a flush, and what waits to be deleted wait with them; of many, none would end
within the time that HostIO gives each, and all that was sent would be in vain. So what is on its way follows from the measured throughput.

A burst of writing has the machine to itself: where nothing was to be sent before, sending begins when nothing was staged for a moment, two
seconds after the first sector at the latest, and at once when somebody waits for it. How long a moment is follows from how quickly sectors
came. Sending takes cores and disk from who writes, the more where hosts are near. A line on which something is to be sent is never kept
idle by who goes on writing.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from math import exp, inf

import trio

from storage.errors import FusefsError, NoSpace
from storage.interfaces import FlushProgress, MetadataStore, SealedShard
from storage.replication import Replication
from storage.seams import Seams
from storage.sectors.cuts import Staged
from storage.sectors.records import VERSION, SectorRecord
from storage.sectors.redundancy import layout_of
from storage.sectors.regenerate import Regenerate
from storage.sectors.staging import Staging
from storage.sectors.upload import Upload, Way

log = logging.getLogger("fusefs.staging")

#: Sectors on their way at a time, and sealed bytes of theirs in memory, at most (I7); one sector always may.
UPLOADS = 16
BUDGET = 64 * 1024 * 1024
#: What is on its way is what the line takes in so many seconds, by what it took lately: far more than an answer of a host takes, so that it
#: is never idle; and at least so many bytes. One sector always may.
AHEAD, AHEAD_LEAST = 8.0, 1024 * 1024
#: But no more than so many times what got there since a failure, or a pause of FORGETS: a line that took the first sector quickly may have
#: had room for that one alone, in a buffer on the way.
TRUSTED = 2
#: Seconds in which what was measured loses most of its weight.
FORGETS = 30.0
#: By how much the number of sectors on their way, halved where several fail, grows with each success.
CAREFUL = 0.1
#: Seconds until hosts that failed are tried again: doubling from the first to the last.
RETRY_FIRST, RETRY_LAST = 1.0, 60.0
#: Seconds between two looks whether enough hosts can be reached, while they cannot.
LOOK_SECONDS = 2.0
#: Seconds until a sector is looked for again whose shards are neither here nor on a host.
LOST_SECONDS = 60.0
#: Where nothing was to be sent before, sending begins so many times what lay between two sectors lately after the last one, within these
#: limits in seconds; or so many seconds after the first.
PAUSES, QUIET_LEAST, QUIET, HELD_MOST = 8.0, 0.05, 0.1, 2.0
#: Seconds over which the rate is taken.
RATE_WINDOW = 30.0


@dataclass(slots=True)
class DrainStatus:
    """For `status`: what is below write quorum, and how quickly it gets there."""

    sectors: int = 0
    #: Still to be sent.
    bytes: int = 0
    #: Bytes per second lately; 0.0 while nothing gets anywhere.
    rate: float = 0.0
    #: Why nothing does; "" while something does.
    trouble: str = ""


class Throughput:
    """Bytes per second that the line took while something was on its way; a lower bound at first, and quickly more where it takes more."""

    def __init__(self) -> None:
        self._bytes = self._seconds = 0.0
        #: What the last of any size took by itself: it rises at once where the line became quicker.
        self._alone = 0.0
        #: Bytes that got there, see TRUSTED.
        self._proven = 0
        self._since = 0.0

    @property
    def rate(self) -> float:
        """0.0: nothing got there yet."""
        return max(self._bytes / self._seconds if self._seconds else 0.0, self._alone)

    @property
    def ahead(self) -> float:
        """Bytes that may be on their way."""
        return max(min(AHEAD * self.rate, AHEAD_LEAST + TRUSTED * self._proven), AHEAD_LEAST)

    def started(self, now: float, *, first: bool) -> None:
        """Something goes on its way; `first`: nothing else was."""
        if first:
            if now - self._since > FORGETS:
                self._proven = 0
            self._since = now

    def ended(self, now: float, size: int, seconds: float) -> None:
        """So many bytes got there (0: they did not), that long after they were sent on their way."""
        passed = max(now - self._since, 0.0)
        self._since = now
        keeps = exp(-passed / FORGETS)
        self._bytes = self._bytes * keeps + size
        self._seconds = self._seconds * keeps + passed
        self._proven = self._proven + size if size else 0
        if size >= AHEAD_LEAST or not size:
            self._alone = size / max(seconds, 0.001)


class Drain:
    """See the module. `run` once, in the volume's nursery."""

    def __init__(self, *, staging: Staging, way: Way, regenerate: Regenerate, store: MetadataStore, seams: Seams) -> None:
        self._staging, self._way, self._regenerate, self._store, self._seams = staging, way, regenerate, store, seams
        self._wake = trio.Event()
        self._uploads = 0
        self._bytes = 0
        #: Bytes on their way to all hosts together, and what the line is known to take.
        self._sending = 0
        self._throughput = Throughput()
        #: How many may be on their way: half as many as were when one of them failed, as a slow line needs it, on which none of many would
        #: get through in the time that HostIO gives each; slowly more with each success.
        self._width = float(UPLOADS)
        #: Why too few hosts can be reached, at the last look; "" if they can.
        self._unreachable = ""
        #: Why the last attempt failed; "" since one succeeded, or since somebody asked for another.
        self._trouble = ""
        #: The last attempt failed because hosts are full.
        self.full = False
        self._retry = RETRY_FIRST
        self._due = 0.0
        #: Failures that counted. What began before the last of them tells no other.
        self._failures = 0
        #: Monotonic times: of the first sector staged where nothing was to be sent before, and of the last one of all; and the seconds
        #: between two of them lately, as a moving average.
        self._begun = self._newest = -inf
        self._apart = QUIET
        #: (monotonic time, bytes) of what got there lately; and all of it since the volume was opened.
        self._lately: deque[tuple[float, int]] = deque()
        self.sent = 0
        staging.on_staged = self._staged
        staging.cut.on_begun = self.wake
        staging.cut.stalled = self.stalled

    def wake(self) -> None:
        """There is something to send."""
        self._wake.set()

    def _staged(self) -> None:
        """A sector more."""
        now = self._seams.clock.monotonic()
        apart, self._newest = min(now - self._newest, QUIET), now
        self._apart += (apart - self._apart) / 4.0
        if len(self._staging.below) == 1:
            self._begun = self._newest
        self._wake.set()

    def kick(self) -> None:
        """Try everything now, whatever failed lately, and whoever writes."""
        self._due, self._trouble, self._unreachable = 0.0, "", ""
        self._begun = -inf
        for entry in self._staging.entries():
            entry.due = 0.0
        self._wake.set()

    async def wait(self, entries: Iterable[Staged], progress: FlushProgress) -> None:
        """Until none of these is on its way any more: it is on its write quorum, gone, or hosts do not take it now."""
        left = {entry.sector_id: entry.to_send for entry in entries if self._staging.on_its_way(entry.sector_id)}
        total = sum(left.values())
        progress.bytes_total += total
        before = progress.bytes_done
        while left := {sector_id: size for sector_id, size in left.items() if self._staging.on_its_way(sector_id)}:
            progress.bytes_done = before + total - sum(left.values())
            if not self._uploads and self.stalled():
                return
            await self._staging.cut.changed()

    def stalled(self) -> str:
        """Why nothing gets to the hosts; "" while something does, or will be tried at once."""
        if not self._staging.below or (self._uploads and not self._trouble):
            return ""
        return self._trouble or self._unreachable

    def status(self) -> DrainStatus:
        """A snapshot."""
        now = self._seams.clock.monotonic()
        while self._lately and self._lately[0][0] < now - RATE_WINDOW:
            self._lately.popleft()
        span = now - self._lately[0][0] if self._lately else 0.0
        rate = sum(size for _, size in self._lately) / max(span, 1.0)
        below: list[Staged] = list(self._staging.below.values())
        return DrainStatus(len(below), sum(entry.to_send for entry in below), rate, self.stalled())

    # ------------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled, or the volume can be written no more."""
        async with trio.open_nursery() as nursery:
            while self._store.failure is None:
                self._wake = trio.Event()
                with trio.move_on_after(self._start(nursery)):
                    await self._wake.wait()
            log.info("what is staged stays there: %s", self._store.failure)

    def _start(self, nursery: trio.Nursery) -> float:
        """Start what may be started now; seconds until to look again, unless woken."""
        now = self._seams.clock.monotonic()
        if now < self._due:
            return self._due - now
        if (held := self._held(now)) > 0:
            return held
        unreachable: dict[str, str] = {}
        while self._uploads < int(self._width):
            entry = self._staging.following(now, unreachable)
            if entry is None:
                break
            if self._uploads and (self._bytes + entry.bytes > BUDGET or self._sending + entry.to_send > self._throughput.ahead):
                break
            why = self._look(layout_of(entry.replication, entry.length).spec)
            if why:
                # Nothing is read from the disk for hosts that are not there.
                unreachable[entry.replication] = why
                continue
            entry.under_way = True
            self._throughput.started(now, first=not self._uploads)
            self._uploads += 1
            self._bytes += entry.bytes
            self._sending += entry.to_send
            nursery.start_soon(self._send, entry, nursery)
        self._unreachable = next(iter(unreachable.values()), "")
        if unreachable:
            self._staging.cut.attempted()
        return LOOK_SECONDS if self._staging.below else RATE_WINDOW

    def _held(self, now: float) -> float:
        """Seconds for which a burst of writing still has the machine to itself. No cut waits for that, and staging does not fill up."""
        below = self._staging.below
        if not below or len(self._staging.cut) or 2 * len(below) * below.peekitem(-1)[1].bytes > self._staging.files.limit:
            # Once sending has begun, it goes on.
            self._begun = -inf
        quiet = min(max(PAUSES * self._apart, QUIET_LEAST), QUIET)
        return min(self._newest + quiet, self._begun + HELD_MOST) - now

    def _look(self, spec: Replication) -> str:
        """Why too few hosts can be used; "" if they can."""
        try:
            self._way.placement.candidates(spec)
        except FusefsError as error:
            return str(error)
        return ""

    async def _send(self, entry: Staged, nursery: trio.Nursery) -> None:
        started, failures, sent = self._seams.clock.monotonic(), self._failures, 0
        try:
            if await self._upload(entry, nursery):
                sent = entry.to_send
            self._trouble, self.full, self._retry = "", False, RETRY_FIRST
            self._width = min(self._width + CAREFUL, UPLOADS)
            self.sent += sent
            self._lately.append((self._seams.clock.monotonic(), sent))
        except FusefsError as error:
            now = self._seams.clock.monotonic()
            if self._trouble != str(error):
                log.warning("sector %d stays in staging for now: %s", entry.sector_id, error)
            self._trouble, self.full = str(error), isinstance(error, NoSpace)
            if failures == self._failures:
                # What was on its way together fails together, and tells that once.
                self._failures += 1
                if self._uploads > 1:
                    # One by itself was not one too many.
                    self._width = min(self._width, self._uploads) / 2.0
                self._due = now + self._retry
                self._retry = min(2 * self._retry, RETRY_LAST)
        finally:
            entry.under_way = False
            self._uploads -= 1
            self._bytes -= entry.bytes
            self._sending -= entry.to_send
            now = self._seams.clock.monotonic()
            self._throughput.ended(now, sent, now - started)
            self._staging.cut.attempted()
            self._wake.set()

    async def _upload(self, entry: Staged, nursery: trio.Nursery) -> bool:
        """Its shards from the disk to hosts; on its write quorum when it returns, and none of them on its way any more. False: lost."""
        shards: list[SealedShard] = []
        record = SectorRecord(VERSION, entry.replication, entry.length, 0, 0, list(entry.shards))
        try:
            for index in range(len(entry.shards)):
                shards.append(await self._regenerate(entry.sector_id, record, index))
        except FusefsError as error:
            if await self._staging.proves_whole(entry):
                raise
            # Nowhere any more: nothing else that is to be published waits for it.
            log.error("sector %d is lost: %s", entry.sector_id, error)
            self._staging.lost(entry, self._seams.clock.monotonic() + LOST_SECONDS)
            return False
        ended = trio.Event()
        self._seams.failpoints.hit("staging.before_upload")
        upload = Upload(self._way, entry.sector_id, entry.replication, layout_of(entry.replication, entry.length), ended.set)
        try:
            upload.start(shards, nursery)
        except FusefsError:
            upload.finish()
            raise
        await upload.wait_quorum()
        await ended.wait()
        return True
