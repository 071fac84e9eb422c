"""The committer: makes what is pending durable, one commit after the other, each for all who wait for it.

It is a task (`run`); where nobody else is at it, whoever asks writes the commit himself, which saves two task switches. State is changed on
the event loop only; the journal is written by a thread of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from storage.errors import BadArgument, Fenced, FusefsError
from storage.metadata.journal import Group, Journal
from storage.metadata.memtable import Memtable
from storage.metadata.pending import Pending
from storage.metadata.room import Room
from storage.metadata.rounds import Round, Rounds
from storage.metadata.takeover import Progress, Takeover
from storage.seams import Worker

log = logging.getLogger(__name__)

#: Passes of the scheduler that the committer waits for others, at most.
GATHERINGS = 8


class Committer:
    """See the module."""

    def __init__(
        self,
        journal: Journal,
        memtable: Memtable,
        pending: Pending,
        rounds: Rounds,
        room: Room,
        takeover: Takeover,
        progress: Progress,
        writer: Worker,
    ) -> None:
        self._journal, self._memtable, self._pending, self._rounds = journal, memtable, pending, rounds
        self._room, self._takeover, self._progress, self._writer = room, takeover, progress, writer
        #: True if somebody may be about to ask for a commit, too: one flush then does for all (group commit).
        self.more_coming: Callable[[], bool] = lambda: False
        #: The task is at work on the next round.
        self._committing = False

    async def commit(self, urgent: bool = False) -> int:
        """See MetadataStore. A caller that is cancelled does not hold up or break the commit. BadArgument before `begin_epoch`."""
        pending, rounds = self._pending, self._rounds
        if self._progress.failure is not None:
            self._progress.check()
        if not pending:
            pending.run_hooks()
        if pending:
            if not self._journal.ready:
                raise BadArgument("a commit before the epoch has begun")
            waited = rounds.next
            waited.wanted = True
            waited.urgent |= urgent
            if rounds.flight is None and not self._committing and not self.more_coming() and self._room.at_hand(urgent):
                # Nobody writes one, or waits for room for one. No await since that was found: this task writes the round.
                try:
                    await self._write_next()
                except BaseException:
                    self._end_next()
                    raise
            else:
                rounds.wake.set()
        elif rounds.flight is not None:
            waited = rounds.flight
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

    async def run(self) -> None:
        """For ever; one commit at a time."""
        rounds = self._rounds
        try:
            while True:
                await rounds.wake.wait()
                rounds.asleep()
                while rounds.next.wanted:
                    if rounds.flight is not None:
                        await rounds.flight.wait()
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

    async def _commit_next(self) -> None:
        """Write the next round, or end it with an error."""
        try:
            await self._room.wait(self._rounds)
        except FusefsError as error:
            self._rounds.turn().end(error)
            return
        # No await from the admission in `Room.wait` to the end of _take.
        if not self._pending:
            # It was asked for by nobody who had applied anything, or only for tails that are superfluous by now.
            idle = self._rounds.turn()
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
            self._rounds.flight = self._progress.flight = None
            self._pending.flying = (0, 0, 0)
            failure = self._progress.failure
            this.end(None if failure is None else Fenced(failure))
        if failure is not None:
            self._end_next()
        self._takeover.consider()

    def _take(self) -> tuple[Group, Round]:
        """Everything pending becomes the commit being written. No await inside."""
        this = self._rounds.turn()
        self._rounds.flight = self._progress.flight = this
        self._progress.taken += 1
        this.sequence = self._progress.taken
        group = self._pending.take(this.sequence)
        if self._takeover.freeze_next and self._memtable.frozen is None:
            self._takeover.freeze()
        return group, this

    # ---- failures

    def fence(self, reason: str) -> None:
        """See `Store.fence`."""
        if self._progress.failure is None:
            self._progress.failure = reason
            log.error("%s", reason)
            self._end_next()

    def _fail(self, reason: str) -> None:
        """Nothing is acknowledged any more: what the disk holds is not known."""
        if self._progress.failure is None:
            self._progress.failure = f"{reason}; the volume is read-only now: check the local disk, then mount it again"
            log.error("%s", self._progress.failure)

    def _end_next(self) -> None:
        """After a failure, for whoever had joined before."""
        self._rounds.turn().end(Fenced(self._progress.failure or ""))
