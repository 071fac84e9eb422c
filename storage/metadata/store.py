"""The metadata store: memtable, journal and LMDB behind `MetadataStore`.

Two tasks of its own: the committer, which writes one commit after the other, and `Takeover`. Two threads of their own: one writes the
journal, the other LMDB. State is changed on the event loop only.

A *round* is what callers of `commit` wait for: everything pending now, and whatever is applied before it is taken. While one is being
written (the flight), the next one gathers. A round that finds no room ends with NoSpace; what is pending stays pending, in the next round.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from storage.durable import from_os_error, fsync_dir
from storage.errors import BadArgument, Fenced, FusefsError, NoSpace
from storage.interfaces import Batch, TailPiece
from storage.metadata.changes import Changes, Replaying
from storage.metadata.journal import Group, Journal, KeyOf
from storage.metadata.keys import LOCAL, read_u64, u64
from storage.metadata.lmdb_base import LmdbBase
from storage.metadata.memtable import Memtable
from storage.metadata.replay import RecoveredTails, Replayed, replay
from storage.metadata.takeover import MAX_COST, MAX_KEYS, Progress, TailNeeded, Takeover
from storage.seams import Failpoints, Seams, Worker

log = logging.getLogger(__name__)

SEGMENT_SIZE = 8 * 1024 * 1024
LIMIT_BYTES = 256 * 1024 * 1024
#: Address space, not disk: LMDB's file grows as it must.
MAP_SIZE = 1 << 40
#: Seconds a commit waits for room in the journal.
ROOM_WAIT = 30.0
#: Seconds after an attempt to make a segment that failed until the disk is asked again on behalf of an append.
GROWTH_PAUSE = 0.5
#: Seconds such an attempt waits for segments to be recycled.
CLEAR_WAIT = 5.0
#: Pending operations of this many bytes, or of half a segment if that is more, are committed without being asked for: they come in one
#: record, which must find room in one segment. Never more than this share of a small journal: it must be able to take them.
COMMIT_OPS = 1024 * 1024
COMMIT_SHARE = 8
#: While LMDB takes a layer over, the next one grows to so many times what makes a takeover due before those who can wait do.
AHEAD = 4
#: Passes of the scheduler that the committer waits for others, at most.
GATHERINGS = 8
#: u64: the last commit that a majority of the hosts has. u64: the commit of metadata that came from hosts, and have no journal yet.
PUBLISHED_KEY = LOCAL + b"published"
RESTORED_KEY = LOCAL + b"restored"


class _Round:
    """Callers waiting for one commit."""

    __slots__ = ("_done", "ended", "error", "patient", "sequence", "urgent", "wanted")

    def __init__(self) -> None:
        self.ended = False
        #: Made when somebody waits.
        self._done: trio.Event | None = None
        self.error: FusefsError | None = None
        self.sequence = 0
        #: Somebody waits for it; somebody who may use the reserve does.
        self.wanted = self.urgent = False
        #: How many wait for it who may not, and have time.
        self.patient = 0

    def end(self, error: FusefsError | None = None) -> None:
        self.error = error
        self.ended = True
        if self._done is not None:
            self._done.set()

    async def wait(self) -> None:
        """Until it has ended. A checkpoint, too, if it has."""
        if self._done is None:
            self._done = trio.Event()
            if self.ended:
                self._done.set()
        await self._done.wait()


class Store:
    """A MetadataStore; made by `open_store`."""

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
        self._takeover = Takeover(memtable, base, journal, self._progress, seams, self._mover, tail_needed, self._ask)
        #: True if somebody may be about to ask for a commit, too: one flush then does for all (group commit).
        self.more_coming: Callable[[], bool] = lambda: False
        #: Called when a commit has to wait for room in the journal: move tails into sectors and commit that with `urgent`.
        self.on_pressure: Callable[[], None] | None = None
        self._hooks: list[Callable[[], None]] = []
        self._tails: list[TailPiece] = []
        self._tail_bytes = 0
        self._next = _Round()
        self._flight: _Round | None = None
        #: The committer is at work on the next round.
        self._committing = False
        self._wake = trio.Event()
        # What the commit being written takes at most: it may have taken it from the segments already, or not.
        self._flying = (0, 0, 0)
        self._cramped: tuple[FusefsError, float] | None = None
        #: What is pending, or is about to be applied, makes tails in the journal superfluous.
        self._empties = False
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
        self._empties = True

    async def catch_up(self, urgent: bool = False) -> None:
        """See MetadataStore."""
        takeover = self._takeover
        while self.overdue:
            if self._memtable.pending_bytes >= self._commit_ops:
                await self.commit(urgent=urgent)
                continue
            # Its thread needs the GIL for every record, which a loop that never rests leaves to it rarely.
            wanted = takeover.begun + 1
            takeover.kick()
            # A pass takes over what is frozen, or fails and then pauses. The limit: what made it slow is looked at anew.
            with trio.move_on_after(CLEAR_WAIT):
                while takeover.ended < wanted:
                    await takeover.passed.wait()
            self._check()

    @property
    def overfull(self) -> bool:
        # Half of that may come at any moment from what lands in the background, and goes again without anybody's help.
        if self._memtable.pending_bytes < 2 * self._commit_ops:
            return False
        flying, journal = self._flying, self._journal
        ops = self._memtable.pending_bytes + flying[0] + self._commit_ops
        sizes = journal.needed(ops, self._tail_bytes + flying[1], len(self._tails) + flying[2])
        return not journal.admits(sizes, urgent=False)

    def can_spare(self, ops_bytes: int) -> bool:
        """See MetadataStore."""
        # With what hooks would add: times and sizes of many inodes.
        self._run_hooks()
        flying, journal = self._flying, self._journal
        ops = self._memtable.pending_bytes + flying[0] + ops_bytes
        return journal.admits(journal.needed(ops, self._tail_bytes + flying[1], len(self._tails) + flying[2]), urgent=True)

    @property
    def trouble(self) -> FusefsError | None:
        return self._takeover.trouble

    def pinned_tails(self) -> list[tuple[int, int]]:
        return self._takeover.pinned(self)

    def recovered_tails(self) -> RecoveredTails:
        """Tails the journal held at open, of values that need them. The store forgets them: ask once, before anything is appended."""
        tails, self._recovered = self._recovered, []
        return RecoveredTails(tails, lambda value_id, end: self._takeover.tail_needed(self, value_id, end), self._key_of)

    @property
    def _pending(self) -> bool:
        return bool(self._memtable.pending or self._tails)

    def _check(self) -> None:
        if self._progress.failure is not None:
            raise Fenced(self._progress.failure)

    # ---- the history on hosts

    def run_hooks(self) -> None:
        """Have applied what layers apply only when a commit is taken: before a cut. No await inside."""
        self._run_hooks()

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
        if self._progress.failure is None:
            self._progress.failure = reason
            log.error("%s", reason)
            self._end_next()

    # ---- changes

    def begin_epoch(self, epoch: int, salt: bytes) -> None:
        """What is committed from now on goes into segments of this epoch. Before the first commit. BadArgument: used before (I1)."""
        self._journal.begin_epoch(epoch, salt, self._key_of(salt))

    def add_commit_hook(self, hook: Callable[[], None]) -> None:
        self._hooks.append(hook)

    def apply(self, batch: Batch, tails: Sequence[TailPiece] = ()) -> None:
        """See MetadataStore. Besides, BadArgument for keys and values no record can have, and NoSpace once more is pending than the
        journal can hold.
        """
        if self._progress.failure is not None:
            self._check()
        memtable = self._memtable
        if memtable.pending_bytes > self._journal.limit_bytes:
            raise NoSpace("more metadata changes wait for a commit than the journal can hold; free some space on the local disk")
        ops = batch.ops
        if not ops and not tails:
            return  # Asked only whether it would do.
        if ops:
            memtable.apply(ops)
        self.changes.note(ops, bool(tails))
        for tail in tails:
            length = tail.length
            if length:
                self._tails.append(tail)
                self._tail_bytes += length
        if self._takeover.since is None and ops:
            self._takeover.since = self._seams.clock.monotonic()
        if memtable.active.cost >= MAX_COST or len(memtable.active.values) >= MAX_KEYS:
            self._overfull()
        elif memtable.pending_bytes >= self._commit_ops:
            self._ask()

    def _overfull(self) -> None:
        """The memtable is large: LMDB must take it over; and if nobody commits, it is time somebody did."""
        self._takeover.consider()
        if self._memtable.pending_bytes >= MAX_COST or len(self._memtable.pending) >= MAX_KEYS:
            self._ask()

    def _ask(self) -> None:
        """Have a commit made that nobody waits for."""
        if self._journal.ready:
            self._next.wanted = True
            self._wake.set()

    async def commit(self, urgent: bool = False) -> int:
        """See MetadataStore. A caller that is cancelled does not hold up or break the commit. BadArgument before `begin_epoch`."""
        self._check()
        if not self._pending:
            self._run_hooks()
        if self._pending:
            if not self._journal.ready:
                raise BadArgument("a commit before the epoch has begun")
            waited = self._next
            waited.wanted = True
            waited.urgent |= urgent
            if self._idle and not self.more_coming() and self._at_hand(urgent):
                # No await since it was found idle: this task writes the round, which saves two task switches.
                try:
                    await self._write_next()
                except BaseException:
                    self._end_next()
                    raise
            else:
                self._wake.set()
        elif self._flight is not None:
            waited = self._flight
        else:
            await trio.lowlevel.checkpoint()
            return self._progress.durable
        if not waited.ended:
            waited.patient += not urgent
            try:
                await waited.wait()
            finally:
                waited.patient -= not urgent
        if waited.error is not None:
            raise type(waited.error)(str(waited.error))
        return waited.sequence

    @property
    def _idle(self) -> bool:
        """Nobody writes a commit, or waits for room for one."""
        return self._flight is None and not self._committing

    def _at_hand(self, urgent: bool) -> bool:
        """All that is pending (hooks run) can be written as things are. No await inside."""
        try:
            self._run_hooks()
        except FusefsError:
            return False  # The committer meets it again, and tells everybody who waits.
        pending = self._memtable.pending_bytes, self._tail_bytes, len(self._tails)
        if self._journal.fits(*pending, urgent):
            return True
        sizes = self._journal.needed(*pending)
        return self._journal.admits(sizes, urgent) and self._journal.prepared(sizes)

    def _run_hooks(self) -> None:
        for hook in self._hooks:
            hook()

    # ---- the committer

    async def run_committer(self) -> None:
        """For ever; one commit at a time."""
        try:
            while True:
                await self._wake.wait()
                self._wake = trio.Event()
                while self._next.wanted:
                    if self._flight is not None:
                        await self._flight.wait()
                        continue
                    self._committing = True
                    try:
                        await self._gather()
                        await self._commit_next()
                    finally:
                        self._committing = False
        except trio.Cancelled:
            raise
        except BaseException as error:
            # A bug, or a crash on order: whoever waits must not wait for ever.
            self._fail(f"committing failed ({error!r})")
            self._end_next()
            raise

    async def _gather(self) -> None:
        """Let those come along who are about to ask, for a moment."""
        for _ in range(GATHERINGS):
            if not self.more_coming():
                return
            await trio.lowlevel.checkpoint()

    async def run_takeover(self) -> None:
        """For ever."""
        await self._takeover.run()

    async def _commit_next(self) -> None:
        """Write the next round, or end it with an error."""
        try:
            await self._make_room(self._next)
        except FusefsError as error:
            refused, self._next = self._next, _Round()
            refused.end(error)
            return
        # No await from the admission in _make_room to the end of _take.
        if not self._pending:
            # It was asked for by nobody who had applied anything, or only for tails that are superfluous by now.
            idle, self._next = self._next, _Round()
            idle.sequence = self._progress.durable
            idle.end()
            return
        await self._write_next()

    async def _write_next(self) -> None:
        """Write all that is pending, for which there is room. What fails is told to those who wait for it; only bugs are raised."""
        group, this = self._take()
        try:
            chain = await self._journal.write(group, self._writer)
        except (OSError, FusefsError) as error:
            self._fail(f"writing the journal failed ({error})")
        except BaseException as error:
            self._fail(f"writing the journal failed ({error!r})")
            raise
        else:
            self._progress.durable, self._progress.chain = group.sequence, chain
            frozen = self._memtable.frozen
            if frozen is not None and frozen.sequence == group.sequence:
                frozen.chain = chain
        finally:
            self._flight = self._progress.flight = None
            self._flying = (0, 0, 0)
            failure = self._progress.failure
            this.end(None if failure is None else Fenced(failure))
        if failure is not None:
            self._end_next()
        self._takeover.consider()

    def _end_next(self) -> None:
        """After a failure, for whoever had joined before."""
        stranded, self._next = self._next, _Round()
        stranded.end(Fenced(self._progress.failure or ""))

    def _take(self) -> tuple[Group, _Round]:
        """Everything pending becomes the commit being written. No await inside."""
        this, self._next = self._next, _Round()
        self._flight = this
        self._progress.taken += 1
        this.sequence = self._progress.taken
        self._progress.flight = this
        self._flying = (self._memtable.pending_bytes, self._tail_bytes, len(self._tails))
        tails, self._tails, self._tail_bytes = self._tails, [], 0
        self._empties = False
        group = Group(this.sequence, self._memtable.take(), tails)
        if self._takeover.freeze_next and self._memtable.frozen is None:
            self._takeover.freeze()
        return group, this

    def _fail(self, reason: str) -> None:
        """Nothing is acknowledged any more: what the disk holds is not known."""
        if self._progress.failure is None:
            self._progress.failure = f"{reason}; the volume is read-only now: check the local disk, then mount it again"
            log.error("%s", self._progress.failure)

    # ---- room in the journal

    async def _make_room(self, waiting: _Round) -> None:
        """Returns, without a further await, when all that is pending (hooks run) can be written. NoSpace, IOFailure; the hooks' errors."""
        journal, takeover = self._journal, self._takeover
        begun = trio.current_time()
        asked_at, asked_pass = -math.inf, 0
        urgent_pass = 0
        beyond = False
        try:
            while True:
                self._run_hooks()
                sizes = journal.needed(self._memtable.pending_bytes, self._tail_bytes, len(self._tails))
                if journal.admits(sizes, waiting.urgent) or (beyond and self._may_exceed(sizes)):
                    if journal.prepared(sizes):
                        return
                    try:
                        await journal.prepare(sizes, self._writer)
                    except NoSpace:
                        # What has landed in sectors since it was handed over needs no journal; and what only hosts want makes way.
                        if not self._drop_tails() and not await self._clear_out() and not await self._begin_small():
                            raise
                    continue
                if self._drop_tails():
                    continue
                now = trio.current_time()
                if waiting.urgent and not urgent_pass:
                    # Maybe it has joined a round that has waited for long: what was applied with it, no pass has seen yet.
                    asked_at, urgent_pass = -math.inf, takeover.begun + 1
                late = now >= begun + ROOM_WAIT
                if (
                    not beyond
                    and (late or (waiting.urgent and urgent_pass <= takeover.ended))
                    and (self._empties or self._may_exceed(sizes))
                ):
                    # Changes that nobody needs the journal for have taken the reserve, and without this commit it stays full for ever. Or
                    # all of it is one commit's segment, which is needed no more, and stays until another follows.
                    beyond = True
                    continue
                # Who waits with it patiently is not refused for its haste: each would be, as soon as something lands in a full journal.
                if waiting.urgent and urgent_pass <= takeover.ended and not waiting.patient:
                    raise NoSpace("the journal is full, its reserve included: see that hosts are reachable and have room")
                if late:
                    raise NoSpace("the journal is full of tails no host has taken yet: see that hosts are reachable and have room")
                if now >= asked_at + 1.0:
                    # A pass that has begun already may not have seen what is durable now.
                    asked_at, asked_pass = now, takeover.begun + 1
                    takeover.pressed = True
                    takeover.kick()
                    if self.on_pressure is not None:
                        self.on_pressure()
                # Not for every pass: those that find nothing to do would have us go round and round.
                self._wake = trio.Event()
                await _any_of(asked_at + 1.0, self._wake, takeover.passed if takeover.ended < asked_pass else None)
        finally:
            takeover.pressed = False

    def _may_exceed(self, sizes: list[int]) -> bool:
        """May what is pending stand beyond the journal's limit? If it empties it somewhat, one commit by as much again, which is all that
        can be pending, and others by half of it, whatever else is in them. By half more only what lets go of as much as it takes: else
        commits that hardly empty it could use up all there is, and leave the journal full for ever."""
        journal = self._journal
        half = journal.limit_bytes // 2
        if self._empties and not self._tails and journal.admits(sizes, True, 2 * half if journal.free_bytes >= 0 else half):
            return True
        return journal.admits(sizes, True, 3 * half) and self._takeover.lets_go(self, sum(sizes))

    def has_room(self, ops_bytes: int, tail_bytes: int, tails: int, kept: float) -> bool:
        """See MetadataStore."""
        return self._journal.holds(self._wanted(ops_bytes, tail_bytes, tails, kept))

    def _wanted(self, ops_bytes: int, tail_bytes: int, tails: int, kept: float) -> int:
        flying = self._flying
        return self._journal.wanted(
            self._memtable.pending_bytes + flying[0] + ops_bytes,
            self._tail_bytes + flying[1] + tail_bytes,
            len(self._tails) + flying[2] + tails,
            kept,
        )

    async def make_room(self, ops_bytes: int, tail_bytes: int, tails: int, kept: float) -> bool:
        """See MetadataStore."""
        while not self._journal.holds(count := self._wanted(ops_bytes, tail_bytes, tails, kept)):
            self._check()
            if not self._journal.ready:
                return True
            if not self._journal.may_hold(count):
                # What only hosts want makes way.
                self._takeover.cramped = True
                self._takeover.kick()
                if self.on_pressure is not None:
                    self.on_pressure()
                return False
            if self._cramped is not None and self._seams.clock.monotonic() < self._cramped[1]:
                raise type(self._cramped[0])(str(self._cramped[0]))
            try:
                await self._journal.grow(count, self._writer)
            except FusefsError as error:
                if isinstance(error, NoSpace) and await self._clear_out():
                    continue
                self._cramped = (error, self._seams.clock.monotonic() + GROWTH_PAUSE)
                raise
            self._cramped = None
            self._takeover.cramped = False
        return True

    def keep_room(self, ops_bytes: int, tail_bytes: int, tails: int, kept: float) -> None:
        """See MetadataStore."""
        if not self._journal.ample or self._progress.flight is not None or self._next.wanted:
            return
        # No await between this look and the trimming: nothing of what goes is being written to.
        if self._journal.trim(self._wanted(ops_bytes, tail_bytes, tails, kept)):
            self._takeover.kick()

    async def clear(self) -> bool:
        """See MetadataStore."""
        pending = self._pending
        if pending:
            await self.commit(urgent=True)
        return await self._clear_out() or pending

    async def _clear_out(self) -> bool:
        """There is no room: have segments recycled that are kept only because there was room. True if any was."""
        takeover, before = self._takeover, self._journal.recycled
        takeover.cramped = True
        for _ in range(2):  # A pass that has begun already may not have seen it.
            wanted = takeover.begun + 1
            takeover.kick()
            with trio.move_on_after(CLEAR_WAIT):
                while takeover.ended < wanted:
                    await takeover.passed.wait()
            if self._journal.recycled > before:
                return True
        return False

    async def _begin_small(self) -> bool:
        """The disk has no room for the epoch's first segment. Without one a volume that fills its own disk could never be opened again, nor
        anything in it removed: so the ballast goes, then a smaller one will do. True if there is something to try."""
        return self._journal.beginning and (await self._takeover.give_up_ballast() or self._journal.begin_smaller())

    def _drop_tails(self) -> bool:
        """Forget pending tails that what is applied has made superfluous (their extents are in this commit); True if there were any.

        Without this a full journal could not be emptied: the commit that points to the sectors would have to carry the tails, too.
        """
        kept = [t for t in self._tails if self._takeover.tail_needed(self, t.value_id, t.offset + t.length)]
        if len(kept) == len(self._tails):
            return False
        self._tails, self._tail_bytes = kept, sum(t.length for t in kept)
        return True

    # ---- the end

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


class _Background:
    """A task that ends when it is told to, not when what is around it is cancelled: a commit may still be wanted."""

    def __init__(self, nursery: trio.Nursery, run: Callable[[], Awaitable[None]]) -> None:
        self._scope = trio.CancelScope(shield=True)
        self._ended = trio.Event()
        nursery.start_soon(self._run, run)

    async def _run(self, run: Callable[[], Awaitable[None]]) -> None:
        try:
            with self._scope:
                await run()
        finally:
            self._ended.set()

    async def stop(self) -> None:
        self._scope.cancel()
        await self._ended.wait()


async def _any_of(deadline: float, *events: trio.Event | None) -> None:
    """Until one of the events is set, or the deadline."""
    with trio.move_on_at(deadline):
        async with trio.open_nursery() as nursery:

            async def first(event: trio.Event) -> None:
                await event.wait()
                nursery.cancel_scope.cancel()

            for event in events:
                if event is not None:
                    nursery.start_soon(first, event)


def _make_directories(directory: Path) -> tuple[Path, Path]:
    """(journal, metadata) below `directory`, durably there."""
    journal, metadata = directory / "journal", directory / "metadata"
    try:
        for path in (journal, metadata):
            path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise from_os_error(error, f"making {journal} and {metadata}") from error
    fsync_dir(directory)
    return journal, metadata


def _load(
    directory: Path, failpoints: Failpoints, sizes: tuple[int, int], map_size: int
) -> tuple[LmdbBase, Journal, Memtable, Replayed, Replaying]:
    """Open LMDB and replay the journal. Blocking."""
    journal_dir, metadata_dir = _make_directories(directory)
    base = LmdbBase(metadata_dir, map_size)
    try:
        memtable = Memtable(base)
        replaying = Replaying()
        restored = base.get(RESTORED_KEY) == u64(base.sequence)
        replayed = replay(
            journal_dir,
            base.sequence,
            base.chain,
            memtable.load,
            base.oldest_segment,
            failpoints,
            keep=replaying.take,
            restored=restored,
        )
        try:
            journal = Journal(
                journal_dir,
                segment_size=sizes[0],
                limit_bytes=sizes[1],
                failpoints=failpoints,
                live=replayed.live,
                spares=replayed.spares,
                chain=replayed.chain,
                next_number=replayed.next_number,
            )
        except BaseException:
            for segment in replayed.live:
                segment.close()
            raise
    except BaseException:
        base.close()
        raise
    return base, journal, memtable, replayed, replaying


@asynccontextmanager
async def open_store(
    directory: Path,
    seams: Seams,
    *,
    journal_key: KeyOf,
    tail_needed: TailNeeded,
    segment_size: int = SEGMENT_SIZE,
    limit_bytes: int = LIMIT_BYTES,
    map_size: int = MAP_SIZE,
) -> AsyncIterator[Store]:
    """The store in `directory` (journal/ and metadata/ are made if need be), with its tasks; what it had acknowledged is there.

    Only for whoever holds the volume's lock. `journal_key(salt)`: the 32-byte key of an epoch. `tail_needed(reader, value_id, end)`: do the
    value's bytes below `end` need a tail, going by what `reader` shows (I3)? On the way out everything pending is committed and LMDB takes
    over all of it; the error of that commit is raised, unless the block raised one. Corrupt, BadArgument, NoSpace, IOFailure.
    """
    base, journal, memtable, replayed, replaying = await seams.threads.run(
        _load, directory, seams.failpoints, (segment_size, limit_bytes), map_size
    )
    store = Store(base, journal, memtable, replayed, replaying, seams, journal_key, tail_needed)
    failed: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            tasks = [_Background(nursery, store.run_committer), _Background(nursery, store.run_takeover)]
            try:
                yield store
            except BaseException as error:  # noqa: BLE001 (raised below, outside the nursery: it comes out as itself, not in a group)
                failed = error
            with trio.CancelScope(shield=True):
                try:
                    await store.close()
                except FusefsError as error:
                    if failed is None:
                        failed = error
                    else:
                        log.error("closing the metadata store: %s", error)
                except BaseException as error:  # noqa: BLE001 (as above)
                    # A bug, or a crash on order. The tasks, which are shielded, would be waited for for ever.
                    failed = error
                for task in tasks:
                    await task.stop()
    finally:
        with trio.CancelScope(shield=True):
            await store.release()
    if failed is not None:
        raise failed
