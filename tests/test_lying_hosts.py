"""Machines that reach some of the hosts, hosts that come back with what they had: data acknowledged on a majority is never lost, and never
are two histories mixed (I5).

More of it: python -m tests.test_lying_hosts NUMBER [SEED]
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from storage.errors import BadArgument, FusefsError
from storage.hosts.faults import Faults
from storage.read_only import ReadOnlySource, open_read_only
from storage.recovery import recover_volume
from storage.volume import Volume
from storage.wiring import open_volume
from tests.host_rig import FaultyOpener
from tests.rig import PASSPHRASE, QUIET, host_dirs, make

SEQUENCES = 12
STEPS = 24


@dataclass
class Machine:
    """One that has the volume open. `names`: what is in it, as it sees it."""

    path: Path
    opener: FaultyOpener
    names: frozenset[str] = frozenset()
    volume: Volume | None = None
    #: Why it did not open, or ended.
    error: FusefsError | None = None
    quit: trio.Event = field(default_factory=trio.Event)
    ended: trio.Event = field(default_factory=trio.Event)

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        """In a task of its own: volumes are opened and closed in any order."""
        try:
            async with open_volume(self.path, passphrase=PASSPHRASE, options=QUIET, opener=self.opener) as volume:
                self.volume = volume
                task_status.started()
                await self.quit.wait()
        except FusefsError as error:
            self.error = error
        if self.volume is None:
            task_status.started()
        self.ended.set()


class World:
    """Hosts, up to three machines, and what is known of all that was ever written."""

    def __init__(self, base: Path, seed: int, nursery: trio.Nursery) -> None:
        self.base = base
        self.nursery = nursery
        self.random = random.Random(seed)
        self.urls = host_dirs(base, self.random.choice((1, 2, 3, 3, 3, 5)))
        self.machines: list[Machine] = []
        self.content: dict[str, bytes] = {}
        #: Every set of files that any machine ever had.
        self.states: set[frozenset[str]] = {frozenset()}
        #: Files a flush has acknowledged as being on a majority.
        self.safe: set[str] = set()
        self.log: list[str] = []
        self._made = 0
        self._kept: Path | None = None
        self._kept_once = False

    def place(self) -> Path:
        self._made += 1
        return self.base / f"machine{self._made}"

    # ---- machines

    async def open(self, path: Path, opener: FaultyOpener) -> None:
        machine = Machine(path, opener)
        await self.nursery.start(machine.run)
        if machine.volume is None:
            self.log.append(f"{path.name} does not open: {type(machine.error).__name__}")
            return
        machine.names = frozenset(await machine.volume.files.list())
        assert machine.names in self.states, f"{path.name} has what nobody ever had together: {sorted(machine.names)}"
        self.machines.append(machine)

    async def close(self, machine: Machine) -> None:
        self.machines.remove(machine)
        machine.quit.set()
        await machine.ended.wait()
        if machine.error is not None:
            self.log.append(f"{machine.path.name} ends: {type(machine.error).__name__}")

    def reach(self, opener: FaultyOpener, urls: list[str]) -> None:
        for url in self.urls:
            opener.faults.setdefault(url, Faults()).gone = None if url in urls else "cut off"

    def some(self) -> list[str]:
        return [url for url in self.urls if self.random.random() < 0.6]

    # ---- steps

    async def step(self) -> None:
        what = self.random.choice(["write", "write", "flush", "flush", "publish", "cut", "heal", "reopen", "recover", "keep", "put back"])
        machine = self.random.choice(self.machines) if self.machines else None
        self.log.append(f"{what} {machine.path.name if machine is not None else ''}")
        if what == "recover":
            await self.recover()
        elif what == "keep" and not self._kept_once:
            self.keep()
        elif what == "put back":
            self.put_back()
        elif machine is not None and machine.volume is not None:
            await self.work(what, machine, machine.volume)

    async def work(self, what: str, machine: Machine, volume: Volume) -> None:
        if what == "cut":
            self.reach(machine.opener, self.some())
            await volume.hosts.retry_once()
        elif what == "heal":
            self.reach(machine.opener, self.urls)
            await volume.hosts.retry_once()
        elif what == "write":
            await self.write(machine, volume)
        elif what == "flush":
            await self.flush(machine, volume)
        elif what == "publish":
            try:
                await volume.publish()
            except FusefsError as error:
                self.log.append(f"  {type(error).__name__}")
        elif what == "reopen":
            await self.close(machine)
            await self.open(machine.path, machine.opener)

    async def write(self, machine: Machine, volume: Volume) -> None:
        name = f"{machine.path.name}-{len(self.content)}"
        data = self.random.randbytes(self.random.choice((10, 3000)))
        try:
            fd = await volume.files.open(name, existing=False, write=True)
            await volume.files.append(fd, data)
            await volume.files.commit(fd)
            await volume.files.close(fd)
        except FusefsError as error:
            # Fenced, or too few hosts: what it had made of it is no state of its own.
            self.log.append(f"  {type(error).__name__}")
            machine.names = frozenset(await volume.files.list())
            self.content[name] = data
        else:
            self.content[name] = data
            machine.names |= {name}
        self.states.add(machine.names)

    async def flush(self, machine: Machine, volume: Volume) -> None:
        try:
            report = await volume.flush()
        except FusefsError as error:
            self.log.append(f"  {type(error).__name__}")
            return
        if not any(reason.startswith("metadata") for reason in report.reasons):
            self.safe |= machine.names
            self.log.append(f"  safe: {len(self.safe)}")

    async def recover(self) -> None:
        if len(self.machines) >= 3:
            await self.close(self.random.choice(self.machines))
        opener, path, urls = FaultyOpener(), self.place(), self.some()
        self.reach(opener, urls)
        if not urls:
            return
        try:
            await recover_volume(path, urls, passphrase=PASSPHRASE, opener=opener)
        except FusefsError as error:
            self.log.append(f"  {type(error).__name__}: {str(error)[:100]}")
            return
        await self.open(path, opener)

    def keep(self) -> None:
        """What a host has now, for later: last week's."""
        self._kept_once = True
        self._kept = Path(self.random.choice(self.urls).removeprefix("dir:"))
        shutil.copytree(self._kept, self.base / "kept")

    def put_back(self) -> None:
        """A minority of the hosts, one, comes back with what it had. With fewer than three that would be a majority, and who could tell?"""
        if self._kept is None or len(self.urls) < 3:
            return
        target, self._kept = self._kept, None
        shutil.rmtree(target)
        (self.base / "kept").rename(target)
        # What counts from here on must not count on what that one host has forgotten: wait until the others have it.
        self.safe_on_others()

    def safe_on_others(self) -> None:
        """A majority that the host was part of is one no more, until the next flush."""
        self.safe = set()

    # ---- the end

    async def end(self) -> None:
        for machine in list(self.machines):
            self.reach(machine.opener, self.urls)
            if machine.volume is not None:
                await machine.volume.hosts.retry_once()
                await self.flush(machine, machine.volume)
        for machine in list(self.machines):
            await self.close(machine)
        path = self.place()
        try:
            await recover_volume(path, self.urls, passphrase=PASSPHRASE)
        except BadArgument as error:
            # Histories of which none has a majority: a person chooses, and one of them has all that ever was acknowledged.
            self.log.append(str(error))
            found = [await self.alone(url) for url in self.urls]
            assert any(self.safe <= names for names in found), f"lost: {sorted(self.safe)}, there is {found}; {error}"
            return
        async with open_volume(path, passphrase=PASSPHRASE, options=QUIET) as volume:
            names = await self.look(volume)
            assert names >= self.safe, f"lost: {sorted(self.safe - names)}"

    async def alone(self, url: str) -> frozenset[str]:
        """What the history on one host has."""
        opener, path = FaultyOpener(), self.place()
        self.reach(opener, [url])
        await recover_volume(path, [url], passphrase=PASSPHRASE, opener=opener)
        self.reach(opener, self.urls)
        with tempfile.TemporaryDirectory() as scratch:
            source = ReadOnlySource(path, passphrase=PASSPHRASE)
            async with open_read_only(source, scratch=Path(scratch), opener=opener) as volume:
                return await self.look(volume)

    async def look(self, volume: Volume) -> frozenset[str]:
        """Every file of a volume, compared."""
        found = frozenset(await volume.files.list())
        assert found in self.states, f"mixed: {sorted(found)}"
        for name in found:
            fd = await volume.files.open(name, existing=True)
            assert await volume.files.read_at(fd, 0, 10_000) == self.content[name]
        return found


async def sequence(base: Path, seed: int) -> None:
    async with trio.open_nursery() as nursery:
        world = World(base, seed, nursery)
        # Two copies: what one host forgets, another has.
        await make(base / "machine0", world.urls, "2" if len(world.urls) > 1 else "1")
        opener = FaultyOpener()
        world.reach(opener, world.urls)
        await world.open(base / "machine0", opener)
        try:
            for _ in range(STEPS):
                await world.step()
            await world.end()
        except BaseException:
            print(f"seed {seed}:\n" + "\n".join(world.log))
            raise


@pytest.mark.parametrize("number", range(SEQUENCES))
async def test_what_a_majority_acknowledged_is_never_lost_and_histories_never_mix(tmp_path: Path, number: int) -> None:
    with trio.fail_after(200):
        await sequence(tmp_path, number)


def main(arguments: list[str]) -> None:
    first = int(arguments[1]) if len(arguments) > 1 else random.SystemRandom().getrandbits(32)
    for seed in range(first, first + int(arguments[0])):
        with tempfile.TemporaryDirectory() as base:
            trio.run(sequence, Path(base), seed)
    print(f"{arguments[0]} sequences from seed {first}: nothing lost, nothing mixed")


if __name__ == "__main__":
    main(sys.argv[1:])
