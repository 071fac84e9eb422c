"""Errors of the disk inside LMDB's own calls, under a real mount: the mount lives as long as the journal has room, or is gone as after a
kill; what was acknowledged is there either way. The database's file stands on `powerfs`, which fails what it is told to."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fusefs.mounts import mount_at
from tests.mounting import Mounted, Mounting, mounting_in, wait_until
from tests.power_rig import Power, power_in
from tests.rig import host_dirs
from tests.torture_rig import temporary

DATABASE = "data.mdb"
#: Journal segments of 256 KiB: LMDB has to take over every few hundred kilobytes.
SMALL = ["small-journal"]
OPTIONS = "commit_interval=600,flush_interval=1"


@contextmanager
def on_power() -> Iterator[tuple[Mounting, Power, Path]]:
    """A mount's volume on a disk that can fail, its hosts on one that does not."""
    with temporary() as base, power_in(base) as power:
        (base / "m").mkdir()
        with mounting_in(base / "m") as mounting:
            mounting.volume(hosts=host_dirs(base, 1), replication="1")
            volume = power.mountpoint / "volume"
            subprocess.run(["cp", "-a", base / "m" / "volume", volume], check=True)
            subprocess.run(["sync", volume], check=True)
            yield mounting, power, volume


class Writer:
    """Appends with fsync, and knows what was acknowledged."""

    def __init__(self, mounted: Mounted) -> None:
        self.mounted = mounted
        self.acknowledged: dict[str, bytes] = {}
        self.count = 0

    def write(self, size: int = 20_000) -> None:
        """One more file; OSError if it is not acknowledged."""
        self.count += 1
        name, data = f"file{self.count}", os.urandom(size)
        fd = os.open(self.mounted.path / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            os.write(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        self.acknowledged[name] = data

    def write_until(self, done: object, seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not done():  # type: ignore[operator]
            assert time.monotonic() < end
            self.write()

    def check(self, mounted: Mounted) -> None:
        for name, data in self.acknowledged.items():
            assert (mounted.path / name).read_bytes() == data


def _said(mounted: Mounted, text: str) -> bool:
    return text in mounted.logged()


@pytest.mark.parametrize("what", ["fail sync", "fail write", "full"])
def test_a_database_that_cannot_be_written_holds_nobody_up_and_loses_nothing(what: str) -> None:
    with on_power() as (mounting, power, volume):
        mounted = mounting.mount(OPTIONS, volume=volume, without=SMALL)
        writer = Writer(mounted)
        writer.write()
        if what == "full":
            power.full(DATABASE)
        else:
            power.fail(what.split()[1], DATABASE)
        writer.write_until(lambda: _said(mounted, "metadata"))
        # The journal has room: programs notice nothing.
        for _ in range(5):
            writer.write()
        power.fail("nothing")
        for _ in range(20):
            writer.write()
        writer.check(mounted)
        mounted.unmount()
        again = mounting.mount(OPTIONS, volume=volume)
        writer.check(again)
        assert len(os.listdir(again.path)) == len(writer.acknowledged)


def test_where_the_journal_is_full_too_writers_wait_or_are_refused_and_nothing_acknowledged_is_lost() -> None:
    with on_power() as (mounting, power, volume):
        mounted = mounting.mount(OPTIONS, volume=volume, without=SMALL)
        writer = Writer(mounted)
        writer.write()
        power.fail("write", DATABASE)
        with mounted.control() as control:
            while control.status().volume.journal_fill < 0.9:
                writer.write()
            # What fits no more in the journal goes to the hosts before it is acknowledged, at their pace; then nothing is taken any more.
            end = time.monotonic() + 6
            while time.monotonic() < end:
                try:
                    writer.write(200_000)
                except OSError as error:
                    assert error.errno in {errno.ENOSPC, errno.EIO}
                    break
            # Still there, and readable.
            writer.check(mounted)
            status = control.status().volume
        assert any("database failed" in warning for warning in status.warnings)
        power.fail("nothing")
        mounted.process.kill()
        mounted.process.wait()
        mounted.end()
        again = mounting.mount(OPTIONS, volume=volume)
        writer.check(again)


def test_a_disk_error_under_the_memory_map_is_survived_like_a_kill() -> None:
    """SIGBUS."""
    with on_power() as (mounting, power, volume):
        mounted = mounting.mount(OPTIONS, volume=volume, without=SMALL)
        writer = Writer(mounted)
        for _ in range(40):
            writer.write()
        mounted.unmount()
        mounted = writer.mounted = mounting.mount(OPTIONS, volume=volume, without=SMALL)
        writer.write()
        power.fail("read", DATABASE)
        with pytest.raises(OSError, match=r"."):
            # Names nobody has looked up yet: the database is asked.
            for number in range(1000):
                writer.write()
                os.stat(mounted.path / f"missing{number}")
        assert mounted.process.wait(20) == -signal.SIGBUS
        power.fail("nothing")
        wait_until(lambda: mounted.process.poll() is not None, "the end")
        mounted.end()
        assert mount_at(mounted.path) is None
        again = mounting.mount(OPTIONS, volume=volume)
        writer.check(again)
