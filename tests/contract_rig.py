"""Volumes on hosts in memory under a virtual clock, for what takes months: contracts, their renewal, their end, pruning."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import trio
import trio.testing

from storage.hosts.memory import forget_memory_hosts, memory_content
from storage.interfaces import Contract
from storage.seams import Seams
from storage.volume import Volume
from storage.wiring import open_volume
from tests.fakes import SeededRandom, VirtualClock, make_seams
from tests.host_rig import FaultyOpener, Stored
from tests.rig import PASSPHRASE, QUIET, append, contents, make, new_value, noise

DAY = 86400.0
#: Longer than any pause of the renewal loop.
A_WHILE = 3700.0
#: No cache: what is read comes from hosts.
OPTIONS = replace(QUIET, cache=0)


@dataclass
class Volumes:
    """A volume in `path` on `mem:a`, `mem:b` ..., opened any number of times, with one clock and hosts that may refuse."""

    path: Path
    clock: VirtualClock = field(default_factory=VirtualClock)
    opener: FaultyOpener = field(default_factory=FaultyOpener)
    content: dict[int, bytes] = field(default_factory=dict)
    opened: int = 0

    def seams(self) -> Seams:
        self.opened += 1
        return make_seams(clock=self.clock, random=SeededRandom(self.opened + 1000 * sum(self.path.name.encode())))

    async def make(self, hosts: str, replication: str) -> None:
        """`hosts`: a letter each."""
        await make(self.path, [f"mem:{host}" for host in hosts], replication, seams=self.seams())

    @asynccontextmanager
    async def mounted(self) -> AsyncIterator[Volume]:
        async with open_volume(self.path, passphrase=PASSPHRASE, seams=self.seams(), options=OPTIONS, opener=self.opener) as volume:
            yield volume

    async def days(self, count: float) -> None:
        """The wall clock goes on by so many days, and every loop gets its turn."""
        self.clock.jump(count * DAY)
        await trio.sleep(A_WHILE)

    async def write(self, volume: Volume, count: int = 1, size: int = 150_000) -> None:
        """New values with a sector each, on the hosts; remembered in `content`."""
        for _ in range(count):
            value = new_value(volume)
            data = noise(size)
            await append(volume, value, data)
            await volume.flush()
            self.content[value] = data

    async def readable(self, volume: Volume) -> bool:
        """Is everything there, byte for byte, read from the hosts?"""
        return all([await contents(volume, value) == data for value, data in self.content.items()])

    def refuse(self, host: str, why: str | None = "it takes no more contracts") -> None:
        """From now on the host refuses contracts and nothing else; or (None) not any more."""
        faults = self.opener.faults[f"mem:{host}"]
        faults.gone, faults.only = why, (lambda operation, name: "/contracts/" in name and operation == "put")

    def stored(self, host: str) -> Stored:
        return Stored(f"mem:{host}")


def in_virtual_time(test: Callable[[], Awaitable[None]]) -> None:
    """Timers jump when nothing else is to be done; hosts in memory are new."""
    forget_memory_hosts()
    trio.run(test, clock=trio.testing.MockClock(autojump_threshold=0))


def last(volume: Volume, host: int) -> Contract:
    """The contract to use on the host."""
    contract = volume.contractor.contract_for(host)
    assert contract is not None
    return contract


def copies(volume: Volume) -> set[int]:
    """How many good places sectors have, as the hosts' memories tell."""
    from tests.test_reconcile import records

    held = [
        {name.rsplit("/", 1)[1] for name in memory_content(record.url.removeprefix("mem:")).objects if "/sectors/" in name}
        for record in volume.hosts.records()
    ]
    return {sum(shard.root.hex() in roots for roots in held) for record in records(volume).values() for shard in record.shards}
