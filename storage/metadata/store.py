"""The metadata store: what it is asked and told, behind `MetadataStore`.

It answers from the memtable, and applies to it. The rest it has done: commits by `Committer`, room for them by `Room`, what comes after by
`Takeover`. Two threads of its own: one writes the journal, the other LMDB. State is changed on the event loop only.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from storage.errors import FusefsError, NoSpace
from storage.interfaces import Batch, TailPiece
from storage.metadata.changes import Changes, Replaying
from storage.metadata.committer import Committer
from storage.metadata.journal import Journal, KeyOf
from storage.metadata.keys import LOCAL, read_u64, u64
from storage.metadata.lmdb_base import LmdbBase
from storage.metadata.memtable import Memtable
from storage.metadata.pending import Pending
from storage.metadata.replay import RecoveredTails, Replayed
from storage.metadata.room import Room
from storage.metadata.rounds import Rounds
from storage.metadata.takeover import MAX_COST, MAX_KEYS, Progress, TailNeeded, Takeover
from storage.seams import Seams, Worker

#: Pending operations of this many bytes, or of half a segment if that is more, are committed without being asked for: they come in one
#: record, which must find room in one segment. Never more than this share of a small journal: it must be able to take them.
COMMIT_OPS = 1024 * 1024
COMMIT_SHARE = 8
#: While LMDB takes a layer over, the next one grows to so many times what makes a takeover due before those who can wait do.
AHEAD = 4
#: u64: the last commit that a majority of the hosts has. u64: the commit of metadata that came from hosts, and have no journal yet.
PUBLISHED_KEY = LOCAL + b"published"
RESTORED_KEY = LOCAL + b"restored"


class Store:
    """A MetadataStore; made by `opening.open_store`."""

    def __init__(
        self,
        base: LmdbBase,
        journal: Journal,
        memtable: Memtable,
        replayed: Replayed,
        replaying: Replaying,
        seams: Seams,
        key_of: KeyOf,
        tail_needed: TailNeeded,
    ) -> None:
        self._base, self._journal, self._memtable = base, journal, memtable
        self._seams, self._key_of = seams, key_of
        self._recovered = replayed.tails
        self._progress = Progress(taken=replayed.sequence, durable=replayed.sequence, chain=replayed.chain)
        self._writer: Worker = seams.worker("fusefs-journal")
        self._mover: Worker = seams.worker("fusefs-lmdb")
        self._pending = Pending(memtable, tail_needed)
        self._rounds = Rounds(journal)
        self._takeover = Takeover(memtable, base, journal, self._progress, seams, self._mover, tail_needed, self._rounds.ask)
        self._room = Room(journal, memtable, self._pending, self._takeover, self._progress, self._writer, seams)
        self._committer = Committer(
            journal, memtable, self._pending, self._rounds, self._room, self._takeover, self._progress, self._writer
        )
        self._commit_ops = min(max(COMMIT_OPS, journal.segment_size // 2), journal.limit_bytes // COMMIT_SHARE)
        if memtable.active.values:
            self._takeover.since = seams.clock.monotonic()
        #: What the hosts do not have yet of what was applied.
        self.changes = Changes()
        raw = memtable.get(PUBLISHED_KEY)
        self.published = read_u64(raw) if raw is not None and len(raw) == 8 else None
        replaying.into(self.changes, self.published, replayed.sequence)
        self._takeover.shipped = self.published

    def get(self, key: bytes) -> bytes | None:
        """See MetadataReader."""
        return self._memtable.get(key)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See MetadataStore."""
        return self._memtable.get_many(keys)

    def row(self, first: bytes, last: bytes, count: int) -> list[bytes] | None:
        """See MetadataStore."""
        return self._memtable.row(first, last, count)

    def scan(self, start: bytes, stop: bytes, limit: int, reverse: bool = False) -> list[tuple[bytes, bytes]]:
        """See MetadataReader."""
        return self._memtable.scan(start, stop, limit, reverse)

    # ---- state

    @property
    def failure(self) -> str | None:
        """Why nothing can be written any more; None while all is well."""
        return self._progress.failure

    @property
    def durable_sequence(self) -> int:
        return self._progress.durable

    @property
    def applied_sequence(self) -> int:
        return self._progress.taken + 1 if self._pending else self._progress.taken

    @property
    def journal_fill(self) -> float:
        return self._journal.fill

    @property
    def overdue(self) -> bool:
        memtable = self._memtable
        return memtable.pending_bytes >= self._commit_ops or (memtable.frozen is not None and self._ahead)

    @property
    def _ahead(self) -> bool:
        """More was changed while LMDB takes a layer over than memory should hold. Not where the disk refuses LMDB: the journal's limit is
        one, too."""
        active = self._memtable.active
        return (active.cost >= AHEAD * MAX_COST or len(active.values) >= AHEAD * MAX_KEYS) and not self._takeover.pausing

    def empties(self) -> None:
        """See MetadataStore."""
        self._pending.empties = True

    async def catch_up(self, urgent: bool = False) -> None:
        """See MetadataStore."""
        while self.overdue:
            if self._memtable.pending_bytes >= self._commit_ops:
                await self.commit(urgent=urgent)
                continue
            # Its thread needs the GIL for every record, which a loop that never rests leaves to it rarely.
            # A pass takes over what is frozen, or fails and then pauses. Not waited for for ever: what made it slow is looked at anew.
            await self._takeover.look()
            self._progress.check()

    @property
    def overfull(self) -> bool:
        # Half of that may come at any moment from what lands in the background, and goes again without anybody's help.
        # Half of that may come at any moment from what lands in the background, and goes again without anybody's help.
        return self._memtable.pending_bytes >= 2 * self._commit_ops and not self._room.takes(self._commit_ops, urgent=False)

    def can_spare(self, ops_bytes: int) -> bool:
        """See MetadataStore."""
        # With what hooks would add: times and sizes of many inodes.
        self._pending.run_hooks()
        return self._room.takes(ops_bytes, urgent=True)

    @property
    def trouble(self) -> FusefsError | None:
        return self._takeover.trouble

    def pinned_tails(self) -> list[tuple[int, int]]:
        return self._takeover.pinned(self._memtable)

    def recovered_tails(self) -> RecoveredTails:
        """Tails the journal held at open, of values that need them. The store forgets them: ask once, before anything is appended."""
        tails, self._recovered = self._recovered, []
        return RecoveredTails(tails, lambda value_id, end: self._takeover.tail_needed(self, value_id, end), self._key_of)

    # ---- the history on hosts

    def run_hooks(self) -> None:
        """Have applied what layers apply only when a commit is taken: before a cut. No await inside."""
        self._pending.run_hooks()

    def mark_published(self, sequence: int) -> None:
        """A majority of the hosts has the history up to this commit. Durable with the next commit; nothing depends on it but work saved."""
        if self.published is not None and sequence <= self.published:
            return
        batch = Batch()
        batch.put(PUBLISHED_KEY, u64(sequence))
        if self._memtable.get(RESTORED_KEY) is not None:
            batch.delete(RESTORED_KEY)
        self.apply(batch)
        self.published = self._takeover.shipped = sequence

    def fence(self, reason: str) -> None:
        """From now on nothing can be written, for `reason`, which must name the remedy. What is durable stays readable."""
        self._committer.fence(reason)

    # ---- changes

    @property
    def more_coming(self) -> Callable[[], bool]:
        """See `Committer`."""
        return self._committer.more_coming

    @more_coming.setter
    def more_coming(self, value: Callable[[], bool]) -> None:
        self._committer.more_coming = value

    def begin_epoch(self, epoch: int, salt: bytes) -> None:
        """What is committed from now on goes into segments of this epoch. Before the first commit. BadArgument: used before (I1)."""
        self._journal.begin_epoch(epoch, salt, self._key_of(salt))

    def add_commit_hook(self, hook: Callable[[], None]) -> None:
        self._pending.hooks.append(hook)

    def apply(self, batch: Batch, tails: Sequence[TailPiece] = ()) -> None:
        """See MetadataStore. Besides, BadArgument for keys and values no record can have, and NoSpace once more is pending than the
        journal can hold.
        """
        if self._progress.failure is not None:
            self._progress.check()
        memtable = self._memtable
        if memtable.pending_bytes > self._journal.limit_bytes:
            raise NoSpace("more metadata changes wait for a commit than the journal can hold; free some space on the local disk")
        ops = batch.ops
        if not ops and not tails:
            return  # Asked only whether it would do.
        if ops:
            memtable.apply(ops)
        self.changes.note(ops, bool(tails))
        if tails:
            pending = self._pending
            for tail in tails:
                length = tail.length
                if length:
                    pending.tails.append(tail)
                    pending.tail_bytes += length
            if not ops:
                return
        if self._takeover.since is None:
            self._takeover.since = self._seams.clock.monotonic()
        if memtable.active.cost >= MAX_COST or len(memtable.active.values) >= MAX_KEYS:
            self._overfull()
        elif memtable.pending_bytes >= self._commit_ops:
            self._rounds.ask()

    def commit(self, urgent: bool = False) -> Coroutine[Any, Any, int]:
        """See `Committer.commit`, whose coroutine it is: not one more for each fsync."""
        return self._committer.commit(urgent)

    def _overfull(self) -> None:
        """The memtable is large: LMDB must take it over; and if nobody commits, it is time somebody did."""
        self._takeover.consider()
        if self._memtable.pending_bytes >= MAX_COST or len(self._memtable.pending) >= MAX_KEYS:
            self._rounds.ask()

    # ---- room in the journal

    @property
    def on_pressure(self) -> Callable[[], None] | None:
        """See `Room`."""
        return self._room.on_pressure

    @on_pressure.setter
    def on_pressure(self, value: Callable[[], None] | None) -> None:
        self._room.on_pressure = value

    def has_room(self, ops_bytes: int, tail_bytes: int, tails: int, kept: float) -> bool:
        """See MetadataStore."""
        return self._journal.holds(self._room.wanted(ops_bytes, tail_bytes, tails, kept))

    async def make_room(self, ops_bytes: int, tail_bytes: int, tails: int, kept: float) -> bool:
        """See MetadataStore."""
        return await self._room.make(ops_bytes, tail_bytes, tails, kept)

    @property
    def room_to_spare(self) -> bool:
        """See MetadataStore."""
        return self._journal.ample

    def keep_room(self, ops_bytes: int, tail_bytes: int, tails: int, kept: float) -> None:
        """See MetadataStore."""
        if not self.room_to_spare or self._progress.flight is not None or self._rounds.next.wanted:
            return
        # No await between this look and the trimming: nothing of what goes is being written to.
        self._room.trim(ops_bytes, tail_bytes, tails, kept)

    async def clear(self) -> bool:
        """See MetadataStore."""
        pending = bool(self._pending)
        if pending:
            await self.commit(urgent=True)
        return await self._room.clear_out() or pending

    # ---- its tasks, and the end

    async def run_committer(self) -> None:
        """For ever."""
        await self._committer.run()

    async def run_takeover(self) -> None:
        """For ever."""
        await self._takeover.run()

    async def close(self) -> None:
        """Commit what is pending (the hooks' too). Raises what that raises. The tasks must still run."""
        if self._progress.failure is None and self._journal.ready:
            await self.commit(urgent=True)

    async def release(self) -> None:
        """Have LMDB take over everything durable, and let go of threads and files. The tasks must have ended."""
        try:
            await self._takeover.finish()
        finally:
            self._writer.close()
            self._mover.close()
            self._journal.close()
            self._base.close()
