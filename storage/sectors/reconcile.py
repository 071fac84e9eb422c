"""Reconcile: one loop that makes every sector's shards match its replication, on distinct hosts that keep what they have.

Repair after a loss, leaving a host, filling a new one and dropping what is too many are one job: `plan.make_plan` says what is missing or
too many, and the sector is mended (storage/sectors/mending.py, which has the order of steps, and the list of what there is to do).

    hosts that keep have changed -> look at all sectors -> the list -> mend those on it, a few at a time -> fill hosts that were added

Which hosts kept shards when all sectors were last looked at, and how far a look has come, is kept under the keys `w` + "reconcile.*", so a
restart goes on where it was:

| key | value |
|---|---|
| `reconcile.keeping` | MessagePack array of host numbers: all sectors were looked at with these |
| `reconcile.look` | MessagePack array: host numbers this look is for, sector id it has come to |
| `reconcile.fill` | storage/sectors/filling.py |
"""

from __future__ import annotations

import logging

import msgspec
import trio

from storage.errors import Corrupt, Fenced, FusefsError
from storage.interfaces import Batch, MetadataStore
from storage.metadata.keys import SECTOR, SETTING, UNDERREPLICATED, prefix_end, read_u64, u64
from storage.nurseries import plain_nursery
from storage.seams import Seams
from storage.sectors.doubts import Doubts
from storage.sectors.filling import Filling
from storage.sectors.leaving import KEEPING, Leaving, hosts_of
from storage.sectors.mending import MOVING, Mender
from storage.sectors.placement import Placement
from storage.sectors.records import decode_sector
from storage.sectors.walking import below_full
from storage.standing import Standing
from storage.wording import counted

log = logging.getLogger("fusefs.reconcile")

#: Sectors worked on at a time; each holds one sealed shard and, while it is made again, one sector's worth of others (I7).
WORKERS = 3
#: Sectors looked at between two checkpoints; and between two notes of how far the look is.
SLICE = 200
NOTE_EVERY = 10_000
#: Seconds between two rounds where nothing wakes it; until a sector that could not be mended is tried again, doubling to the last.
INTERVAL = 15.0
RETRY_FIRST, RETRY_LAST = 15.0, 900.0
#: Sectors whose next attempt is remembered; others are simply tried in the next round.
MAX_REMEMBERED = 100_000

_LOOK = SETTING + b"reconcile.look"


class Reconciler:
    """See the module. `run` once, in the volume's nursery; `wake` when hosts or sectors have changed."""

    def __init__(
        self, *, store: MetadataStore, placement: Placement, standing: Standing, doubts: Doubts, mender: Mender, seams: Seams
    ) -> None:
        self._store = store
        self._standing = standing
        self._doubts = doubts
        self._mender = mender
        self._seams = seams
        self.status = mender.status
        self._filling = Filling(store, placement, standing, mender)
        self._wake = trio.Event()
        #: One round at a time.
        self._lock = trio.Lock()
        #: Sectors that could not be mended in this round.
        self._unmended = 0
        self.leaving = Leaving(store)
        #: Sector -> (monotonic time of the next attempt, seconds waited last).
        self._later: dict[int, tuple[float, float]] = {}
        mender.on_replaced = self._replaced

    def wake(self) -> None:
        """Look again now; what failed lately is tried again too."""
        self._later.clear()
        self._wake.set()

    def retry(self, sector_id: int) -> None:
        """A bad copy of the sector was put right, or has left its record: what could not be mended for that can be now."""
        self._later.pop(sector_id, None)
        if self._store.get(UNDERREPLICATED + u64(sector_id)) is not None:
            self._wake.set()

    def _replaced(self) -> None:
        self._wake.set()

    async def make_good(self, *, again: bool = True) -> None:
        """Everything that can be made good now is when it returns; `status` says what could not, and why. Not `again`: apart from what
        could not a moment ago."""
        await self.round(again=again)
        await self._count(self._standing.keeping())

    def look_anew(self, batch: Batch) -> None:
        """In `batch`: all sectors are to be looked at, also if they were with the same hosts, while other ones kept in between."""
        batch.delete(KEEPING)
        batch.delete(_LOOK)

    def fill(self, batch: Batch) -> None:
        """In `batch`: a host was added, and is to get its share of what there is."""
        self._filling.ask(batch)
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled, or the volume can be written no more."""
        while True:
            self._wake = trio.Event()
            try:
                await self.round()
            except Fenced as error:
                log.info("reconcile ends: %s", error)
                return
            except FusefsError as error:
                log.warning("reconcile is postponed: %s", error)
                self.status.trouble = str(error)
            with trio.move_on_after(INTERVAL):
                await self._wake.wait()

    async def round(self, *, again: bool = False) -> None:
        """What is due now: a look at all sectors if the hosts that keep have changed, mending what is on the list, filling.

        `again`: also what could not be mended a moment ago.
        """
        async with self._lock:
            try:
                await self._round(again=again)
            finally:
                self.status.stage = ""

    async def _round(self, *, again: bool) -> None:
        if self._standing.look() or again:
            # What could not be mended for want of a host, or from it, can be now.
            self._later.clear()
        while True:
            if self._doubts.forgetful():
                # What has waited for the walk need not any more.
                self._later.clear()
            await self._doubts.walk()
            keeping = self._standing.keeping()
            await self._look(keeping)
            if await self._mend_all(keeping) and await self._fill(keeping):
                return

    async def _fill(self, keeping: frozenset[int]) -> bool:
        """New hosts have their share when it returns. False: broken off, since hosts have come or gone meanwhile."""
        if not self._filling.asked():
            return True
        self.status.stage = "filling new hosts"
        return await self._filling.fill(keeping, lambda: self._outdated(keeping))

    def _outdated(self, keeping: frozenset[int]) -> bool:
        """Do other hosts keep what they have, since `keeping` was asked, or has one forgotten things? A round over many sectors takes
        days."""
        if self._standing.look():
            self._later.clear()
        return self._standing.keeping() != keeping or bool(self._doubts.forgetful())

    # ------------------------------------------------------------------------------------------------------------
    # Looking at all sectors

    async def _look(self, keeping: frozenset[int]) -> None:
        """Put on the list what is not as it should be with these hosts; only if that was not done with them already."""
        wanted = msgspec.msgpack.encode(sorted(keeping))
        if self._store.get(KEEPING) == wanted:
            return
        self.status.stage = "looking at all sectors"
        start = SECTOR + u64(self._resume(sorted(keeping)))
        looked = 0
        present = self._standing.present()
        while found := self._store.scan(start, prefix_end(SECTOR), SLICE):
            batch = Batch()
            for key, raw in found:
                try:
                    sector_id = read_u64(key, 1)
                    record = decode_sector(raw, sector_id)
                except Corrupt as error:
                    log.error("%s", error)
                    continue
                if not self._mender.plan(sector_id, record, keeping).done:
                    missing = self._mender.plan(sector_id, record, present).missing
                    batch.put(UNDERREPLICATED + u64(sector_id), b"" if missing else MOVING)
            start = found[-1][0] + b"\0"
            looked += len(found)
            if looked % NOTE_EVERY < SLICE and len(start) == 10:
                batch.put(_LOOK, msgspec.msgpack.encode([sorted(keeping), read_u64(start, 1)]))
            if batch.ops:
                self._store.apply(batch)
            await trio.lowlevel.checkpoint()
        # Sectors written from now on are on the list until they are full; those written meanwhile were, or have been looked at.
        batch = Batch()
        # The list is not what was counted any more.
        self.leaving.counted = None
        batch.put(KEEPING, wanted)
        batch.delete(_LOOK)
        self._store.apply(batch)

    def _resume(self, keeping: list[int]) -> int:
        """The sector an earlier process's look for the same hosts came to."""
        raw = self._store.get(_LOOK)
        if raw is None:
            return 0
        try:
            hosts, following = msgspec.msgpack.decode(raw, type=tuple[list[int], int])
        except msgspec.MsgspecError:
            return 0
        return following if hosts == keeping and 0 <= following < 2**64 else 0

    # ------------------------------------------------------------------------------------------------------------
    # Mending

    async def _mend_all(self, keeping: frozenset[int]) -> bool:
        """Every sector on the list, a few at a time, unless it failed lately. False: hosts have come or gone meanwhile, for which it was
        broken off."""
        await self._count(keeping)
        if self.status.pending:
            self.status.stage = "making copies"
        self._unmended = 0
        limit = trio.CapacityLimiter(WORKERS)
        outdated = False
        async with plain_nursery() as nursery:
            async for sector_id in below_full(self._store):
                due = self._later.get(sector_id)
                if due is not None and due[0] > self._seams.clock.monotonic():
                    continue
                mark = object()
                await limit.acquire_on_behalf_of(mark)
                # No await from here on: what was true before the turn came may not be any more.
                if outdated := self._outdated(keeping):
                    break
                if not self._mender.takes(sector_id):
                    limit.release_on_behalf_of(mark)
                    continue
                self._mender.begin(sector_id)
                nursery.start_soon(self._mend_one, sector_id, keeping, limit, mark)
        if self._unmended:
            # One line a round, not one a sector: what keeps one from being mended often keeps them all.
            log.warning("not as it should be, for now: %s: %s", counted(self._unmended, "sector"), self.status.trouble)
        return not outdated and not self._outdated(keeping)

    async def _count(self, keeping: frozenset[int]) -> None:
        """How much there is to do."""
        sectors = missing = 0
        on_list: set[int] = set()
        numbers = self._standing.leaving().keys()
        async for sector_id in below_full(self._store):
            raw = self._store.get(SECTOR + u64(sector_id))
            on_list |= hosts_of(raw, numbers)
            if raw is None or self._mender.uploading(sector_id):
                continue  # freed, or not ours yet, and told by itself
            sectors += 1
            try:
                record = decode_sector(raw, sector_id)
            except Corrupt:
                continue
            missing += sum(record.shards[index].length for index in self._mender.plan(sector_id, record, keeping).missing)
        self.status.pending, self.status.pending_bytes = sectors, missing
        self.leaving.counted = frozenset(on_list)

    async def _mend_one(self, sector_id: int, keeping: frozenset[int], limit: trio.CapacityLimiter, mark: object) -> None:
        """`sector_id` is marked as busy already."""
        try:
            await self._mender.mend(sector_id, keeping)
            self._later.pop(sector_id, None)
            self.status.mended += 1
            self.status.pending = max(0, self.status.pending - 1)
            self.status.trouble = ""
        except Fenced:
            raise
        except FusefsError as error:
            log.debug("sector %d stays as it is for now: %s", sector_id, error)
            self._unmended += 1
            self.status.trouble = str(error)
            waited = self._later.get(sector_id, (0.0, RETRY_FIRST / 2))[1]
            if len(self._later) < MAX_REMEMBERED:
                wait = min(2 * waited, RETRY_LAST)
                self._later[sector_id] = (self._seams.clock.monotonic() + wait, wait)
        finally:
            self._mender.end(sector_id)
            limit.release_on_behalf_of(mark)

    async def find_strays(self) -> None:
        """After a recovery: every sector that hosts have, and whose record does not say so, is on record as there. Fenced."""
        async for sector_id in below_full(self._store):
            raw = self._store.get(SECTOR + u64(sector_id))
            if raw is None:
                continue
            try:
                await self._mender.adopt(sector_id, decode_sector(raw, sector_id))
            except Corrupt as error:
                log.error("%s", error)
