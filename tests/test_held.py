"""Files a directory host keeps open for a second: not for longer, never in place of what is there now, and never instead of looking
whether the disk is there before anything is written."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from storage.errors import NotFound, Unavailable
from storage.hosts import held
from storage.hosts.direct import MIN_DIRECT, MOST_DIRECT, STEPS
from storage.hosts.directory import DirectoryHost
from storage.hosts.layout import check_name
from storage.hosts.root import Root
from storage.interfaces import QuickHost
from tests.fakes import make_seams

NAME = "volumes/v/sectors/aa/aabb"


async def opened(path: Path) -> DirectoryHost:
    return await DirectoryHost.open(str(path), make_seams(), create=True)


def open_below(path: Path) -> list[str]:
    """What this process has open there."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue
        if target.startswith(str(path)):
            found.append(target)
    return found


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(20):
        while not condition():
            await trio.sleep(0.02)


async def test_nothing_stays_open_a_moment_after_the_last_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk can be unmounted."""
    monkeypatch.setattr(held, "LIFE", 0.2)
    host = await opened(tmp_path / "h")
    await host.put(NAME, b"0123456789")
    for _ in range(3):
        assert await host.get_range(NAME, 2, 3) == b"234"
    assert open_below(tmp_path / "h") == [str(tmp_path / "h" / NAME)]
    await until(lambda: not open_below(tmp_path / "h"))
    assert not host.soon(NAME)
    assert await host.get_range(NAME, 2, 3) == b"234"
    await until(lambda: not open_below(tmp_path / "h"))


async def test_reading_on_and_on_does_not_keep_a_file_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a directory that was moved away would be read for as long as somebody reads."""
    monkeypatch.setattr(held, "LIFE", 0.1)
    host = await opened(tmp_path / "h")
    await host.put(NAME, b"0123456789")
    await host.get_range(NAME, 0, 1)
    os.rename(tmp_path / "h", tmp_path / "away")
    (tmp_path / "h").mkdir()
    with trio.fail_after(20), pytest.raises(Unavailable, match="another directory"):
        while True:
            assert host.get_range_now(NAME, 0, 1) in (None, b"0")
            assert await host.get_range(NAME, 0, 1) == b"0"
            await trio.sleep(0.01)


async def test_what_is_written_or_missing_is_never_told_from_what_is_held(tmp_path: Path) -> None:
    """The disk was unmounted, or the directory replaced, a moment ago."""
    host = await opened(tmp_path / "h")
    await host.put(NAME, b"0123456789")
    await host.get_range(NAME, 0, 1)
    os.rename(tmp_path / "h", tmp_path / "away")
    (tmp_path / "h").mkdir()
    with pytest.raises(Unavailable, match="another directory"):
        await host.put(NAME, b"2")
    with pytest.raises(Unavailable, match="another directory"):
        await host.get_range(NAME + "x", 0, 1)
    # What was to be put in its place is not there: it is looked at again.
    with pytest.raises(Unavailable, match="another directory"):
        await host.get_range(NAME, 0, 1)
    assert os.listdir(tmp_path / "h") == []


@pytest.mark.parametrize("by", ["this process", "another"])
async def test_what_is_replaced_or_removed_is_not_read_any_more(tmp_path: Path, by: str) -> None:
    host = await opened(tmp_path / "h")
    other = host if by == "this process" else await opened(tmp_path / "h")
    await host.put(NAME, b"0123456789")
    assert await host.get_range(NAME, 0, 4) == b"0123"
    await other.put(NAME, b"abcdefghij")
    assert host.get_range_now(NAME, 0, 4) is None
    assert await host.get_range(NAME, 0, 4) == b"abcd"
    assert await in_steps(host, 0, 4, 3) == b"abcd"
    await other.delete(NAME)
    assert host.get_range_now(NAME, 0, 4) is None
    with pytest.raises(NotFound):
        await host.get_range(NAME, 0, 4)


async def test_a_symbolic_link_in_the_place_of_a_held_file_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "aabb").write_bytes(b"secret")
    host = await opened(tmp_path / "h")
    await host.put(NAME, b"0123456789")
    await host.get_range(NAME, 0, 4)
    (tmp_path / "h" / NAME).unlink()
    (tmp_path / "h" / NAME).symlink_to(outside / "aabb")
    assert host.get_range_now(NAME, 0, 4) is None
    for read in (host.get_range(NAME, 0, 4), in_steps(host, 0, 4, 3)):
        with pytest.raises(NotFound):
            await read


async def with_thread(path: Path) -> DirectoryHost:
    """A host that opens files briefly, since something was read from it as usual."""
    host = await opened(path)
    await host.put("first", b"x")
    await host.get_range("first", 0, 1)
    assert host._tree._briefly._names is not None
    return host


def opening_threads() -> set[int]:
    return {thread.ident or 0 for thread in threading.enumerate() if thread.name == "fusefs-opening"}


async def test_a_file_that_was_not_read_lately_is_opened_while_the_event_loop_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held, "LIFE", 60.0)
    others = opening_threads()
    host = await with_thread(tmp_path / "h")
    await host.put(NAME, b"0123456789")
    assert not host.soon(NAME)
    # Whether a busy machine is quick enough is its own affair.
    await until(lambda: host.soon(NAME, 0.2))
    assert str(tmp_path / "h" / NAME) in open_below(tmp_path / "h")
    assert bytes(host.get_range_now(NAME, 2, 3) or b"234") == b"234"
    # What is missing, or leads out of the tree, is for who reads it to find out.
    (tmp_path / "outside").write_bytes(b"secret")
    (tmp_path / "h" / NAME).with_name("link").symlink_to(tmp_path / "outside")
    for name in ("no/such", f"{NAME}/below", NAME[:-4] + "link"):
        assert not host.soon(name, 0.2)
    assert host.soon(NAME)
    await host.aclose()
    await until(lambda: opening_threads() <= others)
    assert open_below(tmp_path / "h") == []


async def test_a_disk_that_hangs_does_not_hold_up_who_opens_briefly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "LIFE", 60.0)
    host = await with_thread(tmp_path / "h")
    names = [f"a/{number}" for number in range(40)]
    for name in names:
        await host.put(name, b"x")
    lets_go, begun = threading.Event(), []
    open_object = Root.open_object

    def hangs(self: Root, parts: list[str]) -> tuple[int, int]:
        begun.append("/".join(parts))
        lets_go.wait()
        return open_object(self, parts)

    monkeypatch.setattr(Root, "open_object", hangs)
    try:
        # That it comes back at all is what is promised: nothing lets go before.
        assert not any(host.soon(name, 0.001) for name in names)
        await until(lambda: begun == names[:1])
    finally:
        lets_go.set()
    await until(lambda: host.soon(names[0]))
    await until(lambda: host.soon(names[1], 0.2))
    await host.aclose()


async def test_nothing_is_held_or_opened_once_a_host_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that comes back after its host was closed is not kept busy by it."""
    others = opening_threads()
    host = await with_thread(tmp_path / "h")
    await host.put(NAME, b"0123456789")
    lets_go, begun = threading.Event(), threading.Event()
    open_object = Root.open_object

    def hangs(self: Root, parts: list[str]) -> tuple[int, int]:
        begun.set()
        lets_go.wait()
        return open_object(self, parts)

    monkeypatch.setattr(Root, "open_object", hangs)
    assert not host.soon(NAME, 0.001)
    await until(begun.is_set)
    await host.aclose()
    lets_go.set()
    await until(lambda: opening_threads() <= others)
    assert open_below(tmp_path / "h") == []
    assert not host.soon(NAME, 0.2)
    host._tree._briefly.start()
    assert not host.soon(NAME, 0.2)
    assert opening_threads() <= others


async def test_where_no_thread_can_be_had_files_are_read_as_usual_and_none_stays_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = await opened(tmp_path / "h")
    await host.put(NAME, b"0123456789")
    start = threading.Thread.start

    def refused(self: threading.Thread) -> None:
        if self.name.startswith("fusefs-"):
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refused)
    for _ in range(3):
        assert await host.get_range(NAME, 2, 3) == b"234"
        assert not host.soon(NAME, 0.2)
        assert open_below(tmp_path / "h") == []
    monkeypatch.setattr(threading.Thread, "start", start)
    assert await host.get_range(NAME, 2, 3) == b"234"
    await until(lambda: host.soon(NAME, 0.2))
    await host.aclose()


def test_a_bug_in_opening_ends_nothing() -> None:
    def hold(name: str) -> None:
        raise ZeroDivisionError(name)

    opening = held.BriefOpening(hold)
    opening.start()
    for _ in range(3):
        assert opening.open("x", 60.0)
    opening.close()


async def test_a_filesystem_that_always_waits_is_not_asked_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = await with_thread(tmp_path / "h")

    def unknown(*_: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "no such thing")

    monkeypatch.setattr(os, "preadv", unknown)
    assert host.soon("first")
    assert host.get_range_now("first", 0, 1) is None
    assert not host.soon("first", 0.2)
    await host.aclose()


def test_where_waiting_was_in_vain_it_is_left_more_and_more_often() -> None:
    """Else each miss on a slow disk would take its patience from everybody else."""
    turn = threading.Semaphore(0)
    opening = held.BriefOpening(lambda _: turn.acquire())
    assert not opening.open("without a thread", 60.0)
    opening.start()
    left = []
    for _ in range(9):
        assert not opening.open("late", 0.0)
        pending = opening._pending
        turn.release()
        skipped = 0
        while opening._left:
            # Nobody waits for it at all.
            assert not opening.open("next", 60.0)
            skipped += 1
        left.append(skipped)
        assert pending is not None
        assert pending.acquire(timeout=60)
        pending.release()
    assert left == [1, 2, 4, 8, 16, 32, 64, 64, 64]
    turn.release()
    assert opening.open("in time", 60.0)
    assert not opening.open("late", 0.0)
    assert opening._left == 1
    turn.release()
    opening.close()


async def test_at_most_so_many_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "FILES", 5)
    host = await opened(tmp_path / "h")
    for number in range(12):
        await host.put(f"a/{number}", b"x")
        await host.get_range(f"a/{number}", 0, 1)
    assert len(open_below(tmp_path / "h")) == 5
    await host.aclose()
    assert open_below(tmp_path / "h") == []


async def test_ranges_are_the_same_whichever_way(tmp_path: Path) -> None:
    host = await opened(tmp_path / "h")
    assert isinstance(host, QuickHost)
    data = os.urandom(300_000)
    await host.put(NAME, data)
    assert host.get_range_now(NAME, 0, 10) is None  # never read: nothing is held
    for offset, length in [(0, 10), (65_552, 65_552), (299_990, 10), (299_990, 100), (300_000, 1), (400_000, 5), (0, 300_000), (7, 0)]:
        expected = data[offset : offset + length]
        assert await host.get_range(NAME, offset, length) == expected
        assert await host.get_range(NAME, offset, length) == expected
        for step in (1000, 65_552, 300_000):
            assert await in_steps(host, offset, length, step) == expected
        # All of it or nothing: in the page cache it is, having been read.
        now = host.get_range_now(NAME, offset, length)
        assert now is None or bytes(now) == expected
        if len(expected) == length <= 100_000:
            deadline = time.monotonic() + 5
            while now is None and time.monotonic() < deadline:
                await host.get_range(NAME, offset, length)
                now = host.get_range_now(NAME, offset, length)
            assert now is not None or not _has_nowait(tmp_path)


def _has_nowait(path: Path) -> bool:
    """Whether this filesystem can say that a read would wait."""
    (path / "probe").write_bytes(b"x")
    with open(path / "probe", "rb") as file:
        file.read()
        try:
            return os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT) == 1
        except OSError:
            return False


async def range_in(host: DirectoryHost, offset: int, length: int, step: int, take: Callable[[memoryview], object]) -> int:
    """As whoever opens what is read has it, in this process or the other."""
    return await trio.to_thread.run_sync(host._tree.get_range_in, check_name(NAME), offset, length, step, take)


async def in_steps(host: DirectoryHost, offset: int, length: int, step: int) -> bytes:
    pieces: list[bytes] = []
    got = await range_in(host, offset, length, step, lambda view: pieces.append(bytes(view)))
    assert all(len(piece) % step == 0 for piece in pieces[:-1])
    assert got == sum(map(len, pieces))
    return b"".join(pieces)


async def test_what_is_raised_with_a_piece_comes_out_and_buffers_are_bounded(tmp_path: Path) -> None:
    host = await opened(tmp_path / "h")
    await host.put(NAME, b"0123456789")

    def fails(view: memoryview) -> None:
        raise NotFound(bytes(view).decode())

    for _ in range(20):
        with pytest.raises(NotFound, match="234"):
            await range_in(host, 2, 3, 10, fails)
    steps = host._tree._direct._steps
    buffers = [steps.lend(STEPS // 4) for _ in range(20)]
    del buffers
    assert steps.kept == STEPS


@pytest.mark.parametrize("most", [MIN_DIRECT, MOST_DIRECT])
@pytest.mark.parametrize("short", [False, True])
async def test_large_ranges_go_past_the_page_cache_and_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, short: bool
) -> None:
    direct = 0
    preadv = os.preadv

    def watched(fd: int, views: list[memoryview], at: int, flags: int = 0) -> int:
        nonlocal direct
        got = preadv(fd, views, at, flags)
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            # Reads may stop short, anywhere.
            got = max(0, got - 100_000) if short and direct else got
            direct += got
        return got

    monkeypatch.setattr(os, "preadv", watched)
    monkeypatch.setattr("storage.hosts.direct.MOST_DIRECT", most)
    host = await opened(tmp_path / "h")
    data = os.urandom(5 * MIN_DIRECT + 12345)
    await host.put(NAME, data)
    for offset in (0, 64, 4095, 4096, 300_000):
        for length in (MIN_DIRECT, MIN_DIRECT + 1, 5 * MIN_DIRECT, 10 * MIN_DIRECT):
            for step in (1000, 65_552, 4 * MIN_DIRECT):
                direct = 0
                assert await in_steps(host, offset, length, step) == data[offset : offset + length]
                assert direct
    direct = 0
    assert await in_steps(host, 10, MIN_DIRECT - 1, 1000) == data[10 : MIN_DIRECT + 9]
    assert await in_steps(host, len(data), MIN_DIRECT, 1000) == b""
    assert direct == 0


@pytest.mark.parametrize("setting", [False, True])
async def test_where_direct_reads_are_refused_they_are_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: bool
) -> None:
    """By fcntl(2), or only by the read itself."""
    refused = 0
    preadv, control = os.preadv, fcntl.fcntl

    def refusing(fd: int, views: list[memoryview], at: int, flags: int = 0) -> int:
        if control(fd, fcntl.F_GETFL) & os.O_DIRECT:
            refuse()
        return preadv(fd, views, at, flags)

    def refusing_control(fd: int, command: int, argument: int = 0) -> int:
        if setting and command == fcntl.F_SETFL and argument & os.O_DIRECT:
            refuse()
        return control(fd, command, argument)

    def refuse() -> None:
        nonlocal refused
        refused += 1
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    data = os.urandom(2 * MIN_DIRECT)
    host = await opened(tmp_path / "h")
    await host.put(NAME, data)
    monkeypatch.setattr(os, "preadv", refusing)
    monkeypatch.setattr(fcntl, "fcntl", refusing_control)
    for _ in range(3):
        assert await in_steps(host, 64, len(data), 65_552) == data[64:]
    assert refused == 1


async def test_a_disk_that_fails_a_direct_read_is_said_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(fd: int, views: list[memoryview], at: int, flags: int = 0) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    host = await opened(tmp_path / "h")
    await host.put(NAME, bytes(2 * MIN_DIRECT))
    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(Unavailable, match="error"):
        await in_steps(host, 64, 2 * MIN_DIRECT, 65_552)
    assert open_below(tmp_path / "h") == []
