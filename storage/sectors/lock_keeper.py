"""LockKeeper: on hosts that lock what they hold (Object Lock), everything the volume needs is locked until its contract ends.

A put locks a sector that is likely to stay to the end of the contract, and everything else (partly filled sectors, which are soon merged,
log, superblocks) for `hosts.locking.SHORT_LOCK`: what is soon replaced is soon free to go. A *round* then extends what has stayed:

    publish -> note the superblocks each host has, and what they name -> every shard of every sector, freed ones that may still be needed
            included -> the metadata objects noted -> the superblocks themselves, last

so that from then on a whole history is locked until the contracts end, whatever happens to this machine. There is a round a day, one as
soon as a contract has been renewed, and one when the volume is closed. What was published since the last is locked for SHORT_LOCK.

The other half is `purge`: names we deleted still have their versions, and those go once their locks are over. Only what is certainly of
this history, and on no record, goes (I3, I5): hostile credentials delete names as well.

| key | value, nanoseconds |
|---|---|
| `w` + `lock.` + host number in decimal digits | u64 end of the contract that everything was locked to, u64 when that round began |
| `L` + `purged.` + host number in decimal digits | u64 when a purge ended |
"""

from __future__ import annotations

import logging
import struct
from collections.abc import AsyncIterator

import trio

from storage.contractor import Contractor
from storage.epochs import Epochs
from storage.errors import Corrupt, Fenced, FusefsError, NotFound, Unavailable
from storage.history.ancestry import Lineage, point_of
from storage.history.objects import metadata_prefix, object_name, writer_of
from storage.history.publisher import Publisher
from storage.history.superblock import parse_superblock, superblock_level, superblock_number
from storage.hosts.holders import decode_holders, holders_key
from storage.hosts.layout import HOST_FILE, check_root, contract_name, root_in, sectors_prefix, shard_name, superblock_name
from storage.hosts.locking import SHORT_LOCK, locking
from storage.hosts.registry import HostRegistry
from storage.interfaces import Batch, LockingHost, MetadataStore, StoredVersion
from storage.metadata.keys import FREED, LOCAL, SECTOR, SETTING, prefix_end, read_u64
from storage.nurseries import plain_nursery
from storage.sealing import HEADER_SIZE, ShardHeader
from storage.seams import Seams
from storage.sectors.records import SectorRecord, decode_sector
from storage.wording import counted

log = logging.getLogger("fusefs.locks")

#: Seconds between two rounds, between two looks whether one is due, and from the opening to the first look.
ROUND_SECONDS = 86400.0
LOOK_SECONDS = 900.0
FIRST_LOOK = 60.0
#: Seconds between two purges of a host.
PURGE_SECONDS = 7 * 86400.0
#: A lock that ends at most this many seconds before the contract is left as it is: less than a round that comes later extends anyway.
SLACK = 3600.0
#: Extensions on one host at a time.
WORKERS = 8
#: Records looked at between two checkpoints.
SLICE = 200
#: Seconds any question to a host may take.
TIMEOUT = 60.0

_ROUND = struct.Struct(">QQ")


class LockKeeper:
    """See the module. `run` once, in the volume's nursery; `round` also when the volume is closed."""

    def __init__(
        self,
        *,
        volume_id: bytes,
        store: MetadataStore,
        registry: HostRegistry,
        contractor: Contractor,
        publisher: Publisher,
        epochs: Epochs,
        seams: Seams,
    ) -> None:
        self._volume_id = volume_id
        self._store, self._registry, self._contractor = store, registry, contractor
        self._publisher, self._epochs, self._seams = publisher, epochs, seams
        self._lock = trio.Lock()
        #: Why the last round on a host did not get through: number -> a sentence.
        self.troubles: dict[int, str] = {}

    def hosts(self) -> dict[int, LockingHost]:
        """Those that can be used now and lock what they hold."""
        found: dict[int, LockingHost] = {}
        for number in self._registry.numbers():
            if self._registry.available(number):
                locked = locking(self._registry.get(number))
                if locked is not None:
                    found[number] = locked
        return found

    def due(self, number: int) -> bool:
        """Is a round due on the host: a day is over, or its contract goes on for longer than what is locked?"""
        ended, began = self._last(number)
        return self._seams.clock.time_ns() - began >= ROUND_SECONDS * 1e9 or self._wanted(number) > ended + round(SLACK * 1e9)

    def behind(self) -> bool:
        """Has something been published since the last round on some host?"""
        return any(self._publisher.published_ns > self._last(number)[1] for number in self.hosts())

    def _last(self, number: int) -> tuple[int, int]:
        raw = self._store.get(_round_key(number))
        if raw is None or len(raw) != _ROUND.size:
            return 0, 0
        ended, began = _ROUND.unpack(raw)
        return int(ended), int(began)

    def _wanted(self, number: int) -> int:
        """Until when what the host holds is to be locked, nanoseconds; 0 without a contract."""
        contract = self._contractor.contract_for(number)
        return contract.end_ns if contract is not None else 0

    # ----------------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled, or the volume can be written no more."""
        pause = FIRST_LOOK
        while True:
            await self._seams.clock.sleep(pause)
            pause = LOOK_SECONDS
            try:
                if any(self.due(number) for number in self.hosts()):
                    await self.round()
                await self.purge_due()
            except Fenced as error:
                log.info("locks are extended no more: %s", error)
                return
            except FusefsError as error:
                log.warning("extending locks is postponed: %s", error)

    async def round(self) -> None:
        """Everything the volume needs now is locked until its contracts end when it returns, on the hosts that could be asked; `troubles`
        says which could not. Fenced, Unavailable: nothing could be published."""
        hosts = self.hosts()
        if not hosts:
            return
        async with self._lock:
            await self._publisher.publish()
            async with plain_nursery() as nursery:
                for number, host in hosts.items():
                    nursery.start_soon(self._round_on, number, host)

    async def _round_on(self, number: int, host: LockingHost) -> None:
        began, until = self._seams.clock.time_ns(), self._wanted(number)
        if until <= began:
            # Without a contract in force nothing is promised; `status` says so.
            return
        try:
            names = self._history_names(number)
            work = [(name, "") for name in (HOST_FILE, *self._contract_names(number))]
            count = await self._extend_shards(number, host, until)
            # Last, what makes a history of it: objects, then the superblocks (I4's order).
            for name, version in [*work, *((name, "") for name in names)]:
                await self._extend(host, name, version, until)
        except Fenced:
            raise
        except FusefsError as error:
            if self.troubles.get(number) != str(error):
                log.warning("host %s: locks could not be extended: %s", host.url, error)
            self.troubles[number] = str(error)
            return
        self.troubles.pop(number, None)
        batch = Batch()
        batch.put(_round_key(number), _ROUND.pack(until, began))
        self._store.apply(batch)
        others = counted(len(names) + len(work), "other object")
        log.info("host %s: locked until the contract ends: %s and %s", host.url, counted(count, "shard"), others)

    def _history_names(self, number: int) -> list[str]:
        """What the host's superblocks of this history name, then these; nothing where that is not known of each."""
        side = next((side for side in self._publisher.fleet.sides() if side.number == number), None)
        if side is None or not side.examined:
            return []
        ours = [kept for kept in side.kept if kept.ours]
        if any(kept.names is None for kept in ours):
            return []
        objects = {name for kept in ours for name in kept.names or ()}
        superblocks = [superblock_name(self._volume_id, kept.slot) for kept in ours]
        return [*(object_name(self._volume_id, name) for name in sorted(objects)), *superblocks]

    def _contract_names(self, number: int) -> list[str]:
        contract = self._contractor.contract_for(number)
        return [contract_name(self._volume_id, contract.contract_id)] if contract is not None else []

    # ----------------------------------------------------------------------------------------------------------------
    # Shards

    async def _extend_shards(self, number: int, host: LockingHost, until: int) -> int:
        """Every shard on the host that a sector, live or freed, names. Returns how many were extended."""
        extended = 0
        # One error ends the round on this host; what was extended until then is on record.
        errors: list[FusefsError] = []
        slots = trio.CapacityLimiter(WORKERS)

        async def one(root: bytes, slot: object) -> None:
            nonlocal extended
            try:
                extended += await self._extend_shard(number, host, root, until)
            except NotFound:
                # Gone meanwhile, or lost: scrub's business.
                return
            except FusefsError as error:
                errors.append(error)
            finally:
                slots.release_on_behalf_of(slot)

        async with plain_nursery() as nursery:
            async for record in self._records():
                for shard in record.shards:
                    if number in shard.hosts and self._short(shard.root, number, until) and not errors:
                        # Not of the root: a live record and a freed one can both name it.
                        slot = object()
                        await slots.acquire_on_behalf_of(slot)
                        nursery.start_soon(one, shard.root, slot)
                if errors:
                    break
        if errors:
            raise errors[0]
        return extended

    def _short(self, root: bytes, number: int, until: int) -> bool:
        holders = decode_holders(self._store.get(holders_key(root, number)), root)
        return holders.locked_ns + round(SLACK * 1e9) < until

    async def _extend_shard(self, number: int, host: LockingHost, root: bytes, until: int) -> int:
        key = holders_key(root, number)
        recorded = decode_holders(self._store.get(key), root).stored_version
        version = await self._extend(host, shard_name(self._volume_id, root.hex()), recorded, until)
        raw = self._store.get(key)
        if raw is None:
            return 0
        # No await since it was read: whoever changed the record meanwhile is not undone.
        holders = decode_holders(raw, root)
        holders.stored_version, holders.locked_ns = version, until
        batch = Batch()
        batch.put(key, holders.encode())
        self._store.apply(batch)
        return 1

    async def _extend(self, host: LockingHost, name: str, version: str, until: int) -> str:
        """Returns the version, found out where it is not on record. NotFound, NotPermitted, Unavailable."""
        with trio.move_on_after(TIMEOUT):
            return await host.extend(name, version, until)
        raise Unavailable(f"host {host.url} did not answer within {TIMEOUT:.0f} s")

    async def _records(self) -> AsyncIterator[SectorRecord]:
        """Of every sector, and of every freed one that is not deleted yet."""
        for prefix, at in ((SECTOR, 1), (FREED, 9)):
            start = prefix
            while found := self._store.scan(start, prefix_end(prefix), SLICE):
                for key, raw in found:
                    try:
                        yield decode_sector(raw, read_u64(key, at))
                    except Corrupt as error:
                        log.error("%s", error)
                start = found[-1][0] + b"\0"
                await trio.lowlevel.checkpoint()

    # ----------------------------------------------------------------------------------------------------------------
    # Purging

    async def purge_due(self) -> None:
        """Every host that was not purged for `PURGE_SECONDS`. Fenced; of others the first error, once each host had its turn."""
        now, errors = self._seams.clock.time_ns(), list[FusefsError]()
        for number, host in self.hosts().items():
            raw = self._store.get(_purged_key(number))
            last = read_u64(raw) if raw is not None and len(raw) == 8 else 0
            if now - last >= PURGE_SECONDS * 1e9:
                try:
                    await self.purge(number, host)
                except Fenced:
                    raise
                except FusefsError as error:
                    errors.append(error)
                    continue
                batch = Batch()
                batch.put(_purged_key(number), now.to_bytes(8, "big"))
                self._store.apply(batch)
        if errors:
            raise errors[0]

    async def purge(self, number: int, host: LockingHost) -> int:
        """Versions of what we deleted on the host go, where their locks are over. Returns how many names are gone for good."""
        # I5: what is deleted is this history's own, and this history is the one the host has.
        if not await self._publisher.confirm(number):
            return 0
        lineage, needed = self._publisher.lineage(), set(self._history_names(number))
        before = self._seams.clock.time_ns() - round(SHORT_LOCK * 1e9)
        gone = 0
        async for stored in self._hidden(host):
            # Younger ones are locked still, or may be on their way.
            if stored.stored_ns < before and await self._unneeded(number, host, stored, lineage, needed) and await host.purge(stored.name):
                gone += 1
        if gone:
            log.info("host %s: gone for good, now that the locks are over: %s", host.url, counted(gone, "deleted object"))
        return gone

    async def _hidden(self, host: LockingHost) -> AsyncIterator[StoredVersion]:
        prefix = superblock_level(self._volume_id)
        for start in (sectors_prefix(self._volume_id), metadata_prefix(self._volume_id), prefix + "superblock."):
            async for stored in host.hidden(start):
                yield stored

    async def _unneeded(self, number: int, host: LockingHost, stored: StoredVersion, lineage: Lineage, needed: set[str]) -> bool:
        """Is it certainly ours, on no record and not among the `needed`? What cannot be told is not."""
        if not needed or stored.name in needed:
            return False
        last = stored.name.rsplit("/", 1)[-1]
        try:
            if stored.name.startswith(sectors_prefix(self._volume_id)):
                root = root_in(stored.name)
                if root is None or self._store.get(holders_key(check_root(root), number)) is not None:
                    return False
                raw = await host.get_version(stored.name, stored.version, 0, HEADER_SIZE)
                header = ShardHeader.parse(raw)
                return header.volume_id == self._volume_id and lineage.has_epoch(header.epoch, header.salt.hex())
            if object_name(self._volume_id, last) == stored.name:
                writer = writer_of(last)
                return writer is not None and lineage.has_epoch(*writer)
            if superblock_number(last) is None:
                return False
            raw = await host.get_version(stored.name, stored.version, 0, stored.size)
            return lineage.contains(point_of(parse_superblock(raw, stored.name)))
        except (Corrupt, NotFound) as error:
            log.info("%s", error)
            return False


def _round_key(number: int) -> bytes:
    return SETTING + b"lock.%d" % number


def _purged_key(number: int) -> bytes:
    return LOCAL + b"purged.%d" % number
