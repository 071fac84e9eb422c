"""A Namespace over stores and values in memory, and ways to crash it."""

from __future__ import annotations

from dataclasses import dataclass, field

from storage.interfaces import Attributes, Batch, Listed
from storage.namespace import Namespace
from tests.fake_values import FakeValues, crashed
from tests.fakes import ManualClock, MemoryStore, make_seams

ROOT = 1
FILE = 0o100644


@dataclass
class Rig:
    """One process's view; `after_crash` is the next process's."""

    store: MemoryStore
    clock: ManualClock = field(default_factory=ManualClock)
    cache_limit: int = 16
    replication: str = "1"
    values: FakeValues = field(init=False)
    ns: Namespace = field(init=False)

    def __post_init__(self) -> None:
        self.values = FakeValues(self.store)
        self.ns = Namespace(
            self.store, self.values, make_seams(clock=self.clock), default_replication=self.replication, cache_limit=self.cache_limit
        )

    def after_crash(self, keep: int = 0) -> Rig:
        return Rig(crashed(self.store, keep), self.clock, self.cache_limit, self.replication)

    async def committed(self) -> Rig:
        """Everything committed, then a crash."""
        await self.values.commit_all()
        return self.after_crash()

    def file(self, name: bytes = b"file", parent: int = ROOT) -> int:
        return self.ns.create(parent, name, FILE, 1000, 1000)

    def dir(self, name: bytes, parent: int = ROOT) -> int:
        return self.ns.mkdir(parent, name, 0o755, 1000, 1000)

    def names(self, ino: int = ROOT) -> list[bytes]:
        return [entry.name for entry in self.ns.entries(ino, 0, 10_000)]

    def size(self, ino: int) -> int:
        return self.ns.attributes(ino).size

    async def content(self, ino: int) -> bytes:
        return await self.ns.read(ino, 0, 1 << 30)

    def keys(self, prefix: bytes) -> int:
        """How many keys of one kind there are."""
        return sum(key.startswith(prefix) for key in self.store.content())


def make_rig(cache_limit: int = 16, replication: str = "1") -> Rig:
    store = MemoryStore()
    batch = Batch()
    Namespace.format(batch, 1_000, 1000, 1000)
    store.apply(batch)
    return Rig(store, cache_limit=cache_limit, replication=replication)


def told(listed: Listed) -> list[Attributes]:
    """The attributes that a listing tells."""
    return [
        Attributes(ino, inode.mode, inode.nlink, inode.uid, inode.gid, inode.rdev, size, stored, inode.atime, inode.mtime, inode.ctime)
        for ino, inode, size, stored in zip(listed.inos, listed.inodes, listed.sizes, listed.stored, strict=True)
    ]
