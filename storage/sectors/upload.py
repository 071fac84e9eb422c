"""Upload: one sector on its way to its hosts, for the first time.

As many shards at a time as there are places for, each to the next best host after a failure. At write quorum the record stands and the
writer goes on (I2); the rest follow. What was put and is named by nobody is queued for deletion.

Up to the quorum nothing on record says what is on hosts already, so that the sweep finds what a crash leaves there.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import trio

from storage.errors import Fenced, FusefsError, NoSpace, Unavailable
from storage.host_io import HostIO, Placed
from storage.interfaces import Batch, MetadataStore, SealedShard
from storage.metadata.keys import SECTOR, u64
from storage.sectors.deleter import Deleter
from storage.sectors.placement import Placement
from storage.sectors.records import VERSION, SectorRecord, ShardRecord
from storage.sectors.redundancy import Layout

log = logging.getLogger("fusefs.sectors")


class Landed(Protocol):
    """Write or rewrite the sector's record. No await inside. `full`: every shard is where it is to be."""

    def __call__(self, sector_id: int, replication: str, length: int, shards: list[ShardRecord], *, full: bool) -> None: ...


@dataclass(frozen=True, slots=True)
class Way:
    """What all uploads of a manager use."""

    host_io: HostIO
    placement: Placement
    deleter: Deleter
    store: MetadataStore
    landed: Landed
    #: Told of a sector that has too few copies for now, and why.
    note: Callable[[str, int], None]


class Upload:
    """See the module. `ended` is called once, when no shard is on its way any more."""

    def __init__(self, way: Way, sector_id: int, replication: str, layout: Layout, ended: Callable[[], None]) -> None:
        self._way = way
        self.sector_id = sector_id
        self._replication = replication
        self._layout = layout
        self._ended = ended
        self._shards: list[SealedShard] = []
        #: Per shard, the hosts that have it.
        self._hosts: list[list[int]] = [[] for _ in range(layout.shards)]
        #: What is on hosts, and not on record yet.
        self._placed: list[Placed] = []
        #: An earlier attempt may have queued the deletion of what is put there again: it waits until the record has it, or all have ended.
        self._spared = ExitStack()
        self._done = 0
        self._errors: list[FusefsError] = []
        self._running = 0
        #: Sealed bytes of all shards that are put at a time.
        self._together = 0
        self._decided = trio.Event()
        self._quorum = False
        self._finished = False

    def start(self, shards: Sequence[SealedShard], nursery: trio.Nursery) -> None:
        """Unavailable where too few hosts can be used: nothing was put."""
        self._shards = list(shards)
        self._left = self._way.placement.candidates(self._layout.spec)
        places = self._layout.places[: len(self._left)]
        self._running = len(places)
        # What each may take: on a slow line they share, all of them end late.
        self._together = sum(len(shards[shard].sealed) for shard in places)
        for shard, contract in [(shard, self._left.pop(0)) for shard in places]:
            nursery.start_soon(self._put, shard, contract.contract_id, contract.host_number)

    def sealed(self, number: int) -> SealedShard | None:
        """Shard `number`, unless it has not been sealed yet."""
        return self._shards[number] if self._shards else None

    async def wait_quorum(self) -> None:
        """Returns at write quorum; raises what kept it from being reached."""
        await self._decided.wait()
        if self._quorum:
            return
        for error in self._errors:
            if isinstance(error, Fenced):
                raise error
        # Each once, without what they all begin with: the sector and its root.
        said = "; ".join(dict.fromkeys(re.sub(r"^sector \d+, root [0-9a-f]{12}: ", "", str(error)) for error in self._errors))
        if any(isinstance(error, NoSpace) for error in self._errors):
            raise NoSpace(f"sector {self.sector_id}: hosts are full ({said})")
        raise Unavailable(f"sector {self.sector_id}: too few hosts took it ({said})")

    async def _put(self, shard: int, contract_id: str, host: int) -> None:
        try:
            while True:
                sealed = self._shards[shard]
                self._spared.enter_context(self._way.deleter.spared(bytes.fromhex(sealed.root), host))
                try:
                    beside = self._together - len(sealed.sealed)
                    await self._way.host_io.write_sealed(contract_id, sealed, self._placed, beside=beside)
                    self._stored(shard, host)
                    return
                except FusefsError as error:
                    self._errors.append(error)
                    log.warning("sector %d: host %d did not take its shard: %s", self.sector_id, host, error)
                    if not self._left or isinstance(error, Fenced):
                        return
                    following = self._left.pop(0)
                    contract_id, host = following.contract_id, following.host_number
        finally:
            self._running -= 1
            if not self._running:
                self.finish()

    def _stored(self, shard: int, host: int) -> None:
        self._hosts[shard].append(host)
        # Places that are filled: a shard that went to another host after it could not be recorded fills one all the same (I3).
        self._done = sum(min(len(hosts), self._layout.hosts_each) for hosts in self._hosts)
        if self._done < self._layout.spec.write_quorum:
            return
        self._hold()
        # After quorum the sector may have been freed already, while this shard was on its way: then it goes the way of the others.
        if self._quorum and self._way.store.get(SECTOR + u64(self.sector_id)) is None:
            self._drop([self._record(shard, [host])])
            return
        shards = [self._record(number, hosts) for number, hosts in enumerate(self._hosts)]
        self._way.landed(self.sector_id, self._replication, self._layout.length, shards, full=self._done >= self._layout.spec.hosts_needed)
        self._quorum = True
        self._decided.set()

    def _hold(self) -> None:
        """In one step with the record, or the queue, that names them."""
        # The list stays the same: puts under way append to it. One by one: what is held is not to be held again where the next is refused.
        while self._placed:
            self._way.host_io.hold(self._placed[0])
            del self._placed[0]

    def _record(self, shard: int, hosts: list[int]) -> ShardRecord:
        sealed = self._shards[shard]
        return ShardRecord(sealed.sector_id, sealed.plaintext_length, bytes.fromhex(sealed.root), sorted(hosts))

    def _drop(self, shards: list[ShardRecord]) -> None:
        batch = Batch()
        self._way.deleter.enqueue(batch, self.sector_id, SectorRecord(VERSION, self._replication, self._layout.length, 0, 0, shards))
        self._way.store.apply(batch)

    def finish(self) -> None:
        """No shard is on its way any more."""
        if self._finished:
            return
        self._finished = True
        wanted = self._layout.spec.hosts_needed
        if not self._quorum and self._done:
            # Nothing points to these: they are deleted, like a freed sector's.
            try:
                self._hold()
                self._drop([self._record(number, hosts) for number, hosts in enumerate(self._hosts) if hosts])
            except FusefsError as error:
                log.warning("sector %d: shards that nothing points to stay on their hosts: %s", self.sector_id, error)
        elif self._quorum and self._done < wanted:
            what = "shards" if self._layout.spec.coded else "copies"
            # Without an error there were no more hosts to ask.
            why = "; ".join(map(str, self._errors)) or f"no other host can take one{self._way.placement.besides()}"
            self._way.note(f"sector {self.sector_id} has {self._done} of {wanted} {what}: {why}", self.sector_id)
        self._decided.set()
        self._spared.close()
        # Whoever made it is in there, and it holds a sector's bytes: nothing of that waits for the collector of cycles.
        ended, self._ended = self._ended, _nothing
        ended()


def _nothing() -> None:
    return None
