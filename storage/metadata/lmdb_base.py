"""The lowest layer of the store: LMDB, read on the event loop through one snapshot, written by one thread.

The snapshot is renewed after each takeover, so no reader is ever long: an old one would keep LMDB from reusing pages.
The file grows as it must inside a huge map that is reserved from the start (address space, not disk).
"""

from __future__ import annotations

import errno
import os
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from operator import itemgetter
from pathlib import Path

import lmdb

from storage.durable import fsync_dir
from storage.errors import BadArgument, Busy, Corrupt, FusefsError, IOFailure, NoSpace
from storage.metadata.keys import STORE, read_u64, u64
from storage.metadata.records import HASH

#: The store's own keys. Layouts: u64 | 32 bytes | u64 | u64.
SEQUENCE_KEY = STORE + b"sequence"
CHAIN_KEY = STORE + b"chain"
FORMAT_KEY = STORE + b"format"
#: u64: number of the oldest journal segment that must be there. Volumes of before it was kept have none.
OLDEST_KEY = STORE + b"oldest"
FORMAT = 1

#: Address space, not disk: LMDB's file grows as it must.
MAP_SIZE = 1 << 40
#: Processes that read the metadata of one volume at a time, the writer included.
MAX_READERS = 32
#: Bytes: a quarter of the memory. A database up to this size may all come to be in memory, so the kernel reads on around each page that is
#: asked for: else whoever looks for many keys that stand near each other waits for the disk once for each page of 4 KiB.
READ_AHEAD = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
#: Operations between two pauses of a takeover: LMDB calls of this many microseconds each hold the GIL.
_SLICE = 128
#: Long enough for the event loop's thread to take the GIL.
_PAUSE = 0.0002


def local_error(error: lmdb.Error, path: Path) -> FusefsError:
    """The kind for what LMDB said."""
    if isinstance(error, lmdb.MapFullError) or error.code in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"{path}: no room for metadata on the local disk; free some space")
    if isinstance(error, (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError, lmdb.VersionMismatchError)):
        return Corrupt(f"{path}: the metadata database is damaged ({error}); recover the volume from its hosts")
    if isinstance(error, lmdb.ReadersFullError):
        return Busy(f"{path}: {MAX_READERS} processes read the metadata database already; end one of them")
    if isinstance(error, lmdb.MemoryError):
        return IOFailure(f"{path}: cannot map the metadata database ({error}); lift the limit on address space (ulimit -v)")
    if isinstance(error, lmdb.PanicError):
        # LMDB takes nothing more until it is opened again, also when the disk is well.
        return IOFailure(
            f"{path}: the metadata database takes nothing more since a write of it failed; what is written is safe in the journal as long "
            "as that has room: check the disk, then unmount and mount again"
        )
    return IOFailure(f"{path}: the metadata database failed ({error}); check the disk")


#: Pairs a scan takes at first, then twice as many each time: at most half of all it takes are beyond its end.
_FIRST = 4


def _fits_memory(path: Path) -> bool:
    try:
        return path.stat().st_size <= READ_AHEAD
    except FileNotFoundError:
        return True  # about to be made


class LmdbBase:
    """A MetadataReader over what LMDB durably holds. All but `take_over` belong to the event loop's thread."""

    def __init__(self, path: Path, map_size: int, *, read_only: bool = False) -> None:
        """Open or (unless `read_only`) create. Blocking. Corrupt, NoSpace, IOFailure; BadArgument: a newer format, or open in this
        process already.

        `read_only`: what it holds at this moment, however much a writer in another process takes over meanwhile: LMDB's table of readers
        (lock.mdb) keeps the writer from reusing the pages. It is all that is written to.
        """
        self._path = path
        try:
            self._env = lmdb.open(
                os.fsencode(path),
                map_size=map_size,
                mode=0o600,
                readahead=_fits_memory(path / "data.mdb"),
                max_readers=MAX_READERS,
                max_spare_txns=1,
                metasync=True,
                sync=True,
                readonly=read_only,
                create=not read_only,
            )
            if not read_only:
                # Of read-only processes that were killed: they would keep pages from being reused for ever.
                self._env.reader_check()
        except lmdb.Error as error:
            if "already open" in str(error):
                raise BadArgument(f"{path} is open in this process already") from error
            raise local_error(error, path) from error
        except OSError as error:
            raise IOFailure(f"{path}: {error.strerror}; check the disk") from error
        try:
            self._begin()
            if not read_only:
                self._make_durable()
            found = self.get(FORMAT_KEY)
            if found is not None and found != u64(FORMAT):
                raise BadArgument(f"{path} has format {found.hex()}, this program knows {FORMAT}: use a newer fusefs")
            #: Sequence number of the last commit LMDB holds, and the journal's chain hash there.
            self.sequence, self.chain = self._position()
            oldest = self.get(OLDEST_KEY)
            #: As recorded when it was opened; 0: not recorded.
            self.oldest_segment = read_u64(oldest) if oldest is not None and len(oldest) == 8 else 0
        except BaseException:
            self.close()
            raise

    def _make_durable(self) -> None:
        """A new database too: LMDB flushes its first pages only with its first commit, and the name of its file never."""
        try:
            self._env.sync(True)
        except lmdb.Error as error:
            raise local_error(error, self._path) from error
        fsync_dir(self._path)

    def _begin(self) -> None:
        self._txn = self._env.begin()
        self._cursor = self._txn.cursor()

    def _position(self) -> tuple[int, bytes]:
        sequence, chain = self.get(SEQUENCE_KEY), self.get(CHAIN_KEY)
        if sequence is None and chain is None:
            return 0, bytes(HASH)
        if sequence is None or chain is None or len(sequence) != 8 or len(chain) != HASH:
            raise Corrupt(f"{self._path}: the record of the last commit is damaged; recover the volume from its hosts")
        return read_u64(sequence), chain

    def get(self, key: bytes) -> bytes | None:
        try:
            found: bytes | None = self._txn.get(key)
        except lmdb.Error as error:
            raise local_error(error, self._path) from error
        return found

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See MetadataStore."""
        try:
            found: list[tuple[bytes, bytes]] = self._cursor.getmulti(keys)
        except lmdb.Error as error:
            raise local_error(error, self._path) from error
        if len(found) == len(keys):
            return [value for _, value in found]
        # What is missing is left out.
        values = dict(found)
        return [values.get(key) for key in keys]

    def row(self, first: bytes, last: bytes, count: int) -> list[bytes] | None:
        """See MetadataStore."""
        try:
            if not self._cursor.set_key(first):
                return None
            values = list(islice(self._cursor.iternext(keys=False, values=True), count))
            # It stands where the last of them is.
            return values if self._cursor.key() == last else None
        except lmdb.Error as error:
            raise local_error(error, self._path) from error

    def scan(self, start: bytes, stop: bytes, limit: int, reverse: bool = False) -> list[tuple[bytes, bytes]]:
        """See MetadataReader."""
        if reverse or limit < 4:
            return list(islice(self.pairs(start, stop, reverse), max(limit, 0)))
        found: list[tuple[bytes, bytes]] = []
        try:
            if start < stop and self._cursor.set_range(start):
                pairs, size = self._cursor.iternext(), _FIRST
                while len(found) < limit:
                    some = list(islice(pairs, min(size, limit - len(found))))
                    found += some
                    if not some or some[-1][0] >= stop:
                        break
                    size *= 2
        except lmdb.Error as error:
            raise local_error(error, self._path) from error
        if found and found[-1][0] >= stop:
            # Taken all the same: to compare each of them in Python would take longer.
            del found[bisect_left(found, stop, key=itemgetter(0)) :]
        return found

    def pairs(self, start: bytes, stop: bytes, reverse: bool) -> Iterator[tuple[bytes, bytes]]:
        """The pairs of [start, stop) in order, lazily. There is one cursor: finish with one iterator before beginning the next."""
        cursor = self._cursor
        try:
            if reverse:
                if not (cursor.prev() if cursor.set_range(stop) else cursor.last()):
                    return
                for pair in cursor.iterprev():
                    if pair[0] < start:
                        return
                    yield pair
            elif start < stop and cursor.set_range(start):
                for pair in cursor.iternext():
                    if pair[0] >= stop:
                        return
                    yield pair
        except lmdb.Error as error:
            raise local_error(error, self._path) from error

    def record_oldest(self, number: int) -> None:
        """Durable when it returns: journal segments below `number` may go. Blocking, for the one thread that writes."""
        try:
            with self._env.begin(write=True) as txn:
                txn.put(OLDEST_KEY, u64(number))
        except lmdb.Error as error:
            raise local_error(error, self._path) from error

    def take_over(
        self, keys: Iterable[bytes], values: Mapping[bytes, bytes | None], sequence: int, chain: bytes, gentle: bool, oldest: int = 0
    ) -> None:
        """One durable transaction: these keys with their values (None: delete), where in the journal that is, and (unless 0) the oldest
        segment that is in use.

        Blocking, for the one thread that writes. `gentle`: let the event loop have the GIL in between. Raises as `local_error`;
        then nothing of it was stored.
        """
        try:
            with self._env.begin(write=True) as txn:
                for count, key in enumerate(keys, 1):
                    value = values[key]
                    if value is None:
                        txn.delete(key)
                    else:
                        txn.put(key, value)
                    if gentle and count % _SLICE == 0:
                        time.sleep(_PAUSE)
                txn.put(FORMAT_KEY, u64(FORMAT))
                txn.put(SEQUENCE_KEY, u64(sequence))
                txn.put(CHAIN_KEY, chain)
                if oldest:
                    txn.put(OLDEST_KEY, u64(oldest))
        except lmdb.Error as error:
            raise local_error(error, self._path) from error

    def renew(self) -> None:
        """Read from what is durable now. Iterators of before are dead."""
        self._cursor.close()
        self._txn.abort()
        try:
            self._begin()
        except lmdb.Error as error:
            raise local_error(error, self._path) from error
        self.sequence, self.chain = self._position()

    def close(self) -> None:
        """Let go of the files; no other method may be called afterwards."""
        self._env.close()
