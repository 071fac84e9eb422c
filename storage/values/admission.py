"""Admission: what may be appended, made and changed, so that all that was accepted can be made durable (I7).

    bytes        `reserve`, before each append: there is room for them in memory (the shipper's budget) and in the journal's files as they
                 stand on the disk, whatever happens to the disk afterwards. Of several appends the journal is asked about once: `granted`
    new names    `check_room`, at once: nothing new while the last commit could not be made, or there is no room for what names bring
    all changes  `hold_back` and `keep_pace`: who changes faster than commits and LMDB follow waits for them

Commits are made here (`commit`), since one that cannot be made is why nothing new is accepted, until one can.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import trio

from storage.errors import Fenced, FusefsError, NoSpace
from storage.interfaces import MetadataStore
from storage.seams import Seams
from storage.values.blocks import LARGE
from storage.values.shipping import Shipper
from storage.values.tail import Tail

log = logging.getLogger("fusefs.values")

#: What the metadata of a tail's value and file take in the journal beside its bytes (inode, extent, value, sector), at most.
BESIDE = 448
#: ... and what of that comes only as its bytes land (extent, value): so it is still to come of what the journal has.
LANDED = 160
#: Shares of a journal segment left over by appends, and by what makes new names: so that renames, deletions and the records of what lands
#: in sectors find room when the disk has none any more.
APPEND_KEPT, CREATE_KEPT = 0.5, 0.25
#: Bytes of appends (and of what stands beside them) for which the journal's room is looked at once.
ALLOWANCE = 32 * 1024
#: The same of large appends, and what is to be left over besides then, as a share of a segment.
LARGE_ALLOWANCE, STREAM_KEPT = 1024 * 1024, 1.0
#: Seconds an append on a full disk waits for what was appended before to get to the hosts.
ROOM_WAIT = 30.0
#: Seconds between two looks whether a full disk is full still.
FULL_INTERVAL = 3.0
#: Seconds in which those who come after one that was refused for want of room are refused as well.
REFUSED_PAUSE = 2.0


class Admission:
    """See the module."""

    def __init__(self, store: MetadataStore, shipper: Shipper, tails: Mapping[int, Tail], seams: Seams) -> None:
        """`tails`: by value, as `Values` has them."""
        self._store, self._shipper, self._tails, self._seams = store, shipper, tails, seams
        #: Why the last commit could not be made (the local disk or the journal is full); None since one could.
        self.local_trouble: FusefsError | None = None
        #: Why the journal's files could not grow by what more appends need (the local disk is full or fails); None since they could.
        self.full: FusefsError | None = None
        self._cramped = trio.Event()
        #: Why nothing could be caught up with, and until when nobody else tries.
        self._refused: tuple[FusefsError, float] | None = None
        #: Values freed that had bytes in the journal, and how many of them there were when a commit was begun that was made.
        self._removed = self._removed_durably = 0

    def removed(self) -> None:
        """A value was freed that has bytes in the journal: once that is committed, the journal needs them no more."""
        self._removed += 1
        self._store.empties()

    # ---- changes

    async def hold_back(self) -> None:
        """See `Values.hold_back`."""
        if self.local_trouble is not None or not self._store.overdue:
            return  # In trouble `check_room` refuses at once.
        refused = self._refused
        if refused is not None and trio.current_time() < refused[1]:
            # Not each of very many has to wait for the same answer.
            raise type(refused[0])(str(refused[0]))
        try:
            await self._store.catch_up()
        except Fenced:
            raise
        except FusefsError as error:
            self._refused = error, trio.current_time() + REFUSED_PAUSE
            raise
        self._refused = None

    async def keep_pace(self, removing: bool = False) -> None:
        """See `Values.keep_pace`."""
        if not self._store.overdue:
            return
        try:
            if self._emptying():
                removed, sequence = self._removed, self._store.applied_sequence
                await self._store.catch_up(urgent=True)
                # It makes no commit where only LMDB was behind.
                if self._store.durable_sequence >= sequence:
                    self._removed_durably = max(removed, self._removed_durably)
            else:
                await self.hold_back()
        except Fenced:
            raise
        except FusefsError as error:
            # Said to who makes something new.
            log.debug("not waited for: %s", error)
        if not removing and self._store.overfull:
            raise NoSpace("more changes wait for a commit than the journal has room for; nothing more is changed until one is made")

    def _emptying(self) -> bool:
        """Does what waits for a commit remove some of what fills the journal? Then, of the room that is kept for what lands, it may have
        what that does not need: where hosts are full nothing lands, and only removals can help, once they are committed."""
        return self._removed > self._removed_durably and self._store.can_spare(LANDED * len(self._tails))

    # ---- bytes

    async def reserve(self, value_id: int, length: int) -> None:
        """See `Values.reserve`."""
        if self.reserve_now(value_id, length):
            return
        failure = self._store.failure
        if failure is not None:
            raise Fenced(failure)
        if self.local_trouble is not None:
            self.check_room()
        await self._wait_room(length)

    def reserve_now(self, value_id: int, length: int) -> bool:  # noqa: ARG002 (the Protocol's: a budget per value may come)
        """See `Values.reserve_now`."""
        if self.local_trouble is not None or self._store.failure is not None or self._store.overdue:
            return False
        cost = length + BESIDE
        shipper = self._shipper
        if cost > shipper.granted:
            # Looked at for several appends at a time: what comes between them is within what is kept.
            shipper.granted = 0
            if length >= LARGE and self._assured(cost + LARGE_ALLOWANCE, STREAM_KEPT):
                shipper.granted = cost + LARGE_ALLOWANCE
            elif self._assured(length + ALLOWANCE, APPEND_KEPT):
                shipper.granted = cost + ALLOWANCE
            else:
                return False
        if not shipper.has_room(length):
            return False
        shipper.granted -= cost
        return True

    def _assured(self, length: int, kept: float) -> bool:
        """Would everything accepted so far, and `length` bytes more, find room in the journal as it stands on the disk? Arithmetic only."""
        tails = self._shipper.unsafe_tails + 1
        return self._store.has_room(self._beside(tails), self._shipper.spoken_for + length, tails, kept)

    def _beside(self, unsafe: int) -> int:
        """Bytes of operations that tails have yet to bring, of which so many have bytes the journal does not have. What takes them out of a
        full journal is counted as they go in: else no commit could say one day where they went."""
        return BESIDE * unsafe + LANDED * max(len(self._tails) - unsafe, 0)

    async def _wait_room(self, length: int) -> None:
        """Until there is room for `length` bytes in memory, and in the journal (I7: what is accepted can be made durable)."""
        shipper = self._shipper
        shipper.granted = 0
        deadline = trio.current_time() + ROOM_WAIT
        while True:
            await shipper.wait_room(length)
            if self._store.overdue:
                # New names come without waiting, so whoever fills them waits for both.
                await self._store.catch_up()
                continue
            if self._assured(length, APPEND_KEPT):
                return
            error = await self._grow(length)
            if self._store.failure is not None:
                raise Fenced(self._store.failure)
            # No await from here to the return: others append, too.
            if self._assured(length, APPEND_KEPT) and shipper.has_room(length):
                return
            if not shipper.pending and error is None:
                # Full of what has landed; or the append is larger than the whole journal: then its commit waits for room.
                if not await self._store.clear() or trio.current_time() >= deadline:
                    return
                continue
            if error is not None and (not shipper.pending or shipper.trouble is not None or trio.current_time() >= deadline):
                raise error
            # Room comes as bytes get to the hosts.
            await shipper.wait_landing()

    async def _grow(self, length: int) -> FusefsError | None:
        """Have the journal's files grow by what `length` bytes need. Returns why they cannot; None: they did, or their limit is reached."""
        tails = self._shipper.unsafe_tails + 1
        try:
            await self._store.make_room(self._beside(tails), self._shipper.spoken_for + length, tails, APPEND_KEPT)
        except Fenced:
            raise
        except FusefsError as error:
            if self.full is None:
                log.error("nothing that cannot be made durable is accepted: %s", error)
            self.full = error
            return type(error)(f"{error}; nothing more is accepted until there is room for it")
        self.full = None
        return None

    async def run(self) -> None:
        """Room ahead of creations, which cannot wait for it; and find out when a full disk is full no more."""
        while True:
            with trio.move_on_after(math.inf if self.full is None else FULL_INTERVAL):
                await self._cramped.wait()
            self._cramped = trio.Event()
            if self._store.failure is None:
                await self._grow(0)
            # At most so often, whatever asks.
            await self._seams.clock.sleep(0.1)

    # ---- what is new, and commits

    def check_room(self) -> None:
        """See `Values.check_room`."""
        local = self.local_trouble
        if local is not None:
            raise type(local)(f"{local}; nothing more is accepted until what was written before is durable")
        if not self._assured(0, CREATE_KEPT):
            self._cramped.set()
            if self.full is not None:
                raise type(self.full)(f"{self.full}; nothing new is accepted until there is room for it")
            if self._store.overfull:
                raise NoSpace("more changes wait for a commit than the journal has room for; nothing new is accepted until one is made")

    def accepting(self) -> bool:
        """See `Values.accepting`."""
        return self.local_trouble is None and self.full is None and self._shipper.accepting()

    async def commit(self) -> None:
        """Commit what the store has; and remember whether it could be done, for `check_room`. As `MetadataStore.commit`."""
        removed = self._removed
        try:
            try:
                await self._store.commit()
            except NoSpace:
                if not self._emptying():
                    raise
                await self._store.commit(urgent=True)
        except Fenced:
            raise
        except FusefsError as error:
            if self.local_trouble is None:
                log.error("what was written lately is not durable, and nothing more is accepted until it is: %s", error)
            self.local_trouble = error
            raise
        self.local_trouble = None
        self._removed_durably = max(removed, self._removed_durably)
        if self._store.room_to_spare:
            shipper = self._shipper
            self._store.keep_room(self._beside(shipper.unsafe_tails), shipper.spoken_for, shipper.unsafe_tails, APPEND_KEPT)
