"""The store's promises: what is acknowledged stays, what is refused says so, one flush serves all who wait, room comes back."""

from __future__ import annotations

import errno
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lmdb
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import BadArgument, Corrupt, Fenced, FusefsError, NoSpace
from storage.interfaces import Batch, MetadataStore
from storage.metadata import flushing, keys, room
from storage.metadata import journal as journal_module
from storage.metadata import store as store_module
from storage.metadata.keys import INODE, VALUE, numbered, u64
from storage.metadata.lmdb_base import LmdbBase
from storage.metadata.memtable import Memtable
from storage.metadata.opening import open_store
from storage.metadata.store import Store
from storage.metadata.together import by_number
from storage.seams import InlineWorker, Seams
from tests.fakes import Crash
from tests.metadata_rig import (
    LIMIT,
    SEGMENT,
    CopyAt,
    FailAt,
    assemble,
    content,
    copy,
    opened,
    piece,
    put,
    quick_directory,
    seal,
    segments,
    tail_of,
    take_over,
)


class Flushes:
    """Counts the journal's fdatasyncs; each may be made slow or fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, action: Callable[[], None] | None = None) -> None:
        self.count = 0
        self.action = action

        def flush(fd: int) -> None:
            self.count += 1
            if self.action is not None:
                self.action()
            os.fdatasync(fd)

        monkeypatch.setattr(journal_module, "fdatasync", flush)


def as_metadata_store(store: Store) -> MetadataStore:
    """For the type checker: a Store is one."""
    return store


# ------------------------------------------------------------------------------------------------------------- commits


def test_no_two_kinds_of_records_have_one_prefix() -> None:
    """Breaks if two people hand out the same letter at the same time, as has happened."""
    prefixes = {name: value for name, value in vars(keys).items() if name.isupper() and isinstance(value, bytes)}
    assert len(set(prefixes.values())) == len(prefixes) > 20, prefixes
    table = re.findall(r"^\| `(.)` \|", keys.__doc__ or "", re.MULTILINE)
    assert sorted(table) == sorted(value.decode() for value in prefixes.values())


async def test_a_change_is_seen_at_once_and_durable_after_commit(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    async with opened(tmp_path / "a") as store:
        put(store, b"k", b"1")
        assert store.get(b"k") == b"1"
        lost = copy(tmp_path / "a", tmp_path / "lost")
        await store.commit()
        kept = copy(tmp_path / "a", tmp_path / "kept")
    async with opened(lost) as store:
        assert store.get(b"k") is None
    async with opened(kept) as store:
        assert store.get(b"k") == b"1"


async def test_sequence_numbers_say_which_commit_is_which(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        assert (store.applied_sequence, store.durable_sequence) == (0, 0)
        put(store, b"k", b"1")
        assert (store.applied_sequence, store.durable_sequence) == (1, 0)
        assert await store.commit() == 1
        assert (store.applied_sequence, store.durable_sequence) == (1, 1)
    async with opened(tmp_path) as store:
        assert (store.applied_sequence, store.durable_sequence) == (1, 1)


async def test_nothing_pending_commits_without_a_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushes = Flushes(monkeypatch)
    async with opened(tmp_path) as store:
        put(store, b"k", b"1")
        await store.commit()
        before = flushes.count
        for _ in range(5):
            assert await store.commit() == 1
        assert flushes.count == before


async def test_commits_that_arrive_together_share_one_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, go = trio.Event(), trio.Event()
    token = trio.lowlevel.current_trio_token()

    def slow() -> None:
        trio.from_thread.run_sync(entered.set, trio_token=token)
        trio.from_thread.run(go.wait, trio_token=token)

    async with opened(tmp_path) as store:
        put(store, b"first", b"1")
        await store.commit()
        flushes = Flushes(monkeypatch, slow)
        sequences = []

        async def work(number: int) -> None:
            put(store, b"k%d" % number, b"v")
            sequences.append(await store.commit())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(work, 0)
            await entered.wait()
            for number in range(1, 9):
                nursery.start_soon(work, number)
            await trio.testing.wait_all_tasks_blocked()
            flushes.action = None
            go.set()
        assert flushes.count == 2
        assert sorted(sequences) == [2] + [3] * 8


async def test_a_commit_waits_a_moment_for_those_who_are_about_to_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(tmp_path) as store:
        put(store, b"first", b"1")
        await store.commit()
        flushes = Flushes(monkeypatch)
        coming = 4
        sequences = []

        async def work(number: int) -> None:
            nonlocal coming
            coming -= 1
            put(store, b"k%d" % number, b"v")
            sequences.append(await store.commit())

        store.more_coming = lambda: coming > 0
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(work, number)
                await trio.lowlevel.checkpoint()
        assert flushes.count == 1
        assert sequences == [2] * 4


async def test_a_commit_does_not_wait_for_ever_for_others(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        store.more_coming = lambda: True
        put(store, b"k", b"1")
        with trio.fail_after(20):
            await store.commit()


async def test_on_a_quick_disk_small_commits_are_written_without_a_thread_until_one_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    monkeypatch.setattr(journal_module, "fdatasync", lambda _: threads.append(threading.get_ident()))
    own = threading.get_ident()
    async with opened(tmp_path, segment=1 << 20, limit=64 << 20) as store:

        async def commits(count: int) -> list[bool]:
            threads.clear()
            for number in range(count):
                put(store, b"k", b"%d" % number)
                await store.commit()
            return [thread == own for thread in threads]

        monkeypatch.setattr(flushing, "SLOW", 10.0)
        # Of a disk of which nothing bad is known yet few are asked.
        assert not any(await commits(flushing.FIRST))
        assert all(await commits(5))
        put(store, b"large", b"v", piece(1, 0, bytes(flushing.SMALL + 1)))
        threads.clear()
        await store.commit()
        assert own not in threads
        monkeypatch.setattr(flushing, "SLOW", 0.0)
        assert await commits(3) == [True, False, False]
        monkeypatch.setattr(flushing, "SLOW", 10.0)
        assert not any(await commits(flushing.PROOF))
        assert all(await commits(5))


def test_the_event_loop_waits_for_the_thread_while_flushes_are_not_all_slow() -> None:
    flushes = flushing.Flushes()
    assert 0 < flushes.patience < flushing.SLOW
    for _ in range(flushing.HOPELESS - 1):
        flushes.took(2 * flushing.SLOW)
    assert flushes.patience > 0
    flushes.took(2 * flushing.SLOW)
    assert flushes.patience == 0.0
    flushes.took(flushing.SLOW / 2)
    assert flushes.patience > 0
    assert not flushes.quick


async def test_a_cancelled_caller_breaks_nobody_elses_commit(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    async with opened(tmp_path / "a") as store:
        put(store, b"k", b"1")
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store.commit)
                await trio.lowlevel.checkpoint()
                scope.cancel()
        put(store, b"l", b"2")
        await store.commit()
        crashed = copy(tmp_path / "a", tmp_path / "crashed")
    async with opened(crashed) as store:
        assert (store.get(b"k"), store.get(b"l")) == (b"1", b"2")


async def test_commit_hooks_run_before_the_commit_and_are_in_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    async with opened(tmp_path / "a") as store:
        dirty = {b"h": b"1"}

        def hook() -> None:
            for key in list(dirty):
                put(store, key, dirty.pop(key))

        store.add_commit_hook(hook)
        assert await store.commit() == 1  # nothing but what the hook had
        dirty[b"i"] = b"2"
        put(store, b"k", b"3")
        assert await store.commit() == 2
        crashed = copy(tmp_path / "a", tmp_path / "crashed")
        dirty[b"j"] = b"4"
    async with opened(crashed) as store:
        assert content(store) == {b"h": b"1", b"i": b"2", b"k": b"3"}
    async with opened(tmp_path / "a") as store:
        assert store.get(b"j") == b"4", "closing commits what hooks have"


async def test_closing_commits_and_lmdb_holds_all_of_it(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        for number in range(50):
            put(store, b"k%d" % number, b"v", piece(1, number, b"x"))
    base = LmdbBase(tmp_path / "metadata", 1 << 30)
    assert len(base.scan(b"k", b"l", 100)) == 50
    assert base.sequence == 1
    base.close()
    assert len([path for path in segments(tmp_path) if path.read_bytes().strip(b"\0")]) == 1, "all but the newest are recycled"


async def test_a_crash_while_it_is_closed_comes_out_and_nothing_waits_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last commit may be written by whoever closes the store: the tasks, which are shielded, have to be ended by it all the same."""
    with pytest.raises(Crash):
        async with opened(tmp_path) as store:
            put(store, b"k", b"1")

            async def crash(urgent: bool = False) -> int:
                raise Crash("while closing")

            monkeypatch.setattr(Store, "commit", lambda _self, urgent=False: crash(urgent))


async def test_what_the_block_raises_comes_out_as_itself(tmp_path: Path) -> None:
    async def fail() -> None:
        async with opened(tmp_path) as store:
            put(store, b"k", b"1")
            raise KeyError("mine")

    with pytest.raises(KeyError):
        await fail()
    async with opened(tmp_path) as store:
        assert store.get(b"k") == b"1"


async def test_a_commit_before_the_epoch_is_refused(tmp_path: Path) -> None:
    async with open_store(tmp_path, Seams(), journal_key=lambda salt: salt * 2, tail_needed=lambda *_: True) as store:
        put(store, b"k", b"1")
        with pytest.raises(BadArgument, match="epoch"):
            await store.commit()


async def test_a_store_runs_on_an_inline_worker(tmp_path: Path) -> None:
    async with opened(tmp_path, seams=Seams(worker=InlineWorker)) as store:
        for number in range(100):
            put(store, b"k%d" % number, b"v" * 100, piece(1, number * 10, b"t" * 10))
            await store.commit()
        await take_over(store)
    async with opened(tmp_path, seams=Seams(worker=InlineWorker)) as store:
        assert len(content(store)) == 100


# ------------------------------------------------------------------------------------------------------------- a model

KEYS = st.sampled_from([b"a", b"b", b"ba", b"c", b"d\0", b"d"])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("batch"), st.lists(st.tuples(KEYS, st.none() | st.binary(max_size=400)), max_size=4)),
        st.tuples(st.just("tail"), st.tuples(st.integers(1, 3), st.integers(1, 3000))),
        st.tuples(st.just("seal"), st.integers(1, 3)),
        st.tuples(st.just("relog"), st.integers(1, 3)),
        st.tuples(st.sampled_from(["commit", "commit", "takeover", "reopen", "crash"]), st.none()),
    ),
    min_size=1,
    max_size=30,
)


class Model:
    """What must be there: now, and after a crash."""

    def __init__(self) -> None:
        self.now: dict[bytes, bytes] = {}
        self.bytes: dict[int, bytes] = {1: b"", 2: b"", 3: b""}
        self.committed()

    def committed(self) -> None:
        self.durable, self.durable_bytes = dict(self.now), dict(self.bytes)

    def crashed(self) -> None:
        self.now, self.bytes = dict(self.durable), dict(self.durable_bytes)

    def sealed(self, value_id: int) -> int:
        return int.from_bytes(self.now.get(VALUE + u64(value_id), bytes(8)), "big")


async def play(root: Path, plan: list[tuple[str, Any]]) -> None:
    directory, model, copies = root / "v", Model(), 0
    directory.mkdir()
    position = 0
    while position < len(plan):
        async with opened(directory) as store:
            for value_id in model.bytes:
                if VALUE + u64(value_id) not in model.now:
                    seal(store, value_id, 0)
                    model.now[VALUE + u64(value_id)] = u64(0)
            pieces = dict(store.recovered_tails())
            for value_id, data in model.bytes.items():
                assert assemble(store, pieces.get(value_id, []), value_id) == data[model.sealed(value_id) :]
            assert content(store) == model.now
            while position < len(plan):
                step, argument = plan[position]
                position += 1
                if step in ("reopen", "crash"):
                    if step == "crash":
                        copies += 1
                        directory = copy(directory, root / str(copies))
                        model.crashed()
                    else:
                        model.committed()
                    break
                await act(store, model, step, argument)
            assert content(store) == model.now or step == "crash"
            assert store.scan(b"a", b"e", 3) == sorted((k, v) for k, v in content(store).items() if b"a" <= k < b"e")[:3]
            last = step
        if last not in ("reopen", "crash"):
            model.committed()
    async with opened(directory) as store:
        expected = {k: v for k, v in model.now.items() if k[:1] != VALUE or k in content(store)}
        assert content(store) == expected


async def act(store: Store, model: Model, step: str, argument: Any) -> None:
    if step == "batch":
        store.apply(Batch(list(argument)))
        for key, value in argument:
            model.now.pop(key, None)
            if value is not None:
                model.now[key] = value
    elif step == "tail":
        value_id, length = argument
        data = os.urandom(length)
        offset = len(model.bytes[value_id])
        store.apply(Batch(), [piece(value_id, offset, data[: length // 2], data[length // 2 :])])
        model.bytes[value_id] += data
    elif step == "seal":
        value_id = int(argument)
        seal(store, value_id, len(model.bytes[value_id]))
        model.now[VALUE + u64(value_id)] = u64(len(model.bytes[value_id]))
    elif step == "relog":
        value_id = int(argument)
        sealed = model.sealed(value_id)
        store.apply(Batch(), [piece(value_id, sealed, model.bytes[value_id][sealed:])])
    elif step == "commit":
        await store.commit()
        model.committed()
    elif step == "takeover":
        await take_over(store)


@settings(max_examples=120, deadline=None)
@given(STEPS)
def test_it_equals_a_dict_and_a_byte_string_over_closes_crashes_and_takeovers(plan: list[tuple[str, Any]]) -> None:
    with quick_directory() as root:
        trio.run(play, root, plan)


# ------------------------------------------------------------------------------------------------------------- crashes

FAILPOINTS = [
    "journal.append.before_write",
    "journal.append.before_fsync",
    "journal.append.after_fsync",
    "lmdb.takeover.before",
    "lmdb.takeover.after",
    "journal.segment.create",
    "journal.segment.recycle",
]


@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("name", FAILPOINTS)
async def test_a_crash_at_any_point_keeps_all_that_was_acknowledged_and_a_prefix_of_the_rest(name: str, nth: int) -> None:
    with quick_directory() as root:
        (root / "v").mkdir()
        point = CopyAt(name, nth, root / "v", root / "crashed")
        # Inline: nothing else goes on while the directory is copied.
        async with opened(root / "v", seams=Seams(worker=InlineWorker), failpoints=point) as store:
            seal(store, 1, 0)
            for number in range(60):
                put(store, b"n", b"%d" % number)
                put(store, b"k%02d" % number, b"v" * 100, piece(1, number * 100, b"%02d" % number * 50))
                point.applied = number + 1
                await store.commit()
                point.acknowledged = number + 1
                if number % 10 == 9:
                    if number in (39, 49):
                        seal(store, 1, number * 100 - 1900)
                    await take_over(store)
        assert point.at_copy is not None, f"{name} was never reached"
        acknowledged, applied = point.at_copy
        async with opened(root / "crashed") as store:
            there = int(store.get(b"n") or b"-1") + 1
            assert acknowledged <= there <= applied
            assert [key for key, _ in store.scan(b"k", b"l", 100)] == [b"k%02d" % number for number in range(there)]
            sealed = int.from_bytes(store.get(VALUE + u64(1)) or bytes(8), "big")
            assert tail_of(store, 1) == b"".join(b"%02d" % number * 50 for number in range(there))[sealed:]
            put(store, b"after", b"1")
            await store.commit()


async def test_a_store_that_crashes_again_and_again_at_open_is_still_all_there(tmp_path: Path) -> None:
    directory = tmp_path / "0"
    directory.mkdir()
    for number in range(12):
        async with opened(directory) as store:
            assert len(store.scan(b"k", b"l", 100)) == number
            if number == 0:
                seal(store, 1, 0)
            assert tail_of(store, 1) == b"".join(b"<%d>" % n for n in range(number))
            put(store, b"k%02d" % number, b"v", piece(1, sum(len(b"<%d>" % n) for n in range(number)), b"<%d>" % number))
            await store.commit()
            directory = copy(directory, tmp_path / str(number + 1))
            put(store, b"lost", b"v")


# ------------------------------------------------------------------------------------------------------------- room


async def test_segments_are_recycled_once_lmdb_has_them(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        for number in range(400):
            put(store, b"k%d" % (number % 7), b"v" * 300)
            await store.commit()
            if number % 50 == 49:
                await take_over(store)
                assert store.journal_fill < 0.1
        total = sum(path.stat().st_size for path in (tmp_path / "journal").iterdir())
        assert total < LIMIT


async def test_a_segment_stays_as_long_as_a_tail_in_it_is_needed(tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    async with opened(tmp_path / "v") as store:
        seal(store, 1, 0)
        put(store, b"k", b"v", piece(1, 0, b"precious"))
        await store.commit()
        first = segments(tmp_path / "v")[0]
        for number in range(60):
            put(store, b"k%d" % number, b"v" * 300)
            await store.commit()
        await take_over(store)
        assert first.exists()
        assert store.pinned_tails() == [(1, 8)]
        async with opened(copy(tmp_path / "v", tmp_path / "crashed")) as other:
            assert tail_of(other, 1) == b"precious"
        seal(store, 1, 8)
        assert store.pinned_tails() == []
        await store.commit()
        await take_over(store)
        assert not first.exists()
        assert len(segments(tmp_path / "v")) <= 2


async def test_an_oldest_segment_that_vanished_is_noticed(tmp_path: Path) -> None:
    """LMDB has its commits, but not the tail in it. Breaks if nothing but the commits' numbers says where the journal must begin."""
    for recycled in (False, True):
        directory = tmp_path / f"v{recycled}"
        directory.mkdir()
        async with opened(directory) as store:
            for number in range(60 * recycled):
                put(store, b"k%d" % number, b"v" * 300)
                await store.commit()
            await take_over(store)
            seal(store, 1, 0)
            put(store, b"k", b"v", piece(1, 0, b"precious"))
            await store.commit()
            for number in range(60):
                put(store, b"k%d" % number, b"v" * 300)
                await store.commit()
            await take_over(store)
            left = copy(directory, tmp_path / f"crashed{recycled}")
        async with opened(copy(left, tmp_path / f"whole{recycled}")) as other:
            assert tail_of(other, 1) == b"precious"
        segments(left)[0].unlink()
        with pytest.raises(Corrupt, match="is missing"):
            async with opened(left):
                pass


@pytest.mark.parametrize("at", ["lmdb.oldest.before", "lmdb.oldest.after", "journal.segment.recycle", "journal.segment.before_dirsync"])
async def test_a_crash_while_segments_are_recycled_leaves_no_gap(tmp_path: Path, at: str) -> None:
    (tmp_path / "v").mkdir()
    for nth in (1, 3):
        failpoints = CopyAt(at, nth, tmp_path / "v", tmp_path / f"crashed{nth}")
        async with opened(tmp_path / "v", failpoints=failpoints) as store:
            for _ in range(3):
                for number in range(40):
                    put(store, b"k%d" % number, b"%d" % nth + b"v" * 300)
                    await store.commit()
                await take_over(store)
        assert failpoints.at_copy is not None
        async with opened(tmp_path / f"crashed{nth}") as other:
            assert [value[:1] for value in content(other).values()] == [b"%d" % nth] * 40


async def test_a_tail_that_is_logged_again_frees_its_old_segment(tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    async with opened(tmp_path / "v") as store:
        seal(store, 1, 0)
        put(store, b"k", b"v", piece(1, 0, b"pre"))
        put(store, b"k", b"v", piece(1, 3, b"cious"))
        await store.commit()
        first = segments(tmp_path / "v")[0]
        for number in range(40):
            put(store, b"k%d" % number, b"v" * 300)
            await store.commit()
        seal(store, 1, 2)
        store.apply(Batch(), [piece(1, 2, b"ecious"), piece(1, 8, b"!")])
        assert store.pinned_tails() == [(1, 8)], "not durable yet: it still needs the old one"
        await store.commit()
        assert store.pinned_tails() == []
        await take_over(store)
        assert not first.exists()
        async with opened(copy(tmp_path / "v", tmp_path / "crashed")) as other:
            assert tail_of(other, 1) == b"ecious!"


async def fill(store: Store, value_id: int = 1) -> int:
    """Tails no sector takes, until commit refuses; returns how many bytes were acknowledged."""
    seal(store, value_id, 0)
    at = 0
    while True:
        store.apply(Batch(), [piece(value_id, at, b"f" * 1000)])
        try:
            await store.commit()
        except NoSpace:
            return at
        at += 1000


async def test_a_full_journal_refuses_after_waiting_and_goes_on_when_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "ROOM_WAIT", 0.3)
    (tmp_path / "v").mkdir()
    limit = 10 * SEGMENT
    async with opened(tmp_path / "v", limit=limit) as store:
        pressed = []
        store.on_pressure = lambda: pressed.append(store.journal_fill)
        started = trio.current_time()
        kept = await fill(store)
        assert trio.current_time() - started > 0.25
        assert pressed
        assert pressed[0] > 0.5
        assert kept > limit // 3
        assert sum(path.stat().st_size for path in (tmp_path / "v" / "journal").iterdir()) <= limit + 6 * SEGMENT
        with pytest.raises(NoSpace, match="hosts"):
            await store.commit()
        assert store.failure is None
        put(store, b"still", b"visible")
        assert store.get(b"still") == b"visible"
        async with opened(copy(tmp_path / "v", tmp_path / "full"), limit=limit) as other:
            assert tail_of(other, 1) == b"f" * kept
        # The reserve is there for the commit that points to the sectors.
        seal(store, 1, kept)
        await store.commit(urgent=True)
        await store.commit()
        await take_over(store)
        put(store, b"more", b"x", piece(1, kept + 1000, b"g" * 500))
        await store.commit()
    async with opened(tmp_path / "v", limit=limit) as store:
        assert tail_of(store, 1) == b"f" * 1000 + b"g" * 500


async def test_a_commit_that_waits_for_room_ends_well_when_tails_move_out(tmp_path: Path) -> None:
    async with opened(tmp_path, limit=10 * SEGMENT) as store, trio.open_nursery() as nursery:
        at = 0
        moved: list[int] = []

        async def move(upto: int) -> None:
            seal(store, 1, upto)
            await store.commit(urgent=True)
            moved.append(upto)

        def pressure() -> None:
            nursery.start_soon(move, at)

        store.on_pressure = pressure
        seal(store, 1, 0)
        with trio.fail_after(20):
            for _ in range(300):
                store.apply(Batch(), [piece(1, at, b"f" * 1000)])
                at += 1000
                await store.commit()
        assert moved


async def test_pending_tails_that_are_in_sectors_by_now_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More tails pending than the journal has room for, reserve included: only their sectors' commit can help, and must not carry them."""
    monkeypatch.setattr(room, "ROOM_WAIT", 0.2)
    async with opened(tmp_path, limit=8 * SEGMENT) as store:
        seal(store, 1, 0)
        store.apply(Batch(), [piece(1, 0, b"f" * (9 * SEGMENT))])
        for urgent in (False, True):
            with pytest.raises(NoSpace):
                await store.commit(urgent)
        seal(store, 1, 9 * SEGMENT)
        await store.commit(urgent=True)
        assert store.journal_fill < 0.5


async def test_no_room_on_the_disk_for_a_segment_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    point = FailAt("journal.segment.create", OSError(errno.ENOSPC, "No space left on device"), nth=3, times=10)
    async with opened(tmp_path / "v", failpoints=point) as store:
        acknowledged = refused = 0
        for number in range(60):
            put(store, b"k%02d" % number, b"v" * 300)
            try:
                await store.commit()
            except NoSpace:
                refused += 1
                assert store.failure is None
            else:
                acknowledged = number + 1
        assert refused
        assert acknowledged == 60, "there was room again, and what was pending became durable"
        crashed = copy(tmp_path / "v", tmp_path / "crashed")
    async with opened(crashed) as store:
        assert len(store.scan(b"k", b"l", 100)) == 60


async def test_a_takeover_that_fails_is_tried_again_and_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "v").mkdir()
    point = FailAt("lmdb.takeover.before", NoSpace("no room for metadata"), times=2)
    async with opened(tmp_path / "v", failpoints=point) as store:
        for number in range(10):
            put(store, b"k%d" % number, b"v")
            await store.commit()
        with caplog.at_level(logging.WARNING):
            await take_over(store)
        assert "trying again" in caplog.text
        assert store._memtable.frozen is not None
        put(store, b"k0", b"new")
        await store.commit()
        assert len(store.scan(b"k", b"l", 100)) == 10
        async with opened(copy(tmp_path / "v", tmp_path / "crashed")) as other:
            assert len(other.scan(b"k", b"l", 100)) == 10
            assert other.get(b"k0") == b"new"
        store._takeover._retry_at = -1.0
        await take_over(store)
        assert store._memtable.frozen is None
        assert store.get(b"k0") == b"new"


async def test_lmdb_out_of_room_is_no_space_and_keeps_the_journal(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"journal_key": lambda salt: salt * 2, "tail_needed": lambda *_: False, "limit_bytes": 64 << 20}
    async with open_store(tmp_path, Seams(), map_size=64 * 1024, **arguments) as store:
        store.begin_epoch(1, b"1" * 16)
        for number in range(200):
            put(store, b"k%03d" % number, b"v" * 2000)
        await store.commit()
        await take_over(store)
        assert store._memtable.frozen is not None
    async with open_store(tmp_path, Seams(), map_size=1 << 30, **arguments) as store:
        assert len(store.scan(b"k", b"l", 1000)) == 200


# ------------------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("patience", [0.0, 10.0])
@pytest.mark.parametrize("where", ["journal.append.before_write", "journal.append.before_fsync"])
async def test_after_a_failed_flush_nothing_is_acknowledged_ever_again(
    where: str, patience: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Others join behind the commit that fails; or come when it has failed.
    monkeypatch.setattr(flushing, "PATIENCE", patience)
    (tmp_path / "v").mkdir()
    point = FailAt(where, OSError(errno.EIO, "Input/output error"), nth=4, times=1)
    async with opened(tmp_path / "v", failpoints=point) as store:
        for number in range(3):
            put(store, b"k%d" % number, b"v")
            await store.commit()
        outcomes: list[str] = []

        async def one(number: int) -> None:
            try:
                put(store, b"late%d" % number, b"v")
                await store.commit()
            except Fenced as error:
                outcomes.append(str(error))

        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(one, number)
        assert len(outcomes) == 4
        assert "journal" in outcomes[0]
        assert "mount" in outcomes[0]
        assert store.failure in outcomes
        for attempt in (store.commit(), store.commit(urgent=True)):
            with pytest.raises(Fenced):
                await attempt
        with pytest.raises(Fenced):
            put(store, b"x", b"y")
        assert store.get(b"k1") == b"v", "reads go on"
        assert len(store.scan(b"k", b"l", 10)) == 3
    async with opened(tmp_path / "v") as store:
        assert [key for key, _ in store.scan(b"k", b"l", 10)] == [b"k0", b"k1", b"k2"]
        put(store, b"x", b"y")
        await store.commit()


async def test_damage_is_said_at_open(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        for number in range(100):
            put(store, b"k%d" % number, b"v" * 200, piece(1, number, b"x"))
            await store.commit()
        copied = copy(tmp_path, tmp_path.parent / "damaged")
    path = segments(copied)[0]
    raw = bytearray(path.read_bytes())
    raw[700] ^= 1
    path.write_bytes(raw)
    with pytest.raises(Corrupt, match=path.name):
        async with opened(copied):
            pass


async def test_metadata_that_are_no_database_are_said(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        put(store, b"k", b"v")
    (tmp_path / "metadata" / "data.mdb").write_bytes(b"garbage" * 5000)
    with pytest.raises(FusefsError, match="metadata"):
        async with opened(tmp_path):
            pass


async def test_a_large_memtable_moves_into_lmdb_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MAX_KEYS", 500)
    monkeypatch.setattr("storage.metadata.takeover.MAX_KEYS", 500)
    async with opened(tmp_path, segment=1 << 20, limit=1 << 24) as store:
        with trio.fail_after(10):
            for number in range(3000):
                put(store, b"k%05d" % number, b"v")
                if number % 100 == 0:
                    await trio.sleep(0.002)
            while store._base.get(b"k02000") is None:
                await store._takeover.passed.wait()
        assert len(store.scan(b"k", b"l", 5000)) == 3000


async def test_old_changes_move_into_lmdb_by_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.metadata.takeover.MAX_AGE", 0.2)
    async with opened(tmp_path, seams=replace(Seams())) as store:
        put(store, b"k", b"v")
        await store.commit()
        with trio.fail_after(5):
            while store._base.get(b"k") is None:
                await store._takeover.passed.wait()


def test_many_keys_and_ranges_of_lmdb_are_what_single_ones_are(tmp_path: Path) -> None:
    base = LmdbBase(tmp_path, 1 << 30)
    try:
        content = {b"k%03d" % number: b"v%d" % number for number in range(0, 300, 3)}
        base.take_over(content, content, 1, bytes(32), gentle=False)
        base.renew()
        keys = [b"k%03d" % number for number in range(299, -1, -1)]
        assert base.get_many(keys) == [base.get(key) for key in keys] == [content.get(key) for key in keys]
        present = sorted(content, reverse=True) * 2
        assert base.get_many(present) == [content[key] for key in present]
        assert base.get_many([]) == []
        ranges = [(b"k", b"z"), (b"k100", b"k200"), (b"k099", b"k102"), (b"k1", b"k1"), (b"k2", b"k1"), (b"k298", b"z"), (b"x", b"z")]
        for start, stop in ranges:
            whole = sorted((key, value) for key, value in content.items() if start <= key < stop)
            for limit in (0, 1, 3, 4, 5, 40, 1000):
                assert base.scan(start, stop, limit) == whole[:limit]
    finally:
        base.close()


@settings(max_examples=200)
@given(st.data())
def test_keys_with_numbers_in_a_row_are_found_as_others_are(data: st.DataObject) -> None:
    """Breaks if one that is missing, newer, or in another order is taken for another. All keys of this prefix are as long as these."""
    present = data.draw(st.sets(st.integers(0, 40)))
    content = {INODE + u64(number): b"v%d" % number for number in present} | {b"h": b"before", b"j": b"behind"}
    first, count = data.draw(st.integers(0, 30)), data.draw(st.integers(0, 20))
    numbers = list(range(first, first + count))
    looked_for = data.draw(st.one_of(st.just(numbers), st.permutations(numbers), st.lists(st.integers(first, first + count), max_size=20)))
    with TemporaryDirectory() as directory:
        base = LmdbBase(Path(directory), 1 << 24)
        try:
            base.take_over(content, content, 1, bytes(32), gentle=False)
            base.renew()
            keys = numbered(INODE, looked_for)
            assert keys == [INODE + u64(number) for number in looked_for]
            assert base.get_many(keys) == by_number(base, INODE, looked_for) == [content.get(key) for key in keys]
            # Some of it in memory.
            table = Memtable(base)
            newer = {INODE + u64(number): data.draw(st.sampled_from([None, b"newer"])) for number in data.draw(st.sets(st.integers(0, 40)))}
            table.apply(list(newer.items()))
            assert by_number(table, INODE, looked_for) == [(content | newer).get(key) for key in keys]
        finally:
            base.close()


def test_the_kernel_reads_ahead_in_a_database_that_fits_the_memory_and_not_in_a_larger_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    real = lmdb.open

    def watched(path: bytes, **options: Any) -> lmdb.Environment:
        asked.append(options["readahead"])
        return real(path, **options)

    monkeypatch.setattr(lmdb, "open", watched)
    # New, there already, larger than the memory allows for.
    LmdbBase(tmp_path, 1 << 24).close()
    LmdbBase(tmp_path, 1 << 24).close()
    monkeypatch.setattr("storage.metadata.lmdb_base.READ_AHEAD", (tmp_path / "data.mdb").stat().st_size - 1)
    LmdbBase(tmp_path, 1 << 24).close()
    assert asked == [True, True, False]


def test_a_scan_does_not_read_on_far_beyond_its_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever wants all of a short range gives a large limit; what stands behind it may be millions of records."""
    base = LmdbBase(tmp_path, 1 << 30)
    taken = 0

    class Counted:
        def __init__(self, cursor: Any) -> None:
            self._cursor = cursor

        def __getattr__(self, name: str) -> Any:
            return getattr(self._cursor, name)

        def iternext(self) -> Iterator[tuple[bytes, bytes]]:
            nonlocal taken
            for pair in self._cursor.iternext():
                taken += 1
                yield pair

    try:
        content = {b"k%05d" % number: b"" for number in range(20_000)}
        base.take_over(content, content, 1, bytes(32), gentle=False)
        base.renew()
        monkeypatch.setattr(base, "_cursor", Counted(base._cursor))
        for length in (0, 1, 3, 5, 20, 100, 1000):
            taken = 0
            assert len(base.scan(b"k00100", b"k%05d" % (100 + length), 1 << 40)) == length
            assert taken <= 4 * length + 4
    finally:
        monkeypatch.undo()
        base.close()
