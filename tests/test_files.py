"""Files: the conformance suite over every implementation, and what is this one's own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from storage.errors import BadArgument, NotFound
from storage.files import Files
from storage.interfaces import Files as FilesProtocol
from tests.conformance.files import CHECKS, get, put
from tests.fakes import make_seams
from tests.namespace_rig import ROOT, Rig, make_rig


def files_of(rig: Rig, idle_timeout: float = 600.0) -> Files:
    return Files(rig.ns, make_seams(), idle_timeout=idle_timeout, uid=1, gid=2)


@asynccontextmanager
async def in_memory(tmp_path: Path) -> AsyncIterator[FilesProtocol]:
    yield files_of(make_rig(cache_limit=3))


@asynccontextmanager
async def on_a_volume(tmp_path: Path) -> AsyncIterator[FilesProtocol]:
    from tests import rig

    await rig.make(tmp_path / "volume")
    async with rig.opened(tmp_path / "volume") as volume:
        yield volume.files


@pytest.mark.parametrize("make", [in_memory, on_a_volume])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_files(
    check: Callable[[FilesProtocol], Awaitable[None]],
    make: Callable[[Path], AbstractAsyncContextManager[FilesProtocol]],
    tmp_path: Path,
) -> None:
    async with make(tmp_path) as files:
        await check(files)


async def test_files_and_mount_see_the_same_names() -> None:
    rig = make_rig()
    files = files_of(rig)
    await put(files, "logs/today", b"from files")
    logs = rig.ns.lookup(ROOT, b"logs")
    ino = rig.ns.lookup(logs, b"today")
    assert await rig.content(ino) == b"from files"
    made, below = rig.ns.attributes(ino), rig.ns.attributes(logs)
    assert (made.mode, made.uid, made.gid, below.mode, below.uid) == (0o100644, 1, 2, 0o040755, 1)
    other = rig.file(b"other", logs)
    rig.ns.symlink(logs, b"link", b"today", 0, 0)
    await rig.ns.write(other, 3, b"x")
    assert await files.list() == {"logs/today": 10, "logs/other": 4}
    assert await get(files, "logs/other") == b"\0\0\0x"
    for name in ("logs/link",):
        with pytest.raises(BadArgument):
            await files.open(name)
        with pytest.raises(BadArgument):
            await files.delete(name)


async def test_commit_is_an_fsync() -> None:
    rig = make_rig()
    files = files_of(rig)
    fd = await files.open("deep/down/file", write=True)
    await files.append(fd, b"kept")
    await files.commit(fd)
    await files.append(fd, b" lost")
    assert await get(files_of(rig.after_crash()), "deep/down/file") == b"kept"


async def test_a_deleted_file_is_freed_with_its_last_descriptor() -> None:
    rig = make_rig()
    files = files_of(rig)
    await put(files, "a", b"content")
    fds = [await files.open("a"), await files.open("a")]
    await files.delete("a")
    assert rig.ns.counts() == (2, 7)
    for fd in fds:
        await files.close(fd)
    assert rig.ns.counts() == (1, 0)


async def test_the_collector_closes_what_is_idle_and_says_so(autojump_clock: trio.testing.MockClock) -> None:
    rig = make_rig()
    files = files_of(rig, idle_timeout=100)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(files.run)
        idle, used, deleted = await files.open("idle"), await files.open("used", write=True), await files.open("deleted")
        await files.delete("deleted")
        for _ in range(5):
            await trio.sleep(60)
            await files.append(used, b"x")
        with pytest.raises(NotFound, match=r"descriptor 1 \('idle'\) was closed after 100 s without use; open the file again"):
            await files.read_at(idle, 0, 1)
        with pytest.raises(NotFound, match="without use"):
            await files.close(idle)
        with pytest.raises(NotFound, match="without use"):
            await files.size_of(deleted)
        assert await files.size_of(used) == 5
        # What it held is free: the root and the two files with names are left.
        assert rig.ns.counts() == (3, 5)
        await files.close(used)
        with pytest.raises(NotFound, match="is closed"):
            await files.close(used)
        with pytest.raises(NotFound, match="never opened"):
            await files.close(99)
        nursery.cancel_scope.cancel()


async def test_a_descriptor_in_use_is_not_idle(autojump_clock: trio.testing.MockClock) -> None:
    rig = make_rig()
    files = files_of(rig, idle_timeout=10)
    fd = await files.open("a", write=True)
    rig.values.hold = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(files.run)
        nursery.start_soon(files.append, fd, b"slow")
        await trio.sleep(1000)
        rig.values.hold.set()
        autojump_clock.autojump_threshold = float("inf")
        await wait_all_tasks_blocked()
        assert await files.read_at(fd, 0, 10) == b"slow"
        nursery.cancel_scope.cancel()


async def test_descriptors_that_were_collected_are_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.files._REMEMBERED", 3)
    files = files_of(make_rig())
    for i in range(6):
        await files.open(f"{i}")
    for handle in files._open.values():
        handle.last_used -= 1000
    files._collect()
    assert sorted(files._collected) == [4, 5, 6]
    with pytest.raises(NotFound, match="descriptor 1 is closed"):
        await files.size_of(1)


async def test_a_long_listing_lets_others_run() -> None:
    rig = make_rig(cache_limit=100)
    files = files_of(rig)
    for i in range(3000):
        rig.file(b"%d" % i)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        assert len(await files.list()) == 3000
        nursery.cancel_scope.cancel()
    assert turns >= 10


async def test_a_timeout_of_nothing_is_refused() -> None:
    with pytest.raises(BadArgument):
        files_of(make_rig(), idle_timeout=0)
