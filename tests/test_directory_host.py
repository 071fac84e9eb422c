"""The directory host's own promises: durable steps in order, crashes between them, what the operating system says, nothing outside."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from storage.buffers import ALIGNMENT, aligned
from storage.errors import Busy, NoSpace, NotFound, Unavailable
from storage.hosts.direct import MIN_DIRECT
from storage.hosts.directory import SLOTS, DirectoryHost
from storage.hosts.tree import TEMPORARY
from storage.seams import PER_PLACE, Seams
from tests.fakes import BASE_NS, Crash, CrashAt, ManualClock, RecordingFailpoints, make_seams

LIMIT = 1 << 20
STEPS = ["host.put.before_write", "host.put.before_fsync", "host.put.before_rename", "host.put.before_dirsync", "host.put.done"]


async def opened(path: Path, seams: Seams | None = None, create: bool = True) -> DirectoryHost:
    return await DirectoryHost.open(str(path), seams or make_seams(), create=create)


def temporaries(path: Path) -> list[str]:
    return os.listdir(path / TEMPORARY) if (path / TEMPORARY).exists() else []


@pytest.mark.parametrize("conditional", [False, True])
async def test_a_crash_at_any_step_leaves_the_old_or_the_new(tmp_path: Path, conditional: bool) -> None:
    for step in STEPS:
        path = tmp_path / step
        old = await (await opened(path)).put("a/b", b"old")
        host = await opened(path, make_seams(failpoints=CrashAt(step)))
        with pytest.raises(Crash):
            await (host.put_if("a/b", b"new", old) if conditional else host.put("a/b", b"new"))
        after = await opened(path, create=False)
        expected = b"new" if STEPS.index(step) >= STEPS.index("host.put.before_dirsync") else b"old"
        assert await after.get("a/b", LIMIT) == expected
        assert [name async for name, _ in after.list("")] == ["a/b"]
        # And it goes on: no lock and no name is left in the way.
        await after.put_if("a/b", b"newer", await after.tag("a/b"))
        assert await after.get("a/b", LIMIT) == b"newer"


async def test_the_order_of_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """file written, file flushed, renamed, directory flushed: each before the next, and names of new directories before all."""
    failpoints = RecordingFailpoints()
    host = await opened(tmp_path / "h", make_seams(failpoints=failpoints))
    log = failpoints.hits
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(fd: int) -> None:
        log.append("fsync " + os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), tmp_path / "h").split("~tmp/")[0])
        real_fsync(fd)

    def rename(source: str, target: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        log.append("rename")
        real_rename(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    await host.put("a/b/c", b"1")
    syncs = [entry for entry in log if not entry.startswith("host.")]
    assert syncs == ["fsync .", "fsync a", "fsync .", "fsync ", "rename", "fsync a/b"]
    log.clear()
    await host.put("a/b/d", b"2")
    assert [entry for entry in log if not entry.startswith("host.")] == ["fsync ", "rename", "fsync a/b"]
    log.clear()
    await host.delete("a/b/d")
    assert log == ["host.delete.before_unlink", "host.delete.before_dirsync", "fsync a/b"]


async def test_a_new_process_flushes_the_names_of_directories_an_earlier_one_may_not_have(tmp_path: Path) -> None:
    await (await opened(tmp_path / "h")).put("a/b", b"1")
    failpoints = RecordingFailpoints()
    await (await opened(tmp_path / "h", make_seams(failpoints=failpoints))).put("a/c", b"1")
    assert failpoints.hits.count("host.put.before_parent_sync") == 2


async def test_directories_that_shards_are_spread_over_are_flushed_together(tmp_path: Path) -> None:
    earlier = await opened(tmp_path / "h")
    for digits in ("00", "a0", "ff"):
        await earlier.put(f"sectors/{digits}/x", b"1")
    failpoints = RecordingFailpoints()
    host = await opened(tmp_path / "h", make_seams(failpoints=failpoints))
    await host.put("sectors/a0/y", b"1")
    # "sectors", "a0" (and all beside it), "~tmp".
    assert failpoints.hits.count("host.put.before_parent_sync") == 3
    for digits in ("00", "ff", "a0"):
        await host.put(f"sectors/{digits}/y", b"1")
    assert failpoints.hits.count("host.put.before_parent_sync") == 3
    # One that is new, and one that was there and has gone meanwhile.
    await host.put("sectors/b1/y", b"1")
    assert failpoints.hits.count("host.put.before_parent_sync") == 4
    shutil.rmtree(tmp_path / "h/sectors/00")
    await host.put("sectors/00/z", b"1")
    assert failpoints.hits.count("host.put.before_parent_sync") == 5


async def test_what_a_conditional_put_may_rely_on_is_flushed_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is there is not durable where the flush after its rename failed, or its process died before: a superblock that names it
    would be. So those directories are flushed first, and while that fails there is no superblock."""
    root, broken, log = tmp_path / "h", False, list[str]()
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(fd: int) -> None:
        path = os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), root)
        if broken and path == "v/metadata":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        log.append(f"fsync {path.split('~tmp/')[0]}")
        real_fsync(fd)

    def rename(source: str, target: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        log.append(f"rename {target}")
        real_rename(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    host = await opened(root)
    await host.put("v/metadata/a", b"1")
    await host.put("v/shards/00/x", b"1")
    broken = True
    with pytest.raises(Unavailable, match="Input/output error"):
        await host.put("v/metadata/b", b"2")
    assert "b" in {name.rpartition("/")[2] for name in (await host.level("v/metadata/")).objects}
    with pytest.raises(Unavailable, match="Input/output error"):
        await host.put_if("v/superblock", b"names b", None)
    assert await host.tag("v/superblock") is None
    broken = False
    log.clear()
    await host.put_if("v/superblock", b"names b", None)
    assert log.index("fsync v/metadata") < log.index("rename superblock")
    # Once is enough; and what lies deeper is no superblock's business.
    log.clear()
    await host.put_if("v/superblock.2", b"names b", None)
    assert log == ["fsync ", "rename superblock.2", "fsync v"]
    # Another process cannot know what the one before it flushed.
    other = await opened(root)
    assert len((await other.level("v/metadata/")).objects) == 2
    log.clear()
    await other.put_if("v/superblock.3", b"names b", None)
    assert log.index("fsync v/metadata") < log.index("rename superblock.3")
    assert not any("shards" in entry for entry in log)


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (errno.ENOSPC, NoSpace, "full"),
        (errno.EDQUOT, NoSpace, "full"),
        (errno.EIO, Unavailable, "Input/output error"),
        (errno.ENOTCONN, Unavailable, "not connected"),
        (errno.EACCES, Unavailable, "permission denied for user"),
        (errno.EROFS, Unavailable, "Read-only"),
        (errno.EMFILE, Unavailable, "open files"),
    ],
)
@pytest.mark.parametrize("step", STEPS[:4])
async def test_what_the_system_says_becomes_a_kind_and_nothing_is_left(
    tmp_path: Path, step: str, code: int, kind: type[Exception], words: str
) -> None:
    failpoints = RecordingFailpoints()
    host = await opened(tmp_path / "h", make_seams(failpoints=failpoints))
    await host.put("a", b"old")

    def fail() -> None:
        raise OSError(code, os.strerror(code))

    failpoints.actions[step] = fail
    with pytest.raises(kind, match=words) as caught:
        await host.put("a", b"new")
    assert host.url in str(caught.value)
    assert "\n" not in str(caught.value)
    assert temporaries(tmp_path / "h") == []
    failpoints.actions.clear()
    await host.put("a", b"newer")
    assert await host.get("a", LIMIT) == b"newer"


async def test_a_missing_directory_is_unavailable_and_names_itself(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="nowhere"):
        await opened(tmp_path / "nowhere", create=False)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Unavailable, match="not a directory"):
        await opened(tmp_path / "file", create=False)
    host = await opened(tmp_path / "h")
    await host.put("a", b"1")
    os.rename(tmp_path / "h", tmp_path / "away")
    for call in (host.get("a", LIMIT), host.put("a", b"2"), host.delete("a"), host.tag("a"), host.space()):
        with pytest.raises(Unavailable, match="missing"):
            await call
    os.rename(tmp_path / "away", tmp_path / "h")
    assert await host.get("a", LIMIT) == b"1"


async def test_nothing_is_written_into_another_directory_in_its_place(tmp_path: Path) -> None:
    """As when a disk is unmounted under a running volume: its mount point is there, and is not the host."""
    host = await opened(tmp_path / "h")
    await host.put("a", b"1")
    os.rename(tmp_path / "h", tmp_path / "away")
    (tmp_path / "h").mkdir()
    with pytest.raises(Unavailable, match="another directory"):
        await host.put("a", b"2")
    with pytest.raises(Unavailable, match="another directory"):
        await host.get("a", LIMIT)
    assert os.listdir(tmp_path / "h") == []


async def test_symbolic_links_lead_nowhere(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    host = await opened(tmp_path / "h")
    (tmp_path / "h" / "link").symlink_to(outside)
    (tmp_path / "h" / "file").symlink_to(outside / "secret")
    for name in ("link/secret", "file", "link"):
        with pytest.raises(NotFound):
            await host.get(name, LIMIT)
        assert await host.tag(name) is None
    with pytest.raises(Unavailable):
        await host.put("link/new", b"x")
    await host.delete("link/secret")
    await host.put("file", b"mine")
    assert [entry async for entry in host.list("")] == [("file", 4)]
    assert os.listdir(outside) == ["secret"]
    assert (outside / "secret").read_bytes() == b"secret"
    # The way to the root may be one: people do move disks about.
    (tmp_path / "alias").symlink_to(tmp_path / "h")
    assert await (await opened(tmp_path / "alias", create=False)).get("file", LIMIT) == b"mine"


async def test_what_is_no_regular_file_is_no_object(tmp_path: Path) -> None:
    host = await opened(tmp_path / "h")
    os.mkfifo(tmp_path / "h" / "fifo")
    (tmp_path / "h" / "directory").mkdir()
    for name in ("fifo", "directory"):
        with trio.fail_after(5), pytest.raises(NotFound):
            await host.get(name, LIMIT)
    assert [entry async for entry in host.list("")] == []


async def test_only_the_owner_can_look_in(tmp_path: Path) -> None:
    host = await opened(tmp_path / "new" / "h")
    await host.put("a/b", b"1")
    for path in (tmp_path / "new", tmp_path / "new" / "h", tmp_path / "new" / "h" / "a"):
        assert path.stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "new" / "h" / "a" / "b").stat().st_mode & 0o777 == 0o600


async def test_temporary_files_go_when_they_are_old(tmp_path: Path) -> None:
    await (await opened(tmp_path / "h")).put("a", b"1")
    for name, age in (("old", 90_000), ("young", 1000)):
        file = tmp_path / "h" / TEMPORARY / name
        file.write_bytes(b"")
        os.utime(file, ns=(BASE_NS - age * 10**9,) * 2)
    host = await opened(tmp_path / "h", make_seams(clock=ManualClock()))
    assert temporaries(tmp_path / "h") == ["young"]
    assert [name async for name, _ in host.list("")] == ["a"]


async def test_a_conditional_put_waits_for_the_lock_and_says_who_has_it(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    host = await opened(tmp_path / "h")
    await host.put("a", b"1")
    with open(tmp_path / "h" / "~lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(Busy, match="~lock"):
            await host.put_if("b", b"1", None)
        with trio.move_on_after(1):
            await host.put_if("b", b"1", None)
    await host.put_if("b", b"1", None)


async def test_a_hung_directory_holds_only_its_own_slots_and_can_be_given_up(tmp_path: Path) -> None:
    failpoints, release = RecordingFailpoints(), threading.Event()

    def hang() -> None:
        release.wait(20)

    failpoints.actions["host.put.before_fsync"] = hang
    seams = Seams(failpoints=failpoints)
    host, other = await opened(tmp_path / "h", seams), await opened(tmp_path / "other", Seams())
    started = time.monotonic()
    async with trio.open_nursery() as nursery:
        for number in range(SLOTS + 3):

            async def put(number: int = number) -> None:
                with trio.move_on_after(0.2) as scope:
                    await host.put(f"a/{number}", b"1")
                assert scope.cancelled_caught

            nursery.start_soon(put)
    with trio.move_on_after(0.1) as scope:
        await host.tag("a/0")
    assert scope.cancelled_caught
    await other.put("a", b"1")
    assert time.monotonic() - started < 10
    release.set()
    with trio.fail_after(10):
        await host.put("b", b"2")
        assert await host.get("b", LIMIT) == b"2"


async def test_many_hung_directories_do_not_keep_a_healthy_one_from_being_asked(tmp_path: Path) -> None:
    """Not those that are open, with every thread they may have, nor one that hangs again each time the registry tries to open it."""
    failpoints, release = RecordingFailpoints(), threading.Event()
    failpoints.actions["host.put.before_fsync"] = lambda: release.wait(60)
    healthy = Seams()
    seams = Seams(failpoints=failpoints, threads=healthy.threads)
    hung = [await opened(tmp_path / f"hung{number}", seams) for number in range(12)]
    before = threading.active_count()

    async def give_up(call: Callable[[], Awaitable[object]]) -> None:
        with trio.move_on_after(0.3) as scope:
            await call()
        assert scope.cancelled_caught

    try:
        async with trio.open_nursery() as nursery:
            for host in hung:
                for number in range(SLOTS + 2):
                    nursery.start_soon(give_up, partial(host.put, f"a/{number}", b"1"))
        assert threading.active_count() <= before + len(hung) * SLOTS
        other = await opened(tmp_path / "other", healthy)
        with trio.fail_after(10):
            await other.put("a", b"1")
        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(give_up, partial(healthy.threads.run_abandonable, "dir:/gone", release.wait, 60))
        assert threading.active_count() <= before + len(hung) * SLOTS + PER_PLACE + 1
        with trio.fail_after(10):
            await other.put("b", b"1")
    finally:
        release.set()


@pytest.mark.parametrize("what", ["delete", "put_if", "put"])
async def test_a_change_that_hangs_can_be_given_up_and_does_not_happen_behind_the_next_one(tmp_path: Path, what: str) -> None:
    """Closing a volume ends though a network mount hangs. And: a deletion that wakes up late must not take away what was put meanwhile."""
    failpoints, release = RecordingFailpoints(), threading.Event()
    host = await opened(tmp_path / "h", Seams(failpoints=failpoints))
    await host.put("a", b"1")
    tag = await host.tag("a")

    def hang() -> None:
        release.wait(20)

    failpoints.actions["host.delete.before_unlink"] = failpoints.actions["host.put.before_fsync"] = hang
    started = time.monotonic()
    with trio.move_on_after(0.2) as scope:
        if what == "delete":
            await host.delete("a")
        elif what == "put_if":
            await host.put_if("a", b"2", tag)
        else:
            await host.put("a", b"2")
    assert scope.cancelled_caught
    assert time.monotonic() - started < 5
    with pytest.raises(Unavailable, match="hangs"):
        await host.put("a", b"3")
    with pytest.raises(Unavailable, match="hangs"):
        await host.delete("a")
    release.set()
    with trio.fail_after(10):
        while host._slots.at_work:
            await trio.sleep(0.01)
        assert await host.get("a", LIMIT) == b"1"
        assert temporaries(tmp_path / "h") == []
        await host.put("a", b"3")
        await host.delete("a")
    assert await host.tag("a") is None


async def test_every_name_that_is_there_is_whole_while_others_replace_it(tmp_path: Path) -> None:
    host = await opened(tmp_path / "h", Seams())
    await host.put("a", bytes(500_000))
    stop = trio.Event()

    async def replace() -> None:
        for number in range(1, 20):
            await host.put("a", bytes([number]) * 500_000)
        stop.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(replace)
        while not stop.is_set():
            data = await host.get("a", LIMIT)
            assert len(data) == 500_000
            assert len(set(data)) == 1


def buffer_of(data: bytes) -> memoryview:
    buffer = aligned(len(data))
    buffer[:] = data
    return buffer.toreadonly()


@pytest.mark.parametrize("more", [-1, 0, 1, 4095, 4096, 4097, 1_000_003])
async def test_large_objects_go_past_the_page_cache_and_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: int) -> None:
    data = os.urandom(MIN_DIRECT + more)
    direct = 0
    write = os.write

    def watched(fd: int, piece: memoryview) -> int:
        nonlocal direct
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            direct += len(piece)
            # Short writes happen, and may end anywhere.
            return write(fd, piece[:ALIGNMENT] if direct == len(piece) else piece)
        return write(fd, piece)

    monkeypatch.setattr(os, "write", watched)
    host = await opened(tmp_path)
    await host.put("large", buffer_of(data))
    await host.put("plain", data)
    assert (direct > 0) == (more >= 0)
    assert await host.get("large", 2 * len(data)) == data == await host.get("plain", 2 * len(data))
    assert (tmp_path / "large").read_bytes() == data


async def test_where_direct_writes_are_refused_they_are_not_tried_again_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = 0
    write = os.write

    def refusing(fd: int, piece: memoryview) -> int:
        nonlocal refused
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            refused += 1
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(fd, piece)

    monkeypatch.setattr(os, "write", refusing)
    host = await opened(tmp_path)
    for number in range(3):
        data = os.urandom(MIN_DIRECT + number)
        await host.put(f"n{number}", buffer_of(data))
        assert await host.get(f"n{number}", 2 * len(data)) == data
    assert refused == 1


async def test_a_full_disk_is_no_space_for_direct_writes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write

    def full(fd: int, piece: memoryview) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, piece)

    monkeypatch.setattr(os, "write", full)
    host = await opened(tmp_path)
    with pytest.raises(NoSpace):
        await host.put("large", buffer_of(bytes(MIN_DIRECT)))
    assert temporaries(tmp_path) == []
