"""From a host's URL to the host."""

from __future__ import annotations

from storage.hosts.directory import DirectoryHost
from storage.hosts.memory import MemoryHost, memory_content
from storage.hosts.objectstore import ObjectStoreHost
from storage.hosts.urls import PARAMETERS, HostURL
from storage.interfaces import Host
from storage.seams import Seams


async def open_host(url: HostURL, seams: Seams, *, create: bool = False) -> Host:
    """The host behind a URL. `create`: it is used for the first time; a missing directory is made, with its parents, and a bucket asked
    what it is for. (Buckets are made by their owners.)

    Unavailable if it is not there or cannot be used. Without `create`, that a bucket answers is known only from the first call.
    """
    if url.scheme == "mem":
        return MemoryHost(url.base, memory_content(url.path))
    if url.scheme in PARAMETERS:
        return await ObjectStoreHost.open(url, seams, look=create)
    return await DirectoryHost.open(url.path, seams, url=url.base, create=create)
