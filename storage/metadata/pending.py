"""What was applied and is in no commit yet: operations, which the memtable keeps, and tails."""

from __future__ import annotations

from collections.abc import Callable

from storage.interfaces import TailPiece
from storage.metadata.journal import Group
from storage.metadata.memtable import Memtable
from storage.metadata.takeover import TailNeeded


class Pending:
    """See the module. True while there is anything. Nothing here awaits."""

    def __init__(self, memtable: Memtable, tail_needed: TailNeeded) -> None:
        self._memtable, self._tail_needed = memtable, tail_needed
        #: Oldest first, and their bytes.
        self.tails: list[TailPiece] = []
        self.tail_bytes = 0
        #: Bytes of operations, bytes of tails and tails of the commit being written, at most: they may have been taken from the segments
        #: already, or not.
        self.flying = (0, 0, 0)
        #: What is pending, or is about to be applied, makes tails in the journal superfluous.
        self.empties = False
        #: Called before anything is taken: they apply what layers apply only then.
        self.hooks: list[Callable[[], None]] = []

    def __bool__(self) -> bool:
        return bool(self._memtable.pending or self.tails)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Bytes of operations, bytes of tails, and tails."""
        return self._memtable.pending_bytes, self.tail_bytes, len(self.tails)

    def run_hooks(self) -> None:
        """What they raise."""
        for hook in self.hooks:
            hook()

    def take(self, sequence: int) -> Group:
        """All of it, as a commit, which is flying from now on."""
        tails, tail_bytes = self.tails, self.tail_bytes
        self.flying = self._memtable.pending_bytes, tail_bytes, len(tails)
        self.tails, self.tail_bytes = [], 0
        self.empties = False
        return Group(sequence, self._memtable.take(), tails, tail_bytes)

    def drop_tails(self) -> bool:
        """Forget tails that what is applied has made superfluous (their extents are in this commit); True if there were any.

        Without this a full journal could not be emptied: the commit that points to the sectors would have to carry the tails, too.
        """
        kept = [t for t in self.tails if self._tail_needed(self._memtable, t.value_id, t.offset + t.length)]
        if len(kept) == len(self.tails):
            return False
        self.tails, self.tail_bytes = kept, sum(t.length for t in kept)
        return True
