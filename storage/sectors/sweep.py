"""The sweep: shards on hosts that nothing here knows of are deleted, if it is sure that they were this volume's own and never committed.

A shard is on a host before its record is in the journal (I2), so a crash in between leaves it on the host and on no record. The same
goes for a put whose answer was lost. Nobody would ever delete it. The sweep lists what a host holds, and looks at the header of what has
no holders record (`r`). It deletes only (I5) what was sealed

- for this volume, by an epoch of this history: number and salt are on record;
- by an *earlier* epoch than the current one, though not before the latest recovery (below): so nothing this process has on its way is ever
  touched, and, since nothing is sealed under an earlier epoch any more, what is on no record now never will be;
- under a sector id that this epoch owns, and no freed sector names the root (the deleter's turn);
- with no sector on record under that id, or one that has all it needs on other hosts, and does not name this one: a crash between the put
  and the record of one copy more, when shards are made again or moved, leaves such;

and only through the same gate as the deleter (I3): once every kept superblock generation is of the current epoch, hence does not know the
shard there either (what a record has named since has a holders record until it is deleted), and after the host's own superblock was found
ours. Everything else stays, and is counted.

When: a host is owed a sweep of the epochs below E unless it is on record that it has none of their orphans. That is put on record when a
sweep of it ends, and when a volume is closed and every put on the host was answered and recorded (`settle`); so it costs nothing after
a clean end. After a recovery nothing of the epochs before it is swept: the machine that had the volume may still be there, fenced, and what
it put on hosts after its last superblock is only on record in its own directory, from which somebody may want to read it (`fusefs check`
counts it). Key `L` + "recovered", u32: the epoch the latest recovery began. Record, under the key `L` + "swept." + host
number in decimal digits:

| bytes | field |
|---|---|
| 4 | swept: no orphans of epochs below this one |
| 4 | target of the sweep under way, 0 if none is: it will raise `swept` to this |
| 2 | next of the 256 directories of shards it has to look at |
| 1 | 1 if it has met a shard that a sector names, freed or lacking something, but not as being on this host |

The last: a copy that was put and not recorded, which may be adopted when the sector's copies are made complete again, and is one too many
after that. So such a host is owed another sweep at the next open.

It runs in the background: 256 directories a host, one after the other with a pause in between, one header at a time; not more than
`PAGE` names are in memory besides what the host's own listing holds. A host that fails is tried again later, from where it was.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass

import trio

from storage.contractor import Contractor
from storage.epochs import Epochs
from storage.errors import BadArgument, Corrupt, Fenced, FusefsError, NotFound, Unavailable
from storage.host_io import HostIO
from storage.hosts.holders import holders_key
from storage.hosts.layout import check_root, sectors_prefix, shard_name
from storage.hosts.registry import HostRegistry
from storage.interfaces import Batch, HistoryGate, Host, MetadataStore
from storage.metadata.keys import FREED, LOCAL, SECTOR, prefix_end, read_u32, read_u64, u64
from storage.sealing import HEADER_SIZE, ShardHeader
from storage.seams import Seams
from storage.sectors.records import decode_sector
from storage.wording import counted

log = logging.getLogger("fusefs.sectors")

#: Seconds from the opening of the volume: what a process that died had asked of a host has happened by then, or never will.
START_DELAY = 60.0
#: Seconds between two directories.
PAUSE = 0.05
#: Shards without a record that are looked at in one go.
PAGE = 256
#: Directories between two notes of how far it is.
NOTE_EVERY = 16
#: Seconds any question to a host may take.
TIMEOUT = 20.0
#: Seconds until a host that failed is tried again, doubling; also between two looks at whether the gate is open.
RETRY_FIRST, RETRY_LAST = 30.0, 3600.0
#: Entries looked at between two checkpoints.
_SLICE = 64
#: See the module.
RECOVERED_KEY = LOCAL + b"recovered"
#: Directories of shards on a host: the first two digits of a root.
_DIRECTORIES = 256

_STATE = struct.Struct(">IIHB")


@dataclass(slots=True)
class SweepCounts:
    """What a sweep has seen: shards listed, shards deleted, and what is on no record but stays, because it may be somebody else's."""

    listed: int = 0
    deleted: int = 0
    kept: int = 0


@dataclass(slots=True)
class _State:
    swept: int
    target: int = 0
    directory: int = 0
    named: int = 0

    def encode(self) -> bytes:
        return _STATE.pack(self.swept, self.target, self.directory, self.named)


def _key(number: int) -> bytes:
    return LOCAL + b"swept.%d" % number


class Sweeper:
    """See the module. `run` once, in a task; `settle` when the volume is closed."""

    def __init__(
        self,
        store: MetadataStore,
        volume_id: bytes,
        epochs: Epochs,
        hosts: HostRegistry,
        contractor: Contractor,
        host_io: HostIO,
        gate: HistoryGate,
        surplus: Callable[[int, bytes, int], bool],
        seams: Seams,
        *,
        pause: float = PAUSE,
    ) -> None:
        """After the current epoch has begun: what is owed depends on it. `surplus`: see `Mender.surplus`."""
        self._store = store
        self._volume_id = volume_id
        self._epochs = epochs
        self._hosts = hosts
        self._contractor = contractor
        self._host_io = host_io
        self._gate = gate
        self._surplus = surplus
        self._seams = seams
        self._pause = pause
        self._current = epochs.current.number
        raw = store.get(RECOVERED_KEY)
        self._floor = read_u32(raw) if raw is not None and len(raw) == 4 else 0
        self._lineage = {epoch.number: epoch.salt for epoch in epochs.all()}
        #: I3: a superblock of an earlier commit could still know what we do not. From the epoch's first commit on, what earlier epochs put
        #: somewhere and is on no record there never will be.
        self.since = epochs.current.first_sequence
        #: Hosts that have had their sweep, and are owed another one at the next open.
        self._again: set[int] = set()
        #: For `status` and the log.
        self.counts = SweepCounts()

    # ----------------------------------------------------------------------------------------------------------------
    # What is owed

    def _state(self, number: int) -> _State:
        raw = self._store.get(_key(number))
        if raw is None or len(raw) != _STATE.size:
            # Also if it is damaged: sweeping once more harms nobody.
            return _State(min(self._lineage))
        return _State(*_STATE.unpack(raw))

    def _note(self, number: int, state: _State) -> None:
        batch = Batch()
        batch.put(_key(number), state.encode())
        self._store.apply(batch)

    def owed(self) -> list[int]:
        """Numbers of the hosts that may hold orphans of earlier epochs."""
        return [number for number in self._hosts.numbers() if self._state(number).swept < self._current and number not in self._again]

    def settle(self) -> bool:
        """At close, after the last commit but one: no shard is written from now on. True if there is something new to commit.

        Hosts that need no sweep, and on which every put of this process was answered and recorded, need none at the next open.
        """
        self._host_io.stop_writing()
        batch = Batch()
        for number in self._hosts.numbers():
            if self._state(number).swept == self._current and not self._host_io.unsettled(number):
                batch.put(_key(number), _State(self._current + 1).encode())
        self._store.apply(batch)
        return bool(batch.ops)

    # ----------------------------------------------------------------------------------------------------------------
    # Sweeping

    async def run(self) -> None:
        """Until nothing is owed, or cancelled. Never fails."""
        if not self.owed():
            return
        await self._seams.clock.sleep(START_DELAY)
        retry = RETRY_FIRST
        try:
            while self._gate.released_sequence() < self.since:
                self._gate.want_release(self.since)
                await self._seams.clock.sleep(RETRY_FIRST)
            while await self.sweep():
                await self._seams.clock.sleep(retry)
                retry = min(2 * retry, RETRY_LAST)
        except Fenced as error:
            log.info("the sweep of the hosts ends: %s", error)
        except FusefsError as error:
            log.warning("hosts are not swept before the next mount: %s", error)
        if self.counts.deleted or self.counts.kept:
            log.info(
                "swept: %s that no commit has deleted; on no record, and kept, since it may be of another history: %d",
                counted(self.counts.deleted, "shard"),
                self.counts.kept,
            )

    async def sweep(self) -> list[int]:
        """One pass over the hosts that are owed one; the numbers of those that have to be tried again. Fenced.

        The caller has seen to it that the gate has released `since`.
        """
        postponed: list[int] = []
        for number in self.owed():
            try:
                while number in self.owed():
                    await self._sweep_host(number)
            except Fenced:
                raise
            except FusefsError as error:
                log.info("sweeping host %s is postponed: %s", self._hosts.url(number), error)
                postponed.append(number)
        return postponed

    async def _sweep_host(self, number: int) -> None:
        """The rest of the directories, for the target begun earlier or else the current epoch."""
        state = self._state(number)
        if not state.target:
            state.target, state.directory = self._current, 0
        try:
            there = await _folders(self._hosts.get(number), sectors_prefix(self._volume_id))
            while state.directory < _DIRECTORIES:
                directory = f"{state.directory:02x}"
                if directory in there:
                    state.named |= await self._sweep_directory(number, directory)
                    await self._seams.clock.sleep(self._pause)
                state.directory += 1
                if state.directory % NOTE_EVERY == 0:
                    self._note(number, state)
        except FusefsError as error:
            if not isinstance(error, Fenced):
                self._note(number, state)
            raise
        if state.named:
            self._again.add(number)
        self._note(number, _State(state.swept if state.named else state.target))

    async def _sweep_directory(self, number: int, directory: str) -> bool:
        """True if there were shards that a sector names, but not as being there."""
        named = False
        host = self._hosts.get(number)
        prefix = f"{sectors_prefix(self._volume_id)}{directory}/"
        page: list[str] = []
        async with aclosing(_listing(host, prefix)) as names:
            async for name in names:
                self.counts.listed += 1
                root = name.removeprefix(prefix)
                try:
                    known = self._store.get(holders_key(check_root(root), number)) is not None
                except BadArgument:
                    known = False  # not what we call a shard: it will be kept
                if not known:
                    page.append(root)
                if len(page) >= PAGE:
                    named |= await self._examine(number, host, page)
                    page.clear()
                elif self.counts.listed % _SLICE == 0:
                    await trio.lowlevel.checkpoint()
        return await self._examine(number, host, page) or named

    async def _examine(self, number: int, host: Host, roots: list[str]) -> bool:
        """Delete what of these is an orphan. True if there are some that a sector names."""
        orphans: dict[str, int] = {}
        named = False
        for root in roots:
            try:
                check_root(root)
                header = ShardHeader.parse(await _head(host, shard_name(self._volume_id, root)))
            except NotFound:
                continue
            except (Corrupt, BadArgument):
                self.counts.kept += 1
                continue
            if self._is_ours(header):
                if self._unneeded(root, header.sector_id, number):
                    orphans[root] = header.sector_id
                else:
                    named = True
                    self.counts.kept += 1
            elif header.salt != self._lineage[self._current]:
                self.counts.kept += 1
        if orphans:
            named |= await self._leave_freed(orphans)
        if not orphans:
            return named
        contract = self._contractor.contract_for(number)
        if contract is None:
            self.counts.kept += len(orphans)
            return named
        # I5: with each page, since another machine may take the volume over at any time.
        if not await self._gate.confirm(number):
            raise Unavailable(f"host {host.url} does not confirm that its superblock is ours")
        for root, sector_id in orphans.items():
            if self._store.failure is not None:
                raise Fenced(self._store.failure)
            # Once more, right before: adding a copy of an old sector may have come in between. No await from here to the lock under which
            # HostIO deletes: what is put there from now on is put after the deletion.
            if self._store.get(holders_key(check_root(root), number)) is not None:
                continue
            if not self._unneeded(root, sector_id, number):
                named = True
                continue
            if self._record_of(sector_id) is not None:
                # Of a live sector. Another machine's record may have come to name this copy since the page was begun, and where something
                # hung, that is long ago: asked again for each, and everything else looked at again after it.
                if not await self._gate.confirm(number):
                    raise Unavailable(f"host {host.url} does not confirm that its superblock is ours")
                if self._store.get(holders_key(check_root(root), number)) is not None or not self._unneeded(root, sector_id, number):
                    named = True
                    continue
            if number in self._host_io.undeletable():
                # Asking for the others would get the same answer: another sweep is owed, by whoever may delete.
                self.counts.kept += 1
                named = True
                continue
            await self._host_io.delete(contract.contract_id, root)
            self.counts.deleted += 1
        return named

    def _is_ours(self, header: ShardHeader) -> bool:
        """Sealed by an earlier epoch of this history, under an id it owned."""
        if header.volume_id != self._volume_id or not self._floor <= header.epoch < self._current:
            return False
        if self._lineage.get(header.epoch) != header.salt:
            return False
        try:
            owner = self._epochs.for_sector(header.sector_id)
        except NotFound:
            return False
        return owner.number == header.epoch

    def _unneeded(self, root: str, shard_id: int, number: int) -> bool:
        """Is there no sector that has a shard of this id, or one that has no need of it on this host?"""
        try:
            sector_id = self._record_of(shard_id)
            return sector_id is None or self._surplus(sector_id, check_root(root), number)
        except Corrupt:
            return False

    def _record_of(self, shard_id: int) -> int | None:
        """The sector that has a shard of this id, if there is one: they have consecutive ids, the sector's own first. Corrupt."""
        found = self._store.scan(SECTOR, SECTOR + u64(shard_id) + b"\0", 1, reverse=True)
        if not found:
            return None
        if len(found[0][0]) != 9:
            raise Corrupt("a damaged key of a sector: it may be any")
        sector_id = read_u64(found[0][0], 1)
        record = decode_sector(found[0][1], sector_id)
        return sector_id if sector_id == shard_id or any(shard.shard_id == shard_id for shard in record.shards) else None

    async def _leave_freed(self, orphans: dict[str, int]) -> bool:
        """Take out what a freed sector names: its time has not come. True if there was any."""
        before = len(orphans)
        start, end = FREED, prefix_end(FREED)
        while entries := self._store.scan(start, end, _SLICE):
            for key, raw in entries:
                try:
                    sector_id = read_u64(key, 9)
                except Corrupt:
                    # It may name any of them.
                    orphans.clear()
                    continue
                try:
                    named = {shard.root.hex() for shard in decode_sector(raw, sector_id).shards}
                except Corrupt:
                    named = {root for root, other in orphans.items() if other == sector_id}
                for root in named & orphans.keys():
                    del orphans[root]
            start = entries[-1][0] + b"\0"
            await trio.lowlevel.checkpoint()
        self.counts.kept += before - len(orphans)
        return len(orphans) < before

    def __repr__(self) -> str:
        return f"<Sweeper {self.counts}, owed {self.owed()}>"


async def _head(host: Host, name: str) -> bytes:
    with trio.move_on_after(TIMEOUT):
        return await host.get_range(name, 0, HEADER_SIZE)
    raise Unavailable(f"host {host.url} did not answer within {TIMEOUT:.0f} s")


async def _folders(host: Host, prefix: str) -> set[str]:
    with trio.move_on_after(TIMEOUT):
        return set((await host.level(prefix)).folders)
    raise Unavailable(f"host {host.url} did not answer within {TIMEOUT:.0f} s")


async def _listing(host: Host, prefix: str) -> AsyncGenerator[str, None]:
    """Names below `prefix`; Unavailable if the host hangs."""
    listing = aiter(host.list(prefix))
    while True:
        with trio.move_on_after(TIMEOUT) as scope:
            try:
                name, _ = await anext(listing)
            except StopAsyncIteration:
                return
        if scope.cancelled_caught:
            raise Unavailable(f"host {host.url} did not answer within {TIMEOUT:.0f} s")
        yield name
