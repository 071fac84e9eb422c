"""Who a host is (`fusefs-host.json`), and what it can really do."""

from __future__ import annotations

from storage.documents import MAX_DOCUMENT
from storage.errors import Busy, Corrupt, FusefsError, NotFound, Unavailable
from storage.hosts.layout import HOST_FILE, HostFile, decode_host_file, encode_json, new_host_file
from storage.interfaces import Host, HostCapabilities
from storage.seams import Seams

#: Name of the object the probe makes and removes.
_PROBE = "fusefs-probe."


async def read_identity(host: Host) -> HostFile:
    """The host's own file. NotFound if it never was a host (or its disk is not mounted), Corrupt, Unavailable."""
    try:
        raw = await host.get(HOST_FILE, MAX_DOCUMENT)
    except NotFound:
        raise NotFound(f"host {host.url} has no {HOST_FILE}: it is empty, or its disk is not mounted") from None
    return decode_host_file(raw, f"host {host.url}: {HOST_FILE}")


async def claim_identity(host: Host, seams: Seams) -> HostFile:
    """The host's own file, made now if it has none. Of several who do this at once, all get the same answer."""
    try:
        return await read_identity(host)
    except NotFound:
        pass
    fresh = encode_json(new_host_file(seams.random.token_bytes(16).hex(), seams.clock.time_ns()))
    seams.failpoints.hit("identity.before_put")
    try:
        if host.capabilities.conditional_put:
            await host.put_if(HOST_FILE, fresh, None)
        else:
            await host.put(HOST_FILE, fresh)
    except Busy:
        # Somebody else was faster; theirs counts.
        pass
    # Read back also what we put: only what the host gives out from now on is its id.
    return await read_identity(host)


async def probe(host: Host, seams: Seams) -> HostCapabilities:
    """What the host does when asked, whatever it says. Unavailable where it does not even keep what is put. Leaves nothing behind."""
    name = _PROBE + seams.random.token_bytes(8).hex()
    content = seams.random.token_bytes(64)
    try:
        await host.put(name, content)
        if await host.get(name, len(content)) != content:
            raise Unavailable(f"host {host.url} does not give back what was stored; do not use it")
        conditional = host.capabilities.conditional_put and await _conditional(host, name + ".if")
        try:
            ranges = await host.get_range(name, 16, 32) == content[16:48] and await host.get_range(name, 60, 32) == content[60:]
        except Unavailable:
            ranges = False
        # Some read the whole for a range, and have found out only now.
        ranges = ranges and host.capabilities.ranges
    except (NotFound, Corrupt) as error:
        raise Unavailable(f"host {host.url} does not keep what is stored ({error}); do not use it") from error
    finally:
        await _remove(host, name)
        await _remove(host, name + ".if")
    said = host.capabilities
    return HostCapabilities(conditional, ranges, said.versions, said.object_lock)


async def _conditional(host: Host, name: str) -> bool:
    """True if create-if-absent and replace-if-unchanged are done when they should be, and refused when they should be."""
    try:
        first = await host.put_if(name, b"1", None)
        for expected in (None, "bogus"):
            if not await _refused(host, name, expected):
                return False
        second = await host.put_if(name, b"2", first)
        return second != first and await _refused(host, name, first) and await host.tag(name) == second
    except (Busy, Unavailable):
        return False


async def _refused(host: Host, name: str, expected: str | None) -> bool:
    try:
        await host.put_if(name, b"must not be stored", expected)
    except Busy:
        return True
    return False


async def _remove(host: Host, name: str) -> None:
    try:
        await host.delete(name)
    except FusefsError:
        # 64 bytes under a name nobody uses again; the error that matters is the probe's own.
        pass
