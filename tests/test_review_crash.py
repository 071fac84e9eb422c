"""Crash safety, defect by defect: each test failed once. What a volume promises while hosts refuse, tasks die and the journal fills."""

from __future__ import annotations

import random
import secrets
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from storage.errors import Corrupt, Fenced, FusefsError, NoSpace, Unavailable
from storage.hosts.faults import shards_only
from storage.interfaces import Batch
from storage.metadata.keys import FREED, ORPHAN, SECTOR, prefix_end, u64
from storage.namespace.records import inode_key
from storage.values import shipping
from storage.values.packing import parse_table
from storage.values.records import extents_between
from storage.volume import Volume, VolumeOptions
from storage.wiring import open_volume
from tests.host_rig import FaultyOpener
from tests.rig import PASSPHRASE, QUIET, append, contents, free, host_dirs, make, new_value, noise, published
from tests.rig import SECTOR as SECTOR_SIZE

PAYLOAD = SECTOR_SIZE - 4096


@asynccontextmanager
async def opened(path: Path, opener: FaultyOpener | None = None, options: VolumeOptions = QUIET) -> AsyncIterator[Volume]:
    async with open_volume(path, passphrase=PASSPHRASE, options=options, opener=opener) as volume:
        yield volume


def crash_copy(path: Path) -> Path:
    """What kill -9 now would leave of the volume's directory."""
    to = path.with_name(f"{path.name}-{secrets.token_hex(4)}")
    shutil.copytree(path, to)
    return to


async def until(condition: object, seconds: float = 10.0) -> None:
    assert callable(condition)
    with trio.fail_after(seconds):
        while not condition():
            await trio.sleep(0.01)


def sectors_on_record(volume: Volume) -> list[int]:
    return [int.from_bytes(key[1:], "big") for key, _ in volume.store.scan(SECTOR, prefix_end(SECTOR), 1_000_000)]


def shards_on(path: Path) -> list[Path]:
    return sorted(entry for entry in path.rglob("*") if entry.is_file() and "/sectors/" in str(entry))


# ------------------------------------------------------------------------------------------------------------- fsync


async def test_fsync_has_what_flies_behind_a_refused_sector(tmp_path: Path) -> None:
    """I6: nobody waits for a flight behind a parked one, so the journal must take its bytes."""
    url = host_dirs(tmp_path, 1)[0]
    await make(tmp_path / "v", [url])
    opener = FaultyOpener()
    data = noise(2 * PAYLOAD + 100)
    async with opened(tmp_path / "v", opener) as volume:
        faults = opener.faults[url]
        faults.only, faults.gone = shards_only, "away"
        value = new_value(volume)
        await append(volume, value, data[:PAYLOAD])
        await until(lambda: volume.values.shipper.trouble is not None)
        faults.gone, faults.hang = None, True
        await append(volume, value, data[PAYLOAD:])
        with trio.fail_after(5):
            await volume.values.commit(value)
        left = crash_copy(tmp_path / "v")
        faults.hang = False
        # Dead at this point: it tells the hosts nothing more.
        volume.publisher = None
    async with opened(left) as volume:
        assert await contents(volume, value) == data


async def test_recovered_pieces_count_in_whatever_order_the_journal_has_them(tmp_path: Path) -> None:
    """A tail that was written to the journal once more stands behind its own end there."""
    await make(tmp_path / "v")
    data = noise(300)
    async with opened(tmp_path / "v") as volume:
        value = new_value(volume)
        volume.values.recover({value: [(100, data[100:200]), (200, data[200:]), (0, data[:150])]})
        assert await contents(volume, value) == data


async def test_a_cancelled_volume_commits_what_was_flying(tmp_path: Path) -> None:
    url = host_dirs(tmp_path, 1)[0]
    await make(tmp_path / "v", [url])
    opener = FaultyOpener()
    data = noise(PAYLOAD + 1000)
    value = 0
    with trio.fail_after(15), trio.CancelScope() as scope:
        async with opened(tmp_path / "v", opener) as volume:
            faults = opener.faults[url]
            faults.only, faults.hang = shards_only, True
            value = new_value(volume)
            await append(volume, value, data)
            await trio.sleep(0.2)
            scope.cancel()
            await trio.sleep_forever()
    async with opened(tmp_path / "v") as volume:
        assert await contents(volume, value) == data


# ------------------------------------------------------------------------------------------------------------- flush


async def test_flush_ends_though_refused_sectors_keep_being_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sector is waited for once: of several that are tried again and again one always is on its way."""
    monkeypatch.setattr(shipping, "RETRY_FIRST", 0.05)
    monkeypatch.setattr(shipping, "RETRY_LAST", 0.05)
    url = host_dirs(tmp_path, 1)[0]
    await make(tmp_path / "v", [url])
    opener = FaultyOpener()
    async with opened(tmp_path / "v", opener) as volume:
        faults = opener.faults[url]
        chance = random.Random(7)

        def each_in_its_own_time(operation: str, name: str) -> bool:
            faults.latency = chance.uniform(0.1, 0.5)
            return shards_only(operation, name)

        faults.only, faults.error_rate = each_in_its_own_time, 1.0
        for _ in range(10):
            await append(volume, new_value(volume), noise(PAYLOAD))
        with trio.fail_after(4), pytest.raises(Unavailable):
            await volume.flush()
        faults.error_rate = 0.0


async def test_flush_ends_though_others_go_on_writing(tmp_path: Path) -> None:
    url = host_dirs(tmp_path, 1)[0]
    await make(tmp_path / "v", [url])
    opener = FaultyOpener()
    async with opened(tmp_path / "v", opener) as volume:
        faults = opener.faults[url]
        faults.only, faults.latency = shards_only, 0.3

        async def busy() -> None:
            while True:
                value = new_value(volume)
                await append(volume, value, noise(PAYLOAD))
                await trio.sleep(0.1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(busy)
            await trio.sleep(0.3)
            with trio.fail_after(4):
                await volume.flush()
            nursery.cancel_scope.cancel()
        faults.latency = 0.0


# ------------------------------------------------------------------------------------------- what must not be left behind


async def test_a_late_copy_of_a_freed_sector_is_deleted_with_the_others(tmp_path: Path) -> None:
    urls = host_dirs(tmp_path, 3)
    await make(tmp_path / "v", urls, "3")
    opener = FaultyOpener()
    async with opened(tmp_path / "v", opener) as volume:
        slow = opener.faults[urls[2]]
        slow.only, slow.latency = shards_only, 0.5
        value = new_value(volume, "3")
        await append(volume, value, noise(PAYLOAD))
        await until(lambda: not volume.values.pending_bytes)
        free(volume, value)
        while volume.values._reclaimer.step():
            pass
        await volume.sectors.wait_uploads()
        with trio.fail_after(20):
            while volume.store.scan(FREED, prefix_end(FREED), 1):
                await published(volume)
                await trio.sleep(0.05)
        assert [len(shards_on(tmp_path / f"host{i}")) for i in range(3)] == [0, 0, 0]


async def test_a_failed_store_sends_nothing_more_to_hosts(tmp_path: Path) -> None:
    """What is sent then can never be pointed to, nor deleted: each attempt would stay on the hosts for ever (I7)."""
    url = host_dirs(tmp_path, 1)[0]
    await make(tmp_path / "v", [url])
    with pytest.raises(Fenced):
        async with opened(tmp_path / "v", FaultyOpener()) as volume:
            value = new_value(volume)
            await append(volume, value, noise(1000))
            await volume.sectors.allocate_sector()
            await volume.commit()
            await volume.sectors.allocate_sector()
            volume.store._committer._fail("the disk is gone")
            await volume.values.shipper.gather()
            await trio.sleep(0.3)
            with pytest.raises(Fenced):
                await volume.sectors.write_sector(await volume.sectors.allocate_sector(), b"x", "1")
            assert shards_on(tmp_path / "host0") == []
            assert await contents(volume, value) != b""
            await volume.flush()


# ------------------------------------------------------------------------------------------------------ what must not stop


async def test_a_long_path_does_not_make_a_sector_too_long(tmp_path: Path) -> None:
    await make(tmp_path / "v")
    async with opened(tmp_path / "v") as volume:
        # Names that do not compress, of a length POSIX allows.
        long = b"/".join(secrets.token_bytes(255).replace(b"/", b"x").replace(b"\0", b"y") for _ in range(17))
        volume.values.set_path_of(lambda _ino: long)
        value, data = new_value(volume), noise(PAYLOAD)
        await append(volume, value, data)
        other, rest = new_value(volume), noise(PAYLOAD - 1)
        await append(volume, other, rest)
        with trio.fail_after(10):
            await volume.flush()
        assert await contents(volume, value) == data
        assert await contents(volume, other) == rest


async def test_a_directory_renamed_while_its_files_wait_does_not_make_a_sector_too_long(tmp_path: Path) -> None:
    await make(tmp_path / "v")
    async with opened(tmp_path / "v") as volume:
        volume.values.set_path_of(lambda _ino: b"a")
        sizes = (PAYLOAD - 5000, 8700)
        values = [new_value(volume) for _ in sizes]
        for value, size in zip(values, sizes, strict=True):
            await append(volume, value, noise(size))
        await volume.values.shipper.gather()
        assert len(volume.values.shipper._cargos) == 1
        volume.values.set_path_of(lambda _ino: secrets.token_bytes(4096))
        with trio.fail_after(10):
            await volume.flush()


async def test_a_damaged_name_does_not_stop_the_gathering(tmp_path: Path) -> None:
    def damaged(_ino: int) -> bytes | None:
        raise Corrupt("inode 7: its parents form a circle")

    await make(tmp_path / "v")
    async with opened(tmp_path / "v", options=replace(QUIET, flush_interval=0.1)) as volume:
        volume.values.set_path_of(damaged)
        value = new_value(volume)
        await append(volume, value, b"goes on")
        await until(lambda: not volume.values.pending_bytes)
        assert await contents(volume, value) == b"goes on"


async def test_a_damaged_orphan_does_not_take_the_volume_down(tmp_path: Path) -> None:
    await make(tmp_path / "v")
    async with opened(tmp_path / "v") as volume:
        batch = Batch()
        batch.put(ORPHAN + u64(77), b"")
        batch.put(inode_key(77), b"damaged")
        volume.store.apply(batch)
    async with opened(tmp_path / "v") as volume:
        await trio.sleep(0.3)
        await volume.commit()


async def test_a_full_journal_is_emptied_while_hosts_take_what_it_holds(tmp_path: Path) -> None:
    """Commits too small to leave room for another fill the last segment to the brim; one tail keeps the first."""
    await make(tmp_path / "v")
    options = replace(QUIET, journal_segment=32 * 1024, journal_limit=256 * 1024)
    async with opened(tmp_path / "v", options=options) as volume:
        pinned = new_value(volume)
        await append(volume, pinned, noise(100))
        await volume.values.commit(pinned)
        step = 0
        with trio.fail_after(25):
            while step < 3000:
                batch = Batch()
                batch.put(b"wreview%d" % (step % 10), noise(100 + step % 37))
                volume.store.apply(batch)
                await volume.store.commit()
                step += 1
        assert volume.store.journal_fill < 0.8


async def test_a_journal_that_stays_full_does_not_fill_memory(tmp_path: Path) -> None:
    """I7: tails written once more wait for that once, however often the journal asks."""
    url = host_dirs(tmp_path, 1)[0]
    await make(tmp_path / "v", [url])
    opener = FaultyOpener()
    options = replace(QUIET, journal_segment=64 * 1024, journal_limit=512 * 1024)
    async with opened(tmp_path / "v", opener, options) as volume:
        faults = opener.faults[url]
        faults.only, faults.gone = shards_only, "away"
        value = new_value(volume)
        await append(volume, value, noise(220_000))
        await volume.values.commit(value)
        await volume.values.shipper.gather()
        await until(lambda: volume.values.shipper.trouble is not None)
        other = new_value(volume)
        # Without asking: `reserve` would refuse what the journal cannot take.
        volume.values.append_now(other, noise(220_000))
        async with trio.open_nursery() as nursery:

            async def committer() -> None:
                while True:
                    try:
                        await volume.commit()
                    except FusefsError:
                        await trio.sleep(0.01)

            for _ in range(5):
                nursery.start_soon(committer)
            for _ in range(8):
                volume.values.shipper._relog()
                await trio.sleep(0.2)
                assert volume.store._pending.tail_bytes <= 2 * volume.values.pending_bytes
                nursery.start_soon(committer)
            nursery.cancel_scope.cancel()
        faults.gone = None
        with trio.fail_after(20):
            await volume.flush()


# ------------------------------------------------------------------------------------------------------------- merging


async def test_a_value_freed_while_it_is_merged_is_no_damage(tmp_path: Path) -> None:
    await make(tmp_path / "v")
    async with opened(tmp_path / "v") as volume:
        values = [new_value(volume) for _ in range(4)]
        for value in values:
            await append(volume, value, noise(1000))
            await volume.flush()
        group = list(volume.sectors.partials._partials.values())
        real = volume.sectors._reader.read_sector
        freed = False

        async def reading(sector_id: int) -> bytes:
            nonlocal freed
            data = await real(sector_id)
            if sector_id == group[2].sector_id and not freed:
                freed = True
                free(volume, values[0])
            return data

        volume.sectors._reader.read_sector = reading  # type: ignore[method-assign]
        await volume.values._merger.merge(group)
        for value in values[1:]:
            assert len(await contents(volume, value)) == 1000
        await until(lambda: len(sectors_on_record(volume)) == 1)


async def test_a_sector_that_cannot_be_read_does_not_stop_all_merging(tmp_path: Path) -> None:
    url = host_dirs(tmp_path, 1)[0]
    await make(tmp_path / "v", [url])
    async with opened(tmp_path / "v") as volume:
        expected = {}
        for i in range(20):
            value = new_value(volume)
            expected[value] = noise(1000)
            await append(volume, value, expected[value])
            if i == 2:
                volume.sectors.cache._blocks.clear()
            await volume.flush()
            if i == 2:
                sector_id = extents_between(volume.store, value, 0, 1, 1)[0].sector_id
                root = volume.sectors.record(sector_id).shards[0].root.hex()
                next(shard for shard in shards_on(tmp_path / "host0") if shard.name == root).write_bytes(b"")
                del expected[value]
        await until(lambda: len(sectors_on_record(volume)) <= 8)
        for value, data in expected.items():
            assert await contents(volume, value) == data


async def test_a_merge_that_fails_leaves_no_empty_sector_on_record(tmp_path: Path) -> None:
    await make(tmp_path / "v")
    async with opened(tmp_path / "v") as volume:
        values = [new_value(volume) for _ in range(4)]
        for value in values:
            await append(volume, value, noise(1000))
            await volume.flush()
        group = list(volume.sectors.partials._partials.values())
        real = volume.sectors.write_sector

        async def refused(sector_id: int, data: object, replication: str) -> None:
            free(volume, values[0])
            while volume.values._reclaimer.step():
                pass
            raise NoSpace("full")

        volume.sectors.write_sector = refused  # type: ignore[method-assign]
        with pytest.raises(NoSpace):
            await volume.values._merger.merge(group)
        volume.sectors.write_sector = real  # type: ignore[method-assign]
        assert len(sectors_on_record(volume)) == 3
        for sector_id in sectors_on_record(volume):
            assert volume.sectors.record(sector_id).live == 1000
            assert parse_table(await volume.sectors.read_sector(sector_id))
