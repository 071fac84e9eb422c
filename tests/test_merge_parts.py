"""A merge points very many extents to its new sector, a part of them at a time: whatever comes between two parts, or ends all there, finds
every byte, and nothing is left behind."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from storage.errors import FusefsError, NoSpace, NotFound
from storage.keyfile import CHEAP
from storage.metadata.keys import EXTENT, FREED, FRESH, GARBAGE, SECTOR, prefix_end
from storage.metadata.memtable import Memtable
from storage.metadata.records import Op
from storage.metadata.store import Store
from storage.recovery import recover_volume
from storage.sectors.partial import BASE
from storage.values import merge
from storage.values.records import decode_extent
from storage.volume import Volume
from tests.crash_points import DeadFrom, leaves
from tests.fakes import Crash
from tests.metadata_rig import quick_directory
from tests.rig import PASSPHRASE, host_dirs, make, published
from tests.test_replication_change import SECTOR_SIZE, compare, ino_of, opened, put, sound, specs_of

#: Of these sectors one is made.
ROUNDS = BASE
FILES = 12


@pytest.fixture
def base() -> Iterator[Path]:
    with quick_directory() as path:
        yield path


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "SWITCHED", 3)


async def fill(volume: Volume, rounds: range, content: dict[str, bytes]) -> None:
    """So many sectors: a file of its own in each, and pieces of others, which are side by side in the sector that is made of them."""
    for number in rounds:
        chance = random.Random(number)
        for name in (f"own{number}", *(f"log{at}" for at in range(FILES))):
            piece = chance.randbytes(chance.randrange(40, 90))
            content[name] = content.get(name, b"") + piece
            await put(volume, name, piece)
        await volume.flush()


def pointed_to(volume: Volume) -> dict[int, int]:
    """Sector -> extents in it."""
    found: dict[int, int] = {}
    for key, raw in volume.store.scan(EXTENT, prefix_end(EXTENT), 100_000):
        sector_id = decode_extent(key, raw).sector_id
        found[sector_id] = found.get(sector_id, 0) + 1
    return found


async def idle(_merger: merge.Merger) -> None:
    await trio.sleep_forever()


async def settled(volume: Volume, sectors: int) -> None:
    """Until so many sectors are all there are: on record, pointed to, and on the hosts."""
    marks = (GARBAGE, FREED, FRESH)
    with trio.fail_after(20):
        while True:
            await volume.commit()
            await published(volume)
            await volume.deleter.drain()
            if volume.sectors.count == sectors and not any(volume.store.scan(mark, prefix_end(mark), 1) for mark in marks):
                break
            await trio.sleep(0.02)
    assert len(pointed_to(volume)) == sectors == len(volume.store.scan(SECTOR, prefix_end(SECTOR), 1000))


@pytest.mark.parametrize("lost", [False, True], ids=["mounted again", "the machine lost"])
async def test_a_crash_between_two_parts_loses_nothing_and_leaves_nothing_behind(
    base: Path, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    """Where all that was done until then is durable, and, if the machine is to be lost, on the hosts."""
    real = Store.catch_up
    running: list[Volume] = []

    async def durably(self: Store, urgent: bool = False) -> None:
        await real(self, urgent)
        if running and running[0].store is self:
            await self.commit()
            if lost:
                await published(running[0])

    monkeypatch.setattr(Store, "catch_up", durably)
    run, kept = base / "run", base / "kept"
    run.mkdir()
    await make(run / "v", host_dirs(run, 1), sector_size=SECTOR_SIZE)
    content: dict[str, bytes] = {}
    async with opened(run / "v") as volume:
        await fill(volume, range(ROUNDS - 1), content)
    shutil.copytree(run, kept)

    async def life(failpoints: DeadFrom) -> None:
        async with opened(run / "v", failpoints) as volume:
            running.append(volume)
            try:
                await fill(volume, range(ROUNDS - 1, ROUNDS), content)
                await settled(volume, 1)
            finally:
                running.clear()

    before = dict(content)
    whole = DeadFrom(0)
    await life(whole)
    parts = whole.hits.count("merge.before_switch")
    # A file of each round's own, and those that are in all of them.
    assert parts > (ROUNDS + FILES) // 3
    halves = 0
    for nth in range(1, parts + 1):
        shutil.rmtree(run)
        shutil.copytree(kept, run)
        content.clear()
        content.update(before)
        failpoints = DeadFrom(nth, "merge.before_switch")
        try:
            await life(failpoints)
        except BaseException as error:
            if [one for one in leaves(error) if not isinstance(one, Crash | FusefsError | trio.Cancelled)] or not failpoints.died:
                raise
        assert failpoints.died
        if lost:
            shutil.rmtree(run / "v")
            await recover_volume(run / "v", host_dirs(run, 1), passphrase=PASSPHRASE, argon2=CHEAP)
        await sound(run / "v")
        monkeypatch.setattr(merge.Merger, "wake", lambda _self: None)
        monkeypatch.setattr(merge.Merger, "run", idle)
        async with opened(run / "v") as volume:
            halves += len(pointed_to(volume)) == ROUNDS + 1
            await compare(volume, content)
        monkeypatch.undo()
        monkeypatch.setattr(merge, "SWITCHED", 3)
        monkeypatch.setattr(Store, "catch_up", durably)
        async with opened(run / "v") as volume:
            # More of the same, until another merge is due, which takes all up.
            await fill(volume, range(ROUNDS, 3 * ROUNDS), content)
            await compare(volume, content)
            for name in list(content):
                volume.namespace.unlink(1, name.encode())
            await settled(volume, 0)
            content.clear()
        await sound(run / "v")
    # It did come between parts that were durable.
    assert halves > 2


async def test_what_is_read_appended_and_freed_between_two_parts_is_as_it_should_be(tmp_path: Path) -> None:
    await make(tmp_path / "v", host_dirs(tmp_path, 1), sector_size=SECTOR_SIZE)
    content: dict[str, bytes] = {}
    freed = [f"log{at}" for at in range(0, FILES, 2)] + ["own3"]
    async with opened(tmp_path / "v") as volume:
        await fill(volume, range(ROUNDS - 1), content)
        volume.sectors.cache._blocks.clear()
        seen = 0

        def between(name: str) -> None:
            nonlocal seen
            if name == "merge.before_switch":
                seen += 1
                if freed:
                    del content[freed[-1]]
                    volume.namespace.unlink(1, freed.pop().encode())
                # Readers find extents in one place or the other; the same values as are being moved.
                for left in content:
                    value = volume.namespace._inodes.get(ino_of(volume, left)).rec.value
                    assert volume.values.size_of(value) == len(content[left])

        volume.values._merger._hit = between
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                while True:
                    for name in list(content):
                        wanted = content.get(name)
                        if wanted is not None and volume.namespace.find(1, name.encode()) is not None:
                            try:
                                fd = await volume.files.open(name, existing=True)
                            except NotFound:
                                # Removed while it was opened.
                                assert name not in content
                                continue
                            assert (await volume.files.read_at(fd, 0, 1 << 20)).startswith(wanted)
                            await volume.files.close(fd)

            await fill(volume, range(ROUNDS - 1, ROUNDS), content)
            nursery.start_soon(read)
            await settled(volume, 1)
            nursery.cancel_scope.cancel()
        assert seen > 4
        assert len(freed) < 4
        await compare(volume, content)
    await sound(tmp_path / "v")
    async with opened(tmp_path / "v") as volume:
        await compare(volume, content)


@pytest.mark.parametrize("at", [1, 2, 4])
async def test_another_replication_that_is_given_between_two_parts_is_what_comes_of_it(tmp_path: Path, at: int) -> None:
    """Nobody would look for bytes again that a merge has put where they were not to be any more."""
    await make(tmp_path / "v", host_dirs(tmp_path, 2), sector_size=SECTOR_SIZE)
    content: dict[str, bytes] = {}
    async with opened(tmp_path / "v") as volume:
        await fill(volume, range(ROUNDS - 1), content)
        seen = 0
        given = trio.Event()
        async with trio.open_nursery() as nursery:

            async def give() -> None:
                # Those first that are in no part yet.
                for name in reversed(list(content)):
                    await volume.namespace.give_replication(ino_of(volume, name), "2")
                given.set()

            def between(name: str) -> None:
                nonlocal seen
                if name == "merge.before_switch":
                    seen += 1
                    if seen == at:
                        nursery.start_soon(give)

            merger, rewriter = volume.values._merger, volume.values.rewriter
            switch = merger._switch_part

            left = 0

            async def part(output: Any, entries: Any) -> None:
                nonlocal left
                # Whoever moves them has looked them up, and waits for his turn.
                if seen == at:
                    with trio.fail_after(20):
                        while not (given.is_set() and rewriter._group.extents and merger._lock.statistics().tasks_waiting):
                            await trio.sleep(0.01)
                misplaced = [
                    extent
                    for entry, extents in entries
                    if volume.values.replication_of(entry.value_id) != output.replication
                    for extent in extents
                    if volume.store.get(extent.key) == extent.encode()
                ]
                await switch(output, entries)
                # What is to be elsewhere by now is still where whoever moves it has found it.
                assert all(volume.store.get(extent.key) == extent.encode() for extent in misplaced)
                left += len(misplaced)

            merger._hit = between
            merger._switch_part = part  # type: ignore[method-assign]
            await fill(volume, range(ROUNDS - 1, ROUNDS), content)
            with trio.fail_after(20):
                await given.wait()
                # `left` is counted when a part is done, `seen` in the midst of it.
                while not (seen > at and left):
                    await trio.sleep(0.01)
        with trio.fail_after(20):
            while any(specs_of(volume, name) != {"2"} for name in content):
                await volume.flush()
                await trio.sleep(0.02)
        await compare(volume, content)
    await sound(tmp_path / "v")


async def test_a_merge_that_finds_no_room_after_some_parts_is_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had pointed to by then stays so, and both sectors have what is read."""
    real = Store.catch_up
    calls = 0

    async def sometimes(self: Store, urgent: bool = False) -> None:
        nonlocal calls
        calls += not urgent
        if not urgent and calls % 7 == 0:
            raise NoSpace("the journal is full")
        await real(self, urgent)

    monkeypatch.setattr(merge, "RETRY_SECONDS", 0.01)
    await make(tmp_path / "v", host_dirs(tmp_path, 1), sector_size=SECTOR_SIZE)
    content: dict[str, bytes] = {}
    async with opened(tmp_path / "v") as volume:
        await fill(volume, range(ROUNDS - 1), content)
        monkeypatch.setattr(Store, "catch_up", sometimes)
        await fill(volume, range(ROUNDS - 1, 4 * ROUNDS), content)
        with trio.fail_after(20):
            while volume.sectors.partials.due() is not None or volume.sectors.partials.held:
                await trio.sleep(0.02)
        assert calls > 14
        await compare(volume, content)
        for name in list(content):
            volume.namespace.unlink(1, name.encode())
        await settled(volume, 0)
    await sound(tmp_path / "v")


async def test_no_batch_of_a_merge_has_more_than_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch is a step of the event loop: with all extents in one, a million small files stopped everybody for half a second at a
    time."""
    monkeypatch.undo()
    largest = 0
    apply = Memtable.apply

    def counted(self: Memtable, ops: list[Op]) -> None:
        nonlocal largest
        largest = max(largest, sum(1 for key, _ in ops if key[:1] == EXTENT))
        apply(self, ops)

    await make(tmp_path / "v", host_dirs(tmp_path, 1))
    async with opened(tmp_path / "v") as volume:
        for number in range(ROUNDS):
            for at in range(200):
                await put(volume, f"{number}.{at}", b"line")
            if number == ROUNDS - 1:
                monkeypatch.setattr(Memtable, "apply", counted)
                monkeypatch.setattr("storage.values.shipping.LANDING", 50)
            await volume.flush()
        await settled(volume, 1)
    assert merge.SWITCHED < largest <= 2 * merge.SWITCHED + 2


async def test_where_nothing_comes_of_a_merge_others_have_their_time(autojump_clock: trio.testing.MockClock) -> None:
    """What is to be reclaimed first, 50 ms later, is: reading the same sectors without end would not help."""
    group, merged = [object()], 0
    merger: Any = object.__new__(merge.Merger)
    merger._lock, merger._wake, merger._set_aside_at = trio.Lock(), trio.Event(), 0.0
    merger._sectors = SimpleNamespace(partials=SimpleNamespace(due=lambda: group, set_aside=set()))

    async def nothing(_: object) -> None:
        nonlocal merged
        merged += 1
        assert merged < 100
        await trio.lowlevel.checkpoint()

    merger.merge = nothing
    merger._wake.set()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(merger.run)
        await trio.sleep(10)
        nursery.cancel_scope.cancel()
    assert 2 <= merged < 20
