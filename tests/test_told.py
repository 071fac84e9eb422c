"""What a volume says of itself, `status` above all, is so: nothing is called lost, missing, good or done that is not."""

from __future__ import annotations

import os
import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fusefs.cli.scrub import lines
from fusefs.cli.status import _summary, warnings
from storage.errors import Corrupt, Unavailable
from storage.interfaces import HostSpace
from storage.metadata.keys import SECTOR, prefix_end
from storage.replication import parse_replication
from storage.sectors import leaving, manager
from storage.sectors.placement import PLENTY
from storage.sectors.records import decode_sector
from storage.status import LEFT, VolumeStatus
from storage.volume import Volume
from tests.cli_runner import PASSPHRASE, fusefs, init
from tests.mounting import mounting_in
from tests.rig import QUIET, append, host_dirs, make, new_value, noise, opened
from tests.test_cli_bad_input import ask


def line(now: VolumeStatus, label: str) -> str:
    """Of `fusefs status`, the one line with this label."""
    return dict(_summary(now, None))[label]


# -------------------------------------------------------------------------------------------------------------- pending


async def told_pending(volume: Volume) -> tuple[int, int, str]:
    now = await volume.status()
    return now.pending_bytes, now.logged_bytes, line(now, "pending")


async def test_what_is_in_the_log_on_the_hosts_is_not_called_pending(tmp_path: Path) -> None:
    await make(tmp_path / "v", host_dirs(tmp_path, 3), "2")
    async with opened(tmp_path / "v") as volume:
        value = new_value(volume)
        await append(volume, value, b"9 bytes..")
        await volume.values.commit(value)
        assert await told_pending(volume) == (9, 0, "9 B on too few hosts yet")
        await volume.publish()
        assert await told_pending(volume) == (0, 9, "nothing: what was written is on its hosts, 9 B of it in their log")
        # What comes behind it is on no host before it is published as well.
        await append(volume, value, b"5 byt")
        await volume.values.commit(value)
        assert await told_pending(volume) == (5, 9, "5 B on too few hosts yet; 9 B more in the log on the hosts")
        await volume.publish()
        assert (await told_pending(volume))[:2] == (0, 14)
        await volume.flush()
        assert await told_pending(volume) == (0, 0, "nothing: what was written is on its hosts")


async def test_what_no_majority_of_the_hosts_has_in_its_log_is_pending(tmp_path: Path) -> None:
    urls = host_dirs(tmp_path, 3)
    await make(tmp_path / "v", urls, "2")
    async with opened(tmp_path / "v") as volume:
        value = new_value(volume)
        await append(volume, value, b"9 bytes..")
        for number in (1, 2):
            (tmp_path / f"host{number}").rename(tmp_path / f"away{number}")
        await volume.values.commit(value)
        with pytest.raises(Unavailable):
            await volume.publish()
        assert (await told_pending(volume))[:2] == (9, 0)
        for number in (1, 2):
            (tmp_path / f"away{number}").rename(tmp_path / f"host{number}")
        await volume.hosts.retry_once()
        await volume.publish()
        assert (await told_pending(volume))[:2] == (0, 9)


# --------------------------------------------------------------------------------------------------------- too few copies


async def leave(volume: Volume, number: int) -> None:
    await volume.leave_host(str(number), leave=True)


async def lose(volume: Volume, number: int) -> None:
    await volume.mark_host(str(number), lost=True)


@pytest.mark.parametrize(("give_up", "why"), [(leave, "is being left"), (lose, "is lost")])
async def test_a_flush_says_why_hosts_that_answer_take_nothing(
    tmp_path: Path, give_up: Callable[[Volume, int], Awaitable[None]], why: str
) -> None:
    urls = host_dirs(tmp_path, 3)
    await make(tmp_path / "v", urls, "3")
    async with opened(tmp_path / "v") as volume:
        await give_up(volume, 1)
        value = new_value(volume)
        await append(volume, value, b"two copies")
        first = str(await volume.flush())
        assert re.fullmatch(rf"1 sector with too few copies: sector \d+ has 2 of 3 copies: no other .* \({urls[0]} {why}\)", first)
    # Another process did not see it happen.
    async with opened(tmp_path / "v") as volume:
        report = await volume.flush()
        assert str(report).startswith("1 sector with too few copies: ")
        assert f"({urls[0]} {why})" in str(report)
        assert "answer" not in str(report)
        await volume.add_host(f"dir:{tmp_path / 'another'}")
        await volume.repair()
        assert str(await volume.flush()) == ""
        assert (await volume.status()).warnings == []


async def test_what_was_said_of_a_sector_is_forgotten_once_it_has_its_copies(tmp_path: Path) -> None:
    await make(tmp_path / "v", host_dirs(tmp_path, 3), "3")
    async with opened(tmp_path / "v") as volume:
        await leave(volume, 1)
        await append(volume, new_value(volume), b"two copies")
        await volume.flush()
        assert any("has 2 of 3 copies" in warning for warning in (await volume.status()).warnings)
        await volume.add_host(f"dir:{tmp_path / 'another'}")
        assert (await volume.repair()).pending == 0
        assert (await volume.status()).warnings == []


async def test_a_host_can_be_added_when_those_there_are_too_few_for_what_is_staged(tmp_path: Path) -> None:
    """As the message says that refuses: it must not keep from doing it."""
    urls = host_dirs(tmp_path, 2)
    await make(tmp_path / "v", urls, "2")
    options = replace(QUIET, staging=8 * 1024 * 1024)
    async with opened(tmp_path / "v", options=options) as volume:
        await volume.flush()
        await lose(volume, 2)
        await append(volume, new_value(volume), b"on no host yet")
        with pytest.raises(Unavailable, match=rf"can be used now: 1 \({urls[1]} is lost\); .*add one \(fusefs hosts VOLUME add URL\)"):
            await volume.flush()
    async with opened(tmp_path / "v", options=options) as volume:
        await volume.add_host(f"dir:{tmp_path / 'another'}")
        assert str(await volume.flush()) == ""
        assert (await volume.status()).degraded_sectors == 0


# ------------------------------------------------------------------------------------------------------------ being left


async def states(volume: Volume) -> list[str]:
    return [host.state for host in (await volume.status()).hosts]


async def test_a_host_that_is_left_stays_so_whatever_becomes_of_others(tmp_path: Path) -> None:
    """Somebody may have unplugged it by then."""
    await make(tmp_path / "v", host_dirs(tmp_path, 3), "2")
    async with opened(tmp_path / "v") as volume:
        await append(volume, new_value(volume), b"on two hosts of three")
        await volume.flush()
        await leave(volume, 1)
        assert (await volume.repair()).pending == 0
        assert await states(volume) == ["left", "ok", "ok"]
        await lose(volume, 2)
        assert await states(volume) == ["left", "lost", "ok"]
        assert (await volume.repair()).pending == 1
        assert await states(volume) == ["left", "lost", "ok"]
        assert volume.renewal._has_left(1)
    async with opened(tmp_path / "v") as volume:
        assert await states(volume) == ["left", "lost", "ok"]


@pytest.mark.parametrize("at_once", [20_000, 0])
async def test_a_host_that_something_is_on_that_cannot_go_elsewhere_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(leaving, "AT_ONCE", at_once)
    await make(tmp_path / "v", host_dirs(tmp_path, 3), "2")
    async with opened(tmp_path / "v") as volume:
        for number in range(3):
            await append(volume, new_value(volume, "3" if number == 2 else "2"), noise(1000))
            await volume.flush()
        await leave(volume, 1)
        # Before anything was looked at, too.
        assert await states(volume) == ["leaving", "ok", "ok"]
        assert (await volume.repair()).pending == 1
        assert await states(volume) == ["leaving", "ok", "ok"]
        assert not volume.renewal._has_left(1)
        await volume.add_host(f"dir:{tmp_path / 'another'}")
        assert (await volume.repair()).pending == 0
        assert await states(volume) == ["left", "ok", "ok", "ok"]


async def test_what_came_to_a_host_between_two_times_of_leaving_it_goes_from_there(tmp_path: Path) -> None:
    await make(tmp_path / "v", host_dirs(tmp_path, 2), "1")
    async with opened(tmp_path / "v") as volume:
        await leave(volume, 1)
        assert (await volume.repair()).pending == 0
        assert await states(volume) == ["left", "ok"]
        # Nobody looks at the sectors in between.
        async with volume.reconciler._lock:
            await volume.mark_host("1", lost=False)
            await volume.leave_host("2", leave=True)
            await append(volume, new_value(volume), noise(1000))
            await volume.flush()
            await volume.leave_host("2", leave=False)
            await leave(volume, 1)
            assert await states(volume) == ["leaving", "ok"]
        assert (await volume.repair()).pending == 0
        assert await states(volume) == ["left", "ok"]
        records = volume.store.scan(SECTOR, prefix_end(SECTOR), 10)
        assert [shard.hosts for _, raw in records for shard in decode_sector(raw, 0).shards] == [[2]]


# ------------------------------------------------------------------------------------------------------------------ scrub


async def test_a_scrub_is_not_content_with_copies_that_are_not_there(tmp_path: Path) -> None:
    urls = host_dirs(tmp_path, 3)
    await make(tmp_path / "v", urls, "3")
    async with opened(tmp_path / "v") as volume:
        await append(volume, new_value(volume), b"three copies")
        await volume.flush()
        report = await volume.scrub()
        assert report.exit_status == 0
        assert lines(report)[-1].startswith("all good: 3 copies of 1 sector, ")
        await lose(volume, 1)
        assert (await volume.repair()).pending == 1
        report = await volume.scrub()
        assert (report.exit_status, report.degraded_sectors, report.left) == (LEFT, 1, 0)
        short, looked = lines(report)
        # As `status` says it.
        assert short in (await told_warnings(volume))
        assert short.startswith("1 sector with too few copies: ")
        assert f"({urls[0]} is lost)" in short
        assert looked.startswith("those looked at are good: 2 copies of 1 sector, ")
        assert line(await volume.status(), "scrub").endswith(": no bad copies")
        await volume.add_host(f"dir:{tmp_path / 'another'}")
        assert (await volume.repair()).pending == 0
        assert (await volume.scrub()).exit_status == 0


async def told_warnings(volume: Volume) -> list[str]:
    return warnings(await volume.status(), 0)


# ------------------------------------------------------------------------------------------------------------ replication


async def test_what_is_stored_otherwise_than_the_volume_says_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await make(tmp_path / "v", host_dirs(tmp_path, 3), "2")
    async with opened(tmp_path / "v") as volume:

        async def stored() -> str:
            return line(await volume.status(), "stored").split(" sector")[1].removeprefix("s")

        assert await stored() == ", 2 copies each"
        for spec, told in (
            ("3", ", 3 copies each"),
            ("2", ": 1 with 2 copies, 1 with 3 copies"),
            ("1", ": 1 with 2 copies, 1 with one copy, 1 with 3 copies"),
            ("2+1", ": 1 with 2 copies, 1 with one copy, 1 with 3 copies, 1 as 2+1 (data+parity)"),
        ):
            await append(volume, new_value(volume, spec), noise(100))
            await volume.flush()
            assert await stored() == told
        monkeypatch.setattr(manager, "MAX_LOOKED_AT", 3)
        assert await stored() == ", 2 copies each, where no directory has another replication"


# ----------------------------------------------------------------------------------------------------- damage has names


def spoil(tmp_path: Path) -> None:
    """Every copy on every host."""
    for shard in tmp_path.glob("host*/volumes/*/sectors/*/*"):
        raw = bytearray(shard.read_bytes())
        raw[80] ^= 1
        shard.write_bytes(raw)


async def put(volume: Volume, name: str) -> None:
    fd = await volume.files.open(name, write=True)
    await volume.files.append(fd, name.encode())
    await volume.files.close(fd)


@pytest.mark.parametrize(("count", "told"), [(2, "d/file0, d/file1"), (7, "d/file0, d/file1, d/file2, d/file3, d/file4 and maybe others")])
async def test_what_is_said_of_damage_names_the_files(tmp_path: Path, count: int, told: str) -> None:
    await make(tmp_path / "v", host_dirs(tmp_path, 2), "2")
    async with opened(tmp_path / "v", options=replace(QUIET, cache=0)) as volume:
        for number in range(count):
            await put(volume, f"d/file{number}")
        await volume.flush()
    spoil(tmp_path)
    async with opened(tmp_path / "v") as volume:
        fd = await volume.files.open("d/file1", existing=True)
        with pytest.raises(Corrupt, match=r"^d/file1: sector \d+: no copy can be read"):
            await volume.files.read_at(fd, 0, 100)
        report = await volume.scrub(full=True)
        assert (report.lost, report.left) == (1, 2)
        assert lines(report)[0].startswith(f"1 sector cannot be had from the hosts that answer, with bytes of {told}: sector ")
        said = f"1 sector cannot be had from the hosts that answer, with bytes of {told}: sector "
        assert any(warning.startswith(said) for warning in await told_warnings(volume))
    async with opened(tmp_path / "v") as volume:
        # What is known from before.
        said = f"2 copies on hosts known to be damaged or missing, with bytes of {told}, and not repaired yet"
        assert any(warning.startswith(said) for warning in await told_warnings(volume))


async def test_what_cannot_be_read_while_hosts_are_away_has_names(tmp_path: Path) -> None:
    urls = host_dirs(tmp_path, 2)
    await make(tmp_path / "v", urls, "1")
    async with opened(tmp_path / "v") as volume:
        await put(volume, "a file")
        await volume.flush()
        (number,) = {host for _, raw in volume.store.scan(SECTOR, prefix_end(SECTOR), 9) for host in decode_sector(raw, 0).shards[0].hosts}
    (tmp_path / f"host{number - 1}").rename(tmp_path / "away")
    async with opened(tmp_path / "v") as volume:
        assert any(f"with bytes of a file, is only on {urls[number - 1]}" in warning for warning in await told_warnings(volume))


# ------------------------------------------------------------------------------------------------------------- new hosts


async def test_the_room_on_a_new_host_is_known_at_once(tmp_path: Path) -> None:
    await make(tmp_path / "v", host_dirs(tmp_path, 1), "1")
    async with opened(tmp_path / "v") as volume:
        await volume.add_host(f"dir:{tmp_path / 'another'}")
        new = (await volume.status()).hosts[1]
        assert new.free is not None
        assert new.total is not None
        assert 0 < new.free <= new.total


def test_adding_a_host_does_not_end_with_the_advice_to_add_one(tmp_path: Path) -> None:
    volume = tmp_path / "v"
    init(volume, "--replication", "2", *(word for url in host_dirs(tmp_path, 2) for word in ("--host", url)))
    fusefs("put", volume, "-", "name", stdin=b"two copies")
    fusefs("hosts", volume, "lost", "2")
    assert "add a host" in fusefs("hosts", volume).err
    result = fusefs("hosts", volume, "add", f"dir:{tmp_path / 'another'}")
    assert result.text == f"host 3: dir:{tmp_path / 'another'}\n"
    assert result.err == ""


def test_a_recovery_says_of_a_host_that_is_away_once_that_it_is(tmp_path: Path) -> None:
    urls = host_dirs(tmp_path, 3)
    init(tmp_path / "v", "--replication", "2", *(word for url in urls for word in ("--host", url)))
    fusefs("put", tmp_path / "v", "-", "name", stdin=b"two copies")
    (tmp_path / "host2").rename(tmp_path / "away")
    said = fusefs("recover", tmp_path / "new", "--host", urls[0], "--host", urls[1]).err.splitlines()
    about = [warning for warning in said if "host2" in warning]
    assert about == [f"fusefs: warning: a host did not answer: host {urls[2]}: opening it: a directory is missing (is its disk mounted?)"]
    # Without a majority that is said besides, once.
    (tmp_path / "host1").rename(tmp_path / "away too")
    said = fusefs("recover", tmp_path / "newer", "--host", urls[0]).err.splitlines()
    assert [warning.count("host2") for warning in said if "host2" in warning] == [1, 1]
    assert sum("has to be on 2" in warning for warning in said) == 1


# ----------------------------------------------------------------------------------------------------------- what is copied


def test_on_a_terminal_of_80_columns_a_long_url_is_not_broken(tmp_path: Path) -> None:
    """A terminal that wraps a line itself gives it back whole."""
    url = f"dir:{tmp_path / ('a long name ' * 10).replace(' ', '-')}"
    init(tmp_path / "v", "--host", url)
    status, shown = ask(["hosts", str(tmp_path / "v")], [PASSPHRASE.encode()], tmp_path)
    assert status == 0
    (row,) = [text for text in shown.decode().splitlines() if url[:20] in text]
    assert url in row.split()
    assert row.split()[-2] == "to"


# ------------------------------------------------------------------------------------------------------------------- df


@pytest.mark.parametrize(
    ("spaces", "spec", "free"),
    [
        # Three hosts of which two share a disk: 65 on it and on the third, 30 of which are there.
        ({1: HostSpace(100, 900, "a"), 2: HostSpace(100, 900, "a"), 3: HostSpace(30, 900, "b")}, "2", 65),
        # What the smallest has no room for is of no use to the others.
        ({1: HostSpace(100, 900, "a"), 2: HostSpace(100, 900, "a"), 3: HostSpace(30, 900, "b")}, "3", 30),
        ({1: HostSpace(100, 900, "a"), 2: HostSpace(100, 900, "a"), 3: HostSpace(30, 900, "b")}, "2+1", 60),
        ({number: HostSpace(100, 900, "a") for number in (1, 2, 3)}, "2", 50),
        ({number: HostSpace(100, 900) for number in (1, 2, 3)}, "2", 150),
        # Buckets do not tell.
        ({1: HostSpace(100, 900), 2: HostSpace(70, 900)}, "2", 170),
        ({}, "2", PLENTY),
    ],
)
async def test_what_is_free_is_what_can_be_stored(tmp_path: Path, spaces: dict[int, HostSpace], spec: str, free: int) -> None:
    await make(tmp_path / "v", host_dirs(tmp_path, 3), "2")
    async with opened(tmp_path / "v") as volume:
        volume.placement._space = spaces
        assert volume.placement.free(parse_replication(spec)) == free


def test_df_shows_what_the_volume_holds_and_what_it_has_room_for(tmp_path: Path) -> None:
    """Not what else is on the disks of its hosts, nor a disk as often as there are hosts on it."""
    with mounting_in(tmp_path) as mounting:
        mounted = mounting.mount(volume=mounting.volume(hosts=host_dirs(tmp_path, 3), replication="2"))
        (mounted.path / "file").write_bytes(noise(10_000_000))
        now, disk = os.statvfs(mounted.path), os.statvfs(tmp_path)
        assert 10_000_000 <= (now.f_blocks - now.f_bfree) * now.f_frsize < 10_000_000 + now.f_frsize
        # Others write to that disk as well.
        assert abs(now.f_bavail * now.f_frsize - disk.f_bavail * disk.f_frsize / 2) < disk.f_bavail * disk.f_frsize / 10
