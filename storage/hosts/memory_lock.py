"""A host in memory that keeps versions and locks them, for tests: `LockedHost(VersionedMemoryHost(...), MemoryLocks(...), seams)`.

What a holder of the credentials can do to names, hostile or not, is what `VersionedMemoryHost` does: it deletes with markers and overwrites
with new versions, and no locked version is lost by either.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import trio

from storage.errors import Busy, NotFound, NotPermitted
from storage.hosts.locking import LockedHost
from storage.hosts.memory import MemoryContent, MemoryHost
from storage.interfaces import Buffer, StoredVersion
from storage.seams import Seams


@dataclass(slots=True)
class _Version:
    version: str
    #: None: a delete marker.
    data: bytes | None
    stored_ns: int
    until_ns: int = 0


class Versions:
    """The versions behind a `MemoryContent`, oldest first by name."""

    def __init__(self, content: MemoryContent, seams: Seams) -> None:
        self.content = content
        self.seams = seams
        self.by_name: dict[str, list[_Version]] = {}
        self._count = 0
        #: The credentials in use may not delete.
        self.no_deletes = False

    def add(self, name: str, data: bytes | None, until_ns: int = 0) -> str:
        """A new version, or a marker; what the name shows is kept with the content."""
        self._count += 1
        self.by_name.setdefault(name, []).append(_Version(f"v{self._count}", data, self.seams.clock.time_ns(), until_ns))
        return f"v{self._count}"

    def remove(self, name: str, version: str) -> bool:
        """For good, unless it is locked."""
        kept = self.by_name.get(name, [])
        for one in kept:
            if one.version == version and one.until_ns <= self.seams.clock.time_ns() and not self.no_deletes:
                kept.remove(one)
                # The name shows what is the newest now: nothing, if that is a marker.
                if kept and (data := kept[-1].data) is not None:
                    self.content.objects[name] = data
                else:
                    self.content.objects.pop(name, None)
                if not kept:
                    del self.by_name[name]
                return True
        return False


class VersionedMemoryHost(MemoryHost):
    """By names alone, on content that keeps versions."""

    def __init__(self, url: str, versions: Versions) -> None:
        super().__init__(url, versions.content)
        self.versions = versions

    def _put(self, name: str, data: Buffer) -> str:
        tag = super()._put(name, data)
        self.versions.add(name, self.content.objects[name])
        return tag

    async def delete(self, name: str) -> None:
        if self.versions.no_deletes:
            raise NotPermitted(f"host {self.url}: these credentials may not delete {name}")
        await super().delete(name)
        if name in self.versions.by_name:
            self.versions.add(name, None)


class MemoryLocks:
    """See `locking.Locks`."""

    def __init__(self, host: VersionedMemoryHost) -> None:
        self._host = host
        self._versions = host.versions

    async def put(self, name: str, data: Buffer, until_ns: int, *, new: bool) -> tuple[str, str]:
        await trio.lowlevel.checkpoint()
        if new and name in self._versions.content.objects:
            raise Busy(f"host {self._host.url}: {name} is there already")
        # No await between the two: the version is the one that was put.
        tag = self._host._put(name, data)
        stored = self._versions.by_name[name][-1]
        stored.until_ns = until_ns
        return tag, stored.version

    async def extend(self, name: str, version: str, until_ns: int) -> None:
        await trio.lowlevel.checkpoint()
        stored = self._find(name, version)
        stored.until_ns = max(stored.until_ns, until_ns)

    async def folders(self, prefix: str) -> Sequence[str]:
        await trio.lowlevel.checkpoint()
        below = [name[len(prefix) :] for name in self._versions.by_name if name.startswith(prefix)]
        return sorted({rest.split("/")[0] for rest in below if "/" in rest})

    async def versions(self, start: str) -> AsyncIterator[StoredVersion]:
        await trio.lowlevel.checkpoint()
        for name in sorted(self._versions.by_name):
            if name.startswith(start):
                versions = list(self._versions.by_name.get(name, []))
                for at, one in reversed(list(enumerate(versions))):
                    latest = at == len(versions) - 1
                    yield StoredVersion(name, one.version, len(one.data or b""), one.stored_ns, latest, one.data is None)

    async def get(self, name: str, version: str, offset: int, length: int) -> bytes:
        await trio.lowlevel.checkpoint()
        return (self._find(name, version).data or b"")[offset : offset + length]

    async def remove(self, name: str, version: str) -> bool:
        await trio.lowlevel.checkpoint()
        return self._versions.remove(name, version)

    def _find(self, name: str, version: str) -> _Version:
        for one in self._versions.by_name.get(name, []):
            if one.version == version:
                return one
        raise NotFound(f"host {self._host.url}: {name} has no version {version}")


def locked_memory_host(url: str, versions: Versions) -> LockedHost:
    """A host as `mem:` ones, with Object Lock."""
    host = VersionedMemoryHost(url, versions)
    return LockedHost(host, MemoryLocks(host), versions.seams)
