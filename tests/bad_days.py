"""A volume in use while hosts have bad days: a writer, a reader, removals, flushes, merges, in virtual time, with a model beside it.

world = World(base, ["mem:a", "mem:b", "mem:c"], "2", seed)
async with world.opened(): ...         everything the volume does by itself runs; clocks jump when nothing is to be done
await world.work(60)                   programs at work for a minute; every answer compared
world.faults("mem:b").lying = 1.0
await world.settled()                  until all is as it should be, without anyone doing anything; AssertionError after hours
"""

from __future__ import annotations

import random
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import trio

from storage.checking import check_volume
from storage.errors import FusefsError
from storage.hosts.faults import Faults
from storage.interfaces import FlushReport
from storage.seams import NoFailpoints, Seams
from storage.status import HostStatus, VolumeStatus
from storage.volume import Volume, VolumeOptions
from storage.wiring import open_volume
from tests.complete import incomplete
from tests.fakes import SeededRandom, VirtualClock, make_seams
from tests.host_rig import FaultyOpener
from tests.rig import PASSPHRASE, make

SECTOR = 64 * 1024
#: Everything happens by itself, and no read is answered from memory.
OPTIONS = VolumeOptions(
    flush_interval=5.0,
    commit_interval=2.0,
    away_grace=600.0,
    journal_segment=1024 * 1024,
    journal_limit=64 * 1024 * 1024,
    tail_budget=16 * 1024 * 1024,
    cache=0,
)
#: Virtual seconds in which everything must be good again.
PATIENCE = 4 * 3600.0


class World:
    """See the module."""

    def __init__(self, base: Path, urls: list[str], replication: str, seed: int = 0, **options: object) -> None:
        self.path = base / "volume"
        self.urls = urls
        self.replication = replication
        self.random = random.Random(seed)
        self.options = replace(OPTIONS, **options)  # type: ignore[arg-type]
        self.opener = FaultyOpener()
        self.content: dict[str, bytearray] = {}
        self.volume: Volume
        self.clock = VirtualClock()
        self._made = 0
        #: Errors of flushes while `flush_may_fail`: nothing else may fail.
        self.flush_may_fail = False
        self.refused: list[FusefsError] = []
        self.reports: list[FlushReport] = []

    # ---- the volume

    async def make(self) -> None:
        await make(self.path, self.urls, self.replication, sector_size=SECTOR, seams=self._seams())

    def _seams(self) -> Seams:
        # Of its own randomness: a seeded one would give every process the same salts.
        return make_seams(clock=self.clock, random=SeededRandom(secrets.randbits(64)), failpoints=NoFailpoints())

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Volume]:
        async with open_volume(
            self.path, passphrase=PASSPHRASE, seams=self._seams(), options=self.options, opener=self.opener
        ) as self.volume:
            yield self.volume

    def faults(self, url: str) -> Faults:
        """What is wrong with a host: to be changed in place."""
        return self.opener.faults[url]

    def set(self, url: str, faults: Faults) -> None:
        """That is what is wrong with the host from now on, also when it is opened anew."""
        self.opener.faults[url] = faults
        self.opener.hosts[url].faults = faults

    def heal(self) -> None:
        """No host has any fault any more."""
        for url in self.opener.faults:
            self.set(url, Faults())

    async def status(self) -> VolumeStatus:
        await self.volume.placement.poll_space()
        return await self.volume.status()

    async def host(self, url: str) -> HostStatus:
        """As `status` shows it."""
        return next(host for host in (await self.status()).hosts if host.url == url)

    # ---- programs

    async def write(self, name: str | None = None, size: int | None = None) -> str:
        """Append to a file, a new one perhaps; now and then with fsync."""
        if name is None:
            old = self.random.choice([*self.content, ""]) if len(self.content) < 12 else self.random.choice(list(self.content))
            name = old or f"file{self._made}"
            self._made += not old
        data = self.random.randbytes(size if size is not None else self.random.choice((10, 500, 4000, 30_000, 150_000)))
        files = self.volume.files
        fd = await files.open(name, write=True)
        await files.append(fd, data)
        self.content.setdefault(name, bytearray()).extend(data)
        if self.random.random() < 0.3:
            await files.commit(fd)
        await files.close(fd)
        return name

    async def read(self, name: str | None = None) -> None:
        """A range of a file, or all of it."""
        if not self.content:
            return
        name = name or self.random.choice(list(self.content))
        expected = bytes(self.content[name])
        offset, length = (0, len(expected)) if self.random.random() < 0.3 else (self.random.randrange(len(expected) + 1), 20_000)
        fd = await self.volume.files.open(name, existing=True)
        got = await self.volume.files.read_at(fd, offset, length)
        await self.volume.files.close(fd)
        # Compared with what was there before: only this task changes it.
        assert got == expected[offset : offset + length], f"{name}: {len(got)} bytes at {offset} are wrong"

    async def remove(self) -> None:
        if len(self.content) > 4:
            name = self.random.choice(list(self.content))
            del self.content[name]
            await self.volume.files.delete(name)

    async def clear(self) -> None:
        """No file is left."""
        for name in list(self.content):
            del self.content[name]
            await self.volume.files.delete(name)

    async def step(self) -> None:
        what = self.random.random()
        await (self.write() if what < 0.5 else self.read() if what < 0.85 else self.remove() if what < 0.95 else self.flush())

    async def flush(self) -> None:
        try:
            self.reports.append(await self.volume.flush())
        except FusefsError as error:
            if not self.flush_may_fail:
                raise
            self.refused.append(error)

    async def work(self, seconds: float) -> None:
        """Programs at work for so long, a step every other second or so: none sees an error, or a wrong byte."""
        end = trio.current_time() + seconds
        while trio.current_time() < end:
            await self.step()
            await trio.sleep(self.random.random() * 4)

    async def compare(self) -> None:
        """Every byte of every file, from the hosts."""
        assert await self.volume.files.list() == {name: len(data) for name, data in self.content.items()}
        for name in self.content:
            fd = await self.volume.files.open(name, existing=True)
            for offset in range(0, len(self.content[name]), 1 << 20):
                assert await self.volume.files.read_at(fd, offset, 1 << 20) == self.content[name][offset : offset + (1 << 20)], name
            await self.volume.files.close(fd)

    # ---- the end

    async def settled(self, patience: float = PATIENCE) -> None:
        """Every sector at its replication on hosts that keep it, as the hosts themselves tell, and nothing left to be done."""
        end = trio.current_time() + patience
        wrong: list[str] = ["nothing was looked at"]
        while wrong:
            if trio.current_time() > end:
                raise AssertionError(f"after {patience} s: {wrong[:10]}; status: {await self.status()}")
            await trio.sleep(30)
            now = await self.volume.status()
            wrong = [f"{now.degraded_sectors} sectors degraded"] if now.degraded_sectors else []
            wrong += [f"{now.sectors_to_delete} sectors to delete"] if now.sectors_to_delete else []
            wrong += [f"host {host.url} is {host.state}: {host.error}" for host in now.hosts if host.state not in ("ok", "left", "lost")]
            wrong += [f"{now.repair.pending} to be mended: {now.repair.trouble}"] if now.repair.pending or now.repair.trouble else []
            wrong = wrong or await incomplete(self.volume)

    async def checked(self) -> None:
        """Closed, it is as `fusefs check --data` wants it."""
        found: list[str] = []
        report = await check_volume(
            self.path,
            passphrase=PASSPHRASE,
            data=True,
            on_finding=lambda finding: found.append(str(finding)),
            seams=self._seams(),
            opener=self.opener,
        )
        assert report.exit_status == 0, found
