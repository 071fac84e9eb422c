"""Hosts that say they have what they have not, or come back with last week's: flush counts on a majority, recovery finds it (I4, I5)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from storage.errors import FusefsError
from storage.hosts.faults import Faults
from storage.recovery import recover_volume
from storage.volume import Volume
from storage.wiring import open_volume
from tests.host_rig import FaultyOpener, Stored
from tests.rig import PASSPHRASE, QUIET, host_dirs, make, noise, published
from tests.test_split_brain import acknowledged, reaching, write


async def files(path: Path, opener: FaultyOpener | None = None) -> list[str]:
    async with open_volume(path, passphrase=PASSPHRASE, options=QUIET, opener=opener) as volume:
        return sorted(await volume.files.list())


def superblocks(url: str) -> list[str]:
    """Newest last."""
    return Stored(url).names("/superblock.")


def forgetting(what: str) -> Faults:
    """Acknowledges what has this in its name, and forgets it."""
    return Faults(losing=True, only=lambda _operation, name: what in name)


async def test_metadata_a_host_forgets_come_from_the_others(tmp_path: Path) -> None:
    urls = host_dirs(tmp_path, 3)
    await make(tmp_path / "v", urls, "2")
    opener = FaultyOpener()
    async with open_volume(tmp_path / "v", passphrase=PASSPHRASE, options=QUIET, opener=opener) as volume:
        opener.faults[urls[0]] = opener.hosts[urls[0]].faults = forgetting("/metadata/")
        for i in range(5):
            await write(volume, f"file{i}", noise(3000))
            assert await acknowledged(volume)
    shutil.rmtree(tmp_path / "v")
    for number, urls_given in enumerate((urls[:1], urls[1:2], urls)):
        # The one that forgot names the others.
        report = await recover_volume(tmp_path / f"w{number}", urls_given, passphrase=PASSPHRASE)
        assert report.files == 5, report
    assert len(await files(tmp_path / "w2")) == 5


async def test_superblocks_that_a_majority_forgets_are_not_acknowledged(tmp_path: Path) -> None:
    """A superblock is re-read; two of three hosts say they have it, and have not."""
    urls = host_dirs(tmp_path, 3)
    await make(tmp_path / "v", urls, "2")
    opener = FaultyOpener()
    async with open_volume(tmp_path / "v", passphrase=PASSPHRASE, options=QUIET, opener=opener) as volume:
        await write(volume, "before", b"x")
        assert await acknowledged(volume)
        for url in urls[:2]:
            opener.faults[url] = opener.hosts[url].faults = forgetting("/superblock.")
        await write(volume, "after", b"x")
        assert not await acknowledged(volume)
        for url in urls[:2]:
            opener.faults[url] = opener.hosts[url].faults = Faults()
        assert await acknowledged(volume)


@pytest.mark.parametrize("mounted", [False, True])
async def test_a_host_comes_back_with_what_it_had_last_week(tmp_path: Path, *, mounted: bool) -> None:
    """While the volume is mounted or not: with the others the newest is found; from it alone what it has, never a mixture."""
    urls = host_dirs(tmp_path, 3)
    await make(tmp_path / "v", urls, "3")
    states = []

    async def work(volume: Volume, names: str) -> None:
        for name in names:
            await write(volume, name, noise(3000))
            assert await acknowledged(volume)
            await published(volume)
            states.append(sorted(await volume.files.list()))

    def put_back() -> None:
        shutil.rmtree(tmp_path / "host0")
        (tmp_path / "last week").rename(tmp_path / "host0")

    async with open_volume(tmp_path / "v", passphrase=PASSPHRASE, options=QUIET) as volume:
        await work(volume, "abc")
        shutil.copytree(tmp_path / "host0", tmp_path / "last week")
        await work(volume, "defgh")
        if mounted:
            put_back()
            await work(volume, "ijk")
    if not mounted:
        put_back()
    shutil.rmtree(tmp_path / "v")
    alone, others = reaching(urls, urls[:1]), reaching(urls, urls[1:])
    shutil.copytree(tmp_path / "host0", tmp_path / "kept")
    report = await recover_volume(tmp_path / "w0", urls[:1], passphrase=PASSPHRASE, opener=alone)
    assert not report.majority
    found = await files(tmp_path / "w0", alone)
    assert found in states and found[:3] == ["a", "b", "c"]
    shutil.rmtree(tmp_path / "host0")
    (tmp_path / "kept").rename(tmp_path / "host0")
    assert (await recover_volume(tmp_path / "w1", urls[1:], passphrase=PASSPHRASE, opener=others)).majority
    assert await files(tmp_path / "w1", others) == states[-1]
    await recover_volume(tmp_path / "w2", urls[:1], passphrase=PASSPHRASE)
    async with open_volume(tmp_path / "w2", passphrase=PASSPHRASE, options=QUIET) as volume:
        assert sorted(await volume.files.list()) == states[-1]
        await work(volume, "z")
        # ... and brought up to date.
    if mounted:
        # What was written while it was away has its copies on the others alone: making them again is for reconcile.
        return
    shutil.rmtree(tmp_path / "host1")
    shutil.rmtree(tmp_path / "host2")
    await recover_volume(tmp_path / "w3", urls[:1], passphrase=PASSPHRASE)
    assert await files(tmp_path / "w3", alone) == states[-1]


@pytest.mark.parametrize("damage", ["another volume's", "cut", "empty", "last week's under a new name", "garbage"])
async def test_a_superblock_that_is_none_is_passed_over(tmp_path: Path, damage: str) -> None:
    urls = host_dirs(tmp_path, 3)
    await make(tmp_path / "v", urls, "2")
    await make(tmp_path / "other", urls[:1])
    async with open_volume(tmp_path / "v", passphrase=PASSPHRASE, options=QUIET) as volume:
        ours = volume.volume_id
        await write(volume, "a", b"1")
        assert await acknowledged(volume)
        first = Stored(urls[0]).read([name for name in superblocks(urls[0]) if ours in name][-1])
        await write(volume, "b", b"2")
        assert await acknowledged(volume)
    stored = Stored(urls[0])
    mine = [name for name in superblocks(urls[0]) if ours in name]
    foreign = [name for name in superblocks(urls[0]) if ours not in name]
    newest = stored.read(mine[-1])
    above = mine[-1][:-20] + f"{int(mine[-1][-20:]) + 7:020d}"
    content = {"another volume's": stored.read(foreign[-1]), "cut": newest[:-1], "empty": b"", "garbage": noise(500)}
    stored.write(above, content.get(damage, first))
    if damage != "last week's under a new name":
        # Also in place of the newest one there.
        stored.write(mine[-1], content[damage])
    async with open_volume(tmp_path / "v", passphrase=PASSPHRASE, options=QUIET) as volume:
        await write(volume, "c", b"3")
        assert await acknowledged(volume)
        assert len({len(superblocks(url)) > 0 for url in urls}) == 1
    for number, given in enumerate((urls[:1], urls)):
        await recover_volume(tmp_path / f"w{number}", given, volume_id=ours, passphrase=PASSPHRASE)
        assert await files(tmp_path / f"w{number}") == ["a", "b", "c"]
    alone = reaching(urls, urls[:1])
    await recover_volume(tmp_path / "last", urls[:1], volume_id=ours, passphrase=PASSPHRASE, opener=alone)


async def test_hosts_added_by_a_machine_without_a_majority_do_not_give_it_one(tmp_path: Path) -> None:
    """I5: what counts as a majority is not for a minority to change."""
    urls = host_dirs(tmp_path, 7)
    await make(tmp_path / "v", urls[:3], "2")
    first, second = reaching(urls, urls[:2]), reaching(urls, urls[2:])
    async with open_volume(tmp_path / "v", passphrase=PASSPHRASE, options=QUIET, opener=first) as a:
        await write(a, "both", b"know")
        assert await acknowledged(a)
        report = await recover_volume(tmp_path / "w", urls[2:3], passphrase=PASSPHRASE, opener=second)
        assert not report.majority
        async with open_volume(tmp_path / "w", passphrase=PASSPHRASE, options=QUIET, opener=second) as b:
            for url in urls[3:]:
                try:
                    await b.add_host(url)
                except FusefsError:
                    break
            await write(b, "second", b"2")
            try:
                acknowledged_there = await acknowledged(b)
            except FusefsError:
                acknowledged_there = False
        await write(a, "first", b"1")
        assert not (await acknowledged(a) and acknowledged_there)
