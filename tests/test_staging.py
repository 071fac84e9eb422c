"""Staging: what hosts that are far or away do not have yet is durable here, and nothing that is published depends on this machine."""

from __future__ import annotations

import os
import random
import shutil
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from storage.checking import check_volume
from storage.errors import FusefsError, NoSpace, Unavailable
from storage.hosts.faults import Faults
from storage.hosts.urls import HostURL
from storage.keyfile import CHEAP
from storage.metadata.keys import SECTOR, UNDERREPLICATED, prefix_end, read_u64
from storage.recovery import recover_volume
from storage.sectors.records import SectorRecord, ShardRecord, decode_sector
from storage.values.records import extents_between
from storage.volume import Volume, VolumeOptions
from storage.wiring import open_volume
from tests.fakes import make_seams
from tests.host_rig import FaultyOpener
from tests.recovery_rig import tree
from tests.rig import PASSPHRASE, QUIET, append, contents, host_dirs, make, new_value, noise

SIZE = 100_000


class RemoteOpener(FaultyOpener):
    """Every host is behind a network."""

    def remote(self, url: HostURL) -> bool:
        return True


class Remote:
    """A volume with hosts that are directories, and behave as if they were far away."""

    def __init__(self, tmp_path: Path, hosts: int) -> None:
        self.path = tmp_path / "volume"
        self.urls = host_dirs(tmp_path, hosts)
        self.opener = RemoteOpener()
        self.seed = 1
        for url in self.urls:
            self.opener.faults[url] = Faults()

    def each(self, **faults: object) -> None:
        """Set faults of all hosts."""
        for fault in self.opener.faults.values():
            for name, value in faults.items():
                setattr(fault, name, value)

    @asynccontextmanager
    async def opened(self, **options: object) -> AsyncIterator[Volume]:
        self.seed += 1
        wanted: VolumeOptions = replace(QUIET, **{"staging": 1 << 30, **options})  # type: ignore[arg-type]
        async with open_volume(
            self.path, passphrase=PASSPHRASE, options=wanted, opener=self.opener, seams=make_seams(seed=self.seed)
        ) as volume:
            yield volume

    def shards(self, number: int) -> set[str]:
        """Roots on one host."""
        return {path.name for path in Path(self.urls[number].removeprefix("dir:")).glob("volumes/*/sectors/*/*")}

    def staged(self) -> set[str]:
        """Roots in staging, as the disk tells."""
        return {path.name for path in self.path.glob("staging/volumes/*/sectors/*/*")}


async def remote(tmp_path: Path, hosts: int = 3, replication: str = "3") -> Remote:
    made = Remote(tmp_path, hosts)
    await make(made.path, made.urls, replication, seams=make_seams(seed=1))
    return made


def records(volume: Volume) -> dict[int, SectorRecord]:
    found = volume.store.scan(SECTOR, prefix_end(SECTOR), 10_000)
    return {read_u64(key, 1): decode_sector(raw, read_u64(key, 1)) for key, raw in found}


def is_full(volume: Volume) -> bool:
    return not volume.store.scan(UNDERREPLICATED, prefix_end(UNDERREPLICATED), 10)


async def ship(volume: Volume, data: bytes, replication: str | None = None) -> int:
    """A value whose bytes are in a sector when it returns."""
    value = new_value(volume, replication)
    await append(volume, value, data)
    await volume.values.shipper.gather()
    await volume.values.settle(value, len(data))
    await volume.commit()
    return value


def forget(volume: Volume) -> None:
    """The block cache is empty."""
    volume.sectors.cache._blocks.clear()


async def until(condition: object, limit: float = 600.0) -> None:
    assert callable(condition)
    with trio.fail_after(limit):
        while not condition():
            await trio.sleep(0.5)


@pytest.mark.parametrize("replication", ["3", "2+1"])
async def test_a_sector_is_durable_here_before_any_far_host_has_it_and_gets_there_by_itself(
    tmp_path: Path, autojump_clock: object, replication: str
) -> None:
    made = await remote(tmp_path, 3, replication)
    data = noise(SIZE)
    made.each(gone="the network is down")
    async with made.opened() as volume:
        value = await ship(volume, data)
        assert made.staged() and not made.shards(0)
        assert await contents(volume, value) == data
        made.each(gone=None)
        await until(lambda: is_full(volume))
        assert all(len(made.shards(host)) == 1 for host in range(3))
        made.each(gone="the network is down")
        forget(volume)
        assert await contents(volume, value) == data, "what was staged is a read cache afterwards"


def puts_of_shards(operation: str, name: str) -> bool:
    return "/sectors/" in name and operation == "put"


async def recovered(made: Remote, name: str) -> dict[bytes, bytes]:
    """path -> content, as a new machine gets it back from a copy of the hosts as they are now, and reads it."""
    base, seed = made.path.parent / name, 1000 + zlib.crc32(name.encode())
    urls = []
    for number, url in enumerate(made.urls):
        shutil.copytree(url.removeprefix("dir:"), base / f"host{number}")
        urls.append(f"dir:{base / f'host{number}'}")
    await recover_volume(base / "v", urls, passphrase=PASSPHRASE, seams=make_seams(seed=seed), argon2=CHEAP)
    async with open_volume(base / "v", passphrase=PASSPHRASE, options=QUIET, seams=make_seams(seed=seed + 1)) as volume:
        assert not (base / "v" / "staging").exists() or not volume.staging.entries()
        return {path: node.content for path, node in (await tree(volume)).items()}


async def test_nothing_that_is_published_depends_on_this_machine(tmp_path: Path, autojump_clock: object) -> None:
    """Breaks if a superblock goes out before the sectors its cut knows are on hosts: the log has dropped tails that are in them."""
    made = await remote(tmp_path, 3, "2")
    async with made.opened() as volume:
        publisher = volume.publisher
        assert publisher is not None
        ino = volume.namespace.create(1, b"file", 0o100644, 0, 0)
        await volume.namespace.append(ino, b"first" * 1000)
        await volume.namespace.commit(ino)
        # As a tail, in the log.
        await publisher.publish()
        # From now on shards do not get anywhere, superblocks do.
        made.each(hang=True, only=puts_of_shards)
        await volume.values.shipper.gather()
        await volume.namespace.append(ino, b"second" * 1000)
        await volume.values.shipper.gather()
        await volume.commit()
        for _ in range(3):
            await publisher.tick()
        assert publisher.published_sequence < volume.store.durable_sequence
        assert (await recovered(made, "held"))[b"file"] == b"first" * 1000
        made.each(hang=False)
        await until(lambda: volume.sectors.drain.status().sectors == 0)
        # What goes out first is the cut as it was: its records name no host.
        await publisher.tick()
        assert (await recovered(made, "reached"))[b"file"] == b"first" * 1000 + b"second" * 1000


@pytest.mark.parametrize("replication", ["2", "2+1"])
async def test_a_machine_lost_at_any_moment_leaves_what_was_published(tmp_path: Path, autojump_clock: object, replication: str) -> None:
    """Merges, replaced and removed files, with hosts that take longer than all of it. Breaks without the wait before superblocks, and
    where a cut is superseded as often as something it knows is freed."""
    made = await remote(tmp_path, 4, replication)
    dice = random.Random(5)
    written: dict[bytes, list[bytes]] = {}
    made.each(throughput=20_000.0, only=puts_of_shards)
    seen: dict[int, dict[bytes, bytes]] = {}
    async with made.opened(flush_interval=5.0, commit_interval=1.0) as volume:
        publisher = volume.publisher
        assert publisher is not None
        for step in range(40):
            name = b"log%d" % dice.randrange(3)
            if name not in written:
                written[name] = [b""]
                volume.namespace.create(1, name, 0o100644, 0, 0)
            data = dice.randbytes(dice.choice((300, 3000, 30_000)))
            await volume.namespace.append(volume.namespace.lookup(1, name), data)
            written[name][-1] += data
            if step % 8 == 7:
                # Replaced by another, in one commit.
                volume.namespace.create(1, b"new", 0o100644, 0, 0)
                await volume.namespace.append(volume.namespace.lookup(1, b"new"), data)
                await volume.namespace.rename(1, b"new", 1, name)
                written[name].append(data)
            await trio.sleep(3.0)
            if publisher.published_sequence not in seen and step % 4 == 0:
                seen[publisher.published_sequence] = await recovered(made, f"then{step}")
    assert len(seen) >= 4, "steady writing puts publication off"
    last: dict[bytes, int] = {}
    for sequence, found in sorted(seen.items()):
        for name, content in found.items():
            if name == b"new":
                continue
            versions = [number for number, whole in enumerate(written[name]) if whole.startswith(content) and number >= last.get(name, 0)]
            assert versions, (sequence, name, len(content))
            last[name] = versions[0]


async def write(volume: Volume, name: bytes, data: bytes) -> None:
    """A file whose bytes are in a sector when it returns, or what keeps them from it is raised."""
    ino = volume.namespace.create(1, name, 0o100644, 0, 0)
    await volume.namespace.append(ino, data)
    await volume.values.shipper.gather()
    await volume.namespace.commit(ino)
    if volume.values.shipper.trouble is not None:
        raise volume.values.shipper.trouble


async def read(volume: Volume, name: bytes) -> bytes:
    return await volume.namespace.read(volume.namespace.lookup(1, name), 0, 1 << 30)


async def test_with_all_hosts_gone_writes_go_on_until_staging_is_full_and_all_drains_when_they_are_back(
    tmp_path: Path, autojump_clock: object
) -> None:
    made = await remote(tmp_path, 3, "3")
    files: dict[bytes, bytes] = {}
    async with made.opened(staging=10 * SIZE) as volume:
        made.each(gone="the network is down")
        with pytest.raises(NoSpace, match="staging takes no more until hosts do"):
            for number in range(30):
                data = noise(SIZE)
                files[b"file%d" % number] = data
                await write(volume, b"file%d" % number, data)
        assert 8 <= len(files) <= 11
        assert all([await read(volume, name) == data for name, data in files.items()])
        report_at = (await volume.status()).staging
        assert report_at.sectors >= 8 and "the network is down" in report_at.trouble
        assert report_at.bytes > 8 * SIZE and not report_at.rate and report_at.seconds_left is None
        # Each copy takes a second now, so that it can be watched.
        made.each(gone=None, latency=1.0)
        await until(lambda: volume.sectors.drain.sent)
        now = (await volume.status()).staging
        assert 0 < now.bytes < report_at.bytes and now.rate > 0
        assert now.seconds_left == pytest.approx(now.bytes / now.rate)
        made.each(latency=0.0)
        await until(lambda: is_full(volume) and not volume.values.pending_bytes)
        assert volume.values.shipper.trouble is None, "writers go on by themselves"
        await write(volume, b"more", noise(SIZE))
        assert (await volume.status()).staging.trouble == ""
        files[b"more"] = await read(volume, b"more")
    async with made.opened(staging=0) as volume:
        forget(volume)
        assert all([await read(volume, name) == data for name, data in files.items()])


async def test_only_what_is_at_full_replication_is_dropped_least_recently_used_first(tmp_path: Path, autojump_clock: object) -> None:
    """I3. Breaks if what hosts lack is dropped to make room, or if what is read goes before what is not."""
    made = await remote(tmp_path, 2, "2")
    async with made.opened(staging=6 * SIZE) as volume:
        for number in range(4):
            await write(volume, b"old%d" % number, noise(SIZE))
        await until(lambda: is_full(volume))
        forget(volume)
        await read(volume, b"old0")
        (kept,) = (shard.root.hex() for shard in shards_of(volume, b"old0"))
        made.each(gone="the network is down")
        for number in range(4):
            await write(volume, b"new%d" % number, noise(SIZE))
        waiting = {shard.root.hex() for number in range(4) for shard in shards_of(volume, b"new%d" % number)}
        assert waiting <= made.staged(), "what no host has stays"
        assert kept in made.staged()
        assert len(made.staged()) == 5
        assert sum(path.stat().st_size for path in made.path.glob("staging/volumes/*/sectors/*/*")) <= 6 * SIZE
        # One more would need room that only what waits could give.
        await write(volume, b"last", noise(SIZE))
        assert kept not in made.staged()
        with pytest.raises(NoSpace):
            await write(volume, b"too much", noise(SIZE))


def shards_of(volume: Volume, name: bytes) -> list[ShardRecord]:
    """Of the one sector a file's bytes are in."""
    value = volume.namespace._inodes.get(volume.namespace.lookup(1, name)).rec.value
    (extent,) = extents_between(volume.store, value, 0, 1 << 40, 10)
    return records(volume)[extent.sector_id].shards


async def test_a_staging_directory_that_was_removed_harms_only_what_was_nowhere_else(tmp_path: Path, autojump_clock: object) -> None:
    """Breaks if one lost sector keeps all that comes after it from being published, or is not told."""
    made = await remote(tmp_path, 3, "2")
    safe, lost = noise(SIZE), noise(SIZE)
    async with made.opened() as volume:
        await write(volume, b"safe", safe)
        await until(lambda: is_full(volume))
        made.each(gone="the network is down")
        await write(volume, b"lost", lost)
    shutil.rmtree(made.path / "staging")
    made.each(gone=None)
    async with made.opened() as volume:
        assert any("which were on no host yet" in warning for warning in volume.warnings)
        assert await read(volume, b"safe") == safe
        with pytest.raises(FusefsError, match="sector"):
            await read(volume, b"lost")
        await write(volume, b"later", safe)
        await volume.flush()
        assert volume.publisher is not None and volume.publisher.published_sequence == volume.store.durable_sequence
        assert "neither in" in (await volume.status()).staging.trouble
    found: list[str] = []
    await check_volume(
        made.path, passphrase=PASSPHRASE, opener=made.opener, seams=make_seams(seed=77), on_finding=lambda one: found.append(str(one))
    )
    assert any(text.startswith("sector") and "is not in" in text for text in found), found
    assert any(text.startswith("/lost: bytes 0 to") for text in found), found
    assert (await recovered_but(made, b"lost"))[b"later"] == safe


async def recovered_but(made: Remote, name: bytes) -> dict[bytes, bytes]:
    """What a new machine reads, but for one file, which cannot be."""
    base = made.path.parent / "elsewhere"
    await recover_volume(base, made.urls, passphrase=PASSPHRASE, seams=make_seams(seed=5), argon2=CHEAP)
    async with open_volume(base, passphrase=PASSPHRASE, options=QUIET, seams=make_seams(seed=6)) as volume:
        names = [entry.name for entry in volume.namespace.entries(1, 0, 100)]
        with pytest.raises(FusefsError):
            await read(volume, name)
        return {one: await read(volume, one) for one in names if one != name}


async def test_check_knows_what_waits_for_hosts(tmp_path: Path, autojump_clock: object) -> None:
    made = await remote(tmp_path, 3, "2+1")
    async with made.opened() as volume:
        made.each(gone="the network is down")
        await write(volume, b"waits", noise(SIZE))
    made.each(gone=None)
    report = await check_volume(made.path, passphrase=PASSPHRASE, opener=made.opener, seams=make_seams(seed=7), data=True)
    assert not report.found, report.found
    assert report.notes["pending"]


async def test_a_volume_that_is_fenced_keeps_what_it_staged(tmp_path: Path, autojump_clock: object) -> None:
    made = await remote(tmp_path, 3, "2")
    data = noise(SIZE)
    async with made.opened(flush_interval=10.0) as volume:
        await write(volume, b"there", data)
        await volume.flush()
        made.each(hang=True, only=puts_of_shards)
        await write(volume, b"staged", data)
        waiting = made.staged()
        await recover_volume(tmp_path / "elsewhere", made.urls, passphrase=PASSPHRASE, seams=make_seams(seed=50), argon2=CHEAP)
        # It is held, waits for hosts that take nothing, and notices all the same.
        await until(lambda: volume.store.failure is not None)
        assert "another machine" in (volume.store.failure or "")
        made.each(hang=False)
        await trio.sleep(120)
        assert waiting <= made.staged()
        assert await read(volume, b"staged") == data


async def test_a_host_is_added_while_a_cut_is_held_because_the_others_are_full(tmp_path: Path, autojump_clock: object) -> None:
    """Breaks if whoever adds the host that everything waits for has to wait for it."""
    made = await remote(tmp_path, 2, "2")
    more = [f"dir:{tmp_path / f'more{number}'}" for number in range(2)]
    data = noise(SIZE)
    async with made.opened(flush_interval=10.0) as volume:
        publisher = volume.publisher
        assert publisher is not None
        await write(volume, b"there", data)
        await volume.flush()
        made.each(quota=1, only=puts_of_shards)
        await write(volume, b"file", data)
        await until(lambda: volume.sectors.drain.full)
        await publisher.tick()
        assert publisher.published_sequence < volume.store.durable_sequence
        with pytest.raises(NoSpace, match="hosts are full"):
            await write(volume, b"more", data)
        for url in more:
            await volume.add_host(url)
        await until(lambda: is_full(volume) and not volume.values.pending_bytes)
        await publisher.publish()
        assert publisher.published_sequence == volume.store.durable_sequence
        assert await read(volume, b"more") == data


async def test_publishing_waits_for_the_upload_and_says_where_there_is_none(tmp_path: Path, autojump_clock: object) -> None:
    """What `fsync=hosts` and flush rely on."""
    made = await remote(tmp_path, 3, "3")
    async with made.opened() as volume:
        publisher = volume.publisher
        assert publisher is not None
        made.each(throughput=SIZE / 12, only=puts_of_shards)
        await write(volume, b"file", noise(SIZE))
        before = trio.current_time()
        await publisher.publish()
        assert trio.current_time() - before > 10
        assert sum(len(made.shards(host)) for host in range(3)) >= 2
        made.each(gone="the network is down", only=puts_of_shards)
        await write(volume, b"other", noise(SIZE))
        with pytest.raises(Unavailable, match=r"sectors in .* and not on enough hosts yet: 1: .*the network is down"):
            await publisher.publish()
        with pytest.raises(Unavailable, match="the network is down"):
            await volume.flush()
    made.each(gone=None, throughput=0.0)
    async with made.opened(staging=0) as volume:
        await until(lambda: is_full(volume))
        await until(lambda: not made.staged(), limit=60)


@pytest.mark.parametrize("urged", ["by a flush", "by a cut", "by want of room", "by the time"])
async def test_a_burst_of_writing_is_not_disturbed_by_sending_unless_something_waits_for_it(
    tmp_path: Path, autojump_clock: object, monkeypatch: pytest.MonkeyPatch, urged: str
) -> None:
    monkeypatch.setattr("storage.sectors.drain.QUIET", 1000.0)
    monkeypatch.setattr("storage.sectors.drain.HELD_MOST", 3000.0)
    made = await remote(tmp_path, 1, "1")
    async with made.opened(staging=1 << 30 if urged == "by the time" else 8 * SIZE) as volume:
        for _ in range(3):
            await ship(volume, noise(SIZE))
            await trio.sleep(600)
        assert len(made.staged()) == 3 and not made.shards(0)
        if urged == "by a flush":
            with trio.fail_after(100):
                await volume.sectors.wait_uploads()
        elif urged == "by a cut":
            volume.staging.begin()
            with trio.fail_after(100):
                await volume.staging.reached_all()
        elif urged == "by want of room":
            for _ in range(2):
                await ship(volume, noise(SIZE))
            await trio.sleep(100)
            # The fourth made staging half full. The fifth begins a burst of its own, if all before it were there already.
            assert len(made.shards(0)) >= 4
            await trio.sleep(1000)
        else:
            # Whoever goes on writing does not keep it from hosts; the last one begins a burst of its own, since all before it is there.
            for _ in range(4):
                await ship(volume, noise(SIZE))
                await trio.sleep(500)
            assert len(made.shards(0)) == 6
            await trio.sleep(1000)
        assert made.shards(0) == made.staged()


@pytest.mark.parametrize("pause", [1100, 3100])
async def test_what_was_held_goes_by_itself(tmp_path: Path, autojump_clock: object, monkeypatch: pytest.MonkeyPatch, pause: int) -> None:
    monkeypatch.setattr("storage.sectors.drain.QUIET", 1000.0)
    made = await remote(tmp_path, 1, "1")
    async with made.opened() as volume:
        await ship(volume, noise(SIZE))
        await trio.sleep(pause)
        assert made.shards(0) == made.staged()


@pytest.mark.parametrize("apart", [0.002, 0.02, 0.045, 0.06, 0.099])
async def test_who_writes_a_sector_now_and_then_has_the_machine_until_it_is_seen_that_it_ended(
    tmp_path: Path, autojump_clock: object, apart: float
) -> None:
    """Breaks if sending begins between two sectors of a burst, however long one takes, or long after one that was quick."""
    made = await remote(tmp_path, 1, "1")
    async with made.opened() as volume:
        for _ in range(20):
            await ship(volume, noise(SIZE))
            await trio.sleep(apart)
        assert not made.shards(0)
        await trio.sleep((0.06 if apart < 0.005 else 0.11) - apart)
        assert made.shards(0)


async def test_what_is_freed_leaves_staging_and_no_host_gets_it(tmp_path: Path, autojump_clock: object) -> None:
    made = await remote(tmp_path, 2, "2")
    made.each(gone="the network is down", only=puts_of_shards)
    async with made.opened() as volume:
        await write(volume, b"file", noise(SIZE))
        assert made.staged()
        volume.namespace.unlink(1, b"file")
        await until(lambda: not made.staged(), limit=60)
        made.each(gone=None)
        await volume.flush()
        assert not made.shards(0) and not made.shards(1)


async def test_what_is_cached_stays_over_a_restart_and_the_oldest_goes_first(tmp_path: Path, autojump_clock: object) -> None:
    made = await remote(tmp_path, 2, "2")
    async with made.opened() as volume:
        for number in range(4):
            await write(volume, b"file%d" % number, noise(SIZE))
        await until(lambda: is_full(volume))
        roots = [shards_of(volume, b"file%d" % number)[0].root.hex() for number in range(4)]
    for age, root in enumerate(roots):
        path = next(made.path.glob(f"staging/volumes/*/sectors/*/{root}"))
        os.utime(path, (1_700_000_000 + age, 1_700_000_000 + age))
    async with made.opened(staging=3 * SIZE) as volume:
        await until(lambda: len(made.staged()) == 2, limit=60)
        assert made.staged() == set(roots[2:])
        made.each(gone="the network is down")
        assert len(await read(volume, b"file3")) == SIZE
        with pytest.raises(Unavailable):
            await read(volume, b"file0")
