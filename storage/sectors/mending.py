"""Mending: one sector's shards are made to match its replication, on distinct hosts that keep what they have.

What is missing is made again from what is left, put on a host, and then the record says so. In this order, always:

    shard durable on the new host -> record names it (I2) -> the old place leaves the record, in the batch that queues its deletion (I3)

so what is safe never becomes less on the way, and a crash between any two steps leaves at most a shard too many, which the sweep knows.
A place that may be empty counts for nothing until it was read (storage/sectors/doubts.py).

Which sectors are not as they should be stands under the key `u` + sector id; the value is empty where shards are missing, `MOVING` where
they are only not where they should be. Who is at a sector has marked it (`begin`, `at`): nobody else is then.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass

import trio

from storage.contractor import Contractor
from storage.errors import Busy, Fenced, FusefsError, Unavailable
from storage.host_io import HostIO
from storage.interfaces import Batch, MetadataStore
from storage.metadata.keys import SECTOR, UNDERREPLICATED, u64
from storage.pacing import Pace
from storage.seams import Seams
from storage.sectors.deleter import Deleter
from storage.sectors.doubts import Doubts
from storage.sectors.placement import Placement
from storage.sectors.plan import Plan, make_plan
from storage.sectors.records import SectorRecord, ShardRecord, decode_sector
from storage.sectors.regenerate import Regenerate
from storage.sectors.strays import Strays
from storage.standing import Standing

#: See the module.
MOVING = b"m"


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


class Mender:
    """See the module. One for a volume."""

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
        #: Sectors somebody is at.
        self._busy: set[int] = set()
        #: Who waits for one of them.
        self._waiting = trio.lowlevel.ParkingLot()
        #: Sectors whose first upload is still under way: nothing is missing there yet.
        self.uploading: Callable[[int], bool] = lambda _sector_id: False
        #: Hosts whose copy of a sector is known to be bad, and is being put right (sectors.damage).
        self.bad: Callable[[int], Set[int]] = lambda _sector_id: frozenset()
        #: Told in the batch that says a sector is at full replication.
        self.settled: Callable[[Batch, int], None] = lambda _batch, _sector_id: None
        #: Told when a copy was replaced: the sector may have too many now.
        self.on_replaced: Callable[[], None] = lambda: None

    def plan(self, sector_id: int, record: SectorRecord, keeping: frozenset[int]) -> Plan:
        """What is missing and too many with these hosts; a doubted place, or one whose copy is known to be bad, counts for nothing."""
        without = self._doubts.of(sector_id) | self.bad(sector_id)
        # A look asks this of every sector, and hosts may be a thousand: no copy of them all where there is nothing to take away.
        return make_plan(record, keeping - without if without else keeping, self._standing.domain)

    def takes(self, sector_id: int) -> bool:
        """May somebody begin at the sector now? Not while it is on its way to its hosts for the first time."""
        return sector_id not in self._busy and not self.uploading(sector_id)

    def begin(self, sector_id: int) -> None:
        """Somebody is at the sector until `end`, alone. No await between `takes`, or what else said that nobody is, and this."""
        self._busy.add(sector_id)

    def end(self, sector_id: int) -> None:
        """Nobody is at the sector any more."""
        self._busy.discard(sector_id)
        self._waiting.unpark_all()

    @contextmanager
    def at(self, sector_id: int) -> Iterator[None]:
        """`begin`, and `end` whatever happens."""
        self.begin(sector_id)
        try:
            yield
        finally:
            self.end(sector_id)

    def surplus(self, sector_id: int, root: bytes, host: int) -> bool:
        """For the sweep: is a shard of the sector on this host, where its record does not name it, one that nobody needs? No await.

        Not while something is missing or at the sector, whoever is at it: it may be what is being put, or what is left. Corrupt.
        """
        raw = self._store.get(SECTOR + u64(sector_id))
        record = decode_sector(raw, sector_id) if raw is not None else None
        shard = next((one for one in record.shards if one.root == root), None) if record is not None else None
        if record is None or shard is None or host in shard.hosts:
            return False
        if not self.takes(sector_id) or self._deleter.sparing(root, host):
            return False
        plan = self.plan(sector_id, record, self._standing.keeping())
        # Not on the word of a host that is away just now, though it still counts: this one may be all there is besides.
        return plan.done and all(map(self._standing.here, plan.hosts))

    async def mend(self, sector_id: int, keeping: frozenset[int]) -> None:
        """The sector is as it should be when it returns, or gone. Unavailable, Corrupt, NoSpace: it is as good as before, or better."""
        if (record := self.record(sector_id)) is not None:
            await self._doubts.look(sector_id, record)
        while (record := self.record(sector_id)) is not None:
            if await self.adopt(sector_id, record):
                record = self.record(sector_id)
                if record is None:
                    return
            plan = self.plan(sector_id, record, keeping)
            if not plan.missing:
                self.settle(sector_id, record, plan)
                return
            if self._doubts.forgetful():
                # A copy put there would count for nothing, until all of them are doubted one by one: it would be put again and again.
                raise Unavailable(f"sector {sector_id} waits until what a host has forgotten is on record")
            await self.add(sector_id, record, plan.missing[0], plan.hosts, keeping)

    async def adopt(self, sector_id: int, record: SectorRecord) -> bool:
        """Where the record names too few hosts, those that have its shards are put on record. False, without a checkpoint: it does not.
        Fenced, Corrupt."""
        if not self._strays.is_stray(record):
            return False
        located = await self._strays.locate(sector_id, record)
        for shard, known in zip(located.shards, record.shards, strict=True):
            for host in set(shard.hosts) - set(known.hosts):
                contract = self._contractor.contract_for(host)
                if contract is None:
                    continue
                with self._deleter.spared(shard.root, host):
                    await self._host_io.adopt(contract.contract_id, shard.root.hex())
                    self._landed(sector_id, shard, host)
        return True

    def record(self, sector_id: int) -> SectorRecord | None:
        """As it is now. None: it was freed; it is taken off the list of what is to be mended, too. Corrupt."""
        raw = self._store.get(SECTOR + u64(sector_id))
        if raw is None:
            # Freed meanwhile; its mark went with it, unless somebody put it there since.
            batch = Batch()
            batch.delete(UNDERREPLICATED + u64(sector_id))
            self._doubts.clear(batch, sector_id)
            self._store.apply(batch)
            return None
        return decode_sector(raw, sector_id)

    async def add(self, sector_id: int, record: SectorRecord, index: int, hosts: Collection[int], keeping: Collection[int]) -> None:
        """One shard to one more host, none of `hosts` and one of `keeping`, and onto the record. Unavailable: no other can take one,
        or does. Corrupt: it cannot be made again."""
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

    def settle(self, sector_id: int, record: SectorRecord, plan: Plan) -> None:
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

    async def replace(self, sector_id: int, root: bytes, bad: int) -> None:
        """A copy that cannot be put right where it is: another host gets one, and then the record forgets the one on host `bad`.

        Whether the sector has too many then is for the next round to see. Busy: it is on its way to its hosts for the first time.
        Unavailable: no other host takes it. Corrupt: it cannot be made again. The record still names it then: it never has fewer copies
        than before.
        """
        while sector_id in self._busy:
            await self._waiting.park()
        # No await from here to the mark: one at a time.
        record = self.record(sector_id)
        index = next((at for at, shard in enumerate(record.shards) if shard.root == root), None) if record is not None else None
        if record is None or index is None or bad not in record.shards[index].hosts:
            return
        if self.uploading(sector_id):
            raise Busy(f"sector {sector_id} is on its way to its hosts")
        with self.at(sector_id):
            taken = {host for shard in record.shards for host in shard.hosts}
            await self.add(sector_id, record, index, taken, self._standing.keeping() - {bad})
            self._forget(sector_id, root, bad)
        self.on_replaced()

    def _forget(self, sector_id: int, root: bytes, host: int) -> None:
        """Another host has the shard, durably and on record (I2). Never the last one. No await between reading and writing the record."""
        record = self.record(sector_id)
        shard = next((one for one in record.shards if one.root == root), None) if record is not None else None
        if record is None or shard is None or host not in shard.hosts or len(set(shard.hosts)) < 2:
            return
        shard.hosts = sorted(set(shard.hosts) - {host})
        batch = Batch()
        batch.put(SECTOR + u64(sector_id), record.encode())
        if host not in self._standing.lost():
            self._queue(batch, sector_id, record, [(shard, [host])])
        self._store.apply(batch)
