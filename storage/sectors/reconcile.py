"""Reconcile: one loop that makes every sector's shards match its replication, on distinct hosts that keep what they have.

First upload, repair after a loss, leaving a host, filling a new one and dropping what is too many are one job: `plan.make_plan` says what
is missing, a shard is made again from what is left, put on a host, and then the record says so. In this order, always:

    shard durable on the new host -> record names it (I2) -> the old place leaves the record, in the batch that queues its deletion (I3)

so what is safe never becomes less on the way, and a crash between any two steps leaves at most a shard too many, which the sweep knows.
A place that may be empty counts for nothing until it was read (storage/sectors/doubts.py).
What there is to do stands under the key `u` + sector id; the value is empty where shards are missing, `MOVING` where they are only not
where they should be. Which hosts kept shards when all sectors were last looked at, and how far a look has come, is kept under the keys
`w` + "reconcile.*", so a restart goes on where it was:

| key | value |
|---|---|
| `reconcile.keeping` | MessagePack array of host numbers: all sectors were looked at with these |
| `reconcile.look` | MessagePack array: host numbers this look is for, sector id it has come to |
| `reconcile.fill` | there: hosts were added, and are to get their share |
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Set
from dataclasses import dataclass

import msgspec
import trio

from storage.contractor import Contractor
from storage.errors import Busy, Corrupt, Fenced, FusefsError, Unavailable
from storage.host_io import HostIO
from storage.interfaces import Batch, MetadataStore, SealedShard
from storage.metadata.keys import SECTOR, SETTING, UNDERREPLICATED, prefix_end, read_u64, u64
from storage.nurseries import plain_nursery
from storage.pacing import Pace
from storage.seams import Seams
from storage.sectors.deleter import Deleter
from storage.sectors.doubts import Doubts
from storage.sectors.leaving import KEEPING, Leaving, hosts_of
from storage.sectors.placement import Placement
from storage.sectors.plan import Plan, make_plan
from storage.sectors.records import SectorRecord, ShardRecord, decode_sector
from storage.sectors.strays import Strays
from storage.sectors.walking import below_full, walk
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
#: A host is filled until it has this share of what the average host has.
FILLED = 0.9

#: See the module.
MOVING = b"m"

_LOOK = SETTING + b"reconcile.look"
_FILL = SETTING + b"reconcile.fill"

#: (sector id, its record, index of the shard) -> the sealed shard, root verified; from a host that has it, or made again from others.
Regenerate = Callable[[int, SectorRecord, int], Awaitable[SealedShard]]


@dataclass(slots=True)
class ReconcileStatus:
    """For `status`: what this process has done, and what it is at."""

    #: Sectors that are not as they should be, as far as known, and the bytes still to be sent for them.
    pending: int = 0
    pending_bytes: int = 0
    #: Sectors that are now as they should be; shards put, and their bytes; shards that left their old place.
    mended: int = 0
    shards: int = 0
    bytes: int = 0
    moved: int = 0
    #: "" while there is nothing to do; else in a few words.
    stage: str = ""
    #: Why the last sector could not be mended; "" since one was.
    trouble: str = ""


class Reconciler:
    """See the module. `run` once, in the volume's nursery; `wake` when hosts or sectors have changed."""

    def __init__(
        self,
        *,
        store: MetadataStore,
        host_io: HostIO,
        placement: Placement,
        standing: Standing,
        deleter: Deleter,
        doubts: Doubts,
        regenerate: Regenerate,
        contractor: Contractor,
        strays: Strays,
        seams: Seams,
        rate: float | None = None,
    ) -> None:
        """`rate`: bytes per second that mending may send; None: no limit."""
        self._store = store
        self._host_io = host_io
        self._placement = placement
        self._standing = standing
        self._deleter = deleter
        self._doubts = doubts
        self._regenerate = regenerate
        self._contractor = contractor
        self._strays = strays
        self._seams = seams
        self.pace = Pace(seams.clock, rate)
        self.status = ReconcileStatus()
        self._wake = trio.Event()
        #: One round at a time.
        self._lock = trio.Lock()
        #: Sectors being mended now.
        self._busy: set[int] = set()
        #: Who waits for one of them.
        self._waiting = trio.lowlevel.ParkingLot()
        #: Sectors that could not be mended in this round.
        self._unmended = 0
        self.leaving = Leaving(store)
        #: Sector -> (monotonic time of the next attempt, seconds waited last).
        self._later: dict[int, tuple[float, float]] = {}
        #: Sectors whose first upload is still under way: nothing is missing there yet.
        self.uploading: Callable[[int], bool] = lambda _sector_id: False
        #: Hosts whose copy of a sector is known to be bad, and is being put right (sectors.damage).
        self.bad: Callable[[int], Set[int]] = lambda _sector_id: frozenset()
        #: Told in the batch that says a sector is at full replication.
        self.settled: Callable[[Batch, int], None] = lambda _batch, _sector_id: None

    def wake(self) -> None:
        """Look again now; what failed lately is tried again too."""
        self._later.clear()
        self._wake.set()

    def retry(self, sector_id: int) -> None:
        """A bad copy of the sector was put right, or has left its record: what could not be mended for that can be now."""
        self._later.pop(sector_id, None)
        if self._store.get(UNDERREPLICATED + u64(sector_id)) is not None:
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

    def surplus(self, sector_id: int, root: bytes, host: int) -> bool:
        """For the sweep: is a shard of the sector on this host, where its record does not name it, one that nobody needs? No await.

        Not while something is missing or at the sector, whoever is at it: it may be what is being put, or what is left. Corrupt.
        """
        raw = self._store.get(SECTOR + u64(sector_id))
        record = decode_sector(raw, sector_id) if raw is not None else None
        shard = next((one for one in record.shards if one.root == root), None) if record is not None else None
        if record is None or shard is None or host in shard.hosts:
            return False
        if sector_id in self._busy or self.uploading(sector_id) or self._deleter.sparing(root, host):
            return False
        plan = self._plan(sector_id, record, self._standing.keeping())
        # Not on the word of a host that is away just now, though it still counts: this one may be all there is besides.
        return plan.done and all(map(self._standing.here, plan.hosts))

    def fill(self, batch: Batch) -> None:
        """In `batch`: a host was added, and is to get its share of what there is."""
        batch.put(_FILL, b"")
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
            if await self._mend_all(keeping) and (self._store.get(_FILL) is None or await self._fill_up(keeping)):
                return

    def _outdated(self, keeping: frozenset[int]) -> bool:
        """Do other hosts keep what they have, since `keeping` was asked, or has one forgotten things? A round over many sectors takes
        days."""
        if self._standing.look():
            self._later.clear()
        return self._standing.keeping() != keeping or bool(self._doubts.forgetful())

    def _plan(self, sector_id: int, record: SectorRecord, keeping: frozenset[int]) -> Plan:
        """What is missing and too many with these hosts; a doubted place, or one whose copy is known to be bad, counts for nothing."""
        without = self._doubts.of(sector_id) | self.bad(sector_id)
        # A look asks this of every sector, and hosts may be a thousand: no copy of them all where there is nothing to take away.
        return make_plan(record, keeping - without if without else keeping, self._standing.domain)

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
                if not self._plan(sector_id, record, keeping).done:
                    missing = self._plan(sector_id, record, present).missing
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
                if self.uploading(sector_id) or sector_id in self._busy:
                    limit.release_on_behalf_of(mark)
                    continue
                self._busy.add(sector_id)
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
            if raw is None or self.uploading(sector_id):
                continue  # freed, or not ours yet, and told by itself
            sectors += 1
            try:
                record = decode_sector(raw, sector_id)
            except Corrupt:
                continue
            missing += sum(record.shards[index].length for index in self._plan(sector_id, record, keeping).missing)
        self.status.pending, self.status.pending_bytes = sectors, missing
        self.leaving.counted = frozenset(on_list)

    async def _mend_one(self, sector_id: int, keeping: frozenset[int], limit: trio.CapacityLimiter, mark: object) -> None:
        """`sector_id` is marked as busy already."""
        try:
            await self.mend(sector_id, keeping)
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
            self._done(sector_id)
            limit.release_on_behalf_of(mark)

    def _done(self, sector_id: int) -> None:
        """Nobody is at the sector any more."""
        self._busy.discard(sector_id)
        self._waiting.unpark_all()

    async def mend(self, sector_id: int, keeping: frozenset[int]) -> None:
        """The sector is as it should be when it returns, or gone. Unavailable, Corrupt, NoSpace: it is as good as before, or better."""
        if (record := self._record(sector_id)) is not None:
            await self._doubts.look(sector_id, record)
        while (record := self._record(sector_id)) is not None:
            if self._strays.is_stray(record):
                await self._adopt(sector_id, record)
                record = self._record(sector_id)
                if record is None:
                    return
            plan = self._plan(sector_id, record, keeping)
            if not plan.missing:
                self._settle(sector_id, record, plan)
                return
            if self._doubts.forgetful():
                # A copy put there would count for nothing, until all of them are doubted one by one: it would be put again and again.
                raise Unavailable(f"sector {sector_id} waits until what a host has forgotten is on record")
            await self._add(sector_id, record, plan.missing[0], plan.hosts, keeping)

    async def _adopt(self, sector_id: int, record: SectorRecord) -> None:
        """A sector whose record names too few hosts: those that have its shards are put on record."""
        located = await self._strays.locate(sector_id, record)
        for shard, known in zip(located.shards, record.shards, strict=True):
            for host in set(shard.hosts) - set(known.hosts):
                contract = self._contractor.contract_for(host)
                if contract is None:
                    continue
                with self._deleter.spared(shard.root, host):
                    await self._host_io.adopt(contract.contract_id, shard.root.hex())
                    self._landed(sector_id, shard, host)

    async def find_strays(self) -> None:
        """After a recovery: every sector that hosts have, and whose record does not say so, is on record as there. Fenced."""
        async for sector_id in below_full(self._store):
            raw = self._store.get(SECTOR + u64(sector_id))
            if raw is None:
                continue
            try:
                record = decode_sector(raw, sector_id)
                if self._strays.is_stray(record):
                    await self._adopt(sector_id, record)
            except Corrupt as error:
                log.error("%s", error)

    def _record(self, sector_id: int) -> SectorRecord | None:
        raw = self._store.get(SECTOR + u64(sector_id))
        if raw is None:
            # Freed meanwhile; its mark went with it, unless somebody put it there since.
            batch = Batch()
            batch.delete(UNDERREPLICATED + u64(sector_id))
            self._doubts.clear(batch, sector_id)
            self._store.apply(batch)
            return None
        return decode_sector(raw, sector_id)

    async def _add(self, sector_id: int, record: SectorRecord, index: int, hosts: Collection[int], keeping: Collection[int]) -> None:
        """One shard to one more host, and onto the record."""
        # A doubted host may get what it is said to have, and nothing else: the place of another shard there would seem to be filled.
        elsewhere = {host for host in self._doubts.of(sector_id) if host not in record.shards[index].hosts}
        # One whose copy is bad gets nothing from here: until it is put right, and read back, it would count for nothing after as before,
        # and be put again and again.
        bad = self.bad(sector_id)
        targets = self._placement.others({*hosts, *elsewhere, *bad}, keeping)
        if not targets and bad:
            raise Unavailable(
                f"sector {sector_id} is to have {record.replication} on distinct hosts; no other host can take a shard"
                f"{self._placement.besides({*hosts, *bad})}, and what is bad on host {', '.join(map(str, sorted(bad)))} has to be put "
                "right first"
            )
        if not targets:
            raise Unavailable(
                f"sector {sector_id} is to have {record.replication} on distinct hosts, and no other host can take a shard"
                f"{self._placement.besides(hosts)}; add a host"
            )
        sealed = await self._regenerate(sector_id, record, index)
        errors: list[str] = []
        for contract in targets:
            await self.pace.take(len(memoryview(sealed.sealed)))
            # From before the put until the record has it: the deletion of an earlier copy there must not come in between.
            with self._deleter.spared(record.shards[index].root, contract.host_number):
                try:
                    await self._host_io.write_sealed(contract.contract_id, sealed)
                except Fenced:
                    raise
                except FusefsError as error:
                    errors.append(str(error))
                    continue
                self._seams.failpoints.hit("reconcile.before_record")
                self._landed(sector_id, record.shards[index], contract.host_number)
            self.status.shards += 1
            self.status.bytes += len(memoryview(sealed.sealed))
            self.status.pending_bytes = max(0, self.status.pending_bytes - record.shards[index].length)
            return
        raise Unavailable(f"sector {sector_id}: no other host takes a shard ({'; '.join(errors)})")

    def _landed(self, sector_id: int, shard: ShardRecord, host: int) -> None:
        """The shard is durable on the host. No await: the record is read and written in one step."""
        batch = Batch()
        raw = self._store.get(SECTOR + u64(sector_id))
        record = decode_sector(raw, sector_id) if raw is not None else None
        ours = next((one for one in record.shards if one.root == shard.root), None) if record is not None else None
        if record is None or ours is None:
            # Freed while the shard was on its way: it goes the way of the others.
            self._queue(batch, sector_id, record, [(shard, [host])])
        else:
            ours.hosts = sorted({*ours.hosts, host})
            self._doubts.clear(batch, sector_id, host)
            batch.put(SECTOR + u64(sector_id), record.encode())
            if self._store.get(UNDERREPLICATED + u64(sector_id)) is None:
                # Until it has been settled: a crash in between leaves a shard too many, for the next process to see.
                batch.put(UNDERREPLICATED + u64(sector_id), MOVING)
        self._store.apply(batch)

    def _settle(self, sector_id: int, record: SectorRecord, plan: Plan) -> None:
        """Nothing is missing: what is too many goes. No await since the record was read."""
        batch = Batch()
        lost = self._standing.lost()
        # From a lost host nothing is deleted: it keeps what it has, whatever that is.
        leaving = [(shard, sorted(set(shard.hosts) - set(plan.counted[i]) - lost)) for i, shard in enumerate(record.shards)]
        if plan.surplus:
            self._queue(batch, sector_id, record, [(shard, hosts) for shard, hosts in leaving if hosts])
            for index, shard in enumerate(record.shards):
                shard.hosts = sorted(plan.counted[index])
            batch.put(SECTOR + u64(sector_id), record.encode())
            self.status.moved += len(plan.surplus)
        batch.delete(UNDERREPLICATED + u64(sector_id))
        self._doubts.clear(batch, sector_id)
        self.settled(batch, sector_id)
        self._store.apply(batch)

    def _queue(self, batch: Batch, sector_id: int, record: SectorRecord | None, shards: list[tuple[ShardRecord, list[int]]]) -> None:
        """These shards are deleted on these hosts, when I3 allows."""
        if not shards:
            return
        gone = [ShardRecord(shard.shard_id, shard.length, shard.root, hosts) for shard, hosts in shards]
        like = record or SectorRecord(1, "1", 0, 0, 0, [])
        self._deleter.enqueue(batch, sector_id, SectorRecord(like.version, like.replication, like.length, 0, 0, gone))

    # ------------------------------------------------------------------------------------------------------------
    # Replacing

    async def replace(self, sector_id: int, root: bytes, bad: int) -> None:
        """A copy that cannot be put right where it is: another host gets one, and then the record forgets the one on host `bad`.

        Whether the sector has too many then is for the next round to see. Busy: it is on its way to its hosts for the first time.
        Unavailable: no other host takes it. Corrupt: it cannot be made again. The record still names it then: it never has fewer copies
        than before.
        """
        while sector_id in self._busy:
            await self._waiting.park()
        # No await from here to the mark: one at a time.
        record = self._record(sector_id)
        index = next((at for at, shard in enumerate(record.shards) if shard.root == root), None) if record is not None else None
        if record is None or index is None or bad not in record.shards[index].hosts:
            return
        if self.uploading(sector_id):
            raise Busy(f"sector {sector_id} is on its way to its hosts")
        self._busy.add(sector_id)
        try:
            taken = {host for shard in record.shards for host in shard.hosts}
            await self._add(sector_id, record, index, taken, self._standing.keeping() - {bad})
            self._forget(sector_id, root, bad)
        finally:
            self._done(sector_id)
        self._wake.set()

    def _forget(self, sector_id: int, root: bytes, host: int) -> None:
        """Another host has the shard, durably and on record (I2). Never the last one. No await between reading and writing the record."""
        record = self._record(sector_id)
        shard = next((one for one in record.shards if one.root == root), None) if record is not None else None
        if record is None or shard is None or host not in shard.hosts or len(set(shard.hosts)) < 2:
            return
        shard.hosts = sorted(set(shard.hosts) - {host})
        batch = Batch()
        batch.put(SECTOR + u64(sector_id), record.encode())
        if host not in self._standing.lost():
            self._queue(batch, sector_id, record, [(shard, [host])])
        self._store.apply(batch)

    # ------------------------------------------------------------------------------------------------------------
    # Filling

    async def _fill_up(self, keeping: frozenset[int]) -> bool:
        """Move shards to hosts that have less than their share, from those that have most. Once through all sectors. False: broken off,
        since hosts have come or gone meanwhile."""
        self.status.stage = "filling new hosts"
        load = dict.fromkeys(keeping, 0)
        async for _, record in walk(self._store):
            for shard in record.shards:
                for host in shard.hosts:
                    if host in load:
                        load[host] += shard.length
        total = sum(load.values())
        if load and total:
            goal = total / len(load) * FILLED
            async for sector_id, record in walk(self._store):
                short = [host for host in load if load[host] < goal and self._placement.takes(host)]
                if not short:
                    break
                if self._outdated(keeping):
                    return False
                await self._move(sector_id, record, short, load, keeping)
        batch = Batch()
        batch.delete(_FILL)
        self._store.apply(batch)
        return True

    async def _move(self, sector_id: int, record: SectorRecord, short: list[int], load: dict[int, int], keeping: frozenset[int]) -> None:
        """One shard of the sector to the host that has least, if one that has more loses it, and no failure domain gets two for it."""
        domain = self._standing.domain
        plan = self._plan(sector_id, record, keeping)
        target = min((host for host in short if host not in plan.hosts), key=lambda host: load[host], default=None)
        if target is None or plan.missing or sector_id in self._busy or self.uploading(sector_id):
            return
        places = [(index, host) for index, hosts in enumerate(plan.counted) for host in hosts]

        def keeps_apart(source: int) -> bool:
            return domain(target) not in {domain(host) for _, host in places if host != source}

        able = [place for place in places if keeps_apart(place[1])] or ([] if any(keeps_apart(h) for _, h in places) else places)
        index, source = max(able, key=lambda place: load[place[1]], default=(0, 0))
        shard = record.shards[index]
        if not source or load[source] - load[target] < 2 * shard.length:
            return
        self._busy.add(sector_id)
        try:
            await self._add(sector_id, record, index, {*load} - {target}, keeping)
            current = self._record(sector_id)
            if current is not None:
                # With the source no longer counted, it is surplus.
                without = frozenset(keeping - {source})
                plan = self._plan(sector_id, current, without)
                if not plan.missing:
                    self._settle(sector_id, current, plan)
                    load[source] -= shard.length
                    load[target] += shard.length
        except Fenced:
            raise
        except FusefsError as error:
            log.info("sector %d is not moved: %s", sector_id, error)
        finally:
            self._done(sector_id)
