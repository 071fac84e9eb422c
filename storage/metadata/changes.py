"""What changed since the last cut: the newest value of every key, on its way to the hosts.

A *cut* takes what was noted so far, between two batches, so that batches stay whole. Values are the very objects the memtable holds, so
this costs a slot per key; what it may hold is bounded, and beyond that it is *broken*: it lets go, and only a checkpoint helps (I7).
All methods belong to the event loop's thread and await nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from storage.metadata.keys import NEVER_SHIPPED, NO_REASON_TO_SHIP
from storage.metadata.memtable import ENTRY_COST
from storage.metadata.records import Op

#: Bytes, about.
LIMIT = 64 * 1024 * 1024
#: First bytes of keys.
_NEVER = frozenset(prefix[0] for prefix in NEVER_SHIPPED)
_QUIET = _NEVER | frozenset(prefix[0] for prefix in NO_REASON_TO_SHIP)


class Changes:
    """See the module. Counts nothing before `enabled`: a store nobody publishes keeps nothing."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._ops: dict[bytes, bytes | None] = {}
        self._cost = 0
        #: Grows with each batch that has anything for the hosts.
        self.version = 0
        #: Something changed that hosts should know soon.
        self.reason = False
        #: Something was let go of: what is here does not lead from the last cut to now.
        self.broken = False
        #: At open: something that hosts should know was committed after the last publication.
        self.newer = False
        #: Told when more than half of the limit is used.
        self.on_many = _nothing

    def note(self, ops: Sequence[Op], tails: bool = False) -> None:
        """A batch was applied, with or without tail bytes."""
        if not tails:
            for key, _ in ops:
                if key[0] not in _NEVER:
                    break
            else:
                return
        self.version += 1
        if tails:
            self.reason = True
        if self.broken or not ops:
            return
        kept, cost, quiet = self._ops, self._cost, _QUIET
        for key, value in ops:
            first = key[0]
            if first in quiet:
                if first in _NEVER:
                    continue
            else:
                self.reason = True
            if key not in kept:
                cost += len(key) + ENTRY_COST
            if value is not None:
                cost += len(value)
            kept[key] = value
        self._cost = cost
        if cost > self._limit // 2:
            if cost > self._limit:
                self._ops, self._cost, self.broken, self.reason = {}, 0, True, True
            else:
                self.on_many()

    def cut(self) -> list[Op]:
        """Everything noted since the last cut. The next one begins here; `broken` is over, since whoever cuts then begins anew."""
        ops = list(self._ops.items())
        self._ops, self._cost, self.reason, self.broken = {}, 0, False, False
        return ops

    def lose(self) -> None:
        """What led here is not known any more (the journal no longer has it)."""
        self._ops, self._cost, self.broken, self.reason = {}, 0, True, True

    @property
    def cost(self) -> int:
        """Bytes held, about."""
        return self._cost


def _nothing() -> None:
    return


def _is_reason(ops: Sequence[Op]) -> bool:
    return any(key[:1] not in NEVER_SHIPPED and key[:1] not in NO_REASON_TO_SHIP for key, _ in ops)


class Replaying:
    """Collects, at open, what the journal still has of commits that may not have been published: in order, bounded like `Changes`."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._commits: list[tuple[int, list[Op]]] = []
        self._cost = 0
        #: The first commit that is whole here.
        self._first: int | None = None

    def take(self, sequence: int, ops: list[Op]) -> None:
        """A whole commit, of the segments in the order in which they are read."""
        if self._first is None:
            self._first = sequence
        self._commits.append((sequence, ops))
        self._cost += sum(len(key) + ENTRY_COST + (0 if value is None else len(value)) for key, value in ops)
        if self._cost > self._limit:
            # The oldest go: what was published need not be here, and if it was not, a checkpoint helps.
            self._commits, self._cost, self._first = [], 0, sequence + 1

    def into(self, changes: Changes, published: int | None, last: int) -> None:
        """Note what came after `published` in `changes`; lose it if that is not all here. `last`: the last commit there is.

        From that very commit on, not after it: a cut may have fallen between two of its batches, and once more does no harm.
        """
        changes.newer = any(sequence > (published or 0) and _is_reason(ops) for sequence, ops in self._commits)
        if published is None or (published <= last and (self._first is None or self._first > published)):
            changes.lose()
            return
        for sequence, ops in self._commits:
            if sequence >= published:
                changes.note(ops)
