"""What would happen without the rules of "Cached and direct handles" (docs/design.md): each is taken out of the serving process
(`tests.mount_child --without RULE`), and the same steps that are right with the rule go wrong in the way it is there for.

Counter-tests that need little more than a line stand in test_mount_caching.py.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounting import Mounted, Mounting, mounting_in, wait_until
from tests.test_mount_caching import NEVER, appender, errno_of, sync_range

HALF = 1 << 18
YEAR_NS = 365 * 86_400 * 10**9


@pytest.fixture
def mounting(tmp_path: Path) -> Iterator[Mounting]:
    base = tmp_path / "m"
    base.mkdir()
    with mounting_in(base) as made:
        yield made


def stored(mounting: Mounting, name: str) -> bytes:
    """What is in the file, for a kernel that has nothing cached of it."""
    return (mounting.mount(NEVER).path / name).read_bytes()


def answered(mounted: Mounted, name: str) -> None:
    """Requests that were sent before this call have been begun, RELEASE above all: close(2) does not wait for it."""
    assert errno_of(os.stat, mounted.path / name) == errno.ENOENT


# ------------------------------------------------------------------------------------------------- what WRITE may bring


def out_of_order(mounting: Mounting, without: list[str]) -> tuple[int, bytes]:
    """(errno of fsync, what is stored) after the kernel wrote the second half of a file first."""
    mounted = mounting.mount(NEVER, without=without)
    fd = appender(mounted.path / "f")
    os.write(fd, b"1" * HALF)
    os.write(fd, b"2" * HALF)
    sync_range(fd, HALF, HALF)
    came = mounted.writes(mounted.path / "f")
    assert sum(length for _, length, _ in came) == HALF and min(came)[0] == HALF, "not the second half: nothing was tested"
    number = errno_of(os.fsync, fd)
    errno_of(os.close, fd)
    mounted.unmount()
    return number, stored(mounting, "f")


def test_out_of_order_writes_are_mapped(mounting: Mounting) -> None:
    assert out_of_order(mounting, []) == (0, b"1" * HALF + b"2" * HALF)


def test_without_a_map_the_second_half_would_come_first(mounting: Mounting) -> None:
    assert out_of_order(mounting, ["mapping"]) == (errno.EPERM, b"2" * HALF)


def page_sent_again(mounting: Mounting, without: list[str]) -> tuple[int, bytes]:
    """(errno of the second fsync, what is stored) after the kernel wrote a page twice, with a second line the second time."""
    mounted = mounting.mount(NEVER, without=without)
    fd = appender(mounted.path / "f")
    os.write(fd, b"line 1\n")
    os.fsync(fd)
    os.write(fd, b"line 2\n")
    number = errno_of(os.fsync, fd)
    assert [write[:2] for write in mounted.writes(mounted.path / "f")][:2] == [(0, 7), (0, 14)], "no page was sent again"
    errno_of(os.close, fd)
    mounted.unmount()
    return number, stored(mounting, "f")


def test_the_first_bytes_of_a_page_sent_again_are_compared(mounting: Mounting) -> None:
    assert page_sent_again(mounting, []) == (0, b"line 1\nline 2\n")


def test_without_the_comparison_the_page_would_be_refused(mounting: Mounting) -> None:
    assert page_sent_again(mounting, ["overlap", "repair"]) == (errno.EPERM, b"line 1\n")


def test_without_looking_for_gaps_its_first_bytes_would_be_there_twice(mounting: Mounting) -> None:
    assert page_sent_again(mounting, ["gaps"]) == (0, b"line 1\nline 1\nline 2\n")


def test_without_the_comparison_an_overwrite_would_seem_to_succeed(mounting: Mounting) -> None:
    mounted = mounting.mount(NEVER, without=["compare"])
    (mounted.path / "f").write_bytes(b"0123456789")
    with open(mounted.path / "f", "r+b", buffering=0) as file:
        assert file.write(b"X") == 1  # EPERM with the rule: test_a_direct_write_is_answered_itself
    assert (mounted.path / "f").read_bytes() == b"0123456789"


def size_set_first(mounting: Mounting, without: list[str]) -> tuple[int, bytes]:
    """(errno of fsync, what is stored) after a file with dirty pages was made longer."""
    mounted = mounting.mount(NEVER, without=without)
    fd = appender(mounted.path / "f")
    os.write(fd, b"dirty" * 100)
    os.ftruncate(fd, 10_000)
    number = errno_of(os.fsync, fd)
    errno_of(os.close, fd)
    ino = (mounted.path / "f").stat().st_ino
    came = [line for line in mounted.trace() if str(ino) in line.split()[:2]]
    assert came[0] == f"truncate {ino} 10000" and len(came) > 1, "the dirty page came before the size: nothing was tested"
    mounted.unmount()
    return number, stored(mounting, "f")


def test_late_writes_fill_what_a_new_size_left_open(mounting: Mounting) -> None:
    assert size_set_first(mounting, []) == (0, b"dirty" * 100 + bytes(9_500))


def test_if_a_new_size_wrote_zeros_dirty_pages_would_be_refused(mounting: Mounting) -> None:
    assert size_set_first(mounting, ["late-writes-fill"]) == (errno.EPERM, bytes(10_000))


# ----------------------------------------------------------------------------------------------- signals, times, commits


def signal_while_open(mounting: Mounting, without: list[str]) -> bytes:
    """What is stored after SIGTERM came while a file with a dirty page was open, and the file was closed then."""
    mounted = mounting.mount(NEVER, without=without)
    fd = appender(mounted.path / "log")
    os.write(fd, b"dirty\n")
    assert mounted.writes(mounted.path / "log") == [], "the page is not dirty any more: nothing was tested"
    mounted.process.terminate()
    wait_until(lambda: "is busy" in mounted.logged() or mounted.process.poll() is not None, "the signal is obeyed")
    errno_of(os.close, fd)
    if mounted.process.poll() is None:
        mounted.unmount()
    mounted.end()
    return stored(mounting, "log")


def test_a_signal_leaves_the_mount_served_while_pages_are_dirty(mounting: Mounting) -> None:
    assert signal_while_open(mounting, []) == b"dirty\n"


def test_if_it_ended_the_loop_dirty_pages_would_be_lost(mounting: Mounting) -> None:
    assert signal_while_open(mounting, ["unmount-while-serving"]) == b""


def times_after_a_direct_write(mounting: Mounting, without: list[str], age_ns: int) -> tuple[int, int, int]:
    """(modification time before, as shown after, as shown by the next mount) of a file that is `age_ns` old when it is written to."""
    mounted = mounting.mount(NEVER, without=without)
    path = mounted.path / "f"
    path.write_bytes(b"x")
    before = time.time_ns() - age_ns
    with open(path, "r+b", buffering=0) as file:
        os.utime(file.fileno(), ns=(before, before))
        file.seek(1)
        file.write(b"y")
    answered(mounted, "nothing")
    if age_ns and not without:
        wait_until(lambda: path.stat().st_mtime_ns != before, "the kernel is told")
    shown = path.stat().st_mtime_ns
    mounted.process.terminate()  # not `unmount`: it tries again while a thread of the mount's own makes it busy
    mounted.wait()
    return before, shown, (mounting.mount(NEVER).path / "f").stat().st_mtime_ns


@pytest.mark.parametrize("age_ns", [0, YEAR_NS])
def test_the_time_of_a_direct_write_is_shown_and_stays(mounting: Mounting, age_ns: int) -> None:
    before, shown, later = times_after_a_direct_write(mounting, [], age_ns)
    assert shown == later
    assert abs(shown - before - age_ns) < 60 * 10**9


@pytest.mark.parametrize("age_ns", [0, YEAR_NS])
def test_if_the_kernel_were_not_told_the_time_would_change_with_the_next_mount(mounting: Mounting, age_ns: int) -> None:
    before, shown, later = times_after_a_direct_write(mounting, ["mtime"], age_ns)
    assert shown == before
    assert later > before + age_ns


def killed_after_writing_anew(mounting: Mounting, without: list[str]) -> bytes:
    """What is stored after a kill behind the close of a file that was emptied (durably so, by somebody's fsync) and written anew."""
    mounted = mounting.mount(NEVER, without=without)
    path = mounted.path / "f"
    with open(path, "wb", buffering=0) as file:
        file.write(b"old")
        os.fsync(file.fileno())
    line = f"commit {path.stat().st_ino}"
    with open(path, "wb", buffering=0) as file, open(mounted.path / "other", "wb", buffering=0) as other:
        other.write(b"x")
        os.fsync(other.fileno())
        file.write(b"new content")
        assert mounted.trace().count(line) == 1
    answered(mounted, "nothing")
    if not without:
        wait_until(lambda: mounted.trace().count(line) == 2, "the commit at close")
    assert mounted.trace().count(line) == (1 if without else 2)
    mounted.kill()
    return stored(mounting, "f")


def test_a_file_written_anew_outlives_a_kill(mounting: Mounting) -> None:
    assert killed_after_writing_anew(mounting, []) == b"new content"


def test_without_the_commit_at_close_it_would_be_empty(mounting: Mounting) -> None:
    assert killed_after_writing_anew(mounting, ["commit-after-truncation"]) == b""


# -------------------------------------------------------------------------------------------------------- which is which


def appends_that_came(mounting: Mounting, without: list[str]) -> list[tuple[int, int, str]]:
    """The WRITEs of three appends, with -o nowriteback, before anything asked for them."""
    mounted = mounting.mount(NEVER + ",nowriteback", without=without)
    fd = appender(mounted.path / "log")
    for _ in range(3):
        os.write(fd, b"12345")
    came = mounted.writes(mounted.path / "log")
    os.close(fd)
    return came


def test_nowriteback_turns_the_cache_off(mounting: Mounting) -> None:
    assert appends_that_came(mounting, []) == [(0, 5, "ok"), (5, 5, "ok"), (10, 5, "ok")]


def test_if_it_did_not_nothing_would_have_come(mounting: Mounting) -> None:
    assert appends_that_came(mounting, ["nowriteback"]) == []


def append_while_no_host_answers(mounting: Mounting, without: list[str]) -> tuple[int, bytes]:
    """(errno of write, content) of an append to a file whose last page is only on hosts, and they do not answer."""
    mounted = mounting.mount(NEVER, without=without)
    path = mounted.path / "f"
    path.write_bytes(b"12345")
    mounted.fault("not-local")
    mounted.fault("read-unavailable")
    fd = appender(path)
    number = errno_of(os.write, fd, b"678")
    os.close(fd)
    mounted.clear("read-unavailable")
    return number, path.read_bytes()


def test_appending_asks_no_host(mounting: Mounting) -> None:
    assert append_while_no_host_answers(mounting, []) == (0, b"12345678")


def test_if_such_a_handle_were_cached_the_kernel_would_ask_for_the_last_page(mounting: Mounting) -> None:
    assert append_while_no_host_answers(mounting, ["last-page-local"]) == (errno.EIO, b"12345")
