"""Hosts, contracts and HostIO of one volume, without the layers above: for the tests of these."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path

from storage import interfaces
from storage.contractor import Contractor
from storage.epochs import Epochs
from storage.host_io import HostIO
from storage.hosts.faults import Faults, FaultyHost
from storage.hosts.hostdb import HostDB
from storage.hosts.memory import MemoryContent, memory_content
from storage.hosts.opening import open_host
from storage.hosts.registry import HostRegistry, Opener
from storage.hosts.urls import HostURL
from storage.interfaces import Batch, Host
from storage.keys import Keys
from storage.seams import Seams
from tests.fakes import MemoryStore, SeededRandom, make_seams

VOLUME_ID = bytes.fromhex("00112233445566778899aabbccddeeff")
DAY = 86400.0


class FaultyOpener(Opener):
    """Wraps every host that is opened; `faults` and `hosts` by canonical URL. Faults stay as they are when a host is opened again."""

    def __init__(self) -> None:
        self.hosts: dict[str, FaultyHost] = {}
        self.faults: dict[str, Faults] = {}

    async def __call__(self, url: HostURL, seams: Seams, *, create: bool = False) -> Host:
        host = FaultyHost(await open_host(url, seams, create=create), seams)
        host.faults = self.faults.setdefault(url.base, host.faults)
        self.hosts[url.base] = host
        return host


class Rig:
    """`await Rig.make(...)`, then `await rig.add(url)`."""

    def __init__(self, store: MemoryStore | None = None, seams: Seams | None = None, opener: FaultyOpener | None = None) -> None:
        self.seams = seams or make_seams()
        self.store = store or MemoryStore()
        self.opener = opener or FaultyOpener()
        self.keys = Keys(bytes(32))
        self.epochs = Epochs.load(self.store)
        batch = Batch()
        first = self.epochs.current.first_sector_id + 1000 if self.epochs.all() else 1
        # Of its own randomness: a seeded one would give the next process the same salt.
        self.epochs.begin(batch, secrets.token_bytes(16), first, self.seams.clock.time_ns())
        self.store.apply(batch)
        self.first_sector_id = first
        self.registry = HostRegistry(VOLUME_ID, self.store, self.seams, opener=self.opener)
        self.hostdb = HostDB(self.store, self.seams)
        self.contractor = Contractor(VOLUME_ID, self.store, self.registry, self.seams)
        self.io = HostIO(VOLUME_ID, self.keys, self.epochs, self.registry, self.contractor, self.hostdb, self.store, self.seams)
        self._next = first

    def sector_id(self) -> int:
        """A new one each time."""
        self._next += 1
        return self._next - 1

    async def add(self, url: str, days: float = 90) -> str:
        """A host with a contract; returns the contract's id."""
        number = await self.registry.add(url)
        return await self.contractor.conclude_contract(str(number), days * DAY)

    async def again(self, *, crash: bool = False) -> Rig:
        """The next process on the same volume: after a commit, or a crash. Hosts are open."""
        if not crash:
            await self.store.commit()
        following = Rig(self.store.crash(), make_seams(clock=self.seams.clock, random=SeededRandom(secrets.randbits(64))), self.opener)
        await following.registry.open_all()
        return following

    def faults(self, contract_id: str) -> Faults:
        """What is wrong with the host of a contract."""
        return self.opener.faults[self.registry.url(self.contractor.contract(contract_id).host_number)]

    def host(self, contract_id: str) -> FaultyHost:
        """The host of a contract."""
        return self.opener.hosts[self.registry.url(self.contractor.contract(contract_id).host_number)]


def promised(rig: Rig) -> tuple[interfaces.HostIO, interfaces.Contractor, interfaces.MetadataStore]:
    """For mypy: what is built here has the Protocols."""
    return rig.io, rig.contractor, rig.store


class Stored:
    """The raw objects of a host, for looking and for damaging, in memory or in a directory."""

    def __init__(self, url: str) -> None:
        self._memory: MemoryContent | None = memory_content(url.removeprefix("mem:")) if url.startswith("mem:") else None
        self._root = Path(url.removeprefix("dir:"))

    def names(self, under: str = "") -> list[str]:
        if self._memory is not None:
            found = sorted(self._memory.objects)
        else:
            found = sorted(str(path.relative_to(self._root)) for path in self._root.rglob("*") if path.is_file())
        return [name for name in found if under in name and "~" not in name]

    def shards(self) -> list[str]:
        """Roots."""
        return [name.rsplit("/", 1)[1] for name in self.names("/sectors/")]

    def read(self, name: str) -> bytes:
        return self._memory.objects[name] if self._memory is not None else (self._root / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        if self._memory is not None:
            self._memory.objects[name] = data
        else:
            (self._root / name).parent.mkdir(parents=True, exist_ok=True)
            (self._root / name).write_bytes(data)

    def remove(self, name: str) -> None:
        if self._memory is not None:
            del self._memory.objects[name]
        else:
            (self._root / name).unlink()

    def shard(self, root: str) -> str:
        """The name of the object that holds a shard."""
        return next(name for name in self.names("/sectors/") if name.endswith(root))

    def damage(self, root: str, change: Callable[[bytes], bytes]) -> None:
        name = self.shard(root)
        self.write(name, change(self.read(name)))
