"""The index of a salvage: what is known of shards, values and their names, and the values' files, which it writes and names in the end.

| table | a row |
|---|---|
| `shard` | a shard on a host, by its root |
| `coded` | a shard that verified and is one of several of its sector |
| `piece` | bytes of a value that are in its file, with epoch and commit of the sector they came from |
| `name` | a value, and the newest name it had |

It has no contents, and is thrown away with the salvage, whatever ends it.
"""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from storage.durable import from_os_error
from storage.errors import FusefsError, IOFailure, NoSpace
from storage.sectors.label import Label
from storage.values.packing import TableEntry

#: Files with holes that are listed; all are counted.
MAX_HOLES = 1000
LOST_AND_FOUND = "lost+found"
INDEX_DIRECTORY = ".fusefs-salvage"
_MAX_COMPONENT = 255


@dataclass(frozen=True, slots=True)
class SalvageReport:
    """What came back."""

    volume_id: str
    #: Distinct sectors that could be read; that could not.
    sectors: int
    damaged: int
    files: int
    bytes: int
    #: Files in lost+found; files with a suffix because a newer one has their name.
    nameless: int
    versions: int
    #: (path below the directory, bytes missing in between): some of them, and how many there are.
    holes: tuple[tuple[str, int], ...]
    with_holes: int
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Shard:
    """One that verified: its plaintext, and what it says of itself."""

    epoch: int
    label: Label
    plain: bytes


@dataclass(frozen=True, slots=True)
class Sector:
    """One that verified."""

    epoch: int
    data: memoryview
    entries: list[TableEntry]


@dataclass(frozen=True, slots=True)
class Group:
    """A sector that was cut into shards: (number, root, hosts) of those there are. `sector`: its id, in digits."""

    epoch: int
    sector: str
    spec: str
    length: int
    shards: list[tuple[int, str, list[int]]]


class Index:
    """What is known of shards and values, and the values' files. Blocking: all of it belongs to one thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db = sqlite3.connect(path / INDEX_DIRECTORY / "index", isolation_level=None)
        # It is thrown away with whatever stops us.
        self._db.executescript(
            """
            PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;
            CREATE TABLE shard (root TEXT, host INTEGER, size INTEGER, PRIMARY KEY (root, host)) WITHOUT ROWID;
            CREATE TABLE piece (value TEXT, start INTEGER, stop INTEGER, epoch INTEGER, commit_ INTEGER);
            CREATE INDEX by_value ON piece (value, start);
            CREATE TABLE coded (
                epoch INTEGER, sector TEXT, spec TEXT, length INTEGER, number INTEGER, root TEXT,
                PRIMARY KEY (epoch, sector, spec, number, root)
            ) WITHOUT ROWID;
            CREATE TABLE name (value TEXT PRIMARY KEY, path BLOB, epoch INTEGER, commit_ INTEGER) WITHOUT ROWID;
            """
        )

    def close(self) -> None:
        self._db.close()
        shutil.rmtree(self._path / INDEX_DIRECTORY, ignore_errors=True)

    def add_shards(self, shards: list[tuple[str, int, int]]) -> None:
        with self._errors():
            self._db.executemany("INSERT OR IGNORE INTO shard VALUES (?, ?, ?)", shards)

    def shards(self) -> tuple[int, int]:
        """(distinct ones, their bytes)."""
        count, size = self._db.execute("SELECT count(*), sum(size) FROM (SELECT max(size) AS size FROM shard GROUP BY root)").fetchone()
        return int(count), int(size or 0)

    def next_shards(self, after: str) -> list[tuple[str, int, list[int]]]:
        """(root, bytes, hosts) of some that follow `after`."""
        rows = self._db.execute(
            "SELECT root, max(size), group_concat(host) FROM shard WHERE root > ? GROUP BY root ORDER BY root LIMIT 100", (after,)
        )
        return [(root, size, sorted(map(int, hosts.split(",")))) for root, size, hosts in rows]

    def add_coded(self, shard: Shard, root: str) -> None:
        """One of several shards of a sector."""
        said = shard.label
        row = (shard.epoch, str(said.sector_id), f"{said.k}+{said.m}", said.length, said.number, root)
        with self._errors():
            self._db.execute("INSERT OR IGNORE INTO coded VALUES (?, ?, ?, ?, ?, ?)", row)

    def next_coded(self, after: tuple[int, str, str]) -> list[Group]:
        """Some sectors that follow, of those that were cut into shards."""
        rows = self._db.execute(
            "SELECT DISTINCT epoch, sector, spec, length FROM coded WHERE (epoch, sector, spec) > (?, ?, ?) "
            "ORDER BY epoch, sector, spec LIMIT 50",
            after,
        ).fetchall()
        return [Group(epoch, sector, spec, length, self._coded_shards(epoch, sector, spec)) for epoch, sector, spec, length in rows]

    def _coded_shards(self, epoch: int, sector: str, spec: str) -> list[tuple[int, str, list[int]]]:
        """Data shards first."""
        rows = self._db.execute(
            "SELECT number, coded.root, group_concat(host) FROM coded JOIN shard ON shard.root = coded.root "
            "WHERE epoch = ? AND sector = ? AND spec = ? GROUP BY number, coded.root ORDER BY number",
            (epoch, sector, spec),
        )
        return [(number, root, sorted(map(int, hosts.split(",")))) for number, root, hosts in rows]

    def take(self, sector: Sector) -> None:
        """Write what is new in the sector to its values' files. NoSpace, IOFailure."""
        with self._errors():
            for entry in sector.entries:
                if entry.length:
                    self._take(sector, entry)

    def _take(self, sector: Sector, entry: TableEntry) -> None:
        value, stop, age = str(entry.value_id), entry.offset + entry.length, (sector.epoch, entry.commit)
        if max(stop, entry.commit) >= 1 << 63:
            return
        newer = self._db.execute(
            "SELECT start, stop FROM piece WHERE value = ? AND start < ? AND stop > ? AND (epoch, commit_) > (?, ?) ORDER BY start",
            (value, stop, entry.offset, *age),
        ).fetchall()
        fd = os.open(self._file(value), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            for start, end in gaps(entry.offset, stop, newer):
                at = entry.position + start - entry.offset
                rest = sector.data[at : at + end - start]
                while rest:
                    written = os.pwrite(fd, rest, start)
                    start, rest = start + written, rest[written:]
        finally:
            os.close(fd)
        self._db.execute("INSERT INTO piece VALUES (?, ?, ?, ?, ?)", (value, entry.offset, stop, *age))
        self._db.execute("INSERT OR IGNORE INTO name VALUES (?, x'', 0, -1)", (value,))
        # A sector without paths, or a file that had lost its name, takes no name away.
        self._db.execute(
            "UPDATE name SET epoch = max(epoch, ?), path = ?, commit_ = ? WHERE value = ? AND ? != x'' AND (epoch, commit_) <= (?, ?)",
            (age[0], entry.path, age[1], value, entry.path, *age),
        )

    def _file(self, value: str) -> Path:
        return self._path / LOST_AND_FOUND / f"value-{value}"

    def finish(self, volume_id: str, sectors: int, damaged: int, notes: list[str]) -> SalvageReport:
        """Give the files their names; everything is on the disk when it returns. NoSpace, IOFailure."""
        files = size = nameless = versions = with_holes = 0
        holes: list[tuple[str, int]] = []
        with self._errors():
            # The newest first: it gets the name.
            for value, name in self._db.execute("SELECT value, path FROM name ORDER BY epoch DESC, commit_ DESC, value DESC"):
                file = self._file(value)
                pieces = self._db.execute("SELECT start, stop FROM piece WHERE value = ? ORDER BY start", (value,)).fetchall()
                placed, kind = self._place(file, name, value)
                files += 1
                size += placed.lstat().st_size
                nameless += kind == "nameless"
                versions += kind == "version"
                missing = sum(end - start for start, end in gaps(0, max(stop for _, stop in pieces), pieces))
                if missing:
                    with_holes += 1
                    if len(holes) < MAX_HOLES:
                        holes.append((os.fsdecode(os.path.relpath(placed, self._path)), missing))
            if not nameless:
                (self._path / LOST_AND_FOUND).rmdir()
            os.sync()
        return SalvageReport(
            volume_id, sectors, damaged, files, size, nameless, versions, tuple(holes), with_holes, tuple(dict.fromkeys(notes))
        )

    def _place(self, file: Path, name: bytes, value: str) -> tuple[Path, str]:
        """Move the file to where its name says, as far as that can be done; what became of it."""
        parts = name.split(b"/")
        if not name or any(part in (b"", b".", b"..") or b"\0" in part or len(part) > _MAX_COMPONENT for part in parts):
            return file, "nameless"
        if parts[0] in (os.fsencode(LOST_AND_FOUND), os.fsencode(INDEX_DIRECTORY)):
            return file, "nameless"
        target = self._path / os.fsdecode(name)
        kind = "named"
        try:
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if os.path.lexists(target):
                target, kind = target.with_name(f"{target.name}.value-{value}"), "version"
            if os.path.lexists(target):
                return file, "nameless"
            os.rename(file, target)
        except OSError as error:
            # A directory on the way is a file by now, or the name with its suffix is too long.
            if error.errno not in (errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG):
                raise
            return file, "nameless"
        return target, kind

    def _errors(self) -> _Errors:
        return _Errors(self._path)


class _Errors:
    """Turns what SQLite and the operating system raise into ours."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, FusefsError):
            return
        if isinstance(error, OSError):
            raise from_os_error(error, f"writing {self._path}") from error
        if isinstance(error, sqlite3.Error):
            if "full" in str(error):
                raise NoSpace(f"writing {self._path}: {error}; free some space, and salvage into a new directory") from error
            raise IOFailure(f"writing {self._path}: {error}; check the disk") from error


def gaps(start: int, stop: int, covered: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """What of [start, stop) is in none of `covered`, which are in order of their starts and may overlap."""
    at = start
    for begin, end in covered:
        if begin >= stop:
            break
        if begin > at:
            yield at, begin
        at = max(at, end)
    if at < stop:
        yield at, stop
