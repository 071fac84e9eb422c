"""Hosts that lock what they hold (S3's Object Lock): a locked view of a plain host.

The lock protects *versions*, not names: a plain DELETE makes a name vanish and an overwrite gives it other bytes, and the locked version is
still there. So whoever holds our credentials, or the host's, can hide things and not destroy them, and this view finds them:

| name | what `get` gives |
|---|---|
| ends in a root (shards, metadata objects) | what the name shows, if it has that root; else the oldest version that has |
| another one that is written once (superblocks, contracts, `fusefs-host.json`) | the oldest version: ours came first |
| any other | what the name shows |

`level` and `list` show names as they are; what somebody deleted is `hidden`. Ranges are not verified here: HostIO, which verifies them,
asks for a version when what the name shows is wrong.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from blake3 import blake3
from cachetools import LRUCache

from storage.errors import Corrupt, FusefsError, NotFound
from storage.hosts.layout import check_name, check_prefix, root_in, write_once
from storage.interfaces import Buffer, Host, HostCapabilities, HostSpace, Level, LockingHost, StoredVersion
from storage.seams import Seams

#: Seconds for which a put is locked that nobody gave another end: what is soon replaced is soon free to go.
SHORT_LOCK = 2 * 86400.0
#: Versions of one name that are looked at, oldest first: somebody may have piled up others.
MAX_VERSIONS = 10_000
#: Of these, versions of an object that are read to find the one with the right root.
MAX_TRIED = 32
#: Versions remembered of what was put.
REMEMBERED = 8192


class Locks(Protocol):
    """What an engine can do with versions. Errors as of `interfaces.Host`; NotPermitted where the credentials do not suffice."""

    async def put(self, name: str, data: Buffer, until_ns: int, *, new: bool) -> tuple[str, str]:
        """Store as a new version, locked until then: (tag, version). `new`: Busy if the name shows anything."""
        ...

    async def extend(self, name: str, version: str, until_ns: int) -> None:
        """Never shortens."""
        ...

    def versions(self, start: str) -> AsyncIterator[StoredVersion]:
        """All versions and markers of the names that begin with `start`: by name, of one name the newest first."""
        ...

    async def folders(self, prefix: str) -> Sequence[str]:
        """The next components of names below `prefix` that have another below, whether or not anything there is shown."""
        ...

    async def get(self, name: str, version: str, offset: int, length: int) -> bytes:
        """Bytes of a version."""
        ...

    async def remove(self, name: str, version: str) -> bool:
        """For good. False where a lock, or a right these credentials lack, keeps it."""
        ...


def locking(host: Host) -> LockingHost | None:
    """The host, if it locks what it holds."""
    return host if host.capabilities.object_lock and isinstance(host, LockingHost) else None


class LockedHost:
    """See the module, `interfaces.Host` and `interfaces.LockingHost`. `inner`: the same host, by names alone."""

    def __init__(self, inner: Host, locks: Locks, seams: Seams) -> None:
        self._inner = inner
        self._locks = locks
        self._seams = seams
        #: name -> (version, size) of what was put here lately: nobody need be asked.
        self._put_here: LRUCache[str, tuple[str, int]] = LRUCache(maxsize=REMEMBERED)

    @property
    def url(self) -> str:
        return self._inner.url

    @property
    def capabilities(self) -> HostCapabilities:
        said = self._inner.capabilities
        return HostCapabilities(said.conditional_put, said.ranges, versions=True, object_lock=True)

    # ----------------------------------------------------------------------------------------------------------------
    # As any host

    async def get(self, name: str, limit: int) -> bytes:
        root = root_in(name)
        if root is None:
            return await (self._first(name, limit) if write_once(name) else self._inner.get(name, limit))
        error: FusefsError
        try:
            data = await self._inner.get(name, limit)
            if blake3(data).hexdigest() == root:
                return data
            error = Corrupt(f"host {self.url}: {name} has been overwritten")
        except (NotFound, Corrupt) as failed:
            error = failed
        for stored in (await self.versions(name))[:MAX_TRIED]:
            if stored.size <= limit:
                data = await self._locks.get(name, stored.version, 0, stored.size)
                if blake3(data).hexdigest() == root:
                    return data
        raise error

    async def _first(self, name: str, limit: int) -> bytes:
        known = self._put_here.get(name)
        if known is not None and known[1] <= limit:
            return await self._locks.get(name, known[0], 0, known[1])
        versions = await self.versions(name)
        if not versions:
            raise NotFound(f"host {self.url}: there is no {name}")
        oldest = versions[0]
        if oldest.size > limit:
            raise Corrupt(f"host {self.url}: {name} has {oldest.size} bytes, more than the {limit} it can have")
        return await self._locks.get(name, oldest.version, 0, oldest.size)

    async def get_range(self, name: str, offset: int, length: int) -> bytes:
        return await self._inner.get_range(name, offset, length)

    async def put(self, name: str, data: Buffer) -> str:
        return (await self._put(name, data, self._soon(), new=False))[0]

    async def put_if(self, name: str, data: Buffer, expected: str | None) -> str:
        if expected is None:
            return (await self._put(name, data, self._soon(), new=True))[0]
        # Nothing of ours that is to last is ever replaced: this is for probing.
        return await self._inner.put_if(name, data, expected)

    async def _put(self, name: str, data: Buffer, until_ns: int, *, new: bool) -> tuple[str, str]:
        check_name(name)
        if not write_once(name):
            # A probe, say: nothing to keep, and a lock would keep it.
            return await (self._inner.put_if(name, data, None) if new else self._inner.put(name, data)), ""
        tag, version = await self._locks.put(name, data, until_ns, new=new)
        # Names are written once; of one that is put again, with the same bytes, the later lock is the longer one.
        self._put_here[name] = (version, len(memoryview(data)))
        return tag, version

    def _soon(self) -> int:
        return self._seams.clock.time_ns() + round(SHORT_LOCK * 1e9)

    async def tag(self, name: str) -> str | None:
        return await self._inner.tag(name)

    async def delete(self, name: str) -> None:
        self._put_here.pop(name, None)
        await self._inner.delete(name)
        if not write_once(name):
            await self.purge(name)

    def list(self, prefix: str) -> AsyncIterator[tuple[str, int]]:
        return self._inner.list(prefix)

    async def level(self, prefix: str) -> Level:
        return await self._inner.level(prefix)

    async def space(self) -> HostSpace | None:
        return await self._inner.space()

    async def aclose(self) -> None:
        await self._inner.aclose()

    # ----------------------------------------------------------------------------------------------------------------
    # Versions and locks

    async def put_locked(self, name: str, data: Buffer, until_ns: int) -> str:
        return (await self._put(name, data, max(until_ns, self._soon()), new=False))[1]

    async def extend(self, name: str, version: str, until_ns: int) -> str:
        if not version:
            known = self._put_here.get(name)
            version = known[0] if known is not None else await self._oldest(name)
        await self._locks.extend(name, version, until_ns)
        return version

    async def _oldest(self, name: str) -> str:
        versions = await self.versions(name)
        if not versions:
            raise NotFound(f"host {self.url}: there is no {name}")
        return versions[0].version

    async def versions(self, name: str) -> Sequence[StoredVersion]:
        check_name(name)
        found: list[StoredVersion] = []
        async for stored in self._locks.versions(name):
            if stored.name == name and not stored.marker:
                found.append(stored)
                # The newest come first: of too many, the oldest count.
                del found[:-MAX_VERSIONS]
        found.reverse()
        return found

    async def get_version(self, name: str, version: str, offset: int, length: int) -> bytes:
        return await self._locks.get(name, version, offset, length)

    async def folders(self, prefix: str) -> Sequence[str]:
        check_prefix(prefix)
        return await self._locks.folders(prefix)

    async def hidden(self, start: str) -> AsyncIterator[StoredVersion]:
        name, shown, oldest = "", True, None
        async for stored in self._locks.versions(start):
            if stored.name != name:
                if oldest is not None and not shown:
                    yield oldest
                name, shown, oldest = stored.name, False, None
            shown = shown or (stored.latest and not stored.marker)
            if not stored.marker:
                oldest = stored
        if oldest is not None and not shown:
            yield oldest

    async def purge(self, name: str) -> bool:
        check_name(name)
        left = False
        markers: list[str] = []
        async for stored in self._locks.versions(name):
            if stored.name != name:
                continue
            if stored.marker:
                markers.append(stored.version)
            elif not await self._locks.remove(name, stored.version):
                left = True
        if left:
            # The markers stay as well: without them the name would show what it was.
            return False
        for version in markers:
            left = not await self._locks.remove(name, version) or left
        return not left

    def __repr__(self) -> str:
        return f"<LockedHost {self._inner!r}>"
