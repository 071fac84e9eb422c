"""Reading sectors: cache, sealed bytes that are on their way to a host, best host first, the next one when
one fails or is slow (hedging), or, of `k+m`, the shard made of others."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import trio

from storage.contractor import Contractor
from storage.errors import Corrupt, FusefsError, NotFound, Unavailable
from storage.host_io import HostIO
from storage.hosts.hostdb import HostDB
from storage.interfaces import Buffer, MetadataReader, SealedShard
from storage.metadata.keys import SECTOR, u64
from storage.sealing import BLOCK, TAG_SIZE, block_count
from storage.seams import Seams
from storage.sectors.cache import WHOLE, BlockCache
from storage.sectors.hedging import Attempt, Hedging
from storage.sectors.records import SectorRecord, ShardRecord, decode_sector, layout_for
from storage.sectors.redundancy import Layout, Part
from storage.sectors.staging import Staging
from storage.sectors.strays import Strays

log = logging.getLogger("fusefs.sectors")

B = TypeVar("B", bound=Buffer)

#: Sectors being prefetched at once: less than the slots of a directory, so that who wants a block does not wait for all of them.
PREFETCHES = 5
#: Of those from one disk of this machine: one is read, one is opened, and one is on its way there or back. With more of them all come
#: later, the first of a stream as well, and all of their memory is touched for the first time.
AT_ONCE = 3
#: Sectors fetched ahead of a sequential reader; and from a disk of this machine where threads of this process open them, which take
#: turns for the interpreter's lock: the event loop wants it as well, and two keep the disk busy.
AHEAD = 4
AHEAD_NEAR = 2
#: Blocks that are read in the event loop at most, where they are at hand.
SOON = 8
#: Blocks that are asked for together where a request takes far longer than they do: of a host that is not a disk of this machine.
TOGETHER = 4
#: Sectors whose roots are remembered; about 10 MB.
ROOTS = 65536
#: Sectors whose records are kept as they were decoded; less than 1 MB.
RECORDS = 1024


@dataclass(slots=True)
class _Lane:
    """Sectors that are to be brought from one host, and how many tasks are at it."""

    #: Each with its record and the shards that hold data, in the order in which they are wanted: trio starts tasks in any order, and who
    #: reads waits for the first.
    wanted: deque[tuple[int, SectorRecord, list[int]]] = field(default_factory=deque)
    tasks: int = 0


class SectorReader:
    """Serves ranges and whole sectors. Keeps no state but the cache and what is being fetched."""

    def __init__(
        self, store: MetadataReader, host_io: HostIO, contractor: Contractor, hostdb: HostDB, cache: BlockCache, seams: Seams
    ) -> None:
        self._store = store
        self._host_io = host_io
        self._contractor = contractor
        self._hostdb = hostdb
        self._cache = cache
        self._seams = seams
        self.hedging = Hedging(hostdb, seams)
        #: Sector -> the root of its one shard, b"" where it has several, and its length. None of it ever changes.
        self._roots: dict[int, tuple[bytes, int]] = {}
        #: Sector -> its record as it was decoded last, and what it was decoded from.
        self._records: dict[int, tuple[bytes, SectorRecord]] = {}
        #: Whole sectors on their way into the cache: others who want a block of one wait for it instead of asking again.
        self._fetching: dict[int, trio.Event] = {}
        #: By the host that is asked first, so that none waits for another that hangs.
        self._lanes: dict[int, _Lane] = {}
        #: The sealed bytes of a shard (sector id, number) that is still on its way to a host, for as long as they are in memory anyhow. At
        #: write quorum a sector can be read, and some of its shards are nowhere yet: without this, reading one of k+m would touch k hosts.
        self.in_flight: Callable[[int, int], SealedShard | None] = lambda _sector_id, _number: None
        #: Shards on the local disk, and shards that no record says where they are; None: there are none.
        self.staging: Staging | None = None
        self.strays: Strays | None = None
        self.notes: deque[str] = deque(maxlen=50)
        #: (sector id, root, host): the copy was not there, or did not verify. Told once per read; no await, never fails.
        self.on_damage: Callable[[int, bytes, int], None] = lambda _sector_id, _root, _host: None

    def record(self, sector_id: int) -> SectorRecord:
        raw = self._store.get(SECTOR + u64(sector_id))
        if raw is None:
            raise NotFound(f"sector {sector_id} does not exist")
        return decode_sector(raw, sector_id)

    def _same_record(self, sector_id: int) -> SectorRecord:
        """As `record`, decoded only if it has changed. Whoever gets it changes nothing in it."""
        raw = self._store.get(SECTOR + u64(sector_id))
        known = self._records.get(sector_id)
        if known is not None and known[0] == raw:
            return known[1]
        record = self.record(sector_id)
        if raw is not None:
            if len(self._records) >= RECORDS:
                self._records.clear()
            self._records[sector_id] = (raw, record)
        return record

    async def _located(self, sector_id: int) -> SectorRecord:
        record = self.record(sector_id)
        if self.strays is None or not self.strays.is_stray(record):
            return record
        return await self.strays.locate(sector_id, record)

    def cached(self, sector_id: int, offset: int) -> bool:
        try:
            record = self.record(sector_id)
        except NotFound:
            return False
        if offset >= record.length:
            return False
        (part,) = layout_for(record, sector_id).locate(offset, 1)
        root = record.shards[part.shard].root
        return (root, part.offset // BLOCK) in self._cache or (self.staging is not None and self.staging.has(root))

    def read_now(self, sector_id: int, offset: int, length: int, *, wait: bool = True) -> Buffer | None:
        """A range that lies within a sector that is one shard, out of the cache or, with `wait`, at once from a disk; None: not so, or not
        there."""
        known = self._roots.get(sector_id)
        if known is None:
            raw = self._store.get(SECTOR + u64(sector_id))
            if raw is None:
                return None
            record = decode_sector(raw, sector_id)
            known = (record.shards[0].root if len(record.shards) == 1 else b"", record.length)
            if len(self._roots) >= ROOTS:
                self._roots.clear()
            self._roots[sector_id] = known
        root, end = known
        # Behind the sector stands its label.
        if not root or offset + length > end:
            return None
        found = self._cache.read(root, offset, length)
        return self._read_at_once(sector_id, offset, length) if found is None and wait else found

    def _read_at_once(self, sector_id: int, offset: int, length: int) -> bytes | None:
        """Of a sector that is one shard: from a disk that answers while one waits for it; what it was asked for is cached."""
        first, last = offset // BLOCK, (offset + length - 1) // BLOCK
        if length <= 0 or last - first >= SOON or sector_id in self._fetching:
            return None
        try:
            record = self._same_record(sector_id)
        except (NotFound, Corrupt):
            return None
        host = self._soon_from(sector_id, record, 0)
        if host is None:
            return None
        shard = record.shards[0]
        blocks = self._host_io.quick.read_at_once(host, shard.root.hex(), shard.shard_id, shard.length, first, last + 1 - first)
        if blocks is None:
            return None
        for block, plain in enumerate(blocks, first):
            self._cache.put(shard.root, block, plain)
        self._cache.statistics.misses += len(blocks)
        begin = offset - first * BLOCK
        if first == last:
            return blocks[0][begin : begin + length]
        if begin:
            blocks[0] = blocks[0][begin:]
        blocks[-1] = blocks[-1][: offset + length - last * BLOCK]
        return b"".join(blocks)

    async def read_sector(self, sector_id: int) -> bytes:
        """The whole sector, each shard from the first host whose copy verifies, or else made of others."""
        record = await self._located(sector_id)
        layout = layout_for(record, sector_id)
        parts = layout.whole()
        if len(parts) == 1:
            plain = await self.read_shard(sector_id, record, 0)
            return memoryview(plain)[: record.length].tobytes()
        plains = await _together([partial(self.read_shard, sector_id, record, part.shard) for part in parts])
        views = [memoryview(plain)[part.offset : part.offset + part.length] for plain, part in zip(plains, parts, strict=True)]
        return b"".join(views)

    async def read_range(self, sector_id: int, offset: int, length: int) -> bytes:
        """Bytes [offset, offset + length) of the sector, clipped, block by block from the cache or one request per gap."""
        record = await self._located(sector_id)
        if offset < 0 or length <= 0 or offset >= record.length:
            return b""
        layout = layout_for(record, sector_id)
        parts = layout.locate(offset, min(length, record.length - offset))
        pending = self._fetching.get(sector_id)
        if pending is not None and not all(self._has(record.shards[part.shard], part) for part in parts):
            await pending.wait()
        if len(parts) == 1:
            return await self._read_part(sector_id, record, layout, parts[0])
        return b"".join(await _together([partial(self._read_part, sector_id, record, layout, part) for part in parts]))

    def _has(self, shard: ShardRecord, part: Part) -> bool:
        if (shard.root, WHOLE) in self._cache:
            return True
        first, last = part.offset // BLOCK, (part.offset + part.length - 1) // BLOCK
        return all((shard.root, block) in self._cache for block in range(first, last + 1))

    async def _read_part(self, sector_id: int, record: SectorRecord, layout: Layout, part: Part) -> bytes:
        """A range of one shard's plaintext."""
        root = record.shards[part.shard].root
        plain = self._cache.whole(root)
        if plain is not None:
            return bytes(memoryview(plain)[part.offset : part.offset + part.length])
        first, last = part.offset // BLOCK, (part.offset + part.length - 1) // BLOCK
        blocks: dict[int, Buffer] = {}
        missing: list[int] = []
        for block in range(first, last + 1):
            found = self._cache.get(root, block)
            if found is None:
                missing.append(block)
            else:
                blocks[block] = found
        for start, count in _runs(missing):
            start, plain = await self._fetch_about(sector_id, record, layout, part.shard, start, count)
            for at in range(0, len(plain), BLOCK):
                block = start + at // BLOCK
                # Of its own: a view would keep all that came with it.
                blocks[block] = piece = bytes(plain[at : at + BLOCK])
                self._cache.put(root, block, piece)
        begin = part.offset - first * BLOCK
        if first == last:
            return bytes(blocks[first][begin : begin + part.length])
        return b"".join([blocks[block] for block in range(first, last + 1)])[begin : begin + part.length]

    async def _fetch_about(
        self, sector_id: int, record: SectorRecord, layout: Layout, number: int, first: int, count: int
    ) -> tuple[int, Buffer]:
        """As `_fetch`; with blocks beside them where these come along for little. The first is told."""
        shard = record.shards[number]
        if not self._at_hand(shard):
            start = first // TOGETHER * TOGETHER
            end = min(-(-(first + count) // TOGETHER) * TOGETHER, block_count(shard.length))
            if end - start > count:
                try:
                    return start, await self._fetch(sector_id, record, layout, number, start, end - start)
                except (Corrupt, Unavailable):
                    # Maybe only of what nobody has asked for, which cannot be made again now.
                    pass
        return first, await self._fetch(sector_id, record, layout, number, first, count)

    async def fetched(self, sector_id: int) -> None:
        """Until the sector is not on its way into the cache any more. Not a checkpoint where it is not."""
        pending = self._fetching.get(sector_id)
        if pending is not None:
            await pending.wait()

    def passed(self, sector_id: int) -> None:
        """A sequential reader has got to the sector's end, and reads on. It need not stay where it is quickly had again: on a disk here."""
        try:
            shards = self.record(sector_id).shards
        except (NotFound, Corrupt):
            return
        for shard in shards:
            if self._near(shard):
                self._cache.passed(shard.root)

    def ahead(self, sector_id: int) -> int:
        """How many sectors after this one are worth a prefetch for a sequential reader. By what the metadata says of it alone."""
        try:
            shards = self.record(sector_id).shards
        except (NotFound, Corrupt):
            return AHEAD
        return AHEAD_NEAR if not self._host_io.beside and all(self._near(shard) for shard in shards) else AHEAD

    def _near(self, shard: ShardRecord) -> bool:
        """Is it on a disk of this machine?"""
        return any(self._host_io.quick.near(host) for host in shard.hosts)

    def _at_hand(self, shard: ShardRecord) -> bool:
        """Is it on a disk of this machine, or in memory?"""
        return self._near(shard) or not shard.hosts or (self.staging is not None and self.staging.has(shard.root))

    def prefetch(self, sector_id: int, nursery: trio.Nursery) -> bool:
        """Bring a whole sector into the cache in the background. False: not now, since too many are on their way."""
        if sector_id in self._fetching:
            return True
        if len(self._fetching) >= PREFETCHES:
            return False
        try:
            record = self.record(sector_id)
            parts = layout_for(record, sector_id).whole()
        except (NotFound, Corrupt):
            return True
        if record.length * 4 > self._cache.limit or all(self._has(record.shards[part.shard], part) for part in parts):
            return True
        self._fetching[sector_id] = trio.Event()
        hosts = record.shards[parts[0].shard].hosts
        lane = self._lanes.setdefault(self._hostdb.rank(hosts)[0] if hosts else 0, _Lane())
        lane.wanted.append((sector_id, record, [part.shard for part in parts]))
        if lane.tasks < (AT_ONCE if all(self._near(shard) for shard in record.shards) else PREFETCHES):
            lane.tasks += 1
            nursery.start_soon(self._bring_all, lane)
        return True

    async def _bring_all(self, lane: _Lane) -> None:
        """What is wanted, one after the other, for as long as there is anything."""
        try:
            while lane.wanted:
                await self._bring(*lane.wanted.popleft())
        finally:
            lane.tasks -= 1
            if not lane.tasks:
                # Cancelled: nobody brings them any more, and nobody is to wait for it.
                while lane.wanted:
                    self._fetching.pop(lane.wanted.popleft()[0]).set()

    async def _bring(self, sector_id: int, record: SectorRecord, shards: list[int]) -> None:
        try:
            record = await self._located(sector_id)
            layout = layout_for(record, sector_id)
            # By its blocks' tags alone: hashing all of it again would tell nothing more of what is read, and take a third of the time.
            plains = await _together(
                [partial(self._fetch, sector_id, record, layout, shard, 0, block_count(record.shards[shard].length)) for shard in shards]
            )
            for shard, plain in zip(shards, plains, strict=True):
                self._cache.put_whole(record.shards[shard].root, plain)
        except FusefsError as error:
            # Whoever needs the bytes asks for them and gets the error then.
            log.info("read-ahead of sector %d failed: %s", sector_id, error)
        finally:
            self._fetching.pop(sector_id).set()

    # ---- one shard

    async def read_shard(self, sector_id: int, record: SectorRecord, number: int) -> bytes:
        """A whole shard's plaintext: as stored, its root verified, or made of others. Corrupt, Unavailable."""
        layout = layout_for(record, sector_id)

        async def whole(other: int, contract_id: str) -> bytes:
            shard = record.shards[other]
            plain = await self._host_io.read(contract_id, shard.root.hex(), shard.shard_id, plaintext_length=shard.length)
            layout.check(sector_id, other, plain)
            return plain

        return bytes(await self._good(_Wanted(sector_id, record, layout, 0, record.shards[number].length, whole), number))

    async def read_shard_by_blocks(self, sector_id: int, record: SectorRecord, number: int) -> bytes:
        """As `read_shard`, each block from whichever host's verifies, or made of the same block of others: for where no copy is good as a
        whole. The root is not verified. Corrupt, Unavailable."""
        layout = layout_for(record, sector_id)
        count = block_count(record.shards[number].length)
        pieces: list[Buffer] = []
        for first in range(0, count, TOGETHER):
            together = min(TOGETHER, count - first)
            try:
                pieces.append(await self._fetch(sector_id, record, layout, number, first, together))
            except (Corrupt, Unavailable):
                pieces += [await self._fetch(sector_id, record, layout, number, first + at, 1) for at in range(together)]
        return b"".join(pieces)

    async def _fetch(self, sector_id: int, record: SectorRecord, layout: Layout, number: int, first: int, count: int) -> Buffer:
        """Blocks of a shard's plaintext, from a host that has it, or the same blocks of others made into them."""
        wanted = min(count * BLOCK, record.shards[number].length - first * BLOCK)
        if count <= SOON:
            soon = await self._soon(sector_id, record, number, first * BLOCK, wanted)
            if soon is not None:
                return soon

        async def blocks(other: int, contract_id: str) -> Buffer:
            shard = record.shards[other]
            plain = await self._host_io.insecure_read(
                contract_id, shard.root.hex(), shard.shard_id, first * BLOCK, wanted, plaintext_length=shard.length
            )
            if len(plain) != wanted:
                raise Corrupt(f"sector {sector_id}: {len(plain)} bytes where {wanted} should be")
            return plain

        return await self._good(_Wanted(sector_id, record, layout, first * BLOCK, wanted, blocks), number)

    async def _soon(self, sector_id: int, record: SectorRecord, number: int, first: int, length: int) -> bytes | None:
        """From the host that would be asked first, if it is so near that asking it takes no thread; None: ask as usual."""
        host = self._soon_from(sector_id, record, number)
        if host is None:
            return None
        shard = record.shards[number]
        return await self._host_io.quick.read_soon(host, shard.root.hex(), shard.shard_id, first, length, shard.length)

    def _soon_from(self, sector_id: int, record: SectorRecord, number: int) -> int | None:
        """The host that would be asked first for a shard; None: none is to be asked."""
        shard = record.shards[number]
        if not shard.hosts or self.in_flight(sector_id, number) is not None or (self.staging is not None and self.staging.has(shard.root)):
            return None
        host = shard.hosts[0] if len(shard.hosts) == 1 else self._hostdb.rank(shard.hosts)[0]
        return None if self._contractor.contract_for(host) is None else host

    async def _good(self, wanted: _Wanted, number: int) -> Buffer:
        """Of shard `number`: from memory while it is on its way to a host, from the host that is best, or made of others; another way is
        tried when one fails or is slow."""
        here = await self._here(wanted, number)
        if here is not None:
            return here
        stored, errors = self._stored(wanted, number)
        attempts = stored
        if wanted.layout.spec.coded and len(others := self._best_first(wanted, number)) >= wanted.layout.needed:
            rebuild = Attempt(partial(self._rebuild, wanted, number, others), wanted.size, cost=wanted.layout.needed)
            # Where the hosts that have it fail or hang, it comes last again only when they have been well for a while.
            troubled = all(self._hostdb.troubled(attempt.host) for attempt in stored if attempt.host is not None)
            attempts = [rebuild, *stored] if troubled else [*stored, rebuild]
        outcome = await self.hedging.first_good(attempts)
        for found in outcome.found.values():
            return found
        errors += outcome.errors
        raise self._no_good(wanted, errors)

    async def _here(self, wanted: _Wanted, number: int) -> bytes | None:
        """Without asking a host: from memory, or from the local disk; None: hosts are to be asked."""
        sealed = self.in_flight(wanted.sector_id, number)
        if sealed is not None:
            return await self._host_io.open_part(sealed, wanted.first, wanted.length)
        if self.staging is None or not self._is_staged(wanted, number):
            return None
        try:
            return await self.staging.read(wanted.record.shards[number], wanted.first, wanted.length)
        except FusefsError as error:
            log.warning("sector %d: what is staged of it cannot be used: %s", wanted.sector_id, error)
            return None

    def _is_staged(self, wanted: _Wanted, number: int) -> bool:
        return self.staging is not None and self.staging.has(wanted.record.shards[number].root)

    def _stored(self, wanted: _Wanted, number: int) -> tuple[list[Attempt], list[FusefsError]]:
        """Ways to read a shard as it is stored, best first; and why some hosts cannot be asked."""
        shard = wanted.record.shards[number]
        attempts: list[Attempt] = []
        errors: list[FusefsError] = []
        for host in self._hostdb.rank(shard.hosts):
            contract = self._contractor.contract_for(host)
            if contract is None:
                errors.append(Unavailable(f"host {host} has no contract"))
            else:
                attempts.append(Attempt(partial(self._ask, wanted, number, host, contract.contract_id), wanted.size, host))
        return attempts, errors

    async def _ask(self, wanted: _Wanted, number: int, host: int, contract_id: str) -> Buffer:
        try:
            return await wanted.read(number, contract_id)
        except FusefsError as error:
            note = f"sector {wanted.sector_id}: copy on host {host} could not be used: {error}"
            log.warning("%s", note)
            if note not in self.notes:
                self.notes.append(note)
            if isinstance(error, Corrupt | NotFound):
                self.on_damage(wanted.sector_id, wanted.record.shards[number].root, host)
            kind = NotFound if isinstance(error, NotFound) else Corrupt if isinstance(error, Corrupt) else Unavailable
            raise kind(f"host {host}: {error}") from error

    def _no_good(self, wanted: _Wanted, errors: Sequence[FusefsError]) -> FusefsError:
        """Corrupt if some copy was there and none verified, else Unavailable; names every host and reason."""
        said = "; ".join(dict.fromkeys(map(str, errors))) or "no host holds one"
        if wanted.layout.spec.coded:
            kind = Corrupt if errors and all(isinstance(error, Corrupt | NotFound) for error in errors) else Unavailable
            return kind(f"sector {wanted.sector_id}: too few of its shards can be read ({said})")
        kind = Corrupt if any(isinstance(error, Corrupt | NotFound) for error in errors) else Unavailable
        return kind(f"sector {wanted.sector_id}: no copy can be read ({said})")

    async def _rebuild(self, wanted: _Wanted, number: int, others: list[int]) -> bytes:
        """The same columns of as many `others` as it takes, made into those of shard `number`."""
        attempts = []
        for other in others:
            hosts = wanted.record.shards[other].hosts
            attempts.append(Attempt(partial(self._column, wanted, other), wanted.size, self._hostdb.rank(hosts)[0] if hosts else None))
        needed = wanted.layout.needed
        outcome = await self.hedging.first_good(attempts, needed, earns=False)
        if len(outcome.found) < needed:
            kind = Corrupt if all(isinstance(error, Corrupt) for error in outcome.errors) else Unavailable
            said = "; ".join(dict.fromkeys(map(str, outcome.errors)))
            raise kind(f"shards needed: {needed}, that can be read besides: {len(outcome.found)} ({said})")
        found = {others[at]: bytes(plain) for at, plain in outcome.found.items()}
        return await self._seams.threads.run(wanted.layout.rebuild, wanted.sector_id, number, wanted.first, found)

    async def _column(self, wanted: _Wanted, number: int) -> Buffer:
        """Of one of the shards that another is made of, from whichever host has it."""
        here = await self._here(wanted, number)
        if here is not None:
            return here
        stored, errors = self._stored(wanted, number)
        for attempt in stored:
            try:
                return await attempt.run()
            except FusefsError as error:
                errors.append(error)
        kind = Corrupt if any(isinstance(error, Corrupt | NotFound) for error in errors) else Unavailable
        raise kind(f"shard {number}: {'; '.join(map(str, errors)) or 'no host holds it'}")

    def _best_first(self, wanted: _Wanted, number: int) -> list[int]:
        """The other shards that are somewhere: those in memory or on the local disk first, then those on the best hosts."""
        others = [other for other in range(len(wanted.record.shards)) if other != number]
        at_hand = [other for other in others if self.in_flight(wanted.sector_id, other) is not None or self._is_staged(wanted, other)]
        of_host = {host: other for other in others for host in wanted.record.shards[other].hosts}
        return list(dict.fromkeys([*at_hand, *(of_host[host] for host in self._hostdb.rank(of_host))]))


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Plaintext bytes [first, first + length) of shards of a sector, and how to read those of one shard under a contract."""

    sector_id: int
    record: SectorRecord
    layout: Layout
    first: int
    length: int
    read: Callable[[int, str], Awaitable[Buffer]]

    @property
    def size(self) -> int:
        """Bytes a host sends for it, as HostIO times them."""
        return self.length + TAG_SIZE * -(-self.length // BLOCK)


async def _together(reads: Sequence[Callable[[], Awaitable[B]]]) -> list[B]:
    """All at once; the first error, if any has one, once all have ended."""
    if len(reads) == 1:
        return [await reads[0]()]
    results: dict[int, B] = {}
    errors: list[FusefsError] = []

    async def one(at: int) -> None:
        try:
            results[at] = await reads[at]()
        except FusefsError as error:
            errors.append(error)

    async with trio.open_nursery() as nursery:
        for at in range(len(reads)):
            nursery.start_soon(one, at)
    if errors:
        raise errors[0]
    return [results[at] for at in range(len(reads))]


def _runs(blocks: list[int]) -> list[tuple[int, int]]:
    """Ascending block numbers as (first, count) of contiguous runs."""
    runs: list[tuple[int, int]] = []
    for block in blocks:
        if runs and runs[-1][0] + runs[-1][1] == block:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((block, 1))
    return runs
