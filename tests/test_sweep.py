"""The sweep: what was put on hosts and never committed goes; what might be anybody else's, or is still needed, stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from storage.errors import NoSpace, Unavailable
from storage.host_io import Placed
from storage.hosts.faults import shards_only
from storage.hosts.holders import holders_key
from storage.interfaces import Batch, SealedShard
from storage.metadata.keys import FREED, HOLDERS, LOCAL, SECTOR, prefix_end, read_u64, u64
from storage.seams import Seams
from storage.sectors import sweep as sweep_module
from storage.sectors.records import VERSION, SectorRecord, ShardRecord, decode_sector
from storage.sectors.redundancy import layout_of
from storage.sectors.sweep import SweepCounts
from storage.sectors.upload import Upload
from storage.wiring import open_volume
from tests.fakes import Crash, CrashAt
from tests.host_rig import FaultyOpener
from tests.rig import PASSPHRASE, QUIET, append, contents, host_dirs, make, new_value, noise, opened
from tests.sweeping import TestGate, sweeper_of


def shards_on(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.rglob("*") if entry.is_file() and "/sectors/" in str(entry))


def crashed_in(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return any(crashed_in(inner) for inner in error.exceptions)
    return isinstance(error, Crash)


async def write_and_die(path: Path, at: str = "host_io.write.before_apply") -> None:
    """A process that dies with a shard on the host and nothing of it on record."""
    try:
        async with opened(path, seams=Seams(failpoints=_Dead(at))) as volume:
            await append(volume, new_value(volume), noise(5000))
            with trio.move_on_after(5):
                await volume.flush()
    except BaseException as error:
        if not crashed_in(error):
            raise
    else:
        raise AssertionError("it survived")


class _Dead(CrashAt):
    """From the hit on nothing happens any more."""

    def hit(self, name: str) -> None:
        if self.crashed:
            raise Crash(name)
        super().hit(name)


async def with_orphan(tmp_path: Path) -> tuple[int, bytes, str]:
    """A volume with one committed value, and a shard on its host that nobody knows: (value, its bytes, the orphan's root)."""
    await make(tmp_path / "v", host_dirs(tmp_path, 1))
    async with opened(tmp_path / "v") as volume:
        value, data = new_value(volume), noise(3000)
        await append(volume, value, data)
        await volume.flush()
    before = set(shards_on(tmp_path / "host0"))
    await write_and_die(tmp_path / "v")
    (orphan,) = set(shards_on(tmp_path / "host0")) - before
    return value, data, orphan


async def test_what_was_never_committed_goes_and_the_rest_stays(tmp_path: Path) -> None:
    value, data, orphan = await with_orphan(tmp_path)
    async with opened(tmp_path / "v") as volume:
        other, more = new_value(volume), noise(4000)
        await append(volume, other, more)
        await volume.flush()
        assert orphan in shards_on(tmp_path / "host0")
        sweeper = sweeper_of(volume)
        assert await sweeper.sweep() == []
        assert sweeper.counts == SweepCounts(3, 1, 0)
        assert orphan not in shards_on(tmp_path / "host0")
        assert sweeper.owed() == []
        volume.sectors.cache._blocks.clear()
        assert await contents(volume, value) == data
        assert await contents(volume, other) == more


async def test_a_sector_in_flight_is_left_alone(tmp_path: Path) -> None:
    """I5: nothing of the current epoch is deleted, on record or not."""
    await with_orphan(tmp_path)
    async with opened(tmp_path / "v") as volume:
        shard = volume.host_io.seal([b"on its way"], await volume.sectors.allocate_sector())
        name = f"volumes/{volume.volume_id}/sectors/{shard.root[:2]}/{shard.root}"
        await volume.hosts.get(1).put(name, shard.sealed)
        sweeper = sweeper_of(volume)
        assert await sweeper.sweep() == []
        assert sweeper.counts == SweepCounts(3, 1, 0)
        assert shard.root in shards_on(tmp_path / "host0")


async def test_another_history_s_shards_stay(tmp_path: Path) -> None:
    """I5: an old copy of the directory that went its own way has the same epoch numbers and sector ids, but other salts."""
    _, _, theirs = await with_orphan(tmp_path)
    path = next(entry for entry in (tmp_path / "host0").rglob(theirs))
    sealed = bytearray(path.read_bytes())
    sealed[24] ^= 1
    path.write_bytes(sealed)
    path.with_name("README").write_bytes(b"what is this")
    async with opened(tmp_path / "v") as volume:
        sweeper = sweeper_of(volume)
        assert await sweeper.sweep() == []
        assert sweeper.counts == SweepCounts(3, 0, 2)
        assert {theirs, "README"} < set(shards_on(tmp_path / "host0"))


@pytest.mark.parametrize("what", ["sector", "freed", "freed and damaged", "foreign id", "foreign volume"])
async def test_what_a_record_names_or_the_epoch_does_not_own_stays(tmp_path: Path, what: str) -> None:
    _, _, orphan = await with_orphan(tmp_path)
    async with opened(tmp_path / "v") as volume:
        path = next(entry for entry in (tmp_path / "host0").rglob(orphan))
        sealed = bytearray(path.read_bytes())
        sector_id = int.from_bytes(sealed[48:56], "big")
        record = SectorRecord(VERSION, "1", 5, 5, 5, [ShardRecord(sector_id, 5, bytes.fromhex(orphan), [1])])
        batch = Batch()
        if what == "sector":
            batch.put(SECTOR + u64(sector_id), record.encode())
        elif what.startswith("freed"):
            batch.put(FREED + u64(1 << 50) + u64(sector_id), record.encode() if what == "freed" else b"damaged")
        elif what == "foreign id":
            # In the range of the epoch after the one in the header.
            sealed[48:56] = (volume.epochs.current.first_sector_id + 1).to_bytes(8, "big")
            path.write_bytes(sealed)
        else:
            sealed[8] ^= 1
            path.write_bytes(sealed)
        volume.store.apply(batch)
        sweeper = sweeper_of(volume)
        assert await sweeper.sweep() == []
        assert sweeper.counts.deleted == 0
        assert sweeper.counts.kept == 1
        assert orphan in shards_on(tmp_path / "host0")
        assert not sweeper.settle() or what.startswith("foreign")
        batch = Batch()
        batch.delete(SECTOR + u64(sector_id))
        for key, _ in volume.store.scan(FREED, prefix_end(FREED), 100):
            batch.delete(key)
        volume.store.apply(batch)
    if not what.startswith("foreign"):
        # The sector is gone now: what nobody else deletes is an orphan.
        async with opened(tmp_path / "v") as volume:
            sweeper = sweeper_of(volume)
            assert await sweeper.sweep() == []
            assert sweeper.counts.deleted == 1
            assert orphan not in shards_on(tmp_path / "host0")


async def test_a_shard_that_only_the_record_of_its_sector_names_stays(tmp_path: Path) -> None:
    """Breaks if of a sector cut into shards only the first is known by its id. What says who holds the shards is lost here; they stay."""
    await make(tmp_path / "v", host_dirs(tmp_path, 3), "2+1")
    async with opened(tmp_path / "v") as volume:
        value, data = new_value(volume), noise(9000)
        await append(volume, value, data)
        await volume.flush()
        await volume.sectors.wait_uploads()
        batch = Batch()
        for key, _ in volume.store.scan(HOLDERS, prefix_end(HOLDERS), 100):
            batch.delete(key)
        volume.store.apply(batch)
    before = [set(shards_on(tmp_path / f"host{number}")) for number in range(3)]
    assert all(before)
    await write_and_die(tmp_path / "v")
    async with opened(tmp_path / "v") as volume:
        sweeper = sweeper_of(volume)
        assert await sweeper.sweep() == []
        # What was never committed goes: as many as were there when the process died.
        assert sweeper.counts.kept == 3 and sweeper.counts.deleted >= 1
        assert [set(shards_on(tmp_path / f"host{number}")) & known for number, known in enumerate(before)] == before
        volume.sectors.cache._blocks.clear()
        assert await contents(volume, value) == data


async def test_nothing_goes_before_the_gate_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """I3: superblocks somebody may be restored from must not know it; I5: the host's superblock must be ours right before."""
    monkeypatch.setattr(sweep_module, "START_DELAY", 0.0)
    monkeypatch.setattr(sweep_module, "RETRY_FIRST", 0.02)
    _, _, orphan = await with_orphan(tmp_path)
    async with opened(tmp_path / "v") as volume:
        gate = TestGate(released=0, ours=False)
        sweeper = sweeper_of(volume, gate)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sweeper.run)
            await trio.sleep(0.3)
            assert sweeper.counts.listed == 0, "nothing is asked of hosts while it could not be deleted anyway"
            assert gate.wanted > 0
            gate.released = gate.wanted
            while gate.asked < 3:
                await trio.sleep(0.01)
            assert orphan in shards_on(tmp_path / "host0")
            assert sweeper.owed() == [1]
            gate.ours = True
            with trio.fail_after(10):
                while orphan in shards_on(tmp_path / "host0"):
                    await trio.sleep(0.01)


async def test_a_host_that_fails_is_gone_on_with_where_it_was(tmp_path: Path) -> None:
    """Also by the next process: the directories before are not listed again, and then it is owed one for the epochs in between."""
    _, _, orphan = await with_orphan(tmp_path)
    opener, listed = FaultyOpener(), list[str]()
    failing = 101

    def count(operation: str, name: str) -> bool:
        if operation == "list" and "/sectors/" in name and not name.endswith("/sectors/"):
            listed.append(name[-3:-1])
            return len(listed) == failing
        return False

    sectors = next((tmp_path / "host0").rglob("sectors"))
    for number in range(256):
        (sectors / f"{number:02x}").mkdir(exist_ok=True)
    async with open_volume(tmp_path / "v", passphrase=PASSPHRASE, options=QUIET, opener=opener) as volume:
        faults = next(iter(opener.faults.values()))
        faults.only, faults.gone = count, "away"
        assert await sweeper_of(volume).sweep() == [1]
        assert len(listed) == 101
    await write_and_die(tmp_path / "v")
    failing = 0
    async with open_volume(tmp_path / "v", passphrase=PASSPHRASE, options=QUIET, opener=opener) as volume:
        faults.gone = None
        listed.clear()
        sweeper = sweeper_of(volume)
        assert await sweeper.sweep() == []
        assert listed[0] == "64"
        assert len(listed) == 156 + 256
        assert sweeper.owed() == []
        (left,) = shards_on(tmp_path / "host0")
        assert left != orphan
        assert volume.store.get(holders_key(bytes.fromhex(left), 1)) is not None


async def test_after_a_clean_end_nothing_is_owed(tmp_path: Path) -> None:
    await make(tmp_path / "v", host_dirs(tmp_path, 1))
    async with opened(tmp_path / "v") as volume:
        await append(volume, new_value(volume), noise(100))
        await volume.flush()
        sweeper = sweeper_of(volume)
        assert sweeper.owed() == [], "the one before settled"
        assert sweeper.settle()
        with pytest.raises(Unavailable):
            await volume.sectors.write_sector(await volume.sectors.allocate_sector(), b"too late", "1")
        await volume.commit()
    async with opened(tmp_path / "v") as volume:
        assert sweeper_of(volume).owed() == []
        await volume.commit()
        # It dies instead of being closed.
        volume.sweeper = None
    async with opened(tmp_path / "v") as volume:
        assert sweeper_of(volume).owed() == [1], "nobody settled"


async def test_a_put_whose_answer_was_lost_makes_the_end_unclean(tmp_path: Path) -> None:
    url = host_dirs(tmp_path, 1)[0]
    await make(tmp_path / "v", [url])
    opener = FaultyOpener()
    async with open_volume(tmp_path / "v", passphrase=PASSPHRASE, options=QUIET, opener=opener) as volume:
        sweeper = sweeper_of(volume)
        await sweeper.sweep()
        faults = opener.faults[url]
        faults.only, faults.lose_answer_next = shards_only, 1
        await append(volume, new_value(volume), noise(100))
        with pytest.raises(Unavailable):
            await volume.flush()
        await volume.flush()
        assert not sweeper.settle()
        await volume.commit()
    assert len(shards_on(tmp_path / "host0")) == 2
    async with opened(tmp_path / "v") as volume:
        sweeper = sweeper_of(volume)
        assert await sweeper.sweep() == []
        assert len(shards_on(tmp_path / "host0")) == 1
        assert sweeper.counts.deleted == 1


async def test_a_damaged_note_means_one_sweep_more(tmp_path: Path) -> None:
    await make(tmp_path / "v", host_dirs(tmp_path, 1))
    async with opened(tmp_path / "v") as volume:
        sweeper = sweeper_of(volume)
        await sweeper.sweep()
        assert sweeper.owed() == []
        batch = Batch()
        batch.put(LOCAL + b"swept.1", b"damaged")
        volume.store.apply(batch)
        assert sweeper.owed() == [1]
        assert await sweeper.sweep() == []
        assert sweeper.owed() == []


class Overtaken(TestGate):
    """Ours when asked first, and not any more when asked again."""

    async def confirm(self, host_number: int) -> bool:
        return await super().confirm(host_number) and self.asked == 1


async def test_a_copy_too_many_of_a_live_sector_goes_once_the_sector_lacks_nothing(tmp_path: Path) -> None:
    """A crash between the put and the record of a copy more (repair, a new host being filled) leaves one on no record."""
    await make(tmp_path / "v", host_dirs(tmp_path, 3), "2")
    async with opened(tmp_path / "v") as volume:
        value, data = new_value(volume), noise(5000)
        await append(volume, value, data)
        await volume.flush()
        await volume.sectors.wait_uploads()
        ((key, raw),) = volume.store.scan(SECTOR, prefix_end(SECTOR), 100)
        sector_id = read_u64(key, 1)
        (shard,) = decode_sector(raw, sector_id).shards
    (third,) = {1, 2, 3} - set(shard.hosts)
    root = shard.root.hex()
    (copy,) = (tmp_path / f"host{shard.hosts[0] - 1}").rglob(root)
    too_many = tmp_path / f"host{third - 1}" / copy.relative_to(tmp_path / f"host{shard.hosts[0] - 1}")
    too_many.parent.mkdir(parents=True, exist_ok=True)
    too_many.write_bytes(copy.read_bytes())
    await write_and_die(tmp_path / "v")
    async with opened(tmp_path / "v") as volume:
        # Not while one of those on record is bad, nor while somebody puts one there.
        volume.mender.bad = lambda _sector_id: {shard.hosts[0]}
        assert await sweeper_of(volume).sweep() == []
        volume.mender.bad = volume.damages.hosts
        with volume.deleter.spared(shard.root, third):
            assert await sweeper_of(volume).sweep() == []
        # Nor while a superblock may name it.
        assert await sweeper_of(volume, TestGate(ours=False)).sweep() != []
        assert too_many.exists()
        # Nor where that is so only since the page was begun.
        overtaken = Overtaken()
        assert await sweeper_of(volume, overtaken).sweep() != []
        assert overtaken.asked == 2 and too_many.exists()
        # Nor while one of those that still count does not answer.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(volume.standing, "here", lambda number: number != shard.hosts[0])
            assert await sweeper_of(volume).sweep() == []
        assert too_many.exists()
        sweeper = sweeper_of(volume)
        assert await sweeper.sweep() == []
        assert not too_many.exists()
        assert copy.exists()
        # Nothing is left for the next process: it need not list a single name.
        assert sweeper.owed() == []
        assert sweeper.settle()
        volume.sectors.cache._blocks.clear()
        assert await contents(volume, value) == data


async def test_what_is_on_hosts_before_the_quorum_is_on_no_record_so_that_a_crash_leaves_it_to_the_sweep(tmp_path: Path) -> None:
    """Breaks if a contract is said to hold a shard before anything names it: with the record of holders, no sweep would look at it."""
    await make(tmp_path / "v", host_dirs(tmp_path, 2), "2")
    with pytest.raises(BaseExceptionGroup) as caught:
        async with opened(tmp_path / "v", seams=Seams(failpoints=_Dead("host_io.write.before_apply", 2))) as volume:
            put, there = volume.host_io.write_sealed, trio.Event()

            async def write_sealed(contract_id: str, shard: SealedShard, placed: list[Placed] | None = None, *, beside: int = 0) -> None:
                if volume.contractor.contract(contract_id).host_number == 2:
                    await there.wait()
                    await volume.store.commit()
                await put(contract_id, shard, placed)
                there.set()

            volume.host_io.write_sealed = write_sealed  # type: ignore[method-assign]
            await append(volume, new_value(volume), noise(5000))
            await volume.flush()
    assert crashed_in(caught.value)
    assert len(shards_on(tmp_path / "host0")) == len(shards_on(tmp_path / "host1")) == 1
    async with opened(tmp_path / "v") as volume:
        assert await sweeper_of(volume).sweep() == []
        assert shards_on(tmp_path / "host0") == shards_on(tmp_path / "host1") == []


async def test_a_shard_that_went_to_another_host_because_it_could_not_be_recorded_fills_one_place(tmp_path: Path) -> None:
    """I3: a sector that lacks a shard is not told to be whole, because another shard is on two hosts."""
    await make(tmp_path / "v", host_dirs(tmp_path, 5), "2+2")
    async with opened(tmp_path / "v") as volume, trio.open_nursery() as nursery:
        sector_id = await volume.sectors.allocate_sector("2+2")
        layout = layout_of("2+2", 1000)
        shards, _ = await volume.sectors._seal(sector_id, layout, [noise(1000)])
        told: list[tuple[bool, list[int]]] = []

        def landed(sector_id: int, replication: str, length: int, records: list[ShardRecord], *, full: bool) -> None:
            told.append((full, [len(record.hosts) for record in records]))
            if len(told) == 1:
                raise NoSpace("more changes wait than the journal can hold")

        put = volume.host_io.write_sealed

        async def write_sealed(contract_id: str, shard: SealedShard, placed: list[Placed] | None = None, *, beside: int = 0) -> None:
            if shard.root == shards[3].root:
                await trio.sleep(0.05)
                raise Unavailable("no host takes this one")
            await put(contract_id, shard, placed)

        volume.host_io.write_sealed = write_sealed  # type: ignore[method-assign]
        ended = trio.Event()
        upload = Upload(replace(volume.sectors._way, landed=landed), sector_id, "2+2", layout, ended.set)
        upload.start(shards, nursery)
        with trio.fail_after(30):
            await ended.wait()
        assert told[-1][1][3] == 0 and sorted(told[-1][1]) == [0, 1, 1, 2]
        assert not any(full for full, _ in told)


async def test_a_shard_that_is_put_again_is_not_deleted_for_the_attempt_before(tmp_path: Path) -> None:
    """I2: it is on its host, and on no record before the others are, too. Breaks if it is not spared up to then."""
    opener = FaultyOpener()
    urls = host_dirs(tmp_path, 2)
    await make(tmp_path / "v", urls, "2")
    async with open_volume(tmp_path / "v", passphrase=PASSPHRASE, options=QUIET, opener=opener) as volume, trio.open_nursery() as nursery:
        volume.deleter.gate = TestGate()
        sector_id = await volume.sectors.allocate_sector()
        layout = layout_of("2", 100)
        shards = [volume.host_io.seal([noise(100)], sector_id)]

        def attempt() -> Upload:
            upload = Upload(volume.sectors._way, sector_id, "2", layout, lambda: None)
            upload.start(shards, nursery)
            return upload

        opener.faults[urls[1]].gone = "unplugged"
        with pytest.raises(Unavailable):
            await attempt().wait_quorum()
        assert volume.deleter.pending() == 1
        opener.faults[urls[1]].gone = None
        await volume.hosts.retry_once()
        put, there, go_on = volume.host_io.write_sealed, trio.Event(), trio.Event()

        async def write_sealed(contract_id: str, shard: SealedShard, placed: list[Placed] | None = None, *, beside: int = 0) -> None:
            if volume.contractor.contract(contract_id).host_number == 2:
                await go_on.wait()
            await put(contract_id, shard, placed)
            there.set()

        volume.host_io.write_sealed = write_sealed  # type: ignore[method-assign]
        again = attempt()
        await there.wait()
        await trio.testing.wait_all_tasks_blocked()
        await volume.deleter.drain()
        go_on.set()
        await again.wait_quorum()
        await volume.deleter.drain()
        assert volume.deleter.pending() == 0
        assert shards_on(tmp_path / "host0") == shards_on(tmp_path / "host1") == [shards[0].root]
