"""Deletes the shards of freed sectors on their hosts, once no superblock generation refers to them any more (I3).

Queue key `z`, commit sequence u64 (no smaller than the commit that freed it), sector id u64; value: the sector's record, with the hosts it
is still to be deleted on. Entries above the gate's released sequence stay, and nothing is deleted on a host whose superblock is not ours.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from storage.contractor import Contractor
from storage.errors import Corrupt, FusefsError, NotFound
from storage.interfaces import Batch, HistoryGate, HostIO, MetadataStore
from storage.metadata.keys import FREED, SECTOR, prefix_end, read_u64, u64
from storage.seams import Seams
from storage.sectors.records import SectorRecord, decode_sector

log = logging.getLogger("fusefs.sectors")

#: Entries looked at in one go; also bounds the time between two checkpoints.
SLICE = 64
#: Seconds until a host that did not delete is asked again.
RETRY_SECONDS = 30.0
#: Wait this long for more after the first: one commit then covers many.
GATHER_SECONDS = 1.0


class Deleter:
    """One loop over the queue."""

    def __init__(self, store: MetadataStore, host_io: HostIO, contractor: Contractor, seams: Seams) -> None:
        self._store = store
        self._host_io = host_io
        self._contractor = contractor
        self._seams = seams
        #: None: nobody publishes the history, so no superblock refers to anything.
        self.gate: HistoryGate | None = None
        self._wake = trio.Event()
        self._wake.set()
        #: (root, host) of shards that are being put there now, and by how many.
        self._spared: Counter[tuple[bytes, int]] = Counter()

    @contextmanager
    def spared(self, root: bytes, host: int) -> Iterator[None]:
        """While a shard is being put on a host once more: an earlier one's deletion waits, and then finds that the record names it."""
        self._spared[root, host] += 1
        try:
            yield
        finally:
            self._spared[root, host] -= 1
            if not self._spared[root, host]:
                del self._spared[root, host]

    def sparing(self, root: bytes, host: int) -> bool:
        """Is the shard being put on the host now?"""
        return (root, host) in self._spared

    def _wanted(self, sector_id: int, root: bytes, host: int) -> bool:
        """Is the shard on that host one that the sector's record names (again)?"""
        raw = self._store.get(SECTOR + u64(sector_id))
        if raw is None:
            return False
        # A record that cannot be read may name anything: Corrupt keeps the shard.
        return any(shard.root == root and host in shard.hosts for shard in decode_sector(raw, sector_id).shards)

    def enqueue(self, batch: Batch, sector_id: int, record: SectorRecord) -> None:
        """In the batch that frees the sector."""
        sequence = self._store.applied_sequence + 1
        # A copy that came late has an entry of its own: the sector's may still be here, or be what `drain` is at.
        while self._store.get(key := FREED + u64(sequence) + u64(sector_id)) is not None:
            sequence += 1
        batch.put(key, record.encode())
        self._wake.set()

    def wake(self) -> None:
        """Look again: something may be released by now."""
        self._wake.set()

    def pending(self, limit: int = 100_000) -> int:
        """Freed sectors still to be deleted."""
        return len(self._store.scan(FREED, prefix_end(FREED), limit))

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            await self._seams.clock.sleep(GATHER_SECONDS)
            try:
                left = await self.drain()
            except FusefsError as error:
                log.warning("deleting freed sectors is postponed: %s", error)
                left = 1
            if left:
                with trio.move_on_after(RETRY_SECONDS):
                    await self._wake.wait()
                self._wake.set()

    async def drain(self) -> int:
        """One pass over the queue; returns how many entries had to stay."""
        start, stayed = FREED, 0
        confirmed: dict[int, bool] = {}
        while entries := self._store.scan(start, prefix_end(FREED), SLICE):
            # I3: what was in the queue before this commit was freed by a batch that is durable after it.
            await self._store.commit()
            released = None if self.gate is None else self.gate.released_sequence()
            done = Batch()
            for key, raw in entries:
                try:
                    freed, sector_id = read_u64(key, 1), read_u64(key, 9)
                    if self.gate is not None and released is not None and freed > released:
                        # In the order of their sequence: neither are the ones that follow.
                        self._store.apply(done)
                        self.gate.want_release(freed)
                        return stayed + 1
                    record = decode_sector(raw, sector_id)
                except Corrupt as error:
                    # Its shards stay; those of the others need not.
                    log.error("%s", error)
                    stayed += 1
                    continue
                if await self._delete(sector_id, record, confirmed):
                    done.delete(key)
                else:
                    done.put(key, record.encode())
                    stayed += 1
            self._store.apply(done)
            start = entries[-1][0] + b"\0"
        return stayed

    async def _delete(self, sector_id: int, record: SectorRecord, confirmed: dict[int, bool]) -> bool:
        """True once no host holds a shard under an active contract; `record` keeps the hosts that did not answer.

        `confirmed`: hosts whose superblock was re-read in this pass, and whether it was ours (I3, I5).
        """
        complete = True
        for shard in record.shards:
            left: list[int] = []
            for host in shard.hosts:
                if self.gate is not None and host not in confirmed:
                    confirmed[host] = await self.gate.confirm(host)
                if not confirmed.get(host, True) or not await self._delete_on(host, sector_id, shard.root):
                    left.append(host)
            shard.hosts = left
            complete = complete and not left
        return complete

    async def _delete_on(self, host: int, sector_id: int, root: bytes) -> bool:
        now = self._seams.clock.time_ns()
        on_host = self._contractor.on_host(host)
        # Through every active contract, or the last one if none is in force any more.
        through = [contract for contract in on_host if contract.active(now)] or on_host[-1:]
        for contract in through:
            # No await from here to the lock under which HostIO deletes: what is put there from now on is put after the deletion.
            if self.sparing(root, host):
                return False
            try:
                if self._wanted(sector_id, root, host):
                    return True
                await self._host_io.delete(contract.contract_id, root.hex())
            except NotFound:
                continue
            except FusefsError as error:
                log.info("sector %d is not deleted on host %d yet: %s", sector_id, host, error)
                return False
        return True
