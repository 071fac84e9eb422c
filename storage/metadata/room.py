"""Room in the journal: is there enough, and what is done so that there is.

For a commit it is waited for (`wait`): what is in the way goes into LMDB and into sectors. For what callers accept it is made beforehand
(`make`), and let go of again when it is not needed (`trim`). What is asked in between is arithmetic only.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import trio

from storage.errors import FusefsError, NoSpace
from storage.metadata.journal import Journal
from storage.metadata.memtable import Memtable
from storage.metadata.pending import Pending
from storage.metadata.rounds import Rounds
from storage.metadata.takeover import Progress, Takeover
from storage.seams import Seams, Worker

#: Seconds a commit waits for room in the journal.
ROOM_WAIT = 30.0
#: Seconds after an attempt to make a segment that failed until the disk is asked again on behalf of an append.
GROWTH_PAUSE = 0.5


class Room:
    """See the module."""

    def __init__(
        self, journal: Journal, memtable: Memtable, pending: Pending, takeover: Takeover, progress: Progress, writer: Worker, seams: Seams
    ) -> None:
        self._journal, self._memtable, self._pending = journal, memtable, pending
        self._takeover, self._progress = takeover, progress
        self._writer, self._clock = writer, seams.clock
        #: Called when a commit has to wait for room: move tails into sectors and commit that with `urgent`.
        self.on_pressure: Callable[[], None] | None = None
        #: Why no segment could be made, and until when that is taken for so (monotonic seconds).
        self._cramped: tuple[FusefsError, float] | None = None

    # ---- arithmetic

    def wanted(self, ops_bytes: int, tail_bytes: int, tails: int, kept: float) -> int:
        """Segments that must be at hand for what is pending and that much more, as `MetadataStore.has_room` has it."""
        pending = self._pending
        ops, flying_bytes, flying = pending.flying
        return self._journal.wanted(
            self._memtable.pending_bytes + ops + ops_bytes,
            pending.tail_bytes + flying_bytes + tail_bytes,
            len(pending.tails) + flying + tails,
            kept,
        )

    def takes(self, ops_bytes: int, urgent: bool) -> bool:
        """Would the journal, as it is, take what is pending and so many bytes of operations more?"""
        ops, tail_bytes, tails = self._pending.sizes
        flying = self._pending.flying
        return self._journal.admits(self._journal.needed(ops + flying[0] + ops_bytes, tail_bytes + flying[1], tails + flying[2]), urgent)

    def at_hand(self, urgent: bool) -> bool:
        """All that is pending (hooks run) can be written as things are. No await inside."""
        try:
            self._pending.run_hooks()
        except FusefsError:
            return False  # The committer meets it again, and tells everybody who waits.
        pending = self._pending
        if self._journal.fits(self._memtable.pending_bytes, pending.tail_bytes, len(pending.tails), urgent):
            return True
        needed = self._journal.needed(*pending.sizes)
        return self._journal.admits(needed, urgent) and self._journal.prepared(needed)

    # ---- for a commit

    async def wait(self, rounds: Rounds) -> None:
        """Returns, without a further await, when all that is pending (hooks run) can be written for those of the next round. NoSpace,
        IOFailure; the hooks' errors."""
        journal, takeover, pending, waiting = self._journal, self._takeover, self._pending, rounds.next
        begun = trio.current_time()
        asked_at, asked_pass = -math.inf, 0
        urgent_pass = 0
        beyond = False
        try:
            while True:
                pending.run_hooks()
                sizes = journal.needed(*pending.sizes)
                if journal.admits(sizes, waiting.urgent) or (beyond and self._may_exceed(sizes)):
                    if journal.prepared(sizes):
                        return
                    try:
                        await journal.prepare(sizes, self._writer)
                    except NoSpace:
                        # What has landed in sectors since it was handed over needs no journal; and what only hosts want makes way.
                        if not pending.drop_tails() and not await self.clear_out() and not await self._begin_small():
                            raise
                    continue
                if pending.drop_tails():
                    continue
                now = trio.current_time()
                if waiting.urgent and not urgent_pass:
                    # Maybe it has joined a round that has waited for long: what was applied with it, no pass has seen yet.
                    asked_at, urgent_pass = -math.inf, takeover.begun + 1
                late = now >= begun + ROOM_WAIT
                if (
                    not beyond
                    and (late or (waiting.urgent and urgent_pass <= takeover.ended))
                    and (pending.empties or self._may_exceed(sizes))
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
                await _any_of(asked_at + 1.0, rounds.asleep(), takeover.passed if takeover.ended < asked_pass else None)
        finally:
            takeover.pressed = False

    def _may_exceed(self, sizes: list[int]) -> bool:
        """May what is pending stand beyond the journal's limit? If it empties it somewhat, one commit by as much again, which is all that
        can be pending, and others by half of it, whatever else is in them. By half more only what lets go of as much as it takes: else
        commits that hardly empty it could use up all there is, and leave the journal full for ever."""
        journal, pending = self._journal, self._pending
        half = journal.limit_bytes // 2
        if pending.empties and not pending.tails and journal.admits(sizes, True, 2 * half if journal.free_bytes >= 0 else half):
            return True
        return journal.admits(sizes, True, 3 * half) and self._takeover.lets_go(self._memtable, sum(sizes))

    async def clear_out(self) -> bool:
        """There is no room: have segments recycled that are kept only because there was room. True if any was."""
        takeover, before = self._takeover, self._journal.recycled
        takeover.cramped = True
        for _ in range(2):  # A pass that has begun already may not have seen it.
            await takeover.look()
            if self._journal.recycled > before:
                return True
        return False

    async def _begin_small(self) -> bool:
        """The disk has no room for the epoch's first segment. Without one a volume that fills its own disk could never be opened again, nor
        anything in it removed: so the ballast goes, then a smaller one will do. True if there is something to try."""
        return self._journal.beginning and (await self._takeover.give_up_ballast() or self._journal.begin_smaller())

    # ---- beforehand

    async def make(self, ops_bytes: int, tail_bytes: int, tails: int, kept: float) -> bool:
        """See `MetadataStore.make_room`."""
        while not self._journal.holds(count := self.wanted(ops_bytes, tail_bytes, tails, kept)):
            self._progress.check()
            if not self._journal.ready:
                return True
            if not self._journal.may_hold(count):
                # What only hosts want makes way.
                self._takeover.cramped = True
                self._takeover.kick()
                if self.on_pressure is not None:
                    self.on_pressure()
                return False
            if self._cramped is not None and self._clock.monotonic() < self._cramped[1]:
                raise type(self._cramped[0])(str(self._cramped[0]))
            try:
                await self._journal.grow(count, self._writer)
            except FusefsError as error:
                if isinstance(error, NoSpace) and await self.clear_out():
                    continue
                self._cramped = (error, self._clock.monotonic() + GROWTH_PAUSE)
                raise
            self._cramped = None
            self._takeover.cramped = False
        return True

    def trim(self, ops_bytes: int, tail_bytes: int, tails: int, kept: float) -> None:
        """Let go of what is beyond that. Not while a commit is being written, or is to be. No await inside."""
        if self._journal.trim(self.wanted(ops_bytes, tail_bytes, tails, kept)):
            self._takeover.kick()


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
