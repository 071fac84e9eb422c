"""Crashes at every single point of a script that uses all durable operations, one after the other; after each the volume is compared.

From the hit on nothing that has a failpoint happens any more: no journal, no LMDB, no host is written to, as after kill -9. Then the volume
is opened again, and must hold one of the states that the script went through, not older than the last acknowledged one; it is cleaned up
(reclaim, deletions, sweep), and hosts must hold nothing that is on no record.

    python -m tests.crash_points          every point of the short script, once
    python -m tests.crash_points 200      that many random runs of the long script, each with two crashes, the second during what follows
    python -m tests.crash_points 200 SEED

Work is done on the event loop, so that the points of a run are nearly the same each time; time is real.
"""

from __future__ import annotations

import copy
import os
import random
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import trio
from blake3 import blake3

from storage import creation
from storage.config import CONFIG_FILE
from storage.errors import FusefsError, WrongPassphrase
from storage.keyfile import CHEAP, KEY_FILE, change_passphrase
from storage.metadata.keys import FREED, FRESH, GARBAGE, HOLDERS, INODE, MAP, ORPHAN, SECTOR, VALUE, prefix_end, read_u64
from storage.namespace import filemap
from storage.recovery import recover_volume
from storage.sealing import HEADER_SIZE, ShardHeader
from storage.seams import InlineWorker, Seams
from storage.sectors import deleter
from storage.sectors.records import decode_sector
from storage.sectors.sweep import RECOVERED_KEY
from storage.values import merge, reclaim, shipping
from storage.volume import Volume
from storage.wiring import open_volume
from tests.fakes import Crash, InlineThreads
from tests.metadata_rig import quick_directory, take_over
from tests.nonces import Nonces, RecordingOpener
from tests.rig import PASSPHRASE, QUIET
from tests.sweeping import sweeper_of

T = TypeVar("T")

SECTOR_SIZE = 64 * 1024
NEW_PASSPHRASE = "battery staple"
OPTIONS = replace(QUIET, journal_segment=32 * 1024, journal_limit=1024 * 1024, tail_budget=8 * SECTOR_SIZE, cache=1024 * 1024)
#: Little, so that something is dropped.
STAGING = 3 * SECTOR_SIZE
FILE, DIR = 0o100644, 0o755
ROOT = 1


class DeadFrom:
    """The process dies at the `nth` hit (of `name`, if given), and stays dead. 0: it lives, and its hits are counted."""

    def __init__(self, nth: int, name: str = "", at_hit: Callable[[], None] = lambda: None) -> None:
        self.hits: list[str] = []
        self.died = False
        self._left = nth
        self._name = name
        self._at_hit = at_hit
        self._lock = threading.Lock()

    def hit(self, name: str) -> None:
        with self._lock:
            if not self.died:
                self.hits.append(name)
                self._at_hit()
                if self._name in ("", name):
                    self._left -= 1
                    self.died = self._left == 0
        if self.died:
            raise Crash(name)

    def die(self) -> None:
        """Now: nothing with a failpoint happens any more."""
        self.died = True


@dataclass(eq=False)
class Content:
    """One file's bytes, whatever it is called. Appended to only; or `sparse`: written once, and what is acknowledged is there whole."""

    data: bytearray = field(default_factory=bytearray)
    #: Bytes that survive the process; the machine.
    committed: int = 0
    flushed: int = 0
    sparse: bool = False

    def allows(self, found: bytes, least: int) -> bool:
        if self.sparse:
            return not least or found == bytes(self.data)
        return len(found) >= least and bytes(self.data[: len(found)]) == found


#: Some work on a new volume, with a crash on order, and the comparison afterwards.
Work = Callable[["Run", "DeadFrom"], Awaitable[None]]
#: A failpoint's name, and which hit of it.
Point = tuple[str, int]
#: path -> (content or None for a directory, bytes of it that must be there).
State = dict[str, tuple[Content | None, int]]


class Model:
    """What may be found: after a crash one of `states`, on the hosts alone one of `shipped`; the first of each was acknowledged as such."""

    def __init__(self) -> None:
        self.now: dict[str, Content | None] = {}
        self.states: list[State] = [{}]
        self.shipped: list[State] = [{}]
        self.passphrases = [PASSPHRASE]

    def _snapshot(self, promised: Callable[[Content], int], least: dict[Content, int]) -> State:
        return {path: (one, max(promised(one), least.get(one, 0)) if one else 0) for path, one in self.now.items()}

    def may(self, least: dict[Content, int] | None = None) -> None:
        """From now on what is `now` may be what is found, with so many bytes at least. Called before the operation is."""
        self.states.append(self._snapshot(lambda one: one.committed, least or {}))
        self.shipped.append(self._snapshot(lambda one: one.flushed, least or {}))

    def must(self, *contents: Content, flushed: bool = False) -> None:
        """It was acknowledged, with all bytes of these."""
        for content in contents:
            content.committed = len(content.data)
            if flushed:
                content.flushed = content.committed
        self.states = [self._snapshot(lambda one: one.committed, {})]
        if flushed:
            self.shipped = [self._snapshot(lambda one: one.flushed, {})]

    def all(self) -> list[Content]:
        return [content for content in self.now.values() if content is not None]

    def compare(self, found: dict[str, bytes | None], *, recovered: bool = False) -> None:
        """Go on with what was found, which must be one of the states."""
        problems = []
        states = self.shipped if recovered else self.states
        for state in states:
            wrong = [f"{path} is {'missing' if path in state else 'there'}" for path in state.keys() ^ found.keys()]
            for path in state.keys() & found.keys():
                (content, least), bytes_found = state[path], found[path]
                if (content is None) != (bytes_found is None):
                    wrong.append(f"{path} is of another kind")
                elif content is not None and bytes_found is not None and not content.allows(bytes_found, least):
                    wrong.append(f"{path}: {len(bytes_found)} bytes found, {least} of {len(content.data)} promised")
            if not wrong:
                self._take(found, state, recovered)
                return
            problems.append("; ".join(wrong))
        raise AssertionError(f"none of {len(states)} states: " + " | ".join(problems))

    def _take(self, found: dict[str, bytes | None], state: State, recovered: bool) -> None:
        """What was found is what there is. Not yet known to be flushed, so what hosts may give back stays as wide as it was."""
        self.now = {}
        for path, data in found.items():
            content = state[path][0]
            if data is not None and content is not None:
                content = Content(bytearray(data), len(data), len(data) if recovered else min(content.flushed, len(data)), content.sparse)
            self.now[path] = content
        self.states = [self._snapshot(lambda one: one.committed, {})]
        if recovered:
            self.shipped = [self._snapshot(lambda one: one.flushed, {})]
        else:
            self.shipped.append(self._snapshot(lambda one: one.flushed, {}))


class Script:
    """The operations, by name, on one open volume. Each tells the model before and after."""

    def __init__(self, volume: Volume, model: Model, base: Path, seed: int = 0) -> None:
        self.volume, self.model, self.base = volume, model, base
        self.ns = volume.namespace
        self.random = random.Random(seed)

    # ---- parts

    def ino(self, path: str) -> int:
        at = ROOT
        for name in path.split("/"):
            at = self.ns.lookup(at, name.encode())
        return at

    def place(self, path: str) -> tuple[int, bytes]:
        parent, _, name = path.rpartition("/")
        return (self.ino(parent) if parent else ROOT), name.encode()

    def content(self, path: str) -> Content:
        content = self.model.now[path]
        assert content is not None
        return content

    def mkdir(self, path: str) -> None:
        self.model.now[path] = None
        self.model.may()
        self.ns.mkdir(*self.place(path), DIR, 0, 0)

    def create(self, path: str) -> None:
        self.model.now[path] = Content()
        self.model.may()
        self.ns.create(*self.place(path), FILE, 0, 0)

    async def append(self, path: str, size: int) -> None:
        data = self.random.randbytes(size)
        self.content(path).data += data
        await self.ns.append(self.ino(path), data)

    async def fsync(self, path: str) -> None:
        await self.ns.commit(self.ino(path))
        self.model.must(self.content(path))

    async def commit(self) -> None:
        await self.volume.commit()
        self.model.must(*self.model.all())

    async def flush(self) -> None:
        report = await self.volume.flush()
        # Any one host gives it back then; the script's always answer.
        assert not any(reason.startswith("metadata") for reason in report.reasons), report.reasons
        self.model.must(*self.model.all(), flushed=True)

    async def rename(self, source: str, target: str, *, exchange: bool = False) -> None:
        now = self.model.now
        moved, met = now[source], now.get(target)
        if exchange:
            now[source], now[target] = met, moved
        else:
            now[target] = now.pop(source)
        sides = [one for one in ((moved, met) if exchange else (moved,)) if one is not None] if met is not None else []
        self.model.may({one: len(one.data) for one in sides})
        await self.ns.rename(*self.place(source), *self.place(target), exchange=exchange)

    def unlink(self, path: str) -> None:
        del self.model.now[path]
        self.model.may()
        self.ns.unlink(*self.place(path))

    def truncate(self, path: str) -> None:
        self.model.now[path] = Content()
        self.model.may()
        self.ns.truncate(self.ino(path), 0)

    async def sparse(self, path: str, holes: int) -> None:
        content = self.model.now[path] = Content(sparse=True)
        self.model.may()
        ino = self.ns.create(*self.place(path), FILE, 0, 0)
        for number in range(holes):
            data = self.random.randbytes(10)
            content.data += bytes(20) + data
            await self.ns.write(ino, 30 * number + 20, data)

    async def merge(self) -> None:
        partials = self.volume.sectors.partials
        group = [p for p in partials._partials.values() if p.sector_id not in partials.held]
        if len(group) >= 2:
            await self.volume.values._merger.merge(group)

    async def reclaim(self) -> None:
        """A slice and a commit at a time, so that a crash finds it half-walked."""
        while self.volume.values._reclaimer.step():
            await self.commit()

    async def delete_freed(self) -> None:
        for _ in range(4):
            if not await self.volume.deleter.drain():
                return
            # The gate: superblocks that know the sector have to go first.
            await self.flush()
        await self.commit()

    async def sweep(self) -> None:
        """As `Sweeper.run` does it, without the waiting."""
        gate = self.volume.publisher
        assert gate is not None
        sweeper = sweeper_of(self.volume, gate)
        while gate.released_sequence() < sweeper.since:
            gate.want_release(sweeper.since)
            await self.flush()
        for _ in range(20):
            if not await sweeper.sweep():
                break
            # A superblock was put between the looks of the gate: it does not vouch for what it has not re-read.
            await self.flush()
        else:
            raise AssertionError("the sweep is postponed for ever")
        await self.commit()

    async def checkpoint(self) -> None:
        """A new one, though the log is not long yet; the old one's objects go once no kept superblock names them."""
        publisher = self.volume.publisher
        assert publisher is not None
        async with publisher._lock:
            await publisher._look()
            await publisher.draft.cut()
            publisher.draft.begin_checkpoint()
            writing = publisher.draft.writing
        if writing is not None:
            await writing.wait()

    async def hosts(self) -> None:
        """A host more, and its contract renewed."""
        if len(self.volume.hosts.numbers()) < 3:
            await self.volume.add_host(f"dir:{self.base / 'host2'}")
        contract = self.volume.contractor.contracts()[0]
        await self.volume.contractor.renew_contract(contract, 86400.0)
        self.model.must()

    async def leave(self) -> None:
        """A host is left: its shards are made again on the others (repair), and deleted there; then it may have some again."""
        await self.hosts()
        number = self.random.choice([str(number) for number in self.volume.hosts.numbers()])
        await self.volume.leave_host(number, leave=True)
        await self.volume.repair()
        await self.volume.leave_host(number, leave=False)

    async def replicate(self) -> None:
        """All files get another replication, and move into new sectors."""
        await self.volume.set_replication(ROOT, self.random.choice(["2", "1+1", "1"]), now=True)
        await self.volume.rewrite()

    def passwd(self) -> None:
        old = self.model.passphrases[-1]
        new = NEW_PASSPHRASE if old == PASSPHRASE else PASSPHRASE
        self.model.passphrases.append(new)
        change_passphrase(self.base / "v" / KEY_FILE, self.volume.volume_id, old, new, self.volume.seams, CHEAP)
        self.model.passphrases = [new]

    # ---- the whole

    async def short(self) -> None:
        """Everything once."""
        self.mkdir("d")
        self.create("d/a")
        await self.append("d/a", 3000)
        await self.fsync("d/a")
        self.create("big")
        await self.append("big", SECTOR_SIZE + 5000)
        await self.flush()
        self.create("new")
        await self.append("new", 700)
        await self.rename("new", "d/a")
        await self.commit()
        self.create("log")
        for _ in range(2):
            await self.append("log", 300)
            await self.flush()
        await self.merge()
        await self.commit()
        self.passwd()
        await self.leave()
        # Open while it loses its name, then closed.
        big = self.ino("big")
        self.ns.pin(big)
        self.unlink("big")
        await self.sparse("holes", 5)
        await self.commit()
        self.unlink("holes")
        self.ns.unpin(big)
        await self.commit()
        await self.reclaim()
        await self.volume.namespace.reap_orphans()
        await self.commit()
        await self.append("log", 20_000)
        await self.commit()
        await take_over(self.volume.store)
        self.truncate("log")
        await self.append("log", 400)
        await self.rename("log", "d/a", exchange=True)
        await self.checkpoint()
        await self.flush()
        await take_over(self.volume.store)
        await self.delete_freed()
        await self.volume.staging.files.tidy()
        await self.sweep()
        await self.append("log", 100)

    async def long(self, steps: int) -> None:
        """Some of it in any order."""
        for number in range(steps):
            files = [path for path, one in self.model.now.items() if one is not None and not one.sparse]
            path = self.random.choice(files) if files else ""
            what = self.random.choice(_CHOICES)
            if not files or what == "create":
                self.create(f"{self.random.getrandbits(40):x}-{number}")
            elif what == "append":
                await self.append(path, int(10 ** self.random.uniform(0, 4.9)))
            elif what == "fsync":
                await self.fsync(path)
            elif what == "rename":
                other = self.random.choice(files)
                if other != path:
                    await self.rename(path, other, exchange=self.random.random() < 0.3)
            elif what == "unlink":
                self.unlink(path)
            elif what == "truncate":
                self.truncate(path)
            elif what == "sparse":
                await self.sparse(f"{self.random.getrandbits(40):x}-s{number}", self.random.randint(1, 6))
            elif what == "passwd":
                self.passwd()
            elif what == "takeover":
                await take_over(self.volume.store)
            else:
                do: Callable[[], Awaitable[None]] = getattr(self, what)
                await do()


_CHOICES = [
    *["create"] * 2,
    *["append"] * 8,
    *["fsync"] * 3,
    *["rename"] * 2,
    *["flush"] * 3,
    "commit",
    "unlink",
    "truncate",
    "sparse",
    "merge",
    "checkpoint",
    "reclaim",
    "delete_freed",
    "sweep",
    "hosts",
    "leave",
    "replicate",
    "passwd",
    "takeover",
]


# ------------------------------------------------------------------------------------------------------------ one run


def _seams(failpoints: DeadFrom | None) -> Seams:
    if failpoints is None:
        return Seams(threads=InlineThreads(), worker=InlineWorker)
    return Seams(threads=InlineThreads(), worker=InlineWorker, failpoints=failpoints)


def leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in leaves(inner)]
    return [error]


@dataclass
class Run:
    """One volume, its hosts and what is known of it, in `base`, which must always be the same directory: hosts know where they are."""

    base: Path
    nonces: Nonces = field(default_factory=Nonces)
    model: Model = field(default_factory=Model)
    #: Hosts are far away: what goes there is staged first.
    far: bool = False
    #: Hits of every life so far that was not counted out.
    hits: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.opener = RecordingOpener(self.nonces, far=self.far)

    async def make(self, failpoints: DeadFrom | None = None) -> None:
        """The new volume, kept for `again`."""
        shutil.rmtree(self.base, ignore_errors=True)
        self.base.mkdir(parents=True)
        hosts = [f"dir:{self.base / f'host{number}'}" for number in range(2)]
        for url in hosts:
            Path(url.removeprefix("dir:")).mkdir()
        await creation.create_volume(
            self.base / "v",
            PASSPHRASE,
            hosts=hosts,
            replication="2",
            sector_size=SECTOR_SIZE,
            seams=_seams(failpoints),
            argon2=CHEAP,
            opener=self.opener,
        )
        self.keep()

    def keep(self) -> None:
        """Everything as it is now, for `again`."""
        template = self.base.with_name("template")
        shutil.rmtree(template, ignore_errors=True)
        shutil.copytree(self.base, template)

    def again(self) -> Run:
        """As it was kept, with what was known of it then: nothing may have been done to this run since."""
        shutil.rmtree(self.base)
        shutil.copytree(self.base.with_name("template"), self.base)
        return Run(self.base, model=copy.deepcopy(self.model), far=self.far)

    async def live(self, failpoints: DeadFrom, do: Callable[[Script], Awaitable[None]], seed: int = 0) -> bool:
        """A life of the volume. True if it was cut short."""
        try:
            async with await self._open(failpoints) as volume:
                await do(Script(volume, self.model, self.base, seed))
        except BaseException as error:
            others = [one for one in leaves(error) if not isinstance(one, Crash | FusefsError | trio.Cancelled)]
            if others or not failpoints.died:
                raise
        else:
            if not failpoints.died:
                # The end of a volume commits.
                self.model.must(*self.model.all())
        self.nonces.journal(self.base / "v")
        return failpoints.died

    async def _open(self, failpoints: DeadFrom | None):  # type: ignore[no-untyped-def]
        """A crash while the passphrase was changed leaves the old or the new."""
        for passphrase in self.model.passphrases:
            try:
                options = replace(OPTIONS, staging=STAGING if self.far else 0)
                manager = open_volume(self.base / "v", passphrase=passphrase, seams=_seams(failpoints), options=options, opener=self.opener)
                if len(self.model.passphrases) > 1:
                    await _try_passphrase(self.base / "v", passphrase)
            except WrongPassphrase:
                continue
            self.model.passphrases = [passphrase]
            return manager
        raise AssertionError("no passphrase opens it")

    async def check(self, failpoints: DeadFrom | None = None, *, recovered: bool = False) -> bool:
        """Open, compare, clean up, compare with the hosts. True if that was cut short by a crash of its own."""
        failpoints = failpoints or DeadFrom(0)

        async def do(script: Script) -> None:
            volume = script.volume
            self.model.compare(await tree(volume), recovered=recovered)
            await clean_up(script)
            volume.sectors.cache._blocks.clear()
            self.model.compare(await tree(volume))
            check_hosts(volume)

        died = await self.live(failpoints, do)
        self.nonces.check()
        return died

    async def recover(self, failpoints: DeadFrom | None = None) -> bool:
        """The machine is lost: back from one of the hosts, alone if need be. True if that was cut short."""
        failpoints = failpoints or DeadFrom(0)
        hosts = sorted(self.base.glob("host?"))
        # Superblocks have a new one from the next round on; the old one opens older superblocks for good.
        for passphrase in (PASSPHRASE, NEW_PASSPHRASE):
            try:
                await recover_volume(
                    self.base / "v",
                    [f"dir:{host}" for host in hosts],
                    passphrase=passphrase,
                    seams=_seams(failpoints),
                    opener=self.opener,
                )
            except WrongPassphrase:
                continue
            except BaseException as error:
                if not failpoints.died:
                    raise
                if any(not isinstance(one, Crash | FusefsError | trio.Cancelled) for one in leaves(error)):
                    raise
                self.model.passphrases = [PASSPHRASE, NEW_PASSPHRASE]
                return True
            self.model.passphrases = [passphrase]
            return False
        raise AssertionError("no passphrase opens any superblock")

    async def lose_machine(self, failpoints: DeadFrom | None = None) -> bool:
        """All that is not on hosts goes; recovered, compared and cleaned up. True if a recovery was cut short by the crash asked for."""
        shutil.rmtree(self.base / "v")
        died = await self.recover(failpoints)
        if died and not (self.base / "v" / CONFIG_FILE).exists():
            await self.recover()
        await self.check(recovered=True)
        return died


async def _try_passphrase(path: Path, passphrase: str) -> None:
    from storage.config import load_config
    from storage.keyfile import load_keyfile, open_slots

    open_slots(load_keyfile(path / KEY_FILE, load_config(path).volume_id), passphrase)


async def tree(volume: Volume) -> dict[str, bytes | None]:
    """path -> bytes of a file, None for a directory."""
    found: dict[str, bytes | None] = {}
    pending = [(ROOT, "")]
    while pending:
        parent, prefix = pending.pop()
        for entry in volume.namespace.entries(parent, 0, 10_000):
            path = prefix + entry.name.decode()
            if entry.mode & 0o170000 == 0o040000:
                found[path] = None
                pending.append((entry.ino, path + "/"))
            else:
                found[path] = await volume.namespace.read(entry.ino, 0, 1 << 30)
    return found


async def clean_up(script: Script) -> None:
    """Whatever a crash left half-done is finished by what runs at every mount; here it is waited for."""
    volume = script.volume
    with trio.fail_after(20):
        await volume.namespace.reap_orphans()
        for number in volume.standing.leaving():
            await volume.leave_host(str(number), leave=False)
        await volume.rewrite()
        await volume.repair()
        await script.reclaim()
        await script.flush()
        await volume.sectors.wait_uploads()
        while volume.store.scan(FREED, prefix_end(FREED), 1):
            await volume.flush()
            await volume.deleter.drain()
        await script.sweep()
        await script.flush()
    for prefix, what in ((GARBAGE, "freed values"), (ORPHAN, "orphans"), (FRESH, "fresh sectors"), (FREED, "freed sectors")):
        assert not volume.store.scan(prefix, prefix_end(prefix), 1), f"{what} are left"


def _epoch_of(volume: Volume, number: int, root: str) -> int:
    """Whose shard it is, by its header."""
    host = Path(volume.hosts.url(number).removeprefix("dir:"))
    return ShardHeader.parse(next(host.glob(f"volumes/*/sectors/*/{root}")).read_bytes()[:HEADER_SIZE]).epoch


def check_hosts(volume: Volume) -> None:
    """Every shard on a host is on record there, as one of a live sector; what is recorded is there. No value or map belongs to nobody."""
    named: dict[tuple[int, str], int] = {}
    for key, raw in volume.store.scan(SECTOR, prefix_end(SECTOR), 1_000_000):
        sector_id = read_u64(key, 1)
        record = decode_sector(raw, sector_id)
        assert record.live > 0, f"sector {sector_id} holds nothing live"
        named |= {(host, shard.root.hex()): sector_id for shard in record.shards for host in shard.hosts}
    held = {(int.from_bytes(key[33:37], "big"), key[1:33].hex()) for key, _ in volume.store.scan(HOLDERS, prefix_end(HOLDERS), 1_000_000)}
    there = set()
    for host in volume.hosts.records():
        root = Path(host.url.removeprefix("dir:"))
        there |= {(host.number, path.name) for path in root.glob("volumes/*/sectors/*/*")}
    raw = volume.store.get(RECOVERED_KEY)
    if raw is not None:
        # What the lost machine put there after its last superblock stays: it may be fenced, not gone.
        there = {
            (number, root)
            for number, root in there
            if (number, root) in named or _epoch_of(volume, number, root) >= int.from_bytes(raw, "big")
        }
    assert there == named.keys(), f"on hosts and unknown: {there - named.keys()}; known and missing: {named.keys() - there}"
    assert held == there, f"holders on record: {held ^ there}"
    inodes = [volume.namespace._inodes.get(read_u64(key, 1)).rec for key, _ in volume.store.scan(INODE, prefix_end(INODE), 1_000_000)]
    for prefix, owned, what in ((VALUE, {rec.value for rec in inodes}, "values"), (MAP, {rec.map for rec in inodes}, "maps")):
        stored = {read_u64(key, 1) for key, _ in volume.store.scan(prefix, prefix_end(prefix), 1_000_000)}
        assert stored <= owned, f"{what} {stored - owned} belong to no file"


# ------------------------------------------------------------------------------------------------------------ all runs


def hasten() -> list[tuple[object, str, object]]:
    """Small slices and no waiting; returns what was there before, for `restore`."""
    changes: list[tuple[object, str, object]] = [
        (filemap, "DROP_AT_ONCE", 2),
        (reclaim, "SLICE", 1),
        (deleter, "GATHER_SECONDS", 60.0),
        (shipping, "RETRY_FIRST", 0.02),
        (shipping, "RETRY_LAST", 0.1),
        (merge, "RETRY_SECONDS", 0.05),
        (merge, "SWITCHED", 2),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]
    for module, name, value in changes:
        setattr(module, name, value)
    return before


def restore(before: list[tuple[object, str, object]]) -> None:
    for module, name, value in before:
        setattr(module, name, value)


class Disk:
    """What lies below a directory, for seeing whether anything has changed."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._known: dict[tuple[str, int, int], bytes] = {}

    def state(self) -> bytes:
        """Of all that a process that starts now would find; temporary files of hosts apart, which are never read."""
        hasher = blake3()
        for directory, below, names in os.walk(self._base):
            below[:] = sorted(name for name in below if name != "~tmp")
            for name in sorted(names):
                if name not in ("lock", "~lock", "lock.mdb"):
                    hasher.update(os.path.join(directory, name).encode() + b"\0" + self._digest(os.path.join(directory, name)))
        return hasher.digest()

    def _digest(self, path: str) -> bytes:
        status = os.stat(path)
        key = (path, status.st_ino, status.st_mtime_ns)
        # What hosts hold is put by renaming, never changed in place.
        if "/host" not in path or key not in self._known:
            self._known[key] = blake3(Path(path).read_bytes()).digest()
        return self._known[key]


def find_points(run: Run, work: Work) -> tuple[list[Point], list[Point]]:
    """The hits of some work without a crash, and those after which something changes on a disk before the next: others are like the one
    that follows them, which promises no less.
    """
    states: list[bytes] = []
    disk = Disk(run.base)
    failpoints = DeadFrom(0, at_hit=lambda: states.append(disk.state()))
    _run(lambda: work(run, failpoints))
    counts: Counter[str] = Counter()
    hits: list[Point] = []
    for name in failpoints.hits:
        counts[name] += 1
        hits.append((name, counts[name]))
    return hits, [hit for hit, one, other in zip(hits, states, [*states[1:], b""], strict=True) if one != other]


def _run(whole: Callable[[], Awaitable[T]]) -> T:
    """With the same order of tasks every time, as far as time itself allows."""
    # What trio itself does under Hypothesis.
    scheduler: Any = trio._core._run
    scheduler._ALLOW_DETERMINISTIC_SCHEDULING = True
    scheduler._r.seed(0)
    try:
        return trio.run(whole)
    finally:
        scheduler._ALLOW_DETERMINISTIC_SCHEDULING = False


async def crash(run: Run, failpoints: DeadFrom) -> None:
    """The short script, and the same directory opened again."""
    await run.live(failpoints, Script.short)
    await run.check()


async def lose(run: Run, failpoints: DeadFrom) -> None:
    """The short script, and nothing but the hosts left of it."""
    await run.live(failpoints, Script.short)
    await run.lose_machine()


async def recover(run: Run, failpoints: DeadFrom) -> None:
    """A recovery, after the short script, that is cut short, and started over."""
    await run.lose_machine(failpoints)


def every_point(base: Path, work: Work = crash, *, all_hits: bool = False, step: int = 1, far: bool = False) -> Counter[str]:
    """Do the work with a crash at each of its points; how often each name was the one. AssertionError names the point."""
    before = hasten()
    try:
        run = Run(base / "run", far=far)
        trio.run(run.make)
        if work is recover:
            trio.run(run.live, DeadFrom(0), Script.short)
            run.keep()
        hits, points = find_points(run.again(), work)
        died: Counter[str] = Counter()
        for name, nth in hits if all_hits else points[::step]:
            failpoints = DeadFrom(nth, name)
            one = run.again()
            try:
                _run(partial(work, one, failpoints))
            except BaseException as error:
                how = "crash" if failpoints.died else "no crash"
                raise AssertionError(
                    f"{how} at {name}, number {nth}, hit {len(failpoints.hits)} of {len(hits)}: {leaves(error)}"
                ) from error
            died[name] += failpoints.died
        return died
    finally:
        restore(before)


def random_runs(base: Path, count: int, seed: int) -> int:
    """The long script, crashed, then crashed again while it is cleaned up; how many crashes there were."""
    before = hasten()
    crashes = 0
    try:
        run = Run(base / "run")
        trio.run(run.make)
        for number in range(count):
            chance = random.Random(f"{seed}/{number}")
            run.far = chance.random() < 0.5
            one = run.again()

            async def lives(one: Run = one, chance: random.Random = chance) -> int:
                died = 0

                async def work(script: Script) -> None:
                    # The check before may have died before it had looked: what is there now is what is gone on from.
                    one.model.compare(await tree(script.volume))
                    await script.long(chance.randint(5, 60))

                for _ in range(3):
                    nth = int(10 ** chance.uniform(1, 3))
                    died += await one.live(DeadFrom(nth), work, chance.getrandbits(32))
                    if chance.random() < 0.3:
                        died += await one.lose_machine(DeadFrom(int(10 ** chance.uniform(0.5, 2.5))))
                    else:
                        died += await one.check(DeadFrom(int(10 ** chance.uniform(0.5, 2.7))))
                await one.check()
                return died

            try:
                crashes += trio.run(lives)
            except BaseException as error:
                raise AssertionError(f"seed {seed}, run {number}: {leaves(error)}") from error
        return crashes
    finally:
        restore(before)


def main(arguments: list[str]) -> int:
    """See the module. The exit status is 0 if everything held; else the first thing that did not is said."""
    with quick_directory() as base:
        if not arguments:
            for work, far in ((crash, False), (lose, False), (recover, False), (crash, True), (lose, True)):
                died = every_point(base, work, all_hits=True, far=far)
                where = ", far hosts" if far else ""
                print(f"{work.__name__}{where}: {sum(died.values())} crashes at {len(died)} kinds of points, all survived", flush=True)
            return 0
        count, seed = int(arguments[0]), int(arguments[1]) if len(arguments) > 1 else random.SystemRandom().getrandbits(32)
        print(f"seed {seed}")
        crashes = random_runs(base, count, seed)
        print(f"{count} runs, {crashes} crashes, all survived")
        return 0 if crashes else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
