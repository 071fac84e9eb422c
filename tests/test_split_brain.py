"""Two writers at the same moment, answers late or lost: at most one history has a majority, and what it acknowledged stays (I5).

More of it: python -m tests.test_split_brain NUMBER [SEED]
"""

from __future__ import annotations

import logging
import random
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from storage.errors import BadArgument, Fenced, FusefsError, Unavailable
from storage.hosts.faults import Faults, FaultyHost
from storage.hosts.opening import open_host
from storage.hosts.urls import HostURL
from storage.interfaces import Host
from storage.read_only import ReadOnlySource, open_read_only
from storage.recovery import recover_volume
from storage.seams import Seams
from storage.volume import Volume
from storage.wiring import open_volume
from tests.host_rig import FaultyOpener
from tests.rig import PASSPHRASE, QUIET, host_dirs, make

SEQUENCES = 6
#: What each machine does before it ends.
STEPS = 14


def reaching(every: list[str], reached: list[str]) -> FaultyOpener:
    """A machine that does not reach the others."""
    opener = FaultyOpener()
    for url in every:
        opener.faults[url] = Faults(gone=None if url in reached else "cut off")
    return opener


def superblocks_alone(operation: str, name: str) -> bool:
    return operation == "put_if" and "/superblock." in name


async def write(volume: Volume, name: str, data: bytes) -> None:
    fd = await volume.files.open(name, existing=False, write=True)
    await volume.files.append(fd, data)
    await volume.files.commit(fd)
    await volume.files.close(fd)


async def acknowledged(volume: Volume) -> bool:
    """Flush; is everything on a majority?"""
    report = await volume.flush()
    return not any(reason.startswith("metadata") for reason in report.reasons)


# --------------------------------------------------------------------------------------------------------------------
# One after the other, as unluckily as can be


async def test_generations_made_elsewhere_are_no_licence_to_write_above_another_writer(tmp_path: Path) -> None:
    """The first reaches two hosts, and one of them takes none of its superblocks for a while, in which the second takes over there."""
    urls = host_dirs(tmp_path, 3)
    await make(tmp_path / "v", urls, "2")
    first, second = reaching(urls, urls[:2]), reaching(urls, urls[1:])
    async with open_volume(tmp_path / "v", passphrase=PASSPHRASE, options=QUIET, opener=first) as a:
        await write(a, "both", b"know")
        assert await acknowledged(a)
        first.faults[urls[1]].only = superblocks_alone
        first.faults[urls[1]].fail_next = 8
        for i in range(8):
            await write(a, f"first{i}", b"1")
            with pytest.raises(Unavailable):
                await a.publish()
        assert (await recover_volume(tmp_path / "w", urls[1:], passphrase=PASSPHRASE, opener=second)).majority
        async with open_volume(tmp_path / "w", passphrase=PASSPHRASE, options=QUIET, opener=second) as b:
            await write(b, "second", b"2")
            assert await acknowledged(b)
            await write(a, "first", b"1")
            with pytest.raises(Unavailable, match="1 of 3"):
                await a.publish()
            await write(b, "more", b"2")
            assert await acknowledged(b)
    await recover_volume(tmp_path / "x", urls, passphrase=PASSPHRASE)
    async with open_volume(tmp_path / "x", passphrase=PASSPHRASE, options=QUIET) as volume:
        assert sorted(await volume.files.list()) == ["both", "more", "second"]


# --------------------------------------------------------------------------------------------------------------------
# At the same moment


class Slow(FaultyHost):
    """Everything takes a random moment, so that whatever can come in between does; some calls fail, of some puts the answer is lost."""

    def __init__(self, inner: Host, seams: Seams, dice: random.Random, trouble: float) -> None:
        super().__init__(inner, seams)
        self._dice, self._trouble = dice, trouble

    async def _before(self, operation: str, name: str) -> None:
        await trio.sleep(self._dice.random() ** 3 * 0.02)
        await super()._before(operation, name)
        if self._dice.random() < self._trouble:
            raise Unavailable(f"host {self.url}: {operation} failed, by chance")

    def _answer(self, operation: str, name: str) -> None:
        super()._answer(operation, name)
        if self._dice.random() < self._trouble:
            raise Unavailable(f"host {self.url}: the answer to {operation} was lost, by chance")


class SlowOpener(FaultyOpener):
    """`trouble`: share of calls that fail; set to 0 at the end."""

    def __init__(self, seed: str) -> None:
        super().__init__()
        self.dice = random.Random(seed)
        self.trouble = self.dice.choice((0.0, 0.0, 0.03, 0.1))
        self._slow: list[Slow] = []

    async def __call__(self, url: HostURL, seams: Seams, *, create: bool = False) -> Host:
        host = Slow(await open_host(url, seams, create=create), seams, self.dice, self.trouble)
        host.faults = self.faults.setdefault(url.base, host.faults)
        self.hosts[url.base] = host
        self._slow.append(host)
        return host

    def well(self) -> None:
        self.trouble = 0.0
        for host in self._slow:
            host._trouble = 0.0


@dataclass
class World:
    """Hosts, and what is known of all that was ever written."""

    base: Path
    seed: int
    urls: list[str] = field(default_factory=list)
    content: dict[str, bytes] = field(default_factory=dict)
    #: Every set of files any machine ever had, also in the middle of a write.
    states: set[frozenset[str]] = field(default_factory=lambda: {frozenset()})
    #: Files a flush has acknowledged as being on a majority; machines that got something acknowledged.
    safe: set[str] = field(default_factory=set)
    winners: set[str] = field(default_factory=set)
    log: list[str] = field(default_factory=list)
    recovered: int = 0
    fenced: int = 0

    def say(self, text: str) -> None:
        self.log.append(f"{trio.current_time() % 1000:8.3f} {text}")

    async def look(self, volume: Volume) -> frozenset[str]:
        """Every file, compared: of each machine the last one may be only begun, what was acknowledged is whole."""
        found = frozenset(await volume.files.list())
        assert found in self.states, f"mixed: {sorted(found)}"
        last = {name.split("-")[0]: name for name in sorted(found, key=lambda name: int(name.split("-")[1]))}
        for name in sorted(found):
            expected = self.content[name]
            fd = await volume.files.open(name, existing=True)
            data = await volume.files.read_at(fd, 0, 10_000)
            await volume.files.close(fd)
            if name in self.safe or name not in last.values():
                assert data == expected, f"{name}: {len(data)} of {len(expected)} bytes"
            assert expected.startswith(data), f"{name} has bytes nobody wrote"
        return found


class Machine:
    """One of them, in a task of its own."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.opener = SlowOpener(f"{world.seed}/{name}")
        self.random = random.Random(f"{world.seed}/{name}/steps")
        self.names: frozenset[str] = frozenset()
        self.reach(world.urls if self.random.random() < 0.4 else self.some())

    @property
    def path(self) -> Path:
        return self.world.base / self.name

    def some(self) -> list[str]:
        return [url for url in self.world.urls if self.random.random() < 0.7]

    def reach(self, urls: list[str]) -> None:
        for url in self.world.urls:
            self.opener.faults.setdefault(url, Faults()).gone = None if url in urls else "cut off"

    async def live(self, *, recover: bool) -> None:
        try:
            if recover:
                await self.recover()
            for _ in range(3):
                async with open_volume(self.path, passphrase=PASSPHRASE, options=QUIET, opener=self.opener) as volume:
                    self.names = frozenset(await volume.files.list())
                    self.world.say(f"{self.name} opens: {sorted(self.names)}")
                    assert self.names in self.world.states, f"{self.name} has what nobody ever had together: {sorted(self.names)}"
                    for _ in range(STEPS // 2):
                        await self.step(volume)
        except FusefsError as error:
            self.world.fenced += isinstance(error, Fenced)
            self.world.say(f"{self.name} ends: {type(error).__name__} {error}")

    async def recover(self) -> None:
        for attempt in range(3):
            urls = [url for url in self.world.urls if self.opener.faults[url].gone is None]
            try:
                report = await recover_volume(self.path, urls, passphrase=PASSPHRASE, opener=self.opener)
            except FusefsError as error:
                self.world.say(f"{self.name} does not recover: {type(error).__name__} {error}")
                if attempt == 2:
                    raise
                self.reach(self.world.urls)
                continue
            self.world.recovered += 1
            self.world.say(f"{self.name} recovers commit {report.sequence}, majority {report.majority} {report.trouble}")
            return

    async def step(self, volume: Volume) -> None:
        what = self.random.choice(["write", "write", "flush", "flush", "publish", "cut", "heal", "wait"])
        if what in ("cut", "heal"):
            self.reach(self.some() if what == "cut" else self.world.urls)
            await volume.hosts.retry_once()
        elif what == "wait":
            await trio.sleep(self.random.random() * 0.1)
        elif what == "write":
            await self.write(volume)
        elif what == "publish":
            try:
                await volume.publish()
            except Unavailable as error:
                self.world.say(f"{self.name} not published: {error}")
        else:
            await self.flush(volume)

    async def write(self, volume: Volume) -> None:
        world = self.world
        name = f"{self.name}-{len(world.content)}"
        world.content[name] = self.random.randbytes(self.random.choice((10, 3000)))
        world.states.add(self.names | {name})
        try:
            await write(volume, name, world.content[name])
        finally:
            self.names = frozenset(await volume.files.list())
            world.states.add(self.names)

    async def flush(self, volume: Volume) -> None:
        names = self.names
        report = await volume.flush()
        if not any(reason.startswith("metadata") for reason in report.reasons) and not report.degraded_sectors:
            self.world.safe |= names
            self.world.winners.add(self.name)
            self.world.say(f"{self.name} acknowledged {sorted(names)}")


async def at_the_same_moment(base: Path, seed: int) -> World:
    dice = random.Random(seed)
    world = World(base, seed)
    world.urls = host_dirs(base, dice.choice((2, 3, 3, 3, 4, 5)))
    await make(base / "m0", world.urls, "2")
    try:
        machines = [Machine(world, f"m{number}") for number in range(3)]

        async def later(machine: Machine, seconds: float) -> None:
            await trio.sleep(seconds)
            await machine.live(recover=True)

        at = dice.random() * 0.8
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: machines[0].live(recover=False))
            nursery.start_soon(later, machines[1], at)
            # Two that recover at the same moment, every other time.
            nursery.start_soon(later, machines[2], at + dice.choice((0.0, dice.random())))
        await compare(world)
    except BaseException:
        print(f"seed {seed}:\n" + "\n".join(world.log))
        raise
    return world


async def compare(world: World) -> None:
    try:
        await recover_volume(world.base / "end", world.urls, passphrase=PASSPHRASE)
    except BadArgument as error:
        # None has a majority: a person chooses, and one of them has all that was acknowledged.
        world.say(str(error))
        found = []
        for number, url in enumerate(world.urls):
            path, opener = world.base / f"end{number}", reaching(world.urls, [url])
            try:
                await recover_volume(path, [url], passphrase=PASSPHRASE, opener=opener)
            except BadArgument as both:
                world.say(str(both))
                continue
            scratch = world.base / f"scratch{number}"
            scratch.mkdir()
            async with open_read_only(ReadOnlySource(path, passphrase=PASSPHRASE), scratch=scratch, opener=FaultyOpener()) as volume:
                found.append(await world.look(volume))
        assert any(world.safe <= names for names in found), f"lost: {sorted(world.safe)}, there is {found}"
        return
    async with open_volume(world.base / "end", passphrase=PASSPHRASE, options=QUIET) as volume:
        names = await world.look(volume)
        assert names >= world.safe, f"lost: {sorted(world.safe - names)}"


@pytest.mark.parametrize("number", range(SEQUENCES))
async def test_of_machines_that_write_and_recover_at_the_same_moment_one_wins(tmp_path: Path, number: int) -> None:
    with trio.fail_after(200):
        await at_the_same_moment(tmp_path, number)


def main(arguments: list[str]) -> None:
    logging.disable()
    first = int(arguments[1]) if len(arguments) > 1 else random.SystemRandom().getrandbits(32)
    count = {"acknowledged": 0, "recovered": 0, "fenced": 0, "several": 0}
    for seed in range(first, first + int(arguments[0])):
        with tempfile.TemporaryDirectory() as base:
            world = trio.run(at_the_same_moment, Path(base), seed)
            count["acknowledged"] += len(world.safe)
            count["recovered"] += world.recovered
            count["fenced"] += world.fenced
            count["several"] += len(world.winners) > 1
    print(f"{arguments[0]} sequences from seed {first}: nothing lost, nothing mixed; {count}")


if __name__ == "__main__":
    main(sys.argv[1:])
