"""Small files made as fast as can be, in a volume whose journal holds far less than all of them: who makes them is held back, not refused,
as long as hosts take what is shipped (I7)."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyfuse3
import pytest
import trio

from fusefs.operations import Operations
from fusefs.receiver import Receiver
from storage.errors import FusefsError, NoSpace
from storage.hosts.memory import memory_content
from storage.interfaces import Batch, Buffer, TailPiece
from storage.metadata import room
from storage.namespace.namespace import Namespace
from storage.read_only import ReadOnlySource, open_read_only
from storage.values.shipping import TAIL_COST
from storage.volume import Volume
from tests.metadata_rig import copy
from tests.rig import PASSPHRASE, QUIET, host_dirs, make, opened

#: A journal of 2 MiB: some 3000 files of a line each.
OPTIONS = replace(QUIET, journal_segment=256 * 1024, journal_limit=2 * 1024 * 1024, tail_budget=2 * 1024 * 1024, cache=1024 * 1024)


def create(volume: Volume, number: int) -> int:
    return volume.namespace.create(1, b"file%d" % number, stat.S_IFREG | 0o644, 0, 0)


def line(number: int) -> bytes:
    return b"line %d\n" % number


async def fill(volume: Volume, count: int, commit_every: int | None) -> None:
    for number in range(count):
        ino = create(volume, number)
        await volume.namespace.append(ino, line(number))
        if commit_every is not None and number % commit_every == commit_every - 1:
            await volume.commit()


async def fill_up(volume: Volume, number: int) -> int:
    """Files from that number on, until no more are taken. The number of the last, to which nothing could be appended."""
    with trio.fail_after(40), pytest.raises(NoSpace):
        while True:
            await volume.namespace.append(create(volume, number), line(number))
            number += 1
            if number % 100 == 0:
                await volume.commit()
    return number


async def check(volume: Volume, numbers: range) -> None:
    for number in numbers:
        ino = volume.namespace.lookup(1, b"file%d" % number)
        assert await volume.namespace.read(ino, 0, 100) == line(number)


@pytest.mark.parametrize("commit_every", [None, 7, 500, 2000])
async def test_more_small_files_than_the_journal_holds_are_only_held_back(tmp_path: Path, commit_every: int | None) -> None:
    """Without a flush, and with or without commits of its own: none is refused, and none is missing."""
    count = 12_000
    await make(tmp_path / "v", host_dirs(tmp_path, 1))
    async with opened(tmp_path / "v", options=OPTIONS) as volume:
        with trio.fail_after(60):
            await fill(volume, count, commit_every)
        # I7: objects of tails count, not their bytes alone.
        assert len(volume.values._tails) < 5000
        await volume.commit()
    async with opened(tmp_path / "v", options=OPTIONS) as volume:
        await check(volume, range(count))


async def test_several_writers_at_once_are_held_back_alike(tmp_path: Path) -> None:
    await make(tmp_path / "v", host_dirs(tmp_path, 1))
    done: list[int] = []
    async with opened(tmp_path / "v", options=replace(OPTIONS, commit_interval=0.2)) as volume:

        async def writer(first: int) -> None:
            for number in range(first, 10_000, 5):
                await volume.namespace.append(create(volume, number), line(number))
                if number % 100 == first:
                    await trio.lowlevel.checkpoint()
            done.append(first)

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for first in range(5):
                    nursery.start_soon(writer, first)
        assert sorted(done) == [0, 1, 2, 3, 4]
        await check(volume, range(10_000))
        await volume.flush()
        await check(volume, range(10_000))


@pytest.mark.parametrize("budget", [2, 16])
async def test_where_hosts_take_nothing_it_is_refused_in_time_and_all_that_was_accepted_gets_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    """Also in one go: what was filled, memory or the journal, has room for saying where all of it went."""
    options = replace(OPTIONS, tail_budget=budget * 1024 * 1024)
    monkeypatch.setattr(room, "ROOM_WAIT", 3.0)
    await make(tmp_path / "v", ["mem:refusing"])
    content = memory_content("refusing")
    number = 0
    async with opened(tmp_path / "v", options=options) as volume:
        content.capacity = content.used()
        refusals = 0
        with trio.fail_after(30):
            while refusals < 10:
                # Refused, perhaps, but not lost: an append that failed is tried again.
                ino = volume.namespace.find(1, b"file%d" % number)
                try:
                    await volume.namespace.append(create(volume, number) if ino is None else ino, line(number))
                except NoSpace:
                    refusals += 1
                else:
                    number += 1
                    if number % 100 == 0:
                        await volume.commit()
        assert number > 1000
        await volume.commit()
        await check(volume, range(number))
    async with opened(tmp_path / "v", options=options) as volume:
        await check(volume, range(number))
        content.capacity = None
        with trio.fail_after(30):
            await volume.flush()
        assert volume.values.pending_bytes == 0
        # And on.
        for more in range(number + 1, number + 6000):
            await volume.namespace.append(create(volume, more), line(more))
        await volume.commit()
        await check(volume, range(number))
        await check(volume, range(number + 1, number + 6000))


async def test_names_made_without_ever_waiting_are_refused_before_they_could_not_be_committed(tmp_path: Path) -> None:
    """`create` cannot wait; what it took until then finds room."""
    await make(tmp_path / "v", host_dirs(tmp_path, 1))
    made = 0
    async with opened(tmp_path / "v", options=OPTIONS) as volume:
        with pytest.raises(NoSpace):
            while made < 20_000:
                create(volume, made)
                made += 1
        assert made > 1000
        with trio.fail_after(20):
            await volume.commit()
        create(volume, made)
        made += 1
        await volume.commit()
    async with opened(tmp_path / "v", options=OPTIONS) as volume:
        for number in range(made):
            volume.namespace.lookup(1, b"file%d" % number)


async def test_what_lands_while_the_journal_is_full_is_committed_in_parts(tmp_path: Path) -> None:
    """A sector of very many small files: its extents are more than the journal keeps back for one commit."""
    await make(tmp_path / "v", host_dirs(tmp_path, 1), sector_size=1024 * 1024)
    options = replace(OPTIONS, journal_segment=64 * 1024, journal_limit=1024 * 1024, tail_budget=64 * 1024 * 1024)
    async with opened(tmp_path / "v", options=options) as volume:
        with trio.fail_after(90):
            await fill(volume, 4000, 300)
            try:
                await volume.flush()
            except FusefsError as error:
                raise AssertionError(f"refused: {error}") from error
        await check(volume, range(4000))


async def test_a_journal_full_of_tails_is_emptied_once_hosts_have_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then what lands is all that makes room for the commit, which landing so may not wait for."""
    monkeypatch.setattr(room, "ROOM_WAIT", 1.0)
    monkeypatch.setattr("storage.values.admission.ROOM_WAIT", 1.0)
    options = replace(OPTIONS, tail_budget=16 * 1024 * 1024)
    await make(tmp_path / "v", ["mem:wedge"], sector_size=1 << 20)
    content = memory_content("wedge")
    async with opened(tmp_path / "v", options=options) as volume:
        namespace = volume.namespace
        files = []
        for number in range(12_000):
            await namespace.hold_back()
            files.append(create(volume, number))
            if number % 500 == 0:
                await volume.commit()
        large = [namespace.create(1, b"large%d" % number, stat.S_IFREG | 0o644, 0, 0) for number in range(40)]
        await volume.flush()
        for _ in range(3):
            await volume.store._room.clear_out()
        content.capacity = content.used()
        accepted = 0
        with pytest.raises((NoSpace, trio.TooSlowError)):
            while True:
                with trio.fail_after(5):
                    await namespace.append(large[accepted % 40], b"x" * 32768)
                accepted += 1
        # What nobody is held back from.
        for ino in files:
            namespace.set_attributes(ino, mode=0o600)
        with pytest.raises(NoSpace):
            await volume.commit()
        content.capacity = None
        with trio.fail_after(30):
            await volume.flush()
        assert volume.values.accepting()
    async with opened(tmp_path / "v", options=options) as volume:
        for number in range(0, 12_000, 100):
            assert volume.namespace.attributes(volume.namespace.lookup(1, b"file%d" % number)).mode == stat.S_IFREG | 0o600
        assert (
            sum(volume.namespace.attributes(volume.namespace.lookup(1, b"large%d" % number)).size for number in range(40))
            == accepted * 32768
        )


class Held:
    """Sectors are not written until `go`; how many were about to be."""

    def __init__(self, volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = trio.Event()
        self.waiting = 0
        write = volume.sectors.write_sector

        async def held(sector_id: int, parts: Sequence[Buffer], replication: str) -> None:
            self.waiting += 1
            await self.go.wait()
            await write(sector_id, parts, replication)

        monkeypatch.setattr(volume.sectors, "write_sector", held)


async def test_a_commit_does_not_wait_for_the_sector_that_a_few_bytes_are_in_flight_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a million small files, commits took up to 25 seconds: each waited for tens of thousands of others to land. What is large is not
    written twice: its commit waits."""
    await make(tmp_path / "v", host_dirs(tmp_path, 1))
    async with opened(tmp_path / "v", options=OPTIONS) as volume:
        held = Held(volume, monkeypatch)
        small, large = create(volume, 0), create(volume, 1)
        await volume.namespace.append(small, line(0))
        await volume.commit()
        await volume.namespace.append(small, b"and more\n")
        await volume.values.shipper.gather()
        await volume.namespace.append(small, b"and more\n")
        with trio.fail_after(5):
            await volume.namespace.commit(small)
            await volume.namespace.append(small, b"and more\n")
            await volume.commit()
        copy(tmp_path / "v", tmp_path / "killed")
        await volume.namespace.append(large, bytes(100_000))
        await volume.values.shipper.gather()
        for commit in (volume.commit, lambda: volume.namespace.commit(large)):
            with trio.move_on_after(0.2) as scope:
                await commit()
            assert scope.cancelled_caught
        held.go.set()
        await volume.flush()
        content = line(0) + 3 * b"and more\n"
        assert await volume.namespace.read(small, 0, 100) == content
    async with opened(tmp_path / "v", options=OPTIONS) as volume:
        assert await volume.namespace.read(small, 0, 100) == content
    # After it, others went on; but that is what would have been found.
    source = ReadOnlySource(tmp_path / "killed", passphrase=PASSPHRASE)
    async with open_read_only(source, scratch=tmp_path / "scratch", options=OPTIONS) as found:
        assert await found.namespace.read(small, 0, 100) == content


async def test_a_commit_passes_over_what_is_in_the_journal_already(tmp_path: Path) -> None:
    """Looked at one by one, with all others given their turn in between, tens of thousands of tails took very long."""
    await make(tmp_path / "v", host_dirs(tmp_path, 1))
    async with opened(tmp_path / "v", options=replace(OPTIONS, tail_budget=16 * 1024 * 1024, journal_limit=16 * 1024 * 1024)) as volume:
        await fill(volume, 4000, 500)
        await volume.namespace.append(create(volume, 4000), line(4000))
        assert len(volume.values._tails) == 4001
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(others)
            handed = 0
            apply = volume.store.apply

            def counted(batch: Batch, tails: Sequence[TailPiece] = ()) -> None:
                nonlocal handed
                handed += len(tails)
                apply(batch, tails)

            volume.store.apply = counted  # type: ignore[method-assign]
            commit_store = volume.values.admission.commit
            volume.values.admission.commit = trio.lowlevel.checkpoint  # type: ignore[method-assign]
            await volume.values.commit_all()
            volume.values.admission.commit = commit_store  # type: ignore[method-assign]
            # The last one alone.
            assert handed == 1
            assert turns < 10
            nursery.cancel_scope.cancel()


async def test_what_comes_while_others_are_in_flight_is_not_gathered_for_their_sake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or every few files would make a sector of their own, to be merged with others afterwards."""
    options = replace(OPTIONS, tail_budget=4 * 1024 * 1024, journal_limit=16 * 1024 * 1024)
    await make(tmp_path / "v", host_dirs(tmp_path, 1))
    async with opened(tmp_path / "v", options=options) as volume:
        held = Held(volume, monkeypatch)
        # Half of what memory takes: these are gathered.
        first = options.tail_budget // 2 // TAIL_COST + 50
        await fill(volume, first, 500)
        await trio.sleep(1)
        await volume.values.shipper.gather()
        await trio.sleep(1)
        waiting = held.waiting
        assert waiting
        assert volume.values.shipper._buffered_tails == 0
        with trio.fail_after(30):
            for number in range(first, first + 300):
                await volume.namespace.append(create(volume, number), line(number))
                await trio.sleep(0.005)
        assert volume.values.shipper._buffered_tails == 300
        assert held.waiting == waiting
        held.go.set()
        await volume.flush()
        await check(volume, range(first + 300))


async def test_who_changes_what_is_there_waits_for_commits_too(tmp_path: Path) -> None:
    """I7: in memory is what is not committed, and what LMDB has not taken over."""
    await make(tmp_path / "v", host_dirs(tmp_path, 1))
    async with opened(tmp_path / "v", options=OPTIONS) as volume:
        await fill(volume, 6000, 500)
        store = volume.store
        most = 0
        with trio.fail_after(30):
            for number in range(6000):
                await volume.namespace.keep_pace()
                volume.namespace.unlink(1, b"file%d" % number)
                most = max(most, store._memtable.pending_bytes)
        assert store._commit_ops <= most < 1.5 * store._commit_ops


@pytest.mark.parametrize("committing", [False, True])
async def test_whatever_is_changed_while_the_journal_is_full_all_is_well_once_hosts_have_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, committing: bool
) -> None:
    """Changes are taken as long as a commit could take them, and refused then."""
    monkeypatch.setattr(room, "ROOM_WAIT", 1.0)
    monkeypatch.setattr("storage.values.admission.ROOM_WAIT", 1.0)
    await make(tmp_path / "v", ["mem:ch"])
    content = memory_content("ch")
    async with opened(tmp_path / "v", options=replace(OPTIONS, tail_budget=16 * 1024 * 1024)) as volume:
        store = volume.store
        await fill(volume, 6000, 500)
        await volume.flush()
        content.capacity = content.used()
        number = await fill_up(volume, 6000)
        with trio.fail_after(100):
            for at in range(10 * number):
                try:
                    await volume.namespace.keep_pace()
                    if committing and at % 2000 == 0:
                        await volume.commit()
                except NoSpace:
                    continue
                ino = volume.namespace.lookup(1, b"file%d" % (at % number))
                volume.namespace.set_attributes(ino, mode=0o600 + at // number % 2)
                assert store._memtable.pending_bytes < 4 * store._commit_ops
        content.capacity = None
        with trio.fail_after(60):
            await volume.flush()
            await volume.namespace.keep_pace()
            await volume.commit()
        for at in range(0, number, 500):
            await check(volume, range(at, at + 1))


async def test_what_was_removed_is_committed_whatever_else_was_changed_while_hosts_take_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only removing helps then; and without that commit the journal would stay full of what is gone."""
    monkeypatch.setattr(room, "ROOM_WAIT", 1.0)
    monkeypatch.setattr("storage.values.admission.ROOM_WAIT", 1.0)
    await make(tmp_path / "v", ["mem:rc"])
    content = memory_content("rc")
    async with opened(tmp_path / "v", options=replace(OPTIONS, tail_budget=16 * 1024 * 1024)) as volume:
        await fill(volume, 6000, 500)
        await volume.flush()
        content.capacity = content.used()
        number = await fill_up(volume, 6000)
        gone = 6000
        with trio.fail_after(100):
            for _ in range(6):
                await volume.files.delete(f"file{gone}")
                gone += 1
                for at in range(3000):
                    with suppress(NoSpace):
                        await volume.namespace.keep_pace()
                        volume.namespace.set_attributes(volume.namespace.lookup(1, b"file%d" % at), mode=0o600 + gone % 2)
                with suppress(NoSpace):
                    await volume.commit()
            while gone <= number:
                await volume.files.delete(f"file{gone}")
                gone += 1
            await volume.commit()
            await volume.namespace.keep_pace()
        for at in range(0, 6000, 500):
            await check(volume, range(at, at + 1))
        content.capacity = None


async def test_removing_is_never_refused_for_hosts_that_take_nothing_nor_is_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "ROOM_WAIT", 2.0)
    monkeypatch.setattr("storage.values.admission.ROOM_WAIT", 2.0)
    await make(tmp_path / "v", ["mem:rm"])
    content = memory_content("rm")
    async with opened(tmp_path / "v", options=replace(OPTIONS, tail_budget=16 * 1024 * 1024)) as volume:
        content.capacity = content.used()
        number = await fill_up(volume, 0)
        assert number > 1000
        store = volume.store
        with trio.fail_after(40):
            # The last one was made, and nothing could be appended to it.
            for at in range(number + 1):
                if at % 50:
                    # What is left keeps all of the journal from being used again.
                    await volume.files.delete(f"file{at}")
                assert store._memtable.pending_bytes < 1.5 * store._commit_ops
            await volume.commit()
        content.capacity = None
        await volume.flush()
        for at in range(0, number, 50):
            await check(volume, range(at, at + 1))


@pytest.mark.parametrize("helps", ["hosts", "removing"])
async def test_commits_that_hardly_empty_a_full_journal_leave_room_for_the_one_that_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, helps: str
) -> None:
    """Each has one removal and very many other changes, and may stand beyond the limit; the oldest tails stay. Once they had used up all
    that is beyond it, nothing could be committed any more: not what landed, nor that everything was removed."""
    monkeypatch.setattr(room, "ROOM_WAIT", 0.2)
    monkeypatch.setattr("storage.values.admission.ROOM_WAIT", 0.2)
    options = replace(OPTIONS, journal_segment=64 * 1024, journal_limit=512 * 1024)
    await make(tmp_path / "v", [f"mem:hardly-{helps}"])
    content = memory_content(f"hardly-{helps}")
    async with opened(tmp_path / "v", options=options) as volume:
        namespace, journal = volume.namespace, volume.store._journal
        await fill(volume, 600, 200)
        await volume.flush()
        await volume.store._room.clear_out()
        content.capacity = content.used()
        first = 600
        number = await fill_up(volume, first)
        refused = 0
        while refused < 3:
            await volume.files.delete(f"file{number}")
            number -= 1
            for at in range(600):
                with suppress(NoSpace):
                    await namespace.keep_pace()
                    namespace.set_attributes(namespace.lookup(1, b"file%d" % at), mode=0o600 + number % 2)
            try:
                await volume.commit()
            except NoSpace:
                refused += 1
            assert number > first
        # I7
        assert journal.limit_bytes < sum(segment.size for segment in journal.live) <= 2 * journal.limit_bytes
        if helps == "hosts":
            content.capacity = None
            await volume.flush()
        else:
            while number >= first:
                await volume.files.delete(f"file{number}")
                number -= 1
        with trio.fail_after(10):
            await volume.commit()
            while sum(segment.size for segment in journal.live) > journal.limit_bytes:
                await volume.store._room.clear_out()
        content.capacity = None
    async with opened(tmp_path / "v", options=options) as volume:
        await check(volume, range(number))


class NamesWatched:
    """Of a namespace: which way of waiting was used; nothing else may be done before."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def hold_back(self) -> None:
        self.asked.append("hold_back")
        raise pyfuse3.FUSEError(errno.EUCLEAN)

    async def keep_pace(self, removing: bool = False) -> None:
        self.asked.append("keep_pace, removing" if removing else "keep_pace")
        raise pyfuse3.FUSEError(errno.EUCLEAN)


@pytest.mark.parametrize(
    ("handler", "arguments", "way"),
    [
        ("create", (1, b"a", 0o644, 0), "hold_back"),
        ("mknod", (1, b"a", 0o644, 0), "hold_back"),
        ("mkdir", (1, b"a", 0o755), "hold_back"),
        ("symlink", (1, b"a", b"b"), "hold_back"),
        ("link", (2, 1, b"a"), "hold_back"),
        ("unlink", (1, b"a"), "keep_pace, removing"),
        ("rmdir", (1, b"a"), "keep_pace, removing"),
        ("rename", (1, b"a", 1, b"b", 0), "keep_pace"),
        ("open", (2, os.O_WRONLY | os.O_TRUNC), "keep_pace, removing"),
        ("setattr", (2, SimpleNamespace(st_size=0), SimpleNamespace(update_size=True), None), "keep_pace, removing"),
        ("setattr", (2, SimpleNamespace(st_size=1), SimpleNamespace(update_size=True), None), "keep_pace"),
        ("setattr", (2, SimpleNamespace(st_size=0), SimpleNamespace(update_size=False), None), "keep_pace"),
        ("setxattr", (2, b"user.a", b"b"), "keep_pace"),
        ("removexattr", (2, b"user.a"), "keep_pace"),
    ],
)
async def test_on_a_mount_all_that_is_recorded_waits_before_anything_is_done(handler: str, arguments: tuple[object, ...], way: str) -> None:
    operations = object.__new__(Operations)
    names = NamesWatched()
    operations.namespace = names  # type: ignore[assignment]
    operations.receiver = Receiver()
    operations.options = SimpleNamespace(link_denied=False, xattr=True)  # type: ignore[assignment]
    operations.kernel = SimpleNamespace(own_request=lambda _pid: None)  # type: ignore[assignment]
    with pytest.raises(pyfuse3.FUSEError) as raised:
        await getattr(operations, handler)(*arguments, SimpleNamespace(uid=0, gid=0, pid=0))
    assert raised.value.errno == errno.EUCLEAN
    assert names.asked == [way]


async def test_who_opens_what_is_there_waits_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stored can be read whatever else waits for a commit."""
    await make(tmp_path / "v", host_dirs(tmp_path, 1))
    async with opened(tmp_path / "v", options=OPTIONS) as volume:
        await fill(volume, 1, None)

        async def full(_names: Namespace) -> None:
            raise NoSpace("on purpose")

        monkeypatch.setattr(Namespace, "hold_back", full)
        await volume.files.close(await volume.files.open("file0"))
        with pytest.raises(NoSpace):
            await volume.files.open("new", write=True)
