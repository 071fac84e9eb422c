"""Scrub: every copy of every sector is looked at within `interval`, whether or not anybody reads it; and all of them at once, when asked.

Sectors are gone through in the order of their ids. A *look* at a copy asks its host for 64 KiB at random and for where the shard ends
(`HostIO.probe`), or for the whole of it. What that tells:

| what is wrong with a copy | a look at 64 KiB | a look at the whole |
|---|---|---|
| missing, cut off, lengthened, another shard, or of another volume | found | found |
| damaged within one stretch of n | found with chance 1/n, after p passes 1 - (1 - 1/n)^p | found |
| its host is away, or does not answer | not looked at, and counted | the same |

A *pass* is a walk over all sectors. The one in the background takes 0.9 of the interval, so that no copy waits longer than the interval
for its next look; what a pass costs is 64 KiB per copy, whatever its size. How many sectors go by in a while follows from how many are
left and the time left, both taken anew as it goes: a pass that a machine was off for catches up, but takes no less than a tenth of the
interval for what is left. Hosts that do not answer are left alone for a while. What is found is mended as it is found (sectors.damage).

Records of this directory alone (`L`): "scrub.pass", the pass in the background that is under way; "scrub.last", the last one over all
sectors that came to its end, of whatever kind. Both are a MessagePack array:

| # | field | type | meaning |
|---|---|---|---|
| 0 | version | uint | 1 |
| 1, 2 | begun, ended | uint | nanoseconds since the Unix epoch; ended 0 while it is under way |
| 3 | following | uint | id of the first sector that is still to be looked at |
| 4 | whole | bool | all of each shard was looked at |
| 5, 6, 7 | sectors, shards, bytes | uint | looked at |
| 8, 9, 10, 11 | missing, damaged, mended, unanswered | uint | copies |
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Annotated

import msgspec
import trio

from storage.errors import BadArgument, Busy, Corrupt, Fenced, FusefsError
from storage.hosts.registry import HostRegistry
from storage.interfaces import Batch, MetadataStore
from storage.metadata.keys import LOCAL, SECTOR, u64
from storage.nurseries import plain_nursery
from storage.seams import Seams
from storage.sectors.damage import MAX_LISTED, Copy, Damages, Found, Outcome
from storage.sectors.records import decode_sector
from storage.sectors.walking import count, walk
from storage.standing import Standing
from storage.status import ScrubReport, ScrubStatus
from storage.wording import counted

log = logging.getLogger("fusefs.scrub")

VERSION = 1
_PASS = LOCAL + b"scrub.pass"
_LAST = LOCAL + b"scrub.last"

#: Seconds within which every copy is looked at: two weeks.
INTERVAL = 14 * 86400.0
#: Share of the interval a pass takes, and the least it takes for what is left.
PLANNED, CATCH_UP = 0.9, 0.1
#: A pass goes on in steps of a sector, but of this share of its interval at most, and this many seconds at least.
STEP, STEP_MIN = 1 / 1000, 1.0
#: Share of the interval after which sectors are counted anew.
RECOUNT = 1 / 50
#: Seconds between two notes of how far it is.
NOTE_SECONDS = 600.0
#: Sectors looked at at a time in the background, and when somebody waits; each holds a shard at most, and what makes one again (I7).
BACKGROUND_WORKERS, WORKERS = 2, 6
#: Looks at one host at a time.
PER_HOST = 3
#: Seconds for which a host that did not answer is left alone.
REST = 60.0

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class PassRecord(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """See the table above."""

    version: int
    begun_ns: _Count
    ended_ns: _Count
    following: Annotated[int, msgspec.Meta(ge=0)]
    whole: bool
    sectors: _Count
    shards: _Count
    bytes: _Count
    missing: _Count
    damaged: _Count
    mended: _Count
    unanswered: _Count


@dataclass(slots=True)
class Tally:
    """What a pass has come to so far. `shards` are copies: each shard on each of its hosts."""

    sectors: int = 0
    shards: int = 0
    bytes: int = 0
    missing: int = 0
    damaged: int = 0
    mended: int = 0
    unanswered: int = 0
    #: Hosts that did not answer.
    away: set[int] = field(default_factory=set)
    trouble: str = ""
    #: Copies found bad, by whoever found them meanwhile, with how it stands with them.
    bad: dict[Copy, Outcome] = field(default_factory=dict)

    @property
    def lost(self) -> set[int]:
        """Sectors that cannot be made good."""
        return {copy.sector_id for copy, outcome in self.bad.items() if outcome.lost}

    def looked(self, copy: Copy, outcome: Outcome) -> None:
        """One copy more. If it is bad, `heard` says so."""
        if outcome.found is Found.UNANSWERED:
            self.unanswered += 1
            self.away.add(copy.host)
        elif outcome.found is not Found.GONE:
            self.shards += 1
            self.bytes += outcome.size

    def heard(self, copy: Copy, outcome: Outcome) -> None:
        """A `Watcher`."""
        known = self.bad.get(copy)
        if known is None:
            if outcome.found is Found.GOOD or len(self.bad) >= MAX_LISTED:
                return
            self.missing += outcome.found is Found.MISSING
            self.damaged += outcome.found is Found.DAMAGED
        self.mended += outcome.mended and not (known is not None and known.mended)
        self.bad[copy] = outcome
        self.trouble = outcome.trouble or self.trouble


class _Pass:
    """A walk that is under way."""

    def __init__(self, begun_ns: int, *, whole: bool, following: int = 0, tally: Tally | None = None) -> None:
        self.begun_ns = begun_ns
        self.whole = whole
        self.tally = tally or Tally()
        #: The first sector nobody has begun to look at; those that are being looked at.
        self.following = following
        self.busy: set[int] = set()

    def record(self, ended_ns: int = 0) -> PassRecord:
        t = self.tally
        at = min(self.busy, default=self.following)
        return PassRecord(
            VERSION, self.begun_ns, ended_ns, at, self.whole, t.sectors, t.shards, t.bytes, t.missing, t.damaged, t.mended, t.unanswered
        )


class Scrubber:
    """See the module. `run` once, in the volume's nursery; `scrub` whenever somebody asks."""

    def __init__(
        self,
        *,
        store: MetadataStore,
        damages: Damages,
        registry: HostRegistry,
        standing: Standing,
        seams: Seams,
        interval: float | None,
    ) -> None:
        """`interval`: seconds; None: nothing is looked at in the background."""
        self._store = store
        self._damages = damages
        self._registry = registry
        self._standing = standing
        self._seams = seams
        self.interval = interval
        self._background: _Pass | None = None
        #: Sectors left in it when they were last counted, and how many it had looked at then.
        self._left = (0, 0)
        #: The one somebody waits for.
        self._asked: _Pass | None = None
        self._progress = (0, 0)
        #: Host -> monotonic time until which it is left alone.
        self._resting: dict[int, float] = {}
        self._limits: dict[int, trio.CapacityLimiter] = {}

    # ------------------------------------------------------------------------------------------------------------
    # Telling

    def status(self) -> ScrubStatus:
        """The pass in the background, the last one that ended, and what is known to be bad."""
        last = self._load(_LAST)
        now = self._background.record() if self._background is not None else self._load(_PASS)
        damage = self._damages.status
        left = max(0, self._left[0] - (now.sectors - self._left[1])) if now is not None and self._background is not None else 0
        return ScrubStatus(
            interval=self.interval or 0.0,
            begun_ns=now.begun_ns if now is not None else 0,
            sectors=now.sectors if now is not None else 0,
            sectors_left=left,
            shards=now.shards if now is not None else 0,
            bytes=now.bytes if now is not None else 0,
            missing=now.missing if now is not None else 0,
            damaged=now.damaged if now is not None else 0,
            repaired=now.mended if now is not None else 0,
            unanswered=now.unanswered if now is not None else 0,
            last_begun_ns=last.begun_ns if last is not None else 0,
            last_ended_ns=last.ended_ns if last is not None else 0,
            last_full=last is not None and last.whole,
            last_sectors=last.sectors if last is not None else 0,
            last_found=last.missing + last.damaged if last is not None else 0,
            last_repaired=last.mended if last is not None else 0,
            last_unanswered=last.unanswered if last is not None else 0,
            found_since=damage.found,
            repaired_since=damage.mended,
            pending=self._damages.listed,
            lost=len(damage.lost),
            trouble=damage.trouble,
        )

    def progress(self) -> tuple[int, int]:
        """Of the scrub somebody waits for: sectors done, and in all."""
        return self._progress

    def save(self, batch: Batch) -> None:
        """In `batch`: how far the pass in the background is, for the next process."""
        if self._background is not None:
            batch.put(_PASS, msgspec.msgpack.encode(self._background.record()))

    def _load(self, key: bytes) -> PassRecord | None:
        raw = self._store.get(key)
        if raw is None:
            return None
        try:
            found = msgspec.msgpack.decode(raw, type=PassRecord)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            log.warning("how far the scrub was is damaged, and forgotten: %s", error)
            return None
        return found if found.version == VERSION else None

    # ------------------------------------------------------------------------------------------------------------
    # When somebody asks

    async def scrub(self, *, full: bool = False, sample: float = 1.0) -> ScrubReport:
        """Look at every copy (of a share `sample` of the sectors) now, at a block or at the whole, and mend what can be mended.

        Busy while another one is under way; Fenced; BadArgument.
        """
        if not 0 < sample <= 1:
            raise BadArgument(f"a sample of {sample:g}: more than 0 and at most 1")
        # No await between the question and the mark.
        if self._asked is not None:
            raise Busy("a scrub is under way already; wait for it to end")
        walked = self._asked = _Pass(self._seams.clock.time_ns(), whole=full)
        started = self._seams.clock.monotonic()
        self._resting.clear()
        self._damages.watchers.append(walked.tally.heard)
        try:
            done, self._progress = 0, (0, await count(self._store))
            limit = trio.CapacityLimiter(WORKERS)
            async with plain_nursery() as nursery:
                async for sector_id, _ in walk(self._store):
                    done += 1
                    self._progress = (done, max(done, self._progress[1]))
                    if sample >= 1 or self._chance() < sample:
                        await self._begin(walked, sector_id, limit, nursery)
            if sample >= 1:
                self._ended(walked)
            return self._report(walked, self._seams.clock.monotonic() - started)
        finally:
            self._asked = None
            self._damages.watchers.remove(walked.tally.heard)

    def _chance(self) -> float:
        return int.from_bytes(self._seams.random.token_bytes(4), "big") / 2**32

    def _report(self, walked: _Pass, seconds: float) -> ScrubReport:
        tally = walked.tally
        return ScrubReport(
            full=walked.whole,
            sectors=tally.sectors,
            shards=tally.shards,
            bytes=tally.bytes,
            missing=tally.missing,
            damaged=tally.damaged,
            repaired=tally.mended,
            lost=len(tally.lost),
            unanswered=tally.unanswered,
            hosts_away=[self._registry.url(host) for host in sorted(tally.away)],
            hosts_failing=[
                f"{self._registry.url(host)}: {why}" for host in self._registry.numbers() if (why := self._damages.failing(host))
            ],
            trouble=tally.trouble,
            seconds=round(seconds, 3),
        )

    def _ended(self, walked: _Pass) -> None:
        batch = Batch()
        batch.put(_LAST, msgspec.msgpack.encode(walked.record(max(1, self._seams.clock.time_ns()))))
        self._store.apply(batch)

    # ------------------------------------------------------------------------------------------------------------
    # In the background

    async def run(self) -> None:
        """Pass after pass, until cancelled or the volume can be written no more."""
        if self.interval is None:
            return
        while True:
            walked = self._resumed()
            self._damages.watchers.append(walked.tally.heard)
            try:
                await self._one_pass(walked, self.interval)
            except Fenced as error:
                log.info("scrub ends: %s", error)
                return
            except FusefsError as error:
                log.warning("scrub is postponed: %s", error)
                await self._seams.clock.sleep(REST)
            finally:
                self._damages.watchers.remove(walked.tally.heard)

    async def _one_pass(self, walked: _Pass, interval: float) -> None:
        clock = self._seams.clock
        left = await count(self._store, walked.following)
        if not left:
            await clock.sleep(max(interval * STEP, STEP_MIN))
            left = await count(self._store, walked.following)
        self._background, self._left = walked, (left, walked.tally.sectors)
        # On the monotonic clock, from here on: a machine that sleeps, or whose clock is set, goes on at the pace it had.
        rest = min(walked.begun_ns / 1e9 + interval * PLANNED - clock.time_ns() / 1e9, interval * PLANNED)
        deadline = clock.monotonic() + max(rest, interval * CATCH_UP)
        limit = trio.CapacityLimiter(BACKGROUND_WORKERS)
        due, last = 0.0, clock.monotonic()
        recounted = noted = last
        async with plain_nursery() as nursery:
            while left:
                await clock.sleep(min(max((deadline - last) / left, STEP_MIN), max(interval * STEP, STEP_MIN)))
                now = clock.monotonic()
                # As many as go by in what has passed, if all that are left are to go by in what is left.
                due = min(due + left * (now - last) / max(deadline - last, now - last), left)
                last = now
                await self._some(walked, int(due), limit, nursery)
                due -= int(due)
                left = self._left[0] - (walked.tally.sectors - self._left[1])
                if left <= 0 or now - recounted > interval * RECOUNT:
                    left, recounted = await count(self._store, walked.following), now
                    self._left = (left, walked.tally.sectors)
                if now - noted > NOTE_SECONDS:
                    noted = now
                    batch = Batch()
                    self.save(batch)
                    self._store.apply(batch)
        if walked.tally.sectors:
            self._ended(walked)
            log.info("scrub: a pass over %s has ended", counted(walked.tally.sectors, "sector"))
        self._background = None
        batch = Batch()
        batch.delete(_PASS)
        self._store.apply(batch)

    def _resumed(self) -> _Pass:
        """Where the last process left off, or a new one."""
        found = self._load(_PASS)
        now = self._seams.clock.time_ns()
        if found is None:
            return _Pass(now, whole=False)
        tally = Tally(found.sectors, found.shards, found.bytes, found.missing, found.damaged, found.mended, found.unanswered)
        return _Pass(min(found.begun_ns, now), whole=False, following=found.following, tally=tally)

    async def _some(self, walked: _Pass, number: int, limit: trio.CapacityLimiter, nursery: trio.Nursery) -> None:
        """The next `number` sectors, if there are as many."""
        if not number:
            return
        async for sector_id, _ in walk(self._store, walked.following):
            await self._begin(walked, sector_id, limit, nursery)
            number -= 1
            if not number:
                return

    # ------------------------------------------------------------------------------------------------------------
    # Looking

    async def _begin(self, walked: _Pass, sector_id: int, limit: trio.CapacityLimiter, nursery: trio.Nursery) -> None:
        """Look at a sector in `nursery`, once fewer than `limit` are being looked at."""
        mark = object()
        await limit.acquire_on_behalf_of(mark)
        walked.busy.add(sector_id)
        walked.following = sector_id + 1

        async def work() -> None:
            try:
                await self._look_at(walked, sector_id)
            finally:
                walked.busy.discard(sector_id)
                limit.release_on_behalf_of(mark)

        nursery.start_soon(work)

    async def _look_at(self, walked: _Pass, sector_id: int) -> None:
        """Every copy of a sector, as its record has them when their turn comes."""
        walked.tally.sectors += 1
        lost = self._standing.lost()
        for copy in self._copies(sector_id, lost):
            raw = self._store.get(SECTOR + u64(sector_id))
            if raw is None:
                return
            try:
                record = decode_sector(raw, sector_id)
            except Corrupt as error:
                log.error("%s", error)
                return
            if copy.number >= len(record.shards) or copy.host not in record.shards[copy.number].hosts:
                continue
            if not self._registry.available(copy.host) or self._resting.get(copy.host, 0.0) > self._seams.clock.monotonic():
                # Away is not damaged.
                walked.tally.looked(copy, Outcome(Found.UNANSWERED))
                continue
            async with self._limits.setdefault(copy.host, trio.CapacityLimiter(PER_HOST)):
                outcome = await self._damages.examine(copy, record, whole=walked.whole)
            if outcome.found is Found.UNANSWERED:
                self._resting[copy.host] = self._seams.clock.monotonic() + REST
            walked.tally.looked(copy, outcome)

    def _copies(self, sector_id: int, lost: Collection[int]) -> list[Copy]:
        """Those that are to be there: a lost host's are made again elsewhere."""
        raw = self._store.get(SECTOR + u64(sector_id))
        try:
            record = decode_sector(raw, sector_id) if raw is not None else None
        except Corrupt as error:
            log.error("%s", error)
            record = None
        shards = enumerate(record.shards) if record is not None else ()
        return [Copy(sector_id, number, host) for number, shard in shards for host in shard.hosts if host not in lost]
