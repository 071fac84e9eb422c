"""The log: entries since the checkpoint's scan began, as they go into superblocks, and the bytes of those that are on too few hosts.

An entry is a delta in one or more objects. Eight neighbours of one level are merged into one of the next, the newest value of each key
counting: so there are few of them, and each byte is sent once per level. Nothing here asks a host but through `fetch`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from storage.errors import FusefsError
from storage.history.objects import (
    LOG,
    TARGET_BODY,
    Delta,
    Ref,
    SealedObject,
    Tail,
    Writer,
    decode_delta,
    encode_delta,
    open_object,
    seal_object,
)
from storage.history.superblock import MAX_ENTRIES, LogEntry
from storage.metadata.keys import VALUE, u64
from storage.metadata.records import Op
from storage.seams import Seams

#: Entries of one level that become one of the next.
FAN = 8
#: Entries larger than this together are not merged: some 500,000 records, which take 150 MiB of memory while that goes on.
MAX_MERGED = 4 * 1024 * 1024
#: Bytes of sealed objects kept here at most, besides those that are on no host yet.
KEEP = 8 * 1024 * 1024

#: name -> bytes, from whichever host has it. Unavailable, Corrupt.
Fetch = Callable[[Ref], Awaitable[bytes]]
#: By the record of a value: does it need a tail up to this offset? Corrupt.
TailWanted = Callable[[bytes, int, int], bool]


@dataclass(slots=True)
class Held:
    """Bytes of objects by name: those on no host yet (`unplaced`), which must stay, and some of the others."""

    objects: dict[str, bytes] = field(default_factory=dict)
    unplaced: set[str] = field(default_factory=set)
    size: int = 0

    def add(self, sealed: SealedObject) -> None:
        if sealed.ref.name not in self.objects:
            self.objects[sealed.ref.name] = sealed.data
            self.size += len(sealed.data)
        self.unplaced.add(sealed.ref.name)

    def placed(self, name: str) -> None:
        """It is on some host: from now on it need not be here."""
        self.unplaced.discard(name)
        self._shrink()

    def forget(self, names: Sequence[str]) -> None:
        for name in names:
            self.unplaced.discard(name)
            data = self.objects.pop(name, None)
            if data is not None:
                self.size -= len(data)

    def _shrink(self) -> None:
        for name in [name for name in self.objects if name not in self.unplaced]:
            if self.size <= KEEP:
                return
            self.forget([name])


def bodies(delta: Delta) -> list[bytes]:
    """The delta in pieces of about TARGET_BODY, each a body of its own; operations and tails as they come."""
    found: list[bytes] = []
    ops: list[Op] = []
    tails: list[Tail] = []
    size = 0

    def end() -> None:
        nonlocal ops, tails, size
        found.append(encode_delta(Delta(delta.after, delta.upto, ops, tails)))
        ops, tails, size = [], [], 0

    for key, value in delta.ops:
        ops.append((key, value))
        size += len(key) + len(value or b"") + 8
        if size >= TARGET_BODY:
            end()
    for tail in delta.tails:
        for at in range(0, len(tail.data), TARGET_BODY):
            piece = tail.data[at : at + TARGET_BODY]
            tails.append(Tail(tail.value_id, tail.offset + at, piece))
            size += len(piece) + 24
            if size >= TARGET_BODY:
                end()
    if ops or tails or not found:
        end()
    return found


def merged(deltas: Sequence[Delta], wanted: TailWanted) -> Delta:
    """One delta that does what these do, one after the other.

    A tail goes only if these very deltas put its bytes into sectors, or remove its value. What is so by now, but in no delta yet, does not
    count: the next superblock would have neither.
    """
    newest: dict[bytes, bytes | None] = {}
    for delta in deltas:
        newest.update(delta.ops)

    def kept(tail: Tail) -> bool:
        key = VALUE + u64(tail.value_id)
        if key not in newest:
            return True
        record = newest[key]
        return record is not None and wanted(record, tail.value_id, tail.offset + len(tail.data))

    tails = [tail for delta in deltas for tail in delta.tails if kept(tail)]
    return Delta(deltas[0].after, deltas[-1].upto, list(newest.items()), tails)


class Log:
    """See the module. One task at a time: the publisher's."""

    def __init__(self, key: bytes, volume_id: bytes, writer: Callable[[], Writer], seams: Seams, wanted: TailWanted) -> None:
        self._key, self._volume_id, self._writer, self._seams, self._wanted = key, volume_id, writer, seams, wanted
        self.entries: list[LogEntry] = []
        self.held = Held()
        #: Entries before this place go with the checkpoint there is, those from it on with the one being written too; None: none is.
        self.boundary: int | None = None

    @property
    def size(self) -> int:
        """Bytes stored of all entries."""
        return sum(entry.size for entry in self.entries)

    @property
    def full(self) -> bool:
        """So many entries that only a checkpoint helps."""
        return len(self.entries) > MAX_ENTRIES // 4

    def refs(self) -> list[Ref]:
        """Every object of every entry."""
        return [ref for entry in self.entries for ref in entry.parts]

    async def seal(self, kind: int, body: bytes) -> SealedObject:
        """In a thread; the bytes are held until they are on a host."""
        sealed = await self._seams.threads.run(seal_object, self._key, self._writer(), kind, body, self._seams.random)
        self.held.add(sealed)
        return sealed

    async def append(self, delta: Delta, level: int = 0) -> LogEntry:
        """A new last entry."""
        entry = await self._entry(delta, level)
        self.entries.append(entry)
        return entry

    async def _entry(self, delta: Delta, level: int) -> LogEntry:
        parts = [(await self.seal(LOG, body)).ref for body in await self._seams.threads.run(bodies, delta)]
        return LogEntry(delta.after, delta.upto, level, parts)

    async def merge(self, fetch: Fetch) -> None:
        """Merge the last entries as long as FAN of them are of one level. A host that does not give one back postpones it."""
        while (group := self._due()) is not None:
            try:
                deltas = [await self._read(entry, fetch) for entry in group]
            except FusefsError:
                return  # entries stay as they are; nothing depends on it but their number
            level = group[-1].level + 1
            entry = await self._entry(merged(deltas, self._wanted), level)
            self.entries[-len(group) :] = [entry]
            # What the group's objects held here, hosts have, or the new entry.
            self.held.forget([ref.name for old in group for ref in old.parts])

    def _due(self) -> list[LogEntry] | None:
        first = self.boundary or 0
        group = self.entries[max(len(self.entries) - FAN, first) :]
        if len(group) < FAN or len({entry.level for entry in group}) > 1 or sum(entry.size for entry in group) > MAX_MERGED:
            return None
        return group

    async def _read(self, entry: LogEntry, fetch: Fetch) -> Delta:
        deltas: list[Delta] = []
        for ref in entry.parts:
            data = self.held.objects.get(ref.name) or await fetch(ref)
            body = await self._seams.threads.run(open_object, self._key, self._volume_id, ref, LOG, data, "log")
            deltas.append(decode_delta(body, "log"))
        return merged(deltas, self._wanted)
