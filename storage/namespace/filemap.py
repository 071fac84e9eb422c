"""The file map: file offset -> offset in the value, for files that are not one straight run.

A straight file has no entries: offsets are the value's. It becomes mapped with its first hole or out-of-order write, and straight
again only when it is emptied. Entries never overlap; an entry that goes on where its left neighbour ends, in the file and in the value,
is merged into it, so appending to a mapped file makes its last entry longer. The map is never held in memory, only its last entry is.

A map's entries stand under a number of their own, used once: when a file with a large map is emptied or removed, what is left under the old
number is deleted in slices by `Lifetime.reap`, while the file's next map is another.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from storage.interfaces import Batch, MetadataStore
from storage.metadata.keys import MAP, prefix_end, read_u64, u64
from storage.namespace.inodes import Inode, InodeTable
from storage.namespace.records import (
    ORPHAN_MAP,
    InodeRecord,
    MapRecord,
    decode_map,
    encode_inode,
    encode_map,
    inode_key,
    map_key,
    orphan_key,
)

#: Entries read at a time.
_PAGE = 256
#: A map with more entries than this is not deleted in the batch that empties its file, but in slices later.
DROP_AT_ONCE = 256
#: `map_bound` runs ahead of the map by this much, so that few of the writes between two commits need the inode record in their batch.
_BOUND_AHEAD = 64 * 1024 * 1024


class Piece(NamedTuple):
    """Bytes [offset, offset + length) of the file stand at `value_offset` of its value."""

    offset: int
    length: int
    value_offset: int

    @property
    def end(self) -> int:
        return self.offset + self.length

    @property
    def value_end(self) -> int:
        return self.value_offset + self.length


class FileMap:
    """Maps of all files. Every method is synchronous; `stored` is always the size of the file's value now."""

    def __init__(self, store: MetadataStore, inodes: InodeTable) -> None:
        self._store = store
        self._inodes = inodes

    # ---- reading

    def size(self, inode: Inode, stored: int) -> int:
        """The file's size."""
        rec = inode.rec
        if not rec.map:
            return stored
        last = self._last(inode, stored)
        return rec.size if last is None else max(rec.size, last.end)

    def pieces(self, inode: Inode, start: int, stop: int, stored: int) -> Iterator[Piece]:
        """What was written of [start, stop), trimmed to it, in order. Never beyond the value: after a crash the rest of the map is void."""
        rec = inode.rec
        if start >= stop:
            return
        if not rec.map:
            if start < stored:
                yield Piece(start, min(stop, stored) - start, start)
            return
        at = self._at_or_before(rec.map, start)
        first = start if at is None or at.end <= start else at.offset
        for entry in self._entries(rec.map, first, stop):
            live = _clip(entry, stored)
            if live is None:
                continue
            begin, end = max(live.offset, start), min(live.end, stop)
            if begin < end:
                yield Piece(begin, end - begin, live.value_offset + begin - live.offset)

    def gaps(self, inode: Inode, start: int, stop: int, stored: int) -> list[tuple[int, int]]:
        """The parts [begin, end) of [start, stop) that were never written."""
        found = []
        at = start
        for piece in self.pieces(inode, start, stop, stored):
            if at < piece.offset:
                found.append((at, piece.offset))
            at = piece.end
        if at < stop:
            found.append((at, stop))
        return found

    def _entries(self, map_id: int, start: int, stop: int) -> Iterator[Piece]:
        """Entries with start <= offset < stop, read page by page."""
        key, end = map_key(map_id, start), map_key(map_id, stop)
        while True:
            page = self._store.scan(key, end, _PAGE)
            for found, raw in page:
                yield _piece(map_id, found, raw)
            if len(page) < _PAGE:
                return
            key = page[-1][0] + b"\0"

    def _backwards(self, map_id: int) -> Iterator[Piece]:
        """All entries from the last one."""
        start = MAP + u64(map_id)
        end, limit = prefix_end(start), 1
        while True:
            page = self._store.scan(start, end, limit, reverse=True)
            for found, raw in page:
                yield _piece(map_id, found, raw)
            if len(page) < limit:
                return
            end, limit = page[-1][0], _PAGE

    def _at_or_before(self, map_id: int, offset: int) -> Piece | None:
        """The last entry that begins at or before `offset`."""
        page = self._store.scan(map_key(map_id, 0), map_key(map_id, offset) + b"\0", 1, reverse=True)
        return _piece(map_id, *page[0]) if page else None

    def _last(self, inode: Inode, stored: int) -> Piece | None:
        """The last entry that is not void, cached."""
        if not inode.tail_known:
            live = (_clip(entry, stored) for entry in self._backwards(inode.rec.map))
            inode.tail = next((entry for entry in live if entry is not None), None)
            inode.tail_known = True
        return None if inode.tail is None else Piece(*inode.tail)

    # ---- writing

    def make_clipped(self, inode: Inode, stored: int) -> None:
        """Cut off durably what the map says beyond the value, before anything is appended to it (N4). Fenced.

        Cheap unless a crash lost bytes of this very file: then its whole map is walked once.
        """
        if inode.clipped:
            return
        batch = Batch()
        for entry in self._entries(inode.rec.map, 0, 2**63):
            live = _clip(entry, stored)
            if live is None:
                batch.delete(map_key(inode.rec.map, entry.offset))
            elif live != entry:
                batch.put(map_key(inode.rec.map, entry.offset), _encode(live))
        rec = inode.rec
        before, rec.map_bound = rec.map_bound, stored
        batch.put(inode_key(inode.ino), encode_inode(rec))
        try:
            self._store.apply(batch)
        except BaseException:
            rec.map_bound = before
            raise
        inode.clipped = True
        inode.tail_known = False

    def start_map(self, rec: InodeRecord, map_id: int, batch: Batch, stored: int) -> None:
        """`rec` (a copy of a straight file's) becomes a mapped one's, with what there is as its first entry; the caller puts it."""
        rec.map = map_id
        rec.size = 0
        rec.map_bound = stored
        if stored:
            batch.put(map_key(map_id, 0), _encode(Piece(0, stored, 0)))

    def started(self, inode: Inode, stored: int) -> None:
        """The batch of `start_map` is applied."""
        inode.clipped = True
        inode.tail = Piece(0, stored, 0) if stored else None
        inode.tail_known = True

    def add(self, inode: Inode, gaps: list[tuple[int, int]], stored: int) -> None:
        """The bytes for `gaps`, in their order, are about to be appended at offset `stored` of the value: NO AWAIT until they are.

        The file must be mapped and clipped. Fenced: nothing was changed.
        """
        rec = inode.rec
        last = self._last(inode, stored)
        batch = Batch()
        at = stored
        for begin, end in gaps:
            piece = Piece(begin, end - begin, at)
            at = piece.value_end
            left = last if last is not None and last.end <= begin else self._at_or_before(rec.map, begin)
            if left is not None and left.end == piece.offset and left.value_end == piece.value_offset:
                piece = Piece(left.offset, left.length + piece.length, left.value_offset)
            batch.put(map_key(rec.map, piece.offset), _encode(piece))
            if last is None or piece.end > last.end:
                last = piece
        bound = rec.map_bound
        if at > bound:
            # N5: the record says so no later than the entry does.
            rec.map_bound = at + _BOUND_AHEAD
            batch.put(inode_key(inode.ino), encode_inode(rec))
        try:
            self._store.apply(batch)
        except BaseException:
            rec.map_bound = bound
            raise
        inode.tail = last
        inode.tail_known = True

    def drop(self, batch: Batch, map_id: int) -> None:
        """The map's entries go with the batch, or with later slices if there are many."""
        start = MAP + u64(map_id)
        page = self._store.scan(start, prefix_end(start), DROP_AT_ONCE + 1)
        for key, _ in page[:DROP_AT_ONCE]:
            batch.delete(key)
        if len(page) > DROP_AT_ONCE:
            batch.put(orphan_key(map_id), ORPHAN_MAP)

    def drop_slice(self, map_id: int) -> bool:
        """One more slice of a dropped map; False once nothing is left. Fenced."""
        batch = Batch()
        start = MAP + u64(map_id)
        page = self._store.scan(start, prefix_end(start), DROP_AT_ONCE)
        for key, _ in page:
            batch.delete(key)
        if len(page) < DROP_AT_ONCE:
            batch.delete(orphan_key(map_id))
        self._store.apply(batch)
        return len(page) == DROP_AT_ONCE


def _clip(entry: Piece, stored: int) -> Piece | None:
    """What of the entry the value really holds."""
    length = min(entry.length, stored - entry.value_offset)
    return entry if length == entry.length else Piece(entry.offset, length, entry.value_offset) if length > 0 else None


def _piece(map_id: int, key: bytes, raw: bytes) -> Piece:
    offset = read_u64(key, 9)
    record = decode_map(map_id, offset, raw)
    return Piece(offset, record.length, record.value_offset)


def _encode(piece: Piece) -> bytes:
    return encode_map(MapRecord(length=piece.length, value_offset=piece.value_offset))
