"""Reading one shard: from memory while it is on its way to a host, from the local disk, from the best host, from the next one when one
fails or is slow (hedging), or, of `k+m`, made of others."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from storage.contractor import Contractor
from storage.errors import Corrupt, FusefsError, NotFound, Unavailable
from storage.host_io import HostIO
from storage.hosts.hostdb import HostDB
from storage.interfaces import Buffer, SealedShard
from storage.sealing import BLOCK, TAG_SIZE, block_count
from storage.seams import Seams
from storage.sectors.hedging import Attempt, Hedging
from storage.sectors.notes import Notes
from storage.sectors.records import SectorRecord, ShardRecord, layout_for
from storage.sectors.redundancy import Layout
from storage.sectors.staging import Staging

log = logging.getLogger("fusefs.sectors")

#: Blocks that are read in the event loop at most, where they are at hand.
SOON = 8
#: Blocks that are asked for together where a request takes far longer than they do: of a host that is not a disk of this machine.
TOGETHER = 4


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


class ShardReader:
    """See the module. Keeps nothing of what it reads."""

    def __init__(self, host_io: HostIO, contractor: Contractor, hostdb: HostDB, seams: Seams) -> None:
        self._host_io = host_io
        self._contractor = contractor
        self._hostdb = hostdb
        self._seams = seams
        self.hedging = Hedging(hostdb, seams)
        #: The sealed bytes of a shard (sector id, number) that is still on its way to a host, for as long as they are in memory anyhow. At
        #: write quorum a sector can be read, and some of its shards are nowhere yet: without this, reading one of k+m would touch k hosts.
        self.in_flight: Callable[[int, int], SealedShard | None] = lambda _sector_id, _number: None
        #: Shards on the local disk; None: there are none.
        self.staging: Staging | None = None
        self.notes = Notes()
        #: (sector id, root, host): the copy was not there, or did not verify. Told once per read; no await, never fails.
        self.on_damage: Callable[[int, bytes, int], None] = lambda _sector_id, _root, _host: None

    def near(self, shard: ShardRecord) -> bool:
        """Is it on a disk of this machine?"""
        return any(self._host_io.quick.near(host) for host in shard.hosts)

    def at_hand(self, shard: ShardRecord) -> bool:
        """Is it on a disk of this machine, or in memory?"""
        return self.near(shard) or not shard.hosts or self.is_staged(shard.root)

    def is_staged(self, root: bytes) -> bool:
        """Is it on the local disk, on its way to hosts or as a copy?"""
        return self.staging is not None and self.staging.files.has(root)

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
                pieces.append(await self.fetch(sector_id, record, layout, number, first, together))
            except (Corrupt, Unavailable):
                pieces += [await self.fetch(sector_id, record, layout, number, first + at, 1) for at in range(together)]
        return b"".join(pieces)

    async def fetch(self, sector_id: int, record: SectorRecord, layout: Layout, number: int, first: int, count: int) -> Buffer:
        """Blocks of a shard's plaintext, from a host that has it, or the same blocks of others made into them. Corrupt, Unavailable."""
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
        host = self.soon_from(sector_id, record, number)
        if host is None:
            return None
        shard = record.shards[number]
        return await self._host_io.quick.read_soon(host, shard.root.hex(), shard.shard_id, first, length, shard.length)

    def soon_from(self, sector_id: int, record: SectorRecord, number: int) -> int | None:
        """The host that would be asked first for a shard; None: none is to be asked."""
        shard = record.shards[number]
        if not shard.hosts or self.in_flight(sector_id, number) is not None or self.is_staged(shard.root):
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
        if self.staging is None or not self.is_staged(wanted.record.shards[number].root):
            return None
        try:
            return await self.staging.files.read(wanted.record.shards[number], wanted.first, wanted.length)
        except FusefsError as error:
            log.warning("sector %d: what is staged of it cannot be used: %s", wanted.sector_id, error)
            return None

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
            self.notes.add(note, wanted.sector_id, host)
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
        shards = wanted.record.shards
        others = [other for other in range(len(shards)) if other != number]
        at_hand = [it for it in others if self.in_flight(wanted.sector_id, it) is not None or self.is_staged(shards[it].root)]
        of_host = {host: other for other in others for host in shards[other].hosts}
        return list(dict.fromkeys([*at_hand, *(of_host[host] for host in self._hostdb.rank(of_host))]))
