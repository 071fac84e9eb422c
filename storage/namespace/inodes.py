"""The cache of inode records, the dirty ones among them, and `Change`: one batch over several inodes.

Times change with every write; their records go to the store only right before a commit (the store's commit hook), so
each commit has them and a burst of writes costs one record. Structural changes go to the store at once.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from storage.errors import BadArgument, Corrupt, IsADirectory, NotADirectory, NotFound
from storage.interfaces import Batch, MetadataStore, TailPiece, Values
from storage.metadata.keys import INODE
from storage.metadata.together import by_number, complete
from storage.namespace.records import (
    COUNTS_KEY,
    MAX_OFFSET,
    CountsRecord,
    InodeRecord,
    StraightRecord,
    clone,
    decode_counts,
    decode_inode,
    decode_inodes,
    decode_straight,
    encode_counts,
    encode_inode,
    inode_key,
)
from storage.seams import Clock

#: Clean records kept decoded: some 500 bytes each.
CACHE_LIMIT = 16_384
#: Dirty records held back before they are put into the store without waiting for a commit (I7).
DIRTY_LIMIT = 16_384


class Inode:
    """One inode in memory. There is at most one of these per number at a time, however long somebody holds it."""

    __slots__ = ("__weakref__", "clipped", "dirty", "gone", "ino", "rec", "stored", "tail", "tail_known")

    def __init__(self, ino: int, rec: InodeRecord, clipped: bool) -> None:
        self.ino: Final = ino
        self.rec = rec
        #: True while `rec` differs from the store's record. Invariant: dirty == (in InodeTable._dirty).
        self.dirty = False
        #: True once its record is deleted: the object is of no use any more.
        self.gone = False
        #: False: the map may point beyond the value (a crash), and must be cut off before anything is appended (N4).
        self.clipped = clipped
        #: Bytes in its value; -1: not looked up yet. Only `InodeTable.written` and another value change it: what goes from the tail into
        #: sectors leaves it as it is.
        self.stored = -1
        #: The map's last entry (file offset, length, value offset) where `tail_known`; None: the map is empty.
        self.tail: tuple[int, int, int] | None = None
        self.tail_known = False

    def __repr__(self) -> str:
        return f"<Inode {self.ino} {self.rec.mode:o} nlink={self.rec.nlink} dirty={self.dirty}>"


class InodeTable:
    """Inodes by number: an LRU of decoded records, plus every dirty one."""

    def __init__(self, store: MetadataStore, values: Values, clock: Clock, cache_limit: int = CACHE_LIMIT) -> None:
        self.store = store
        self._values = values
        self._clock = clock
        self._limit = max(1, cache_limit)
        self._cache: OrderedDict[int, Inode] = OrderedDict()
        #: Keeps identity: an inode that left the LRU is found again as long as somebody holds it.
        self._live: weakref.WeakValueDictionary[int, Inode] = weakref.WeakValueDictionary()
        self._dirty: dict[int, Inode] = {}
        raw = store.get(COUNTS_KEY)
        self.counts = decode_counts(raw) if raw is not None else CountsRecord(inodes=0, files=0, bytes=0)
        self._counts_dirty = False
        #: Grows with every change of a record in memory and with every batch of changes.
        self.version = 0
        store.add_commit_hook(self.emit)

    def now(self) -> int:
        return self._clock.time_ns()

    # ---- finding

    def get(self, ino: int) -> Inode:
        """NotFound if there is no such inode; Corrupt if its record is damaged."""
        inode = self._cache.get(ino)
        if inode is not None:
            self._cache.move_to_end(ino)
            return inode
        inode = self._live.get(ino)
        if inode is None:
            raw = self.store.get(inode_key(ino)) if 0 < ino <= MAX_OFFSET else None
            if raw is None:
                raise NotFound(f"inode {ino} does not exist (any more)")
            rec = decode_inode(ino, raw)
            inode = Inode(ino, rec, clipped=True)
            if rec.map:
                inode.clipped = self.stored(inode) >= rec.map_bound
        self._keep(inode)
        return inode

    def peek(self, inos: Sequence[int]) -> Sequence[Inode | InodeRecord]:
        """What there is of many inodes: each as it is in memory, or its stored record. Nothing is kept: whoever lists a directory would
        drive out what is in use. NotFound, Corrupt."""
        if not self._live and self._cache.keys().isdisjoint(inos):
            return self._stored(inos)
        cached = self._cache.get
        found: list[Inode | InodeRecord | None] = [cached(ino) for ino in inos]
        if self._live:
            found = [inode or self._live.get(ino) for ino, inode in zip(inos, found, strict=True)]
        missing = [ino for ino, inode in zip(inos, found, strict=True) if inode is None]
        records = iter(self._stored(missing))
        return [next(records) if inode is None else inode for inode in found]

    def peek_straight(self, inos: Sequence[int]) -> Sequence[StraightRecord] | None:
        """As `peek`, if none of them is in memory and all are regular files without a map; None: not so, or some record is not right."""
        if self._live or not self._cache.keys().isdisjoint(inos):
            return None
        raws = complete(by_number(self.store, INODE, inos))
        return None if raws is None else decode_straight(raws)

    def _stored(self, inos: Sequence[int]) -> list[InodeRecord]:
        found = by_number(self.store, INODE, inos)
        raws = complete(found)
        if raws is None:
            raise NotFound(f"inode {inos[found.index(None)]} does not exist (any more)")
        return decode_inodes(inos, raws)

    def _keep(self, inode: Inode) -> None:
        self._cache[inode.ino] = inode
        if len(self._cache) > self._limit:
            left, old = self._cache.popitem(last=False)
            self._live[left] = old

    def directory(self, ino: int) -> Inode:
        """NotADirectory if it is something else."""
        inode = self.get(ino)
        if not inode.rec.is_dir:
            raise NotADirectory(f"inode {ino} is not a directory")
        return inode

    def regular(self, ino: int) -> Inode:
        """IsADirectory, or BadArgument for a symlink, fifo, socket or device: only regular files have content."""
        inode = self.get(ino)
        if not inode.rec.is_regular:
            if inode.rec.is_dir:
                raise IsADirectory(f"inode {ino} is a directory")
            raise BadArgument(f"inode {ino} is not a regular file: it has no content")
        return inode

    def stored(self, inode: Inode) -> int:
        """Bytes in the file's value; 0 for what has none."""
        if inode.stored < 0:
            inode.stored = self.stored_of(inode.ino, inode.rec)
        return inode.stored

    def stored_of(self, ino: int, rec: InodeRecord) -> int:
        """As `stored`, by a record of the store."""
        if not rec.value:
            return 0
        try:
            return self._values.size_of(rec.value)
        except NotFound as error:
            raise Corrupt(f"inode {ino}: its value {rec.value} does not exist; check the volume's metadata") from error

    # ---- dirty ones

    def mark_dirty(self, inode: Inode) -> None:
        """`inode.rec` was changed in place: the next commit has it. Never raises."""
        self.version += 1
        if not inode.dirty and not inode.gone:
            inode.dirty = True
            self._dirty[inode.ino] = inode

    def check_writable(self) -> None:
        """Raise what `apply` would (Fenced, NoSpace) before `Values.free` or `uncommitted_tail`: a failed `apply` cannot take those back.

        Good until the next await, if nothing else is applied before: the store refuses for what it is, not for what it is given.
        """
        self.relieve()
        self.store.apply(Batch())

    def relieve(self) -> None:
        """Put the dirty records into the store if there are too many. Fenced."""
        if len(self._dirty) >= DIRTY_LIMIT:
            self.emit()

    def emit(self) -> None:
        """The commit hook: bring the store's records up to date. NO AWAIT: what it puts belongs to one moment."""
        if not self._dirty and not self._counts_dirty:
            return
        ops: list[tuple[bytes, bytes | None]] = []
        delta = 0
        for inode in self._dirty.values():
            delta += self.refresh(inode, inode.rec)
            ops.append((inode_key(inode.ino), encode_inode(inode.rec)))
        # Nearly always they say so already.
        counts = self._counted(0, 0, delta) if delta else self.counts
        ops.append((COUNTS_KEY, encode_counts(counts)))
        self.store.apply(Batch(ops))
        self.counts = counts
        self._counts_dirty = False
        for inode in self._dirty.values():
            inode.dirty = False
        self._dirty.clear()

    def refresh(self, inode: Inode, rec: InodeRecord) -> int:
        """Bring what `rec` says about its value up to now; returns by how much the total of bytes changes."""
        if not rec.value or rec.value != inode.rec.value:
            return 0  # A value of this very change: it is empty, and `truncate` has said so.
        size = self.stored(inode)
        delta = size - rec.counted
        rec.counted = size
        if rec.map and inode.clipped:
            rec.map_bound = size  # N3: exactly what is mapped. Not while unclipped: entries may still reach beyond (N5).
        return delta

    def _counted(self, inodes: int, files: int, size: int) -> CountsRecord:
        old = self.counts
        # Never below zero, whatever a crash between batches left behind: a wrong total must not stop a write.
        return CountsRecord(inodes=max(0, old.inodes + inodes), files=max(0, old.files + files), bytes=max(0, old.bytes + size))

    def written(self, inode: Inode, length: int) -> None:
        """`length` bytes were appended to its value: times and totals say so at once."""
        rec = inode.rec
        rec.mtime = rec.ctime = self.now()
        if length:
            rec.counted += length
            if inode.stored >= 0:
                inode.stored += length
            self.counts.bytes += length
            self._counts_dirty = True
        self.mark_dirty(inode)

    # ---- for Change

    def install(self, changed: list[tuple[Inode, InodeRecord]], dropped: list[Inode], inodes: int, files: int, size: int) -> None:
        """The batch is applied: memory says the same from here on."""
        self.version += 1
        for inode, rec in changed:
            if inode.rec.value != rec.value:
                inode.stored = -1
            inode.rec = rec
            self._keep(inode)
            self._clean(inode)
        for inode in dropped:
            self._clean(inode)
            inode.gone = True
            self._cache.pop(inode.ino, None)
            self._live.pop(inode.ino, None)
        if inodes or files or size:
            counts = self.counts
            # Never below zero: see `_counted`.
            counts.inodes = max(0, counts.inodes + inodes)
            counts.files = max(0, counts.files + files)
            counts.bytes = max(0, counts.bytes + size)
            self._counts_dirty = True

    def _clean(self, inode: Inode) -> None:
        if inode.dirty:
            inode.dirty = False
            del self._dirty[inode.ino]


class Change:
    """A batch under way: edited copies of records, and other keys in `batch`. Nothing is seen by anybody until `apply`.

    NO AWAIT between making one and applying it.
    """

    __slots__ = ("_added", "_dropped", "_staged", "_table", "_touched", "batch")

    def __init__(self, table: InodeTable) -> None:
        self.batch = Batch()
        self._table = table
        self._staged: dict[int, tuple[Inode, InodeRecord]] = {}
        self._touched: list[tuple[Inode, int]] = []
        self._added: set[int] = set()
        self._dropped: dict[int, tuple[Inode, InodeRecord]] = {}

    def edit(self, inode: Inode) -> InodeRecord:
        """The record as it will be: change it in place."""
        staged = self._staged.get(inode.ino)
        if staged is None:
            staged = self._staged[inode.ino] = (inode, clone(inode.rec))
        return staged[1]

    def add(self, ino: int, rec: InodeRecord) -> None:
        """A new inode."""
        inode = Inode(ino, rec, clipped=True)
        inode.stored = 0  # its value, if it has one, is of this very batch
        self._staged[ino] = (inode, rec)
        self._added.add(ino)

    def drop(self, inode: Inode) -> None:
        """The inode's record is deleted."""
        self._staged.pop(inode.ino, None)
        self._dropped[inode.ino] = (inode, inode.rec)

    def touch(self, inode: Inode, now: int) -> None:
        """Its mtime and ctime become `now` once the change is applied, durable with the same commit."""
        self._touched.append((inode, now))

    def apply(self, tails: Sequence[TailPiece] = ()) -> None:
        """Make it all happen. Fenced: nothing did."""
        table = self._table
        table.relieve()
        inodes, files, delta = len(self._added) - len(self._dropped), 0, 0
        for inode, now in self._touched:
            staged = self._staged.get(inode.ino)
            if staged is not None:
                staged[1].mtime = staged[1].ctime = now
        for ino, (inode, rec) in self._staged.items():
            if ino in self._added:
                files += rec.is_regular
            else:
                delta += self._size_change(inode, rec)
            self.batch.put(inode_key(ino), encode_inode(rec))
        for ino, (_, rec) in self._dropped.items():
            files -= rec.is_regular
            delta -= rec.counted
            self.batch.delete(inode_key(ino))
        table.store.apply(self.batch, tails)
        table.install(list(self._staged.values()), [inode for inode, _ in self._dropped.values()], inodes, files, delta)
        for inode, now in self._touched:
            if inode.ino not in self._staged and inode.ino not in self._dropped:
                inode.rec.mtime = inode.rec.ctime = now
                table.mark_dirty(inode)

    def _size_change(self, inode: Inode, rec: InodeRecord) -> int:
        if rec.value != inode.rec.value:
            rec.counted = 0  # A new, empty value in the place of the old.
            return -inode.rec.counted
        return self._table.refresh(inode, rec)
