"""Staging: sealed shards on the local disk, on their way to hosts that are far or away, and a read cache afterwards.

`staging/` in the volume's directory is an ordinary directory host with a contract of its own, and only sealed bytes ever stand there. It is
none of the volume's hosts: no record that goes to the hosts names it, so another machine that gets the volume back never looks for it, and
it counts for no replication. What is in it is found by root.

    sealed --take--> files durable --enter (record names no host; `u`; `L` staged.)--> drain --write quorum--> record names its hosts
                                                        read by root, before any host is asked
    full replication: the mark goes with the record --commit durable--> cached: dropped, least recently used first, where room is needed

| key | value | meaning |
|---|---|---|
| `L` + "staged." + sector id u64 | empty | below full replication, and its shards stand in staging |

What a *cut* of the history waits for here, see `cuts`.

Invariants kept here: I2 (`take` returns when the shards are durable), I3 (a shard is dropped only once full replication is durably on
record), I7 (a limit, and a reserve of the disk that is never used).

| a crash ... | leaves | and then |
|---|---|---|
| before the landing is durable | files nobody knows | they count as cached, and are the first to be dropped |
| after it | the mark | the drain goes on |
| before full replication is durable | the mark, and the files | as before; hosts that have a shard already take it once more |
| before a file is dropped | the file | it is cached |
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio
from sortedcontainers import SortedDict

from storage.errors import Corrupt, Fenced, FusefsError, NotFound
from storage.host_io import HostIO
from storage.hosts.directory import DirectoryHost
from storage.hosts.identity import claim_identity
from storage.hosts.layout import (
    CONTRACT_FORMAT,
    CONTRACT_VERSION,
    ContractFile,
    check_root,
    contract_name,
    encode_json,
    sectors_prefix,
    shard_name,
)
from storage.interfaces import Batch, MetadataStore, SealedShard
from storage.metadata.keys import LOCAL, SECTOR, prefix_end, read_u64, u64
from storage.sealing import MAX_SEALED, block_range, sealed_length
from storage.seams import Seams
from storage.sectors.cuts import Cut, Staged
from storage.sectors.records import SectorRecord, ShardRecord, decode_sector
from storage.sectors.redundancy import layout_of

log = logging.getLogger("fusefs.staging")

DIRECTORY = "staging"
STAGED = LOCAL + b"staged."
#: The disk keeps this much free, or a twentieth of it if that is less: the journal and the metadata stand on it too.
RESERVE = 1024 * 1024 * 1024
#: Marks looked at in one go.
SLICE = 500
#: Seconds between two looks at what can be dropped.
TIDY_SECONDS = 5.0


@dataclass(slots=True)
class _File:
    size: int
    #: Some sector that is below full replication needs it; or it is not known to be durable yet that none does.
    needed: bool = True


class Staging:
    """See the module. `open` first; `run` in the volume's nursery. What is not async is atomic."""

    def __init__(
        self, directory: Path, volume_id: bytes, store: MetadataStore, host_io: HostIO, seams: Seams, *, limit: int, writable: bool = True
    ) -> None:
        """`limit`: bytes of files at most; 0: nothing is taken, what is there still goes to hosts."""
        self.path = directory / DIRECTORY
        self._volume_id, self._store, self._host_io, self._seams = volume_id, store, host_io, seams
        self.limit, self._writable = limit, writable
        self._host: DirectoryHost | None = None
        #: Least recently used first.
        self._files: OrderedDict[bytes, _File] = OrderedDict()
        #: Invariant: the sizes of `_files` together.
        self.size = 0
        self._sectors: dict[int, Staged] = {}
        #: Those below write quorum, by rank.
        self.below: SortedDict = SortedDict()
        self.cut = Cut(self.path)
        #: Roots that nobody needs once everything applied so far is durable: False, to be kept as cache; True, to be removed.
        self._settling: dict[bytes, bool] = {}
        #: One decision on room at a time.
        self._room = trio.Lock()
        #: Sectors that are gone from here before they were on any host, and what to say of them.
        self.losses: dict[int, str] = {}
        #: What the disk said last; "" since it took something.
        self.trouble = ""
        #: Told when there is something new to send.
        self.on_staged: Callable[[], None] = lambda: None

    async def open(self) -> list[str]:
        """Look what is there. Returns what is wrong: sectors that should be here and are not. Blocks nothing."""
        try:
            if self._writable and self.limit and self._host is None:
                self._host = await self._create()
            elif self.path.is_dir():
                self._host = await DirectoryHost.open(str(self.path), self._seams)
            if self._host is not None:
                await self._list(self._host)
        except FusefsError as error:
            self.trouble = f"staging cannot be used: {error}"
            log.error("%s", self.trouble)
        return self._load()

    async def _create(self) -> DirectoryHost:
        host = await DirectoryHost.open(str(self.path), self._seams, create=True)
        identity = await claim_identity(host, self._seams)
        await self._sign(host, identity.id)
        return host

    async def _sign(self, host: DirectoryHost, host_id: str) -> None:
        """A contract without an end, for tools that look at hosts: nobody reclaims what is here. Its id is the host's."""
        name = contract_name(self._volume_id, host_id)
        if await host.tag(name) is None:
            now = self._seams.clock.time_ns()
            file = ContractFile(
                format=CONTRACT_FORMAT,
                format_version=CONTRACT_VERSION,
                contract=host_id,
                volume=self._volume_id.hex(),
                host=host_id,
                start_ns=now,
                end_ns=2**63 - 1,
                lineage=host_id,
                renewed_from=None,
            )
            await host.put(name, encode_json(file))

    async def _list(self, host: DirectoryHost) -> None:
        prefix = sectors_prefix(self._volume_id)
        found: list[tuple[bytes, int]] = []
        async for name, size in host.list(prefix):
            text = name.rpartition("/")[2]
            if len(text) == 64 and name == shard_name(self._volume_id, text):
                found.append((check_root(text), size))
        # Nothing is known of what was read: the oldest files go first.
        for root, size in await self._seams.threads.run(self._by_age, found):
            self._files[root] = _File(size, needed=False)
            self.size += size

    def _by_age(self, found: list[tuple[bytes, int]]) -> list[tuple[bytes, int]]:
        """(root, size), the oldest file first. Blocking, briefly."""

        def age(file: tuple[bytes, int]) -> int:
            try:
                return (self.path / shard_name(self._volume_id, file[0].hex())).stat().st_mtime_ns
            except OSError:
                return 0

        return sorted(found, key=age)

    def _load(self) -> list[str]:
        lost: list[int] = []
        start = STAGED
        while found := self._store.scan(start, prefix_end(STAGED), SLICE):
            for key, _ in found:
                try:
                    sector_id = read_u64(key, len(STAGED))
                    raw = self._store.get(SECTOR + u64(sector_id))
                    record = decode_sector(raw, sector_id) if raw is not None else None
                except Corrupt as error:
                    log.error("%s", error)
                    continue
                if record is None:
                    continue
                entry = self._know(sector_id, record)
                if not entry.reached and not self.is_whole(entry):
                    lost.append(sector_id)
                for shard in record.shards:
                    if (file := self._files.get(shard.root)) is not None:
                        file.needed = True
            start = found[-1][0] + b"\0"
        if not lost:
            return []
        named = ", ".join(map(str, lost[:5])) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
        return [
            f"{self.path} lacks sectors {named}, which were on no host yet: put back what was removed from it; "
            "'fusefs check' tells which files are concerned"
        ]

    def _know(self, sector_id: int, record: SectorRecord) -> Staged:
        entry = Staged(sector_id, record.replication, record.length, tuple(record.shards))
        entry.reached = at_quorum(record)
        self._sectors[sector_id] = entry
        if not entry.reached:
            self.below[entry.rank] = entry
        return entry

    # ------------------------------------------------------------------------------------------------------------
    # What is here

    def has(self, root: bytes) -> bool:
        """Is the shard here?"""
        return root in self._files

    def knows(self, sector_id: int) -> bool:
        """Is the sector here, below full replication?"""
        return sector_id in self._sectors

    def entries(self) -> list[Staged]:
        """Everything below full replication."""
        return list(self._sectors.values())

    def on_its_way(self, sector_id: int) -> bool:
        """Is it the drain's to bring the sector to hosts, and nobody else's yet?"""
        entry = self._sectors.get(sector_id)
        return entry is not None and (entry.under_way or not entry.reached) and sector_id not in self.losses

    def following(self, now: float, avoid: Container[str]) -> Staged | None:
        """The next to go to hosts, of those that are due and not of a replication to `avoid`: of the cut, else the first by rank."""
        orders: tuple[Iterable[Staged], ...] = (self.cut, self.below.values())
        for order in orders:
            for entry in order:
                if not entry.under_way and entry.due <= now and entry.replication not in avoid:
                    return entry
        return None

    def lost(self, entry: Staged, due: float) -> None:
        """Its shards are neither here nor anywhere else: nothing waits for it any more. It is looked for again, now and then."""
        entry.due = due
        self.losses[entry.sector_id] = f"sector {entry.sector_id} is neither in {self.path} nor on a host"
        self.cut.left(entry)
        self.cut.attempted()
        if entry.gone:
            self.below.pop(entry.rank, None)
            self._forget(entry, remove=True)

    async def read(self, shard: ShardRecord, offset: int, length: int) -> bytes:
        """Plaintext bytes [offset, offset + length), which lie within the shard; verified. NotFound, Corrupt, Unavailable: ask hosts."""
        _, _, at, size = block_range(offset, length, shard.length)
        raw = await self._get(shard, at, size)
        try:
            return await self._host_io.open_raw(shard.shard_id, shard.length, offset, length, raw)
        except Corrupt:
            file = self._files.get(shard.root)
            if file is not None and not file.needed:
                await self._damaged(shard.root)
            # Else other blocks of it may be good, and be nowhere else.
            raise

    async def sealed(self, shard: ShardRecord) -> SealedShard:
        """The shard as it was sealed, its root verified. NotFound, Corrupt, Unavailable."""
        raw = await self._get(shard, 0, sealed_length(shard.length))
        try:
            return await self._host_io.verified(SealedShard(shard.root.hex(), shard.shard_id, shard.length, raw))
        except Corrupt:
            await self._damaged(shard.root)
            raise

    async def _get(self, shard: ShardRecord, at: int, size: int) -> bytes:
        file, host = self._files.get(shard.root), self._host
        if file is None or host is None:
            raise NotFound(f"staging has no shard {shard.root.hex()[:12]}")
        self._files.move_to_end(shard.root)
        name = shard_name(self._volume_id, shard.root.hex())
        try:
            raw = await (host.get(name, MAX_SEALED) if size > file.size else host.get_range(name, at, size))
        except NotFound:
            # Somebody removed it by hand.
            self._discard(shard.root)
            raise
        if len(raw) != size:
            await self._damaged(shard.root)
            raise Corrupt(f"staging: shard {shard.root.hex()[:12]} is cut off")
        return raw

    async def _damaged(self, root: bytes) -> None:
        """What stands there is not the shard, or not all of it. What is only cached is removed, and would take room that nobody counts;
        the rest stays, for what a person may still do with it."""
        file, host = self._files.get(root), self._host
        if file is None or file.needed or host is None or not self._writable:
            self._discard(root)
        else:
            await self._drop(host, root)

    def _discard(self, root: bytes) -> None:
        """What is there is not the shard, or nothing: it is not asked again."""
        file = self._files.pop(root, None)
        if file is not None:
            self.size -= file.size

    async def put_back(self, shard: SealedShard) -> None:
        """For `fusefs check`: a shard that was damaged or removed is here again when it returns. NoSpace, IOFailure."""
        if self._host is None:
            self._host = await self._create()
        await self._host.put(shard_name(self._volume_id, shard.root), shard.sealed)
        root = bytes.fromhex(shard.root)
        self._discard(root)
        self._files[root] = _File(len(memoryview(shard.sealed)))
        self.size += self._files[root].size

    async def remove(self, root: bytes) -> None:
        """For `fusefs check`: nobody needs what stands here under that root, which is damaged. IOFailure."""
        self._discard(root)
        if self._host is not None:
            await self._host.delete(shard_name(self._volume_id, root.hex()))

    def is_whole_length(self, shard: ShardRecord) -> bool:
        """Of a shard that is here, without reading it: is the file long enough?"""
        return self._files[shard.root].size >= sealed_length(shard.length)

    def is_whole(self, entry: Staged) -> bool:
        """Are enough of its shards here to make all of them?"""
        needed = layout_of(entry.replication, entry.length).needed
        return sum(shard.root in self._files for shard in entry.shards) >= needed

    async def proves_whole(self, entry: Staged) -> bool:
        """The same, after reading each of them: a coded sector's are else found damaged one by one, and never all."""
        for shard in entry.shards:
            if self.has(shard.root):
                try:
                    await self.sealed(shard)
                except FusefsError as error:
                    log.warning("sector %d: %s", entry.sector_id, error)
        return self.is_whole(entry)

    def is_here(self, record: SectorRecord) -> bool:
        """The same, of a record."""
        return sum(shard.root in self._files for shard in record.shards) >= layout_of(record.replication, record.length).needed

    def only_here(self, sector_id: int) -> bool:
        """Is the sector below its write quorum, and should be here?"""
        entry = self._sectors.get(sector_id)
        return entry is not None and not entry.reached

    # ------------------------------------------------------------------------------------------------------------
    # Life of a sector here

    async def take(self, shards: Sequence[SealedShard]) -> bool:
        """True: the shards are durable here, and stay until a sector that was entered with them no longer needs them. False: no room, or
        the disk failed (`trouble`); nothing is here."""
        host, need = self._host, sum(len(memoryview(shard.sealed)) for shard in shards)
        if host is None or not self.limit:
            return False
        async with self._room:
            if not await self._make_room(host, need):
                return False
            # No await since there was room for them.
            for shard in shards:
                self._files[bytes.fromhex(shard.root)] = _File(len(memoryview(shard.sealed)))
            self.size += need
        errors: list[FusefsError] = []

        async def put(shard: SealedShard) -> None:
            self._seams.failpoints.hit("staging.before_put")
            try:
                await host.put(shard_name(self._volume_id, shard.root), shard.sealed)
            except FusefsError as error:
                errors.append(error)

        async with trio.open_nursery() as nursery:
            for shard in shards:
                nursery.start_soon(put, shard)
        self._seams.failpoints.hit("staging.before_record")
        if errors:
            self.trouble = f"staging takes nothing: {errors[0]}"
            log.warning("%s", self.trouble)
            self.release(shards)
            return False
        self.trouble = ""
        return True

    def release(self, shards: Iterable[SealedShard]) -> None:
        """They were taken, and no sector is entered with them after all."""
        for shard in shards:
            self._settling[bytes.fromhex(shard.root)] = True

    def enter(self, batch: Batch, sector_id: int, record: SectorRecord) -> None:
        """In the batch with the sector's record: its shards, which were taken, are here, and on no host. No await."""
        batch.put(STAGED + u64(sector_id), b"")
        self._know(sector_id, record)
        self.on_staged()

    def reached(self, sector_id: int) -> None:
        """The sector is on its write quorum, or was freed and its shards are queued for deletion there."""
        entry = self._sectors.get(sector_id)
        if entry is None:
            return
        entry.reached = True
        self.losses.pop(sector_id, None)
        self.below.pop(entry.rank, None)
        self.cut.left(entry)
        if entry.gone:
            self._forget(entry, remove=True)

    def settled(self, batch: Batch, sector_id: int) -> None:
        """In the batch that says the sector is at full replication: from when it is durable on, its shards here are cached (I3)."""
        entry = self._sectors.get(sector_id)
        if entry is not None:
            batch.delete(STAGED + u64(sector_id))
            self.below.pop(entry.rank, None)
            self.cut.left(entry)
            self._forget(entry, remove=False)

    def freed(self, batch: Batch, sector_id: int, record: SectorRecord) -> None:
        """In the batch that frees the sector: what is here of it goes once that is durable."""
        entry = self._sectors.get(sector_id)
        if entry is None:
            self._settling.update((shard.root, True) for shard in record.shards if shard.root in self._files)
            return
        batch.delete(STAGED + u64(sector_id))
        if sector_id in self.cut:
            # What will be published knows it: it is needed there until a later cut does not.
            entry.gone = True
            return
        self.below.pop(entry.rank, None)
        self._forget(entry, remove=True)

    def _forget(self, entry: Staged, *, remove: bool) -> None:
        self._sectors.pop(entry.sector_id, None)
        self.losses.pop(entry.sector_id, None)
        needed = layout_of(entry.replication, entry.length).needed
        for number, shard in enumerate(entry.shards):
            if shard.root in self._files:
                # Parity is not read while all is well.
                self._settling[shard.root] = remove or number >= needed

    # ------------------------------------------------------------------------------------------------------------
    # Cuts

    def begin(self) -> None:
        """A cut of the history is made now: it waits for what is on too few hosts yet. No await. An earlier one waits no more."""
        for entry in list(self.cut):
            if entry.gone:
                self.below.pop(entry.rank, None)
                self._forget(entry, remove=True)
        self.cut.begin(entry for entry in self.below.values() if entry.sector_id not in self.losses)

    @property
    def on_reached(self) -> Callable[[], None]:
        """See `Cut.on_reached`."""
        return self.cut.on_reached

    @on_reached.setter
    def on_reached(self, told: Callable[[], None]) -> None:
        self.cut.on_reached = told

    def waiting(self) -> int:
        """Sectors of the cut that are on too few hosts yet."""
        return len(self.cut)

    async def reached_all(self) -> None:
        """See `Cut.reached_all`."""
        await self.cut.reached_all()

    # ------------------------------------------------------------------------------------------------------------
    # Room

    async def _make_room(self, host: DirectoryHost, need: int) -> bool:
        """True: so many bytes more are within the limit and leave the disk its reserve; what is cached goes for it."""
        try:
            while not await self._fits(host, need):
                if not await self._drop_one(host):
                    return False
        except Fenced:
            raise
        except FusefsError as error:
            self.trouble = f"staging takes nothing: {error}"
            return False
        return True

    async def _fits(self, host: DirectoryHost, need: int) -> bool:
        if self.size + need > self.limit:
            return False
        space = await host.space()
        return space is None or space.free - need >= min(RESERVE, space.total // 20)

    async def _drop_one(self, host: DirectoryHost) -> bool:
        """The least recently used file that is only cached."""
        victim = self._victim()
        if victim is None and self._settling:
            await self._settle(host)
            victim = self._victim()
        if victim is None:
            return False
        await self._drop(host, victim)
        return True

    def _victim(self) -> bytes | None:
        return next((root for root, file in self._files.items() if not file.needed), None)

    async def _settle(self, host: DirectoryHost) -> None:
        """What nobody needs any more, durably (I3): the rest is kept as cache."""
        settling, self._settling = self._settling, {}
        try:
            await self._store.commit()
        except BaseException:
            self._settling = {**settling, **self._settling}
            raise
        for root, remove in settling.items():
            file = self._files.get(root)
            if file is None:
                continue
            file.needed = False
            if remove:
                await self._drop(host, root)

    async def _drop(self, host: DirectoryHost, root: bytes) -> None:
        file = self._files.pop(root)
        self.size -= file.size
        self._seams.failpoints.hit("staging.before_unlink")
        try:
            await host.delete(shard_name(self._volume_id, root.hex()))
        except FusefsError as error:
            log.warning("staging: %s stays until the volume is opened again: %s", root.hex()[:12], error)

    async def run(self) -> None:
        """Until cancelled: what is freed goes, and the disk gets its reserve back from what is cached."""
        while self._host is not None:
            await self._seams.clock.sleep(TIDY_SECONDS)
            try:
                await self.tidy()
            except Fenced:
                return
            except FusefsError as error:
                log.warning("staging: %s", error)

    async def tidy(self) -> None:
        """What `run` does each time. Fenced, NoSpace: the commit that has to come before fails."""
        host = self._host
        if host is None:
            return
        async with self._room:
            if any(self._settling.values()):
                await self._settle(host)
            while not await self._fits(host, 0) and await self._drop_one(host):
                pass

    async def aclose(self) -> None:
        """No file is open; for symmetry with hosts."""
        if self._host is not None:
            await self._host.aclose()


def at_quorum(record: SectorRecord) -> bool:
    """Do as many hosts have it, by its record, as make it durable there (I2)?"""
    layout = layout_of(record.replication, record.length)
    return sum(len(shard.hosts) for shard in record.shards) >= layout.spec.write_quorum
