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

What a *cut* of the history waits for here, see `cuts`; the files themselves, and room for them, `staged_files`.

Invariants kept here: I2 (`take` returns when the shards are durable), I3 (a shard is dropped only once full replication is durably on
record), I7 (a limit, and a reserve of the disk that is never used); see `staged_files`.

| a crash ... | leaves | and then |
|---|---|---|
| before the landing is durable | files nobody knows | they count as cached, and are the first to be dropped |
| after it | the mark | the drain goes on |
| before full replication is durable | the mark, and the files | as before; hosts that have a shard already take it once more |
| before a file is dropped | the file | it is cached |
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable
from pathlib import Path

from sortedcontainers import SortedDict

from storage.errors import Corrupt, FusefsError
from storage.host_io import HostIO
from storage.interfaces import Batch, MetadataStore
from storage.metadata.keys import LOCAL, SECTOR, prefix_end, read_u64, u64
from storage.seams import Seams
from storage.sectors.cuts import Cut, Staged
from storage.sectors.records import SectorRecord, decode_sector
from storage.sectors.redundancy import layout_of
from storage.sectors.staged_files import StagedFiles

log = logging.getLogger("fusefs.staging")

DIRECTORY = "staging"
STAGED = LOCAL + b"staged."
#: Marks looked at in one go.
SLICE = 500


class Staging:
    """See the module. `open` first; `files.run` in the volume's nursery. What is not async is atomic."""

    def __init__(
        self, directory: Path, volume_id: bytes, store: MetadataStore, host_io: HostIO, seams: Seams, *, limit: int, writable: bool = True
    ) -> None:
        """`limit`: bytes of files at most; 0: nothing is taken, what is there still goes to hosts."""
        self.path = directory / DIRECTORY
        self._store = store
        self.files = StagedFiles(self.path, volume_id, store, host_io, seams, limit=limit, writable=writable)
        self._sectors: dict[int, Staged] = {}
        #: Those below write quorum, by rank.
        self.below: SortedDict = SortedDict()
        self.cut = Cut(self.path)
        #: Sectors that are gone from here before they were on any host, and what to say of them.
        self.losses: dict[int, str] = {}
        #: Told when there is something new to send.
        self.on_staged: Callable[[], None] = lambda: None

    async def open(self) -> list[str]:
        """Look what is there. Returns what is wrong: sectors that should be here and are not. Blocks nothing."""
        try:
            await self.files.open()
        except FusefsError as error:
            self.files.trouble = f"staging cannot be used: {error}"
            log.error("%s", self.files.trouble)
        return self._load()

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
                    self.files.need(shard.root)
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

    def is_whole(self, entry: Staged) -> bool:
        """Are enough of its shards here to make all of them?"""
        needed = layout_of(entry.replication, entry.length).needed
        return sum(self.files.has(shard.root) for shard in entry.shards) >= needed

    async def proves_whole(self, entry: Staged) -> bool:
        """The same, after reading each of them: a coded sector's are else found damaged one by one, and never all."""
        for shard in entry.shards:
            if self.files.has(shard.root):
                try:
                    await self.files.sealed(shard)
                except FusefsError as error:
                    log.warning("sector %d: %s", entry.sector_id, error)
        return self.is_whole(entry)

    def is_here(self, record: SectorRecord) -> bool:
        """The same, of a record."""
        return sum(self.files.has(shard.root) for shard in record.shards) >= layout_of(record.replication, record.length).needed

    def only_here(self, sector_id: int) -> bool:
        """Is the sector below its write quorum, and should be here?"""
        entry = self._sectors.get(sector_id)
        return entry is not None and not entry.reached

    # ------------------------------------------------------------------------------------------------------------
    # Life of a sector here

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
            for shard in record.shards:
                self.files.settle(shard.root, remove=True)
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
            # Parity is not read while all is well.
            self.files.settle(shard.root, remove=remove or number >= needed)

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


def at_quorum(record: SectorRecord) -> bool:
    """Do as many hosts have it, by its record, as make it durable there (I2)?"""
    layout = layout_of(record.replication, record.length)
    return sum(len(shard.hosts) for shard in record.shards) >= layout.spec.write_quorum
