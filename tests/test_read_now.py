"""Reads that take no waiting give what reads that do would give, whatever has been appended, cut, merged and freed meanwhile."""

from __future__ import annotations

import mmap
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from storage.coprocess.arena import Arena
from storage.coprocess.pair import DISKS, SEALING
from storage.errors import Corrupt, NotFound
from storage.lending import huge
from storage.quick_reads import SPUN
from storage.sealing import BLOCK, TAG_SIZE, ShardHeader, open_blocks_into
from storage.sectors.cache import JUST_PASSED
from storage.sectors.reader import AHEAD, AHEAD_NEAR, AT_ONCE, PREFETCHES
from storage.sectors.shards import TOGETHER, ShardReader
from storage.values import places
from storage.values.places import Places
from storage.values.reading import EXTENTS_AHEAD
from storage.values.records import Extent, extents_between
from tests.rig import QUIET, append, free, host_dirs, make, new_value, noise, opened
from tests.rig import SECTOR as SECTOR_SIZE
from tests.test_redundancy import watch_fetches
from tests.test_values import settled, shards_on


async def stored(tmp_path: Path, data: bytes, sector_size: int = SECTOR_SIZE) -> int:
    """The value of `data`, in sectors on the only host of the volume `tmp_path / "v"`, which nobody has open."""
    await make(tmp_path / "v", host_dirs(tmp_path, 1), sector_size=sector_size)
    async with opened(tmp_path / "v") as volume:
        value = new_value(volume)
        await append(volume, value, data)
        await volume.flush()
    return value


def agrees(found: bytes | bytearray | memoryview | None, data: bytes, offset: int, size: int) -> bool:
    return found is None or bytes(found) == data[offset : offset + size]


@pytest.mark.parametrize("replication", ["1", "2+1"])
async def test_it_is_what_read_gives(tmp_path: Path, replication: str) -> None:
    await make(tmp_path / "v", host_dirs(tmp_path, 3), replication=replication)
    data = noise(3 * SECTOR_SIZE + 12_345)
    dice = random.Random(5)
    async with opened(tmp_path / "v") as volume:
        value = new_value(volume)
        values, written = volume.values, 0
        served = 0
        while written < len(data):
            step = dice.randrange(1, 90_000)
            await append(volume, value, data[written : written + step])
            written = min(len(data), written + step)
            for _ in range(20):
                offset, size = dice.randrange(written + 10), dice.choice([1, 4096, BLOCK, 3 * BLOCK, 1 << 20])
                now = values.read_now(value, offset, size)
                assert agrees(now, data[:written], offset, size), (offset, size, written)
                assert await values.read(value, offset, size) == data[:written][offset : offset + size]
                again = values.read_now(value, offset, size)
                assert agrees(again, data[:written], offset, size), (offset, size, written)
                served += again is not None
            if dice.random() < 0.2:
                await volume.flush()
        assert served > 50
        assert values.read_now(value, -1, 5) is None
        assert values.read_now(value, 0, 0) is None
        free(volume, value)
        assert values.read_now(value, 0, 4096) is None
        with pytest.raises(NotFound):
            await values.read(value, 0, 4096)


async def test_a_cold_read_warms_the_next_and_merging_changes_nothing(tmp_path: Path) -> None:
    await make(tmp_path / "v", host_dirs(tmp_path, 1))
    data = noise(20 * 3000)
    async with opened(tmp_path / "v") as volume:
        value = new_value(volume)
        for start in range(0, len(data), 3000):
            await append(volume, value, data[start : start + 3000])
            await volume.flush()
            # Known places go out of date as sectors are merged.
            assert agrees(volume.values.read_now(value, start, 100), data, start, 100)
            assert await volume.values.read(value, start, 100) == data[start : start + 100]
        await settled(volume)
        for start in range(0, len(data) - 10, 777):
            assert agrees(volume.values.read_now(value, start, 10), data, start, 10)
    async with opened(tmp_path / "v", options=replace(QUIET, cache=1 << 20)) as volume:
        assert volume.values.read_now(value, 50, 10) is None
        assert await volume.values.read(value, 50, 10) == data[50:60]
        found = volume.values.read_now(value, 51, 10)
        assert found is not None
        assert bytes(found) == data[51:61]


async def test_what_was_handed_out_does_not_change_when_the_cache_forgets_it(tmp_path: Path) -> None:
    data = noise(6 * SECTOR_SIZE)
    value = await stored(tmp_path, data)
    async with opened(tmp_path / "v", options=replace(QUIET, cache=2 * SECTOR_SIZE)) as volume:
        kept = []
        for start in range(0, len(data), 50_000):
            found = volume.values.read_now(value, start, 50_000)
            kept.append((start, found if found is not None else await volume.values.read(value, start, 50_000)))
        assert all(bytes(found) == data[start : start + 50_000] for start, found in kept)


async def test_a_damaged_block_is_never_served_from_the_page_cache(tmp_path: Path) -> None:
    """Read a moment ago, so still open and at hand; then it rots."""
    data = noise(SECTOR_SIZE - 4096)
    value = await stored(tmp_path, data)
    async with opened(tmp_path / "v") as volume:
        assert await volume.values.read(value, 0, 10) == data[:10]
        assert await volume.values.read(value, BLOCK, 10) == data[BLOCK : BLOCK + 10]
        (shard,) = shards_on(tmp_path / "host0")
        with open(shard, "r+b") as file:
            file.seek(64 + 2 * (BLOCK + 16) + 100)
            file.write(b"rotten")
        for _ in range(2):
            with pytest.raises(Corrupt):
                await volume.values.read(value, 2 * BLOCK, 10)
        assert volume.hostdb.stats(1).failed > 0


async def test_no_page_of_a_file_takes_more_than_one_block_of_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor any of those beyond a sector's end: what is read at random costs what a block costs."""
    data = noise(3 * SECTOR_SIZE)
    value = await stored(tmp_path, data)
    async with opened(tmp_path / "v", options=replace(QUIET, cache=1)) as volume:
        fetched = watch_fetches(volume, monkeypatch)
        places = list(range(0, len(data), 4096))
        # At random, or it would be read ahead.
        random.Random(3).shuffle(places)
        for at in places:
            fetched.clear()
            assert await volume.values.read(value, at, 4096) == data[at : at + 4096]
            assert sum(fetched.values()) <= BLOCK + TAG_SIZE


async def test_where_requests_take_long_a_miss_brings_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = noise(SECTOR_SIZE - 4096)
    value = await stored(tmp_path, data)
    monkeypatch.setattr("storage.quick_reads.QuickReads.near", lambda *_: False)
    (shard,) = shards_on(tmp_path / "host0")
    bad = TOGETHER + 2
    with open(shard, "r+b") as file:
        file.seek(64 + bad * (BLOCK + TAG_SIZE) + 100)
        file.write(b"rotten")
    async with opened(tmp_path / "v") as volume:
        fetched = watch_fetches(volume, monkeypatch)
        for block in (TOGETHER - 1, *range(TOGETHER)):
            assert await volume.values.read(value, block * BLOCK + 5, 10) == data[block * BLOCK + 5 :][:10]
            assert sum(fetched.values()) == TOGETHER * (BLOCK + TAG_SIZE)
        # What is wrong with a neighbour is told to who asks for that.
        for block in (bad - 1, bad + 1, bad - 2):
            assert await volume.values.read(value, block * BLOCK, 10) == data[block * BLOCK :][:10]
        with pytest.raises(Corrupt):
            await volume.values.read(value, bad * BLOCK, 10)


async def test_a_disk_is_waited_for_at_once_while_nobody_wants_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = noise(2 * SECTOR_SIZE - 4096)
    value = await stored(tmp_path, data, 2 * SECTOR_SIZE)
    async with opened(tmp_path / "v") as volume:
        read_now = volume.values.read_now

        def at_once(at: int, size: int) -> bytes | None:
            # As often as a disk may need that others use as well.
            for _ in range(1000):
                found = read_now(value, at, size)
                if found is not None:
                    return bytes(found)
            return None

        assert await volume.values.read(value, 0, 10) == data[:10]
        # Nobody can say whether anybody waits.
        assert at_once(BLOCK, 10) is None
        volume.host_io.quick.more_coming = lambda: False
        before, missed = volume.hostdb.stats(1), volume.sectors.cache.statistics.misses
        assert at_once(2 * BLOCK - 5, 10) == data[2 * BLOCK - 5 :][:10]
        assert at_once(3 * BLOCK + 7, BLOCK) == data[3 * BLOCK + 7 :][:BLOCK]
        assert at_once(6 * BLOCK, 2 * BLOCK) == data[6 * BLOCK : 8 * BLOCK]
        assert at_once(9 * BLOCK, 4096) == data[9 * BLOCK :][:4096]
        after = volume.hostdb.stats(1)
        assert after.reads == before.reads + 4
        assert after.bytes_read == before.bytes_read + 7 * (BLOCK + TAG_SIZE)
        assert volume.sectors.cache.statistics.misses == missed + 7
        # It is in the cache now, whoever waits.
        volume.host_io.quick.more_coming = lambda: True
        assert read_now(value, 9 * BLOCK + 4096, 10) == data[9 * BLOCK + 4096 :][:10]
        volume.host_io.quick.more_coming = lambda: False
        # What does not verify is not given, nor what asks for much.
        (shard,) = shards_on(tmp_path / "host0")
        with open(shard, "r+b") as file:
            file.seek(64 + 10 * (BLOCK + TAG_SIZE) + 100)
            file.write(b"rotten")
        await volume.values.read(value, 11 * BLOCK, 10)
        assert at_once(10 * BLOCK, 10) is None
        with pytest.raises(Corrupt):
            await volume.values.read(value, 10 * BLOCK, 10)

        looked = 0

        def never(*_: object) -> None:
            nonlocal looked
            looked += 1

        monkeypatch.setattr("storage.hosts.tree.Tree.read_now", never)
        monkeypatch.setattr("storage.hosts.tree.Tree.holds", lambda *_: True)
        started = time.perf_counter()
        assert read_now(value, 12 * BLOCK, 10) is None
        assert looked > 1
        assert time.perf_counter() - started >= SPUN
        looked = 0
        volume.host_io.quick.more_coming = lambda: True
        assert read_now(value, 12 * BLOCK, 10) is None
        assert looked == 1
        # A disk that was too slow for the event loop is not waited for like this either.
        volume.host_io.quick.more_coming = lambda: False
        assert await volume.values.read(value, 12 * BLOCK, 10) == data[12 * BLOCK :][:10]
        looked = 0
        assert read_now(value, 13 * BLOCK, 10) is None
        assert looked == 0


async def test_nothing_behind_a_sector_is_taken_for_its_bytes(tmp_path: Path) -> None:
    await make(tmp_path / "v", host_dirs(tmp_path, 1))
    async with opened(tmp_path / "v") as volume:
        sector, data = await volume.sectors.allocate_sector("1"), noise(10_000)
        await volume.sectors.write_sector(sector, data, "1")
        assert volume.sectors.read_now(sector, 9_000, 1_000) == data[9_000:]
        assert volume.sectors.read_now(sector, 9_000, 1_001) is None
        assert await volume.sectors.insecure_read_sector_at(sector, 9_000, 1_001) == data[9_000:]


async def test_reads_from_the_page_cache_are_counted(tmp_path: Path) -> None:
    """Whoever looks at `status` sees what was asked of a host, however it answered."""
    value = await stored(tmp_path, noise(SECTOR_SIZE - 4096))
    async with opened(tmp_path / "v") as volume:
        await volume.values.read(value, 0, 10)
        before = volume.hostdb.stats(1)
        for block in range(1, 3):
            await volume.values.read(value, block * BLOCK, 10)
        after = volume.hostdb.stats(1)
        assert after.reads == before.reads + 2
        assert after.bytes_read == before.bytes_read + 2 * (BLOCK + 16)
        assert after.days[-1].requests == before.days[-1].requests + 2


async def test_a_host_that_does_not_answer_soon_is_waited_for_less_and_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each read from a slow disk would cost the event loop half a millisecond of looking."""
    data = noise(SECTOR_SIZE - 4096)
    value = await stored(tmp_path, data)
    async with opened(tmp_path / "v", options=replace(QUIET, cache=1)) as volume:
        reads: list[int] = []
        looked: set[int] = set()
        monkeypatch.setattr("storage.hosts.tree.Tree.read_now", lambda *_: looked.add(reads[-1]))
        monkeypatch.setattr("storage.hosts.tree.Tree.holds", lambda *_: True)
        for read in range(40):
            reads.append(read)
            assert await volume.values.read(value, BLOCK, 10) == data[BLOCK : BLOCK + 10]
        assert sorted(looked) == [0, 2, 5, 10, 19, 36]


async def test_a_sequential_reader_is_read_ahead_for_where_every_read_is_at_hand(tmp_path: Path) -> None:
    data = noise(24 * SECTOR_SIZE)
    value = await stored(tmp_path, data)
    async with opened(tmp_path / "v", options=replace(QUIET, cache=64 << 20)) as volume:
        got, waited = b"", 0
        while len(got) < len(data):
            found = volume.values.read_now(value, len(got), BLOCK)
            if found is None:
                waited += 1
                found = await volume.values.read(value, len(got), BLOCK)
            got += bytes(found)
            while volume.sectors._reader._fetching:
                await trio.sleep(0.001)
        assert got == data
        assert waited <= 2


async def test_what_follows_is_the_same_whatever_of_it_is_remembered(tmp_path: Path) -> None:
    """More sectors than are looked up at a time, asked for from any of them on, in any order."""
    value = await stored(tmp_path, noise(40 * SECTOR_SIZE))
    async with opened(tmp_path / "v") as volume:
        values = volume.values
        extents = extents_between(volume.store, value, 0, 1 << 40, 1000)
        assert len(extents) > 2 * EXTENTS_AHEAD
        chance = random.Random(1)
        for _ in range(300):
            first, count = chance.randrange(len(extents) + 1), chance.randrange(1, 12)
            at = extents[first].offset if first < len(extents) else extents[-1].end
            assert values._reader._following(value, at, count) == extents[first : first + count]
            if chance.random() < 0.1:
                values._reader.forget(value)


@pytest.mark.parametrize("shared", [True, False])
async def test_a_long_file_goes_through_the_same_memory_and_no_view_of_it_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    """A reply of which the kernel, or anybody, still has a view stays what it was, while the sector behind it leaves the cache."""
    size, count = 2 << 20, 32
    made = 0

    def counted(size: int) -> mmap.mmap:
        nonlocal made
        made += size > 1 << 20
        return huge(size)

    data = noise(count * size)
    value = await stored(tmp_path, data, size)
    monkeypatch.setattr("storage.lending.huge", counted)
    # The coprocesses know another one.
    monkeypatch.setattr(DISKS, "wanted", False)
    monkeypatch.setattr(SEALING, "wanted", False)
    slots = 64 if shared else 0
    arena = Arena(slots=slots)
    monkeypatch.setattr("storage.host_io.ARENA", arena)
    async with opened(tmp_path / "v", options=replace(QUIET, cache=20 * size)) as volume:
        held: list[tuple[int, memoryview]] = []
        at = 0
        while at < len(data):
            found = volume.values.read_now(value, at, 4 * BLOCK)
            if found is None:
                found = await volume.values.read(value, at, 4 * BLOCK)
            elif isinstance(found, memoryview) and at % (8 * size) < size:
                held.append((at, found))
            assert bytes(found) == data[at : at + 4 * BLOCK]
            at += len(found)
            while volume.sectors._reader._fetching:
                await trio.sleep(0.001)
        assert len({start // size for start, _ in held}) == count // 8
        for start, view in held:
            assert view == data[start : start + len(view)]
        # What was just passed, what is ahead (and sealed bytes of it), what is read, and what is held here; else it was used before.
        if shared:
            assert arena._memory is not None
            made += sum(slots - len(kind.cold) for kind in arena._memory.kinds)
        assert 0 < made <= JUST_PASSED // size + 2 * PREFETCHES + 1 + count // 8 < count


@pytest.mark.parametrize("near", [True, False])
async def test_what_a_stream_has_passed_stays_where_to_have_it_again_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, near: bool
) -> None:
    data = noise(12 * SECTOR_SIZE)
    value = await stored(tmp_path, data)
    if not near:
        monkeypatch.setattr("storage.quick_reads.QuickReads.near", lambda *_: False)
    async with opened(tmp_path / "v", options=replace(QUIET, cache=14 * SECTOR_SIZE)) as volume:
        for at in range(0, len(data), BLOCK):
            assert await volume.values.read(value, at, BLOCK) == data[at : at + BLOCK]
            while volume.sectors._reader._fetching:
                await trio.sleep(0.001)
        size = volume.sectors.cache.size // SECTOR_SIZE
        assert size <= 9 if near else size >= 12


@pytest.mark.parametrize("near", [True, False])
async def test_a_disk_of_this_machine_is_read_fewer_sectors_ahead_and_one_thread_opens_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, near: bool
) -> None:
    size, count = 2 << 20, 8
    data = noise(count * size)
    value = await stored(tmp_path, data, size)
    if not near:
        monkeypatch.setattr("storage.quick_reads.QuickReads.near", lambda *_: False)
    opening, together = 0, list[int]()

    def watched(key: bytes, expected: ShardHeader, first: int, blocks: memoryview, plain: memoryview) -> None:
        nonlocal opening
        opening += 1
        together.append(opening)
        time.sleep(0.02)
        open_blocks_into(key, expected, first, blocks, plain)
        opening -= 1

    # Where a second process opens them, none of this holds anybody up.
    monkeypatch.setattr(DISKS, "wanted", False)
    monkeypatch.setattr(SEALING, "wanted", False)
    monkeypatch.setattr("storage.coprocess.sealer.open_blocks_into", watched)
    async with opened(tmp_path / "v", options=replace(QUIET, cache=20 * size)) as volume:
        assert await volume.values.read(value, 0, 4 * BLOCK) == data[: 4 * BLOCK]
        with trio.fail_after(20):
            while volume.sectors._reader._fetching:
                await trio.sleep(0.001)
        ahead = (AHEAD_NEAR if near else AHEAD) + 1
        assert volume.sectors.cache.size // (size * 9 // 10) == ahead
    assert len(together) >= ahead
    assert set(together) == {1}


async def test_what_is_read_next_is_fetched_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader waits for the first of five sectors: trio would begin with any."""
    data = noise(6 * SECTOR_SIZE)
    value = await stored(tmp_path, data)
    asked: list[int] = []
    fetch = ShardReader.fetch

    async def watched(self: ShardReader, sector_id: int, *args: Any) -> Any:
        asked.append(sector_id)
        return await fetch(self, sector_id, *args)

    monkeypatch.setattr(ShardReader, "fetch", watched)
    # Trio orders tasks by the toss of a coin.
    for _ in range(8):
        async with opened(tmp_path / "v", options=replace(QUIET, cache=20 * SECTOR_SIZE)) as volume:
            asked.clear()
            assert await volume.values.read(value, 0, 4 * BLOCK) == data[: 4 * BLOCK]
            order = [extent.sector_id for extent in extents_between(volume.store, value, 0, len(data), 100)]
            assert len(asked) > 2
            assert asked == order[: len(asked)]


@pytest.mark.parametrize("near", [True, False])
async def test_so_many_are_fetched_at_once_and_nobody_waits_for_those_that_nobody_brings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, near: bool
) -> None:
    data = noise(8 * SECTOR_SIZE)
    value = await stored(tmp_path, data)
    if not near:
        monkeypatch.setattr("storage.quick_reads.QuickReads.near", lambda *_: False)
    under_way, go_on = 0, trio.Event()
    fetch = ShardReader.fetch

    async def slowly(self: ShardReader, *args: Any) -> Any:
        nonlocal under_way
        under_way += 1
        await go_on.wait()
        return await fetch(self, *args)

    monkeypatch.setattr(ShardReader, "fetch", slowly)
    monkeypatch.setattr("storage.sectors.reader.AHEAD_NEAR", AHEAD)
    async with opened(tmp_path / "v", options=replace(QUIET, cache=40 * SECTOR_SIZE)) as volume:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(volume.values.read, value, 0, 4 * BLOCK)
            await trio.testing.wait_all_tasks_blocked(0.05)
            fetching = volume.sectors._reader._fetching
            waited_for = list(fetching.values())
            assert len(waited_for) == AHEAD + 1
            assert under_way == (AT_ONCE if near else AHEAD + 1)
            nursery.cancel_scope.cancel()
        # Whoever wanted them is gone; they come all the same.
        go_on.set()
        with trio.fail_after(20):
            while fetching:
                await trio.sleep(0.001)
        assert under_way == AHEAD + 1
        assert all(event.is_set() for event in waited_for)


async def test_a_volume_that_is_closed_leaves_no_reader_waiting_for_what_was_to_be_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await make(tmp_path / "v", host_dirs(tmp_path, 1))
    async with opened(tmp_path / "v") as volume:
        value = new_value(volume)
        await append(volume, value, noise(8 * SECTOR_SIZE))
        await volume.flush()

    async def never(*_: object) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(ShardReader, "fetch", never)
    monkeypatch.setattr("storage.sectors.reader.AHEAD_NEAR", AHEAD)
    async with opened(tmp_path / "v", options=replace(QUIET, cache=40 * SECTOR_SIZE)) as volume:
        with trio.move_on_after(0.1):
            await volume.values.read(value, 0, 4 * BLOCK)
        reader = volume.sectors._reader
        events = list(reader._fetching.values())
        assert len(events) > AT_ONCE
    assert not reader._fetching
    assert all(event.is_set() for event in events)


async def test_a_disk_that_hangs_does_not_hold_up_who_reads_from_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await make(tmp_path / "v", host_dirs(tmp_path, 2))
    data = noise(2 * SECTOR_SIZE)
    async with opened(tmp_path / "v") as volume:
        values = [new_value(volume) for _ in range(12)]
        for value in values:
            await append(volume, value, data)
        await volume.flush()
        sectors = {value: [extent.sector_id for extent in extents_between(volume.store, value, 0, len(data), 100)] for value in values}
        hosts = {sector: volume.sectors.record(sector).shards[0].hosts[0] for found in sectors.values() for sector in found}
    hanging = hosts[sectors[values[0]][0]]
    fetch = ShardReader.fetch

    async def hangs(self: ShardReader, sector_id: int, *args: Any) -> Any:
        if hosts[sector_id] == hanging:
            await trio.sleep_forever()
        return await fetch(self, sector_id, *args)

    on_hanging = [value for value in values if hosts[sectors[value][0]] == hanging]
    on_other = [value for value in values if hosts[sectors[value][0]] != hanging]
    assert len(on_hanging) > 2
    assert on_other
    monkeypatch.setattr(ShardReader, "fetch", hangs)
    monkeypatch.setattr("storage.sectors.reader.PREFETCHES", 100)
    async with opened(tmp_path / "v", options=replace(QUIET, cache=100 * SECTOR_SIZE)) as volume, trio.open_nursery() as nursery:
        for value in on_hanging:
            nursery.start_soon(volume.values.read, value, 0, 4 * BLOCK)
        await trio.testing.wait_all_tasks_blocked(0.05)
        with trio.fail_after(20):
            for value in on_other:
                assert await volume.values.read(value, 0, 4 * BLOCK) == data[: 4 * BLOCK]
        nursery.cancel_scope.cancel()


def test_places_know_what_they_were_told_last() -> None:
    known = Places()
    known.add([Extent(1, 0, 10, 0, 100), Extent(1, 100, 11, 0, 50), Extent(2, 0, 12, 0, 10)])
    assert known.find(1, 99) == Extent(1, 0, 10, 0, 100)
    assert known.find(1, 100) == Extent(1, 100, 11, 0, 50)
    assert known.find(1, 150) is None
    assert known.find(3, 0) is None
    # Merged: what lay there is not known any more.
    known.add([Extent(1, 50, 13, 0, 100)])
    assert known.find(1, 120) == Extent(1, 50, 13, 0, 100)
    assert known.find(1, 20) is None
    known.forget(1)
    assert known.find(1, 120) is None
    assert known.find(2, 5) == Extent(2, 0, 12, 0, 10)


def test_places_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "VALUES", 3)
    monkeypatch.setattr(places, "EXTENTS", 4)
    known = Places()
    for value in range(1, 10):
        for at in range(20):
            known.add([Extent(value, at * 10, at + 1, 0, 10)])
            assert known.find(value, at * 10 + 5) == Extent(value, at * 10, at + 1, 0, 10)
    assert sum(known.find(value, 195) is not None for value in range(1, 10)) == 3
    assert sum(known.find(9, at * 10) is not None for at in range(20)) <= 4


async def test_what_lies_in_several_sectors_is_not_waited_for_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece could take as long as one may: only what lies in one is waited for."""
    data = noise(3 * SECTOR_SIZE)
    value = await stored(tmp_path, data)
    async with opened(tmp_path / "v") as volume:
        volume.host_io.quick.more_coming = lambda: False
        end = extents_between(volume.store, value, 0, 1, 1)[0].end
        for at in (end - 5, 5):
            assert await volume.values.read(value, at, 10) == data[at : at + 10]
        volume.sectors.cache._blocks.clear()
        looked = 0

        def never(*_: object) -> None:
            nonlocal looked
            looked += 1

        monkeypatch.setattr("storage.hosts.tree.Tree.read_now", never)
        monkeypatch.setattr("storage.hosts.tree.Tree.holds", lambda *_: True)
        assert volume.values.read_now(value, end - 5, 10) is None
        assert looked == 0
        assert volume.values.read_now(value, 5, 10) is None
        assert looked > 0
