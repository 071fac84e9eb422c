"""Bringing back files when no superblock is left: from the sectors alone, each of which ends with a table of whose bytes it has.

    every shard on the hosts -> opened (its header names the epoch's salt; the key does the rest) -> its table -> the bytes of each value,
    at their offsets, into a file of the value -> each named as its newest entry says

The result is a directory of plain files, because that is all there is: owners, modes, times, links, empty files, and the maps of files with
holes or with bytes that came out of order stand in the metadata, not in sectors. Files that were removed come back as well, as long as
sectors still hold their bytes. What a value lacks in between is a hole that reads as zeros, and is reported.

Which bytes: where two sectors have the same bytes of a value (merges copy), those of the later epoch and commit count, whatever the order
in which sectors come. Which name: the newest non-empty path; of several values with one path the newest has it, the others get a suffix;
what has no path is `lost+found/value-N`.

A sector that was cut into shards (k+m) is put together from any k of them, once all shards are known.

In memory: FETCHES sectors. An index of pieces and names (no contents) stands in SQLite, in `.fusefs-salvage` there, until the end.
"""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from storage.durable import from_os_error
from storage.errors import BadArgument, Corrupt, FusefsError, IOFailure, NoSpace, NotFound, Unavailable, WrongPassphrase
from storage.history.finding import Places, Secret, Source, choose_volume, places, unlock
from storage.hosts.layout import is_id, sectors_prefix, shard_name
from storage.hosts.registry import Opener
from storage.keyfile import load_keyfile, open_slots
from storage.keys import Keys, master_of_phrase
from storage.sealing import HEADER_SIZE, MAX_SEALED, ShardHeader, open_shard, root_of
from storage.seams import Seams, Worker
from storage.sectors.preamble import PREAMBLE_SIZE, Preamble, parse_preamble
from storage.sectors.redundancy import Layout, layout_of
from storage.values.packing import TableEntry, parse_table
from storage.wiring import absolute, only

#: Sectors fetched and opened at the same time.
FETCHES = 3
#: Seconds a shard may take, besides what its bytes take at `SLOWEST` bytes per second.
TIMEOUT, SLOWEST = 20.0, 32 * 1024
#: Notes, and files with holes, that are listed; all are counted.
MAX_NOTES, MAX_HOLES = 50, 1000
LOST_AND_FOUND = "lost+found"
INDEX_DIRECTORY = ".fusefs-salvage"
_LISTED = 1000
_MAX_COMPONENT = 255

#: Called with (bytes done, bytes in all).
Progress = Callable[[int, int], None]


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


async def salvage_volume(
    path: Path | str,
    hosts: Sequence[str],
    *,
    passphrase: str | None = None,
    phrase: str | None = None,
    keyfile: Path | None = None,
    volume_id: str | None = None,
    seams: Seams | None = None,
    opener: Opener | None = None,
    progress: Progress | None = None,
) -> SalvageReport:
    """Every file the sectors on `hosts` have, as a plain file below the new (or empty) directory `path`. Nothing on a host is changed.

    One of `passphrase` (with `keyfile`, a copy of keys.json, unless a superblock still has the slots) and `phrase`.
    BadArgument, NotFound (no volume, or no sector), WrongPassphrase, Unavailable, NoSpace, IOFailure. Corrupt: no sector opens.
    """
    path = absolute(path)
    seams = seams or Seams()
    async with places(hosts, seams, opener) as found:
        chosen = await choose_volume(found, volume_id)
        keys = await _keys(found, chosen, passphrase, phrase, keyfile, seams)
        await seams.threads.run(_make_target, path)
        worker = seams.worker("fusefs-salvage")
        index = await worker.run(_Index, path)
        try:
            run = _Salvage(chosen, keys, found.sources, index, worker, seams, progress)
            await run.all()
            return await worker.run(
                index.finish, chosen.hex(), run.sectors, run.damaged, [*found.notes, *found.silent.values(), *run.notes]
            )
        finally:
            with trio.CancelScope(shield=True):
                await worker.run(index.close)
                worker.close()


async def _keys(found: Places, volume_id: bytes, passphrase: str | None, phrase: str | None, keyfile: Path | None, seams: Seams) -> Keys:
    """NotFound, WrongPassphrase, BadArgument."""
    if phrase is not None:
        return Keys(master_of_phrase(phrase))
    if passphrase is None:
        raise BadArgument("the recovery phrase is needed, or a passphrase and a copy of keys.json")
    if keyfile is not None:
        slots = await seams.threads.run(load_keyfile, keyfile, volume_id.hex())
        return Keys(await seams.threads.run(open_slots, slots, passphrase))
    await found.read(volume_id)
    if not any(found.blocks.values()):
        raise BadArgument(
            "a passphrase opens nothing without its key slots, and no superblock is left to have them: "
            "use the 24 words (--phrase), or give a copy of keys.json (--keyfile FILE)"
        )
    return (await unlock(found, volume_id, Secret(passphrase)))[0]


def _make_target(path: Path) -> None:
    try:
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            if not path.is_dir() or any(path.iterdir()):
                raise BadArgument(f"{path} exists and is not an empty directory; salvage into a new one") from None
        for name in (LOST_AND_FOUND, INDEX_DIRECTORY):
            (path / name).mkdir(mode=0o700)
    except OSError as error:
        raise from_os_error(error, f"making {path}") from error


# --------------------------------------------------------------------------------------------------------------------
# Sectors


@dataclass(frozen=True, slots=True)
class _Shard:
    """One that verified: its plaintext, and what it says of itself."""

    epoch: int
    preamble: Preamble
    plain: bytes


@dataclass(frozen=True, slots=True)
class _Sector:
    """One that verified."""

    epoch: int
    data: memoryview
    entries: list[TableEntry]


class _Salvage:
    """Goes through all shards once."""

    def __init__(
        self,
        volume_id: bytes,
        keys: Keys,
        sources: Sequence[Source],
        index: _Index,
        worker: Worker,
        seams: Seams,
        progress: Progress | None,
    ) -> None:
        self._volume_id, self._keys, self._sources = volume_id, keys, sources
        self._index, self._worker, self._seams, self._progress = index, worker, seams, progress
        self.sectors = self.damaged = 0
        self.notes: list[str] = []
        self._done = self._total = 0

    async def all(self) -> None:
        """NotFound: there is no sector; Corrupt, WrongPassphrase: none opens."""
        for number, source in enumerate(self._sources):
            await self._list(number, source)
        count, self._total = await self._worker.run(self._index.shards)
        if not count:
            raise NotFound(f"{', '.join(source.url.base for source in self._sources)}: no sector of volume {self._volume_id.hex()}")
        try:
            async with trio.open_nursery() as nursery:
                send, receive = trio.open_memory_channel[tuple[str, int, list[int]]](0)
                for _ in range(FETCHES):
                    nursery.start_soon(self._fetcher, receive.clone())
                receive.close()
                async with send:
                    after = ""
                    while batch := await self._worker.run(self._index.next_shards, after):
                        for shard in batch:
                            await send.send(shard)
                        after = batch[-1][0]
        except BaseExceptionGroup as group:
            raise only(group) from group
        async for coded in self._groups():
            await self._assemble(coded)
        if not self.sectors:
            raise WrongPassphrase(
                f"none of {count} sectors of volume {self._volume_id.hex()} opens with this key: is it another volume's? "
                f"({'; '.join(self.notes[:2])})"
            )

    async def _list(self, number: int, source: Source) -> None:
        batch: list[tuple[str, int, int]] = []
        try:
            async for name, size in source.host.list(sectors_prefix(self._volume_id)):
                root = name.rpartition("/")[2]
                if len(root) == 64 and is_id(root[:32]) and is_id(root[32:]) and name == shard_name(self._volume_id, root):
                    batch.append((root, number, size))
                if len(batch) >= _LISTED:
                    await self._worker.run(self._index.add_shards, batch)
                    batch = []
        except (Unavailable, Corrupt, NotFound) as error:
            self._note(str(error))
        await self._worker.run(self._index.add_shards, batch)

    async def _fetcher(self, jobs: trio.MemoryReceiveChannel[tuple[str, int, list[int]]]) -> None:
        async with jobs:
            async for root, size, holders in jobs:
                shard = await self._shard(root, holders)
                if shard is None:
                    self.damaged += 1
                elif shard.preamble.m:
                    # One of several that make a sector: when all are known.
                    await self._worker.run(self._index.add_coded, shard, root)
                else:
                    await self._take(shard.epoch, memoryview(shard.plain)[PREAMBLE_SIZE:], f"shard {root[:16]}")
                self._done += size
                if self._progress is not None:
                    self._progress(self._done, self._total)

    async def _take(self, epoch: int, data: memoryview, where: str) -> None:
        """The bytes of a whole sector: into its values' files."""
        try:
            entries = await self._seams.threads.run(parse_table, data)
        except Corrupt as error:
            self._note(f"{where}: {error}")
            self.damaged += 1
            return
        self.sectors += 1
        await self._worker.run(self._index.take, _Sector(epoch, data, entries))

    async def _groups(self) -> AsyncIterator[_Group]:
        """The sectors that were cut into shards, one after the other."""
        after = (-1, "", "")
        while groups := await self._worker.run(self._index.next_coded, after):
            for group in groups:
                yield group
            last = groups[-1]
            after = (last.epoch, last.sector, last.spec)

    async def _assemble(self, group: _Group) -> None:
        """A sector out of as many of its shards as it takes."""
        where = f"sector {group.sector} of epoch {group.epoch}"
        layout = layout_of(group.spec, group.length)
        found: dict[int, bytes] = {}
        for number, root, holders in group.shards:
            if len(found) < layout.needed and number not in found:
                shard = await self._shard(root, holders)
                if shard is not None:
                    found[number] = shard.plain
        try:
            data = await self._seams.threads.run(_join, layout, int(group.sector), found)
        except Corrupt as error:
            self._note(f"{where}: {error}")
            self.damaged += 1
            return
        await self._take(group.epoch, data, where)

    async def _shard(self, root: str, holders: list[int]) -> _Shard | None:
        """From the first host whose copy verifies."""
        for number in holders:
            host = self._sources[number].host
            where = f"host {host.url}: shard {root[:16]}"
            try:
                with trio.move_on_after(TIMEOUT + MAX_SEALED / SLOWEST) as limit:
                    data = await host.get(shard_name(self._volume_id, root), MAX_SEALED)
                if limit.cancelled_caught:
                    raise Unavailable(f"{where}: the host did not answer in time")
                return await self._seams.threads.run(_open, self._keys, self._volume_id, root, data, where)
            except (Unavailable, Corrupt, NotFound) as error:
                self._note(str(error))
        return None

    def _note(self, text: str) -> None:
        if len(self.notes) < MAX_NOTES and text not in self.notes:
            self.notes.append(text)


def _open(keys: Keys, volume_id: bytes, root: str, data: bytes, where: str) -> _Shard:
    """Corrupt, naming `where`. Blocking."""
    if root_of(data) != root:
        raise Corrupt(f"{where}: what is stored is not it ({len(data)} bytes)")
    try:
        header = ShardHeader.parse(data[:HEADER_SIZE])
        if header.volume_id != volume_id:
            raise Corrupt(f"it is of volume {header.volume_id.hex()}")
        plain = open_shard(keys.sector_key(header.salt), header, data)
        preamble = parse_preamble(plain)
        spec = f"{preamble.k}+{preamble.m}" if preamble.m else "1"
        if preamble.sector_id + preamble.number != header.sector_id:
            raise Corrupt(f"it says that it is of sector {preamble.sector_id}")
        layout_of(spec, preamble.length).check(preamble.sector_id, preamble.number, plain)
        return _Shard(header.epoch, preamble, plain)
    except Corrupt as error:
        raise Corrupt(f"{where}: {error}") from None


def _join(layout: Layout, sector_id: int, found: Mapping[int, bytes]) -> memoryview:
    """The sector out of whole shards. Corrupt: too few. Blocking."""
    pieces: list[memoryview] = []
    for part in layout.whole():
        plain = found.get(part.shard) or layout.rebuild(sector_id, part.shard, 0, found)
        pieces.append(memoryview(plain)[part.offset : part.offset + part.length])
    return memoryview(b"".join(pieces))


@dataclass(frozen=True, slots=True)
class _Group:
    """A sector that was cut into shards: (number, root, hosts) of those there are. `sector`: its id, in digits."""

    epoch: int
    sector: str
    spec: str
    length: int
    shards: list[tuple[int, str, list[int]]]


# --------------------------------------------------------------------------------------------------------------------
# The index, and the files


class _Index:
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

    def add_coded(self, shard: _Shard, root: str) -> None:
        """One of several shards of a sector."""
        said = shard.preamble
        row = (shard.epoch, str(said.sector_id), f"{said.k}+{said.m}", said.length, said.number, root)
        with self._errors():
            self._db.execute("INSERT OR IGNORE INTO coded VALUES (?, ?, ?, ?, ?, ?)", row)

    def next_coded(self, after: tuple[int, str, str]) -> list[_Group]:
        """Some sectors that follow, of those that were cut into shards."""
        rows = self._db.execute(
            "SELECT DISTINCT epoch, sector, spec, length FROM coded WHERE (epoch, sector, spec) > (?, ?, ?) "
            "ORDER BY epoch, sector, spec LIMIT 50",
            after,
        ).fetchall()
        return [_Group(epoch, sector, spec, length, self._coded_shards(epoch, sector, spec)) for epoch, sector, spec, length in rows]

    def _coded_shards(self, epoch: int, sector: str, spec: str) -> list[tuple[int, str, list[int]]]:
        """Data shards first."""
        rows = self._db.execute(
            "SELECT number, coded.root, group_concat(host) FROM coded JOIN shard ON shard.root = coded.root "
            "WHERE epoch = ? AND sector = ? AND spec = ? GROUP BY number, coded.root ORDER BY number",
            (epoch, sector, spec),
        )
        return [(number, root, sorted(map(int, hosts.split(",")))) for number, root, hosts in rows]

    def take(self, sector: _Sector) -> None:
        """Write what is new in the sector to its values' files. NoSpace, IOFailure."""
        with self._errors():
            for entry in sector.entries:
                if entry.length:
                    self._take(sector, entry)

    def _take(self, sector: _Sector, entry: TableEntry) -> None:
        value, stop, age = str(entry.value_id), entry.offset + entry.length, (sector.epoch, entry.commit)
        if max(stop, entry.commit) >= 1 << 63:
            return
        newer = self._db.execute(
            "SELECT start, stop FROM piece WHERE value = ? AND start < ? AND stop > ? AND (epoch, commit_) > (?, ?) ORDER BY start",
            (value, stop, entry.offset, *age),
        ).fetchall()
        fd = os.open(self._file(value), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            for start, end in _gaps(entry.offset, stop, newer):
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
                missing = sum(end - start for start, end in _gaps(0, max(stop for _, stop in pieces), pieces))
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


def _gaps(start: int, stop: int, covered: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
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
