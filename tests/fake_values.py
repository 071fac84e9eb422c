"""Values in memory, over a MemoryStore: what the journal was given survives a crash, what it was not is lost.

store = MemoryStore(); values = FakeValues(store)
values.fly(value, upto)     # bytes below `upto` are now in a sector in flight; `land` makes them an extent
values.hold = trio.Event()  # reserve() waits for it
later = crashed(store, keep=3); FakeValues(later)
"""

from __future__ import annotations

from collections.abc import Sequence

import trio

from storage.errors import Busy, NotFound
from storage.interfaces import Batch, Buffer, FlushProgress, FlushReport, TailPiece
from storage.metadata.keys import VALUE, u64
from tests.fakes import MemoryStore


def crashed(store: MemoryStore, keep: int = 0) -> MemoryStore:
    """What the next process finds where, besides the durable commits, the first `keep` applied batches had reached the journal."""
    durable = store.crash()
    content, tails = durable.content(), list(durable.durable_tails)
    for batch, pieces in store._pending[:keep]:
        for key, value in batch.ops:
            if value is None:
                content.pop(key, None)
            else:
                content[key] = value
        tails += pieces
    survivor = MemoryStore(content, durable.durable_sequence)
    survivor.durable_tails = tails
    return survivor


class FakeValues:
    """Every byte is in memory; `_handed` says up to where the journal (or an extent) has them."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self._data: dict[int, bytearray] = {}
        self._handed: dict[int, int] = {}
        #: value -> (end, landed) of the bytes in flight, which begin at `_handed`.
        self._flights: dict[int, tuple[int, trio.Event]] = {}
        self._next = 1
        #: While set and not yet fired, reserve waits for it.
        self.hold: trio.Event | None = None
        #: While set and not yet fired, read waits for it.
        self.hold_reads: trio.Event | None = None
        self.full = False
        #: Bytes appended since it was made.
        self.appended = 0
        self.remote: set[int] = set()
        for piece in store.durable_tails:
            data = self._data.setdefault(piece.value_id, bytearray())
            if piece.offset <= len(data):
                data[piece.offset :] = b"".join(bytes(part) for part in piece.data)
        for value_id, data in self._data.items():
            self._handed[value_id] = len(data)
        for key, _ in store.scan(VALUE, b"w", 10**9):
            self._next = max(self._next, int.from_bytes(key[1:], "big") + 1)

    def check_room(self) -> None:
        return None

    def _check(self, value_id: int) -> None:
        if self._store.get(VALUE + u64(value_id)) is None:
            raise NotFound(f"value {value_id} does not exist")

    def create(self, batch: Batch, owner: int, replication: str) -> int:
        value_id, self._next = self._next, self._next + 1
        batch.put(VALUE + u64(value_id), replication.encode())
        return value_id

    def size_of(self, value_id: int) -> int:
        self._check(value_id)
        return len(self._data.get(value_id, b""))

    def sizes_of(self, value_ids: Sequence[int]) -> list[int | None]:
        return [None if self._store.get(VALUE + u64(value_id)) is None else self.size_of(value_id) for value_id in value_ids]

    def replication_of(self, value_id: int) -> str:
        self._check(value_id)
        return (self._store.get(VALUE + u64(value_id)) or b"").decode()

    def set_replication(self, batch: Batch, value_id: int, replication: str) -> None:
        self._check(value_id)
        batch.put(VALUE + u64(value_id), replication.encode())

    async def stored_as(self, value_id: int) -> dict[str, int]:
        return {self.replication_of(value_id): self.size_of(value_id)}

    async def hold_back(self) -> None:
        return None

    async def keep_pace(self, removing: bool = False) -> None:
        return None

    async def reserve(self, value_id: int, length: int) -> None:
        if self.hold is not None:
            await self.hold.wait()
        if self.full:
            raise Busy("the test says it is full")

    def reserve_now(self, value_id: int, length: int) -> bool:
        return self.hold is None and not self.full

    def append_now(self, value_id: int, data: Buffer) -> int:
        self._check(value_id)
        have = self._data.setdefault(value_id, bytearray())
        have += data
        self.appended += len(data)
        return len(have) - len(data)

    async def read(self, value_id: int, offset: int, size: int) -> bytes:
        self._check(value_id)
        if self.hold_reads is not None:
            await self.hold_reads.wait()
            self._check(value_id)
        return bytes(self._data.get(value_id, b"")[offset : offset + size])

    def ends_with(self, value_id: int, data: bytes) -> bool:
        self._check(value_id)
        return self.hold_reads is None and bytes(self._data.get(value_id, b"")).endswith(data)

    def read_now(self, value_id: int, offset: int, size: int) -> Buffer | None:
        if self.hold_reads is not None or offset < 0:
            return None
        self._check(value_id)
        return bytes(self._data.get(value_id, b"")[offset : offset + size])

    def free(self, batch: Batch, value_id: int) -> None:
        batch.delete(VALUE + u64(value_id))

    def fly(self, value_id: int, upto: int) -> None:
        self._flights[value_id] = (upto, trio.Event())

    def land(self, value_id: int) -> None:
        """The sector is durable: its extent is applied."""
        upto, landed = self._flights.pop(value_id)
        self.hand_over(value_id, upto)
        landed.set()

    async def settle(self, value_id: int, upto: int) -> None:
        while value_id in self._flights and self._handed.get(value_id, 0) < upto:
            await self._flights[value_id][1].wait()

    def hand_over(self, value_id: int, upto: int) -> None:
        """Bytes below `upto` go into the journal with the next commit."""
        start = self._handed.get(value_id, 0)
        if start < upto:
            self._store.apply(Batch(), [TailPiece(value_id, start, (bytes(self._data[value_id][start:upto]),))])
            self._handed[value_id] = upto

    def uncommitted_tail(self, value_id: int) -> list[TailPiece]:
        start, end = self._handed.get(value_id, 0), self.size_of(value_id)
        if start == end or value_id in self._flights:
            return []
        self._handed[value_id] = end
        return [TailPiece(value_id, start, (bytes(self._data[value_id][start:end]),))]

    async def commit(self, value_id: int) -> None:
        await self.settle(value_id, self.size_of(value_id))
        self._store.apply(Batch(), self.uncommitted_tail(value_id))
        await self._store.commit()

    async def commit_all(self) -> None:
        for value_id in list(self._data):
            if self._store.get(VALUE + u64(value_id)) is not None:
                await self.settle(value_id, self.size_of(value_id))
                self._store.apply(Batch(), self.uncommitted_tail(value_id))
        await self._store.commit()

    def local_at(self, value_id: int, offset: int) -> bool:
        self._check(value_id)
        return offset not in self.remote

    def accepting(self) -> bool:
        return not self.full

    async def flush(self, progress: FlushProgress | None = None) -> FlushReport:
        await self.commit_all()
        return FlushReport()
