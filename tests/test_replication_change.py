"""Another replication for what is there: every byte moves into sectors of it, whatever is appended, renamed, or crashes meanwhile."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from storage.checking import Finding, check_volume
from storage.errors import BadArgument, FusefsError
from storage.hosts.registry import Opener
from storage.interfaces import Batch
from storage.metadata.keys import EXTENT, FREED, HANDING_DOWN, MISPLACED, SECTOR, prefix_end, u64
from storage.seams import InlineWorker, Seams
from storage.sectors.records import decode_sector
from storage.values.records import decode_extent
from storage.volume import Volume
from storage.wiring import open_volume
from tests.crash_points import DeadFrom, leaves
from tests.fakes import Crash, InlineThreads
from tests.metadata_rig import quick_directory
from tests.nonces import Nonces, RecordingOpener
from tests.rig import PASSPHRASE, QUIET, host_dirs, make, noise, published

SECTOR_SIZE = 64 * 1024
OPTIONS = replace(QUIET, journal_segment=64 * 1024, journal_limit=4 * 1024 * 1024, cache=1024 * 1024)
ROOT = 1


@asynccontextmanager
async def opened(path: Path, failpoints: DeadFrom | None = None, opener: Opener | None = None) -> AsyncIterator[Volume]:
    seams = Seams(threads=InlineThreads(), worker=InlineWorker, failpoints=failpoints) if failpoints is not None else Seams()
    async with open_volume(path, passphrase=PASSPHRASE, seams=seams, options=OPTIONS, opener=opener) as volume:
        yield volume


async def put(volume: Volume, name: str, data: bytes, replication: str | None = None) -> int:
    """Append to the file, which is made where there is none. Its inode."""
    fd = await volume.files.open(name, write=True, replication=replication)
    await volume.files.append(fd, data)
    await volume.files.close(fd)
    return ino_of(volume, name)


def ino_of(volume: Volume, name: str) -> int:
    ino = ROOT
    for part in name.split("/"):
        ino = volume.namespace.lookup(ino, part.encode())
    return ino


async def get(volume: Volume, name: str) -> bytes:
    fd = await volume.files.open(name, existing=True)
    data = await volume.files.read_at(fd, 0, 1 << 30)
    await volume.files.close(fd)
    return data


def specs_of(volume: Volume, name: str) -> set[str]:
    """Replications of the sectors that hold the file, from the records alone."""
    prefix = EXTENT + u64(volume.namespace._inodes.get(ino_of(volume, name)).rec.value)
    found = set()
    for key, raw in volume.store.scan(prefix, prefix_end(prefix), 100_000):
        sector_id = decode_extent(key, raw).sector_id
        found.add(decode_sector(volume.store.get(SECTOR + u64(sector_id)) or b"", sector_id).replication)
    return found


def left(volume: Volume, prefix: bytes) -> int:
    return len(volume.store.scan(prefix, prefix_end(prefix), 100_000))


async def compare(volume: Volume, content: dict[str, bytes]) -> None:
    volume.sectors.cache._blocks.clear()
    for name, data in content.items():
        assert await get(volume, name) == data, name


async def fill(volume: Volume) -> dict[str, bytes]:
    """Large and small files, some in `d`, in sectors that they share with others."""
    content = {f"d/small{i}": noise(700 + i) for i in range(20)} | {f"other/small{i}": noise(900) for i in range(20)}
    content |= {
        "d/large": noise(3 * SECTOR_SIZE + 100),
        "other/large": noise(2 * SECTOR_SIZE),
        "d/sub/deep": noise(SECTOR_SIZE),
        "d/empty": b"",
    }
    for name in sorted(content, key=lambda name: name.rsplit("/", 1)[1]):
        await put(volume, name, content[name])
    await volume.flush()
    return content


async def reclaimed(volume: Volume) -> None:
    """What was freed is gone from the hosts."""
    for _ in range(6):
        await published(volume)
        await volume.deleter.drain()
        if not left(volume, FREED):
            return


async def sound(path: Path) -> None:
    found: list[Finding] = []
    await check_volume(path, passphrase=PASSPHRASE, data=True, on_finding=found.append)
    assert [str(finding) for finding in found if not finding.note] == []


async def test_every_file_below_moves_and_nothing_else_does(tmp_path: Path) -> None:
    await make(tmp_path / "v", host_dirs(tmp_path, 6), "2", SECTOR_SIZE)
    async with opened(tmp_path / "v") as volume:
        content = await fill(volume)
        ns = volume.namespace
        volume.namespace.set_replication(ino_of(volume, "d/sub"), "3")
        ns.link(ino_of(volume, "d/large"), ino_of(volume, "d/sub"), b"second")
        content["d/sub/second"] = content["d/large"]
        await put(volume, "d/holes", b"")
        await ns.write(ino_of(volume, "d/holes"), 5000, b"behind a hole")
        content["d/holes"] = bytes(5000) + b"behind a hole"
        before = volume.sectors.count
        await volume.set_replication(ino_of(volume, "d"), "4+2", now=True)
        # Before anything was moved: new sectors at once, and no descriptor is the wrong one.
        assert ns.replication_of(ino_of(volume, "d/large")) == "4+2"
        with pytest.raises(BadArgument, match="4\\+2"):
            await volume.files.open("d/large", existing=True, replication="2")
        status = await volume.rewrite()
        assert (status.files, status.pending_bytes, status.directories, status.trouble) == (0, 0, 0, "")
        assert left(volume, MISPLACED) == left(volume, HANDING_DOWN) == 0
        await volume.flush()
        for name, data in content.items():
            assert specs_of(volume, name) == (set() if not data else {"4+2"} if name.startswith("d/") else {"2"}), name
        assert ns.replication_of(ino_of(volume, "d/sub")) == "4+2"
        stored = await ns.stored(ino_of(volume, "d"))
        # The two names of one file are one file.
        assert [(one.replication, one.files, one.misplaced) for one in stored.below] == [("4+2", 24, 0)]
        assert (stored.own, stored.source) == ("4+2", "d")
        await compare(volume, content)
        await reclaimed(volume)
        assert not left(volume, FREED)
        assert volume.sectors.count < 3 * before
        await compare(volume, content)
    await sound(tmp_path / "v")


async def test_what_is_moved_waits_for_the_rate_of_repair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await make(tmp_path / "v", host_dirs(tmp_path, 3), "2", SECTOR_SIZE)
    async with open_volume(tmp_path / "v", passphrase=PASSPHRASE, options=replace(OPTIONS, repair_rate=1e9)) as volume:
        content = await fill(volume)
        pace, moved = volume.values.rewriter.pace, volume.values.rewriter._merger.move
        assert pace.rate == 1e9
        waited: list[int] = []
        rounds = 0

        async def taken(size: int) -> None:
            waited.append(size)

        async def move(*arguments: Any) -> Any:
            nonlocal rounds
            rounds += 1
            assert len(waited) == rounds
            return await moved(*arguments)

        monkeypatch.setattr(pace, "take", taken)
        monkeypatch.setattr(volume.values.rewriter._merger, "move", move)
        await volume.set_replication(ino_of(volume, "d"), "3", now=True)
        await volume.rewrite()
        assert rounds
        # What shares a sector with small files comes along with them.
        assert sum(waited) >= 0.8 * sum(len(data) for name, data in content.items() if name.startswith("d/"))


async def test_back_to_what_is_inherited(tmp_path: Path) -> None:
    await make(tmp_path / "v", host_dirs(tmp_path, 3), "2", SECTOR_SIZE)
    async with opened(tmp_path / "v") as volume:
        content = await fill(volume)
        d = ino_of(volume, "d")
        await volume.set_replication(d, "3", now=False)
        assert volume.namespace.replication_of(ino_of(volume, "d/large")) == "2"
        assert volume.namespace.replication_of(await put(volume, "d/sub/new", b"new")) == "3"
        await volume.set_replication(ino_of(volume, "d/large"), "1", now=True)
        await volume.set_replication(d, "", now=True)
        await volume.rewrite()
        assert {specs_of(volume, name).pop() for name, data in content.items() if data} == {"2"}
        assert (await volume.namespace.stored(d)).own == ""
        with pytest.raises(BadArgument, match="no directory"):
            await volume.set_replication(ino_of(volume, "d/large"), "3")
        await volume.set_replication(ino_of(volume, "d/large"), "1", now=True)
        await volume.rewrite()
        assert specs_of(volume, "d/large") == {"1"}
        await volume.set_replication(ino_of(volume, "d/large"), "", now=True)
        await volume.rewrite()
        assert specs_of(volume, "d/large") == {"2"}
        await compare(volume, content)
    await sound(tmp_path / "v")


@pytest.mark.parametrize("spec", ["4", "2+2", "x", "0"])
async def test_what_cannot_be_is_refused_before_anything_changes(tmp_path: Path, spec: str) -> None:
    await make(tmp_path / "v", host_dirs(tmp_path, 4), "2", SECTOR_SIZE)
    async with opened(tmp_path / "v") as volume:
        await put(volume, "d/a", noise(1000))
        await volume.flush()
        await volume.leave_host("1", leave=True)
        before = dict(volume.store.scan(b"a", b"z", 100_000))
        for ino in (ino_of(volume, "d"), ino_of(volume, "d/a")):
            for now in (True, False):
                with pytest.raises(BadArgument):
                    await volume.set_replication(ino, spec, now=now)
        assert dict(volume.store.scan(b"a", b"z", 100_000)) == before


async def test_files_that_are_appended_to_and_renamed_meanwhile(tmp_path: Path) -> None:
    """Appends, and renames between directories of different replication, while everything goes back and forth between two."""
    await make(tmp_path / "v", host_dirs(tmp_path, 3), "1", SECTOR_SIZE)
    async with opened(tmp_path / "v") as volume:
        content = await fill(volume)
        d, other = ino_of(volume, "d"), ino_of(volume, "other")
        log = bytearray()
        done = trio.Event()
        await put(volume, "d/log", b"")

        async def append() -> None:
            fd = await volume.files.open("d/log", write=True)
            for number in range(60):
                data = noise(100 + 300 * number)
                await volume.files.append(fd, data)
                log.extend(data)
                if number % 7 == 0:
                    await volume.values.shipper.gather()
                await trio.sleep(0.001)
            await volume.files.close(fd)
            done.set()

        async def rename() -> None:
            while not done.is_set():
                await volume.namespace.rename(d, b"small7", other, b"moved")
                await trio.sleep(0.002)
                await volume.namespace.rename(other, b"moved", d, b"small7")
                await volume.namespace.rename(d, b"small8", other, b"small8", exchange=True)
                content["d/small8"], content["other/small8"] = content["other/small8"], content["d/small8"]

        async with trio.open_nursery() as nursery:
            nursery.start_soon(append)
            nursery.start_soon(rename)
            while not done.is_set():
                for spec in ("3", "1+1", "2"):
                    await volume.set_replication(d, spec, now=True)
                    await volume.rewrite()
        await volume.flush()
        await volume.set_replication(d, "2+1", now=True)
        await volume.rewrite()
        await volume.flush()
        assert specs_of(volume, "d/log") == {"2+1"}
        await compare(volume, {**content, "d/log": bytes(log)})
        assert left(volume, MISPLACED) == 0
    await sound(tmp_path / "v")


async def test_what_is_on_its_way_when_the_replication_changes_follows(tmp_path: Path) -> None:
    """Breaks if bytes that land in a sector of the old replication are not marked, or what was refused waits for hosts it needs no more."""
    await make(tmp_path / "v", host_dirs(tmp_path, 2), "2", SECTOR_SIZE)
    opener = RecordingOpener(Nonces())
    async with opened(tmp_path / "v", opener=opener) as volume:
        data, small = noise(2 * SECTOR_SIZE), noise(100)
        large, ino = await put(volume, "large", data), await put(volume, "small", small)
        await volume.values.shipper.gather()
        # Together in one cargo: the small file's follows, the other's does not.
        await volume.set_replication(ino, "1", now=True)
        await volume.rewrite()
        assert specs_of(volume, "small") == {"1"}
        assert volume.namespace.replication_of(large) == "2"
        # One host is enough from now on.
        faults = opener.hosts[next(iter(opener.hosts))].faults
        faults.gone = "unplugged"
        more = noise(SECTOR_SIZE)
        await put(volume, "large", more)
        with pytest.raises(FusefsError):
            await volume.flush()
        await volume.set_replication(large, "1", now=True)
        await volume.flush()
        # What has one copy may have it there.
        faults.gone = None
        await compare(volume, {"large": data + more, "small": small})


async def test_a_crash_at_any_point_loses_nothing_and_the_next_mount_goes_on(tmp_path: Path) -> None:
    """One hit of each failpoint on the way, from the command to the deletion of the old sectors; all with FUSEFS_TORTURE_ROUNDS set."""
    with quick_directory() as base:
        volume_path, kept = base / "run" / "v", base / "kept"
        nonces = Nonces()
        opener = RecordingOpener(nonces)
        (base / "run").mkdir()
        await make(volume_path, host_dirs(base / "run", 3), "2", SECTOR_SIZE)
        async with opened(volume_path, opener=opener) as volume:
            content = await fill(volume)
        shutil.copytree(base / "run", kept)

        async def life(failpoints: DeadFrom) -> None:
            async with opened(volume_path, failpoints, opener) as volume:
                await volume.set_replication(ino_of(volume, "d"), "1+2", now=True)
                acknowledged.append(True)
                await volume.rewrite()
                await reclaimed(volume)

        acknowledged: list[bool] = []
        whole = DeadFrom(0)
        await life(whole)
        for name in ("handing_down.before_apply", "merge.before_write", "merge.before_switch", "rewrite.before_unmark"):
            assert name in whole.hits
        places = {name: [nth for nth, hit in enumerate(whole.hits, start=1) if hit == name] for name in whole.hits}
        some = {numbers[len(numbers) // 2] for numbers in places.values()}
        every = range(1, len(whole.hits) + 1) if os.environ.get("FUSEFS_TORTURE_ROUNDS") else sorted(some)
        died = 0
        for nth in every:
            shutil.rmtree(base / "run")
            shutil.copytree(kept, base / "run")
            # What a directory put back seals again is no violation.
            nonces = Nonces()
            opener = RecordingOpener(nonces)
            acknowledged.clear()
            failpoints = DeadFrom(nth)
            try:
                await life(failpoints)
            except BaseException as error:
                if [one for one in leaves(error) if not isinstance(one, Crash | FusefsError | trio.Cancelled)] or not failpoints.died:
                    raise
            died += failpoints.died
            async with opened(volume_path, opener=opener) as volume:
                await compare(volume, content)
                status = await volume.rewrite()
                assert (status.files, status.directories, status.trouble) == (0, 0, "")
                await compare(volume, content)
                told = {volume.namespace.replication_of(ino_of(volume, name)) for name in content if name.startswith("d/")}
                assert told == {"1+2"} or (told == {"2"} and not acknowledged), (nth, failpoints.hits[-1])
                for name, data in content.items():
                    wanted = told if name.startswith("d/") else {"2"}
                    assert specs_of(volume, name) == (wanted if data else set()), (name, nth)
                await reclaimed(volume)
                await compare(volume, content)
            nonces.journal(volume_path)
            assert not nonces.violations
            assert nonces.counts["shard"] or told == {"2"}
            await sound(volume_path)
        assert died > 10


async def test_damaged_marks_end_nothing_and_keep_no_other_from_being_moved(tmp_path: Path) -> None:
    await make(tmp_path / "volume", host_dirs(tmp_path, 3), replication="2")
    async with opened(tmp_path / "volume") as volume:
        content = await fill(volume)
        batch = Batch()
        batch.put(MISPLACED, u64(5))
        batch.put(MISPLACED + b"\0\0", u64(5))
        batch.put(MISPLACED + u64(1), b"\xff" * 9)
        batch.put(MISPLACED + u64(2), b"\xff" * 8)
        volume.store.apply(batch)
        for ino in (ino_of(volume, "d"), ino_of(volume, "other")):
            await volume.set_replication(ino, "3", now=True)
        await volume.rewrite()
        assert specs_of(volume, "d/large") == specs_of(volume, "other/large") == {"3"}
        await compare(volume, content)
