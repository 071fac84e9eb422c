"""Content by the append-only rules: each byte of a file can be written once.

Writers of one inode take turns (a lock per inode, made when first needed), so what one has found out about the map stays true
while it waits for a read or for memory; only `truncate`, which is synchronous and asks nobody, can come between: then the
value is another and the writer starts again.
"""

from __future__ import annotations

from storage.errors import BadArgument, Corrupt, Expired, FusefsError, NotFound, NotPermitted, Unavailable
from storage.interfaces import Batch, Buffer, MetadataStore, Values
from storage.metadata.counters import Counter
from storage.namespace.directories import Directories
from storage.namespace.filemap import FileMap, Piece
from storage.namespace.inheritance import Inheritance
from storage.namespace.inodes import Change, Inode, InodeTable
from storage.namespace.records import MAX_OFFSET, clone, encode_inode, inode_key
from storage.turn import Turn
from storage.wording import counted

PAGE = 4096


class Content:
    """Reads and writes of regular files."""

    def __init__(
        self,
        store: MetadataStore,
        values: Values,
        inodes: InodeTable,
        filemap: FileMap,
        directories: Directories,
        inheritance: Inheritance,
        numbers: Counter,
    ) -> None:
        self._store = store
        self._values = values
        self._inodes = inodes
        self._map = filemap
        self._directories = directories
        self._inheritance = inheritance
        self._numbers = numbers
        #: A regular file that was written to lately: whoever writes goes on with it, as a rule.
        self._written: Inode | None = None
        #: One per inode that is being written. Invariant: here exactly while somebody holds it.
        self._locks: dict[int, Turn] = {}

    # ---- sizes

    def size(self, inode: Inode) -> int:
        """Of a regular file."""
        return self._map.size(inode, self._stored(inode))

    def _stored(self, inode: Inode) -> int:
        return self._inodes.stored(inode)

    def last_page_local(self, ino: int) -> bool:
        inode = self._inodes.regular(ino)
        stored = self._stored(inode)
        size = self._map.size(inode, stored)
        for piece in self._map.pieces(inode, size // PAGE * PAGE, size, stored):
            ends = (piece.value_offset, piece.value_end - 1)
            if not all(self._values.local_at(inode.rec.value, at) for at in ends):
                return False
        return True

    # ---- turns

    async def _take_turn(self, ino: int) -> None:
        lock = self._locks.get(ino)
        if lock is None:
            # The usual case: nobody else writes this file; no checkpoint is spent.
            lock = self._locks[ino] = Turn()
            lock.acquire_nowait()
        else:
            await lock.acquire()

    def _end_turn(self, ino: int) -> None:
        lock = self._locks[ino]
        lock.release()
        if not lock.locked():  # Else it went to the next in line.
            del self._locks[ino]

    # ---- writing

    async def write(self, ino: int, offset: int, data: Buffer) -> None:
        data = bytes(data)
        if offset < 0 or offset + len(data) > MAX_OFFSET:
            raise BadArgument(f"inode {ino}: no file reaches to offset {offset} + {len(data)}")
        if not data:
            self._inodes.regular(ino)
            return
        await self._take_turn(ino)
        try:
            while not await self._try_write(ino, offset, data):
                pass
        finally:
            self._end_turn(ino)

    def write_now(self, ino: int, offset: int, data: bytes) -> bool:
        # No await, so nobody can come between, and no turn has to be taken where nobody has it.
        if ino in self._locks:
            return False
        try:
            inode = self._written
            if inode is None or inode.ino != ino or inode.gone:
                inode = self._written = self._inodes.regular(ino)
            stored = inode.stored if inode.stored >= 0 else self._stored(inode)
            rec = inode.rec
            value, end = rec.value, offset + len(data)
            if (
                rec.map
                or not 0 <= offset <= stored < end <= MAX_OFFSET
                or (offset != stored and not self._repeats(value, offset, stored, data))
                or not self._values.reserve_now(value, end - stored)
            ):
                return False
            # As `_put`, of a file without holes. Of one that is dirty already there will be no more of them.
            if not inode.dirty:
                self._inodes.relieve()
            at = self._values.append_now(value, data if offset == stored else data[stored - offset :])
            if at != stored:
                raise RuntimeError(f"value {value}: bytes for offset {stored} went to {at}")
            self._inodes.written(inode, end - stored)
        except FusefsError:
            return False  # `write` meets it again.
        return True

    async def append(self, ino: int, data: Buffer) -> int:
        data = bytes(data)
        await self._take_turn(ino)
        try:
            while True:
                inode = self._inodes.regular(ino)
                value = inode.rec.value
                if not data:
                    return self.size(inode)
                if await self._reserved(inode, value, len(data)):
                    # NO AWAIT from here on: the permission to append would be gone.
                    offset = self.size(inode)
                    if offset + len(data) > MAX_OFFSET:
                        raise BadArgument(f"inode {ino}: no file reaches to offset {offset} + {len(data)}")
                    self._put(inode, [(offset, offset + len(data))], offset, data)
                    return offset
        finally:
            self._end_turn(ino)

    async def _try_write(self, ino: int, offset: int, data: bytes) -> bool:
        """One attempt; False if the file was emptied meanwhile."""
        inode = self._inodes.regular(ino)
        value = inode.rec.value
        stored = self._stored(inode)
        end = offset + len(data)
        if not inode.rec.map and offset <= stored < end and self._repeats(value, offset, stored, data):
            # The usual case: a file without holes goes on where it ends, perhaps with the page sent again that it ends in.
            if not await self._reserved(inode, value, end - stored):
                return False
            # NO AWAIT from here on.
            self._put(inode, [(stored, end)], offset, data)
            return True
        gaps = self._map.gaps(inode, offset, end, stored)
        if gaps != [(offset, end)]:
            # All that is compared is compared before anything is appended: all or nothing.
            for piece in list(self._map.pieces(inode, offset, end, stored)):
                if not await self._same(inode, value, piece, data, offset):
                    return False
        missing = sum(stop - start for start, stop in gaps)
        if missing == 0:
            if inode.gone or inode.rec.value != value:
                return False
            self._inodes.written(inode, 0)
            return True
        if not await self._reserved(inode, value, missing):
            return False
        # NO AWAIT from here on. The gaps are the same as above: the value is, other writers wait, and a longer hole writes nothing.
        self._put(inode, gaps, offset, data)
        return True

    def _repeats(self, value: int, offset: int, stored: int, data: bytes) -> bool:
        """`data` begins with what is stored from `offset` on, which is at hand. False also where it is not: then it is to be read first."""
        if offset == stored:
            return True
        if self._values.ends_with(value, data[: stored - offset]):
            return True
        there = self._values.read_now(value, offset, stored - offset)
        return there is not None and len(there) == stored - offset and data.startswith(there)

    async def _same(self, inode: Inode, value: int, piece: Piece, data: bytes, offset: int) -> bool:
        """True if `data` repeats what is stored; False if the file was emptied meanwhile; NotPermitted if it would change it."""
        try:
            there = await self._values.read(value, piece.value_offset, piece.length)
        except NotFound:
            if inode.gone or inode.rec.value != value:
                return False
            raise
        begin = piece.offset - offset
        if data[begin : begin + piece.length] == there:
            return True
        if inode.gone or inode.rec.value != value:
            return False
        differs = next((i for i, byte in enumerate(there) if data[begin + i] != byte), len(there))
        where = self._directories.describe(inode.ino)
        raise NotPermitted(f"{where}: the byte at offset {piece.offset + differs} is written already and cannot be changed (append-only)")

    async def _reserved(self, inode: Inode, value: int, length: int) -> bool:
        """Room for `length` bytes, until the caller's next await; False if the value is not the file's any more."""
        try:
            await self._values.reserve(value, length)
        except NotFound:
            if not inode.gone and inode.rec.value == value:
                raise
            return False
        return not inode.gone and inode.rec.value == value

    def _put(self, inode: Inode, gaps: list[tuple[int, int]], offset: int, data: bytes) -> None:
        """Append the parts of `data` (which stands at file offset `offset`) for `gaps`, and map them. NO AWAIT inside (N3).

        First the map, then the bytes: a store that refuses (Fenced) has then changed nothing at all.
        """
        self._inodes.relieve()
        stored = self._stored(inode)
        if not inode.rec.map and gaps != [(stored, stored + len(data))]:
            if len(gaps) == 1 and gaps[0][0] == stored:
                data = data[gaps[0][0] - offset :]  # The kernel sent the page again, with what is new at its end.
            else:
                self._make_mapped(inode, stored)
        if inode.rec.map:
            self._map.make_clipped(inode, stored)
            self._map.add(inode, gaps, stored)
            if sum(end - begin for begin, end in gaps) != len(data):
                data = b"".join(data[begin - offset : end - offset] for begin, end in gaps)
        at = self._values.append_now(inode.rec.value, data)
        if at != stored:
            raise RuntimeError(f"value {inode.rec.value}: bytes for offset {stored} went to {at}")
        self._inodes.written(inode, len(data))

    def _make_mapped(self, inode: Inode, stored: int) -> None:
        """NO AWAIT between this and what made it necessary."""
        number = self._numbers.next_now()
        batch = Batch()
        rec = clone(inode.rec)
        self._map.start_map(rec, number, batch, stored)
        batch.put(inode_key(inode.ino), encode_inode(rec))
        self._store.apply(batch)
        inode.rec = rec
        self._map.started(inode, stored)

    def truncate(self, ino: int, size: int) -> None:
        inode = self._inodes.regular(ino)
        if not 0 <= size <= MAX_OFFSET:
            raise BadArgument(f"inode {ino}: {size} is not a size a file can have")
        now_size = self.size(inode)
        if size == now_size:
            return
        if size == 0:
            self._inheritance.refuse_truncation(inode)
            self._empty(inode)
        elif size > now_size:
            self._lengthen(inode, size)
        else:
            where = self._directories.describe(ino)
            raise NotPermitted(f"{where}: cannot be cut from {now_size} to {counted(size, 'byte')} (append-only); only to 0")

    def _empty(self, inode: Inode) -> None:
        """A new value; the old one, and its map, go in the same batch."""
        change = Change(self._inodes)
        old = inode.rec
        rec = change.edit(inode)
        rec.map = rec.size = rec.map_bound = 0
        rec.mtime = rec.ctime = self._inodes.now()
        spec = self._values.replication_of(old.value)
        if old.map:
            self._map.drop(change.batch, old.map)
        rec.value = self._values.create(change.batch, inode.ino, spec)
        self._inodes.check_writable()
        self._values.free(change.batch, old.value)
        change.apply()
        inode.clipped = True
        inode.tail = None
        inode.tail_known = False

    def _lengthen(self, inode: Inode, size: int) -> None:
        """A hole at the end: nothing is stored for it. NO AWAIT inside."""
        stored = self._stored(inode)
        if inode.rec.map:
            self._map.make_clipped(inode, stored)
        else:
            self._make_mapped(inode, stored)
        change = Change(self._inodes)
        rec = change.edit(inode)
        rec.size = size
        rec.mtime = rec.ctime = self._inodes.now()
        change.apply()

    # ---- reading

    def read_now(self, ino: int, offset: int, size: int) -> Buffer | None:
        rec = self._inodes.regular(ino).rec
        return self._values.read_now(rec.value, offset, size) if rec.value and not rec.map else None

    async def read(self, ino: int, offset: int, size: int) -> Buffer:
        if offset < 0 or size < 0:
            raise BadArgument(f"inode {ino}: cannot read {size} bytes at {offset}")
        while True:
            inode = self._inodes.regular(ino)
            value = inode.rec.value
            stored = self._stored(inode)
            end = min(offset + size, self._map.size(inode, stored))
            if offset >= end:
                return b""
            try:
                if not inode.rec.map:
                    return await self._values.read(value, offset, end - offset)
                return await self._gather(inode, value, _joined(list(self._map.pieces(inode, offset, end, stored))), offset, end)
            except (Corrupt, Expired, Unavailable) as error:
                # Which sector it is in says little to who reads that.
                raise type(error)(f"{self._directories.describe(ino)}: {error}") from error
            except NotFound:
                # Emptied while we read: the next round sees the new content, or raises because the inode is gone.
                if not inode.gone and inode.rec.value == value:
                    raise

    async def _gather(self, inode: Inode, value: int, pieces: list[Piece], offset: int, end: int) -> Buffer:
        out = bytearray(end - offset)
        for piece in pieces:
            data = await self._values.read(value, piece.value_offset, piece.length)
            if len(data) != piece.length:
                raise Corrupt(f"{self._directories.describe(inode.ino)}: the map names bytes its value does not have; check the volume")
            if len(data) == len(out):
                return data
            out[piece.offset - offset : piece.end - offset] = data
        return bytes(out)

    # ---- durability

    async def commit(self, ino: int) -> None:
        inode = self._inodes.get(ino)
        while inode.rec.value:
            value = inode.rec.value
            try:
                await self._values.commit(value)
                return
            except NotFound:
                if inode.gone:
                    break  # Removed meanwhile: no content is left that could be lost.
                if inode.rec.value == value:
                    raise
        await self._store.commit()


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbours in the file and in the value as one."""
    found: list[Piece] = []
    for piece in pieces:
        if found and found[-1].end == piece.offset and found[-1].value_end == piece.value_offset:
            last = found.pop()
            piece = Piece(last.offset, last.length + piece.length, last.value_offset)
        found.append(piece)
    return found
