"""A slow line to remote hosts: what takes its time is waited for; what is sent gets there, however much waits behind it.
A local disk as slow is one that does not answer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from storage.errors import Unavailable
from storage.hosts.faults import FaultyHost
from storage.hosts.urls import HostURL
from storage.sectors.drain import Throughput
from storage.volume import Volume
from tests.fakes import make_seams
from tests.host_rig import FaultyOpener, Rig
from tests.rig import host_dirs, make, noise
from tests.test_staging import Remote


class Far(FaultyOpener):
    def remote(self, url: HostURL) -> bool:
        return True


@pytest.mark.parametrize("far", [True, False])
async def test_what_a_slow_line_takes_is_waited_for_on_remote_hosts_alone(far: bool, autojump_clock: trio.testing.MockClock) -> None:
    rig = Rig(opener=Far() if far else FaultyOpener())
    contract = await rig.add("mem:slow-line")
    # A shard of 4 MiB takes more than a minute.
    rig.faults(contract).throughput = 60_000.0
    data, sector = bytes(4 * 2**20), rig.sector_id()
    if not far:
        with pytest.raises(Unavailable, match="did not answer"):
            await rig.io.write(contract, data, sector)
        return
    root = await rig.io.write(contract, data, sector)
    assert await rig.io.read(contract, root, sector) == data


class Line:
    """All that is sent to any host shares it, fairly. The first `bucket` bytes go at 20 MB/s, as where a router stores some."""

    def __init__(self, rate: float, latency: float, bucket: float = 0.0) -> None:
        self.rate, self.latency, self.bucket = rate, latency, bucket
        #: Bytes that were sent.
        self.carried = 0
        self._turn = trio.Lock()

    async def take(self, _host: FaultyHost, size: int) -> None:
        await trio.sleep(self.latency)
        while size > 0:
            # In pieces: the lock is fair, so everything on its way gets as much.
            piece = min(size, 16_384)
            async with self._turn:
                await trio.sleep(piece / (20e6 if self.carried < self.bucket else self.rate))
            self.carried += piece
            size -= piece


async def drained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: Line, *, sector: int, written: int, seconds: int) -> float:
    """Bytes a second that got to hosts while `written` a second were appended."""

    async def transfer(host: FaultyHost, size: int) -> None:
        await line.take(host, size)

    made = Remote(tmp_path, 2)
    made.urls = host_dirs(tmp_path, 2)
    await make(made.path, made.urls, "2", sector_size=sector, seams=make_seams(seed=1))
    monkeypatch.setattr(FaultyHost, "_transfer", transfer)
    async with made.opened(flush_interval=5.0, commit_interval=1.0) as volume:
        began = trio.current_time()
        while trio.current_time() - began < seconds:
            ino = volume.namespace.create(1, b"%f" % trio.current_time(), 0o100644, 0, 0)
            await volume.namespace.append(ino, noise(written))
            await trio.sleep(1.0)
        rate = volume.sectors.drain.sent / seconds
        # What waits still need not be waited for.
        made.each(gone="the test is over")
    return rate


async def test_a_line_that_writers_outrun_sends_nothing_in_vain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """Breaks where so many sectors are on their way that none gets there in the time it has: all that was sent is sent again, and a cut of
    the history, what is to be deleted after it, and a flush wait for ever."""
    line = Line(200_000.0, 0.1)
    rate = await drained(tmp_path, monkeypatch, line, sector=4 * 2**20, written=600_000, seconds=400)
    assert rate > 0.75 * line.rate


@pytest.mark.parametrize(("copies", "rate", "bucket"), [("1", 200e3, 8.0), ("1", 100e3, 4.5), ("2", 400e3, 9.0), ("2", 250e3, 9.0)])
async def test_a_line_that_is_quick_at_first_and_slow_then_sends_nothing_in_vain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock, copies: str, rate: float, bucket: float
) -> None:
    """Breaks where the first sector, which a buffer on the way took, opens the way for as many as would each take longer than they may."""
    line = Line(rate, 0.1, bucket * 2**20)

    async def transfer(host: FaultyHost, size: int) -> None:
        await line.take(host, size)

    made = Remote(tmp_path, 2)
    made.urls = host_dirs(tmp_path, 2)
    await make(made.path, made.urls, copies, sector_size=4 * 2**20, seams=make_seams(seed=1))
    async with made.opened(flush_interval=3600.0, commit_interval=1.0) as volume:
        monkeypatch.setattr(FaultyHost, "_transfer", transfer)
        ino = volume.namespace.create(1, b"file", 0o100644, 0, 0)
        for _ in range(16):
            await volume.namespace.append(ino, noise(4 * 2**20))
        began = trio.current_time()
        await volume.flush()
        # The sectors, and some of the log and the metadata; all of it once.
        sent = 16 * int(copies) * 4 * 2**20
        assert sent < line.carried < 1.1 * sent
        assert trio.current_time() - began < 1.1 * (sent - line.bucket) / rate + 20


@pytest.mark.parametrize("replication", ["2", "4+2"])
async def test_what_goes_to_several_hosts_has_the_time_for_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock, replication: str
) -> None:
    """Breaks where each shard has only the time that it would take by itself: on a line of 400 kbit/s, which all share, none gets there."""
    line = Line(50e3, 0.1)

    async def transfer(host: FaultyHost, size: int) -> None:
        await line.take(host, size)

    made = Remote(tmp_path, 6)
    made.urls = host_dirs(tmp_path, 6)
    await make(made.path, made.urls, replication, sector_size=4 * 2**20, seams=make_seams(seed=1))
    async with made.opened(flush_interval=3600.0, commit_interval=1.0) as volume:
        monkeypatch.setattr(FaultyHost, "_transfer", transfer)
        ino = volume.namespace.create(1, b"file", 0o100644, 0, 0)
        await volume.namespace.append(ino, noise(3 * 4 * 2**20))
        with trio.fail_after(1000):
            while volume.sectors.drain.status().sectors or not volume.sectors.drain.sent:
                await trio.sleep(1.0)
        # Once.
        assert line.carried < 1.1 * volume.sectors.drain.sent
        made.each(gone="the test is over")


@asynccontextmanager
async def thirty_two_staged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transfer: Callable[[FaultyHost, int], Awaitable[None]]
) -> AsyncIterator[Volume]:
    """Sectors of 1 MiB to be sent, to a host that takes each with `transfer`."""
    made = Remote(tmp_path, 1)
    made.urls = host_dirs(tmp_path, 1)
    await make(made.path, made.urls, "1", sector_size=2**20, seams=make_seams(seed=1))
    async with made.opened(flush_interval=3600.0, commit_interval=1.0) as volume:
        monkeypatch.setattr(FaultyHost, "_transfer", transfer)
        ino = volume.namespace.create(1, b"file", 0o100644, 0, 0)
        for _ in range(32):
            await volume.namespace.append(ino, noise(2**20))
        yield volume


async def test_what_fails_together_is_one_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """Breaks where each of many sectors that a line took with it when it went counts: the next attempt then comes after minutes."""
    on_their_way, broken, failed = 0, False, 0

    async def transfer(_host: FaultyHost, _size: int) -> None:
        nonlocal on_their_way, broken, failed
        on_their_way += 1
        broken |= on_their_way == 8
        try:
            await trio.sleep(1.0)
            if broken:
                failed += 1
                raise Unavailable("the line is gone")
        finally:
            on_their_way -= 1
            broken &= on_their_way > 0

    async with thirty_two_staged(tmp_path, monkeypatch, transfer) as volume:
        with trio.fail_after(60):
            while volume.sectors.drain.status().sectors:
                await trio.sleep(1.0)
        assert failed >= 8


async def test_one_that_fails_by_itself_does_not_make_those_after_it_go_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    calls = 0

    async def transfer(_host: FaultyHost, _size: int) -> None:
        nonlocal calls
        calls += 1
        failing = calls == 1
        await trio.sleep(1.0)
        if failing:
            raise Unavailable("the line is gone")

    async with thirty_two_staged(tmp_path, monkeypatch, transfer) as volume:
        # Alone, after a second alone again, then more with each that got there.
        with trio.fail_after(12):
            while volume.sectors.drain.status().sectors:
                await trio.sleep(0.1)


async def test_a_line_that_is_quick_and_far_is_used_although_each_answer_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """Breaks if too little is on its way: one sector after the other would be 2 * 256 KiB a second, at best."""
    line = Line(20e6, 1.0)
    rate = await drained(tmp_path, monkeypatch, line, sector=256 * 1024, written=3_000_000, seconds=30)
    assert rate > 4 * 2 * 256 * 1024


def test_throughput_counts_the_time_in_which_something_was_on_its_way_and_follows_the_line() -> None:
    line, now = Throughput(), 100.0
    assert line.rate == 0.0
    # Four at a time, of 4 MB each, at 400 kB/s.
    line.started(now, first=True)
    for at in range(4):
        line.started(now, first=False)
        line.ended(now + 40.0, 4_000_000, 40.0)
        assert line.rate <= 400_000.0, at
    assert line.rate == pytest.approx(400_000.0)
    # An hour without anything to send says nothing of it.
    now += 3600.0
    line.started(now, first=True)
    line.ended(now + 10.0, 4_000_000, 10.0)
    assert line.rate == pytest.approx(400_000.0)
    # It became ten times as quick: known with the next one. And as slow as before, within a minute or two.
    line.started(now + 10.0, first=True)
    line.ended(now + 11.0, 4_000_000, 1.0)
    assert line.rate == pytest.approx(4_000_000.0)
    for at in range(12):
        line.started(now + 11.0 + 10.0 * at, first=True)
        line.ended(now + 21.0 + 10.0 * at, 4_000_000, 10.0)
    assert line.rate == pytest.approx(400_000.0, rel=0.1)
    # Nothing gets there any more.
    line.started(now + 1000.0, first=True)
    line.ended(now + 1090.0, 0, 90.0)
    assert line.rate < 100_000.0
