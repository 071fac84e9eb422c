"""Object Lock: whoever has the credentials can hide what a host holds, and not destroy it before the contract ends."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from storage.checking import Finding, check_volume
from storage.creation import create_volume
from storage.errors import NotPermitted
from storage.history.reading import superblocks_on
from storage.hosts.holders import decode_holders, holders_key
from storage.hosts.layout import HOST_FILE
from storage.hosts.locking import SHORT_LOCK
from storage.hosts.memory_lock import VersionedMemoryHost, Versions
from storage.hosts.urls import parse_url
from storage.interfaces import Batch, LockingHost
from storage.keyfile import CHEAP
from storage.metadata.keys import FREED, SECTOR, prefix_end, read_u64, u64
from storage.pruning import open_pruner
from storage.recovery import recover_volume
from storage.seams import Seams
from storage.sectors.records import SectorRecord, decode_sector
from storage.volume import Volume, VolumeOptions
from storage.wiring import open_volume
from tests.fakes import SeededRandom, VirtualClock, make_seams
from tests.lock_rig import LockedOpener, vandalize
from tests.rig import PASSPHRASE, QUIET, append, contents, free, new_value, noise, published
from tests.rig import SECTOR as SECTOR_SIZE

DAY = 86400.0
DAYS = 90.0


class World:
    """A clock, hosts that lock, and as many machines as there are directories."""

    def __init__(self, tmp_path: Path) -> None:
        self.clock = VirtualClock()
        self.tmp_path = tmp_path
        self.opener = LockedOpener(self.seams())
        self.urls = [f"mem:{tmp_path.name[-20:]}-{number}" for number in range(2)]

    def seams(self) -> Seams:
        return make_seams(clock=self.clock, random=SeededRandom(secrets.randbits(63)), real_threads=True)

    def versions(self) -> list[Versions]:
        return list(self.opener.versions.values())

    async def make(self) -> None:
        await create_volume(
            self.tmp_path / "volume",
            PASSPHRASE,
            hosts=self.urls,
            replication="2",
            sector_size=SECTOR_SIZE,
            contract_days=DAYS,
            seams=self.seams(),
            argon2=CHEAP,
            opener=self.opener,
        )

    @asynccontextmanager
    async def opened(self, name: str = "volume", options: VolumeOptions = QUIET) -> AsyncIterator[Volume]:
        path = self.tmp_path / name
        async with open_volume(path, passphrase=PASSPHRASE, seams=self.seams(), options=options, opener=self.opener) as volume:
            yield volume


@pytest.fixture
async def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    await made.make()
    return made


def records(volume: Volume) -> list[SectorRecord]:
    return [decode_sector(raw, read_u64(key, 1)) for key, raw in volume.store.scan(SECTOR, prefix_end(SECTOR), 10_000)]


def locked_until(volume: Volume) -> list[int]:
    """Of every shard on every host, as recorded; a lock that a host does not have would be found by `vandalize`."""
    return [
        decode_holders(volume.store.get(holders_key(shard.root, host)), shard.root).locked_ns
        for record in records(volume)
        for shard in record.shards
        for host in shard.hosts
    ]


async def fill(volume: Volume, sizes: tuple[int, ...] = (3 * SECTOR_SIZE + 5, 20_000, 7)) -> dict[int, bytes]:
    content = {}
    for size in sizes:
        value = new_value(volume)
        content[value] = noise(size)
        await append(volume, value, content[value])
    await volume.flush()
    await volume.sectors.wait_uploads()
    return content


async def same(volume: Volume, content: dict[int, bytes]) -> bool:
    return all([await contents(volume, value) == data for value, data in content.items()])


async def test_full_sectors_are_locked_to_the_end_of_the_contract_and_others_shortly(world: World) -> None:
    async with world.opened() as volume:
        await fill(volume)
        end = min(contract.end_ns for contract in volume.contractor.all_contracts())
        for record in records(volume):
            for shard in record.shards:
                for host in shard.hosts:
                    holders = decode_holders(volume.store.get(holders_key(shard.root, host)), shard.root)
                    assert holders.stored_version
                    if 2 * record.length > SECTOR_SIZE:
                        assert holders.locked_ns >= end
                    else:
                        assert holders.locked_ns <= world.clock.time_ns() + SHORT_LOCK * 1e9


async def test_a_round_locks_everything_to_the_end_of_the_contract_and_a_renewal_further(world: World) -> None:
    async with world.opened() as volume:
        await fill(volume)
        keeper = volume.lock_keeper
        assert keeper is not None
        # Making the volume was the last round.
        world.clock.jump(1.1 * DAY)
        assert all(keeper.due(number) for number in volume.hosts.numbers())
        await keeper.round()
        end = min(contract.end_ns for contract in volume.contractor.all_contracts())
        assert min(locked_until(volume)) >= end - 3600 * 10**9
        assert not any(keeper.due(number) for number in volume.hosts.numbers()) and not keeper.troubles
        world.clock.jump(40 * DAY)
        for contract_id in volume.contractor.contracts():
            await volume.contractor.renew_contract(contract_id, DAYS * DAY)
        assert all(keeper.due(number) for number in volume.hosts.numbers())
        await keeper.round()
        assert min(locked_until(volume)) >= end + 39 * DAY * 1e9


@pytest.mark.parametrize("days", [1.0, 60.0])
async def test_what_a_thief_deletes_and_overwrites_is_read_from_the_locked_versions(world: World, days: float) -> None:
    """Also when he comes long after the volume was closed: the last thing it did was to lock everything."""
    async with world.opened() as volume:
        content = await fill(volume)
    world.clock.jump(days * DAY)
    for versions in world.versions():
        assert await vandalize(versions) > 10
        assert not any(await _reads_as_before(versions))
    async with world.opened(options=replace(QUIET, cache=1)) as volume:
        assert await same(volume, content)
        # Reads of ranges, too, and again.
        assert await same(volume, content)
        for value, data in content.items():
            assert await volume.values.read(value, len(data) // 2, 100) == data[len(data) // 2 :][:100]


async def _reads_as_before(versions: Versions) -> list[bool]:
    """Per shard: does its name still give it? So that the test shows something."""
    shown = versions.content.objects
    return [name in shown and shown[name] not in (b"", b"gone" * 50) for name in versions.by_name if "/sectors/" in name]


@pytest.mark.parametrize("days", [1.0, 60.0])
async def test_a_lost_machine_s_volume_comes_back_from_the_locked_versions(world: World, days: float) -> None:
    async with world.opened() as volume:
        content = await fill(volume)
    world.clock.jump(days * DAY)
    for versions in world.versions():
        await vandalize(versions)
        # And names of superblocks above all there are.
        for number in range(20):
            versions.content.objects[name := f"volumes/{volume.config.volume_id}/superblock.{10**15 + number:020d}"] = b"nonsense"
            versions.add(name, b"nonsense")
    await recover_volume(
        world.tmp_path / "again", world.urls[1:], passphrase=PASSPHRASE, seams=world.seams(), opener=world.opener, argon2=CHEAP
    )
    async with world.opened("again", replace(QUIET, cache=1)) as volume:
        assert await same(volume, content)


async def hide(versions: Versions) -> None:
    """Delete every name."""
    host = VersionedMemoryHost("mem:thief", versions)
    for name in list(versions.content.objects):
        await host.delete(name)


async def test_after_a_thief_hid_every_superblock_new_ones_are_not_mistaken_for_those_he_hid(world: World) -> None:
    """Of a name that is written once the oldest version counts: a number that a hidden one has is not used again."""
    async with world.opened() as volume:
        await fill(volume, (1000,))
        await fill(volume, (1000,))
    for versions in world.versions():
        await hide(versions)
    async with world.opened() as volume:
        ino = volume.namespace.create(1, b"later", 0o100644, 0, 0)
        await volume.namespace.append(ino, b"after the theft")
        await volume.flush()
    for directory in ("again", "and again"):
        path = world.tmp_path / directory
        await recover_volume(path, world.urls, passphrase=PASSPHRASE, seams=world.seams(), opener=world.opener, argon2=CHEAP)
        async with world.opened(directory) as volume:
            assert await volume.namespace.read(volume.namespace.lookup(1, b"later"), 0, 100) == b"after the theft"
        for versions in world.versions():
            await hide(versions)


async def test_check_reads_what_a_thief_deleted_from_the_locked_versions_and_puts_the_names_there_again(world: World) -> None:
    async with world.opened() as volume:
        ino = volume.namespace.create(1, b"file", 0o100644, 0, 0)
        await volume.namespace.append(ino, noise(3 * SECTOR_SIZE))
        await volume.flush()
    for versions in world.versions():
        await hide(versions)

    async def kinds(*, repair: bool = False) -> set[str]:
        found: list[Finding] = []
        await check_volume(
            world.tmp_path / "volume",
            passphrase=PASSPHRASE,
            repair=repair,
            on_finding=found.append,
            seams=world.seams(),
            opener=world.opener,
        )
        return {finding.kind for finding in found if not finding.note}

    told = await kinds()
    assert "missing-copy" in told
    assert "unreadable" not in told
    await kinds(repair=True)
    assert "missing-copy" not in await kinds()


def shown(versions: Versions, part: str) -> int:
    """Names with `part` that show something."""
    return sum(1 for name, stored in versions.by_name.items() if part in name and stored and stored[-1].data)


@pytest.mark.parametrize("full", [False, True])
async def test_scrub_puts_the_names_there_again_that_a_thief_deleted_or_overwrote(world: World, full: bool) -> None:
    async with world.opened() as volume:
        content = await fill(volume)
        copies = sum(len(shard.hosts) for record in records(volume) for shard in record.shards)
        for versions in world.versions():
            await vandalize(versions)
        report = await volume.scrub(full=full)
        assert (report.missing + report.damaged, report.repaired, report.lost) == (copies, copies, 0)
        report = await volume.scrub(full=True)
        assert (report.missing, report.damaged) == (0, 0)
        assert await same(volume, content)


async def test_check_calls_no_metadata_lost_that_a_lock_kept_and_puts_its_names_there_again(world: World) -> None:
    async with world.opened() as volume:
        await fill(volume)
    for versions in world.versions():
        await hide(versions)

    async def findings(*, repair: bool = False) -> list[Finding]:
        found: list[Finding] = []
        await check_volume(
            world.tmp_path / "volume",
            passphrase=PASSPHRASE,
            repair=repair,
            on_finding=found.append,
            seams=world.seams(),
            opener=world.opener,
        )
        return [finding for finding in found if "metadata" in finding.kind or "superblock" in finding.kind]

    told = await findings()
    assert {finding.kind for finding in told} == {"superblock", "metadata-object"}
    assert all("but a locked version" in str(finding) for finding in told)
    assert all(finding.repaired for finding in await findings(repair=True))
    assert await findings() == []


async def test_what_changed_since_the_last_round_is_locked_shortly_and_the_round_s_state_to_the_end(world: World) -> None:
    """A machine that is killed, and a thief who waits until the short locks are over."""
    async with world.opened() as volume:
        content = await fill(volume)
        assert volume.lock_keeper is not None
        await volume.lock_keeper.round()
        late = await fill(volume, (1000,))
        # The process dies here, as far as hosts are concerned: nothing more is locked.
        volume.lock_keeper = None
        volume.store.fence("killed")
    world.clock.jump(3 * DAY)
    for versions in world.versions():
        await vandalize(versions)
    await recover_volume(
        world.tmp_path / "again", world.urls, passphrase=PASSPHRASE, seams=world.seams(), opener=world.opener, argon2=CHEAP
    )
    async with world.opened("again") as volume:
        assert await same(volume, content)
        (value,) = late
        assert volume.store.get(b"v" + value.to_bytes(8, "big")) is None


async def test_with_credentials_that_may_not_delete_everything_works_and_deletions_wait(world: World) -> None:
    for versions in world.versions():
        versions.no_deletes = True
    async with world.opened() as volume:
        content = await fill(volume)
        gone = await fill(volume, (SECTOR_SIZE // 2, 3000))
        for value in gone:
            free(volume, value)
        # By itself it gathers what is freed for a moment, which the rounds below may not take.
        while volume.values._reclaimer.step():
            pass
        for _ in range(6):
            await volume.flush()
            await volume.deleter.drain()
            await published(volume)
        assert volume.deleter.pending() == 0
        status = await volume.status()
        assert any("may not delete" in warning for warning in status.warnings)
        assert not any(host.state == "failing" for host in status.hosts)
        assert await same(volume, content)
    held = [sum("/sectors/" in name for name in versions.content.objects) for versions in world.versions()]
    for versions in world.versions():
        versions.no_deletes = False
    async with world.opened() as volume:
        assert await same(volume, content)
        assert volume.sweeper is not None
        for _ in range(2):
            await published(volume)
        assert volume.sweeper.owed() == volume.hosts.numbers()
        assert await volume.sweeper.sweep() == []
        left = [sum("/sectors/" in name for name in versions.content.objects) for versions in world.versions()]
        assert all(after < before for after, before in zip(left, held, strict=True))
        assert await same(volume, content)


async def test_after_the_lock_what_was_deleted_is_purged_and_what_is_needed_never(world: World) -> None:
    async with world.opened() as volume:
        content = await fill(volume)
        gone = await fill(volume, (SECTOR_SIZE,))
        for value in gone:
            free(volume, value)
        # By itself it gathers what is freed for a moment, which the rounds below may not take.
        while volume.values._reclaimer.step():
            pass
        for _ in range(6):
            await volume.flush()
            await volume.deleter.drain()
            await published(volume)
        # A thief hides what is needed: the purge must not take him at his word.
        for versions in world.versions():
            for name in [name for name in versions.content.objects if "/sectors/" in name]:
                del versions.content.objects[name]
                versions.add(name, None)
        keeper = volume.lock_keeper
        assert keeper is not None
        for number, host in keeper.hosts().items():
            assert await keeper.purge(number, host) == 0
        world.clock.jump((DAYS + 1) * DAY)
        for contract_id in [contract.contract_id for contract in volume.contractor.all_contracts()]:
            await volume.contractor.renew_contract(contract_id, DAYS * DAY)
        await published(volume)
        # And the metadata, now that nothing is locked that was not renewed.
        for versions in world.versions():
            for name in [name for name in versions.content.objects if "/metadata/" in name]:
                del versions.content.objects[name]
                versions.add(name, None)
        world.clock.jump(3 * DAY)
        before = [len(versions.by_name) for versions in world.versions()]
        needed = [set(keeper._history_names(number)) for number in keeper.hosts()]
        assert all(needed)
        for number, host in keeper.hosts().items():
            assert await keeper.purge(number, host) > 0
        for versions, names in zip(world.versions(), needed, strict=True):
            assert all(any(stored.data is not None for stored in versions.by_name.get(name, ())) for name in names)
        assert all(len(versions.by_name) < count for versions, count in zip(world.versions(), before, strict=True))
        assert await same(volume, content)


async def test_a_shard_that_stands_in_two_records_is_locked_all_the_same(world: World) -> None:
    """It came back to a host where its earlier copy still waits for its deletion, say: a live record and a freed one name it."""
    async with world.opened() as volume:
        await fill(volume)
        ((key, raw),) = volume.store.scan(SECTOR, prefix_end(SECTOR), 1, reverse=True)
        record = decode_sector(raw, read_u64(key, 1))
        batch = Batch()
        for sequence in (2**40, 2**40 + 1):
            batch.put(FREED + u64(sequence) + key[1:], record.encode())
        volume.store.apply(batch)
        world.clock.jump(40 * DAY)
        for contract_id in volume.contractor.contracts():
            await volume.contractor.renew_contract(contract_id, DAYS * DAY)
        keeper = volume.lock_keeper
        assert keeper is not None
        await keeper.round()
        assert not keeper.troubles
        assert not any(keeper.due(number) for number in volume.hosts.numbers())


async def test_a_host_that_cannot_be_purged_keeps_no_other_from_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world.opened() as volume:
        keeper = volume.lock_keeper
        assert keeper is not None
        real, purged = keeper.purge, list[int]()

        async def purge(number: int, host: LockingHost) -> int:
            if number == 1:
                raise NotPermitted("these credentials may not list versions")
            purged.append(number)
            return await real(number, host)

        monkeypatch.setattr(keeper, "purge", purge)
        with pytest.raises(NotPermitted):
            await keeper.purge_due()
        assert purged == [2]


async def test_superblocks_that_were_deleted_are_found(world: World) -> None:
    async with world.opened() as volume:
        await fill(volume)
        volume_id = bytes.fromhex(volume.config.volume_id)
    for url in world.urls:
        host = world.opener.host(parse_url(url))
        before, _ = await superblocks_on(host, volume_id)
        await vandalize(world.opener.versions[url])
        after, _ = await superblocks_on(host, volume_id)
        assert {block.digest for block in before} <= {block.digest for block in after} != set()


async def test_after_the_end_the_owner_prunes_and_nothing_is_left(world: World) -> None:
    async with world.opened() as volume:
        await fill(volume)
    for days, left in ((1, True), (DAYS + 1, False)):
        world.clock.jump(days * DAY)
        for url in world.urls:
            versions = world.opener.versions[url]
            async with open_pruner(url, grace_days=0, seams=world.seams(), opener=world.opener) as pruner:
                for held in await pruner.survey():
                    assert held.prunable != left
                    if held.prunable:
                        await pruner.prune(held)
            assert any(name.startswith("volumes/") for name in versions.by_name) == left
            assert HOST_FILE in versions.by_name


async def test_a_host_that_does_not_say_any_more_that_it_locks_is_a_warning(world: World) -> None:
    async with world.opened() as volume:
        assert not any("Object Lock" in warning for warning in (await volume.status()).warnings)
    async with open_volume(world.tmp_path / "volume", passphrase=PASSPHRASE, seams=world.seams(), options=QUIET) as volume:
        assert sum("had Object Lock" in warning for warning in (await volume.status()).warnings) == 2
