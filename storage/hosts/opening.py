"""From a host's URL to the host."""

from __future__ import annotations

from storage.hosts.directory import DirectoryHost
from storage.hosts.locking import LockedHost
from storage.hosts.memory import MemoryHost, memory_content
from storage.hosts.urls import LOCK_MODES, PARAMETERS, HostURL
from storage.interfaces import Host
from storage.seams import Seams


async def open_host(url: HostURL, seams: Seams, *, create: bool = False) -> Host:
    """The host behind a URL. `create`: it is used for the first time; a missing directory is made, with its parents, and a bucket asked
    what it is for. (Buckets are made by their owners.)

    Unavailable if it is not there or cannot be used. S3 buckets are asked each time whether they have Object Lock: what their names show
    may not be all there is, and without a volume's records nobody else knows.
    """
    if url.scheme == "mem":
        return MemoryHost(url.base, memory_content(url.path))
    if url.scheme in PARAMETERS:
        return await _object_store(url, seams, create)
    return await DirectoryHost.open(url.path, seams, url=url.base, create=create)


async def _object_store(url: HostURL, seams: Seams, create: bool) -> Host:
    # Only where there is such a host: every command that opens a volume would wait for obstore.
    from storage.hosts.objectstore import ObjectStoreHost
    from storage.hosts.s3_locks import S3Locks

    lock = url.parameter("lock")
    host = await ObjectStoreHost.open(url, seams, look=create or (url.scheme == "s3" and lock is None))
    if url.scheme != "s3" or lock == "off" or (lock is None and not host.capabilities.object_lock):
        return host
    return LockedHost(host, await S3Locks.open(url, seams, (lock or LOCK_MODES[0]).upper()), seams)
