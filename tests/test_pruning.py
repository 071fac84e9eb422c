"""A host's owner takes away what no contract covers; whoever comes back at any moment is told the truth, and can go on. In virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from storage.checking import check_volume
from storage.errors import BadArgument, Busy, NotFound, Unavailable
from storage.hosts.layout import CONTRACT_FORMAT, ContractFile, contract_name, encode_json, pruning_name
from storage.hosts.memory import memory_content
from storage.interfaces import Batch, Buffer
from storage.metadata.keys import SETTING
from storage.pruning import HeldVolume, Pruner, open_pruner
from storage.sectors.doubts import Doubts
from storage.volume import Volume
from tests.contract_rig import DAY, Volumes, copies, in_virtual_time, last
from tests.host_rig import FaultyOpener
from tests.rig import PASSPHRASE, host_dirs
from tests.test_reconcile import records

ONE = "11" * 16


@asynccontextmanager
async def pruner(
    it: Volumes, host: str, grace: float = 30.0, forced: tuple[str, ...] = (), opener: FaultyOpener | None = None
) -> AsyncIterator[Pruner]:
    async with open_pruner(f"mem:{host}", grace_days=grace, forced=forced, seams=it.seams(), opener=opener) as opened:
        yield opened


async def prune(it: Volumes, host: str, grace: float = 30.0, forced: tuple[str, ...] = ()) -> list[HeldVolume]:
    """As the command does with --yes."""
    async with pruner(it, host, grace, forced) as opened:
        held = await opened.survey()
        for volume in held:
            if volume.prunable:
                await opened.prune(volume)
        return held


async def filled(path: Path, hosts: str = "ab", replication: str = "2", count: int = 3) -> Volumes:
    """A volume with some sectors, nobody at it."""
    it = Volumes(path)
    await it.make(hosts, replication)
    async with it.mounted() as volume:
        await it.write(volume, count)
    return it


def objects(host: str) -> dict[str, bytes]:
    return dict(memory_content(host).objects)


def of_volume(host: str, volume: str) -> list[str]:
    return [name for name in memory_content(host).objects if name.startswith(f"volumes/{volume}/")]


async def identity(it: Volumes) -> str:
    async with pruner(it, "a") as opened:
        return (await opened.survey())[0].volume_id


def test_only_what_ended_longer_than_the_grace_ago_goes(tmp_path: Path) -> None:
    async def work() -> None:
        it = await filled(tmp_path / "v")
        other = Volumes(tmp_path / "w", clock=it.clock)
        verdicts = []
        for days in (0, 89, 2, 28):
            it.clock.jump(days * DAY)
            if days == 2:
                # Another volume on the same host, in force for long.
                await other.make("a", "1")
            before = objects("a")
            verdicts.append([volume.verdict for volume in await prune(it, "a") if volume.bytes and volume.contracts[0].end_ns < 1.745e18])
            assert objects("a") == before
        assert verdicts == [["in force"], ["in force"], ["in grace"], ["in grace"]]
        it.clock.jump(2 * DAY)
        held = await prune(it, "a")
        assert sorted((volume.verdict, volume.pruned) for volume in held) == [("in force", False), ("over", True)]
        (gone,) = [volume for volume in held if volume.pruned]
        assert gone.shards == 3 and gone.superblocks == 2 and gone.metadata and gone.bytes > 400_000
        assert not of_volume("a", gone.volume_id)
        assert "fusefs-host.json" in objects("a")
        # The other host's owner has not pruned: all is there.
        async with it.mounted() as volume:
            assert await it.readable(volume)
        async with other.mounted() as volume:
            await other.write(volume)
            assert await other.readable(volume)

    in_virtual_time(work)


def test_a_renewal_counts_and_the_last_contract_decides(tmp_path: Path) -> None:
    async def work() -> None:
        it = await filled(tmp_path / "v")
        async with it.mounted() as volume:
            await volume.contractor.renew_contract(last(volume, 1).contract_id, 400 * DAY)
        it.clock.jump(200 * DAY)
        assert [volume.verdict for volume in await prune(it, "a")] == ["in force"]
        assert [volume.pruned for volume in await prune(it, "b")] == [True]

    in_virtual_time(work)


def _contract(**changes: object) -> Callable[[str, str], bytes]:
    def make(volume: str, host: str) -> bytes:
        fields = {"contract": ONE, "volume": volume, "host": host, "start_ns": 1, "end_ns": 2, "lineage": ONE, "renewed_from": None}
        return encode_json(ContractFile(format=CONTRACT_FORMAT, format_version=1, **{**fields, **changes}))  # type: ignore[arg-type]

    return make


UNCLEAR: dict[str, tuple[str, Callable[[str, str], bytes]]] = {
    "damaged": (f"{ONE}.json", lambda volume, host: _contract()(volume, host)[:-9] + b"x" * 9),
    "of another volume": (f"{ONE}.json", _contract(volume=ONE)),
    "of another host": (f"{ONE}.json", _contract(host=ONE)),
    "under another name": ("22" * 16 + ".json", _contract()),
    "no contract": ("notes.txt", lambda _volume, _host: b"keep this!"),
    "deeper down": (f"old/{ONE}.json", _contract()),
    "of a newer format": (f"{ONE}.json", lambda volume, host: _contract()(volume, host).replace(b'_version": 1', b'_version": 2')),
}


@pytest.mark.parametrize("what", UNCLEAR)
def test_an_unclear_contract_keeps_the_volume_unless_it_is_named(what: str, tmp_path: Path) -> None:
    async def work() -> None:
        it = await filled(tmp_path / "v")
        volume_id = await identity(it)
        async with pruner(it, "a") as opened:
            host_id = opened.host_id
        name, make = UNCLEAR[what]
        it.stored("a").write(f"volumes/{volume_id}/contracts/{name}", make(volume_id, host_id))
        it.clock.jump(1000 * DAY)
        before = objects("a")
        (held,) = await prune(it, "a")
        assert held.verdict == "unclear" and held.problems
        assert objects("a") == before
        with pytest.raises(NotFound):
            await prune(it, "a", forced=(ONE,))
        assert objects("a") == before
        (held,) = await prune(it, "a", forced=(volume_id,))
        assert held.pruned and not of_volume("a", volume_id)

    in_virtual_time(work)


def test_being_named_does_not_help_against_a_contract_in_force_or_in_grace(tmp_path: Path) -> None:
    async def work() -> None:
        it = await filled(tmp_path / "v")
        volume_id = await identity(it)
        it.stored("a").write(f"volumes/{volume_id}/contracts/x", b"?")
        before = objects("a")
        for days in (0, 100):
            it.clock.jump(days * DAY)
            (held,) = await prune(it, "a", forced=(volume_id,))
            assert not held.pruned and held.verdict == ("in grace" if days else "in force")
        assert objects("a") == before
        with pytest.raises(BadArgument):
            await prune(it, "a", forced=("all",))

    in_virtual_time(work)


def test_no_contract_at_all_is_unclear(tmp_path: Path) -> None:
    async def work() -> None:
        it = await filled(tmp_path / "v")
        volume_id = await identity(it)
        for name in it.stored("a").names("/contracts/"):
            it.stored("a").remove(name)
        it.clock.jump(1000 * DAY)
        (held,) = await prune(it, "a")
        assert held.verdict == "unclear" and not held.pruned
        assert (await prune(it, "a", forced=(volume_id,)))[0].pruned

    in_virtual_time(work)


def test_broken_off_anywhere_it_is_gone_on_with_and_nobody_is_misled_meanwhile(tmp_path: Path) -> None:
    """Every call a pruning makes fails once, and every one after it: the host's machine lost its power there."""

    async def work() -> None:
        it = await filled(tmp_path / "v", count=2)
        volume_id = await identity(it)
        whole = objects("a")
        now = it.clock.time_ns()
        it.clock.jump(200 * DAY)
        points = 0
        while True:
            memory_content("a").objects = dict(whole)
            opener = FaultyOpener()
            async with pruner(it, "a", opener=opener) as opened:
                (held,) = await opened.survey()
                left = [points]

                def dead(_operation: str, _name: str, left: list[int] = left) -> bool:
                    left[0] -= 1
                    return left[0] < 0

                opener.faults["mem:a"].gone, opener.faults["mem:a"].only = "no power", dead
                try:
                    await opened.prune(held)
                except Unavailable:
                    points += 1
                else:
                    break
            there = of_volume("a", volume_id)
            parts = {part: [name for name in there if f"/{part}" in name] for part in ("contracts", "superblock", "metadata", "sectors")}
            marked = pruning_name(bytes.fromhex(volume_id)) in there
            if len(there) - marked < len([name for name in whole if name.startswith("volumes/")]):
                assert marked
            if parts["superblock"] != [name for name in whole if "/superblock" in name]:
                # No contract of which anybody could think that it covers what is there.
                assert not parts["contracts"]
            if len(parts["sectors"]) < 2 or not parts["metadata"]:
                assert not parts["superblock"]
            if marked and points % 5 == 0:
                await _owner_in_the_middle(it, contract_left=bool(parts["contracts"]))
            if there:
                (again,) = await prune(it, "a")
                assert again.pruned, again
            assert not of_volume("a", volume_id)
        assert points > 15
        assert it.clock.time_ns() > now

    in_virtual_time(work)


async def _owner_in_the_middle(it: Volumes, *, contract_left: bool) -> None:
    volume_files = {path: path.read_bytes() for path in it.path.rglob("*") if path.is_file()}
    there, others = objects("a"), objects("b")
    async with it.mounted() as volume:
        assert volume.standing.keeping() == {2}
        (warning,) = volume.renewal.warnings()
        assert "being pruned" in warning if contract_left else "pruned" in warning
        with pytest.raises(Busy, match="being pruned by its owner"):
            await volume.contractor.conclude_contract("1", 100 * DAY)
        assert await it.readable(volume)
    for path, data in volume_files.items():
        path.write_bytes(data)
    for path in [path for path in it.path.rglob("*") if path.is_file() and path not in volume_files]:
        path.unlink()
    memory_content("a").objects, memory_content("b").objects = there, others


def test_a_contract_concluded_at_the_same_moment_wins_or_is_refused(tmp_path: Path) -> None:
    """Of the mark and the contract, whichever is second sees the first."""

    async def work() -> None:
        it = await filled(tmp_path / "v")
        it.clock.jump(200 * DAY)
        before = objects("a")
        opener = FaultyOpener()
        async with pruner(it, "a", opener=opener) as opened:
            (held,) = await opened.survey()
            put = opened.host.put

            async def late(name: str, data: Buffer) -> str:
                # Right before the mark the volume's owner comes back, and renews.
                async with it.mounted() as volume:
                    assert last(volume, 1).active(it.clock.time_ns())
                return await put(name, data)

            opened.host.put = late  # type: ignore[method-assign]
            with pytest.raises(Busy, match="in force"):
                await opened.prune(held)
        assert before.keys() - objects("a").keys() <= {name for name in before if "superblock" in name or "metadata" in name}
        assert not [name for name in objects("a") if name.endswith("pruning.json")]
        async with it.mounted() as volume:
            assert await it.readable(volume)
            assert volume.standing.keeping() == {1, 2}
            # The other way round: the mark is there first.
            it.stored("a").write(pruning_name(volume.config.volume_id_bytes), b"{}")
            contracts = it.stored("a").names("/contracts/")
            with pytest.raises(Busy, match="being pruned"):
                await volume.contractor.renew_contract(last(volume, 1).contract_id, 500 * DAY)
            assert it.stored("a").names("/contracts/") == contracts

    in_virtual_time(work)


async def _sees(volume: Volume, text: str) -> bool:
    return any(text in warning for warning in (await volume.status()).warnings)


@pytest.mark.parametrize("replication", ["2", "2+1"])
def test_an_owner_who_comes_back_after_it_repairs_concludes_anew_and_fills_the_host_again(replication: str, tmp_path: Path) -> None:
    async def work() -> None:
        it = await filled(tmp_path / "v", "abc", replication, count=6)
        wanted = len(objects("a"))
        it.clock.jump(200 * DAY)
        assert (await prune(it, "a"))[0].pruned
        async with it.mounted() as volume:
            assert volume.standing.keeping() == {2, 3}
            assert await _sees(volume, "conclude a new one (fusefs contracts VOLUME conclude 1 DAYS)")
            assert await it.readable(volume)
            if replication == "2":
                # What had its second copy there gets another elsewhere.
                await volume.repair()
                assert copies(volume) == {2}
                assert all(1 not in record.shards[0].hosts for record in records(volume).values())
        async with it.mounted() as volume:
            await volume.contractor.conclude_contract("1", 90 * DAY)
            if replication == "2+1":
                # On record it has a third of everything, and in truth nothing: none of it counts, all of it is made again.
                assert (await volume.repair()).pending == 0
                assert copies(volume) == {1}
                assert sum(1 for name in objects("a") if "/sectors/" in name) >= 6
            await it.write(volume, 6)
            await volume.repair()
            assert volume.standing.keeping() == {1, 2, 3}
            assert await it.readable(volume)
            assert not volume.sectors.degraded() and not volume.doubts.missing()
        assert len(objects("a")) > wanted // 2
        assert await _findings(it) == []

    in_virtual_time(work)


@pytest.mark.parametrize("hosts", ["ab", "abc"])
def test_with_a_contract_concluded_at_once_no_good_copy_is_dropped_for_one_that_is_gone(hosts: str, tmp_path: Path) -> None:
    """What is on record there is not, also where nobody tried to renew since the host was pruned, which would have told."""

    async def work() -> None:
        it = await filled(tmp_path / "v", hosts, "2", count=6)
        async with it.mounted() as volume:
            it.refuse("a")
        it.clock.jump(200 * DAY)
        async with it.mounted() as volume:
            it.refuse("a", None)
            assert (await prune(it, "a"))[0].pruned
            await volume.contractor.conclude_contract("1", 90 * DAY)
            await volume.reconciler.round()
            for _ in range(5):
                assert volume.publisher is not None
                await volume.publisher.tick()
                await volume.deleter.drain()
            assert copies(volume) == {2}
            assert await it.readable(volume)
            assert not volume.doubts.missing()

    in_virtual_time(work)


def test_a_host_that_is_pruned_long_before_the_end_is_noticed_told_and_left_until_there_is_a_new_contract(tmp_path: Path) -> None:
    """By force, or its disk was replaced. Not only when the contract is due, two months later: copies would be missing unseen till then."""

    async def work() -> None:
        it = await filled(tmp_path / "v", "abc", "2", count=8)
        async with it.mounted() as volume:
            for name in objects("a"):
                if "/volumes/" in f"/{name}":
                    it.stored("a").remove(name)
            await it.days(0.1)
            assert volume.standing.keeping() == {2, 3}
            (warning,) = volume.renewal.warnings()
            assert "mem:a has no contract" in warning
            assert "conclude" in warning
            await volume.repair()
            assert all(set(shard.hosts) == {2, 3} for record in records(volume).values() for shard in record.shards)
            assert await it.readable(volume)
        async with it.mounted() as volume:
            # Known from the start, and all the time.
            assert volume.standing.keeping() == {2, 3}
            assert volume.renewal.warnings()
            await volume.contractor.conclude_contract("1", 90 * DAY)
            await it.days(0.1)
            assert volume.standing.keeping() == {1, 2, 3}
            assert not volume.renewal.warnings()
            assert await it.readable(volume)

    in_virtual_time(work)


def test_a_host_that_was_pruned_and_is_away_for_a_moment_is_not_trusted_again_for_that(tmp_path: Path) -> None:
    """Nor after a restart meanwhile: only a new contract makes it one that keeps what it has."""

    async def work() -> None:
        it = await filled(tmp_path / "v", "abc", "2", count=4)
        async with it.mounted() as volume:
            for name in objects("a"):
                if "/volumes/" in f"/{name}":
                    it.stored("a").remove(name)
            await it.days(0.1)
            assert volume.standing.keeping() == {2, 3}
            it.refuse("a", "the network is down")
            it.opener.faults["mem:a"].only = None
            # Each attempt to renew fails for another reason now, and the absence is shorter than what makes a host one that is gone.
            await volume.renewal.renew_due()
            assert volume.standing.keeping() == {2, 3}
            assert any("no contract" in warning for warning in volume.renewal.warnings())
        async with it.mounted() as volume:
            assert volume.standing.keeping() == {2, 3}
            assert any("no contract" in warning for warning in volume.renewal.warnings())
            it.refuse("a", None)
            it.opener.faults["mem:a"].only = None
            await it.days(0.1)
            assert volume.standing.keeping() == {2, 3}
            await volume.contractor.conclude_contract("1", 90 * DAY)
            assert volume.standing.keeping() == {1, 2, 3}
            assert not volume.renewal.warnings()

    in_virtual_time(work)


def test_what_was_only_there_is_said_to_be_lost_and_is_back_if_the_host_gets_it_back(tmp_path: Path) -> None:
    async def work() -> None:
        it = await filled(tmp_path / "v", "ab", "1", count=8)
        backup = objects("a")
        it.clock.jump(200 * DAY)
        assert (await prune(it, "a"))[0].pruned
        async with it.mounted() as volume:
            gone = [sector for sector, record in records(volume).items() if record.shards[0].hosts == [1]]
            assert 0 < len(gone) < 8
            assert (await volume.repair()).pending == len(gone)
            now = await volume.status()
            assert now.missing_places == now.degraded_sectors == len(gone)
            await volume.contractor.conclude_contract("1", 90 * DAY)
            await volume.repair()
            assert volume.doubts.missing() == len(gone)
        assert sum(kind == "missing-copy" for kind in await _findings(it)) == len(gone)
        for name, data in backup.items():
            if "/sectors/" in name:
                it.stored("a").write(name, data)
        async with it.mounted() as volume:
            assert (await volume.repair()).pending == 0
            assert not volume.doubts.missing()
            assert await it.readable(volume)
        assert await _findings(it) == []

    in_virtual_time(work)


def test_a_copy_that_is_cut_off_is_doubted_on(tmp_path: Path) -> None:
    """What a host has back after it had forgotten it counts once it is what was put there: from where it begins to where it ends."""

    async def work() -> None:
        it = await filled(tmp_path / "v", "ab", "1", count=8)
        backup = objects("a")
        it.clock.jump(200 * DAY)
        await prune(it, "a")
        async with it.mounted() as volume:
            await volume.repair()
            await volume.contractor.conclude_contract("1", 90 * DAY)
            missing = volume.doubts.missing()
            assert missing
        for name, data in backup.items():
            if "/sectors/" in name:
                it.stored("a").write(name, data[:-1])
        async with it.mounted() as volume:
            await volume.repair()
            assert volume.doubts.missing() == missing

    in_virtual_time(work)


def test_a_damaged_mark_of_a_forgetful_host_ends_nothing(tmp_path: Path) -> None:
    async def work() -> None:
        it = await filled(tmp_path / "v", "ab", "1", count=1)
        async with it.mounted() as volume:
            batch = Batch()
            for name in (b"99999999999", b"x", b"", b"-1", b"007", b"4294967295"):
                batch.put(SETTING + b"doubted." + name, b"")
            volume.store.apply(batch)
            doubts = Doubts(volume.store, volume.host_io, volume.contractor)
            doubts.of(1)
            await doubts.walk()
            # Rounds go on until no host is forgetful.
            assert not doubts.forgetful()
            assert await it.readable(volume)

    in_virtual_time(work)


def test_deleting_a_file_takes_the_doubts_of_its_sectors_away(tmp_path: Path) -> None:
    async def work() -> None:
        it = await filled(tmp_path / "v", "ab", "1", count=8)
        it.clock.jump(200 * DAY)
        await prune(it, "a")
        async with it.mounted() as volume:
            await volume.repair()
            assert volume.doubts.missing()
            for sector in list(records(volume)):
                await volume.sectors.delete(sector)
            assert not volume.doubts.missing()
            it.content.clear()

    in_virtual_time(work)


async def _findings(it: Volumes) -> list[str]:
    report = await check_volume(it.path, passphrase=PASSPHRASE, seams=it.seams(), opener=it.opener)
    # The rig's values belong to no file, as they are meant to.
    return sorted(kind for kind in report.found.elements() if kind != "unowned-value")


async def test_a_directory_host_has_no_folder_left(tmp_path: Path) -> None:
    from storage.creation import create_volume
    from storage.keyfile import CHEAP
    from storage.seams import Seams
    from tests.fakes import ManualClock

    (url,) = host_dirs(tmp_path, 1)
    await create_volume(tmp_path / "v", PASSPHRASE, hosts=[url], argon2=CHEAP)
    clock = ManualClock(base_ns=Seams().clock.time_ns())
    clock.advance(300 * DAY)
    async with open_pruner(url, seams=Seams(clock=clock)) as opened:
        (held,) = await opened.survey()
        await opened.prune(held)
        assert not await opened.survey()
    assert list((tmp_path / "host0" / "volumes").iterdir()) == []
    with pytest.raises(NotFound, match=r"fusefs-host\.json"):
        (tmp_path / "empty").mkdir()
        async with open_pruner(f"dir:{tmp_path / 'empty'}"):
            pass


def test_the_names_used_here_are_the_layout_s() -> None:
    assert contract_name(bytes(16), ONE).endswith(f"/contracts/{ONE}.json")
