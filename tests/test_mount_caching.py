"""Cached and direct handles: each consequence in docs/design.md, on a real mount; and that its test would notice a missing rule."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounting import Mounted, Mounting, mounting_in, reap, wait_until
from tests.rig import host_dirs

libc = ctypes.CDLL(None, use_errno=True)
SYNC_FILE_RANGE_ALL = 7
NEVER = "commit_interval=600"


@pytest.fixture
def mounting(tmp_path: Path) -> Iterator[Mounting]:
    base = tmp_path / "m"
    base.mkdir()
    with mounting_in(base) as made:
        yield made


def appender(path: Path, flags: int = 0) -> int:
    """A descriptor that is cached."""
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | flags, 0o644)


def sync_range(fd: int, offset: int, length: int) -> None:
    """Have the kernel write just these dirty pages."""
    assert libc.sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(length), SYNC_FILE_RANGE_ALL) == 0, os.strerror(
        ctypes.get_errno()
    )


def errno_of(call: object, *args: object) -> int:
    try:
        call(*args)  # type: ignore[operator]
    except OSError as error:
        return error.errno or 0
    return 0


# ------------------------------------------------------------------------------------------------------ which is which


def test_the_kernel_asks_for_a_name_once_whether_it_is_there_or_not(mounting: Mounting) -> None:
    mounted = mounting.mount(NEVER)
    there, missing = mounted.path / "there", mounted.path / "missing"
    there.write_bytes(b"x")

    def asked(path: Path) -> int:
        return (mounted.base / "names").read_text().split("\n").count(path.name)

    before = asked(there), asked(missing)
    for _ in range(50):
        assert there.stat().st_size == 1
        assert not missing.exists()
    assert asked(there) == before[0]
    assert asked(missing) == before[1] + 1
    # And is not misled by what it remembers.
    missing.write_bytes(b"")
    assert missing.exists()
    missing.unlink()
    there.rename(missing)
    assert missing.exists()
    assert not there.exists()


def test_small_appends_are_gathered_and_seen_at_once(mounting: Mounting) -> None:
    mounted = mounting.mount(NEVER)
    path = mounted.path / "log"
    fd = appender(path)
    for _ in range(1000):
        os.write(fd, b"x" * 99 + b"\n")
    assert path.stat().st_size == 100_000
    assert path.read_bytes() == (b"x" * 99 + b"\n") * 1000
    assert len(mounted.writes(path)) < 20
    os.fsync(fd)
    os.close(fd)
    assert sum(length for _, length, _ in mounted.writes(path)) >= 100_000


def test_other_writers_are_direct(mounting: Mounting) -> None:
    mounted = mounting.mount(NEVER)
    for name, flags in {"wronly": os.O_WRONLY, "rdwr": os.O_RDWR, "rdwr-append": os.O_RDWR | os.O_APPEND}.items():
        fd = os.open(mounted.path / name, flags | os.O_CREAT, 0o644)
        for _ in range(10):
            os.write(fd, b"12345")
        assert mounted.writes(mounted.path / name) == [(5 * number, 5, "ok") for number in range(10)]
        os.close(fd)


def overwrite_in_one_step(mounted: Mounted) -> int:
    """errno of the write(2) that overwrites."""
    path = mounted.path / "f"
    path.write_bytes(b"0123456789")
    fd = os.open(path, os.O_RDWR)
    try:
        return errno_of(os.write, fd, b"X")
    finally:
        errno_of(os.close, fd)


def test_a_direct_write_is_answered_itself(mounting: Mounting) -> None:
    assert overwrite_in_one_step(mounting.mount(NEVER)) == errno.EPERM


def test_with_every_handle_cached_that_would_not_be_so(mounting: Mounting) -> None:
    assert overwrite_in_one_step(mounting.mount(NEVER, without=["direct"])) == 0


def test_without_write_back_every_append_arrives_at_once(mounting: Mounting) -> None:
    mounted = mounting.mount(NEVER + ",nowriteback")
    fd = appender(mounted.path / "log")
    for _ in range(10):
        os.write(fd, b"12345")
    assert mounted.writes(mounted.path / "log") == [(5 * number, 5, "ok") for number in range(10)]
    assert (mounted.path / "log").read_bytes() == b"12345" * 10
    os.close(fd)


@pytest.mark.parametrize("reason", ["not-accepting", "not-local"])
def test_handles_are_direct_when_appends_could_be_refused_or_would_ask_a_host(mounting: Mounting, reason: str) -> None:
    mounted = mounting.mount(NEVER)
    mounted.fault(reason)
    fd = appender(mounted.path / "log")
    os.write(fd, b"12345")
    assert mounted.writes(mounted.path / "log") == [(0, 5, "ok")]
    os.close(fd)


def test_below_the_reserve_write_itself_says_no_space(mounting: Mounting) -> None:
    mounted = mounting.mount(NEVER)
    mounted.fault("not-accepting")
    mounted.fault("no-space")
    fd = appender(mounted.path / "log")
    assert errno_of(os.write, fd, b"12345") == errno.ENOSPC
    mounted.clear("no-space")
    assert os.write(fd, b"67890") == 5
    os.close(fd)
    assert (mounted.path / "log").read_bytes() == b"67890"


def test_with_the_reserve_ignored_write_would_not_say_it(mounting: Mounting) -> None:
    mounted = mounting.mount(NEVER, without=["accepting"])
    mounted.fault("not-accepting")
    mounted.fault("no-space")
    fd = appender(mounted.path / "log")
    assert errno_of(os.write, fd, b"12345") == 0
    assert errno_of(os.close, fd) == errno.ENOSPC


# ------------------------------------------------------------------------------------------------------ order, overlap


def test_pages_that_come_out_of_order_land_in_their_places(mounting: Mounting) -> None:
    mounted = mounting.mount(NEVER)
    path = mounted.path / "f"
    fd = appender(path)
    data = os.urandom(1 << 20)
    os.write(fd, data)
    sync_range(fd, 1 << 19, 1 << 19)
    offsets = [offset for offset, _, _ in mounted.writes(path)]
    assert offsets, "nothing was written back"
    assert min(offsets) >= 1 << 19, "the upper half did not come first: nothing was tested"
    os.fsync(fd)
    os.close(fd)
    inode = path.stat().st_ino
    mounted.unmount()
    again = mounting.mount(NEVER)
    assert (again.path / "f").read_bytes() == data
    assert (again.path / "f").stat().st_ino == inode


def test_a_synchronous_appender_beside_a_cached_one(mounting: Mounting) -> None:
    mounted = mounting.mount(NEVER)
    path = mounted.path / "f"
    lazy, prompt = appender(path), appender(path, os.O_DSYNC)
    expected = b""
    for number in range(50):
        for fd, piece in ((lazy, b"lazy %04d;" % number * 500), (prompt, b"prompt %04d;" % number)):
            os.write(fd, piece)
            expected += piece
    os.close(lazy)
    os.close(prompt)
    assert path.read_bytes() == expected
    mounted.unmount()
    assert (mounting.mount(NEVER).path / "f").read_bytes() == expected


def test_pages_sent_again_are_taken_as_what_they_are(mounting: Mounting) -> None:
    """The kernel sends whole dirty pages: their first bytes are stored already."""
    mounted = mounting.mount(NEVER)
    path = mounted.path / "f"
    fd = appender(path)
    expected = b""
    for number in range(60):
        piece = b"line %d\n" % number
        os.write(fd, piece)
        expected += piece
        os.fsync(fd)
    os.close(fd)
    assert any(offset + length > 0 and offset == 0 for offset, length, _ in mounted.writes(path)[1:]), (
        "no page was sent again: nothing was tested"
    )
    assert {outcome for _, _, outcome in mounted.writes(path)} == {"ok"}
    mounted.unmount()
    assert (mounting.mount(NEVER).path / "f").read_bytes() == expected


def test_a_size_set_before_dirty_pages_come_is_filled_by_them(mounting: Mounting) -> None:
    mounted = mounting.mount(NEVER)
    path = mounted.path / "f"
    fd = appender(path)
    os.write(fd, b"dirty" * 100)
    os.ftruncate(fd, 10_000)
    os.write(fd, b"end")
    os.close(fd)
    expected = b"dirty" * 100 + bytes(9_500) + b"end"
    assert path.read_bytes() == expected
    mounted.unmount()
    assert (mounting.mount(NEVER).path / "f").read_bytes() == expected


def test_truncating_to_nothing_drops_dirty_pages(mounting: Mounting) -> None:
    mounted = mounting.mount(NEVER)
    path = mounted.path / "f"
    fd = appender(path)
    os.write(fd, b"old" * 5000)
    os.fsync(fd)
    os.write(fd, b"dirty" * 5000)
    os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))
    os.write(fd, b"new")
    os.close(fd)
    assert path.read_bytes() == b"new"
    mounted.unmount()
    assert (mounting.mount(NEVER).path / "f").read_bytes() == b"new"


# ------------------------------------------------------------------------------------------------------------- refused


def append_while_full(mounted: Mounted, path: Path) -> int:
    """A cached append that is refused later, and appends behind it; the descriptor."""
    fd = appender(path)
    os.write(fd, b"good\n" * 1000)
    os.fsync(fd)
    mounted.fault("no-space")
    os.write(fd, b"lost\n" * 1000)
    assert errno_of(os.fsync, fd) == errno.ENOSPC
    mounted.clear("no-space")
    return fd


def test_a_refused_append_leaves_no_gap(mounting: Mounting) -> None:
    mounted = mounting.mount(NEVER)
    path = mounted.path / "log"
    fd = append_while_full(mounted, path)
    wait_until(lambda: path.stat().st_size == 5000, "the kernel's size is the stored one again")
    assert path.read_bytes() == b"good\n" * 1000
    os.write(fd, b"goes on\n")
    os.fsync(fd)
    os.close(fd)
    assert path.read_bytes() == b"good\n" * 1000 + b"goes on\n"
    mounted.unmount()
    assert (mounting.mount(NEVER).path / "log").read_bytes() == b"good\n" * 1000 + b"goes on\n"


def test_until_it_is_repaired_appends_behind_it_get_the_same_error(mounting: Mounting) -> None:
    mounted = mounting.mount(NEVER, without=["repair"])
    path = mounted.path / "log"
    fd = append_while_full(mounted, path)
    assert path.stat().st_size == 10_000, "repaired: nothing was tested"
    os.write(fd, b"behind\n" * 1000)
    assert errno_of(os.fsync, fd) == errno.ENOSPC
    errno_of(os.close, fd)
    late = appender(path)
    os.write(late, b"later\n" * 1000)
    assert errno_of(os.fsync, late) == errno.ENOSPC
    errno_of(os.close, late)
    mounted.unmount()
    assert (mounting.mount(NEVER).path / "log").read_bytes() == b"good\n" * 1000


def test_until_it_is_repaired_a_reader_gets_an_error_and_no_zeros(mounting: Mounting) -> None:
    mounted = mounting.mount(NEVER, without=["repair"])
    path = mounted.path / "log"
    fd = append_while_full(mounted, path)
    libc.posix_fadvise(fd, ctypes.c_int64(0), ctypes.c_int64(0), 4)  # DONTNEED: the refused pages leave the cache
    reader = os.open(path, os.O_RDONLY)
    assert os.pread(reader, 4096, 0) == (b"good\n" * 1000)[:4096]
    assert errno_of(os.pread, reader, 4096, 8192) == errno.ENOSPC
    os.close(reader)
    os.close(fd)


def test_without_the_taint_there_would_be_zeros(mounting: Mounting) -> None:
    mounted = mounting.mount(NEVER, without=["taint"])
    path = mounted.path / "log"
    fd = append_while_full(mounted, path)
    os.write(fd, b"behind\n" * 1000)
    os.fsync(fd)
    os.close(fd)
    mounted.unmount()
    assert bytes(1000) in (mounting.mount(NEVER).path / "log").read_bytes()


def test_an_unlinked_file_is_repaired_too(mounting: Mounting) -> None:
    mounted = mounting.mount(NEVER)
    path = mounted.path / "log"
    fd = appender(path)
    reader = os.open(path, os.O_RDONLY)
    os.unlink(path)
    os.write(fd, b"good\n")
    os.fsync(fd)
    mounted.fault("no-space")
    os.write(fd, b"lost\n" * 1000)
    assert errno_of(os.fsync, fd) == errno.ENOSPC
    mounted.clear("no-space")
    wait_until(lambda: os.fstat(fd).st_size == 5, "the kernel's size is the stored one again")
    os.write(fd, b"goes on\n")
    os.fsync(fd)
    assert os.pread(reader, 10_000, 0) == b"good\ngoes on\n"
    os.close(fd)
    os.close(reader)


def test_a_refusal_seen_only_at_the_last_close_is_repaired(mounting: Mounting) -> None:
    mounted = mounting.mount(NEVER)
    path = mounted.path / "log"
    path.write_bytes(b"good\n")
    mounted.fault("no-space")
    fd = appender(path)
    os.write(fd, b"lost\n" * 3000)
    assert errno_of(os.close, fd) == errno.ENOSPC
    wait_until(lambda: path.stat().st_size == 5, "the kernel's size is the stored one again")
    mounted.clear("no-space")
    with open(path, "ab") as file:
        file.write(b"goes on\n")
    assert path.read_bytes() == b"good\ngoes on\n"


def test_an_innocent_appender_is_not_hurt_by_a_refused_overwrite_beside_it(mounting: Mounting) -> None:
    mounted = mounting.mount(NEVER)
    path = mounted.path / "f"
    fd = appender(path)
    os.write(fd, b"a" * 10_000)
    os.fsync(fd)
    os.write(fd, b"b" * 10_000)
    other = os.open(path, os.O_RDWR)
    assert errno_of(os.pwrite, other, b"X", 3) == errno.EPERM
    os.close(other)
    os.write(fd, b"c" * 10_000)
    os.fsync(fd)
    os.close(fd)
    assert path.read_bytes() == b"a" * 10_000 + b"b" * 10_000 + b"c" * 10_000


@pytest.mark.parametrize(("fault", "number"), [("io-failure", errno.EIO), ("write-bug", errno.EIO)])
def test_other_refusals_are_like_that(mounting: Mounting, fault: str, number: int) -> None:
    mounted = mounting.mount(NEVER)
    path = mounted.path / "log"
    fd = appender(path)
    os.write(fd, b"good\n")
    os.fsync(fd)
    mounted.fault(fault)
    os.write(fd, b"lost\n" * 1000)
    assert errno_of(os.fsync, fd) == number
    mounted.clear(fault)
    wait_until(lambda: path.stat().st_size == 5, "the kernel's size is the stored one again")
    os.write(fd, b"goes on\n")
    os.close(fd)
    assert path.read_bytes() == b"good\ngoes on\n"


# ------------------------------------------------------------------------------------------------------- rename, close


def rename_over(mounted: Mounted) -> list[str]:
    """The order in which things came when a file with dirty pages was renamed over another."""
    target, source = mounted.path / "target", mounted.path / "source"
    target.write_bytes(b"old")
    fd = appender(source)
    os.write(fd, b"new" * 10_000)
    inode = source.stat().st_ino
    os.rename(source, target)
    order = [line for line in mounted.trace() if line == "rename" or line.startswith(f"{inode} ")]
    assert target.read_bytes() == b"new" * 10_000
    os.close(fd)
    return order


def test_rename_over_a_file_takes_dirty_pages_along(mounting: Mounting) -> None:
    order = rename_over(mounting.mount(NEVER))
    assert order[-1] == "rename"
    assert len(order) > 1


def test_without_the_rule_rename_would_come_first(mounting: Mounting) -> None:
    assert rename_over(mounting.mount(NEVER, without=["write-back-before-rename"])) == ["rename"]


def test_after_rename_and_kill_the_content_is_old_or_new(mounting: Mounting) -> None:
    mounted = mounting.mount(NEVER)
    target, source = mounted.path / "target", mounted.path / "source"
    target.write_bytes(b"old")
    fd = appender(source)
    os.write(fd, b"new" * 10_000)
    os.rename(source, target)
    directory = os.open(mounted.path, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
    mounted.process.kill()
    mounted.process.wait()
    errno_of(os.close, fd)
    mounted.end()
    assert (mounting.mount(NEVER).path / "target").read_bytes() == b"new" * 10_000


def test_a_rename_whose_dirty_pages_are_refused_leaves_the_old_file(mounting: Mounting) -> None:
    mounted = mounting.mount(NEVER)
    target, source = mounted.path / "target", mounted.path / "source"
    target.write_bytes(b"old")
    fd = appender(source)
    os.write(fd, b"new" * 10_000)
    mounted.fault("no-space")
    assert errno_of(os.rename, source, target) == errno.ENOSPC
    mounted.clear("no-space")
    errno_of(os.close, fd)
    assert target.read_bytes() == b"old"


def test_a_file_written_anew_is_committed_at_its_first_close(mounting: Mounting) -> None:
    mounted = mounting.mount(NEVER)
    path = mounted.path / "f"
    path.write_bytes(b"old")
    subprocess.run(["sync", "-f", mounted.path], check=True)
    inode = path.stat().st_ino
    assert f"commit {inode}" not in mounted.trace()
    path.write_bytes(b"new content")
    wait_until(lambda: f"commit {inode}" in mounted.trace(), "the commit at close")
    mounted.kill()
    assert (mounting.mount(NEVER).path / "f").read_bytes() == b"new content"


def test_close_asks_nothing_after_the_first(mounting: Mounting) -> None:
    """FLUSH is answered once with ENOSYS; errors of dirty pages still come out of close(2)."""
    mounted = mounting.mount(NEVER)
    mounted.fault("no-space")
    for number in range(3):
        fd = appender(mounted.path / f"f{number}")
        os.write(fd, b"x" * 5000)
        assert errno_of(os.close, fd) == errno.ENOSPC


# ----------------------------------------------------------------------------------------------- time, signals, kernel


def test_dirty_pages_are_written_every_interval(mounting: Mounting) -> None:
    mounted = mounting.mount("commit_interval=0.3")
    fd = appender(mounted.path / "log")
    os.write(fd, b"a line\n")
    wait_until(lambda: bool(mounted.writes(mounted.path / "log")), "the dirty page comes", 5)
    time.sleep(0.8)
    mounted.process.kill()
    mounted.process.wait()
    errno_of(os.close, fd)
    mounted.end()
    assert (mounting.mount(NEVER).path / "log").read_bytes() == b"a line\n"


def test_what_is_dirty_is_waited_for_and_not_only_sent_on_its_way(mounting: Mounting) -> None:
    """syncfs(2) on FUSE returns before WRITEs are answered (since Linux 6.18.x): a flush, and a commit, must not."""
    mounted = mounting.mount(NEVER, volume=mounting.volume(hosts=host_dirs(mounting.base, 1)))
    files = [mounted.path / f"log{number}" for number in range(3)]
    fds = [appender(path) for path in files]
    mounted.fault("slow-write", "0.5")
    for fd in fds:
        os.write(fd, b"a line\n" * 10_000)
    with mounted.control() as control:
        control.flush()
        assert control.status().volume.pending_bytes == 0
    for path in files:
        assert sum(length for _, length, outcome in mounted.writes(path) if outcome == "ok") == 70_000
    mounted.process.kill()
    reap(mounted.process, mounted.path)
    for fd in fds:
        errno_of(os.close, fd)
    mounted.end()
    again = mounting.mount(NEVER)
    assert [(again.path / path.name).stat().st_size for path in files] == [70_000] * 3


def test_without_the_rule_they_would_stay_for_long(mounting: Mounting) -> None:
    mounted = mounting.mount("commit_interval=0.3", without=["periodic"])
    fd = appender(mounted.path / "log")
    os.write(fd, b"a line\n")
    time.sleep(1.5)
    assert mounted.writes(mounted.path / "log") == []
    os.close(fd)


@pytest.mark.parametrize("number", [15, 2])
def test_a_signal_unmounts_and_loses_nothing_that_was_closed(mounting: Mounting, number: int) -> None:
    mounted = mounting.mount(NEVER)
    script = f"exec 3>>{mounted.path}/log; i=0; while [ $i -lt 500 ]; do echo line $i >&3; i=$((i+1)); done"
    subprocess.run(["sh", "-c", script], check=True)
    mounted.process.send_signal(number)
    mounted.wait()
    again = mounting.mount(NEVER)
    assert (again.path / "log").read_text().splitlines() == [f"line {index}" for index in range(500)]


def test_a_second_signal_unmounts_while_a_file_is_open(mounting: Mounting) -> None:
    mounted = mounting.mount(NEVER)
    fd = appender(mounted.path / "log")
    os.write(fd, b"dirty\n")
    mounted.process.terminate()
    wait_until(lambda: "is busy" in mounted.logged(), "the first signal finds the mount busy")
    assert mounted.process.poll() is None
    mounted.process.terminate()
    wait_until(lambda: not os.path.ismount(mounted.path), "the second takes the mount away")
    os.write(fd, b"still\n")
    os.close(fd)
    mounted.wait()
    assert (mounting.mount(NEVER).path / "log").read_bytes() == b"dirty\nstill\n"


def stale_zeros(mounted: Mounted) -> int:
    """How often a reader with cached pages saw something else than was written directly."""
    path = mounted.path / "f"
    written, wrong = b"", 0
    with open(path, "wb", buffering=0) as writer, open(path, "rb", buffering=0) as reader:
        for number in range(30):
            written += b"%05d," % number
            writer.write(written[-6:])
            wrong += os.pread(reader.fileno(), 4096, 0) != written
    return wrong


def test_direct_writers_leave_no_stale_pages_on_kernels_before_6_6(mounting: Mounting) -> None:
    assert stale_zeros(mounting.mount(NEVER, without=["old-kernel"])) == 0


def test_each_kernel_is_known() -> None:
    from fusefs.contents import drops_pages_under_direct_writes

    known = {"6.1.0-18-amd64": False, "5.15.2": False, "6.6.0": True, "6.18.44-fc": True, "7.0-rc1": True, "strange": False, "6": False}
    assert {release: drops_pages_under_direct_writes(release) for release in known} == known
    assert re.match(r"\d+\.\d+", os.uname().release)


APPENDER = """
import os, sys, time
path, pause, seconds = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
end, number, pending, failed = time.monotonic() + seconds, 0, [], 0
while time.monotonic() < end:
    for _ in range(25):
        number += 1
        try:
            os.write(fd, b"line %08d\\n" % number)
        except OSError:
            failed += 1
        else:
            pending.append(number)
        if pause:
            time.sleep(pause)
    try:
        os.fsync(fd)
    except OSError:
        failed += 1
    else:
        print(*pending, sep="\\n")
    pending = []
print("failed", failed)
"""


@pytest.mark.parametrize("pause", [0.0, 0.0005])
def test_what_fsync_confirmed_is_there_however_often_space_runs_out(mounting: Mounting, pause: float) -> None:
    """A program goes on appending whatever fsync says; what was appended between two fsyncs of which the second succeeded must be there."""
    mounted = mounting.mount("commit_interval=0.5")
    path = mounted.path / "log"
    with subprocess.Popen([sys.executable, "-c", APPENDER, path, str(pause), "5"], stdout=subprocess.PIPE, text=True) as program:
        for number in range(60):
            time.sleep(0.02 + 0.01 * (number % 7))
            mounted.fault("no-space")
            time.sleep(0.005 + 0.004 * (number % 5))
            mounted.clear("no-space")
        said = program.communicate(timeout=60)[0].splitlines()
    assert int(said[-1].split()[1]) > 3, "space never ran out: nothing was tested"
    confirmed = [int(line) for line in said[:-1] if line]
    assert len(confirmed) > 100
    content = path.read_bytes()
    assert b"\0" not in content
    present = [int(line.split()[1]) for line in content.splitlines()]
    missing = set(confirmed) - set(present)
    assert not missing, f"{len(missing)} of {len(confirmed)} confirmed lines are not there, such as {sorted(missing)[:5]}"
    assert present == sorted(present)
    mounted.unmount()
    assert (mounting.mount(NEVER).path / "log").read_bytes() == content
