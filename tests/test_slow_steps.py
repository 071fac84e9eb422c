"""The event loop is kept by nobody for long: the mount option `debug` tells of steps that do, and a busy mount has next to none."""

from __future__ import annotations

import gc
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from time import thread_time

import pytest
import trio

from fusefs.mounts import mount_at
from fusefs.slow_steps import LIMIT, WAITED, SlowSteps
from tests.cli_runner import environment, fusefs, init
from tests.mounting import reap, wait_until

# What the steps of the busy mount below may take. Measured on two cores, 10 runs with nothing beside, and 20 beside three processes that
# copy and compute, most of them beside another such mount, too: of 3,300 to 10,000 steps 0.6 to 1.8 % took more than 1 ms.

#: Above LIMIT, of all steps: some of the requests of 1 MiB (1.0 to 1.8 ms); slices of what is reclaimed (1.1 ms); and whatever others on
#: the machine make longer, as CPU time, too, is more beside them.
SHARE = 0.04
#: Above twice LIMIT, of small requests, which is where 2 ms more in a rare handler or in a commit show. 1 to 3 were measured: the commit
#: of 1,500 files by an fsync (2.4 to 4.7 ms); the collector of cycles within a flush (1.7 to 2.6 ms); a listing of them (1.7 to 2.7 ms).
FEW = 6
#: Requests of 1 MiB, of which so many are written, and read. What takes long there is to copy, and beside others that copy it takes twice
#: as long; and shipments that end (3 ms).
LARGE = 200
#: Above twice LIMIT, of large requests. Mostly none was measured, 23 at most.
FEW_LARGE = LARGE // 2
#: Above five times LIMIT. None or one was measured: a full collection of cycles, should it fall into these seconds (31 ms:
#: docs/performance.md), or that commit on a bad day.
LONG = 2

#: `fusefs` with 2 ms more of computing in each call of a coroutine method: MODULE CLASS METHOD ARGUMENTS.
SLOWED = """
import sys
from importlib import import_module
from time import thread_time

from fusefs.cli import main

module, name, method, *arguments = sys.argv[1:]
of = getattr(import_module(module), name)
plain = getattr(of, method)

async def slowed(*args):
    end = thread_time() + 0.002
    while thread_time() < end:
        pass
    return await plain(*args)

setattr(of, method, slowed)
sys.exit(main(arguments))
"""


def burn(seconds: float) -> None:
    end = thread_time() + seconds
    while thread_time() < end:
        pass


def run(task: object, caplog: pytest.LogCaptureFixture) -> list[str]:
    with caplog.at_level(logging.INFO, "fusefs.slow_steps"):
        trio.run(task, instruments=[SlowSteps()])  # type: ignore[arg-type]
    return [record.getMessage() for record in caplog.records if "slow step" in record.getMessage()]


def test_a_step_that_computes_for_long_is_told_and_one_that_waits_is_not(caplog: pytest.LogCaptureFixture) -> None:
    async def computing() -> None:
        await trio.sleep(0.02)
        burn(3 * LIMIT)
        await trio.sleep(0.02)

    async def waiting() -> None:
        await trio.sleep(0.02)

    (line,) = run(computing, caplog)
    assert "computing" in line
    caplog.clear()
    assert run(waiting, caplog) == []


def test_the_collector_of_cycles_is_told_apart(caplog: pytest.LogCaptureFixture) -> None:
    async def collecting() -> None:
        await trio.lowlevel.checkpoint()
        kept = [[] for _ in range(200_000)]  # type: ignore[var-annotated]
        gc.collect()
        del kept
        await trio.lowlevel.checkpoint()

    before = len(gc.callbacks)
    assert any("the collector of cycles" in line for line in run(collecting, caplog))
    assert len(gc.callbacks) == before


def test_a_step_that_waits_without_computing_is_told_apart(caplog: pytest.LogCaptureFixture) -> None:
    async def blocking() -> None:
        await trio.sleep(0.02)
        time.sleep(3 * WAITED)
        await trio.sleep(0.02)

    assert run(blocking, caplog) == []
    # Others of trio's may have waited for a core.
    assert any("waiting step" in text and "blocking" in text for text in caplog.messages)
    assert re.search("[1-9][0-9]* waited", caplog.messages[-1])


def small_requests(mountpoint: Path) -> None:
    """Files come and go, are listed, and are committed, many at once and one by one."""
    small = os.urandom(4096)
    directory = mountpoint / "d"
    directory.mkdir()
    for number in range(1500):
        (directory / f"{number}").write_bytes(small)
    assert len(os.listdir(directory)) == 1500
    with open(mountpoint / "log", "ab", buffering=0) as appended:
        for _ in range(200):
            appended.write(small[:200])
            os.fsync(appended.fileno())
    for number in range(1500):
        (directory / f"{number}").unlink()
    fusefs("flush", mountpoint)


def large_requests(mountpoint: Path) -> None:
    """Some 50 sectors are written and read: what takes long for each of them would be seen."""
    large = os.urandom(1 << 20)
    with open(mountpoint / "big", "wb", buffering=0) as file:
        for _ in range(LARGE):
            file.write(large)
        os.fsync(file.fileno())
    assert (mountpoint / "big").read_bytes() == large * LARGE
    fusefs("flush", mountpoint)


class Said:
    """The log of a mount with `debug`."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self._begun = 0

    def steps(self) -> list[tuple[float, str]]:
        """Slow steps since the last call: seconds of CPU time, and their lines."""
        said = self.log.read_bytes()
        new, self._begun = said[self._begun :].decode(), len(said)
        return [(float(match[1]) / 1000, match[0]) for match in re.finditer(r"slow step: .*? for ([0-9.]+) ms of CPU time.*", new)]

    def all_steps(self) -> int:
        """How many steps there were, once the mount has ended."""
        whole = re.search(r"the event loop took ([0-9]+) steps", self.log.read_text())
        assert whole is not None, self.log.read_text()
        return int(whole[1])


def work(mountpoint: Path, said: Said) -> tuple[list[tuple[float, str]], list[tuple[float, str]]]:
    """Put load on a mount and unmount it; returns the slow steps of small requests and of large ones."""
    said.steps()
    small_requests(mountpoint)
    of_small = said.steps()
    large_requests(mountpoint)
    of_large = said.steps()
    fusefs("umount", mountpoint)
    return of_small, of_large


def check(of_small: list[tuple[float, str]], of_large: list[tuple[float, str]], steps: int) -> None:
    """AssertionError if steps took longer than they may."""

    def above(limit: float, slow: list[tuple[float, str]]) -> list[str]:
        return [line for seconds, line in slow if seconds > limit]

    long = above(5 * LIMIT, of_small + of_large)
    assert len(long) <= LONG, "\n".join(long)
    small, large = above(2 * LIMIT, of_small), above(2 * LIMIT, of_large)
    assert len(small) <= FEW, "\n".join(small)
    assert len(large) <= FEW_LARGE, "\n".join(large)
    whole = above(LIMIT, of_small + of_large)
    assert len(whole) <= SHARE * steps, f"{len(whole)} of {steps}:\n" + "\n".join(whole)


def test_a_busy_mount_gives_the_event_loop_back(tmp_path: Path) -> None:
    volume, mountpoint, said = tmp_path / "v", tmp_path / "m", Said(tmp_path / "log")
    mountpoint.mkdir()
    init(volume)
    fusefs("mount", volume, mountpoint, "-o", "debug", "--log", said.log)
    try:
        slow = work(mountpoint, said)
    finally:
        if mount_at(mountpoint) is not None:
            fusefs("umount", mountpoint)
    check(*slow, said.all_steps())


@pytest.mark.parametrize(
    ("slowed", "told"),
    [
        (("fusefs.operations", "Operations", "write"), "after the handler of write"),
        (("fusefs.operations", "Operations", "readdir"), "after the handler of readdir"),
        (("storage.metadata.committer", "Committer", "_write_next"), "after the handler of fsync"),
    ],
)
def test_two_milliseconds_more_in_a_handler_are_noticed(slowed: tuple[str, str, str], told: str, tmp_path: Path) -> None:
    """In the foreground, which `debug` is for as well. The test above would fail for it."""
    volume, mountpoint, said = tmp_path / "v", tmp_path / "m", Said(tmp_path / "log")
    mountpoint.mkdir()
    init(volume)
    command = [sys.executable, "-c", SLOWED, *slowed, "mount", "-f", volume, mountpoint, "-o", "debug", "--log", said.log]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment(), start_new_session=True) as child:
        try:
            wait_until(lambda: mount_at(mountpoint) is not None, "mounted", 30)
            slow = work(mountpoint, said)
            assert child.wait(30) == 0
        finally:
            if child.poll() is None:
                child.kill()
                reap(child, mountpoint)
                subprocess.run(["fusermount3", "-u", "-z", mountpoint], check=False, capture_output=True)
    assert any(told in line for part in slow for _, line in part)
    with pytest.raises(AssertionError, match="slow step"):
        check(*slow, said.all_steps())
