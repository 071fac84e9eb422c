"""`check_volume` on the history: what hosts have of it is told, mended where it can be, and left alone if it is another's."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from storage.history.objects import metadata_prefix
from storage.recovery import recover_volume
from storage.wiring import open_volume
from tests.host_rig import Stored
from tests.rig import PASSPHRASE, QUIET, host_dirs, make, opened
from tests.test_check import Checked, check
from tests.test_history import metadata, superblocks, write


async def a_volume(tmp_path: Path, hosts: int = 3) -> tuple[Path, list[str]]:
    """With two generations, a checkpoint and a log of its own."""
    urls = host_dirs(tmp_path, hosts)
    path = tmp_path / "volume"
    await make(path, urls, replication="2")
    async with opened(path) as volume:
        for name in ("first", "second"):
            await write(volume, name, name.encode() * 100)
            await volume.flush()
    return path, urls


def objects(url: str) -> list[str]:
    return Stored(url).names("/metadata/")


async def healthy(path: Path) -> None:
    done = await check(path, data=True)
    assert done.report.exit_status == 0, f"{done}"
    assert done.report.notes == Counter(), [str(finding) for finding in done.findings]
    assert done.report.looked_at["superblocks"] >= 2
    assert done.report.looked_at["metadata objects"] >= 3


async def test_a_healthy_history_is_looked_at_and_nothing_is_said(tmp_path: Path) -> None:
    path, _ = await a_volume(tmp_path)
    await healthy(path)


@pytest.mark.parametrize("how", ["gone", "cut off", "flipped"])
async def test_a_bad_metadata_object_is_named_and_put_there_again(tmp_path: Path, how: str) -> None:
    path, urls = await a_volume(tmp_path)
    good = {name: Stored(urls[0]).read(name) for name in objects(urls[0])}
    for name, raw in good.items():
        if how == "gone":
            Stored(urls[0]).remove(name)
        else:
            Stored(urls[0]).write(name, raw[:-1] if how == "cut off" else raw[:-1] + bytes([raw[-1] ^ 1]))
    if how == "flipped":
        assert (await check(path)).report.exit_status == 0  # The sizes are right.
    told = await check(path, data=True)
    assert told.kinds == {"metadata-object"}
    assert len([one for one in told.findings if not one.note]) == len(good)
    assert (await check(path, repair=True, data=True)).report.exit_status == 20
    assert {name: Stored(urls[0]).read(name) for name in objects(urls[0])} == good
    await healthy(path)


async def test_what_no_host_has_any_more_is_written_anew_by_the_next_mount(tmp_path: Path) -> None:
    path, urls = await a_volume(tmp_path)
    for url in urls:
        for name in objects(url):
            raw = Stored(url).read(name)
            Stored(url).write(name, raw[:-1] + bytes([raw[-1] ^ 1]))
    assert (await check(path, data=True)).kinds == {"lost-metadata"}
    await check(path, data=True, repair=True)
    async with opened(path) as volume:
        assert (await volume.flush()).reasons == ()
    shutil.rmtree(urls[2].removeprefix("dir:"))
    await recover_volume(tmp_path / "again", urls[:2], passphrase=PASSPHRASE)
    async with opened(tmp_path / "again") as volume:
        assert set(await volume.files.list()) == {"first", "second"}


async def test_a_damaged_superblock_and_a_stranger_s_are_findings_and_a_host_without_any_is_behind(tmp_path: Path) -> None:
    path, urls = await a_volume(tmp_path)
    name = superblocks(urls[0])[-1]
    raw = Stored(urls[0]).read(name)
    Stored(urls[0]).write(name, raw[:-1] + bytes([raw[-1] ^ 1]))
    Stored(urls[1]).write(superblocks(urls[1])[0], b"none at all")
    for each in superblocks(urls[2]):
        Stored(urls[2]).remove(each)
    told = await check(path)
    assert told.kinds == {"superblock"}
    assert told.report.found["superblock"] == 2
    assert told.report.notes["behind"] == 2
    async with opened(path) as volume:
        await write(volume, "third", b"3")
        await volume.flush()
        await write(volume, "fourth", b"4")
        await volume.flush()
    assert (await check(path)).kinds <= {"superblock"}


async def test_no_superblock_anywhere_is_a_finding_until_it_was_mounted(tmp_path: Path) -> None:
    path, urls = await a_volume(tmp_path)
    for url in urls:
        for name in superblocks(url):
            Stored(url).remove(name)
    assert (await check(path)).kinds == {"no-superblock"}
    async with opened(path) as volume:
        await volume.flush()
    assert (await check(path)).kinds == set()


async def _elsewhere(tmp_path: Path, urls: list[str]) -> None:
    await recover_volume(tmp_path / "other", urls, passphrase=PASSPHRASE)
    async with open_volume(tmp_path / "other", passphrase=PASSPHRASE, options=QUIET) as volume:
        await write(volume, "elsewhere", b"e")
        await volume.flush()


def _everything(path: Path, urls: list[str]) -> dict[str, bytes]:
    places = [path, *(Path(url.removeprefix("dir:")) for url in urls)]
    return {str(file): file.read_bytes() for place in places for file in sorted(place.rglob("*")) if file.is_file()}


async def test_where_another_machine_has_gone_on_nothing_is_repaired(tmp_path: Path) -> None:
    path, urls = await a_volume(tmp_path)
    await _elsewhere(tmp_path, urls)
    # Which two of three have shards is chance.
    holder = next(stored for stored in map(Stored, urls) if stored.names("/sectors/"))
    holder.remove(holder.names("/sectors/")[0])

    def on_hosts() -> dict[str, bytes]:
        return {name: data for name, data in _everything(path, urls).items() if "/host" in name}

    before = on_hosts()
    done: Checked = await check(path, repair=True)
    assert "foreign-history" in done.kinds
    assert "/other" in str(done)
    assert "fusefs recover" in str(done)
    assert done.report.repaired == Counter()
    assert done.report.exit_status == 21
    assert on_hosts() == before


async def test_another_history_on_a_minority_is_no_reason_not_to_repair(tmp_path: Path) -> None:
    path, urls = await a_volume(tmp_path)
    away = [Path(url.removeprefix("dir:")) for url in urls[1:]]
    for place in away:
        place.rename(f"{place}.away")
    await recover_volume(tmp_path / "other", urls[:1], passphrase=PASSPHRASE)
    for place in away:
        Path(f"{place}.away").rename(place)
    Stored(urls[1]).remove(objects(urls[1])[0])
    done = await check(path, repair=True)
    assert done.report.repaired["metadata-object"] == 1
    assert done.report.notes["behind"] == 1
    assert done.report.exit_status == 20, f"{done}"


async def test_a_superblock_of_a_newer_fusefs_keeps_everything_as_it_is(tmp_path: Path) -> None:
    path, urls = await a_volume(tmp_path)
    name = superblocks(urls[0])[-1]
    raw = Stored(urls[0]).read(name)
    Stored(urls[0]).write(name, raw[:8] + (99).to_bytes(4, "big") + raw[12:])
    Stored(urls[1]).remove(objects(urls[1])[0])
    done = await check(path, repair=True)
    assert {"newer-history", "metadata-object"} <= done.kinds
    assert done.report.repaired == Counter()


async def test_objects_that_nothing_names_are_a_note(tmp_path: Path) -> None:
    path, urls = await a_volume(tmp_path)
    name = objects(urls[0])[0]
    Stored(urls[0]).write(name[:-64] + "ab" * 32, b"of a checkpoint that was broken off")
    async with opened(path) as volume:
        assert metadata(urls[0], volume)
        prefix = metadata_prefix(volume.config.volume_id_bytes)
    assert name.startswith(prefix)
    Stored(urls[0]).write(name[:-64] + "cd" * 32, b"of another one")
    done = await check(path)
    assert done.report.exit_status == 0
    assert done.report.notes["pending"] == 1
