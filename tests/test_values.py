"""Values over real sectors: what was appended is what is read, across cutting, gathering, merging, freeing, crashes and refusing hosts."""

from __future__ import annotations

import gc
import random
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from storage.coprocess.arena import Arena
from storage.errors import Corrupt, Exists, NoSpace, NotFound
from storage.interfaces import Batch, SealedShard
from storage.metadata.keys import EXTENT, FREED, GARBAGE, SECTOR, prefix_end
from storage.metadata.store import Store
from storage.sectors.upload import Upload
from storage.values.blocks import LARGE
from storage.values.packing import parse_table
from storage.values.records import extents_between
from storage.values.tail import Cargo, Flight
from storage.volume import Volume
from tests.rig import QUIET, append, contents, free, host_dirs, make, new_value, noise, opened, published
from tests.rig import SECTOR as SECTOR_SIZE
from tests.sweeping import TestGate
from tests.values_child import stream


def extents_of(volume: Volume, value_id: int) -> int:
    return len(extents_between(volume.store, value_id, 0, 1 << 60, 1_000_000))


def sectors_on_record(volume: Volume) -> int:
    return len(volume.store.scan(SECTOR, prefix_end(SECTOR), 1_000_000))


def shards_on(path: Path) -> list[Path]:
    return sorted(entry for entry in path.rglob("*") if entry.is_file() and "/sectors/" in str(entry))


async def settled(volume: Volume, seconds: float = 20.0) -> None:
    """Until merging and reclaim have nothing to do and no freed sector is left on a host."""
    with trio.fail_after(seconds):
        while True:
            await volume.commit()
            await published(volume)
            if (
                volume.sectors.partials.due() is None
                and not volume.sectors.partials.held
                and not volume.store.scan(GARBAGE, prefix_end(GARBAGE), 1)
                and not volume.store.scan(FREED, prefix_end(FREED), 1)
            ):
                return
            await trio.sleep(0.05)


async def test_bytes_come_back_through_tails_flights_and_sectors(tmp_path: Path) -> None:
    await make(tmp_path / "v")
    data = noise(3 * SECTOR_SIZE + 12345)
    async with opened(tmp_path / "v") as volume:
        value = new_value(volume)
        for start in range(0, len(data), 50_000):
            await append(volume, value, data[start : start + 50_000])
            assert await volume.values.read(value, max(0, start - 10), 100) == data[max(0, start - 10) :][:100]
        assert await contents(volume, value) == data
        await volume.flush()
        assert volume.values.pending_bytes == 0
        assert await contents(volume, value) == data
        assert await volume.values.read(value, len(data) - 5, 100) == data[-5:]
        assert await volume.values.read(value, len(data), 100) == b""
    async with opened(tmp_path / "v") as volume:
        assert await contents(volume, value) == data


async def test_an_uncommitted_append_may_be_lost_but_a_committed_one_never_is(tmp_path: Path) -> None:
    await make(tmp_path / "v", host_dirs(tmp_path, 1))
    value, at = await killed(tmp_path / "v", 0, 100_000, 50_000, 0)
    async with opened(tmp_path / "v") as volume:
        assert volume.values.size_of(value) in (at, at + 50_000)
        assert await contents(volume, value) == stream(0, volume.values.size_of(value))


async def test_a_thousand_small_files_share_sectors_and_keep_their_bytes(tmp_path: Path) -> None:
    urls = host_dirs(tmp_path, 2)
    await make(tmp_path / "v", urls, "2")
    async with opened(tmp_path / "v") as volume:
        values = []
        for i in range(1000):
            value = new_value(volume)
            await append(volume, value, b"%06d" % i * (i % 300))
            values.append(value)
        await volume.flush()
        assert sectors_on_record(volume) <= 1000 * 300 * 6 // 2 // SECTOR_SIZE + 2
        for i, value in enumerate(values):
            assert await contents(volume, value) == b"%06d" % i * (i % 300)
            assert extents_of(volume, value) <= 1
        for sector in volume.store.scan(SECTOR, prefix_end(SECTOR), 5):
            sector_id = int.from_bytes(sector[0][1:], "big")
            entries = parse_table(await volume.sectors.read_sector(sector_id))
            assert len(entries) > 1
            for entry in entries:
                found = extents_between(volume.store, entry.value_id, entry.offset, entry.offset + 1, 1)[0]
                assert (found.sector_id, found.position, found.length) == (sector_id, entry.position, entry.length)
    assert [p.name for p in shards_on(tmp_path / "host0")] == [p.name for p in shards_on(tmp_path / "host1")] != []


async def test_eight_partial_sectors_become_one_and_the_old_ones_leave_the_hosts(tmp_path: Path) -> None:
    urls = host_dirs(tmp_path, 1)
    await make(tmp_path / "v", urls)
    async with opened(tmp_path / "v") as volume:
        value, expected = new_value(volume), b""
        for i in range(64):
            piece = noise(600 + i)
            expected += piece
            await append(volume, value, piece)
            await volume.flush()
        await settled(volume)
        assert await contents(volume, value) == expected
        assert extents_of(volume, value) <= 9
        assert extents_of(volume, value) <= sectors_on_record(volume)
        assert len(shards_on(tmp_path / "host0")) == sectors_on_record(volume)
        volume.sectors.cache._blocks.clear()
        assert await contents(volume, value) == expected
    async with opened(tmp_path / "v") as volume:
        assert await contents(volume, value) == expected


async def test_freed_values_leave_nothing_behind(tmp_path: Path) -> None:
    urls = host_dirs(tmp_path, 1)
    await make(tmp_path / "v", urls)
    async with opened(tmp_path / "v") as volume:
        values = [new_value(volume) for _ in range(50)]
        for value in values:
            await append(volume, value, noise(SECTOR_SIZE // 3))
        await volume.flush()
        kept = values.pop(7)
        expected = await contents(volume, kept)
        assert sectors_on_record(volume) > 10
        for value in values:
            free(volume, value)
        with pytest.raises(NotFound):
            volume.values.size_of(values[0])
        await settled(volume)
        assert sectors_on_record(volume) == 1 == len(shards_on(tmp_path / "host0"))
        assert await contents(volume, kept) == expected
        free(volume, kept)
        await settled(volume)
        assert sectors_on_record(volume) == 0 == len(shards_on(tmp_path / "host0"))
        assert volume.store.scan(EXTENT, prefix_end(EXTENT), 1) == []


async def test_a_value_freed_while_its_bytes_fly_leaves_nothing_behind(tmp_path: Path) -> None:
    urls = host_dirs(tmp_path, 1)
    await make(tmp_path / "v", urls)
    async with opened(tmp_path / "v") as volume:
        value = new_value(volume)
        await append(volume, value, noise(3 * SECTOR_SIZE + 5))
        free(volume, value)
        assert volume.values.pending_bytes == 0
        await volume.flush()
        await settled(volume)
        assert sectors_on_record(volume) == 0 == len(shards_on(tmp_path / "host0"))


async def test_nearly_dead_sectors_are_copied_together(tmp_path: Path) -> None:
    urls = host_dirs(tmp_path, 1)
    await make(tmp_path / "v", urls)
    async with opened(tmp_path / "v") as volume:
        keep: dict[int, bytes] = {}
        for _ in range(10):
            small, big = new_value(volume), new_value(volume)
            keep[small] = noise(1000)
            await append(volume, small, keep[small])
            await append(volume, big, noise(SECTOR_SIZE - 20_000))
            await volume.flush()
            free(volume, big)
        await settled(volume)
        assert sectors_on_record(volume) < 8
        assert sum(shard.stat().st_size for shard in shards_on(tmp_path / "host0")) < SECTOR_SIZE + 10 * 2000
        for value, expected in keep.items():
            assert await contents(volume, value) == expected


async def test_a_damaged_copy_is_passed_over_and_said(tmp_path: Path) -> None:
    urls = host_dirs(tmp_path, 2)
    await make(tmp_path / "v", urls, "2")
    data = noise(100_000)
    async with opened(tmp_path / "v") as volume:
        value = new_value(volume)
        await append(volume, value, data)
        await volume.flush()
    for shard in shards_on(tmp_path / "host0"):
        raw = bytearray(shard.read_bytes())
        raw[70] ^= 1
        shard.write_bytes(raw)
    for _ in range(4):
        async with opened(tmp_path / "v") as volume:
            assert await contents(volume, value) == data
            sector_id = extents_between(volume.store, value, 0, 1, 1)[0].sector_id
            assert (await volume.sectors.read_sector(sector_id))[: len(data)] == data
    for shard in shards_on(tmp_path / "host1"):
        shard.write_bytes(shard.read_bytes()[:-20])
    async with opened(tmp_path / "v") as volume:
        with pytest.raises(Corrupt, match="no copy can be read"):
            await volume.sectors.read_sector(sector_id)
        # Only the first block of one copy is damaged and only the end of the other is cut: what verifies is still served.
        assert await volume.values.read(value, 70_000, 1000) == data[70_000:71_000]
        status = await volume.status()
        assert any("could not be used" in warning for warning in status.warnings)


async def test_a_sector_is_written_once(tmp_path: Path) -> None:
    await make(tmp_path / "v")
    async with opened(tmp_path / "v") as volume:
        sector_id = await volume.sectors.allocate_sector()
        await volume.sectors.write_sector(sector_id, b"first", "1")
        with pytest.raises(Exists):
            await volume.sectors.write_sector(sector_id, b"second", "1")
        assert await volume.sectors.read_sector(sector_id) == b"first"
        assert await volume.sectors.insecure_read_sector_at(sector_id, 1, 3) == b"irs"
        assert await volume.sectors.insecure_read_sector_at(sector_id, 3, 300) == b"st"
        await volume.sectors.delete(sector_id)
        with pytest.raises(NotFound):
            await volume.sectors.read_sector(sector_id)
        assert await volume.sectors.allocate_sector() > sector_id


async def test_a_sector_nobody_points_to_is_gone_after_the_next_open(tmp_path: Path) -> None:
    urls = host_dirs(tmp_path, 1)
    await make(tmp_path / "v", urls)
    async with opened(tmp_path / "v") as volume:
        await volume.sectors.write_sector(await volume.sectors.allocate_sector(), b"orphan", "1")
        assert len(shards_on(tmp_path / "host0")) == 1
    async with opened(tmp_path / "v") as volume:
        await settled(volume)
        assert shards_on(tmp_path / "host0") == []
        assert volume.sectors.count == 0


async def test_sectors_that_their_tables_fill_are_not_merged_into_as_many(tmp_path: Path) -> None:
    """Of files of a line each a sector is full when its data is a fifth of it: merging would go on for ever, and gain nothing. Once most of
    them are freed, it does gain something."""
    await make(tmp_path / "v", host_dirs(tmp_path, 1), sector_size=64 * 1024)
    lines: dict[int, bytes] = {}
    async with opened(tmp_path / "v") as volume:
        for _ in range(10):
            for _ in range(700):
                value = new_value(volume)
                lines[value] = b"line of %9d\n" % value
                await append(volume, value, lines[value])
            await volume.flush()
        before = await volume.sectors.allocate_sector(volume.config.replication)
        await settled(volume)
        assert sectors_on_record(volume) == 10
        # Not one was written.
        assert await volume.sectors.allocate_sector(volume.config.replication) == before + 1
        assert volume.sectors.partials.due() is None
    async with opened(tmp_path / "v") as volume:
        # Known from the beginning: else each mount would read all of them.
        assert volume.sectors.partials.due() is None
        for number, value in enumerate(list(lines)):
            if number % 8:
                free(volume, value)
                del lines[value]
        await settled(volume)
        assert sectors_on_record(volume) < 6
        for value, line in lines.items():
            assert await contents(volume, value) == line


async def test_full_hosts_refuse_the_writer_and_lose_nothing(tmp_path: Path) -> None:
    await make(tmp_path / "v", ["mem:full"])
    options = replace(QUIET, tail_budget=4 * SECTOR_SIZE)
    from storage.hosts.memory import memory_content

    content = memory_content("full")
    async with opened(tmp_path / "v", options=options) as volume:
        value, accepted = new_value(volume), b""
        content.capacity = content.used() + 2 * SECTOR_SIZE
        with pytest.raises(NoSpace), trio.fail_after(20):
            while True:
                piece = noise(20_000)
                await volume.values.reserve(value, len(piece))
                volume.values.append_now(value, piece)
                accepted += piece
        assert len(accepted) >= 4 * SECTOR_SIZE - 20_000
        assert await contents(volume, value) == accepted
        assert not volume.values.accepting()
        with trio.fail_after(10):
            await volume.values.commit(value)
        with pytest.raises(NoSpace):
            await volume.flush()
        content.capacity = None
        with trio.fail_after(20):
            await volume.flush()
        assert volume.values.accepting()
        await append(volume, value, b"goes on")
        assert await contents(volume, value) == accepted + b"goes on"


async def test_deletion_waits_for_a_durable_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """I3: while the commit that frees a sector is not durable, its shards stay, whatever superblocks say."""
    urls = host_dirs(tmp_path, 1)
    await make(tmp_path / "v", urls)
    async with opened(tmp_path / "v") as volume:
        value = new_value(volume)
        await append(volume, value, b"x" * 1000)
        await volume.flush()
        volume.deleter.gate = TestGate()
        free(volume, value)
        with trio.fail_after(20):
            while not volume.deleter.pending():
                volume.values._reclaimer.step()
                await trio.sleep(0.01)

        async def refuses(self: Store, *, urgent: bool = False) -> int:
            raise NoSpace("the disk is full, on purpose")

        with monkeypatch.context() as patch:
            patch.setattr(Store, "commit", refuses)
            with pytest.raises(NoSpace):
                await volume.deleter.drain()
            assert len(shards_on(tmp_path / "host0")) == 1
        await volume.deleter.drain()
        assert not shards_on(tmp_path / "host0")


async def test_after_every_kill_a_value_is_a_prefix_and_has_what_was_committed(tmp_path: Path) -> None:
    """Whatever flies when the process dies: tails, cut sectors, sectors that have landed and are not committed."""
    await make(tmp_path / "v", host_dirs(tmp_path, 1))
    value = 0
    for round_number, step in enumerate((1000, 70_000, SECTOR_SIZE, SECTOR_SIZE + 7, 300_000, 5)):
        value, at = await killed(tmp_path / "v", value, step, 90_000 * round_number, 0.02 * round_number)
        async with opened(tmp_path / "v") as volume:
            size = volume.values.size_of(value)
            assert size >= at
            assert await contents(volume, value) == stream(0, size)
            if round_number % 2:
                await volume.flush()


async def killed(path: Path, value: int, committed: int, uncommitted: int, delay: float) -> tuple[int, int]:
    """Run tests.values_child to its kill -9; (value id, bytes that were committed)."""
    done = await trio.run_process(
        [sys.executable, "-m", "tests.values_child", str(path), *map(str, (value, committed, uncommitted, delay))],
        capture_stdout=True,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == -signal.SIGKILL
    found, size = done.stdout.split()
    return int(found), int(size)


async def test_an_empty_batch_is_no_reason_to_fail(tmp_path: Path) -> None:
    await make(tmp_path / "v")
    async with opened(tmp_path / "v") as volume:
        volume.store.apply(Batch())
        await volume.commit()
        report = await volume.flush()
        assert report.degraded_sectors == 0


async def test_a_journal_is_emptied_although_the_volume_is_closed_in_the_middle_of_housekeeping(tmp_path: Path) -> None:
    """Else mounting takes longer the more was written lately, for ever: short mounts would always break it off."""
    await make(tmp_path / "v")
    options = replace(QUIET, journal_segment=1 << 20, journal_limit=256 << 20)
    async with opened(tmp_path / "v", options=options) as volume:
        for _ in range(10):
            for _ in range(2000):
                await append(volume, new_value(volume), b"x" * 200)
            await volume.commit()
        await volume.flush()
        # Housekeeping has begun, and is in the middle of asking which tails are needed, when the volume is closed.
        takeover = volume.store._takeover
        takeover.pressed = True
        takeover.kick()
        while volume.store._base.sequence < volume.store.durable_sequence:
            await trio.lowlevel.checkpoint()
    async with opened(tmp_path / "v", options=options) as volume:
        # What the last process wrote last, and what this one has begun.
        assert len(volume.store._journal.live) <= 2


async def test_bytes_that_are_in_sectors_are_let_go_without_the_collector_of_cycles(tmp_path: Path) -> None:
    """It looks seldom in a mount, and a few sectors are many megabytes."""
    await make(tmp_path / "v")
    gc.collect()
    gc.disable()
    try:
        async with opened(tmp_path / "v") as volume:
            value = new_value(volume)
            for _ in range(20):
                await append(volume, value, noise(SECTOR_SIZE))
            doomed = new_value(volume)
            await append(volume, doomed, noise(2 * SECTOR_SIZE))
            free(volume, doomed)
            await volume.flush()
            await settled(volume)
            await trio.testing.wait_all_tasks_blocked(0.05)
            left = [item for item in gc.get_objects() if isinstance(item, (Cargo, Flight, Upload, SealedShard))]
            assert not left
    finally:
        gc.enable()


@pytest.mark.parametrize("slots", [0, 1, 8])
async def test_a_long_value_comes_back_wherever_its_bytes_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slots: int) -> None:
    """What is appended in large pieces goes where another process can seal it, as far as there is room, and is never written over."""
    arena = Arena(slots=slots)
    monkeypatch.setattr("storage.values.blocks.ARENA", arena)
    path, dice, model = tmp_path / "v", random.Random(slots), {1: b"", 2: b""}
    await make(path, host_dirs(tmp_path, 1), sector_size=1 << 20)
    async with opened(path) as volume:
        values = {which: new_value(volume) for which in model}
        shared = 0
        for step in range(60):
            which = dice.choice((1, 2))
            data = dice.randbytes(dice.choice((1000, LARGE - 1, LARGE, 200_000, 700_000)))
            await append(volume, values[which], data)
            model[which] += data
            tail = volume.values._tails.get(values[which])
            shared += tail is not None and any(arena.place(piece) for piece in tail.buffer._chunks)
            del tail
            at = dice.randrange(len(model[which]))
            assert await volume.values.read(values[which], at, 300_000) == model[which][at : at + 300_000]
            if step % 20 == 19:
                await volume.values.commit(values[which])
        assert bool(shared) == bool(slots)
        for which, value in values.items():
            assert await contents(volume, value) == model[which]
        await volume.flush()
    async with opened(path) as volume:
        for which, value in values.items():
            assert await contents(volume, value) == model[which]
    # Nothing of it is held for longer than its bytes are.
    assert arena.free_slots == slots
