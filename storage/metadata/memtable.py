"""Recent changes in memory, above LMDB: what was applied and is not in LMDB yet.

Two layers at most: `active`, which takes every change, and `frozen`, which LMDB is taking over and which no longer changes.
What was applied since the last commit was taken (`pending`) is in `active` like everything else, and once more by itself, with what it
replaced (`_undo`): so a layer of durable changes only can be split off at any moment, also when no commit is possible.

All methods belong to the event loop's thread and await nothing. # Invariant: reader's view = active over frozen over LMDB, at any moment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from sortedcontainers import SortedList

from storage.errors import BadArgument
from storage.metadata.records import MAX_KEY, MAX_VALUE, Op

#: Memory of one entry besides its bytes, roughly: keys, values, dict and list slots.
ENTRY_COST = 200


class _Missing:
    """The key had no entry in the layer."""


_MISSING = _Missing()


class Base(Protocol):
    """What a memtable lies over."""

    def get(self, key: bytes) -> bytes | None: ...
    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]: ...
    def row(self, first: bytes, last: bytes, count: int) -> list[bytes] | None: ...
    def scan(self, start: bytes, stop: bytes, limit: int, reverse: bool = False) -> list[tuple[bytes, bytes]]: ...
    def pairs(self, start: bytes, stop: bytes, reverse: bool) -> Iterator[tuple[bytes, bytes]]: ...


class Layer:
    """Keys with their newest value (None: deleted), in order."""

    __slots__ = ("_keys", "_new", "chain", "cost", "note_new", "sequence", "values")

    def __init__(self) -> None:
        self.values: dict[bytes, bytes | None] = {}
        self._keys: SortedList = SortedList()
        #: Keys that are not in `_keys` yet: sorting in is left until somebody wants the order.
        self._new: list[bytes] = []
        self.note_new = self._new.append
        #: Bytes of memory, about.
        self.cost = 0
        #: Of a frozen layer: the last commit in it, and the chain hash there once that commit is durable.
        self.sequence = 0
        self.chain: bytes | None = None

    def put(self, key: bytes, value: bytes | None) -> None:
        if key not in self.values:
            self.note_new(key)
            self.cost += len(key) + ENTRY_COST
        self.values[key] = value
        # Not exact where a value is replaced: `cost` is only there to say when a takeover is due.
        if value is not None:
            self.cost += len(value)

    def ordered(self) -> SortedList:
        """All keys, in order."""
        if self._new:
            self._keys.update(self._new)
            self._new.clear()
        return self._keys

    def remove(self, key: bytes) -> None:
        """Forget the key, as if it had never been put."""
        self.ordered().remove(key)
        del self.values[key]

    def pairs(self, start: bytes, stop: bytes, reverse: bool) -> Iterator[tuple[bytes, bytes | None]]:
        values = self.values
        return ((key, values[key]) for key in self.ordered().irange(start, stop, (True, False), reverse))


class Memtable:
    """See the module. `base` is what lies below."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self.active = Layer()
        self.frozen: Layer | None = None
        #: What was applied since the last `take`, newest value of each key.
        self.pending: dict[bytes, bytes | None] = {}
        #: Upper bound of the bytes of `pending` in a journal record.
        self.pending_bytes = 0
        #: Of each pending key: what `active` had before.
        self._undo: dict[bytes, bytes | _Missing | None] = {}

    def get(self, key: bytes) -> bytes | None:
        values = self.active.values
        if key in values:
            return values[key]
        if self.frozen is not None:
            values = self.frozen.values
            if key in values:
                return values[key]
        return self._base.get(key)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See MetadataStore."""
        active: Mapping[bytes, bytes | None] = self.active.values
        frozen: Mapping[bytes, bytes | None] = {} if self.frozen is None else self.frozen.values
        # Every key is looked for, also in what is empty.
        if (not active or active.keys().isdisjoint(keys)) and (not frozen or frozen.keys().isdisjoint(keys)):
            return self._base.get_many(keys)
        above = [key in active or key in frozen for key in keys]
        below = iter(self._base.get_many([key for key, here in zip(keys, above, strict=True) if not here]))
        return [(active[key] if key in active else frozen[key]) if here else next(below) for key, here in zip(keys, above, strict=True)]

    def row(self, first: bytes, last: bytes, count: int) -> list[bytes] | None:
        """See MetadataStore."""
        for layer in (self.active, self.frozen):
            if layer is not None and layer.values and next(layer.pairs(first, last + b"\0", False), None) is not None:
                return None
        return self._base.row(first, last, count)

    def scan(self, start: bytes, stop: bytes, limit: int, reverse: bool = False) -> list[tuple[bytes, bytes]]:
        """See MetadataReader."""
        if limit <= 0 or start >= stop:
            return []
        layers = (self.active,) if self.frozen is None else (self.active, self.frozen)
        # Newest first.
        heads = [_Head(layer.pairs(start, stop, reverse)) for layer in layers if layer.values]
        heads = [head for head in heads if head.advance()]
        if not heads:
            return self._base.scan(start, stop, limit, reverse)
        below = _Head(self._base.pairs(start, stop, reverse))
        if below.advance():
            heads.append(below)
        return _merge(heads, limit, reverse)

    def apply(self, ops: Sequence[Op]) -> None:
        """All of `ops`, or nothing and BadArgument."""
        size = 16 * len(ops)
        for key, value in ops:
            length = len(key)
            size += length
            if value is not None:
                taken = len(value)
                size += taken
                if 0 < length <= MAX_KEY and taken <= MAX_VALUE:
                    continue
            elif 0 < length <= MAX_KEY:
                continue
            raise BadArgument(f"metadata key {key[:16].hex()}: keys have 1 to {MAX_KEY} bytes, values up to {MAX_VALUE}")
        pending, undo, active = self.pending, self._undo, self.active
        values = active.values
        fresh = again = 0
        for key, value in ops:
            old = values.get(key, _MISSING)
            if key not in pending:
                undo[key] = old
            else:
                # It takes its room in the commit once: what cannot be committed for long must not seem to be more and more.
                before = pending[key]
                again += 16 + len(key) + (0 if before is None else len(before))
            pending[key] = value
            # As `Layer.put`, which this is the busiest caller of.
            if old is _MISSING:
                active.note_new(key)
                fresh += ENTRY_COST
            values[key] = value
        self.pending_bytes += size - again
        # Not exact where a key is put again: `cost` is only there to say when a takeover is due.
        active.cost += fresh + size

    def load(self, ops: Sequence[Op]) -> None:
        """As `apply`, for what is durable already (replay)."""
        for key, value in ops:
            self.active.put(key, value)

    def take(self) -> list[Op]:
        """Everything pending, for a commit; from now on it counts as committed here."""
        ops = list(self.pending.items())
        self.pending, self._undo, self.pending_bytes = {}, {}, 0
        return ops

    def freeze(self, sequence: int) -> Layer:
        """Split off everything but what is pending: all of it, and nothing else, is in the commits up to `sequence`.

        Costs nothing right after `take`, else time in proportion to what is pending. There must be no frozen layer.
        """
        layer = self.active
        fresh = Layer()
        for key, value in self.pending.items():
            fresh.put(key, value)
        for key, old in self._undo.items():
            if isinstance(old, _Missing):
                layer.remove(key)
            else:
                layer.values[key] = old
        self._undo = dict.fromkeys(self.pending, _MISSING)
        layer.sequence, layer.chain = sequence, None
        layer.ordered()  # from now on another thread may read it
        self.active, self.frozen = fresh, layer
        return layer

    def drop_frozen(self) -> None:
        """The base holds it now."""
        self.frozen = None


class _Head:
    """Where a merge stands in one of its sources."""

    __slots__ = ("key", "source", "value")

    def __init__(self, source: Iterator[tuple[bytes, bytes | None]]) -> None:
        self.source = source
        self.key = b""
        self.value: bytes | None = None

    def advance(self) -> bool:
        """Go on to the next pair; False if there is none."""
        pair = next(self.source, None)
        if pair is None:
            return False
        self.key, self.value = pair
        return True


def _merge(heads: list[_Head], limit: int, reverse: bool) -> list[tuple[bytes, bytes]]:
    """The first `limit` pairs that are not deletions; of equal keys the first head's counts. No head is exhausted."""
    out: list[tuple[bytes, bytes]] = []
    while heads:
        best = heads[0]
        key = best.key
        for head in heads[1:]:
            if head.key > key if reverse else head.key < key:
                best, key = head, head.key
        if best.value is not None:
            out.append((key, best.value))
            if len(out) == limit:
                break
        heads = [head for head in heads if head.key != key or head.advance()]
    return out
