"""A volume open for reading only: what it shows, that it changes nothing, and what it needs."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from fusefs.scratch import Scratch
from storage.errors import BadArgument, Fenced, FusefsError, NotFound, Unavailable, WrongPassphrase
from storage.read_only import ReadOnlySource, ReadOnlyVolume, open_read_only
from storage.recovery import recover_volume
from storage.volume import Volume
from tests.rig import PASSPHRASE, QUIET, host_dirs, make, opened
from tests.sweeping import sweeper_of
from tests.test_sweep import write_and_die

#: LMDB's table of readers is rebuilt by whoever opens a volume; it is no part of what is stored.
NOT_STORED = ("lock.mdb",)


def everything(*roots: Path) -> dict[str, tuple[int, bytes]]:
    """Mode and bytes of every file below."""
    return {
        str(path): (path.stat().st_mode, path.read_bytes())
        for root in roots
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name not in NOT_STORED
    }


@asynccontextmanager
async def viewed(source: ReadOnlySource, scratch: Path) -> AsyncIterator[ReadOnlyVolume]:
    scratch.mkdir()
    try:
        async with open_read_only(source, scratch=scratch, options=QUIET) as volume:
            yield volume
    finally:
        shutil.rmtree(scratch)


async def put(volume: Volume, name: str, data: bytes) -> None:
    fd = await volume.files.open(name, write=True)
    await volume.files.append(fd, data)
    await volume.files.close(fd)


async def content(volume: Volume, name: str) -> bytes:
    fd = await volume.files.open(name, existing=True)
    data = await volume.files.read_at(fd, 0, 1 << 30)
    await volume.files.close(fd)
    return data


def crashed_copy(volume: Path, to: Path) -> Path:
    """What a kill -9 right now would leave."""
    shutil.copytree(volume, to, ignore=shutil.ignore_patterns("control.sock", *NOT_STORED))
    return to


# ------------------------------------------------------------------------------------------------------ from a directory


async def test_a_crashed_volume_shows_all_it_durably_has_and_not_a_byte_of_it_changes(tmp_path: Path) -> None:
    urls = host_dirs(tmp_path, 2)
    await make(tmp_path / "v", urls, "2")
    in_sectors, in_journal = os.urandom(300_000), os.urandom(600_000)
    async with opened(tmp_path / "v") as volume:
        await put(volume, "sectors", in_sectors)
        await volume.flush()
        await put(volume, "dir/journal", in_journal[:5])
        await volume.commit()
        await put(volume, "dir/journal", in_journal[5:100_000])
        await volume.commit()
        copy = crashed_copy(tmp_path / "v", tmp_path / "copy")
    before = everything(copy, tmp_path / "host0", tmp_path / "host1")
    async with viewed(ReadOnlySource(copy, passphrase=PASSPHRASE), tmp_path / "scratch") as view:
        assert await content(view, "sectors") == in_sectors
        assert await content(view, "dir/journal") == in_journal[:100_000]
        status = await view.status()
        assert (status.read_only, status.local_error, status.pending_bytes) == (True, "", 100_000)
        assert f"commit {view.store.durable_sequence}" in status.view
        await view.commit()
        await view.flush()
    assert everything(copy, tmp_path / "host0", tmp_path / "host1") == before


async def test_memory_that_is_idle_goes_back_whoever_has_the_volume_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trims = 0

    def trim() -> None:
        nonlocal trims
        trims += 1

    async def seen() -> None:
        before = trims
        with trio.fail_after(20):
            while trims < before + 2:
                await trio.sleep(0.01)

    monkeypatch.setattr("storage.wiring.TRIM_SECONDS", 0.01)
    monkeypatch.setattr("storage.coprocess.pair.ARENA.trim", trim)
    await make(tmp_path / "v", host_dirs(tmp_path, 1))
    async with opened(tmp_path / "v") as volume:
        await seen()
        copy = crashed_copy(volume.path, tmp_path / "copy")
    async with viewed(ReadOnlySource(copy, passphrase=PASSPHRASE), tmp_path / "scratch"):
        await seen()


async def test_a_tail_larger_than_a_sector_stays_where_it_is(tmp_path: Path) -> None:
    """Hosts refused it, so the journal has it whole; a reader must not send it now that they are back."""
    await make(tmp_path / "v", host_dirs(tmp_path, 1))
    data = os.urandom(1_000_000)
    async with opened(tmp_path / "v") as volume:
        await put(volume, "f", b"")
        await volume.commit()
        (tmp_path / "host0").rename(tmp_path / "away")
        await put(volume, "f", data)
        await volume.commit()
        copy = crashed_copy(tmp_path / "v", tmp_path / "copy")
    (tmp_path / "away").rename(tmp_path / "host0")
    before = everything(copy, tmp_path / "host0")
    async with viewed(ReadOnlySource(copy, passphrase=PASSPHRASE), tmp_path / "scratch") as view:
        assert (await view.status()).pending_bytes == len(data)
        assert await content(view, "f") == data
        await view.flush()
        await trio.sleep(0.3)
        # Nor was it tried: that would have been refused, and said here.
        assert (await view.status()).warnings == []
    assert everything(copy, tmp_path / "host0") == before


async def test_nothing_inside_can_write(tmp_path: Path) -> None:
    urls = host_dirs(tmp_path, 2)
    await make(tmp_path / "v", urls[:1])
    async with opened(tmp_path / "v") as volume:
        await put(volume, "f", b"x")
        await volume.flush()
    before = everything(tmp_path)
    async with viewed(ReadOnlySource(tmp_path / "v", passphrase=PASSPHRASE), tmp_path / "scratch") as view:
        names, ino = view.namespace, view.namespace.lookup(1, b"f")
        for change in (
            lambda: names.create(1, b"g", 0o100644, 0, 0),
            lambda: names.mkdir(1, b"d", 0o755, 0, 0),
            lambda: names.symlink(1, b"s", b"f", 0, 0),
            lambda: names.link(ino, 1, b"h"),
            lambda: names.unlink(1, b"f"),
            lambda: names.truncate(ino, 0),
            lambda: names.set_replication(1, "1"),
            lambda: names.setxattr(ino, b"user.a", b"1"),
            lambda: names.set_worm(1),
        ):
            with pytest.raises(Fenced, match="read-only"):
                change()
        with pytest.raises(Fenced):
            await names.append(ino, b"more")
        with pytest.raises(Fenced):
            await names.rename(1, b"f", 1, b"g")
        with pytest.raises(Fenced):
            await view.add_host(urls[1])
        # Also before the host would have a contract that is on no record.
        with pytest.raises(Fenced):
            await view.contractor.conclude_contract("1", 86400)
        assert await content(view, "f") == b"x"
    assert everything(tmp_path) == before


async def test_two_read_the_same_directory_and_nobody_is_kept_from_writing_later(tmp_path: Path) -> None:
    await make(tmp_path / "v", host_dirs(tmp_path, 1))
    async with opened(tmp_path / "v") as volume:
        await put(volume, "f", b"x")
    async with viewed(ReadOnlySource(tmp_path / "v", passphrase=PASSPHRASE), tmp_path / "scratch"):
        # The lock is free again. (LMDB does not let one process open a database twice; processes do it in test_mount_read_only.)
        with pytest.raises(BadArgument, match="open in this process"):
            async with opened(tmp_path / "v"):
                pass


async def test_what_only_an_absent_host_has_cannot_be_read_and_all_else_can(tmp_path: Path) -> None:
    urls = host_dirs(tmp_path, 2)
    await make(tmp_path / "v", urls, "1")
    data = os.urandom(200_000)
    async with opened(tmp_path / "v") as volume:
        for number in range(12):
            await put(volume, f"f{number}", data)
            await volume.flush()
        holders = {number: _host_of(volume, f"f{number}") for number in range(12)}
    assert set(holders.values()) == {1, 2}, "by bad luck all sectors are on one host"
    (tmp_path / "host1").rename(tmp_path / "away")
    async with viewed(ReadOnlySource(tmp_path / "v", passphrase=PASSPHRASE), tmp_path / "scratch") as view:
        assert any(urls[1] in warning for warning in view.standing_warnings())
        assert any("only on" in warning for warning in view.standing_warnings())
        for number, host in holders.items():
            if host == 1:
                assert await content(view, f"f{number}") == data
            else:
                with pytest.raises(FusefsError):
                    await content(view, f"f{number}")


def _host_of(volume: Volume, name: str) -> int:
    from storage.values.records import extents_between

    ino = volume.namespace.lookup(1, name.encode())
    value = volume.namespace._inodes.get(ino).rec.value
    (extent,) = extents_between(volume.store, value, 0, 1, 1)
    return volume.sectors.record(extent.sector_id).shards[0].hosts[0]


async def test_what_is_no_volume_or_not_ours_is_refused(tmp_path: Path) -> None:
    await make(tmp_path / "v", host_dirs(tmp_path, 1))
    with pytest.raises(BadArgument, match="not a fusefs volume"):
        async with viewed(ReadOnlySource(tmp_path / "host0", passphrase=PASSPHRASE), tmp_path / "scratch"):
            pass
    with pytest.raises(WrongPassphrase):
        async with viewed(ReadOnlySource(tmp_path / "v", passphrase="wrong"), tmp_path / "scratch"):
            pass
    shutil.rmtree(tmp_path / "v" / "metadata")
    with pytest.raises(NotFound, match="recover"):
        async with viewed(ReadOnlySource(tmp_path / "v", passphrase=PASSPHRASE), tmp_path / "scratch"):
            pass


async def test_a_fenced_volume_can_be_read(tmp_path: Path) -> None:
    urls = host_dirs(tmp_path, 1)
    await make(tmp_path / "v", urls)
    async with opened(tmp_path / "v") as volume:
        await put(volume, "both", b"1")
        await volume.flush()
        await put(volume, "only here", b"precious")
        await volume.commit()
        copy = crashed_copy(tmp_path / "v", tmp_path / "copy")
        await put(volume, "only there", b"2")
        await volume.flush()
    async with opened(tmp_path / "v") as volume:
        await volume.flush()
    with pytest.raises(Fenced, match="recover"):
        async with opened(copy):
            pass
    async with viewed(ReadOnlySource(copy, passphrase=PASSPHRASE), tmp_path / "scratch") as view:
        assert await content(view, "only here") == b"precious"
        assert await content(view, "both") == b"1"
        with pytest.raises(NotFound):
            await content(view, "only there")


async def test_what_a_lost_machine_put_on_hosts_last_is_not_swept_by_who_recovered(tmp_path: Path) -> None:
    """I5: sectors it wrote after its last superblock are on record in its own directory alone. It may only be fenced, and be read from."""
    urls = host_dirs(tmp_path, 1)
    await make(tmp_path / "v", urls)
    async with opened(tmp_path / "v") as volume:
        await put(volume, "both", b"1")
        await volume.flush()
        precious = os.urandom(300_000)
        await put(volume, "only here", precious)
        # Into sectors, and committed, but in no superblock; then the machine dies.
        await volume.values.flush()
        await volume.commit()
        lost = crashed_copy(tmp_path / "v", tmp_path / "lost")
        shutil.copytree(tmp_path / "host0", tmp_path / "as it was")
    shutil.rmtree(tmp_path / "v")
    shutil.rmtree(tmp_path / "host0")
    (tmp_path / "as it was").rename(tmp_path / "host0")
    await recover_volume(tmp_path / "new", urls, passphrase=PASSPHRASE)
    # It has something of its own to be swept.
    await write_and_die(tmp_path / "new")
    async with opened(tmp_path / "new") as volume:
        with pytest.raises(NotFound):
            await content(volume, "only here")
        sweeper = sweeper_of(volume)
        assert await sweeper.sweep() == []
        assert sweeper.counts.deleted == 1 and sweeper.counts.kept >= 1
    async with viewed(ReadOnlySource(lost, passphrase=PASSPHRASE), tmp_path / "scratch") as view:
        assert await content(view, "only here") == precious


# ------------------------------------------------------------------------------------------------------------ from hosts


async def test_hosts_alone_show_the_newest_superblock_and_nothing_is_put_there(tmp_path: Path) -> None:
    urls = host_dirs(tmp_path, 2)
    phrase = await make(tmp_path / "v", urls, "2")
    flushed, logged = os.urandom(300_000), os.urandom(1000)
    async with opened(tmp_path / "v") as volume:
        await put(volume, "d/f", flushed)
        await volume.flush()
        # A tail that is in no sector goes with the log.
        await put(volume, "d/f", logged)
        await volume.commit()
        assert volume.publisher is not None
        await volume.publisher.publish()
        await put(volume, "d/f", b"later")
        await put(volume, "g", b"later")
        await volume.commit()
        before = everything(tmp_path / "host0", tmp_path / "host1")
        for source in (
            ReadOnlySource(hosts=(urls[0],), passphrase=PASSPHRASE),
            ReadOnlySource(hosts=(urls[1],), phrase=phrase),
            ReadOnlySource(hosts=tuple(urls), volume_id=volume.volume_id, passphrase=PASSPHRASE),
        ):
            async with viewed(source, tmp_path / "scratch") as view:
                assert await content(view, "d/f") == flushed + logged
                with pytest.raises(NotFound):
                    await content(view, "g")
                assert f"commit {volume.publisher.draft.sequence} of 20" in view.view
                assert (await view.status()).pending_bytes == 0
                # No contents on the local disk in the clear.
                assert not any(logged[:64] in data for _, data in everything(tmp_path / "scratch").values())
        assert everything(tmp_path / "host0", tmp_path / "host1") == before


async def test_hosts_that_moved_are_found_where_they_are_said_to_be(tmp_path: Path) -> None:
    await make(tmp_path / "v", host_dirs(tmp_path, 2), "2")
    data = os.urandom(300_000)
    async with opened(tmp_path / "v") as volume:
        await put(volume, "f", data)
        await volume.flush()
    shutil.rmtree(tmp_path / "host1")
    (tmp_path / "host0").rename(tmp_path / "elsewhere")
    async with viewed(ReadOnlySource(hosts=(f"dir:{tmp_path / 'elsewhere'}",), passphrase=PASSPHRASE), tmp_path / "scratch") as view:
        assert await content(view, "f") == data
        assert any("host1" in warning for warning in view.standing_warnings())


async def test_a_host_that_was_away_does_not_hide_what_the_others_have(tmp_path: Path) -> None:
    urls = host_dirs(tmp_path, 3)
    await make(tmp_path / "v", urls, "2")
    async with opened(tmp_path / "v") as volume:
        await put(volume, "f", b"old")
        await volume.flush()
    shutil.copytree(tmp_path / "host2", tmp_path / "stale")
    async with opened(tmp_path / "v") as volume:
        await put(volume, "f", b" and new")
        await volume.flush()
    shutil.rmtree(tmp_path / "host2")
    (tmp_path / "stale").rename(tmp_path / "host2")
    async with viewed(ReadOnlySource(hosts=(urls[2],), passphrase=PASSPHRASE), tmp_path / "scratch") as view:
        assert await content(view, "f") == b"old and new"


async def test_two_histories_are_a_persons_choice_and_each_can_be_looked_at(tmp_path: Path) -> None:
    urls = host_dirs(tmp_path, 2)
    await make(tmp_path / "v", urls, "1")
    async with opened(tmp_path / "v") as volume:
        await put(volume, "both", b"")
        await volume.flush()
    shutil.copytree(tmp_path / "v", tmp_path / "w")
    # Each machine reaches another host: neither has a majority, both go on.
    for place, away in (("v", 1), ("w", 0)):
        (tmp_path / f"host{away}").rename(tmp_path / "away")
        async with opened(tmp_path / place) as volume:
            await put(volume, f"only {place}", b"2")
            await volume.flush()
        (tmp_path / "away").rename(tmp_path / f"host{away}")
    both = ReadOnlySource(hosts=tuple(urls), passphrase=PASSPHRASE)
    with pytest.raises(BadArgument, match="--superblock") as caught:
        async with viewed(both, tmp_path / "scratch"):
            pass
    names = re.findall(r"([0-9]+-[0-9a-f]{8}): epoch", str(caught.value))
    assert len(names) == 2
    found = set()
    for name in names:
        async with viewed(replace(both, superblock=name), tmp_path / "scratch") as view:
            found |= {file async for file, _ in view.files.entries("only")}
            assert "both" in {file async for file, _ in view.files.entries()}
    assert found == {"only v", "only w"}


async def test_what_hosts_do_not_have_is_said(tmp_path: Path) -> None:
    urls = host_dirs(tmp_path, 1)
    await make(tmp_path / "v", urls)
    other = await make(tmp_path / "w", urls)
    both = ReadOnlySource(hosts=(urls[0],), passphrase=PASSPHRASE)
    for source, kind, text in (
        (both, BadArgument, "--volume"),
        (replace(both, volume_id="zz"), NotFound, "no volume 'zz'"),
        (replace(both, volume_id="0" * 32), NotFound, "no volume"),
        (replace(both, hosts=(f"dir:{tmp_path / 'nowhere'}",)), Unavailable, "nowhere"),
        (replace(both, passphrase="", phrase="twenty four words"), BadArgument, "phrase"),
    ):
        with pytest.raises(kind, match=text):
            async with viewed(source, tmp_path / "scratch"):
                pass
    async with opened(tmp_path / "v") as volume:
        await volume.flush()
        mine = volume.volume_id
    with pytest.raises(WrongPassphrase):
        async with viewed(replace(both, volume_id=mine, passphrase="wrong"), tmp_path / "scratch"):
            pass
    with pytest.raises(WrongPassphrase, match="24 words"):
        async with viewed(ReadOnlySource(hosts=(urls[0],), volume_id=mine, phrase=other), tmp_path / "scratch"):
            pass


# ------------------------------------------------------------------------------------------------------ private directories


def test_what_a_dead_process_left_is_swept_and_what_a_live_one_has_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    live = Scratch.make()
    dead = Scratch.make()
    (dead.path / "metadata").mkdir()
    os.close(dead._lock)  # as the end of its process does
    next_one = Scratch.make()
    assert sorted(path.name for path in (tmp_path / "cache" / "fusefs").iterdir()) == sorted(["lock", live.path.name, next_one.path.name])
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "cache" / "fusefs", live.path)} == {0o700}
    live.remove()
    next_one.remove()
    assert [path.name for path in (tmp_path / "cache" / "fusefs").iterdir()] == ["lock"]


def test_a_place_others_can_enter_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "fusefs").symlink_to(tmp_path)
    with pytest.raises(BadArgument, match="only this user"):
        Scratch.make()
    (tmp_path / "fusefs").unlink()
    (tmp_path / "fusefs").mkdir(mode=0o755)
    with pytest.raises(BadArgument, match="only this user"):
        Scratch.make()
