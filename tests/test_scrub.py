"""Scrub: whatever hosts spoil of what they keep is found within the interval, and put right, and nobody ever reads a wrong byte."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from storage.errors import BadArgument, Busy, Fenced
from storage.host_io import LOOKED, HostIO
from storage.hosts.faults import shards_only
from storage.interfaces import Batch, SealedShard
from storage.metadata.keys import SECTOR, u64
from storage.replication import parse_replication
from storage.sealing import BLOCK, HEADER_SIZE, TAG_SIZE
from storage.seams import Clock, Seams
from storage.sectors.damage import BadRecord, Copy, Damages
from storage.sectors.records import SectorRecord
from storage.sectors.scrub import INTERVAL as USUAL_INTERVAL
from storage.sectors.scrub import PassRecord
from storage.sectors.trust import FEW, PASSES, STUBBORN, STUBBORN_PAUSE
from storage.volume import Volume
from storage.wiring import open_volume
from tests.contract_rig import Volumes, in_virtual_time
from tests.fakes import Crash, CrashAt, SeededRandom, VirtualClock, make_seams
from tests.host_rig import FaultyOpener, Stored
from tests.rig import PASSPHRASE, QUIET, append, host_dirs, make, new_value, noise, opened
from tests.test_reconcile import a_volume, delete_freed, records, there, unchanged


@dataclass(frozen=True)
class Damaged:
    """A copy that was damaged, and what it was."""

    sector_id: int
    number: int
    path: Path
    good: bytes


def path_of(urls: list[str], host: int, root: bytes) -> Path:
    (path,) = Path(urls[host - 1].removeprefix("dir:")).glob(f"volumes/*/sectors/*/{root.hex()}")
    return path


def flip(data: bytes, at: int) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 1 << at % 8
    return bytes(changed)


async def fill(volume: Volume, count: int, sizes: Callable[[int], int] = lambda _i: 200_000) -> dict[int, bytes]:
    """Values with a sector each."""
    content: dict[int, bytes] = {}
    for i in range(count):
        value = new_value(volume)
        content[value] = noise(sizes(i))
        await append(volume, value, content[value])
        await volume.flush()
    await volume.sectors.wait_uploads()
    return content


def damage_at_random(volume: Volume, urls: list[str], wanted: int, chance: random.Random) -> list[Damaged]:
    """So many copies, never more of a sector than its replication bears: bits flipped, cut, lengthened, removed, swapped for others."""
    damaged: list[Damaged] = []
    left: list[tuple[int, int, int]] = []
    for sector_id, record in records(volume).items():
        spec = parse_replication(record.replication)
        places = [(sector_id, number, host) for number, shard in enumerate(record.shards) for host in shard.hosts]
        left += chance.sample(places, spec.m if spec.coded else spec.copies - 1)
    chance.shuffle(left)
    paths = {}
    for sector_id, number, host in left[:wanted]:
        path = path_of(urls, host, records(volume)[sector_id].shards[number].root)
        paths[path] = path.read_bytes()
        damaged.append(Damaged(sector_id, number, path, paths[path]))
    assert len(damaged) == wanted
    for i, one in enumerate(damaged):
        other = damaged[(i + 1) % wanted].good
        match chance.randrange(6 if other != one.good else 5):
            case 0 | 1:
                one.path.write_bytes(flip(one.good, chance.randrange(len(one.good))))
            case 2:
                one.path.write_bytes(one.good[: chance.randrange(len(one.good))])
            case 3:
                one.path.write_bytes(one.good + os.urandom(chance.randrange(1, 100)))
            case 4:
                one.path.unlink()
            case 5:
                # Whole and well sealed, but not this one.
                one.path.write_bytes(other)
    return damaged


def bad_now(damaged: list[Damaged]) -> list[Damaged]:
    return [one for one in damaged if not one.path.exists() or one.path.read_bytes() != one.good]


@pytest.fixture
def nobody_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """What reads meet is not reported: scrub has to find everything by itself."""
    monkeypatch.setattr(Damages, "suspect", lambda *_: None)


# --------------------------------------------------------------------------------------------------------------------
# Bit rot


@pytest.mark.parametrize(("spec", "hosts", "sectors"), [("2", 3, 210), ("3", 4, 110), ("4+2", 7, 110)])
async def test_200_random_damages_are_all_found_and_mended_and_nobody_reads_a_wrong_byte_meanwhile(
    tmp_path: Path, nobody_tells: None, spec: str, hosts: int, sectors: int
) -> None:
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    chance = random.Random(seed)
    urls = host_dirs(tmp_path, hosts)
    await make(tmp_path / "volume", urls, replication=spec, sector_size=128 * 1024)
    # Hardly any cache: reads go to the hosts.
    async with opened(tmp_path / "volume", options=replace(QUIET, cache=256 * 1024)) as volume:
        content = await fill(volume, 2, lambda _i: sectors // 2 * 124 * 1024)
        content |= await fill(volume, 1, lambda _i: 300)
        before = [there(url) for url in urls]
        damaged = damage_at_random(volume, urls, 200, chance)
        assert len(bad_now(damaged)) == 200
        reads = 0
        ended = trio.Event()

        async def read() -> None:
            nonlocal reads
            while not ended.is_set():
                value = chance.choice(list(content))
                offset = chance.randrange(len(content[value]))
                assert await volume.values.read(value, offset, 5000) == content[value][offset : offset + 5000]
                reads += 1
                await trio.sleep(0.001)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            report = await volume.scrub(full=True)
            ended.set()
        assert reads > 10
        assert not bad_now(damaged)
        assert report.missing + report.damaged == report.repaired == 200
        assert (report.left, report.lost, report.unanswered, report.exit_status) == (0, 0, 0, 20)
        assert report.sectors == len(records(volume))
        # Each was put right where it was: nothing moved, nothing is too many.
        assert [there(url) for url in urls] == before
        again = await volume.scrub(full=True)
        assert (again.missing, again.damaged, again.exit_status) == (0, 0, 0)
        assert volume.scrubber.status().pending == 0
        assert await unchanged(volume, content)


async def test_a_block_of_each_copy_finds_for_certain_what_is_missing_cut_lengthened_or_swapped(tmp_path: Path, nobody_tells: None) -> None:
    async with a_volume(tmp_path, 3, "2") as (volume, urls):
        # Three blocks and more, so that a block tells little.
        content = await fill(volume, 5, lambda _i: 230_000)
        found = records(volume)
        paths = [path_of(urls, record.shards[0].hosts[0], record.shards[0].root) for record in found.values()]
        good = [path.read_bytes() for path in paths]
        paths[0].unlink()
        paths[1].write_bytes(good[1][:-1])
        paths[2].write_bytes(good[2] + b"\0")
        paths[3].write_bytes(good[4])
        report = await volume.scrub()
        assert (report.missing, report.damaged, report.repaired, report.exit_status) == (1, 3, 4, 20)
        assert [path.read_bytes() for path in paths] == good
        copies = len(found) * 2
        assert report.shards == copies
        # Some blocks and the end of each, and the whole of what was looked at twice.
        assert report.bytes <= copies * COST + 4 * len(good[0])
        assert await unchanged(volume, content)


async def test_every_block_has_its_turn(tmp_path: Path, nobody_tells: None) -> None:
    """A bit anywhere in a copy of 15 blocks is found by enough passes, the header's too."""
    async with a_volume(tmp_path, 2, "2") as (volume, urls):
        await fill(volume, 1, lambda _i: 230_000)
        (record,) = records(volume).values()
        path = path_of(urls, 1, record.shards[0].root)
        good = path.read_bytes()
        for at in (20, HEADER_SIZE + 10, HEADER_SIZE + 6 * (BLOCK + TAG_SIZE) + 7, len(good) - 1):
            path.write_bytes(flip(good, at))
            for _ in range(200):
                if (await volume.scrub()).damaged:
                    break
            assert path.read_bytes() == good


async def test_a_sample_looks_at_a_share_and_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    async with a_volume(tmp_path, 2, "2") as (volume, _):
        await fill(volume, 40)
        count = len(records(volume))
        report = await volume.scrub(sample=0.5)
        assert 0 < report.sectors < count
        assert report.exit_status == 0
        # It was not a pass over everything.
        assert volume.scrubber.status().last_ended_ns == 0
        assert (await volume.scrub()).sectors == count
        assert volume.scrubber.status().last_ended_ns > 0
        for wrong in (0.0, 1.5, float("nan")):
            with pytest.raises(BadArgument):
                await volume.scrub(sample=wrong)
        refused = 0

        async def one_of_two() -> None:
            nonlocal refused
            try:
                await volume.scrub()
            except Busy:
                refused += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one_of_two)
            nursery.start_soon(one_of_two)
        assert refused == 1
        await volume.scrub()


# --------------------------------------------------------------------------------------------------------------------
# What cannot be put right


async def test_a_sector_without_any_good_copy_is_lost_and_stays_on_record_until_one_comes_back(tmp_path: Path) -> None:
    async with a_volume(tmp_path, 3, "2") as (volume, urls):
        content = await fill(volume, 3)
        sector, record = next(iter(records(volume).items()))
        paths = [path_of(urls, host, record.shards[0].root) for host in record.shards[0].hosts]
        good = paths[0].read_bytes()
        paths[0].unlink()
        paths[1].write_bytes(flip(good, 100))
        report = await volume.scrub(full=True)
        assert (report.missing, report.damaged, report.repaired, report.lost, report.left, report.exit_status) == (1, 1, 0, 1, 2, 21)
        assert "no good copy" in report.trouble
        # I2, I3: nothing is forgotten, since what is there may be all there is.
        assert records(volume)[sector].shards[0].hosts == record.shards[0].hosts
        assert paths[1].exists()
        status = volume.scrubber.status()
        assert (status.pending, status.lost, status.found_since) == (2, 1, 2)
        # The disk comes back from the rescuer.
        paths[0].write_bytes(good)
        assert (await volume.repair()).pending == 0
        assert paths[1].read_bytes() == good
        assert volume.scrubber.status().lost == 0
        assert await unchanged(volume, content)


async def test_two_copies_damaged_at_different_places_make_a_good_one(tmp_path: Path) -> None:
    async with a_volume(tmp_path, 2, "2") as (volume, urls):
        content = await fill(volume, 1, lambda _i: 230_000)
        (record,) = records(volume).values()
        paths = [path_of(urls, host, record.shards[0].root) for host in record.shards[0].hosts]
        good = paths[0].read_bytes()
        paths[0].write_bytes(flip(good, 1000))
        paths[1].write_bytes(flip(good, 150_000))
        report = await volume.scrub(full=True)
        assert (report.damaged, report.repaired, report.lost) == (2, 2, 0)
        assert [path.read_bytes() for path in paths] == [good, good]
        assert await unchanged(volume, content)


async def test_a_host_that_is_away_is_not_damaged_and_not_asked(tmp_path: Path) -> None:
    async with a_volume(tmp_path, 3, "2") as (volume, _):
        await fill(volume, 6)
        named = sum(1 in shard.hosts for record in records(volume).values() for shard in record.shards)
        (tmp_path / "host0").rename(tmp_path / "away")
        volume.hosts.suspect(1)
        await volume.hosts.retry_once()
        report = await volume.scrub()
        assert (report.unanswered, report.missing, report.damaged, report.exit_status) == (named, 0, 0, 21)
        assert report.hosts_away == [volume.hosts.url(1)]
        assert volume.scrubber.status().pending == 0
        (tmp_path / "away").rename(tmp_path / "host0")
        await volume.hosts.retry_once()
        assert (await volume.scrub()).exit_status == 0


async def test_a_host_that_answers_no_more_is_asked_once_and_then_left_alone(tmp_path: Path) -> None:
    opener = FaultyOpener()
    urls = host_dirs(tmp_path, 2)
    await make(tmp_path / "volume", urls, replication="2")
    async with open_volume(tmp_path / "volume", passphrase=PASSPHRASE, options=QUIET, opener=opener) as volume:
        await fill(volume, 20)
        faulty = opener.hosts[urls[1]]
        faulty.faults.gone = "unplugged"
        before = faulty.calls.get("get_range", 0)
        report = await volume.scrub()
        # Those that were under way when it fell silent.
        assert faulty.calls["get_range"] - before <= 10
        assert report.unanswered == len(records(volume))
        assert report.missing + report.damaged == 0


async def test_a_host_that_spoils_everything_shrinks_no_record_and_is_called_failing(tmp_path: Path) -> None:
    opener = FaultyOpener()
    urls = host_dirs(tmp_path, 3)
    await make(tmp_path / "volume", urls, replication="2")
    async with open_volume(tmp_path / "volume", passphrase=PASSPHRASE, options=QUIET, opener=opener) as volume:
        content = await fill(volume, 30)
        before = records(volume)
        on_it = [sector for sector, record in before.items() if 1 in record.shards[0].hosts]
        faults = opener.faults[urls[0]]
        faults.only = lambda operation, name: "/sectors/" in name and operation.startswith("get")
        faults.lying = 1.0
        report = await volume.scrub()
        assert report.damaged == len(on_it) > 10
        # A few went elsewhere; then it was clear that the host is the trouble, not the copies.
        assert 1 <= report.repaired <= 10
        assert report.exit_status == 21
        assert len(report.hosts_failing) == 1 and urls[0] in report.hosts_failing[0]
        after = records(volume)
        assert all(len(after[sector].shards[0].hosts) >= 2 for sector in before)
        assert sum(1 in after[sector].shards[0].hosts for sector in on_it) == len(on_it) - report.repaired
        (host,) = [host for host in (await volume.status()).hosts if host.number == 1]
        assert host.state == "failing" and host.error
        # Its owner says so; everything leaves it, and every byte is there.
        await volume.leave_host("1", leave=True)
        await volume.reconciler.round()
        await volume.damages.mend_listed()
        assert all(1 not in record.shards[0].hosts and len(record.shards[0].hosts) == 2 for record in records(volume).values())
        assert volume.scrubber.status().pending == 0
        assert await unchanged(volume, content)


async def test_a_host_without_room_for_a_copy_loses_it_to_another_one_only_when_that_has_it(tmp_path: Path) -> None:
    opener = FaultyOpener()
    urls = host_dirs(tmp_path, 3)
    await make(tmp_path / "volume", urls, replication="2")
    async with open_volume(tmp_path / "volume", passphrase=PASSPHRASE, options=QUIET, opener=opener) as volume:
        content = await fill(volume, 1)
        ((sector, record),) = records(volume).items()
        bad, other = record.shards[0].hosts
        path = path_of(urls, bad, record.shards[0].root)
        path.write_bytes(path.read_bytes()[:-20])
        opener.faults[urls[bad - 1]].only = shards_only
        opener.faults[urls[bad - 1]].quota = 1
        third = ({1, 2, 3} - {bad, other}).pop()
        opener.faults[urls[third - 1]].gone = "unplugged"
        report = await volume.scrub()
        assert (report.damaged, report.repaired) == (1, 0)
        assert records(volume)[sector].shards[0].hosts == record.shards[0].hosts
        opener.faults[urls[third - 1]].gone = None
        await volume.hosts.retry_once()
        assert (await volume.repair()).pending == 0
        assert records(volume)[sector].shards[0].hosts == sorted({other, third})
        await delete_freed(volume)
        assert not path.exists()
        assert await unchanged(volume, content)


async def test_no_good_copy_goes_for_the_sake_of_one_that_is_known_to_be_bad(tmp_path: Path) -> None:
    opener = FaultyOpener()
    urls = host_dirs(tmp_path, 3)
    await make(tmp_path / "volume", urls, replication="2")
    async with open_volume(tmp_path / "volume", passphrase=PASSPHRASE, options=QUIET, opener=opener) as volume:
        await fill(volume, 1)
        ((sector, record),) = records(volume).items()
        good, bad = record.shards[0].hosts
        spoiled = path_of(urls, bad, record.shards[0].root)
        spoiled.write_bytes(spoiled.read_bytes()[:-1])
        faults = opener.faults[urls[bad - 1]]
        faults.only = lambda operation, name: operation == "put" and shards_only(operation, name)
        faults.gone = "read-only for now"
        assert (await volume.scrub()).left == 1
        # The host with the good copy is left: it may go once two others have one.
        await volume.leave_host(str(good), leave=True)
        await volume.reconciler.round()
        assert {good, bad} < set(records(volume)[sector].shards[0].hosts)
        faults.gone = None
        await volume.hosts.retry_once()
        repaired = await volume.repair()
        assert (repaired.pending, repaired.stage, repaired.trouble) == (0, "", "")
        assert good not in records(volume)[sector].shards[0].hosts
        assert len(records(volume)[sector].shards[0].hosts) == 2
        # The copy that the third host got, and the one put right: none was sent twice.
        assert volume.reconciler.status.shards + volume.damages.status.mended == 2


async def test_what_only_the_way_spoils_is_no_damage(tmp_path: Path) -> None:
    opener = FaultyOpener()
    urls = host_dirs(tmp_path, 2)
    await make(tmp_path / "volume", urls, replication="2")
    async with open_volume(tmp_path / "volume", passphrase=PASSPHRASE, options=QUIET, opener=opener) as volume:
        await fill(volume, 8)
        faults = opener.faults[urls[0]]
        faults.only = lambda operation, _name: operation == "get_range"
        faults.lying = 1.0
        report = await volume.scrub()
        assert (report.damaged, report.missing, report.exit_status) == (0, 0, 0)


# --------------------------------------------------------------------------------------------------------------------
# Crashes and changes in between


async def test_after_a_crash_while_a_copy_is_put_right_the_next_process_goes_on(tmp_path: Path) -> None:
    urls = host_dirs(tmp_path, 2)
    await make(tmp_path / "volume", urls, replication="2")
    async with opened(tmp_path / "volume") as volume:
        content = await fill(volume, 1)
        ((sector, record),) = records(volume).items()
    path = path_of(urls, 1, record.shards[0].root)
    good = path.read_bytes()
    for point, nth in (("host_io.write.before_apply", 1), ("damage.after_put", 1)):
        path.write_bytes(good[:100])
        with pytest.raises(Crash), trio.fail_after(30):
            async with opened(tmp_path / "volume", seams=Seams(failpoints=CrashAt(point, nth))) as volume:
                await volume.scrub()
        async with opened(tmp_path / "volume") as volume:
            report = await volume.scrub()
            assert report.left == 0
            assert path.read_bytes() == good
            assert records(volume)[sector].shards[0].hosts == record.shards[0].hosts
            assert await unchanged(volume, content)


async def test_the_list_of_bad_copies_outlives_the_process_and_is_worked_off_by_itself(tmp_path: Path) -> None:
    opener = FaultyOpener()
    urls = host_dirs(tmp_path, 2)
    await make(tmp_path / "volume", urls, replication="2")
    async with open_volume(tmp_path / "volume", passphrase=PASSPHRASE, options=QUIET, opener=opener) as volume:
        await fill(volume, 1)
        (record,) = records(volume).values()
        path = path_of(urls, 1, record.shards[0].root)
        good = path.read_bytes()
        path.unlink()
        opener.faults[urls[0]].only = lambda operation, name: operation == "put" and "/sectors/" in name
        opener.faults[urls[0]].gone = "read-only for now"
        report = await volume.scrub()
        assert (report.missing, report.repaired, report.exit_status) == (1, 0, 21)
    async with opened(tmp_path / "volume") as volume:
        with trio.fail_after(30):
            while volume.scrubber.status().pending:
                await trio.sleep(0.02)
        assert path.read_bytes() == good


async def test_a_damaged_record_keeps_no_other_copy_from_being_mended(tmp_path: Path) -> None:
    async with a_volume(tmp_path, 2, "2") as (volume, urls):
        await fill(volume, 2)
        (first, second) = sorted(records(volume))
        damages = volume.damages
        for sector in (first, second):
            assert damages._list(Copy(sector, 0, 1), missing=True)
        path = path_of(urls, 1, records(volume)[second].shards[0].root)
        good = path.read_bytes()
        path.unlink()
        batch = Batch()
        batch.put(SECTOR + u64(first), b"damaged")
        volume.store.apply(batch)
        await damages.mend_listed(now=True)
        assert path.read_bytes() == good
        # What is not known to be put right stays on the list.
        assert damages.listed == 1 and damages.hosts(first) == {1}


def test_a_host_that_spoils_what_it_gets_keeps_no_other_host_waiting(tmp_path: Path) -> None:
    """A stubborn host has one copy put right at a time, with a pause; the copies of others are put right meanwhile."""

    async def work() -> None:
        it = Volumes(tmp_path / "v")
        await it.make("ab", "2")
        async with it.mounted() as volume:
            await it.write(volume, 6)
            damages, sectors = volume.damages, sorted(records(volume))
            for _ in range(STUBBORN):
                damages._trust.relapsed(1)
            # Whatever is put there reads as something else; the other host has them all.
            it.opener.faults["mem:a"].lying, it.opener.faults["mem:a"].only = 1.0, shards_only
            for sector in sectors[:5]:
                assert damages._list(Copy(sector, 0, 1), missing=True)
            assert damages._list(Copy(sectors[5], 0, 2), missing=True)
            began, calls = trio.current_time(), it.opener.hosts["mem:a"].calls
            puts = calls.get("put", 0)
            await damages.mend_listed()
            await damages.mend_listed()
            assert damages.hosts(sectors[5]) == set()
            assert calls["put"] - puts == 1
            assert trio.current_time() - began < STUBBORN_PAUSE

    in_virtual_time(work)


def test_a_host_is_not_called_failing_for_ever_where_nothing_is_left_to_look_at(tmp_path: Path) -> None:
    """Its bad copies have gone to other hosts: none can show that it is well. But a scrub of a small volume looks seldom."""

    class Later(VirtualClock):
        passed = 0.0

        def monotonic(self) -> float:
            return super().monotonic() + self.passed

    async def work() -> None:
        clock = Later()
        it = Volumes(tmp_path / "v", clock=clock)
        await it.make("ab", "2")
        async with it.mounted() as volume:
            damages = volume.damages
            for number in range(1, FEW + 1):
                assert not damages.failing(1)
                damages._trust.looked(1, bad=True)
                clock.passed += USUAL_INTERVAL / 3
                assert bool(damages.failing(1)) is (number == FEW)
            clock.passed += PASSES * USUAL_INTERVAL - USUAL_INTERVAL / 3 - 1
            assert "8 of the last 8" in damages.failing(1)
            clock.passed += 2
            assert not damages.failing(1)

    in_virtual_time(work)


@pytest.mark.parametrize("moment", ["made again", "put"])
async def test_a_sector_freed_while_its_copy_is_put_right_leaves_nothing_behind(tmp_path: Path, moment: str) -> None:
    async with a_volume(tmp_path, 2, "2") as (volume, urls):
        await fill(volume, 1)
        ((sector, record),) = records(volume).items()
        path_of(urls, 1, record.shards[0].root).unlink()
        put, regenerate = volume.host_io.write_sealed, volume.damages._regenerate

        async def freed_and_deleted(sector_id: int, record: SectorRecord, number: int) -> SealedShard:
            sealed = await regenerate(sector_id, record, number)
            await volume.sectors.delete(sector)
            await delete_freed(volume)
            return sealed

        async def freed_before_the_put(contract_id: str, shard: SealedShard) -> None:
            await volume.sectors.delete(sector)
            await put(contract_id, shard)

        if moment == "put":
            volume.host_io.write_sealed = freed_before_the_put  # type: ignore[method-assign]
        else:
            volume.damages._regenerate = freed_and_deleted
        await volume.scrub()
        assert volume.scrubber.status().pending == 0
        await delete_freed(volume)
        assert [there(url) for url in urls] == [set(), set()]


async def test_a_damaged_copy_that_a_read_meets_is_mended_without_being_asked(tmp_path: Path) -> None:
    for spec, hosts in (("2", 2), ("2+1", 3)):
        (tmp_path / spec).mkdir()
        # Without a cache: each read asks a host.
        async with a_volume(tmp_path / spec, hosts, spec, cache=1) as (volume, urls):
            content = await fill(volume, 1)
            (record,) = records(volume).values()
            paths = [path_of(urls, host, record.shards[0].root) for host in record.shards[0].hosts]
            good = paths[0].read_bytes()
            paths[0].write_bytes(flip(good, 500))
            with trio.fail_after(30):
                while paths[0].read_bytes() != good:
                    assert await unchanged(volume, content)
                    await trio.sleep(0.02)
                while volume.damages.listed:
                    await trio.sleep(0.02)
            status = await volume.status()
            assert (status.scrub.found_since, status.scrub.repaired_since, status.scrub.pending) == (1, 1, 0)
            assert not any("could not be used" in warning for warning in status.warnings)


# --------------------------------------------------------------------------------------------------------------------
# In the background, in virtual time

#: Six hours.
INTERVAL = 21_600.0
PASSING = replace(QUIET, scrub_interval=INTERVAL)
COST = LOOKED * (BLOCK + TAG_SIZE) + HEADER_SIZE + TAG_SIZE


class Looks:
    """Every look at a copy: when, which."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at: list[tuple[float, tuple[str, int]]] = []
        self.bytes = 0
        probe = HostIO.probe

        async def watched(io: HostIO, contract_id: str, root: str, sector_id: int, length: int, block: int) -> int:
            asked = await probe(io, contract_id, root, sector_id, length, block)
            self.at.append((trio.current_time(), (root, io._contractor.contract(contract_id).host_number)))
            self.bytes += asked
            return asked

        monkeypatch.setattr(HostIO, "probe", watched)

    def most_within(self, seconds: float) -> int:
        """The most looks in any span of so many seconds."""
        times = [time for time, _ in self.at]
        return max((sum(1 for other in times if time <= other < time + seconds) for time in times), default=0)

    def longest_wait(self, copies: set[tuple[str, int]], begun: float, ended: float) -> float:
        """The longest any copy had to wait for its next look between the two times."""
        longest = 0.0
        for copy in copies:
            times = [begun, *(time for time, other in self.at if other == copy and begun < time < ended), ended]
            longest = max(longest, *(after - before for before, after in itertools.pairwise(times)))
        return longest


def copies_of(volume: Volume) -> set[tuple[str, int]]:
    return {(shard.root.hex(), host) for record in records(volume).values() for shard in record.shards for host in shard.hosts}


def later(clock: Clock) -> Seams:
    """The seams of the next process: the same clock, randomness of its own."""
    return make_seams(clock=clock, random=SeededRandom(int.from_bytes(os.urandom(8), "big")))


def test_a_pass_covers_every_copy_within_the_interval_and_costs_a_block_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = Looks(monkeypatch)

    async def two_days() -> None:
        seams = make_seams()
        await make(tmp_path / "volume", [f"mem:pass{i}" for i in range(3)], replication="2", seams=seams)
        async with opened(tmp_path / "volume", seams=seams, options=PASSING) as volume:
            await fill(volume, 40)
            copies = copies_of(volume)
            assert len(copies) >= 80
            begun = trio.current_time()
            await trio.sleep(2.2 * INTERVAL)
            assert looks.longest_wait(copies, begun, trio.current_time()) <= INTERVAL
            # Two passes and what of the third there was time for; spread out.
            passes = 2.2 / 0.9 + 0.2
            assert len(looks.at) <= passes * len(copies)
            assert looks.bytes <= passes * len(copies) * COST
            assert looks.most_within(INTERVAL / 20) <= 2 * len(copies) * 0.05 / 0.9 + 4
            status = volume.scrubber.status()
            assert status.last_sectors == len(records(volume)) and status.last_ended_ns > status.last_begun_ns > 0
            assert status.last_found == status.unanswered == 0

    in_virtual_time(two_days)


def test_a_pass_goes_on_where_the_last_process_left_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = Looks(monkeypatch)

    async def with_a_restart() -> None:
        seams = make_seams()
        clock = seams.clock
        await make(tmp_path / "volume", [f"mem:restart{i}" for i in range(2)], replication="2", seams=seams)
        async with opened(tmp_path / "volume", seams=seams, options=QUIET) as volume:
            await fill(volume, 30)
        begun = trio.current_time()
        for _ in range(3):
            async with opened(tmp_path / "volume", seams=later(clock), options=PASSING) as volume:
                copies = copies_of(volume)
                await trio.sleep(INTERVAL * 0.25)
                assert volume.scrubber.status().last_ended_ns == 0
        assert len(looks.at) > len(copies) / 2
        async with opened(tmp_path / "volume", seams=later(clock), options=PASSING) as volume:
            with trio.fail_after(INTERVAL - (trio.current_time() - begun)):
                while not volume.scrubber.status().last_ended_ns:
                    await trio.sleep(60)
            # Each once, and what was under way at a restart again.
            assert {copy for _, copy in looks.at} == copies
            assert len(looks.at) <= len(copies) + 3 * 4 + 4
        # Off for a week in the middle of the next pass: it catches up, and not all at once.
        async with opened(tmp_path / "volume", seams=later(clock), options=PASSING) as volume:
            await trio.sleep(INTERVAL * 0.2)
        await trio.sleep(7 * INTERVAL)
        looks.at.clear()
        async with opened(tmp_path / "volume", seams=later(clock), options=PASSING) as volume:
            before = volume.scrubber.status().last_ended_ns
            with trio.fail_after(INTERVAL * 0.2):
                while volume.scrubber.status().last_ended_ns == before:
                    await trio.sleep(60)
            assert looks.most_within(INTERVAL * 0.01) <= 0.25 * len(copies)

    in_virtual_time(with_a_restart)


def test_the_background_finds_and_mends_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def a_day() -> None:
        seams = make_seams()
        urls = [f"mem:alone{i}" for i in range(2)]
        await make(tmp_path / "volume", urls, replication="2", seams=seams)
        async with opened(tmp_path / "volume", seams=seams, options=PASSING) as volume:
            content = await fill(volume, 5)
            stored = [Stored(url) for url in urls]
            names = stored[0].names("/sectors/")
            good = {name: stored[0].read(name) for name in names}
            stored[0].remove(names[0])
            stored[0].write(names[1], good[names[1]][:-5])
            stored[1].write(names[2], good[names[3]])
            await trio.sleep(INTERVAL)
            assert all(host.read(name) == data for host in stored for name, data in good.items())
            status = volume.scrubber.status()
            assert (status.found_since, status.repaired_since, status.pending, status.last_found, status.last_repaired) == (3, 3, 0, 3, 3)
            assert await unchanged(volume, content)

    in_virtual_time(a_day)


def test_the_golden_records_of_scrub() -> None:
    golden = dict(line.split("=") for line in (Path(__file__).parent / "golden" / "scrub.txt").read_text().split())
    walked = PassRecord(1, 1_700_000_000_000_000_000, 0, 4711, True, 100, 300, 123_456_789, 1, 2, 3, 4)
    assert msgspec.msgpack.encode(walked).hex() == golden["pass"]
    assert msgspec.msgpack.decode(bytes.fromhex(golden["pass"]), type=PassRecord) == walked
    copy = Copy(4711, 5, 3)
    assert copy.key.hex() == golden["bad_key"] and Copy.of_key(bytes.fromhex(golden["bad_key"])) == copy
    bad = BadRecord(1, True, 1_700_000_000_000_000_000)
    assert msgspec.msgpack.encode(bad).hex() == golden["bad"]
    assert msgspec.msgpack.decode(bytes.fromhex(golden["bad"]), type=BadRecord) == bad


async def test_a_volume_that_is_fenced_while_copies_are_looked_at_or_made_can_still_be_read(tmp_path: Path) -> None:
    """What runs in the background ends; it does not take the volume with it."""
    async with a_volume(tmp_path, 3, "2", scrub_interval=1.0) as (volume, urls):
        content = await fill(volume, 6)
        for record in records(volume).values():
            path_of(urls, record.shards[0].hosts[0], record.shards[0].root).unlink()
        await volume.leave_host("3", leave=True)
        put = volume.host_io.write_sealed
        puts = 0

        async def fenced_meanwhile(contract_id: str, shard: object) -> None:
            nonlocal puts
            puts += 1
            await put(contract_id, shard)  # type: ignore[arg-type]
            volume.store.fence("another machine has it")

        volume.host_io.write_sealed = fenced_meanwhile  # type: ignore[method-assign, assignment]
        with pytest.raises(Fenced):
            await volume.scrub(full=True)
        with pytest.raises(Fenced):
            await volume.reconciler.round()
        # The rounds in the background meet it, too.
        volume.reconciler.wake()
        await trio.sleep(2.5)
        assert puts
        assert await unchanged(volume, content)
