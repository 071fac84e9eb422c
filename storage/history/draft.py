"""The draft: what is to be published, as of moments between two batches: a checkpoint of all metadata, and the log of what changed since.

    changes, tails --cut--> log entry --+
                                        +--> ready: what the next superblocks name, unless it is held
    all records --checkpoint in the background, and the entries since it was begun--+

A cut that knows sectors which are only in staging is *held* until they are on their write quorum: else, with this machine lost, what was
published would lack bytes that an earlier superblock had, as tails or in sectors that were merged since. No further cut is made
meanwhile, so that steady writing does not put the end off; superblocks that are needed for another reason (a new host, other key slots,
a host that was behind) name what was *ready* last.

What cannot be kept (too much of it, or hosts that stay away) leaves a *gap*: the log leads nowhere, and only a new checkpoint helps.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import trio

from storage.errors import FusefsError, Unavailable
from storage.history.checkpoint import Checkpoint, write_checkpoint
from storage.history.fleet import Fleet
from storage.history.log import Log
from storage.history.objects import Delta, Ref, SealedObject, Tail
from storage.history.superblock import LogEntry
from storage.interfaces import Backlog
from storage.metadata.store import Store
from storage.seams import Seams

logger = logging.getLogger("fusefs.history")

#: A checkpoint is due when the log has outgrown half of the last one, and this many bytes.
MIN_LOG = 256 * 1024
#: Bytes of objects that are on no host yet, at most (I7).
MAX_UNPLACED = 64 * 1024 * 1024

#: The tail bytes that are in no sector and were not given before; with True all of them. No await inside.
TakeTails = Callable[[bool], list[Tail]]


@dataclass(frozen=True, slots=True)
class Ready:
    """What superblocks may name: every sector it knows is on its write quorum."""

    base: Checkpoint
    entries: Sequence[LogEntry]
    sequence: int

    def refs(self) -> list[Ref]:
        return [*self.base.refs(), *(ref for entry in self.entries for ref in entry.parts)]


class Draft:
    """See the module. The publisher's, whose lock is held around everything that awaits here but the scan of a checkpoint."""

    def __init__(
        self,
        *,
        store: Store,
        log: Log,
        fleet: Fleet,
        staged: Backlog,
        take_tails: TakeTails,
        seams: Seams,
        nursery: trio.Nursery,
        lock: trio.Lock,
        publish: Callable[[], Awaitable[None]],
    ) -> None:
        """`publish` puts what is ready on the hosts, under the lock: a checkpoint that is written is published at once."""
        self._store, self._fleet, self._staged = store, fleet, staged
        #: What changed since the checkpoint, cut by cut.
        self.log = log
        self._take_tails, self._seams, self._nursery = take_tails, seams, nursery
        self._lock, self._publish = lock, publish
        #: The checkpoint superblocks name; None: none is on the hosts yet.
        self.base: Checkpoint | None = None
        #: The log does not lead from the checkpoint to the last cut: only a new one helps.
        self.gap = False
        #: How often that happened since the scan of the next checkpoint began.
        self._losses = 0
        #: One that is being written, its end, and why the last one failed.
        self.next: Checkpoint | None = None
        self.writing: trio.Event | None = None
        self.failure: FusefsError | None = None
        #: Objects that are on hosts, or on their way, and that no superblock names yet.
        self.spreading: set[str] = set()
        #: The next cut takes all tails, not only what was not given before.
        self._tails_anew = True
        #: What was ready last; None before anything was.
        self.ready: Ready | None = None
        #: The last cut waits until what it knows is on enough hosts. Invariant: then no other is made but a checkpoint's.
        self.held = False
        #: Up to where the last cut went; what `changes.version` was.
        self.sequence = 0
        self.version = -1
        #: A majority has all that was cut last: the publisher says so, and each cut ends it.
        self.published_all = False

    def go_on_from(self, checkpoint: Checkpoint, entries: Sequence[LogEntry], sequence: int) -> None:
        """At open: this is what superblocks on the hosts name."""
        self.base, self.log.entries, self.sequence = checkpoint, list(entries), sequence
        self.make_ready()

    def refs(self) -> list[Ref]:
        """The objects that are to be on hosts."""
        return [*(self.base.refs() if self.base is not None else []), *self.log.refs()]

    def lose(self) -> None:
        """The log does not lead to here any more."""
        self.gap = True
        self._losses += 1

    async def cut(self, *, force: bool = False) -> None:
        """Take what changed, and what hosts lack of the tails, as of one moment, into the log; durable here when this returns."""
        changes = self._store.changes
        self._store.run_hooks()
        # No await from here to the end of the cut: it falls between two batches, and the backlog is as of that moment.
        if changes.broken:
            self.lose()
        if not changes.reason and not self._tails_anew and not force and self.sequence == self._store.applied_sequence:
            self.version = changes.version
            return
        after, self.version = self.sequence, changes.version
        ops = changes.cut()
        tails = self._take_tails(self._tails_anew)
        self._tails_anew = False
        self._staged.begin()
        self.sequence = self._store.applied_sequence
        self.published_all = False
        try:
            await self._store.commit()
            await self.log.append(Delta(min(after, self.sequence), self.sequence, ops, tails))
        except BaseException:
            # What was taken is in nobody's hands any more: a gap.
            changes.lose()
            self.lose()
            raise
        if self.log.held.size > MAX_UNPLACED:
            # Hosts stay away: the journal has it all, and they will get a checkpoint.
            self.lose()
            if self.ready is not None and any(ref.name in self.log.held.unplaced for ref in self.ready.refs()):
                self.ready = None
            self.log.held.forget(list(self.log.held.unplaced))

    def hold(self) -> bool:
        """After a cut: is something it knows on too few hosts? Then it is held."""
        self.held = self._staged.waiting() > 0
        return self.held

    def make_ready(self) -> None:
        """Superblocks may name what there is now."""
        if self.base is not None:
            self.ready = Ready(self.base, list(self.log.entries), self.sequence)
            self.held = False
            if self.writing is None:
                self.spreading.clear()

    @property
    def checkpoint_due(self) -> bool:
        """Has the log outgrown the checkpoint it goes on from?"""
        base = self.base
        return base is not None and (self.log.size > max(MIN_LOG, base.stored // 2) or self.log.full)

    # ---- checkpoints

    def begin_checkpoint(self) -> None:
        """Start one in the background, unless one is being written. No await: the cut it begins with is now."""
        if self.writing is not None:
            return
        self.writing, self.failure = trio.Event(), None
        if self.gap or self.base is None:
            # What is in the log leads nowhere: the scan sees everything as it is from now on.
            self.log.held.forget([ref.name for ref in self.log.refs()])
            self.log.entries = []
            self._store.changes.cut()
            self.sequence = self._store.applied_sequence
            self.held = False
        # The last cut has just been made, or nothing before it counts: either way the new log begins here, with all tails anew.
        self._tails_anew = True
        self.log.boundary = len(self.log.entries)
        self.next = Checkpoint(self.sequence)
        self._losses = 0
        self._nursery.start_soon(self._write_checkpoint, self.next)

    async def _write_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Until superblocks name it. A failure leaves everything as it was; it is tried again with the next round."""
        try:
            started = self._seams.clock.monotonic()
            await write_checkpoint(checkpoint, self._store, self._sealed, self._fleet.spread, self._seams)
            async with self._lock:
                await self.cut(force=True)
                if self._losses:
                    raise Unavailable("more changed during a checkpoint than can be kept; trying again")
                boundary = self.log.boundary or 0
                self.log.held.forget([ref.name for entry in self.log.entries[:boundary] for ref in entry.parts])
                self.log.entries = self.log.entries[boundary:]
                self.log.boundary = None
                self.base, self.gap, self.next = checkpoint, False, None
                seconds = self._seams.clock.monotonic() - started
                logger.info("checkpoint of %d records, %d bytes stored, in %.1f s", checkpoint.records, checkpoint.stored, seconds)
                if self.hold():
                    return
                self.spreading.clear()
                self.make_ready()
                await self._publish()
        except FusefsError as error:
            logger.warning("writing a checkpoint is postponed: %s", error)
            self.failure = error
            if self.base is not checkpoint:
                self.log.held.forget(list(self.spreading - {ref.name for ref in self.log.refs()}))
        finally:
            self.log.boundary = None
            self.next = None
            if not self.held:
                # Else until superblocks name them.
                self.spreading.clear()
            writing, self.writing = self.writing, None
            if writing is not None:
                writing.set()

    async def _sealed(self, kind: int, body: bytes) -> SealedObject:
        sealed = await self.log.seal(kind, body)
        # Before it is anywhere: nobody tidies it away while nothing names it.
        self.spreading.add(sealed.ref.name)
        return sealed

    async def spread_log(self) -> None:
        """Without a checkpoint to go with them, entries at least need not stay in memory."""
        for ref in self.log.refs():
            if ref.name in self.log.held.unplaced:
                self.spreading.add(ref.name)
                await self._fleet.spread(SealedObject(ref, self.log.held.objects[ref.name]))
