"""Numbers that are never used twice in a volume's history, from ranges that are reserved in the store before use.

Record: key `c` + name, value u64: the next number nobody has reserved. What a process reserved and did not use is skipped.
"""

from __future__ import annotations

from storage.errors import Corrupt
from storage.interfaces import Batch, MetadataStore
from storage.metadata.keys import COUNTER, read_u64, u64

_END = 1 << 63


class Counter:
    """Hands out numbers from 1. Half a range before the reserved ones run out, the next range is reserved."""

    def __init__(self, store: MetadataStore, name: bytes, range_size: int) -> None:
        """Nothing is reserved yet: that happens with `reserve`, or with the first number. Corrupt if the record is damaged."""
        self._store = store
        self._key = COUNTER + name
        self._range = range_size
        raw = store.get(self._key)
        if raw is not None and (len(raw) != 8 or not 0 < read_u64(raw) < _END):
            raise Corrupt(f"metadata: the counter {name.decode('ascii', 'replace')!r} is damaged; recover the volume from its hosts")
        #: The first number this counter reserves: above everything reserved before it was made.
        self.first = 1 if raw is None else read_u64(raw)
        self._next = self.first
        #: # Invariant: the record, once what was asked of the store is applied, says `_limit`; nothing from it on is handed out.
        self._limit = self.first
        #: Ranges that may not be durable yet: (its end, sequence of a commit that has it, or None while that is not known).
        self._undurable: list[tuple[int, int | None]] = []

    def reserve(self, batch: Batch) -> None:
        """Put the reservation of a further range into `batch`, which is to be applied before the next number is asked for."""
        self._limit += self._range
        batch.put(self._key, u64(self._limit))
        self._undurable.append((self._limit, None))

    def next_now(self, count: int = 1) -> int:
        """A number, at once: the first of `count` consecutive ones. Its reservation is applied before it is returned, so whatever is
        applied with the number is durable after it.

        Raises Fenced like `MetadataStore.apply`. No await happens inside.
        """
        while self._limit - self._next < max(self._range // 2, count):
            batch = Batch()
            limit = self._limit
            self.reserve(batch)
            try:
                self._store.apply(batch)
            except BaseException:
                self._limit = limit
                self._undurable.pop()
                raise
        number = self._next
        self._next += count
        return number

    async def next_durable(self, count: int = 1) -> int:
        """The first of `count` consecutive numbers whose reservation is durable when it is returned (I1). Usually without waiting, else
        it commits.

        NoSpace, Fenced: the number is skipped.
        """
        number = self.next_now(count)
        if not self._is_durable(number + count - 1):
            # What a full journal holds goes to the hosts under such numbers: without them it would stay full.
            self._store.empties()
            await self._store.commit(urgent=True)
        return number

    def _is_durable(self, number: int) -> bool:
        """Is the range of `number` known to be durable?"""
        while self._undurable:
            limit, sequence = self._undurable[0]
            if sequence is None:
                raw = self._store.get(self._key)
                if raw is None or read_u64(raw) < limit:
                    return number < limit - self._range
                # Applied by now, so in the commit of what is applied by now at the latest.
                sequence = self._store.applied_sequence
                self._undurable[0] = (limit, sequence)
            if self._store.durable_sequence < sequence:
                return number < limit - self._range
            del self._undurable[0]
        return True
