"""The event loop is kept by nobody for long: the mount option `debug` tells of steps that do, and a busy mount has next to none."""

from __future__ import annotations

import gc
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from time import thread_time

import pytest
import trio

from fusefs.slow_steps import LIMIT, SlowSteps
from tests.cli_runner import fusefs, init

#: Milliseconds of CPU time. Five times what a step may take, because CPU time, too, is more on a machine that others use.
LONG = LIMIT * 5000
#: Steps longer than that while the mount below is busy: commits of thousands of files at once, the collector of cycles.
FEW = 12


def burn(seconds: float) -> None:
    end = thread_time() + seconds
    while thread_time() < end:
        pass


def run(task: object, caplog: pytest.LogCaptureFixture) -> list[str]:
    with caplog.at_level(logging.WARNING, "fusefs.slow_steps"):
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


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A mount with the option `debug`, and its log."""
    volume, mountpoint, log = tmp_path / "v", tmp_path / "m", tmp_path / "log"
    mountpoint.mkdir()
    init(volume)
    fusefs("mount", volume, mountpoint, "-o", "debug", "--log", log)
    try:
        yield mountpoint, log
    finally:
        fusefs("umount", mountpoint)


def test_a_busy_mount_gives_the_event_loop_back(busy: tuple[Path, Path]) -> None:
    mountpoint, log = busy
    begun = log.stat().st_size
    small, large = os.urandom(4096), os.urandom(1 << 20)
    directory = mountpoint / "d"
    directory.mkdir()
    for number in range(1500):
        (directory / f"{number}").write_bytes(small)
    assert len(os.listdir(directory)) == 1500
    with open(mountpoint / "log", "ab", buffering=0) as appended:
        for _ in range(200):
            appended.write(small[:200])
            os.fsync(appended.fileno())
    # Some 50 sectors: what takes long for each of them would be seen.
    with open(mountpoint / "big", "wb", buffering=0) as file:
        for _ in range(200):
            file.write(large)
        os.fsync(file.fileno())
    assert (mountpoint / "big").read_bytes() == large * 200
    for number in range(1500):
        (directory / f"{number}").unlink()
    fusefs("flush", mountpoint)
    said = log.read_text()[begun:]
    steps = [(float(match[2]), match[0]) for match in re.finditer(r"slow step: (.*?) for ([0-9.]+) ms of CPU time.*", said)]
    long = [line for milliseconds, line in steps if milliseconds > LONG]
    assert len(long) <= FEW, "\n".join(long)
