"""Receiving requests (fusefs/receiver.py): nobody is kept waiting, and the loop ends when it should. On a real mount."""

from __future__ import annotations

import errno
import os
import select
import stat
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pyfuse3
import pytest
import trio
import trio.testing

from fusefs import awake
from fusefs.awake import Awake
from fusefs.guard import guarded
from fusefs.mountpoint import unmount_while_serving
from fusefs.receiver import REST, Receiver, Turn, deadlines_of_trio, events_of_trio

LIMIT = 20
#: Inodes from here on are slow.
SLOW = 1_000_000


class Names(pyfuse3.Operations):
    """Every name of digits is an empty file; of "slow" and digits one whose attributes come when `go` is set."""

    supports_dot_lookup = False

    def __init__(self) -> None:
        super().__init__()
        self.receiver = Receiver()
        self.asked = trio.Event()
        self.go = trio.Event()
        #: What looking for "after" leaves to be done.
        self.done = threading.Event()

    def _entry(self, ino: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino, entry.st_nlink = ino, 1
        entry.st_mode = stat.S_IFDIR | 0o755 if ino == pyfuse3.ROOT_INODE else stat.S_IFREG | 0o644
        entry.entry_timeout = entry.attr_timeout = 0
        return entry

    @guarded
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        if inode >= SLOW:
            self.asked.set()
            await self.go.wait()
        return self._entry(inode)

    @guarded
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        # Not here: the kernel asks for one name of a directory at a time.
        slow = name.startswith(b"slow")
        number = name.removeprefix(b"slow")
        if name == b"after":
            self.receiver.afterwards(self.done.set)
            raise pyfuse3.FUSEError(errno.ENOENT)
        if name == b"row":
            self.receiver.awake.asked()
        if not number.isdigit():
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._entry((SLOW if slow else 1000) + int(number))


@asynccontextmanager
async def served(mountpoint: Path, *, tasks: int = 99, kept: Awake | None = None) -> AsyncIterator[Names]:
    """Mounted while the block runs. Afterwards the loop has ended by itself, because it was unmounted."""
    operations = Names()
    operations.receiver = Receiver(kept)
    pyfuse3.init(operations, str(mountpoint), {"fsname=receiver", "subtype=fusefs-test"})
    try:
        with trio.fail_after(2 * LIMIT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_loop, operations, tasks)
                try:
                    yield operations
                finally:
                    operations.go.set()
                    with trio.CancelScope(shield=True):
                        await unmount_while_serving(mountpoint, lazy=True)
    finally:
        pyfuse3.close(unmount=True)
    assert pyfuse3.trio is trio


async def _loop(operations: Names, tasks: int) -> None:
    with operations.receiver.receiving():
        await pyfuse3.main(max_tasks=tasks)


async def exists(path: Path) -> bool:
    return await trio.to_thread.run_sync(os.path.exists, path, abandon_on_cancel=True)


async def test_others_are_answered_while_a_handler_waits(tmp_path: Path) -> None:
    async with served(tmp_path) as operations, trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(exists, tmp_path / f"slow{number}")
        await operations.asked.wait()
        with trio.fail_after(LIMIT):
            for number in range(50):
                assert await exists(tmp_path / str(number))
        operations.go.set()
        with trio.fail_after(LIMIT):
            assert await exists(tmp_path / "slow99")


async def test_as_many_handlers_as_there_may_be_wait_and_all_are_answered_in_the_end(tmp_path: Path) -> None:
    async with served(tmp_path, tasks=3) as operations:
        found: list[bool] = []

        async def one(number: int) -> None:
            found.append(await exists(tmp_path / f"slow{number}"))

        with trio.fail_after(LIMIT):
            async with trio.open_nursery() as nursery:
                for number in range(8):
                    nursery.start_soon(one, number)
                await operations.asked.wait()
                operations.go.set()
        assert found == [True] * 8
        with trio.fail_after(LIMIT):
            assert await exists(tmp_path / "1")


async def test_other_tasks_have_their_turn_while_requests_keep_coming(tmp_path: Path) -> None:
    async with served(tmp_path):
        turns = 0
        done = trio.Event()

        async def ticking() -> None:
            nonlocal turns
            while not done.is_set():
                await trio.lowlevel.checkpoint()
                turns += 1

        def ask() -> None:
            for number in range(3000):
                os.stat(tmp_path / str(number))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ticking)
            await trio.to_thread.run_sync(ask)
            done.set()
        assert turns > 50


async def test_what_trio_waits_for_is_seen(tmp_path: Path) -> None:
    """Else no pass of the scheduler could be left out: a new version of trio has to be looked at."""
    events = events_of_trio()
    assert events is not None
    assert not select.select([events], [], [], 0)[0]
    go = threading.Event()
    token = trio.lowlevel.current_trio_token()
    thread = threading.Thread(target=lambda: (go.wait(), token.run_sync_soon(lambda: None)))
    thread.start()
    go.set()
    assert select.select([events], [], [], LIMIT)[0] == [events]
    thread.join()


async def test_whoever_has_something_to_do_has_his_turn_while_the_loop_sleeps_for_the_next_request(tmp_path: Path) -> None:
    """Timers, threads' results, and what is cancelled: none of them waits for a request."""
    async with served(tmp_path):
        for number in range(20):
            # A request, so that the task sleeps in its own way.
            assert await exists(tmp_path / str(number))
            with trio.fail_after(LIMIT):
                await trio.to_thread.run_sync(time.sleep, 0.003)
            with trio.fail_after(LIMIT):
                await trio.sleep(0.004)
            with trio.move_on_after(0.002) as scope:
                await trio.sleep(LIMIT)
            assert scope.cancelled_caught


async def test_passes_are_left_out_only_where_nobody_else_has_anything_to_do(tmp_path: Path) -> None:
    rested: list[int] = []

    def seen(asleep: bool) -> None:
        if asleep:
            rested.append(trio.lowlevel.current_statistics().tasks_runnable)

    def ask() -> None:
        for number in range(300):
            time.sleep(0.0001)
            os.stat(tmp_path / str(number))

    Receiver.listeners.append(seen)
    try:
        async with served(tmp_path):
            await trio.to_thread.run_sync(ask)
    finally:
        Receiver.listeners.remove(seen)
    assert len(rested) > 20
    assert not any(rested)


async def test_the_loop_ends_when_tasks_wait_for_their_turn(tmp_path: Path) -> None:
    # After a burst of waiting handlers several tasks are left over.
    async with served(tmp_path) as operations, trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(exists, tmp_path / f"slow{number}")
        await operations.asked.wait()
        operations.go.set()


async def test_the_loop_can_be_cancelled(tmp_path: Path) -> None:
    operations = Names()
    pyfuse3.init(operations, str(tmp_path), {"fsname=receiver", "subtype=fusefs-test"})
    try:
        with trio.fail_after(LIMIT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_loop, operations, 99)
                assert await exists(tmp_path / "7")
                nursery.cancel_scope.cancel()
    finally:
        pyfuse3.close(unmount=True)


async def test_a_free_turn_is_taken_without_a_checkpoint_and_goes_to_one_who_waits_when_it_is_passed_on() -> None:
    turn = Turn()
    order: list[str] = []

    async def second() -> None:
        async with turn:
            order.append("second")

    async with trio.open_nursery() as nursery:
        async with turn:
            nursery.start_soon(second)
            await trio.testing.wait_all_tasks_blocked()
            order.append("first")
        # Nobody is woken until it is passed on: the first one may come back for it.
        await trio.testing.wait_all_tasks_blocked()
        assert order == ["first"]
        turn.pass_on()
    assert order == ["first", "second"]


async def test_one_who_was_cancelled_is_not_woken() -> None:
    turn = Turn()

    async def wait() -> None:
        async with turn:
            pass

    async with turn:
        with trio.move_on_after(0.01) as scope:
            await wait()
        assert scope.cancelled_caught
    turn.pass_on()
    with trio.fail_after(LIMIT):
        await wait()


async def test_the_next_deadline_is_what_trio_says_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for seconds in (5.0, 0.5, 50.0):
        with trio.move_on_after(seconds):
            await trio.lowlevel.checkpoint()
            for asked in (deadlines_of_trio(), _without_trios_own(monkeypatch)):
                assert abs(asked() - trio.lowlevel.current_statistics().seconds_to_next_deadline) < 0.1
                assert asked() <= seconds
    # Nobody waits for anything that ends by itself.
    assert deadlines_of_trio()() == trio.lowlevel.current_statistics().seconds_to_next_deadline == float("inf")


def _without_trios_own(monkeypatch: pytest.MonkeyPatch) -> Callable[[], float]:
    """Another version of trio, which keeps them elsewhere."""
    with monkeypatch.context() as context:
        context.setattr(trio._core._run, "GLOBAL_RUN_CONTEXT", object())
        return deadlines_of_trio()


async def test_what_is_left_for_afterwards_is_done_though_no_other_request_comes(tmp_path: Path) -> None:
    async with served(tmp_path) as operations:
        for _ in range(3):
            with pytest.raises(FileNotFoundError):
                await trio.to_thread.run_sync(os.stat, tmp_path / "after")
            assert await trio.to_thread.run_sync(operations.done.wait, LIMIT)
            operations.done.clear()
        # Once.
        await trio.to_thread.run_sync(os.stat, tmp_path / "1")
        assert not operations.done.is_set()


async def test_cores_that_are_kept_awake_halt_again_when_nothing_more_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(awake, "GAP", LIMIT)
    device, driver, mountpoint = tmp_path / "device", tmp_path / "driver", tmp_path / "mnt"
    device.touch()
    driver.write_text("haltpoll")
    mountpoint.mkdir()

    def row() -> None:
        for _ in range(2 * awake.ROW):
            (mountpoint / "row").exists()

    def halted() -> bool:
        end = time.monotonic() + LIMIT
        while not device.read_bytes().endswith(awake.ANY):
            if time.monotonic() > end:
                return False
            time.sleep(0.001)
        return True

    async with served(mountpoint, kept=Awake(True, device, driver)):
        await trio.to_thread.run_sync(row)
        assert await trio.to_thread.run_sync(halted)
        assert device.read_bytes().startswith(awake.AT_ONCE + awake.ANY)


async def test_where_nobody_else_has_anything_to_do_they_halt_right_after_the_last_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(awake, "GAP", LIMIT)
    device, driver = tmp_path / "device", tmp_path / "driver"
    device.touch()
    driver.write_text("haltpoll")
    receiver = Receiver(Awake(True, device, driver))
    waited: list[float] = []

    def either(milliseconds: float) -> list[tuple[int, int]]:
        waited.append(milliseconds)
        return []

    receiver._either, receiver._deadline = either, lambda: 1000.0
    with receiver.awake.opened():
        assert not receiver._rest(-1)
        for _ in range(awake.ROW):
            receiver.awake.asked()
        assert receiver.awake.held
        assert not receiver._rest(-1)
        assert not receiver.awake.held
        assert not receiver._rest(-1)
    assert waited == [1000 * REST, 1000 * awake.QUIET, 1000 * REST]
    assert device.read_bytes() == awake.AT_ONCE + awake.ANY


def test_afterwards_comes_before_the_next_request_is_looked_for() -> None:
    """The later of two replaces the earlier, and neither comes twice."""
    receiver = Receiver()
    order: list[str] = []

    def poll(_: float) -> list[tuple[int, int]]:
        order.append("looked for")
        return [(0, select.POLLIN)]

    # A burst is under way.
    receiver._poll, receiver._until = poll, float("inf")
    receiver.afterwards(lambda: order.append("earlier"))
    receiver.afterwards(lambda: order.append("later"))
    receiver.wait_readable(-1)
    receiver.wait_readable(-1)
    assert order == ["later", "looked for", "looked for"]
