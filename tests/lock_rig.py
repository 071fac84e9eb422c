"""Hosts that lock what they hold, in memory, and whoever has stolen the credentials for them."""

from __future__ import annotations

from storage.hosts.locking import LockedHost
from storage.hosts.memory import memory_content
from storage.hosts.memory_lock import VersionedMemoryHost, Versions, locked_memory_host
from storage.hosts.opening import open_host
from storage.hosts.registry import Opener
from storage.hosts.urls import HostURL
from storage.interfaces import Host
from storage.seams import Seams


class LockedOpener(Opener):
    """Every `mem:` host locks what it holds; what it holds outlives the Host values, and processes."""

    def __init__(self, seams: Seams) -> None:
        self.seams = seams
        self.versions: dict[str, Versions] = {}

    async def __call__(self, url: HostURL, seams: Seams, *, create: bool = False) -> Host:
        if url.scheme != "mem":
            return await open_host(url, seams, create=create)
        return self.host(url)

    def host(self, url: HostURL) -> LockedHost:
        versions = self.versions.setdefault(url.base, Versions(memory_content(url.path), self.seams))
        return locked_memory_host(url.base, versions)


async def vandalize(versions: Versions) -> int:
    """Delete and overwrite every name, several times over, as anybody with the credentials can. Returns how many there were."""
    host = VersionedMemoryHost("mem:vandal", versions)
    names = list(versions.by_name)
    for at, name in enumerate(names):
        if at % 3 != 1:
            await host.delete(name)
        if at % 3:
            await host.put(name, b"gone" * 50)
            await host.put(name, b"")
        for stored in list(versions.by_name[name]):
            if stored.data:
                # Refused where it is locked. Markers stay: without them the name would show what it was.
                versions.remove(name, stored.version)
    return len(names)
