"""A local disk that fails: at every single system call the metadata store makes, one after the other.

What is promised: whoever waited for the commit gets the error; the store goes on, or refuses everything from then on; what was acknowledged
is there at the next open; what is there is a prefix; and what a flush could not make durable is never called durable later.
"""

from __future__ import annotations

import errno
import os
import random
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import trio

from storage.durable import write_file_atomic
from storage.errors import Fenced, FusefsError, IOFailure, NoSpace, Unavailable
from storage.hosts.faults import shards_only
from storage.interfaces import Batch
from storage.metadata.store import Store
from storage.wiring import open_volume
from tests.cli_runner import fusefs
from tests.host_rig import FaultyOpener
from tests.metadata_rig import SEGMENT, FailAt, content, copy, opened, piece, put, quick_directory, seal, tail_of, take_over
from tests.mounting import Mounting, mounting_in
from tests.rig import PASSPHRASE, QUIET, append, contents, host_dirs, make, new_value
from tests.rig import opened as volume_opened

FDATASYNC = "storage.metadata.journal.fdatasync"
CALLS = ("open", "pwritev", "write", "fsync", "fdatasync", "rename", "unlink", "ftruncate", "posix_fallocate")
#: What an error can be expected from: a disk that is full takes nothing new, one that is broken fails anything.
FILLING = ("open", "pwritev", "write", "rename", "posix_fallocate", "fsync", "fdatasync")
STEPS = 14
#: EROFS or EIO, as people read them.
REFUSED = r"Read-only|Input/output"


class FailingDisk:
    """Counts the calls on files below `directory`; the `nth` fails, and `more` after it. A write that fails has written half; a flush that
    fails has lost what was written since the last one, and the next flush of the file says nothing of it, as Linux has it."""

    def __init__(self, directory: Path, nth: int = 0, code: int = errno.EIO, more: int = 0) -> None:
        self.directory, self.nth, self.code, self.more = str(directory), nth, code, more
        self.calls: list[str] = []
        self.failed: list[str] = []
        self._real: dict[str, Any] = {name: getattr(os, name) for name in CALLS}
        self._old: dict[str, list[tuple[int, bytes]]] = {}
        self._lock = threading.Lock()

    def _path(self, what: Any) -> str:
        return os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else os.fspath(what)

    def _due(self, name: str, path: str, flags: int) -> bool:
        if not path.startswith(self.directory) or (name == "open" and not flags & os.O_CREAT):
            return False
        with self._lock:
            self.calls.append(name)
            at = len(self.calls)
            due = bool(self.nth) and self.nth <= at <= self.nth + self.more and (self.code == errno.EIO or name in FILLING)
            if due:
                self.failed.append(f"{name} {os.path.basename(path)}")
            return due

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        path = self._path(args[0])
        due = self._due(name, path, args[1] if name == "open" and len(args) > 1 else 0)
        if name == "pwritev" and path.startswith(self.directory):
            fd, pieces, at = args
            data = b"".join(pieces)
            self._old.setdefault(path, []).append((at, os.pread(fd, len(data), at)))
            if due:
                os.pwrite(fd, data[: len(data) // 2], at)
        if name in ("fsync", "fdatasync"):
            unsafe = self._old.pop(path, [])
            for at, old in reversed(unsafe) if due else ():
                os.pwrite(args[0], old, at)
        if due:
            raise OSError(self.code, os.strerror(self.code))
        return self._real[name](*args, **kwargs)


@contextmanager
def failing(disk: FailingDisk) -> Iterator[FailingDisk]:
    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:

            def wrapped(*args: Any, _name: str = name, **kwargs: Any) -> Any:
                return disk.call(_name, *args, **kwargs)

            patch.setattr(os, name, wrapped)
            if name == "fdatasync":
                patch.setattr(FDATASYNC, wrapped)
        yield disk


@dataclass
class Told:
    """What a store said."""

    applied: int = 0
    acknowledged: int = 0
    tail: int = 0
    errors: list[FusefsError] = field(default_factory=list)
    fenced: bool = False
    #: What had been said, and what a crash would have left, before it was closed.
    crashed: tuple[Told, Path] | None = None


async def work(store: Store, told: Told) -> None:
    """Steps with a key and a piece of a tail each; LMDB takes over and segments are recycled in between."""
    seal(store, 1, 0)
    for number in range(STEPS):
        try:
            put(store, b"k%02d" % number, b"v" * 200, piece(1, number * 900, b"%02d" % number * 450))
            told.applied = number + 1
            await store.commit()
        except FusefsError as error:
            told.errors.append(error)
            if store.failure is not None:
                told.fenced = True
                for _ in range(2):
                    with pytest.raises(Fenced):
                        await store.commit()
                with pytest.raises(Fenced):
                    store.apply(Batch())
                return
        else:
            assert not told.fenced
            told.acknowledged, told.tail = number + 1, (number + 1) * 900
        if number % 4 == 3:
            with trio.fail_after(20):
                await take_over(store)


async def run_with(directory: Path, disk: FailingDisk) -> Told:
    told = Told()
    with failing(disk):
        try:
            async with opened(directory) as store:
                await work(store, told)
                told.crashed = (replace(told), copy(directory, directory.with_suffix(".crashed")))
        except FusefsError as error:
            told.errors.append(error)
        else:
            if not told.fenced and told.applied:
                # It was closed without an error: all of it is there.
                told.acknowledged, told.tail = told.applied, told.applied * 900
    return told


async def check(directory: Path, told: Told, where: str) -> None:
    if told.crashed is not None:
        await check(told.crashed[1], told.crashed[0], f"crashed after {where}")
    async with opened(directory) as store:
        keys = sorted(key for key in content(store) if key.startswith(b"k"))
        assert keys == [b"k%02d" % number for number in range(len(keys))], where
        assert told.acknowledged <= len(keys) <= told.applied, where
        tail = tail_of(store, 1)
        whole = b"".join(b"%02d" % number * 450 for number in range(STEPS))
        assert len(tail) >= told.tail, where
        assert whole.startswith(tail), where
        # And it goes on.
        put(store, b"after", b"x")
        await store.commit()


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("more", [0, 3])
async def test_every_local_call_may_fail(code: int, more: int) -> None:
    with quick_directory() as base:
        (base / "count").mkdir()
        counting = FailingDisk(base / "count")
        told = await run_with(base / "count", counting)
        assert told.acknowledged == STEPS
        assert not told.errors
        total = len(counting.calls)
        assert total > 40
        hit: set[str] = set()
        fenced = refused = 0
        # The few renames all of them: beginning with what stands before one, it is not come to.
        renames = {at for at, name in enumerate(counting.calls, 1) if name == "rename"}
        for nth in sorted({*range(1, total + 1, 1 if more == 0 else 3), *renames}):
            directory = base / f"v{nth}"
            directory.mkdir()
            disk = FailingDisk(directory, nth, code, more)
            told = await run_with(directory, disk)
            hit |= {name.split()[0] for name in disk.failed}
            fenced += told.fenced
            refused += bool(told.errors)
            await check(directory, told, f"call {nth}: {disk.failed}, then {told.errors}")
        assert fenced > 3
        assert refused >= fenced
        assert hit >= {"open", "pwritev", "fsync", "fdatasync", "rename"}


async def test_the_check_notices_a_flush_that_failed_and_was_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with a journal that takes a failed fdatasync for a good one: bytes that were acknowledged are missing."""
    caught = 0
    with quick_directory() as base:
        for nth in range(14, 44):
            directory = base / f"v{nth}"
            directory.mkdir()
            disk = FailingDisk(directory, nth, errno.EIO)
            with failing(disk):

                def careless(fd: int, disk: FailingDisk = disk) -> None:
                    with suppress(OSError):
                        disk.call("fdatasync", fd)

                monkeypatch.setattr(FDATASYNC, careless)
                told = Told()
                try:
                    async with opened(directory) as store:
                        await work(store, told)
                        told.crashed = (replace(told), copy(directory, directory.with_suffix(".crashed")))
                except FusefsError as error:
                    told.errors.append(error)
                monkeypatch.undo()
            if not any(name.startswith("fdatasync") for name in disk.failed):
                continue
            try:
                await check(directory, told, "")
            except (AssertionError, FusefsError):
                caught += 1
    assert caught


@pytest.mark.parametrize("name", ["lmdb.takeover.before", "lmdb.takeover.after", "lmdb.oldest.before", "journal.ballast.take"])
@pytest.mark.parametrize("error", [NoSpace("no room, on purpose"), IOFailure("broken, on purpose")])
async def test_the_database_may_fail(name: str, error: FusefsError) -> None:
    with quick_directory() as base:
        told = Told()
        async with opened(base, failpoints=FailAt(name, error, times=3)) as store:
            await work(store, told)
        assert told.acknowledged == STEPS
        assert not told.errors
        await check(base, told, name)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_small_files_are_the_old_or_the_new(code: int) -> None:
    """`write_file_atomic`, each call failing in turn: an error, one whole content, nothing left beside it."""
    with quick_directory() as base:
        path = base / "file"
        errors = nth = 0
        while True:
            nth += 1
            path.write_bytes(b"old")
            with failing(FailingDisk(base, nth, code)) as disk:
                try:
                    write_file_atomic(path, b"new")
                except (NoSpace, IOFailure):
                    errors += 1
                else:
                    assert path.read_bytes() == b"new"
            assert path.read_bytes() in (b"old", b"new")
            assert os.listdir(base) == ["file"]
            if len(disk.calls) < nth:
                break
        assert errors >= 4


async def test_tails_that_landed_meanwhile_do_not_keep_a_commit_from_a_full_disk() -> None:
    """More tails pending than there is room for, and not a file more to be had. Their sectors landed: then they need no room."""
    with quick_directory() as base:
        point = FailAt("journal.segment.create", OSError(errno.ENOSPC, "No space left on device"), nth=3)
        async with opened(base, failpoints=point) as store:
            seal(store, 1, 0)
            store.apply(Batch(), [piece(1, 0, bytes(8 * SEGMENT))])
            assert not store.has_room(0, 0, 0, 0.0)
            with pytest.raises(NoSpace):
                await store.commit()
            seal(store, 1, 8 * SEGMENT)
            await store.commit()
            put(store, b"k", b"v")
            await store.commit()


async def test_what_is_not_safe_is_counted(tmp_path: Path) -> None:
    """`unsafe` is exactly what neither the journal nor a sector has, whatever happens to tails; or more would be accepted than fits."""
    sample = random.Random(3)
    opener = FaultyOpener()
    urls = host_dirs(tmp_path, 1)
    await make(tmp_path / "v", urls)
    async with open_volume(tmp_path / "v", passphrase=PASSPHRASE, options=QUIET, opener=opener) as volume:
        values = [new_value(volume) for _ in range(6)]
        faults = opener.faults[urls[0]]
        faults.only = shards_only
        tails, shipper = volume.values._tails, volume.values.shipper
        for step in range(300):
            value = sample.choice(values)
            match sample.randrange(9):
                case 0 | 1 | 2:
                    with suppress(Unavailable):
                        await append(volume, value, bytes(sample.randrange(60_000)))
                case 3:
                    await volume.values.commit(value)
                case 4:
                    await shipper.gather()
                case 5:
                    await volume.commit()
                case 6:
                    faults.gone = "away" if sample.random() < 0.5 else None
                case 7:
                    if sample.random() < 0.3:
                        batch = Batch()
                        volume.values.free(batch, value)
                        volume.store.apply(batch)
                        values[values.index(value)] = new_value(volume)
                case 8:
                    shipper._relogged_in = 0
                    shipper._relog()
            await trio.sleep(0.001)
            assert shipper.unsafe == sum(tail.size - tail.journaled for tail in tails.values()), step
            assert shipper.unsafe_tails == sum(tail.size > tail.journaled for tail in tails.values()), step
            assert shipper.uncommitted == {number: tail for number, tail in tails.items() if tail.size > tail.journaled}, step
            assert shipper._buffered_tails == sum(tail.buffer.length > 0 for tail in tails.values()), step
        faults.gone = None
        await volume.commit()
        assert shipper.unsafe == shipper.unsafe_tails == 0


async def test_room_that_is_not_needed_goes_back(tmp_path: Path) -> None:
    await make(tmp_path / "v")

    def taken() -> int:
        return sum(path.stat().st_size for path in (tmp_path / "v" / "journal").iterdir())

    async with volume_opened(tmp_path / "v") as volume:
        await volume.commit()
        before = taken()
        value = new_value(volume)
        for _ in range(12):
            await append(volume, value, bytes(1 << 20))
        assert taken() > 12 << 20, "what is accepted has room of its own"
        batch = Batch()
        volume.values.free(batch, value)
        volume.store.apply(batch)
        await volume.commit()
        await trio.sleep(0.5)
        await volume.commit()
        with trio.fail_after(10):
            while taken() > before + (5 << 20):
                await trio.sleep(0.05)


# ---------------------------------------------------------------------------------------------------------- a real disk


@asynccontextmanager
async def small_disk(base: Path, megabytes: int) -> AsyncIterator[Path]:
    path = base / "small"
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", path], check=False, capture_output=True)
    if done.returncode:
        pytest.skip("mounting a tmpfs takes root")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def fill(path: Path) -> Path:
    """To the last byte."""
    filler = path / "filler"
    with open(filler, "ab", buffering=0) as out:
        for size in (1 << 20, 4096, 1):
            try:
                while out.write(bytes(size)) == size:
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC
    return filler


async def test_the_database_on_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """LMDB finds no room: the journal keeps it all, nothing is lost, the ballast is used; then room comes back, and all is as ever."""
    async with small_disk(tmp_path, 8) as disk:
        (disk / "v").mkdir()
        segment = 256 * 1024
        async with opened(disk / "v", segment=segment, limit=16 * segment) as store:
            put(store, b"first", b"x")
            await store.commit()
            await take_over(store)
            assert (disk / "v" / "journal" / "ballast").stat().st_size
            assert store.has_room(0, 0, 0, 0.0)
            filler = fill(disk)
            # What the files at hand take is taken; not a byte more is accepted by who asks.
            number = 0
            while store.has_room(800, 0, 0, 0.1):
                put(store, b"n%06d" % number, b"y" * 700)
                number += 1
                if number % 20 == 0:
                    await store.commit()
                if number % 200 == 0:
                    with trio.fail_after(20):
                        await take_over(store)
                        store._takeover._retry_at = -1.0
            assert number > 100
            await store.commit()
            with pytest.raises(NoSpace):
                await store.make_room(0, 4 * segment, 1, 0.5)
            assert not (disk / "v" / "journal" / "ballast").exists()
            filler.unlink()
            store._takeover._retry_at = store._takeover._ballast_at = -1.0
            await take_over(store)
            await trio.sleep(0.6)
            assert await store.make_room(0, 4 * segment, 1, 0.5)
            assert (disk / "v" / "journal" / "ballast").exists()
        async with opened(disk / "v", segment=segment, limit=16 * segment) as store:
            assert len(store.scan(b"n", b"o", 1 << 30)) == number


async def test_what_is_accepted_finds_room_on_a_full_disk(tmp_path: Path) -> None:
    """Appends up to the first refusal, with every byte of the disk taken by others: the commit that follows has room."""
    urls = host_dirs(tmp_path, 1)
    async with small_disk(tmp_path, 24) as disk:
        await make(disk / "v", urls)
        os.rename(tmp_path / "host0", tmp_path / "away")
        async with volume_opened(disk / "v") as volume:
            values = [new_value(volume) for _ in range(3)]
            await volume.commit()
            written = [b"", b"", b""]
            refusals = 0
            for number in range(4000):
                if number == 100:
                    fill(disk)
                data = os.urandom(3000 + number)
                which = number % 3
                try:
                    await append(volume, values[which], data)
                except FusefsError:
                    refusals += 1
                    if refusals > 3:
                        break
                else:
                    written[which] += data
                if number % 37 == 0:
                    await volume.commit()
            assert refusals > 3
            assert sum(map(len, written)) > 300_000
            await volume.commit()
            with pytest.raises(FusefsError):
                volume.values.check_room()
                await append(volume, values[0], bytes(1 << 20))
            # What makes room is not refused.
            batch = Batch()
            volume.values.free(batch, values[2])
            volume.store.apply(batch)
            await volume.commit()
        (disk / "filler").unlink()
        os.rename(tmp_path / "away", tmp_path / "host0")
        async with volume_opened(disk / "v") as volume:
            for which in (0, 1):
                assert await contents(volume, values[which]) == written[which]


# ---------------------------------------------------------------------------------------------------------- a real mount


@pytest.fixture
def mounting(tmp_path: Path) -> Iterator[Mounting]:
    with mounting_in(tmp_path) as made:
        yield made


def test_a_failed_fsync_is_never_good_later(mounting: Mounting) -> None:
    """EIO under the journal: that fsync fails, and so does each one after it, though the disk is well again; reading goes on."""
    mounted = mounting.mount()
    with open(mounted.path / "safe", "wb", buffering=0) as out:
        out.write(b"safe")
        os.fsync(out.fileno())
    out = open(mounted.path / "file", "wb", buffering=0)  # noqa: SIM115
    try:
        out.write(b"one")
        mounted.fault("journal-eio")
        for _ in range(3):
            with pytest.raises(OSError, match=REFUSED):
                os.fsync(out.fileno())
            mounted.clear("journal-eio")
        with pytest.raises(OSError, match=REFUSED):
            out.write(b"two")
    finally:
        out.close()
    assert (mounted.path / "safe").read_bytes() == b"safe"
    with pytest.raises(OSError, match=REFUSED):
        (mounted.path / "another").touch()
    with mounted.control() as client:
        status = client.status().volume
    assert status.read_only
    assert "check the local disk" in status.read_only_reason
    # Staying mounted would save nothing; that something is lost is said, and shows in the status.
    ended = fusefs("umount", mounted.path, expect=None)
    assert ended.status not in (0, 6)
    assert "check the local disk" in ended.err
    assert mounted.process.wait(20) is not None
    mounted.end()
    again = mounting.mount()
    assert (again.path / "safe").read_bytes() == b"safe"
    (again.path / "another").touch()
    again.unmount()
