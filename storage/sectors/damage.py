"""Damage: what hosts have lost or spoiled of sectors, how it is noticed, and how it is put right.

A *copy* is a shard on one host (also where shards are coded: then each has one). A copy is *bad* if it is missing or does not verify, and
a second look at the whole of it says so too. A host that is away has no bad copies: nothing is known of it.

    suspicion                      second look     list, durable       mended
    scrub: a block or all of it    the whole       with the next       the shard is made again, under the root it has (I1), put in place of
    a read that met it         --> shard, and -->  commit here     --> the bad one, and read back; else put on another host: then the record
    reconcile, copying from it     its root                            names that one, and forgets this one, in this order (I2, I3)

While a copy is put right in its place its record does not change, so that a crash at any point costs nothing but the work: the list still
has it. A record never loses a copy before another has taken its place, and never the last one, whatever hosts answer. A host whose copies
turn bad again as they are put right (`trust`) is left alone, but for one copy at a time and with a pause: it does not keep a scrub from
the others, nor is a volume moved in an hour because a cable is loose.

The list, of this directory alone (`L`), has the key "bad." + sector id u64 + number of the shard u16 + host number u32, and a MessagePack
array as value:

| # | field | type | meaning |
|---|---|---|---|
| 0 | version | uint | 1 |
| 1 | missing | bool | there is nothing; else what is there does not verify |
| 2 | found | uint | when, nanoseconds since the Unix epoch |
"""

from __future__ import annotations

import enum
import logging
import struct
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated

import msgspec
import trio

from storage.contractor import Contractor
from storage.errors import Corrupt, Expired, Fenced, FusefsError, NoSpace, NotFound, Unavailable
from storage.host_io import LOOKED, HostIO
from storage.hosts.hostdb import HostDB
from storage.hosts.registry import HostRegistry
from storage.interfaces import Batch, MetadataStore, SealedShard
from storage.metadata.keys import LOCAL, SECTOR, prefix_end, u64
from storage.pacing import Pace
from storage.sealing import block_count, sealed_length
from storage.seams import Seams
from storage.sectors.deleter import Deleter
from storage.sectors.notes import Notes
from storage.sectors.records import SectorRecord, ShardRecord, decode_sector
from storage.sectors.regenerate import Regenerate
from storage.sectors.trust import Trust

log = logging.getLogger("fusefs.scrub")

VERSION = 1
BAD = LOCAL + b"bad."

#: Seconds before a second look.
SECOND_LOOK = 0.1
#: Copies on the list at most, and suspicions not looked into yet (I7): what is beyond is found by the next pass.
MAX_LISTED = 100_000
MAX_SUSPECTS = 1_000
#: Seconds between two looks at the list; until a copy that could not be mended is tried again, doubling to the last.
INTERVAL = 15.0
RETRY_FIRST, RETRY_LAST = 15.0, 900.0

_KEY = struct.Struct(">QHI")
_KEY_LENGTH = len(BAD) + _KEY.size


class BadRecord(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """See the table above."""

    version: int
    missing: bool
    found_ns: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


@dataclass(frozen=True, slots=True)
class Copy:
    """Shard `number` of a sector on a host."""

    sector_id: int
    number: int
    host: int

    @property
    def key(self) -> bytes:
        """On the list."""
        return BAD + _KEY.pack(self.sector_id, self.number, self.host)

    @staticmethod
    def of_key(key: bytes) -> Copy:
        """Corrupt if it is no key of the list."""
        try:
            return Copy(*_KEY.unpack(key[len(BAD) :]))
        except struct.error:
            raise Corrupt(f"metadata: {key[:24].hex()} is no key of a bad copy") from None


class Found(enum.Enum):
    """What a look at a copy came to."""

    GOOD = "good"
    #: The record does not name it any more.
    GONE = "gone"
    #: Its host does not answer.
    UNANSWERED = "unanswered"
    MISSING = "missing"
    DAMAGED = "damaged"


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of `Damages.examine`."""

    found: Found
    #: Bytes asked for.
    size: int = 0
    #: Of a bad copy: it is good now, or the record has another in its place. Else why not.
    mended: bool = False
    trouble: str = ""
    #: No good copy of it can be had or made.
    lost: bool = False


@dataclass(slots=True)
class DamageStatus:
    """For `status`, since the volume was opened."""

    found: int = 0
    mended: int = 0
    #: Bytes put on hosts for it.
    bytes: int = 0
    #: Why the last one could not be mended; "" since one was.
    trouble: str = ""
    #: Sectors some shard of which cannot be had or made from what hosts hold.
    lost: set[int] = field(default_factory=set)


#: (sector id, root, host): another host gets the copy, then the record forgets this one. See `Mender.replace`.
Replace = Callable[[int, bytes, int], Awaitable[None]]
Watcher = Callable[[Copy, Outcome], None]


class Damages:
    """See the module. `run` once, in the volume's nursery; `suspect` from anywhere."""

    def __init__(
        self,
        *,
        store: MetadataStore,
        host_io: HostIO,
        contractor: Contractor,
        registry: HostRegistry,
        hostdb: HostDB,
        deleter: Deleter,
        regenerate: Regenerate,
        replace: Replace,
        pace: Pace,
        notes: Notes,
        seams: Seams,
        interval: float,
    ) -> None:
        """`pace`: of what is sent to hosts. `notes`: what was survived lately, for `status`; what has been put right goes from there.
        `interval`: seconds in which the scrub looks at every copy, or would."""
        self._store = store
        self._host_io = host_io
        self._contractor = contractor
        self._registry = registry
        self._hostdb = hostdb
        self._deleter = deleter
        self._regenerate = regenerate
        self._replace = replace
        self._pace = pace
        self._notes = notes
        self._seams = seams
        self.status = DamageStatus()
        #: Bad copies that are known and not put right yet: those on the list.
        self.listed = len(store.scan(BAD, prefix_end(BAD), MAX_LISTED))
        #: Told of each copy that is found bad, by whoever it is found, and of each that was and is mended later (found GOOD, then).
        self.watchers: list[Watcher] = []
        self._wake = trio.Event()
        #: (sector id, root, host), oldest first.
        self._suspects: OrderedDict[tuple[int, bytes, int], None] = OrderedDict()
        #: Copy -> (monotonic time of the next attempt, seconds waited last).
        self._later: dict[Copy, tuple[float, float]] = {}
        #: One at a time per sector; an entry lives as long as somebody wants it.
        self._locks: dict[int, tuple[trio.Lock, int]] = {}
        self._trust = Trust(seams, interval)

    # ------------------------------------------------------------------------------------------------------------
    # Telling

    def suspect(self, sector_id: int, root: bytes, host: int) -> None:
        """Somebody was given something else than this shard by this host. Looked into in the background. No await, never fails."""
        if len(self._suspects) < MAX_SUSPECTS:
            self._suspects[sector_id, root, host] = None
            self._wake.set()

    def hosts(self, sector_id: int) -> set[int]:
        """Hosts whose copy of the sector is on the list."""
        if not self.listed:
            return set()
        start = BAD + u64(sector_id)
        return {Copy.of_key(key).host for key, _ in self._store.scan(start, prefix_end(start), 2000) if len(key) == _KEY_LENGTH}

    def sectors(self) -> set[int]:
        """Some of those that copies are known to be bad of, or may be: those that cannot be made good, where there are such."""
        if self.status.lost:
            return set(self.status.lost)
        listed = {Copy.of_key(key).sector_id for key, _ in self._store.scan(BAD, prefix_end(BAD), MAX_SUSPECTS) if len(key) == _KEY_LENGTH}
        return listed | {sector_id for sector_id, _, _ in self._suspects}

    def failing(self, host: int) -> str:
        """See `Trust.failing`."""
        return self._trust.failing(host)

    # ------------------------------------------------------------------------------------------------------------
    # Looking

    async def examine(self, copy: Copy, record: SectorRecord, *, whole: bool) -> Outcome:
        """Look at a copy that `record` names: some blocks of it, at random, and its end, or the whole of it; what is bad is mended if that
        can be done now.

        Never raises for what a host does; Fenced.
        """
        shard = record.shards[copy.number]
        try:
            size = await self._look(copy, shard, whole=whole)
        except (NotFound, Corrupt):
            return await self._confirm(copy, shard)
        except Fenced:
            raise
        except FusefsError as error:
            return Outcome(Found.UNANSWERED, trouble=str(error))
        self._trust.looked(copy.host, bad=False)
        return Outcome(Found.GOOD, size)

    async def _look(self, copy: Copy, shard: ShardRecord, *, whole: bool) -> int:
        """The bytes that were asked for, and verify. NotFound, Corrupt, Unavailable."""
        contract = self._contractor.contract_for(copy.host)
        if contract is None:
            raise Unavailable(f"there is no contract with host {self._registry.url(copy.host)}")
        root = shard.root.hex()
        # Where no range can be asked for, some blocks cost as much as all of it.
        if whole or not self._registry.get(copy.host).capabilities.ranges:
            await self._host_io.read_sealed(contract.contract_id, root, shard.shard_id, shard.length, named=True)
            return sealed_length(shard.length)
        places = -(-block_count(shard.length) // LOOKED)
        block = int.from_bytes(self._seams.random.token_bytes(4), "big") % places * LOOKED
        return await self._host_io.probe(contract.contract_id, root, shard.shard_id, shard.length, block)

    async def _confirm(self, copy: Copy, shard: ShardRecord) -> Outcome:
        """A second look, at the whole of it: bytes can also be spoiled on their way. If it is bad: onto the list, and mended."""
        async with self._alone(copy.sector_id):
            outcome = await self._confirm_alone(copy, shard)
        if outcome.found in (Found.MISSING, Found.DAMAGED):
            self._tell(copy, outcome)
        return outcome

    async def _confirm_alone(self, copy: Copy, shard: ShardRecord) -> Outcome:
        await self._seams.clock.sleep(SECOND_LOOK)
        size = sealed_length(shard.length)
        try:
            await self._look(copy, shard, whole=True)
        except NotFound as error:
            found, why = Found.MISSING, str(error)
        except Corrupt as error:
            found, why = Found.DAMAGED, str(error)
        except Fenced:
            raise
        except FusefsError as error:
            return Outcome(Found.UNANSWERED, size, trouble=str(error))
        else:
            self._trust.looked(copy.host, bad=False)
            return Outcome(Found.GOOD, size)
        # No await from here to the list: deletions begin with the record.
        if self._named(copy, shard.root) is None:
            return Outcome(Found.GONE, size)
        self._trust.looked(copy.host, bad=True)
        log.warning("%s", why)
        if not self._list(copy, missing=found is Found.MISSING):
            return Outcome(found, size, trouble=f"{MAX_LISTED:,} other copies are bad, and have their turn first")
        if self._trust.stubborn(copy.host):
            return Outcome(found, size, trouble=f"host {self._registry.url(copy.host)}: {self.failing(copy.host)}")
        try:
            await self._mend(copy)
        except Fenced:
            raise
        except FusefsError as error:
            self._failed(copy, error)
            return Outcome(found, size, trouble=str(error), lost=isinstance(error, Corrupt))
        return Outcome(found, size, mended=True)

    def _tell(self, copy: Copy, outcome: Outcome) -> None:
        for watcher in list(self.watchers):
            watcher(copy, outcome)

    def _named(self, copy: Copy, root: bytes | None = None) -> SectorRecord | None:
        """The sector's record, if it names the copy (and `root` is the shard's)."""
        raw = self._store.get(SECTOR + u64(copy.sector_id))
        if raw is None:
            return None
        record = decode_sector(raw, copy.sector_id)
        if copy.number >= len(record.shards) or copy.host not in record.shards[copy.number].hosts:
            return None
        return record if root is None or record.shards[copy.number].root == root else None

    def _list(self, copy: Copy, *, missing: bool) -> bool:
        """False: the list is full."""
        if self._store.get(copy.key) is None:
            if self.listed >= MAX_LISTED:
                return False
            batch = Batch()
            batch.put(copy.key, msgspec.msgpack.encode(BadRecord(VERSION, missing, self._seams.clock.time_ns())))
            self._store.apply(batch)
            self.listed += 1
            self.status.found += 1
        return True

    def _unlist(self, copy: Copy) -> None:
        self._later.pop(copy, None)
        if self._store.get(copy.key) is not None:
            batch = Batch()
            batch.delete(copy.key)
            self._store.apply(batch)
            self.listed -= 1

    @asynccontextmanager
    async def _alone(self, sector_id: int) -> AsyncIterator[None]:
        """One copy of a sector at a time: who comes second finds it mended."""
        lock, users = self._locks.get(sector_id, (trio.Lock(), 0))
        self._locks[sector_id] = (lock, users + 1)
        try:
            async with lock:
                yield
        finally:
            lock, users = self._locks[sector_id]
            if users == 1:
                del self._locks[sector_id]
            else:
                self._locks[sector_id] = (lock, users - 1)

    # ------------------------------------------------------------------------------------------------------------
    # Mending

    async def run(self) -> None:
        """Until cancelled, or the volume can be written no more."""
        while True:
            self._wake = trio.Event()
            try:
                await self._look_into()
                await self.mend_listed()
            except Fenced as error:
                log.info("mending of copies ends: %s", error)
                return
            except FusefsError as error:
                log.warning("mending of copies is postponed: %s", error)
                self.status.trouble = str(error)
            with trio.move_on_after(INTERVAL):
                await self._wake.wait()

    async def _look_into(self) -> None:
        """What somebody was suspicious of."""
        while self._suspects:
            (sector_id, root, host), _ = self._suspects.popitem(last=False)
            raw = self._store.get(SECTOR + u64(sector_id))
            record = decode_sector(raw, sector_id) if raw is not None else None
            for number, shard in enumerate(record.shards if record is not None else ()):
                copy = Copy(sector_id, number, host)
                # One that is on the list has its turn there: mending it makes it suspicious again.
                if shard.root == root and host in shard.hosts and self._store.get(copy.key) is None:
                    await self._confirm(copy, shard)

    async def mend_listed(self, *, now: bool = False) -> None:
        """Every copy on the list whose host answers, one after the other, unless it failed lately; with `now` also then. Of a stubborn host
        one at most, and with `now` none. Fenced."""
        if now:
            self._later.clear()
        start = BAD
        while found := self._store.scan(start, prefix_end(BAD), 100):
            for key, _ in found:
                try:
                    copy = Copy.of_key(key)
                    waits = self._named(copy) is not None and not self._has_its_turn(copy, now)
                except Corrupt as error:
                    # A damaged record, of this or of its sector: the others go on.
                    log.error("%s", error)
                    continue
                if waits:
                    continue
                async with self._alone(copy.sector_id):
                    if self._store.get(key) is None:
                        continue
                    try:
                        await self._mend(copy)
                    except Fenced:
                        raise
                    except FusefsError as error:
                        self._failed(copy, error)
                        continue
                self._tell(copy, Outcome(Found.GOOD, mended=True))
            start = found[-1][0] + b"\0"
            await trio.lowlevel.checkpoint()

    def _has_its_turn(self, copy: Copy, now: bool) -> bool:
        clock = self._seams.clock.monotonic()
        if self._later.get(copy, (0.0, 0.0))[0] > clock or not self._registry.available(copy.host):
            return False
        return not (now and self._trust.stubborn(copy.host)) and self._trust.takes_turn(copy.host)

    def _failed(self, copy: Copy, error: FusefsError) -> None:
        if self.status.trouble != str(error):
            log.warning("the copy of sector %d on host %s stays as it is for now: %s", copy.sector_id, self._registry.url(copy.host), error)
        self.status.trouble = str(error)
        if isinstance(error, Corrupt) and len(self.status.lost) < MAX_LISTED:
            self.status.lost.add(copy.sector_id)
        if len(self._later) < MAX_LISTED:
            wait = min(2 * self._later.get(copy, (0.0, RETRY_FIRST / 2))[1], RETRY_LAST)
            self._later[copy] = (self._seams.clock.monotonic() + wait, wait)

    async def _mend(self, copy: Copy) -> None:
        """It is off the list when this returns. Corrupt: no good copy can be had or made. Unavailable and others: later."""
        record = self._named(copy)
        if record is not None:
            sealed = await self._regenerate(copy.sector_id, record, copy.number)
            try:
                await self._rewrite(copy, sealed)
            except (Corrupt, NotFound, NoSpace, Expired) as error:
                # It does not take it, or does not keep it.
                log.info("%s: another host is to have it", error)
                await self._replace(copy.sector_id, record.shards[copy.number].root, copy.host)
            self.status.mended += 1
            self.status.bytes += len(memoryview(sealed.sealed))
        self._unlist(copy)
        self.status.trouble = ""
        self.status.lost.discard(copy.sector_id)
        self._notes.settle(copy.sector_id, copy.host)

    async def _rewrite(self, copy: Copy, sealed: SealedShard) -> None:
        """The same sealed bytes in place of what is there, read back. The record names the copy all the time."""
        contract = self._contractor.contract_for(copy.host)
        if contract is None:
            raise Expired(f"there is no contract with host {self._registry.url(copy.host)}")
        root = bytes.fromhex(sealed.root)
        await self._pace.take(len(memoryview(sealed.sealed)))
        # If the sector is freed meanwhile, or moved away from there, the deletion comes after what is put here.
        with self._deleter.spared(root, copy.host):
            await self._host_io.write_sealed(contract.contract_id, sealed)
            self._seams.failpoints.hit("damage.after_put")
            # No await between these: the record is looked at and the deletion queued in one step.
            if self._named(copy, root) is None:
                gone = ShardRecord(sealed.sector_id, sealed.plaintext_length, root, [copy.host])
                batch = Batch()
                self._deleter.enqueue(batch, copy.sector_id, SectorRecord(1, "1", 0, 0, 0, [gone]))
                self._store.apply(batch)
                return
        try:
            await self._host_io.read_sealed(contract.contract_id, sealed.root, sealed.sector_id, sealed.plaintext_length, named=True)
        except (Corrupt, NotFound) as error:
            self._trust.relapsed(copy.host)
            # Nothing new should go there either.
            self._hostdb.failed(copy.host, error, ("read", "write"))
            raise
        self._trust.kept(copy.host)
