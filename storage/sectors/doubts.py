"""Doubts: places on record that may hold nothing any more, because their host has forgotten things (it was pruned, say).

A doubted place counts for no replication until it was read, so nothing is thought safe, and no good copy dropped, for its sake; it stays
on record as long as it may be the last, and is read from like any other. Reconcile reads it when it mends the sector: a good one is
doubted no more, the rest is made again, there or elsewhere. What no other host has is tried again now and then: it may come back with the
host's backup.

| key | value | meaning |
|---|---|---|
| `y` + sector id u64 + host u32 | empty | doubted |
| the same | `l` | it was looked for, and is not there |
| `w` + "doubted." + host in decimal digits | empty | all sectors said to be on the host are still to be doubted: it counts for none |
"""

from __future__ import annotations

import logging

from storage.contractor import Contractor
from storage.errors import Corrupt, FusefsError, NotFound
from storage.host_io import HostIO
from storage.interfaces import Batch, MetadataStore
from storage.metadata.keys import DOUBTED, SETTING, UNDERREPLICATED, prefix_end, read_u32, u32, u64
from storage.sealing import block_count
from storage.sectors.records import SectorRecord
from storage.sectors.walking import walk
from storage.wording import counted

log = logging.getLogger("fusefs.reconcile")

_HOSTS = SETTING + b"doubted."
MISSING = b"l"
#: Of a host's number.
_DIGITS = len(str(2**32))


class Doubts:
    """What reconcile knows of them. Synchronous but for `walk` and `look`."""

    def __init__(self, store: MetadataStore, host_io: HostIO, contractor: Contractor) -> None:
        self._store = store
        self._host_io = host_io
        self._contractor = contractor
        #: Is there any doubt at all? Asked for each sector, again and again.
        self._some = bool(store.scan(_HOSTS, prefix_end(_HOSTS), 1) or store.scan(DOUBTED, prefix_end(DOUBTED), 1))

    def forgot(self, batch: Batch, number: int) -> None:
        """In `batch`: the host has forgotten what it had; every place on it is doubted from now on."""
        batch.put(_HOSTS + b"%d" % number, b"")
        self._some = True

    def forgetful(self) -> set[int]:
        """Hosts whose sectors are still to be doubted one by one."""
        found = [key[len(_HOSTS) :] for key, _ in self._store.scan(_HOSTS, prefix_end(_HOSTS), 2000)]
        # Of damaged keys none, leading zeros among them: `walk` would not find it to take it away, and rounds go on until there is none.
        return {int(name) for name in found if name.isdigit() and len(name) <= _DIGITS and name == b"%d" % int(name) and int(name) < 2**32}

    def of(self, sector_id: int) -> set[int]:
        """Hosts that do not count for the sector."""
        if not self._some:
            return set()
        start = DOUBTED + u64(sector_id)
        one_by_one = {read_u32(key, 9) for key, _ in self._store.scan(start, prefix_end(start), 2000) if len(key) == 13}
        return one_by_one | self.forgetful()

    def missing(self, limit: int = 100_000) -> int:
        """Places that were looked for and not found, and of which nothing could be made again so far."""
        return sum(1 for _, mark in self._store.scan(DOUBTED, prefix_end(DOUBTED), limit) if mark == MISSING)

    def clear(self, batch: Batch, sector_id: int, host: int | None = None) -> None:
        """In `batch`: the shard is there for certain; or (host None) the sector is as it should be, or gone."""
        for number in self.of(sector_id) if host is None else [host]:
            key = DOUBTED + u64(sector_id) + u32(number)
            if self._store.get(key) is not None:
                batch.delete(key)

    async def walk(self) -> None:
        """Each sector on a host that has forgotten things is doubted there, and on the list of what is to be mended. Starts over after a
        crash."""
        self._some = self._some and bool(self.forgetful() or self._store.scan(DOUBTED, prefix_end(DOUBTED), 1))
        for number in sorted(self.forgetful()):
            doubted = 0
            async for sector_id, record in walk(self._store):
                mark = DOUBTED + u64(sector_id) + u32(number)
                if any(number in shard.hosts for shard in record.shards) and self._store.get(mark) is None:
                    batch = Batch()
                    batch.put(mark, b"")
                    batch.put(UNDERREPLICATED + u64(sector_id), b"")
                    self._store.apply(batch)
                    doubted += 1
            batch = Batch()
            batch.delete(_HOSTS + b"%d" % number)
            self._store.apply(batch)
            log.warning(
                "host %d has forgotten things: what it had is looked for there, and made again where it is missing: %s",
                number,
                counted(doubted, "sector"),
            )

    async def look(self, sector_id: int, record: SectorRecord) -> None:
        """Look for the doubted shards of a sector. What cannot be read now stays doubted."""
        for number in sorted(self.of(sector_id)):
            contract = self._contractor.contract_for(number)
            here = [shard for shard in record.shards if number in shard.hosts]
            batch = Batch()
            key = DOUBTED + u64(sector_id) + u32(number)
            try:
                for shard in here:
                    if contract is None:
                        raise NotFound(f"there was no contract with host {number}")
                    # Its last block, in one request: what was cut off is noticed, and so is what is another shard's.
                    last = block_count(shard.length) - 1
                    await self._host_io.probe(contract.contract_id, shard.root.hex(), shard.shard_id, shard.length, last)
                batch.delete(key)
            except (NotFound, Corrupt) as error:
                log.info("sector %d: its place on host %d is empty: %s", sector_id, number, error)
                batch.put(key, MISSING)
            except FusefsError as error:
                log.info("sector %d: whether it is on host %d is not known yet: %s", sector_id, number, error)
                continue
            if self._store.get(key) is not None:
                self._store.apply(batch)
