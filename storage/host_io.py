"""HostIO: shards on hosts under contracts. Sealed on the way out, verified on the way in, timed and counted always.

Between host and plaintext there is nothing else: whatever a host answers, bytes come out only if they verify against the one header
that metadata says this sector id has. Blocking work above `INLINE` bytes is one hop into a thread.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import trio

from storage.contractor import Contractor
from storage.coprocess.pair import ARENA, DISKS, SEALING
from storage.coprocess.sealer import PIECES, Job
from storage.epochs import Epochs
from storage.errors import BadArgument, Corrupt, Expired, NoSpace, NotFound, NotPermitted, Unavailable
from storage.hosts.holders import decode_holders, holders_key
from storage.hosts.hostdb import Direction, HostDB
from storage.hosts.layout import check_root, shard_name
from storage.hosts.locked_shards import LockedShards
from storage.hosts.registry import HostRegistry
from storage.interfaces import Batch, Buffer, Host, MetadataStore, SealedShard
from storage.keys import Keys
from storage.quick_reads import QuickReads
from storage.sealed_ids import SealedIds
from storage.sealing import (
    BLOCK,
    HEADER_SIZE,
    MAX_SEALED,
    TAG_SIZE,
    Opening,
    ShardHeader,
    block_range,
    check_header,
    open_blocks,
    open_range,
    open_shard,
    root_of,
    seal,
    sealed_length,
)
from storage.seams import Seams
from storage.turn import Turn

log = logging.getLogger("fusefs.hosts")

T = TypeVar("T")

#: Up to this many bytes are verified in the event loop: 20 us of AES-GCM, where a hop into a thread costs 85.
INLINE = 8 * (BLOCK + TAG_SIZE) + 1024
#: From this many bytes on, what is opened gets memory of its own, which is used again.
LARGE = 1024 * 1024
#: Blocks that a look at a shard checks: 64 KiB, since most of what a look costs is the same for one.
LOOKED = 4
#: Bytes that are read and opened at a time: whole blocks.
STEP = 16 * (BLOCK + TAG_SIZE)
#: Seconds any call to a host may take, besides what its bytes take at `SLOWEST`.
TIMEOUT = 20.0
#: Bytes per second below which a host counts as not answering.
SLOWEST = 1024 * 1024
#: The same of a remote host: a quarter of a megabit a second is a line somebody has.
SLOWEST_REMOTE = 32 * 1024
#: For timing a read whose size nobody has told.
_UNKNOWN_SIZE = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Placed:
    """A shard that was put on a host, and for whose sake it is to stay there; see storage/hosts/holders.py."""

    host_number: int
    root: bytes
    lineage: str
    stored_version: str
    locked_ns: int


class HostIO:
    """See `interfaces.HostIO`."""

    def __init__(
        self,
        volume_id: bytes,
        keys: Keys,
        epochs: Epochs,
        registry: HostRegistry,
        contractor: Contractor,
        hostdb: HostDB,
        store: MetadataStore,
        seams: Seams,
        *,
        timeout: float = TIMEOUT,
        slowest: float = SLOWEST,
    ) -> None:
        self._volume_id = volume_id
        self._keys = keys
        self._epochs = epochs
        self._registry = registry
        self._contractor = contractor
        self._hostdb = hostdb
        self._store = store
        self._seams = seams
        self._timeout = timeout
        self._slowest = slowest
        self._sealed = SealedIds()
        self._locked = LockedShards(seams)
        #: Hosts whose credentials may not delete: told once.
        self._undeletable: set[int] = set()
        #: One change at a time per shard and host; an entry lives as long as somebody wants it.
        self._changing: dict[bytes, tuple[Turn, int]] = {}
        #: Per host: puts of shards that are on no record (yet), because they are under way, or their answer never came.
        self._unsettled: Counter[int] = Counter()
        self._stopped = False
        #: What a disk of this machine gives without a thread.
        self.quick = QuickReads(volume_id, keys, epochs, registry, hostdb, self._locked)

    # ----------------------------------------------------------------------------------------------------------------
    # Reading

    async def read(self, contract_id: str, sector_root: str, sector_id: int, plaintext_length: int | None = None) -> bytes:
        """The shard's plaintext; root, header and every block verified. `plaintext_length`, if known, is for timing it."""
        number = self._contractor.contract(contract_id).host_number
        check_root(sector_root)
        name = shard_name(self._volume_id, sector_root)
        size = _UNKNOWN_SIZE if plaintext_length is None else sealed_length(plaintext_length)

        async def fetch(host: Host) -> bytes:
            return await host.get(name, MAX_SEALED)

        return await self._fetch(
            number, sector_root, sector_id, fetch, None, size, lambda sealed: self._open_whole(sealed, sector_root, sector_id)
        )

    async def insecure_read(
        self, contract_id: str, sector_root: str, sector_id: int, offset: int, length: int, plaintext_length: int | None = None
    ) -> Buffer:
        """Plaintext bytes [offset, offset + length), clipped to the shard's end. Their blocks are verified, the root is not.

        With `plaintext_length` this is one request for just the blocks; without, the header is asked for first.
        """
        number = self._contractor.contract(contract_id).host_number
        check_root(sector_root)
        name = shard_name(self._volume_id, sector_root)
        if offset < 0 or length < 0:
            raise BadArgument(f"sector {sector_id}: {length} bytes at {offset} is no range")
        if length == 0:
            return b""
        known = plaintext_length is not None
        if plaintext_length is None:

            async def head(host: Host) -> bytes:
                return await host.get_range(name, 0, HEADER_SIZE)

            header = await self._fetch(
                number, sector_root, sector_id, head, (0, HEADER_SIZE), HEADER_SIZE, lambda raw: self._known_header(raw, sector_id)
            )
        else:
            header = self._epochs.header_for(self._volume_id, sector_id, plaintext_length)
        clip_only = offset >= header.plaintext_length
        if clip_only:
            if known:
                return b""
            # Where the shard ends is only what its header says: the last block tells if that is true.
            offset, length = max(0, header.plaintext_length - 1), 1
        _, _, at, size = block_range(offset, length, header.plaintext_length)
        if header.plaintext_length == 0:
            at, size = HEADER_SIZE, sealed_length(0) - HEADER_SIZE
        many_blocks = size > INLINE and offset % BLOCK == 0
        lend = ARENA.lend if size >= LARGE else _lend_small

        def verify(raw: Buffer) -> Buffer:
            key = self._epochs.key_for(sector_id, self._keys)
            if header.plaintext_length == 0:
                return open_shard(key, header, header.encode() + bytes(raw))
            if not many_blocks:
                return open_range(key, header, offset, length, raw)
            opening = Opening(key, header, offset, length, lend, SEALING.open_into)
            opening.take(memoryview(raw))
            return opening.plain()

        async def blocks(host: Host) -> bytes | _Opened[Buffer]:
            quick = self.quick.host(number) if many_blocks else None
            if quick is not None:
                # Read and opened by one thread, a few blocks at a time, which so stay in the processor's cache. With memory of its own for
                # each attempt: one that hangs, and that nobody waits for any more, may go on one day.
                opening = Opening(self._epochs.key_for(sector_id, self._keys), header, offset, length, lend, SEALING.open_into)
                return _Opened(await quick.get_range_opened(name, at, size, STEP, opening), opening.plain())
            return await host.get_range(name, at, size)

        plain = await self._fetch(number, sector_root, sector_id, blocks, (at, size), size, verify)
        return b"" if clip_only else plain

    @property
    def beside(self) -> bool:
        """Are sectors opened by another process, so that the event loop is not kept from its work?"""
        return DISKS.there

    async def probe(self, contract_id: str, sector_root: str, sector_id: int, plaintext_length: int, block: int) -> int:
        """The shard is there, ends where it should, and `LOOKED` blocks from `block` on verify (with block 0 the header, too). Returns the
        bytes that were asked for. NotFound, Corrupt: it is not so.

        Two requests, or one where the last block is among them: what was cut off, lengthened or swapped for another is noticed whichever
        they are.
        What counts is what the name shows: a locked version behind it is protected, and what nobody finds by its name is to be mended.
        """
        number = self._contractor.contract(contract_id).host_number
        check_root(sector_root)
        name, end = shard_name(self._volume_id, sector_root), sealed_length(plaintext_length)
        header = self._epochs.header_for(self._volume_id, sector_id, plaintext_length)
        key = self._epochs.key_for(sector_id, self._keys)
        _, _, at, size = block_range(block * BLOCK, LOOKED * BLOCK, plaintext_length)
        start = at if block else 0
        stop = at + size if plaintext_length else end
        asked = 0
        if stop < end:
            # Before the block: where there is less than that, nothing more needs to be sent.
            tail = end - TAG_SIZE

            async def ends(host: Host) -> bytes:
                return await host.get_range(name, tail, TAG_SIZE + 1)

            await self._fetch(
                number,
                sector_root,
                sector_id,
                ends,
                (tail, TAG_SIZE + 1),
                TAG_SIZE,
                lambda raw: _check_end(sector_id, raw, tail, end),
                named=True,
            )
            asked += TAG_SIZE
        more = stop == end

        async def blocks(host: Host) -> bytes:
            return await host.get_range(name, start, stop - start + more)

        def verify(raw: bytes) -> None:
            _check_end(sector_id, raw, start, stop)
            if not block:
                check_header(header, raw[:HEADER_SIZE])
            open_blocks(key, header, block, memoryview(raw)[at - start :])

        await self._fetch(number, sector_root, sector_id, blocks, (start, stop - start + more), stop - start, verify, named=True)
        return asked + stop - start

    async def read_sealed(
        self, contract_id: str, sector_root: str, sector_id: int, plaintext_length: int, *, named: bool = False
    ) -> SealedShard:
        """The shard as it was sealed, to be stored once more: its root verified, nothing opened (I1). `named`: as the name shows it, not
        from a locked version behind it."""
        number = self._contractor.contract(contract_id).host_number
        check_root(sector_root)
        name, size = shard_name(self._volume_id, sector_root), sealed_length(plaintext_length)

        async def fetch(host: Host) -> bytes:
            # A locked host finds by root what the name does not show; ranges are of what it shows.
            return await (host.get_range(name, 0, size + 1) if named and host.capabilities.object_lock else host.get(name, size))

        def verify(sealed: bytes) -> SealedShard:
            found = root_of(sealed)
            if found != sector_root:
                raise Corrupt(f"sector {sector_id}: what is stored has the root {found[:12]} ({len(sealed)} bytes)")
            return SealedShard(sector_root, sector_id, plaintext_length, sealed)

        return await self._fetch(number, sector_root, sector_id, fetch, None, size, verify, named=named)

    def seal_again(self, data: Sequence[Buffer], sector_id: int, sector_root: str) -> SealedShard:
        """Blocking, for a thread: a shard that was sealed once and is gone, from the same bytes; of whatever epoch it was.

        I1: what comes out has the root on record, so it is what was sealed then, byte for byte; else Corrupt, and nobody sees it.
        """
        length = sum(memoryview(piece).nbytes for piece in data)
        header = self._epochs.header_for(self._volume_id, sector_id, length)
        sealed = seal(self._epochs.key_for(sector_id, self._keys), header, data)
        found = root_of(sealed)
        if found != sector_root:
            raise Corrupt(f"sector {sector_id}: made again it has the root {found[:12]} instead of {sector_root[:12]}; it is not stored")
        return SealedShard(sector_root, sector_id, length, sealed)

    def open_sealed(self, shard: SealedShard) -> bytes:
        """Blocking, for a thread: the plaintext of a shard whose root was verified. Corrupt."""
        return self._open_whole(bytes(shard.sealed), shard.root, shard.sector_id)

    async def open_part(self, shard: SealedShard, offset: int, length: int) -> bytes:
        """Plaintext bytes [offset, offset + length), which lie within it, of a shard this process has sealed. Corrupt."""
        _, _, at, size = block_range(offset, length, shard.plaintext_length)
        raw = memoryview(shard.sealed)[at : at + size]
        return await self.open_raw(shard.sector_id, shard.plaintext_length, offset, length, raw)

    async def open_raw(self, sector_id: int, plaintext_length: int, offset: int, length: int, raw: Buffer) -> bytes:
        """As `open_part`, from the sealed bytes that `block_range` names for it."""
        header = self._epochs.header_for(self._volume_id, sector_id, plaintext_length)
        key = self._epochs.key_for(sector_id, self._keys)
        if len(raw) <= INLINE:
            return open_range(key, header, offset, length, raw)
        return await self._seams.threads.run(open_range, key, header, offset, length, raw)

    async def verified(self, shard: SealedShard) -> SealedShard:
        """The same, if its bytes have the root they are to have; Corrupt otherwise."""
        found = await self._seams.threads.run(root_of, shard.sealed)
        if found != shard.root:
            raise Corrupt(f"sector {shard.sector_id}: what is stored has the root {found[:12]} instead of {shard.root[:12]}")
        return shard

    def _open_whole(self, sealed: bytes, sector_root: str, sector_id: int) -> bytes:
        found = root_of(sealed)
        if found != sector_root:
            raise Corrupt(f"sector {sector_id}: what is stored has the root {found[:12]} ({len(sealed)} bytes)")
        header = self._known_header(sealed[:HEADER_SIZE], sector_id)
        return open_shard(self._epochs.key_for(sector_id, self._keys), header, sealed)

    def _known_header(self, raw: bytes, sector_id: int) -> ShardHeader:
        """The header metadata says this id has, with the length from `raw`; Corrupt if `raw` is another. The length is unverified."""
        length = ShardHeader.parse(raw).plaintext_length
        expected = self._epochs.header_for(self._volume_id, sector_id, length)
        check_header(expected, raw)
        return expected

    async def _fetch(
        self,
        number: int,
        sector_root: str,
        sector_id: int,
        fetch: Callable[[Host], Awaitable[bytes | _Opened[T]]],
        part: tuple[int, int] | None,
        size: int,
        verify: Callable[[bytes], T],
        *,
        named: bool = False,
    ) -> T:
        """Fetch and verify (unless `fetch` has); the host's record gets a success only if both went well, with the time of the fetch.
        `part`: offset and length of what `fetch` fetches of the sealed shard; None: all of it. Where a name is gone or wrong, a locked
        version is asked for, unless `named`."""
        what = f"sector {sector_id}, root {sector_root[:12]}"
        name = shard_name(self._volume_id, sector_root)

        async def fetch_or_version(host: Host) -> bytes | _Opened[T]:
            if named:
                return await fetch(host)
            known = await self._locked.fetch(host, number, sector_root, name, part or (0, MAX_SEALED))
            return known if known is not None else await fetch(host)

        started = self._seams.clock.monotonic()
        try:
            raw = await self._call(number, size, fetch_or_version)
            seconds = self._seams.clock.monotonic() - started
            if isinstance(raw, _Opened):
                moved, result = raw.size, raw.result
            else:
                moved, result = len(raw), verify(raw) if len(raw) <= INLINE else await self._seams.threads.run(verify, raw)
        except trio.Cancelled:
            # Another was quicker, or nobody wants it any more: it would have taken longer than this.
            if self._hostdb.gave_up(number, size, self._seams.clock.monotonic() - started):
                self._registry.suspect(number)
            raise
        except (Corrupt, NotFound) as error:
            # Also of a shard that should be there and is gone: as bad as a damaged one.
            self._hostdb.failed(number, error, ("read",))
            if isinstance(error, NotFound):
                # Perhaps it is all gone, or its disk is: then nothing may be put there, which the next mount would not take for the host.
                self._registry.suspect(number)
            about = _about(error, f"host {self._registry.url(number)}, {what}", what)
            if named:
                raise about from error
            kept = await self._find_version(number, sector_root, name, about)
            kept = kept if part is None else kept[part[0] : part[0] + part[1]]
            return verify(kept) if len(kept) <= INLINE else await self._seams.threads.run(verify, kept)
        except Unavailable as error:
            self._hostdb.failed(number, error)
            raise Unavailable(f"{what}: {error}") from error
        self._hostdb.succeeded(number, "read", moved, seconds)
        return result

    async def _find_version(self, number: int, root: str, name: str, error: Corrupt | NotFound) -> bytes:
        """The whole sealed shard, from a version that a lock kept; `error` where there is none."""

        async def find(host: Host) -> bytes:
            holders = decode_holders(self._store.get(holders_key(check_root(root), number)), check_root(root))
            return await self._locked.find(host, number, root, name, holders, error)

        return await self._call(number, _UNKNOWN_SIZE, find)

    # ----------------------------------------------------------------------------------------------------------------
    # Writing

    def seal(self, data: Sequence[Buffer], sector_id: int) -> SealedShard:
        """Blocking, for a thread: seal once what goes to several hosts.

        I1: BadArgument if this process has sealed other data under the id, cannot remember whether it has, or the id was reserved
        by an earlier epoch, whose process may have.
        """
        return self.seal_all([data], sector_id)[0]

    def seal_all(self, plaintexts: Sequence[Sequence[Buffer]], sector_id: int) -> list[SealedShard]:
        """As `seal`, of several under `sector_id` and the ids that follow."""
        jobs = self._jobs(plaintexts, sector_id)
        return self._spent(jobs, SEALING.seal_all(jobs))

    def _jobs(self, plaintexts: Sequence[Sequence[Buffer]], sector_id: int) -> list[Job]:
        jobs: list[Job] = []
        for following, data in enumerate(plaintexts, sector_id):
            header = self._epochs.header_for(self._volume_id, following, sum(memoryview(piece).nbytes for piece in data))
            if header.epoch != self._epochs.current.number:
                raise BadArgument(f"sector {following}: its id was reserved in epoch {header.epoch}, nothing new is sealed under it (I1)")
            jobs.append((self._epochs.key_for(following, self._keys), header, data))
        return jobs

    def _spent(self, jobs: Sequence[Job], made: Sequence[tuple[Buffer, str]]) -> list[SealedShard]:
        shards: list[SealedShard] = []
        for (_, header, _), (sealed, root) in zip(jobs, made, strict=True):
            # Before anybody but this function has the sealed bytes.
            self._sealed.spend(header.sector_id, bytes.fromhex(root))
            shards.append(SealedShard(root, header.sector_id, header.plaintext_length, sealed))
        return shards

    async def sealed(self, plaintexts: Sequence[Sequence[Buffer]], sector_id: int) -> list[SealedShard]:
        """As `seal_all`, beside the event loop. Goes on to its end when it is cancelled."""
        if self._seams.threads.apart and max(map(len, plaintexts)) <= PIECES:
            jobs = self._jobs(plaintexts, sector_id)
            begun = SEALING.begin_sealing(jobs)
            if begun is not None:
                # It may be at work in what is held here, and a shard whose root nobody has noted was sealed (I1).
                with trio.CancelScope(shield=True):
                    try:
                        made = begun.end() if await begun.soon() else await self._seams.threads.run(begun.end)
                    except BaseException:
                        # There are no threads to be had, say.
                        begun.forsake()
                        raise
                if made is not None:
                    return self._spent(jobs, made)
        return await self._seams.threads.run(self.seal_all, plaintexts, sector_id)

    async def write(self, contract_id: str, data: Buffer, sector_id: int) -> str:
        """Seal and store; durable on the host when it returns the root. The caller never uses `sector_id` for other data (I1)."""
        self._must_be_active(contract_id)
        shard = await self._seams.threads.run(self.seal, [data], sector_id)
        await self.write_sealed(contract_id, shard)
        return shard.root

    async def write_sealed(self, contract_id: str, shard: SealedShard, placed: list[Placed] | None = None, *, beside: int = 0) -> None:
        """Store a sealed shard under its root; durable on the host when it returns.

        `beside`: bytes that go to other hosts at the same time, maybe over the same line: as much more time it gets.

        That the contract holds it is applied to the metadata store, and durable with the commit that points to it: there is no await from
        there to the caller. One who does not point to it at once gives `placed`: then it is for `hold`, and a crash before that leaves a
        shard on the host that is on no record, for the sweep.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        await self._registry.uplink.take(len(shard.sealed))
        self._must_be_active(contract_id)
        contract = self._contractor.contract(contract_id)
        number, root = contract.host_number, check_root(shard.root)
        name, key = shard_name(self._volume_id, shard.root), holders_key(root, number)

        version, locked_ns = "", 0

        async def put(host: Host) -> None:
            nonlocal version, locked_ns
            version, locked_ns = await self._locked.put(host, name, shard, contract.end_ns)

        what = f"sector {shard.sector_id}, root {shard.root[:12]}"
        async with self._exclusively(key):
            if self._stopped:
                raise Unavailable(f"{what}: the volume is being closed")
            self._unsettled[number] += 1
            await self._recorded(number, what, put, len(shard.sealed), ("write",), beside)
            self._seams.failpoints.hit("host_io.write.before_apply")
            stored = Placed(number, root, contract.lineage, version, locked_ns)
            if placed is None:
                self.hold(stored)
            else:
                placed.append(stored)

    def hold(self, placed: Placed) -> None:
        """The contract holds it from now on. No await: applied in one step with what points to it."""
        key = holders_key(placed.root, placed.host_number)
        holders = decode_holders(self._store.get(key), placed.root)
        holders.write(placed.lineage)
        holders.stored_version, holders.locked_ns = placed.stored_version, placed.locked_ns
        batch = Batch()
        batch.put(key, holders.encode())
        self._store.apply(batch)
        self._unsettled[placed.host_number] -= 1

    async def adopt(self, contract_id: str, sector_root: str) -> None:
        """The contract holds the root from now on: its host has it already. Applied to the metadata store."""
        contract = self._contractor.contract(contract_id)
        root = check_root(sector_root)
        key = holders_key(root, contract.host_number)
        async with self._exclusively(key):
            holders = decode_holders(self._store.get(key), root)
            holders.write(contract.lineage)
            batch = Batch()
            batch.put(key, holders.encode())
            self._store.apply(batch)

    def unsettled(self, number: int) -> bool:
        """May the host hold a shard this process has put there and has no record of? True for good after a put that failed."""
        return self._unsettled[number] > 0

    def stop_writing(self) -> None:
        """From now on `write` and `write_sealed` raise Unavailable. For the end of the volume."""
        self._stopped = True

    async def replace(self, contract_id: str, data: Buffer, sector_id: int, old_sector_root: str) -> str:
        """Write, then delete `old_sector_root`, which I3 has released. After a failure the old one is still there."""
        check_root(old_sector_root)
        root = await self.write(contract_id, data, sector_id)
        if root != old_sector_root:
            self._seams.failpoints.hit("host_io.replace.before_delete")
            await self.delete(contract_id, old_sector_root)
        return root

    async def delete(self, contract_id: str, sector_root: str) -> None:
        """The contract no longer holds the root; it is unlinked if no active contract on that host holds it. Unknown roots are no error.

        Also through a contract that has ended. After Unavailable the release stands, and calling again unlinks.
        """
        await trio.lowlevel.checkpoint()
        number = self._contractor.contract(contract_id).host_number
        root = check_root(sector_root)
        name, key = shard_name(self._volume_id, sector_root), holders_key(root, number)

        async def unlink(host: Host) -> None:
            await host.delete(name)

        async with self._exclusively(key):
            raw = self._store.get(key)
            holders = decode_holders(raw, root)
            if raw is not None:
                holders.release(self._contractor.claim(contract_id), self._contractor.latest_ordinal)
                batch = Batch()
                batch.put(key, holders.encode())
                self._store.apply(batch)
            if holders.held(self._contractor.active_claims(number)):
                return
            self._seams.failpoints.hit("host_io.delete.before_unlink")
            try:
                await self._recorded(number, f"root {sector_root[:12]}", unlink, 0, ("write",))
            except NotPermitted as error:
                self._may_not_delete(number, error)
            if raw is not None:
                batch = Batch()
                batch.delete(key)
                self._store.apply(batch)

    def _may_not_delete(self, number: int, error: NotPermitted) -> None:
        """Postponed, not failed: the shard is on no record any more, and the host is owed a sweep, by whoever may delete."""
        self._unsettled[number] += 1
        if number not in self._undeletable:
            self._undeletable.add(number)
            log.warning("%s; what is not needed any more stays there until a process that may delete has the volume", error)

    def undeletable(self) -> list[int]:
        """Hosts on which these credentials may not delete, as far as was tried."""
        return sorted(self._undeletable)

    def _must_be_active(self, contract_id: str) -> None:
        contract = self._contractor.contract(contract_id)
        if not contract.active(self._seams.clock.time_ns()):
            url = self._registry.url(contract.host_number)
            raise Expired(
                f"contract {contract_id} on host {url} is not in force; renew it: fusefs contracts VOLUME renew {contract_id} DAYS"
            )

    # ----------------------------------------------------------------------------------------------------------------
    # Calling hosts

    async def _recorded(
        self,
        number: int,
        what: str,
        call: Callable[[Host], Awaitable[None]],
        size: int,
        directions: Iterable[Direction],
        beside: int = 0,
    ) -> None:
        """A change on a host, recorded in the HostDB; errors say `what` it was about."""
        started = self._seams.clock.monotonic()
        try:
            await self._call(number, size, call, sent=size, beside=beside)
        except NoSpace as error:
            self._hostdb.failed(number, error, directions)
            raise NoSpace(f"{what}: {error}") from error
        except Unavailable as error:
            self._hostdb.failed(number, error)
            raise Unavailable(f"{what}: {error}") from error
        for direction in directions:
            self._hostdb.succeeded(number, direction, size, self._seams.clock.monotonic() - started)

    async def _call(self, number: int, size: int, call: Callable[[Host], Awaitable[T]], sent: int = 0, beside: int = 0) -> T:
        """Unavailable if the host takes longer than `size` bytes may take. An Unavailable host is looked at again by the registry.

        `sent`: bytes of an object that go to the host; how many come from it is seen. `beside`: see `write_sealed`.
        """
        host = self._registry.get(number)
        if self._registry.remote(number):
            limit = self._timeout + (size + beside) / min(self._slowest, SLOWEST_REMOTE)
        else:
            limit = self._timeout + size / self._slowest
        received = 0
        try:
            with trio.move_on_after(limit):
                answer = await call(host)
                received = len(answer) if isinstance(answer, bytes) else answer.size if isinstance(answer, _Opened) else 0
                return answer
            raise Unavailable(f"host {host.url} did not answer within {limit:.0f} s")
        except Unavailable:
            self._registry.suspect(number)
            raise
        finally:
            self._hostdb.requested(number, sent, received)

    @asynccontextmanager
    async def _exclusively(self, key: bytes) -> AsyncIterator[None]:
        """One write or deletion of a shard on a host at a time: the record of holders must not part from what is there."""
        turn, users = self._changing.get(key) or (Turn(), 0)
        self._changing[key] = (turn, users + 1)
        try:
            await turn.acquire()
            try:
                yield
            finally:
                turn.release()
        finally:
            turn, users = self._changing[key]
            if users == 1:
                del self._changing[key]
            else:
                self._changing[key] = (turn, users - 1)

    def __repr__(self) -> str:
        return f"<HostIO of volume {self._volume_id.hex()[:8]}, {len(self._changing)} changes under way>"


@dataclass(frozen=True, slots=True)
class _Opened(Generic[T]):
    """What was verified where it was fetched; `size`: bytes that were fetched."""

    size: int
    result: T


def _lend_small(size: int) -> memoryview:
    """As `Buffers.lend`, for what malloc has at hand."""
    return memoryview(bytearray(size))


def _about(error: Corrupt | NotFound, damaged: str, gone: str) -> Corrupt | NotFound:
    """The error with what it is about."""
    about = Corrupt(f"{damaged}: {error}") if isinstance(error, Corrupt) else NotFound(f"{gone}: {error}")
    about.__cause__ = error
    return about


def _check_end(sector_id: int, raw: bytes, start: int, stop: int) -> None:
    """Corrupt unless `raw`, read from `start` on, ends exactly at `stop`."""
    if len(raw) != stop - start:
        what = "ends before" if len(raw) < stop - start else "goes on after"
        raise Corrupt(f"sector {sector_id}: the shard {what} byte {stop}, where it should end or go on")
