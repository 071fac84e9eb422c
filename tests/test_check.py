"""`check_volume`: a healthy volume has no findings, whatever was done to it; damage is named, and mended without losing anything."""

from __future__ import annotations

import random
import shutil
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import trio

from storage.checking import CheckReport, Finding, check_volume, scanning
from storage.errors import Busy, FusefsError
from storage.hosts.holders import holders_key
from storage.metadata.keys import (
    CONTRACT,
    COOKIE,
    COUNTER,
    EXTENT,
    FREED,
    FRESH,
    GARBAGE,
    HOST,
    LOST,
    MAP,
    ORPHAN,
    PARTIAL,
    SECTOR,
    SETTING,
    UNDERREPLICATED,
    XATTR,
    prefix_end,
    read_u64,
    u32,
    u64,
)
from storage.metadata.lmdb_base import LmdbBase
from storage.namespace.records import (
    COUNTS_KEY,
    ROOT,
    cookie_key,
    decode_dirent,
    decode_inode,
    decode_place,
    encode_dirent,
    encode_inode,
    encode_place,
    inode_key,
    name_key,
)
from storage.seams import Seams
from storage.sectors.records import decode_sector
from storage.values.records import Extent, decode_extent, decode_value, value_key
from storage.volume import Volume
from storage.wiring import open_volume
from tests.fakes import Crash
from tests.rig import PASSPHRASE, QUIET, host_dirs, make, opened
from tests.test_crash_fuzz import DeadFrom, _leaves

FILE = 0o100644


@dataclass
class Checked:
    """A report and its findings."""

    report: CheckReport
    findings: list[Finding] = field(default_factory=list)

    @property
    def kinds(self) -> set[str]:
        return {finding.kind for finding in self.findings if not finding.note}

    def __str__(self) -> str:
        return "\n".join(str(finding) for finding in self.findings if not finding.note)


async def check(path: Path, *, repair: bool = False, data: bool = False, seams: Seams | None = None) -> Checked:
    findings: list[Finding] = []
    report = await check_volume(path, passphrase=PASSPHRASE, repair=repair, data=data, on_finding=findings.append, seams=seams)
    return Checked(report, findings)


async def healthy(path: Path, *, data: bool = True) -> None:
    done = await check(path, data=data)
    assert done.report.exit_status == 0, f"{done}"


class Content(dict[str, bytes]):
    """path -> content of regular files, target of symlinks."""


async def a_bit_of_everything(path: Path) -> None:
    """Files large and small, mapped ones, holes, links, symlinks, xattrs, directories, freed and merged sectors; a tail on no host."""
    async with opened(path) as volume:
        ns = volume.namespace
        logs = ns.mkdir(ROOT, b"logs", 0o755, 0, 0)
        deep = ns.mkdir(logs, b"deep", 0o755, 0, 0)
        for number in range(6):
            ino = ns.create(logs, b"small%d" % number, FILE, 0, 0)
            await ns.append(ino, b"%d" % number * (100 + number))
        large = ns.create(deep, b"large", FILE, 0, 0)
        await ns.append(large, random.Random(1).randbytes(700_000))
        holey = ns.create(ROOT, b"holey", FILE, 0, 0)
        await ns.append(holey, b"front" * 100)
        await ns.write(holey, 100_000, b"behind" * 50)
        await ns.write(holey, 50_000, b"middle" * 50)
        ns.truncate(holey, 200_000)
        ns.link(large, ROOT, b"second-name")
        ns.symlink(ROOT, b"pointer", b"logs/deep", 0, 0)
        ns.setxattr(holey, b"user.colour", b"green")
        await volume.flush()
        gone = ns.create(ROOT, b"gone", FILE, 0, 0)
        await ns.append(gone, b"x" * 5000)
        await volume.flush()
        await ns.append(ns.lookup(logs, b"small0"), b"more")
        await ns.append(large, b"and the end")
        await volume.flush()
        ns.unlink(ROOT, b"gone")
        while volume.values._reclaimer.step():
            pass
        await volume.sectors._deleter.drain()
        tail = ns.create(ROOT, b"tail", FILE, 0, 0)
        await ns.append(tail, b"on no host yet" * 10)
        await volume.commit()


async def contents_of(path: Path) -> Content:
    """Everything that can be read through the front door."""
    found = Content()
    async with opened(path) as volume:
        ns = volume.namespace

        async def walk(ino: int, prefix: bytes) -> None:
            for entry in ns.entries(ino, 0, 10_000):
                name = prefix + entry.name
                if stat.S_ISDIR(entry.mode):
                    await walk(entry.ino, name + b"/")
                elif stat.S_ISLNK(entry.mode):
                    found[name.decode()] = ns.readlink(entry.ino)
                else:
                    found[name.decode()] = await ns.read(entry.ino, 0, 10_000_000)

        await walk(ROOT, b"")
    return found


class Store:
    """The volume's records with nobody else around: LMDB itself."""

    def __init__(self, path: Path) -> None:
        self._base = LmdbBase(path / "metadata", 1 << 40)
        self.changes: dict[bytes, bytes | None] = {}

    def get(self, key: bytes) -> bytes:
        raw = self._base.get(key)
        assert raw is not None, key
        return raw

    def all(self, prefix: bytes) -> list[tuple[bytes, bytes]]:
        return self._base.scan(prefix, prefix_end(prefix), 100_000)

    def close(self) -> None:
        with self._base._env.begin(write=True) as txn:
            for key, value in self.changes.items():
                if value is None:
                    txn.delete(key)
                else:
                    txn.put(key, value)
        self._base.close()

    def __setitem__(self, key: bytes, value: bytes | None) -> None:
        self.changes[key] = value

    # ---- finding things

    def ino(self, path: str) -> int:
        ino = ROOT
        for part in path.split("/"):
            ino = decode_dirent(ino, self.get(name_key(ino, part.encode()))).ino
        return ino

    def inode_of(self, path: str) -> int:
        return self.ino(path)

    def value_of(self, path: str) -> int:
        ino = self.ino(path)
        return decode_inode(ino, self.get(inode_key(ino))).value

    def extents_of(self, path: str) -> list[Extent]:
        return [decode_extent(key, raw) for key, raw in self.all(EXTENT + u64(self.value_of(path)))]


def edit_inode(store: Store, path: str, **fields: object) -> None:
    ino = store.ino(path)
    rec = decode_inode(ino, store.get(inode_key(ino)))
    for name, value in fields.items():
        setattr(rec, name, value)
    store[inode_key(ino)] = encode_inode(rec)


def edit_sector(store: Store, key: bytes, **fields: object) -> None:
    record = decode_sector(store.get(key), read_u64(key, 1))
    for name, value in fields.items():
        setattr(record, name, value)
    store[key] = record.encode()


# --------------------------------------------------------------------------------------------------- healthy volumes


async def test_a_new_volume_has_no_findings(tmp_path: Path) -> None:
    await make(tmp_path / "v")
    await healthy(tmp_path / "v")


async def test_a_volume_with_a_bit_of_everything_has_no_findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await make(tmp_path / "v", host_dirs(tmp_path, 3), "2")
    await a_bit_of_everything(tmp_path / "v")
    before = await contents_of(tmp_path / "v")
    await healthy(tmp_path / "v")
    # In windows of two keys it sees the same: a million files need no more memory than a window.
    monkeypatch.setattr(scanning, "WINDOW", 2)
    monkeypatch.setattr(scanning, "SLICE", 3)
    monkeypatch.setattr("storage.checking.hosts.WINDOW", 2)
    await healthy(tmp_path / "v")
    done = await check(tmp_path / "v", repair=True, data=True)
    assert done.report.exit_status == 0, f"{done}"
    assert await contents_of(tmp_path / "v") == before


async def test_a_volume_in_use_is_not_checked(tmp_path: Path) -> None:
    await make(tmp_path / "v")
    async with opened(tmp_path / "v"):
        with pytest.raises(Busy):
            await check(tmp_path / "v")


class Life:
    """Random operations on names and content, by several tasks at a time."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    async def step(self, volume: Volume) -> None:
        ns, pick = volume.namespace, self.random
        directories = [ROOT, *(e.ino for e in ns.entries(ROOT, 0, 50) if stat.S_ISDIR(e.mode))]
        parent = pick.choice(directories)
        entries = ns.entries(parent, 0, 50)
        files = [e for e in entries if stat.S_ISREG(e.mode)]
        name = b"%c" % pick.choice(b"abcdefgh")
        what = pick.random()
        if what < 0.15 or not files:
            ns.create(parent, name, FILE, 0, 0)
        elif what < 0.4:
            await ns.append(pick.choice(files).ino, pick.randbytes(pick.choice((1, 500, 30_000, 90_000))))
        elif what < 0.5:
            await ns.write(pick.choice(files).ino, pick.randint(0, 200_000), pick.randbytes(pick.choice((1, 3000))))
        elif what < 0.55:
            ns.unlink(parent, pick.choice(files).name)
        elif what < 0.6:
            ns.mkdir(parent, b"d" + name, 0o755, 0, 0)
        elif what < 0.63:
            ns.rmdir(ROOT, b"d" + name)
        elif what < 0.72:
            await ns.rename(parent, pick.choice(entries).name, pick.choice(directories), name, exchange=pick.random() < 0.2)
        elif what < 0.76:
            ns.link(pick.choice(files).ino, pick.choice(directories), name)
        elif what < 0.8:
            ns.truncate(pick.choice(files).ino, pick.choice((0, 0, 300_000)))
        elif what < 0.83:
            ns.setxattr(pick.choice(entries).ino, b"user." + name, b"value")
        elif what < 0.85:
            ino = pick.choice(files).ino
            for one in ns.listxattr(ino):
                ns.removexattr(ino, one)
        elif what < 0.88:
            ns.pin(pick.choice(files).ino)
        elif what < 0.93:
            await volume.values.shipper.gather()
        elif what < 0.96:
            await ns.commit(pick.choice(files).ino)
        elif what < 0.98:
            await volume.commit()
        else:
            await volume.flush()

    async def live(self, volume: Volume) -> None:
        while True:
            try:
                await self.step(volume)
            except FusefsError:
                await trio.lowlevel.checkpoint()
            await trio.sleep(self.random.choice((0.0, 0.0, 0.001)))


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_whatever_was_done_and_wherever_it_died_there_are_no_findings(tmp_path: Path, seed: int) -> None:
    """The state that kill -9 leaves behind at any point is one that a check has nothing to say about."""
    path = tmp_path / "v"
    await make(path, host_dirs(tmp_path, 3), "2", 64 * 1024)
    life, deaths = Life(seed), 0
    for _ in range(8):
        nth = int(10 ** life.random.uniform(1.0, 3.0))
        options = replace(QUIET, flush_interval=life.random.choice((0.05, 1e6)), journal_segment=128 * 1024, journal_limit=4 * 1024 * 1024)
        try:
            async with open_volume(path, passphrase=PASSPHRASE, seams=Seams(failpoints=DeadFrom(nth)), options=options) as volume:
                with trio.move_on_after(0.7):
                    async with trio.open_nursery() as nursery:
                        for _ in range(3):
                            nursery.start_soon(life.live, volume)
        except BaseException as error:
            if any(not isinstance(one, Crash | FusefsError | trio.Cancelled) for one in _leaves(error)):
                raise
            deaths += 1
        await healthy(path)
    assert deaths >= 2


async def test_a_file_whose_name_is_replaced_does_not_remember_it(tmp_path: Path) -> None:
    """Found by the test above: a file with another name went on remembering the one that a rename gave to another file."""
    await make(tmp_path / "v")
    async with opened(tmp_path / "v") as volume:
        ns = volume.namespace
        first, second = ns.create(ROOT, b"a", FILE, 0, 0), ns.create(ROOT, b"c", FILE, 0, 0)
        ns.link(first, ROOT, b"b")
        await ns.rename(ROOT, b"c", ROOT, b"a")
        assert ns.lookup(ROOT, b"b") == first
        assert ns.path_of(first) == b"b"
        assert ns.path_of(second) == b"a"
    await healthy(tmp_path / "v")


# ------------------------------------------------------------------------------------------------------------- damage


Damage = Callable[[Store], None]


def lose(find: Callable[[Store], bytes]) -> Damage:
    def damage(store: Store) -> None:
        store[find(store)] = None

    return damage


def garble(find: Callable[[Store], bytes]) -> Damage:
    def damage(store: Store) -> None:
        store[find(store)] = b"\xff\xfe garbage"

    return damage


def _sector_of(path: str) -> Callable[[Store], bytes]:
    return lambda store: SECTOR + u64(store.extents_of(path)[0].sector_id)


def _rename_in_place(store: Store) -> None:
    ino = store.ino("logs")
    key, raw = store.all(COOKIE + u64(ino))[0]
    _, entry = decode_place(key, raw)
    store[key] = encode_place(b"another", entry.ino, entry.type)


def _wrong_inode_in_place(store: Store) -> None:
    """Of a file that has its name: the directory shows another inode for it."""
    places = store.all(COOKIE + u64(store.ino("logs")))
    (key, raw), (other, _) = places[-2:]
    name, entry = decode_place(key, raw)
    store[key] = encode_place(name, decode_place(other, store.get(other))[1].ino, entry.type)


def _wrong_extent(store: Store) -> None:
    extent = store.extents_of("logs/deep/large")[0]
    store[extent.key] = Extent(extent.value_id, extent.offset, 999_999, extent.position, extent.length).encode()


def _other_sector(store: Store) -> None:
    extent = store.extents_of("logs/deep/large")[0]
    other = store.extents_of("logs/deep/large")[1]
    store[extent.key] = Extent(extent.value_id, extent.offset, other.sector_id, extent.position, extent.length).encode()


def _sealed(by: int) -> Damage:
    def damage(store: Store) -> None:
        value_id = store.value_of("logs/deep/large")
        record = decode_value(store.get(value_key(value_id)), value_id)
        record.sealed += by
        store[value_key(value_id)] = record.encode()

    return damage


def _replication(store: Store) -> None:
    value_id = store.value_of("logs/deep/large")
    record = decode_value(store.get(value_key(value_id)), value_id)
    record.replication = "3"
    store[value_key(value_id)] = record.encode()


def _owner(store: Store) -> None:
    value_id = store.value_of("logs/deep/large")
    record = decode_value(store.get(value_key(value_id)), value_id)
    record.owner = 77_777
    store[value_key(value_id)] = record.encode()


def _wrong_type(store: Store) -> None:
    key = name_key(ROOT, b"holey")
    entry = decode_dirent(ROOT, store.get(key))
    store[key] = encode_dirent(type(entry)(entry.ino, stat.S_IFIFO, entry.cookie))


def _wrong_type_in_place(store: Store) -> None:
    entry = decode_dirent(ROOT, store.get(name_key(ROOT, b"holey")))
    store[cookie_key(ROOT, entry.cookie)] = encode_place(b"holey", entry.ino, stat.S_IFIFO)


def _wrong_type_in_both(store: Store) -> None:
    _wrong_type(store)
    _wrong_type_in_place(store)


def _put(make_key: Callable[[Store], bytes], value: bytes = b"") -> Damage:
    def damage(store: Store) -> None:
        store[make_key(store)] = value

    return damage


def _live(by: int) -> Damage:
    def damage(store: Store) -> None:
        key = _sector_of("logs/deep/large")(store)
        edit_sector(store, key, live=decode_sector(store.get(key), read_u64(key, 1)).live + by)

    return damage


def _freed_in_use(store: Store) -> None:
    key = _sector_of("logs/deep/large")(store)
    store[FREED + u64(1) + key[1:]] = store.get(key)


def _holders(store: Store) -> bytes:
    key = _sector_of("holey")(store)
    shard = decode_sector(store.get(key), read_u64(key, 1)).shards[0]
    return holders_key(shard.root, shard.hosts[0])


#: name -> (damage, the kind that names it). All are mended, and every file reads as before.
MENDED: dict[str, tuple[Damage, str]] = {
    "inode lost": (lose(lambda s: inode_key(s.ino("logs/deep/large"))), "lost-inode"),
    "inode garbled": (garble(lambda s: inode_key(s.ino("logs/small1"))), "undecodable"),
    "mapped inode lost": (lose(lambda s: inode_key(s.ino("holey"))), "lost-inode"),
    "directory lost": (lose(lambda s: inode_key(s.ino("logs/deep"))), "lost-inode"),
    "directory garbled": (garble(lambda s: inode_key(s.ino("logs"))), "undecodable"),
    "root lost": (lose(lambda _s: inode_key(ROOT)), "root-directory"),
    "name lost": (lose(lambda s: name_key(s.ino("logs"), b"small2")), "lost-name"),
    "name garbled": (garble(lambda s: name_key(s.ino("logs"), b"small2")), "undecodable"),
    "directory's name lost": (lose(lambda s: name_key(ROOT, b"logs")), "lost-name"),
    "type wrong": (_wrong_type, "entry-type"),
    "place lost": (lose(lambda s: s.all(COOKIE + u64(s.ino("logs")))[0][0]), "place"),
    "place wrong": (_rename_in_place, "place"),
    "place garbled": (garble(lambda s: s.all(COOKIE + u64(s.ino("logs")))[0][0]), "undecodable"),
    "place of another inode": (_wrong_inode_in_place, "place"),
    "place of another type": (_wrong_type_in_place, "place"),
    "type wrong in both": (_wrong_type_in_both, "entry-type"),
    "place too many": (_put(lambda s: COOKIE + u64(s.ino("logs")) + u64(5), encode_place(b"nobody", 5, stat.S_IFREG)), "place"),
    "links wrong": (lambda s: edit_inode(s, "logs/deep/large", nlink=7), "links"),
    "directory's links wrong": (lambda s: edit_inode(s, "logs", nlink=9), "links"),
    "hint wrong": (lambda s: edit_inode(s, "logs/small3", name=b"small4"), "hint"),
    "directory's parent wrong": (lambda s: edit_inode(s, "logs/deep", parent=ROOT, name=b"logs"), "hint"),
    "orphan mark on a file in use": (_put(lambda s: ORPHAN + u64(s.ino("logs/small1")), b"i"), "orphan-mark"),
    "orphan mark on a map in use": (
        _put(lambda s: ORPHAN + u64(decode_inode(1, s.get(inode_key(s.ino("holey")))).map), b"m"),
        "orphan-mark",
    ),
    "orphan mark on nothing": (_put(lambda _s: ORPHAN + u64(900), b"i"), "stale-mark"),
    "totals wrong": (_put(lambda _s: COUNTS_KEY, b"\x01\x93\x01\x01\x01"), "counts"),
    "totals lost": (lose(lambda _s: COUNTS_KEY), "counts"),
    "xattr of nobody": (_put(lambda _s: XATTR + u64(4444) + b"user.x", b"y"), "xattr"),
    "xattr not listed": (lambda s: edit_inode(s, "holey", flags=0), "xattr"),
    "value lost": (lose(lambda s: value_key(s.value_of("logs/deep/large"))), "missing-value"),
    "value garbled": (garble(lambda s: value_key(s.value_of("logs/small1"))), "undecodable"),
    "value's owner wrong": (_owner, "value-owner"),
    "sealed too small": (_sealed(-500), "sealed"),
    "other replication and no mark": (_replication, "misplaced"),
    "marked as garbage": (_put(lambda s: GARBAGE + u64(s.value_of("holey"))), "garbage-in-use"),
    "extent lost": (lose(lambda s: s.extents_of("logs/deep/large")[1].key), "bad-extent"),
    "last extent lost": (lose(lambda s: s.extents_of("logs/deep/large")[-1].key), "bad-extent"),
    "only extent lost": (lose(lambda s: s.extents_of("logs/small1")[0].key), "bad-extent"),
    "extent garbled": (garble(lambda s: s.extents_of("logs/deep/large")[0].key), "undecodable"),
    "extent to nowhere": (_wrong_extent, "bad-extent"),
    "extent to another sector": (_other_sector, "bad-extent"),
    "sector lost": (lose(_sector_of("logs/deep/large")), "lost-sector"),
    "sector garbled": (garble(_sector_of("logs/small1")), "undecodable"),
    "live too small": (_live(-100), "live"),
    "live too large": (_live(100), "live"),
    "fresh mark on a sector in use": (_put(lambda s: FRESH + _sector_of("holey")(s)[1:]), "fresh-mark"),
    "fresh mark on nothing": (_put(lambda _s: FRESH + u64(3)), "fresh-mark"),
    "not in the partial index": (lose(lambda s: s.all(PARTIAL)[0][0]), "partial-index"),
    "in the partial index for nothing": (_put(lambda _s: PARTIAL + b"\0" + u64(77), b"2"), "partial-index"),
    "in the wrong class": (_put(lambda s: PARTIAL + b"\7" + _sector_of("logs/deep/large")(s)[1:], b"2"), "partial-index"),
    "in the copies index for nothing": (_put(lambda _s: UNDERREPLICATED + u64(77)), "copies-index"),
    "number of sectors wrong": (_put(lambda _s: SETTING + b"sectors", u64(1000)), "sector-count"),
    "holders lost": (lose(_holders), "holders"),
    "holders garbled": (garble(_holders), "undecodable"),
    "sector counter too low": (_put(lambda _s: COUNTER + b"sector", u64(1)), "counter"),
    "inode counter lost": (lose(lambda _s: COUNTER + b"inode"), "counter"),
    "value counter too low": (_put(lambda _s: COUNTER + b"value", u64(2)), "counter"),
    "cookie counter too low": (_put(lambda _s: COUNTER + b"cookie", u64(2)), "counter"),
}


#: What a check that only looks calls it, where --repair finds out more.
SEEN = {
    "extent lost": "gap",
    "last extent lost": "gap",
    "only extent lost": "gap",
    "extent to another sector": "live",
    "sector lost": "bad-extent",
}


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Content]:
    """A volume, made once and copied for each test, and what is in it."""
    place = tmp_path_factory.mktemp("everything")

    async def build() -> Content:
        await make(place / "v", host_dirs(place, 3), "2")
        await a_bit_of_everything(place / "v")
        return await contents_of(place / "v")

    return place, trio.run(build)


@asynccontextmanager
async def damaged(everything: tuple[Path, Content]) -> AsyncIterator[tuple[Path, Store]]:
    """The volume with its records in hand; put back as it was afterwards, hosts included."""
    place, _ = everything
    backup = place.with_name(place.name + "-backup")
    shutil.copytree(place, backup, symlinks=True)
    store = Store(place / "v")
    try:
        yield place / "v", store
    finally:
        shutil.rmtree(place)
        backup.rename(place)


@pytest.mark.parametrize("name", MENDED)
async def test_damage_is_named_and_mended_and_nothing_is_lost(everything: tuple[Path, Content], name: str) -> None:
    damage, kind = MENDED[name]
    async with damaged(everything) as (path, store):
        damage(store)
        store.close()
        told = await check(path)
        assert SEEN.get(name, kind) in told.kinds, f"{told}"
        assert told.report.exit_status == 21
        mended = await check(path, repair=True)
        assert kind in mended.kinds, f"{mended}"
        assert mended.report.exit_status == 20, f"{mended}"
        again = await check(path, repair=True, data=True)
        assert again.report.exit_status == 0, f"{again}"
        if kind == "misplaced":
            # It moves by itself in what opens the volume next; a volume that is closed meanwhile has copies to make.
            async with opened(path) as volume:
                await volume.rewrite()
                await volume.repair()
        found = await contents_of(path)
        expected = everything[1]
        if name == "mapped inode lost":
            # That it ends in a hole, and how long that is, only the inode knew.
            found["holey"] = found["holey"].ljust(200_000, b"\0")
        assert {key: value for key, value in found.items() if not key.startswith("lost+found")} == expected
        await healthy(path)


async def test_a_queued_deletion_of_a_copy_that_is_in_use_again_is_no_finding_and_deletes_nothing(everything: tuple[Path, Content]) -> None:
    """So it is for a while where a copy comes back to a host it had been taken from: nothing to mail anybody about."""
    async with damaged(everything) as (path, store):
        _freed_in_use(store)
        store.close()
        told = await check(path)
        assert told.report.exit_status == 0, f"{told}"
        assert "pending" in {finding.kind for finding in told.findings}
        async with opened(path) as volume:
            for _ in range(3):
                await volume.publish()
            assert await volume.deleter.drain() == 0
        again = await check(path, data=True)
        assert again.report.exit_status == 0, f"{again}"
        assert "pending" not in {finding.kind for finding in again.findings}
        assert await contents_of(path) == everything[1]


# ------------------------------------------------------------------------------------ what cannot be mended without loss


def shards(place: Path, root: Path) -> list[Path]:
    """Its copies, wherever they are."""
    return sorted(found for found in place.glob(f"host*/volumes/*/{root}") if found.is_file())


def shard_of(store: Store, path: str, number: int = 0) -> Path:
    """Below a host's volume directory: where a sector of the file stands."""
    sector_id = store.extents_of(path)[number].sector_id
    root = decode_sector(store.get(SECTOR + u64(sector_id)), sector_id).shards[0].root.hex()
    return Path("sectors") / root[:2] / root


async def test_what_stands_behind_a_gap_is_kept_in_lost_and_found(everything: tuple[Path, Content]) -> None:
    """The extent and its sector's record are gone for good: the file ends there, and no byte of the rest is lost, its tail included."""
    async with damaged(everything) as (path, store):
        extents = store.extents_of("logs/deep/large")
        store[extents[1].key] = None
        # The record of live bytes agrees, so that nothing tells where the extent was.
        edit_sector(store, SECTOR + u64(extents[1].sector_id), live=0)
        store[PARTIAL + b"\0" + u64(extents[1].sector_id)] = None
        store.close()
        whole = everything[1]["logs/deep/large"]
        async with opened(path) as volume:
            # On no host yet.
            await volume.namespace.append(volume.namespace.lookup(ROOT, b"second-name"), b"the very end")
            await volume.commit()
        whole += b"the very end"
        told = await check(path)
        assert "gap" in told.kinds
        assert any(finding.where in ("/logs/deep/large", "/second-name") for finding in told.findings if finding.kind == "gap"), f"{told}"
        mended = await check(path, repair=True)
        assert mended.report.exit_status == 20, f"{mended}"
        found = await contents_of(path)
        assert found["logs/deep/large"] == found["second-name"] == whole[: extents[1].offset]
        rest = [content for name, content in found.items() if name.startswith("lost+found/")]
        assert rest == [whole[extents[2].offset :]]
        await healthy(path)


async def test_a_name_that_leads_nowhere_is_taken_away(everything: tuple[Path, Content]) -> None:
    async with damaged(everything) as (path, store):
        store[inode_key(store.ino("pointer"))] = None
        store.close()
        mended = await check(path, repair=True)
        assert "dangling-name" in mended.kinds
        assert mended.report.exit_status == 20, f"{mended}"
        found = await contents_of(path)
        assert found == {name: content for name, content in everything[1].items() if name != "pointer"}
        await healthy(path)


async def test_inodes_without_a_name_come_to_lost_and_found(everything: tuple[Path, Content]) -> None:
    async with damaged(everything) as (path, store):
        ino, logs = store.ino("logs/small5"), store.ino("logs")
        entry = decode_dirent(logs, store.get(name_key(logs, b"small5")))
        store[name_key(logs, b"small5")] = None
        store[COOKIE + u64(logs) + u64(entry.cookie)] = None
        edit_inode(store, "logs/small5", parent=0, name=b"")
        store.close()
        told = await check(path)
        assert told.kinds == {"unreachable"}
        mended = await check(path, repair=True)
        assert mended.report.exit_status == 20, f"{mended}"
        assert (await contents_of(path))[f"lost+found/{ino}"] == everything[1]["logs/small5"]
        await healthy(path)


async def test_a_circle_of_directories_is_opened(everything: tuple[Path, Content]) -> None:
    async with damaged(everything) as (path, store):
        logs, deep = store.ino("logs"), store.ino("logs/deep")
        entry = decode_dirent(ROOT, store.get(name_key(ROOT, b"logs")))
        store[name_key(ROOT, b"logs")] = None
        store[COOKIE + u64(ROOT) + u64(entry.cookie)] = None
        store[name_key(deep, b"logs")] = encode_dirent(entry)
        store[COOKIE + u64(deep) + u64(entry.cookie)] = encode_place(b"logs", entry.ino, entry.type)
        edit_inode(store, "logs", parent=deep)
        store.close()
        told = await check(path)
        assert "circle" in told.kinds
        mended = await check(path, repair=True)
        assert mended.report.exit_status == 20, f"{mended}"
        found = await contents_of(path)
        assert sorted(found.values()) == sorted(everything[1].values())
        assert logs != deep
        await healthy(path)


async def test_what_only_a_recovery_can_mend_is_left_and_said(everything: tuple[Path, Content]) -> None:
    async with damaged(everything) as (path, store):
        store[store.all(HOST)[0][0]] = b"nonsense"
        store[store.all(CONTRACT)[0][0]] = b"nonsense"
        store[b"~new"] = b"of a later version"
        store.close()
        done = await check(path, repair=True)
        assert {"undecodable", "hosts-record", "unknown-record"} <= done.kinds
        assert done.report.exit_status == 21


async def test_map_damage_is_named_with_the_file(everything: tuple[Path, Content]) -> None:
    async with damaged(everything) as (path, store):
        store[store.all(MAP)[1][0]] = None
        store.close()
        done = await check(path, repair=True)
        assert done.kinds == {"map"}
        assert next(finding for finding in done.findings if not finding.note).where == "/holey"
        assert done.report.exit_status == 21


# -------------------------------------------------------------------------------------------------------------- hosts


async def test_a_missing_and_a_short_copy_are_named_and_made_again(everything: tuple[Path, Content]) -> None:
    async with damaged(everything) as (path, store):
        first, second = shard_of(store, "logs/deep/large", 0), shard_of(store, "logs/deep/large", 1)
        store.close()
        original = shards(path.parent, first)[0].read_bytes()
        shards(path.parent, first)[0].unlink()
        shards(path.parent, second)[1].write_bytes(b"short")
        told = await check(path)
        assert told.kinds == {"missing-copy", "damaged-copy"}
        mended = await check(path, repair=True)
        assert mended.kinds == {"missing-copy", "damaged-copy"}
        assert mended.report.exit_status == 20, f"{mended}"
        # I1: the same sealed bytes.
        assert [found.read_bytes() for found in shards(path.parent, first)] == [original, original]
        await healthy(path)
        assert await contents_of(path) == everything[1]


async def test_a_flipped_bit_is_found_by_reading_and_mended(everything: tuple[Path, Content]) -> None:
    async with damaged(everything) as (path, store):
        root = shard_of(store, "holey")
        store.close()
        copy = shards(path.parent, root)[0]
        raw = bytearray(copy.read_bytes())
        raw[len(raw) // 2] ^= 1
        copy.write_bytes(raw)
        assert (await check(path)).report.exit_status == 0  # The size is right.
        assert (await check(path, data=True)).kinds == {"damaged-copy"}
        assert (await check(path, data=True, repair=True)).report.exit_status == 20
        await healthy(path)


async def test_files_that_are_lost_are_named(everything: tuple[Path, Content]) -> None:
    async with damaged(everything) as (path, store):
        root = shard_of(store, "logs/deep/large", 1)
        store.close()
        for copy in shards(path.parent, root):
            copy.unlink()
        done = await check(path, repair=True)
        assert done.kinds == {"missing-copy", "unreadable"}
        assert done.report.exit_status == 21
        unreadable = [finding for finding in done.findings if finding.kind == "unreadable"]
        assert [finding.where for finding in unreadable] in (["/logs/deep/large"], ["/second-name"])


async def test_a_host_that_is_away_is_one_finding_and_nothing_is_given_up(everything: tuple[Path, Content]) -> None:
    async with damaged(everything) as (path, store):
        store.close()
        away = path.parent / "host1"
        away.rename(path.parent / "elsewhere")
        done = await check(path, repair=True, data=True)
        assert done.kinds == {"host-away"}
        assert done.report.found["host-away"] == 1
        assert done.report.exit_status == 21
        (path.parent / "elsewhere").rename(away)
        await healthy(path)


async def test_what_was_on_a_host_that_is_given_up_is_copied_to_others(everything: tuple[Path, Content]) -> None:
    async with damaged(everything) as (path, store):
        store[LOST + u32(2)] = u64(1)
        on_it = [key for key, raw in store.all(SECTOR) if 2 in decode_sector(raw, 1).shards[0].hosts]
        store.close()
        shutil.rmtree(path.parent / "host1")
        told = await check(path)
        assert told.report.found == {"missing-copy": len(on_it)}
        mended = await check(path, repair=True)
        assert mended.report.exit_status == 20, f"{mended}"
        await healthy(path)


async def test_shards_on_no_record_are_a_note(everything: tuple[Path, Content]) -> None:
    async with damaged(everything) as (path, store):
        root = shard_of(store, "holey")
        store.close()
        stranger = shards(path.parent, root)[0].with_name("ab" * 32)
        stranger.write_bytes(b"whose is this")
        done = await check(path, repair=True)
        assert done.report.exit_status == 0
        assert done.report.notes["orphan-shards"] == 1
        assert stranger.exists()


async def test_a_contract_that_has_ended_is_told(everything: tuple[Path, Content]) -> None:
    class Later:
        def __init__(self) -> None:
            self._real = Seams().clock

        def time_ns(self) -> int:
            return self._real.time_ns() + 200 * 86400 * 10**9

        def monotonic(self) -> float:
            return self._real.monotonic()

        async def sleep(self, seconds: float) -> None:
            await self._real.sleep(seconds)

    async with damaged(everything) as (path, store):
        store.close()
        done = await check(path, seams=Seams(clock=Later()))
        assert done.kinds == {"no-contract"}
        assert done.report.exit_status == 21


async def test_too_few_copies_become_enough_where_there_is_a_host(everything: tuple[Path, Content]) -> None:
    async with damaged(everything) as (path, store):
        key = _sector_of("holey")(store)
        record = decode_sector(store.get(key), read_u64(key, 1))
        record.shards[0].hosts = record.shards[0].hosts[:1]
        store[key] = record.encode()
        store[UNDERREPLICATED + key[1:]] = b""
        store.close()
        assert (await check(path)).kinds == {"few-copies"}
        assert (await check(path, repair=True)).report.exit_status == 20
        await healthy(path)


# ------------------------------------------------------------------------------------------------------------ crashes


@pytest.mark.parametrize("first", range(1, 31, 3))
async def test_a_repair_that_is_cut_off_anywhere_is_gone_on_with(everything: tuple[Path, Content], first: int) -> None:
    """Much damage at once; the process dies at its nth durable step; the next repair finishes it, and everything is there."""
    async with damaged(everything) as (path, store):
        for name in (
            "inode lost",
            "name lost",
            "extent lost",
            "sector lost",
            "holders lost",
            "links wrong",
            "place lost",
            "live too small",
        ):
            if name != "live too small":
                MENDED[name][0](store)
        root = shard_of(store, "holey")
        store.close()
        shards(path.parent, root)[0].unlink()
        died = False
        try:
            await check(path, repair=True, seams=Seams(failpoints=DeadFrom(first)))
        except BaseException as error:
            if not any(isinstance(one, Crash | FusefsError) for one in _leaves(error)):
                raise
            died = True
        assert died, "all of it was done before the process was to die: take a smaller number"
        mended = await check(path, repair=True)
        assert mended.report.exit_status in (0, 20), f"{mended}"
        await healthy(path)
        found = await contents_of(path)
        assert {name: content for name, content in found.items() if not name.startswith("lost+found")} == everything[1]
