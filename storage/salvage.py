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

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path

import trio

from storage.durable import from_os_error
from storage.errors import BadArgument, Corrupt, NotFound, Unavailable, WrongPassphrase
from storage.history.finding import Places, Secret, Source, choose_volume, places, unlock
from storage.hosts.layout import is_id, sectors_prefix, shard_name
from storage.hosts.registry import Opener
from storage.keyfile import load_keyfile, open_slots
from storage.keys import Keys, master_of_phrase
from storage.salvage_index import INDEX_DIRECTORY, LOST_AND_FOUND, Group, Index, SalvageReport, Sector, Shard
from storage.sealing import HEADER_SIZE, MAX_SEALED, ShardHeader, open_shard, root_of
from storage.seams import Seams, Worker
from storage.sectors.label import LABEL_SIZE, parse_label
from storage.sectors.redundancy import Layout, layout_of
from storage.values.packing import parse_table
from storage.wiring import absolute, only
from storage.wording import counted

#: Sectors fetched and opened at the same time.
FETCHES = 3
#: Seconds a shard may take, besides what its bytes take at `SLOWEST` bytes per second.
TIMEOUT, SLOWEST = 20.0, 32 * 1024
#: Notes that are listed; all are counted.
MAX_NOTES = 50
_LISTED = 1000

#: Called with (bytes done, bytes in all).
Progress = Callable[[int, int], None]


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
        index = await worker.run(Index, path)
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


class _Salvage:
    """Goes through all shards once."""

    def __init__(
        self,
        volume_id: bytes,
        keys: Keys,
        sources: Sequence[Source],
        index: Index,
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
                f"with this key none opens of {counted(count, 'sector')} of volume {self._volume_id.hex()}: is it another volume's? "
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
                elif shard.label.m:
                    # One of several that make a sector: when all are known.
                    await self._worker.run(self._index.add_coded, shard, root)
                else:
                    await self._take(shard.epoch, memoryview(shard.plain)[:-LABEL_SIZE], f"shard {root[:16]}")
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
        await self._worker.run(self._index.take, Sector(epoch, data, entries))

    async def _groups(self) -> AsyncIterator[Group]:
        """The sectors that were cut into shards, one after the other."""
        after = (-1, "", "")
        while groups := await self._worker.run(self._index.next_coded, after):
            for group in groups:
                yield group
            last = groups[-1]
            after = (last.epoch, last.sector, last.spec)

    async def _assemble(self, group: Group) -> None:
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

    async def _shard(self, root: str, holders: list[int]) -> Shard | None:
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


def _open(keys: Keys, volume_id: bytes, root: str, data: bytes, where: str) -> Shard:
    """Corrupt, naming `where`. Blocking."""
    if root_of(data) != root:
        raise Corrupt(f"{where}: what is stored is not it ({len(data)} bytes)")
    try:
        header = ShardHeader.parse(data[:HEADER_SIZE])
        if header.volume_id != volume_id:
            raise Corrupt(f"it is of volume {header.volume_id.hex()}")
        plain = open_shard(keys.sector_key(header.salt), header, data)
        label = parse_label(plain)
        spec = f"{label.k}+{label.m}" if label.m else "1"
        if label.sector_id + label.number != header.sector_id:
            raise Corrupt(f"it says that it is of sector {label.sector_id}")
        layout_of(spec, label.length).check(label.sector_id, label.number, plain)
        return Shard(header.epoch, label, plain)
    except Corrupt as error:
        raise Corrupt(f"{where}: {error}") from None


def _join(layout: Layout, sector_id: int, found: Mapping[int, bytes]) -> memoryview:
    """The sector out of whole shards. Corrupt: too few. Blocking."""
    pieces: list[memoryview] = []
    for part in layout.whole():
        plain = found.get(part.shard) or layout.rebuild(sector_id, part.shard, 0, found)
        pieces.append(memoryview(plain)[part.offset : part.offset + part.length])
    return memoryview(b"".join(pieces))
