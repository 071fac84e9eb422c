"""What a crash leaves half-done is finished by the next mount, by itself: nobody asks for it here, time just passes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from storage.metadata.keys import EXTENT, FREED, FRESH, GARBAGE, INODE, MAP, ORPHAN, SECTOR, VALUE, prefix_end
from storage.namespace import filemap
from storage.sectors import deleter
from storage.values import merge, reclaim
from storage.volume import Volume
from storage.wiring import open_volume
from tests import crash_points
from tests.crash_points import FILE, ROOT, DeadFrom, Run, Script, tree
from tests.metadata_rig import quick_directory
from tests.rig import PASSPHRASE

HALF_DONE = {"freed sectors": FREED, "fresh sectors": FRESH, "freed values": GARBAGE, "orphans": ORPHAN}


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(filemap, "DROP_AT_ONCE", 2)
    monkeypatch.setattr(reclaim, "SLICE", 1)
    monkeypatch.setattr(deleter, "GATHER_SECONDS", 60.0)
    # Nothing goes on behind our back until the crash.
    monkeypatch.setattr(merge.Merger, "wake", lambda _self: None)
    monkeypatch.setattr(reclaim.Reclaimer, "wake", lambda _self: None)
    with quick_directory() as path:
        yield path


def count(volume: Volume, prefix: bytes) -> int:
    return len(volume.store.scan(prefix, prefix_end(prefix), 10_000))


async def half_done(script: Script) -> dict[str, int]:
    """One of each kind, committed; returns how many there are."""
    volume, ns = script.volume, script.ns
    for name in ("kept", "gone", "half"):
        script.create(name)
        await script.append(name, 9000)
        await script.flush()
    # A freed sector.
    script.unlink("gone")
    while volume.values._reclaimer.step():
        pass
    # A value whose extents are half walked: two sectors of its own, one of which is seen to.
    await script.append("half", 9000)
    await script.flush()
    script.unlink("half")
    assert volume.values._reclaimer.step()
    # A file that is open without a name, and the rest of a large map.
    orphan = ns.create(ROOT, b"orphan", FILE, 0, 0)
    ns.pin(orphan)
    await ns.append(orphan, b"x" * 100)
    ns.unlink(ROOT, b"orphan")
    await script.sparse("holes", 9)
    await script.commit()
    script.unlink("holes")
    # A sector that is durable, and to which nothing points.
    await volume.sectors.write_sector(await volume.sectors.allocate_sector(), b"nobody's", "2")
    await volume.sectors.wait_uploads()
    await script.commit()
    return {what: count(volume, prefix) for what, prefix in HALF_DONE.items()}


async def test_everything_half_done_is_finished_by_the_next_mount(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(base / "run")
    await run.make()
    failpoints = DeadFrom(0)
    left: dict[str, int] = {}

    async def do(script: Script) -> None:
        left.update(await half_done(script))
        failpoints.die()

    assert await run.live(failpoints, do)
    assert min(left.values()) >= 1, left
    assert left["orphans"] == 2
    monkeypatch.undo()
    monkeypatch.setattr(deleter, "GATHER_SECONDS", 0.05)
    monkeypatch.setattr(deleter, "RETRY_SECONDS", 0.1)
    options = replace(crash_points.OPTIONS, flush_interval=0.1, commit_interval=0.1)
    async with open_volume(run.base / "v", passphrase=PASSPHRASE, options=options) as volume:
        with trio.fail_after(30):
            while any(count(volume, prefix) for prefix in HALF_DONE.values()):
                await trio.sleep(0.05)
        run.model.compare(await tree(volume))
        assert list(run.model.now) == ["kept"]
        assert [count(volume, prefix) for prefix in (MAP, VALUE, EXTENT, SECTOR, INODE)] == [0, 1, 1, 1, 2]
        crash_points.check_hosts(volume)
