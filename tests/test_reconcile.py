"""Reconcile: every sector comes to its replication on hosts that keep it, whatever happens to them, and is never less safe on the way."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from storage.checking import Finding, check_volume
from storage.errors import NotFound, Unavailable
from storage.host_io import Placed
from storage.hosts.faults import shards_only
from storage.interfaces import Batch, Buffer, SealedShard
from storage.metadata.keys import LOST, SECTOR, UNDERREPLICATED, prefix_end, read_u64, u32, u64
from storage.pacing import SMOOTH, Pace
from storage.replication import parse_replication
from storage.seams import Seams
from storage.sectors.plan import make_plan
from storage.sectors.reconcile import WORKERS
from storage.sectors.records import VERSION, SectorRecord, ShardRecord, decode_sector
from storage.volume import Volume
from storage.wiring import open_volume
from tests.fakes import Crash, CrashAt, VirtualClock
from tests.host_rig import FaultyOpener
from tests.rig import PASSPHRASE, QUIET, append, contents, host_dirs, make, new_value, noise, opened, published

SIZE = 200_000


def records(volume: Volume) -> dict[int, SectorRecord]:
    found = volume.store.scan(SECTOR, prefix_end(SECTOR), 10_000)
    return {read_u64(key, 1): decode_sector(raw, read_u64(key, 1)) for key, raw in found}


def there(host: str) -> set[str]:
    """Roots of the shards a directory host holds."""
    return {path.name for path in Path(host.removeprefix("dir:")).glob("volumes/*/sectors/*/*")}


def copies(volume: Volume, hosts: list[str]) -> dict[int, int]:
    """Sector -> how many of the hosts hold its first shard, as the disks tell."""
    held = [there(host) for host in hosts]
    return {sector: sum(record.shards[0].root.hex() in roots for roots in held) for sector, record in records(volume).items()}


def as_wanted(volume: Volume, hosts: list[str]) -> bool:
    """Does every sector have exactly the copies it is to have, on record as on the disks of these hosts?"""
    wanted = parse_replication(volume.config.replication).copies
    return (
        all(len(record.shards[0].hosts) == wanted for record in records(volume).values())
        and set(copies(volume, hosts).values()) == {wanted}
        and not volume.store.scan(UNDERREPLICATED, prefix_end(UNDERREPLICATED), 10)
    )


async def fill(volume: Volume, count: int = 8) -> dict[int, bytes]:
    """Values with a sector each at least."""
    content: dict[int, bytes] = {}
    for _ in range(count):
        value = new_value(volume)
        content[value] = noise(SIZE)
        await append(volume, value, content[value])
        await volume.flush()
    await volume.sectors.wait_uploads()
    return content


async def unchanged(volume: Volume, content: dict[int, bytes]) -> bool:
    return all([await contents(volume, value) == data for value, data in content.items()])


async def delete_freed(volume: Volume) -> None:
    """What is freed leaves the hosts after two generations of superblocks (I3)."""
    for _ in range(6):
        if not await volume.deleter.drain():
            return
        await published(volume)
    raise AssertionError("freed sectors stay on hosts")


@asynccontextmanager
async def a_volume(tmp_path: Path, hosts: int, replication: str, **options: object) -> AsyncIterator[tuple[Volume, list[str]]]:
    urls = host_dirs(tmp_path, hosts)
    await make(tmp_path / "volume", urls, replication=replication)
    async with opened(tmp_path / "volume", options=replace(QUIET, **options)) as volume:  # type: ignore[arg-type]
        yield volume, urls


async def test_a_lost_host_s_shards_are_made_again_on_the_others(tmp_path: Path) -> None:
    async with a_volume(tmp_path, 4, "2") as (volume, urls):
        content = await fill(volume)
        await volume.mark_host("2", lost=True)
        assert volume.store.scan(SECTOR, prefix_end(SECTOR), 1)
        await volume.reconciler.round()
        left = [urls[0], *urls[2:]]
        assert as_wanted(volume, left)
        assert all(2 not in record.shards[0].hosts for record in records(volume).values())
        assert await unchanged(volume, content)
        assert volume.sectors.degraded() == 0


async def test_a_host_lost_while_a_sector_is_on_its_way_there_is_a_copy_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_volume(tmp_path, 3, "2", staging=0) as (volume, urls):
        real, under_way, go_on = volume.host_io.write_sealed, trio.Event(), trio.Event()
        hosts: list[int] = []

        async def slowly(contract_id: str, shard: SealedShard, placed: list[Placed] | None = None, *, beside: int = 0) -> None:
            hosts.append(volume.contractor.contract(contract_id).host_number)
            under_way.set()
            await go_on.wait()
            await real(contract_id, shard, placed)

        monkeypatch.setattr(volume.host_io, "write_sealed", slowly)
        async with trio.open_nursery() as nursery:
            value = new_value(volume)
            await append(volume, value, noise(SIZE))
            nursery.start_soon(volume.flush)
            await under_way.wait()
            await volume.mark_host(str(hosts[0]), lost=True)
            await volume.reconciler.round()
            go_on.set()
        # Whoever flushes is told, and it is not mistaken for one that may wait.
        assert volume.sectors.degraded() == 1
        monkeypatch.undo()
        await volume.reconciler.round()
        assert volume.sectors.degraded() == 0
        assert as_wanted(volume, [url for number, url in enumerate(urls, 1) if number != hosts[0]])


async def test_a_host_lost_in_the_middle_of_a_round_gets_no_more_copies_and_loses_its_own_in_the_same_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round over a large volume takes days: it must not go on with hosts as they were when it began."""
    async with a_volume(tmp_path, 5, "2") as (volume, urls):
        content = await fill(volume, 16)
        reconciler, written = volume.reconciler, list[int]()
        real, lost = volume.host_io.write_sealed, trio.Event()

        async def write(contract_id: str, shard: SealedShard) -> None:
            if lost.is_set():
                written.append(volume.contractor.contract(contract_id).host_number)
            await real(contract_id, shard)
            if not lost.is_set():
                lost.set()
                batch = Batch()
                batch.put(LOST + u32(2), u64(1))
                volume.store.apply(batch)

        monkeypatch.setattr(volume.host_io, "write_sealed", write)
        batch = Batch()
        batch.put(LOST + u32(1), u64(1))
        volume.store.apply(batch)
        await reconciler.round()
        assert as_wanted(volume, urls[2:])
        # But for those that were on their way.
        assert written.count(2) <= WORKERS
        assert await unchanged(volume, content)


async def test_a_sector_is_not_mended_while_its_bad_copy_is_replaced(tmp_path: Path) -> None:
    """The round has come to it, and waits for its turn, when the replacement begins."""
    async with a_volume(tmp_path, 4, "2") as (volume, _urls):
        await fill(volume, WORKERS + 1)
        reconciler, mender, mended = volume.reconciler, volume.mender, list[int]()
        *others, last = sorted(records(volume))
        regenerate, mend = mender._regenerate, mender.mend
        go_on, replaced = trio.Event(), trio.Event()

        async def slowly(sector_id: int, keeping: frozenset[int]) -> None:
            mended.append(sector_id)
            if sector_id in others:
                await go_on.wait()
            await mend(sector_id, keeping)

        async def held(sector_id: int, record: SectorRecord, index: int) -> SealedShard:
            await replaced.wait()
            return await regenerate(sector_id, record, index)

        mender.mend = slowly  # type: ignore[method-assign]
        batch = Batch()
        for sector in records(volume):
            batch.put(UNDERREPLICATED + u64(sector), b"")
        volume.store.apply(batch)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reconciler.round)
            await trio.testing.wait_all_tasks_blocked(0.1)
            assert sorted(mended) == others
            shard = records(volume)[last].shards[0]
            mender._regenerate = held
            nursery.start_soon(mender.replace, last, shard.root, shard.hosts[0])
            await trio.testing.wait_all_tasks_blocked(0.1)
            go_on.set()
            await trio.testing.wait_all_tasks_blocked(0.1)
            assert sorted(mended) == others
            replaced.set()


async def test_a_copy_is_made_again_from_another_host_where_the_first_hangs(tmp_path: Path) -> None:
    """Soon, and not only once the one that hangs has used up its time."""
    opener = FaultyOpener()
    urls = host_dirs(tmp_path, 4)
    await make(tmp_path / "volume", urls, replication="3")
    async with open_volume(tmp_path / "volume", passphrase=PASSPHRASE, options=replace(QUIET, cache=0), opener=opener) as volume:
        await fill(volume, 1)
        ((sector, record),) = records(volume).items()
        first = volume.hostdb.rank(record.shards[0].hosts)[0]
        opener.faults[urls[first - 1]].hang = True
        with trio.fail_after(12):
            sealed = await volume.mender._regenerate(sector, record, 0)
        assert sealed.root == record.shards[0].root.hex()
        opener.faults[urls[first - 1]].hang = False


async def test_a_host_that_is_found_to_have_forgotten_things_in_the_middle_of_a_round_does_not_get_them_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_volume(tmp_path, 3, "2") as (volume, urls):
        content = await fill(volume, 12)
        real, forgot = volume.host_io.write_sealed, False

        async def write(contract_id: str, shard: SealedShard) -> None:
            nonlocal forgot
            await real(contract_id, shard)
            if not forgot:
                forgot = True
                batch = Batch()
                volume.doubts.forgot(batch, 1)
                volume.store.apply(batch)

        monkeypatch.setattr(volume.host_io, "write_sealed", write)
        batch = Batch()
        batch.put(LOST + u32(2), u64(1))
        volume.store.apply(batch)
        with trio.fail_after(60):
            await volume.reconciler.round()
        assert as_wanted(volume, [urls[0], urls[2]])
        assert volume.reconciler.status.shards <= 12
        assert await unchanged(volume, content)


@pytest.mark.parametrize("silent", [0, 1])
async def test_a_copy_that_cannot_be_asked_for_now_is_not_taken_for_lost(tmp_path: Path, silent: int) -> None:
    """One of two hosts has lost it, the other one fails for the moment: whichever is asked last."""
    opener = FaultyOpener()
    urls = host_dirs(tmp_path, 2)
    await make(tmp_path / "volume", urls, replication="2")
    async with open_volume(tmp_path / "volume", passphrase=PASSPHRASE, options=replace(QUIET, cache=0), opener=opener) as volume:
        await fill(volume, 1)
        ((sector, record),) = records(volume).items()
        ranked = volume.hostdb.rank(record.shards[0].hosts)
        fails, lost = (urls[host - 1] for host in (ranked if silent == 0 else reversed(ranked)))
        for path in Path(lost.removeprefix("dir:")).glob("volumes/*/sectors/*/*"):
            path.unlink()
        opener.faults[fails].only, opener.faults[fails].gone = shards_only, "not now"
        with pytest.raises(Unavailable):
            await volume.mender._regenerate(sector, record, 0)


async def never(_contract_id: str, _shard: SealedShard) -> None:
    """In the place of write_sealed: what is to be done stays to be done."""
    await trio.sleep_forever()


def some_host(volume: Volume) -> str:
    """One that has something: where sectors go is a matter of chance."""
    return str(next(iter(records(volume).values())).shards[0].hosts[0])


async def test_what_is_only_to_move_is_no_damage_to_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_volume(tmp_path, 3, "2") as (volume, _urls):
        await fill(volume, 3)
        monkeypatch.setattr(volume.host_io, "write_sealed", never)
        await volume.leave_host(some_host(volume), leave=True)
        await volume.reconciler._look(volume.standing.keeping())
        assert volume.store.scan(UNDERREPLICATED, prefix_end(UNDERREPLICATED), 10)
        await volume.commit()
    monkeypatch.undo()
    found: list[Finding] = []
    await check_volume(tmp_path / "volume", passphrase=PASSPHRASE, on_finding=found.append)
    # Its values belong to no file, which is another matter.
    assert {finding.kind for finding in found if not finding.note} == {"unowned-value"}, found


async def test_what_is_to_be_made_again_elsewhere_is_known_to_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash in the middle of reconcile: copies are missing, and the list that says so is right."""
    async with a_volume(tmp_path, 3, "2") as (volume, _urls):
        await fill(volume, 3)
        monkeypatch.setattr(volume.host_io, "write_sealed", never)
        await volume.mark_host(some_host(volume), lost=True)
        await volume.reconciler._look(volume.standing.keeping())
        await volume.commit()
        assert volume.store.scan(UNDERREPLICATED, prefix_end(UNDERREPLICATED), 10)
    monkeypatch.undo()
    found: list[Finding] = []
    await check_volume(tmp_path / "volume", passphrase=PASSPHRASE, on_finding=found.append)
    assert {finding.kind for finding in found if not finding.note} == {"unowned-value", "missing-copy"}, found


async def test_a_host_that_is_left_is_empty_in_the_end_and_every_sector_has_its_copies_all_the_time(tmp_path: Path) -> None:
    async with a_volume(tmp_path, 3, "2") as (volume, urls):
        content = await fill(volume)
        await volume.leave_host(urls[0], leave=True)
        fewest: list[int] = []
        mend = volume.host_io.write_sealed

        async def watched(contract_id: str, shard: object) -> None:
            fewest.append(min(copies(volume, urls).values()))
            # On record, too: what is not named there any more is deleted before long.
            fewest.append(min(len(record.shards[0].hosts) for record in records(volume).values()))
            await mend(contract_id, shard)  # type: ignore[arg-type]

        volume.host_io.write_sealed = watched  # type: ignore[method-assign, assignment]
        await volume.reconciler.round()
        assert fewest
        assert min(fewest) == 2
        # Nothing leaves a disk before superblocks that could need it are gone.
        assert there(urls[0])
        await delete_freed(volume)
        assert there(urls[0]) == set()
        assert as_wanted(volume, urls[1:])
        assert await unchanged(volume, content)


async def test_a_host_is_left_only_as_far_as_there_is_another_one(tmp_path: Path) -> None:
    async with a_volume(tmp_path, 2, "2") as (volume, urls):
        content = await fill(volume, 2)
        await volume.leave_host("1", leave=True)
        await volume.reconciler.round()
        await delete_freed(volume)
        assert set(copies(volume, urls).values()) == {2}
        assert volume.sectors.degraded() == 0
        assert "add a host" in volume.reconciler.status.trouble
        await volume.leave_host("1", leave=False)
        await volume.reconciler.round()
        assert as_wanted(volume, urls)
        assert await unchanged(volume, content)


async def test_a_new_host_gets_its_share_and_the_others_lose_it(tmp_path: Path) -> None:
    async with a_volume(tmp_path, 2, "2") as (volume, urls):
        content = await fill(volume, 12)
        urls += host_dirs(tmp_path, 3)[2:]
        await volume.add_host(urls[2])
        await volume.reconciler.round()
        await delete_freed(volume)
        held = [len(there(url)) for url in urls]
        assert min(held) >= sum(held) / 3 * 0.7, held
        assert as_wanted(volume, urls)
        assert await unchanged(volume, content)


async def test_a_host_that_is_away_is_warned_of_until_it_is_given_up(tmp_path: Path) -> None:
    urls = host_dirs(tmp_path, 3)
    await make(tmp_path / "volume", urls, replication="2")
    shutil.rmtree(urls[1].removeprefix("dir:"))
    async with opened(tmp_path / "volume") as volume:
        assert any(urls[1] in text for text in volume.standing_warnings())
        assert any(urls[1] in text for text in (await volume.flush()).reasons)
        await volume.mark_host("2", lost=True)
        assert volume.standing_warnings() == []
        assert (await volume.flush()).reasons == ()


async def test_a_host_that_is_away_for_long_is_done_without_and_its_copies_go_when_it_is_back(tmp_path: Path) -> None:
    async with a_volume(tmp_path, 3, "2", away_grace=0.0) as (volume, urls):
        content = await fill(volume)
        (tmp_path / "host0").rename(tmp_path / "away")
        volume.hosts.suspect(1)
        await volume.hosts.retry_once()
        await volume.reconciler.round()
        assert as_wanted(volume, urls[1:])
        assert await unchanged(volume, content)
        (tmp_path / "away").rename(tmp_path / "host0")
        assert await volume.hosts.retry_once() == [1]
        await volume.reconciler.round()
        await delete_freed(volume)
        assert as_wanted(volume, urls)


async def test_what_could_not_be_read_at_first_is_no_warning_any_more_once_the_hosts_are_back(tmp_path: Path) -> None:
    async with a_volume(tmp_path, 2, "2") as (volume, urls):
        await fill(volume, 1)
    paths = [Path(url.removeprefix("dir:")) for url in urls]
    for path in paths:
        path.rename(path.with_suffix(".away"))
    async with opened(tmp_path / "volume", options=QUIET) as volume:
        assert sum("cannot be read before" in warning for warning in volume.standing_warnings()) == 1
        for url in urls:
            assert any(url in warning for warning in (await volume.status()).warnings)
        for path in paths:
            path.with_suffix(".away").rename(path)
        await volume.hosts.retry_once()
        await published(volume)
        assert (await volume.status()).warnings == []


async def test_a_directory_that_was_emptied_under_a_mount_is_no_host_any_more(tmp_path: Path) -> None:
    """A disk that was unmounted, say: what is put there would be in nobody's sight after the next opening."""
    async with a_volume(tmp_path, 3, "2", away_grace=0.0) as (volume, urls):
        content = await fill(volume, 3)
        # One that has something: where hosts' latencies have put the sectors nobody knows.
        number = next(iter(records(volume).values())).shards[0].hosts[0]
        emptied = Path(urls[number - 1].removeprefix("dir:"))
        for path in emptied.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        await volume.scrub(full=True)
        await volume.hosts.retry_once()
        assert volume.hosts.state(number) == "unavailable"
        assert "fusefs-host.json" in volume.hosts.reason(number)
        assert await unchanged(volume, content)


async def test_a_short_absence_makes_nobody_copy_anything(tmp_path: Path) -> None:
    async with a_volume(tmp_path, 3, "2", away_grace=1000.0) as (volume, _):
        await fill(volume, 3)
        (tmp_path / "host0").rename(tmp_path / "away")
        volume.hosts.suspect(1)
        await volume.hosts.retry_once()
        await volume.reconciler.round()
        assert volume.reconciler.status.shards == 0
        (tmp_path / "away").rename(tmp_path / "host0")


async def test_after_a_crash_in_the_middle_the_next_process_goes_on_and_nothing_is_too_many(tmp_path: Path) -> None:
    urls = host_dirs(tmp_path, 3)
    await make(tmp_path / "volume", urls, replication="2")
    async with opened(tmp_path / "volume") as volume:
        content = await fill(volume, 48)
        # Enough for three crashes, wherever hosts' latencies have put the sectors.
        fullest = max(range(3), key=lambda at: len(there(urls[at])))
    for _ in range(3):
        with pytest.raises(Crash), trio.fail_after(30):
            async with opened(tmp_path / "volume", seams=Seams(failpoints=CrashAt("reconcile.before_record"))) as volume:
                await volume.leave_host(urls[fullest], leave=True)
                await volume.reconciler.round()
                await trio.sleep_forever()
    async with opened(tmp_path / "volume") as volume:
        await volume.reconciler.round()
        await delete_freed(volume)
        assert there(urls[fullest]) == set()
        assert as_wanted(volume, [url for url in urls if url != urls[fullest]])
        assert await unchanged(volume, content)


async def test_a_sector_freed_while_it_is_copied_leaves_nothing_behind(tmp_path: Path) -> None:
    async with a_volume(tmp_path, 3, "2") as (volume, urls):
        await fill(volume, 1)
        ((sector, record),) = records(volume).items()
        put = volume.host_io.write_sealed

        async def freed_meanwhile(contract_id: str, shard: object) -> None:
            await put(contract_id, shard)  # type: ignore[arg-type]
            await volume.sectors.delete(sector)

        volume.host_io.write_sealed = freed_meanwhile  # type: ignore[method-assign, assignment]
        await volume.leave_host(str(record.shards[0].hosts[0]), leave=True)
        await volume.reconciler.round()
        with pytest.raises(NotFound):
            volume.sectors.record(sector)
        await delete_freed(volume)
        assert [there(url) for url in urls] == [set(), set(), set()]


async def test_a_copy_that_comes_back_to_a_host_is_not_deleted_by_what_was_queued_before(tmp_path: Path) -> None:
    async with a_volume(tmp_path, 3, "2") as (volume, urls):
        content = await fill(volume, 3)
        await volume.leave_host("1", leave=True)
        await volume.reconciler.round()
        # Before the deletions there are done, the host is wanted again, and another one is not.
        await volume.leave_host("1", leave=False)
        await volume.leave_host("2", leave=True)
        await volume.reconciler.round()
        await delete_freed(volume)
        assert as_wanted(volume, [urls[0], urls[2]])
        assert await unchanged(volume, content)


async def test_a_copy_that_is_on_its_way_back_to_a_host_is_not_deleted_right_after_it_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deletion of the earlier one is due while the put hangs: no record names the copy yet, and the deletion would come next."""
    async with a_volume(tmp_path, 3, "2") as (volume, urls):
        content = await fill(volume, 1)
        ((_, record),) = records(volume).items()
        back, other = record.shards[0].hosts
        await volume.leave_host(str(back), leave=True)
        await volume.reconciler.round()
        # Both generations of superblocks know of the move: from now on the deletion is due.
        publisher = volume.publisher
        assert publisher is not None
        for _ in range(3):
            await publisher.confirm_majority()
        host = volume.hosts.get(back)
        put, putting, done = host.put, trio.Event(), trio.Event()

        async def hangs(name: str, data: Buffer) -> str:
            if "/sectors/" in name:
                putting.set()
                await done.wait()
            return await put(name, data)

        # Before there is anything to do: each change wakes the volume's own round, which may be the one that puts.
        monkeypatch.setattr(host, "put", hangs)
        await volume.leave_host(str(back), leave=False)
        await volume.leave_host(str(other), leave=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(volume.reconciler.round)
            await putting.wait()
            nursery.start_soon(volume.deleter.drain)
            # Until it is as far as it gets.
            await trio.testing.wait_all_tasks_blocked(0.3)
            done.set()
        await delete_freed(volume)
        assert as_wanted(volume, [url for number, url in enumerate(urls, 1) if number != other])
        assert await unchanged(volume, content)


async def test_failure_domains_are_kept_apart(tmp_path: Path) -> None:
    urls = host_dirs(tmp_path, 5)
    racks = ["a", "a", "a", "b", "c"]
    await make(tmp_path / "volume", [f"{url}#domain={rack}" for url, rack in zip(urls, racks, strict=True)], replication="2")
    async with opened(tmp_path / "volume") as volume:
        await fill(volume, 12)
        for record in records(volume).values():
            assert len({racks[host - 1] for host in record.shards[0].hosts}) == 2
        await volume.mark_host("4", lost=True)
        await volume.reconciler.round()
        for record in records(volume).values():
            assert {racks[host - 1] for host in record.shards[0].hosts} == {"a", "c"}


async def test_damaged_copies_are_not_spread(tmp_path: Path) -> None:
    async with a_volume(tmp_path, 3, "2") as (volume, urls):
        content = await fill(volume, 1)
        (record,) = records(volume).values()
        gone, left = record.shards[0].hosts
        shard = f"volumes/*/sectors/*/{record.shards[0].root.hex()}"
        path = next(Path(urls[left - 1].removeprefix("dir:")).glob(shard))
        next(Path(urls[gone - 1].removeprefix("dir:")).glob(shard)).unlink()
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        await volume.mark_host(str(gone), lost=True)
        await volume.reconciler.round()
        assert "no good copy" in volume.reconciler.status.trouble
        assert sum(len(there(url)) for url in urls) == 1
        path.write_bytes(good)
        volume.reconciler.wake()
        await volume.reconciler.round()
        assert volume.sectors.degraded() == 0
        assert await unchanged(volume, content)


async def test_the_rate_bounds_what_is_sent(autojump_clock: trio.testing.MockClock) -> None:
    pace = Pace(VirtualClock(), 1000.0)
    started = trio.current_time()
    for _ in range(50):
        await pace.take(200)
    assert trio.current_time() - started == pytest.approx(10.0, abs=SMOOTH)


async def test_the_rate_holds_from_the_first_byte_however_large_the_first_pieces_are(autojump_clock: trio.testing.MockClock) -> None:
    """Also after a pause, and for several at a time."""
    pace = Pace(VirtualClock(), 1000.0)
    for _ in range(2):
        started, sent = trio.current_time(), 0

        async def send(started: float = started) -> None:
            nonlocal sent
            await pace.take(5000)
            sent += 5000
            assert sent <= (trio.current_time() - started) * 1000.0 + 1

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(send)
        assert trio.current_time() - started == pytest.approx(20.0)
        await trio.sleep(60)


async def test_a_sender_that_is_busy_with_each_piece_has_the_whole_rate(autojump_clock: trio.testing.MockClock) -> None:
    pace = Pace(VirtualClock(), 1000.0)
    started = trio.current_time()
    for _ in range(10):
        await pace.take(5000)
        await trio.sleep(4)
    assert trio.current_time() - started == pytest.approx(54.0)
    # And one that the line keeps from reaching it never waits for it.
    started = trio.current_time()
    for _ in range(10):
        await pace.take(5000)
        await trio.sleep(6)
    assert trio.current_time() - started <= 65.0


async def test_all_that_mending_sends_has_waited_for_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost copies, and damaged ones."""
    async with a_volume(tmp_path, 3, "2", repair_rate=1e9) as (volume, urls):
        await fill(volume)
        pace, write_sealed = volume.mender.pace, volume.host_io.write_sealed
        assert pace.rate == 1e9
        take, waited, sent = pace.take, 0, 0

        async def taken(size: int) -> None:
            nonlocal waited
            await take(size)
            waited += size

        async def written(contract_id: str, shard: SealedShard) -> None:
            nonlocal sent
            sent += len(memoryview(shard.sealed))
            assert sent <= waited
            await write_sealed(contract_id, shard)

        monkeypatch.setattr(pace, "take", taken)
        monkeypatch.setattr(volume.host_io, "write_sealed", written)
        await volume.mark_host("1", lost=True)
        await volume.reconciler.round()
        made_again = sent
        assert made_again > SIZE
        path = next(Path(urls[1].removeprefix("dir:")).glob("volumes/*/sectors/*/*"))
        path.write_bytes(path.read_bytes()[:-1])
        await volume.scrub(full=True)
        assert sent == waited > made_again


async def test_without_a_rate_nothing_waits() -> None:
    pace = Pace(Seams().clock, None)
    with trio.fail_after(5):
        for _ in range(1000):
            await pace.take(1 << 30)


@given(
    st.lists(st.lists(st.integers(1, 12), max_size=8), min_size=1, max_size=1),
    st.sets(st.integers(1, 12)),
    st.integers(1, 6),
    st.integers(1, 4),
)
def test_a_plan_counts_distinct_keeping_hosts_and_drops_only_what_is_too_many(
    hosts: list[list[int]], keeping: set[int], wanted: int, racks: int
) -> None:
    record = SectorRecord(VERSION, str(wanted), 10, 10, 10, [ShardRecord(1, 42, bytes(32), hosts[0])])
    plan = make_plan(record, keeping, lambda host: f"rack{host % racks}")
    (counted,) = plan.counted
    able = set(hosts[0]) & keeping
    assert set(counted) <= able
    assert len(counted) == len(set(counted)) == min(wanted, len(able))
    assert len(plan.missing) == wanted - len(counted)
    assert {host for _, host in plan.surplus} == set(hosts[0]) - set(counted)
    # As many failure domains as can be had.
    assert len({host % racks for host in counted}) == min(len(counted), len({host % racks for host in able}))


async def test_too_few_hosts_is_said_and_tried_again_later(tmp_path: Path) -> None:
    async with a_volume(tmp_path, 2, "2") as (volume, _):
        await fill(volume, 1)
        await volume.mark_host("2", lost=True)
        await volume.reconciler.round()
        assert volume.sectors.degraded() == 1
        assert "add a host" in volume.reconciler.status.trouble
        with pytest.raises(Unavailable):
            await volume.mender.mend(next(iter(records(volume))), volume.standing.keeping())
