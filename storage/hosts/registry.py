"""The volume's hosts: which there are, and which can be used now.

Record under the key `h` + host number u32, a MessagePack array:

| # | field | type | meaning |
|---|---|---|---|
| 0 | version | int | 1 |
| 1 | host id | str | 32 hexadecimal digits, as in its `fusefs-host.json` |
| 2 | url | str | canonical, without fragment |
| 3 | domain | str | failure domain, "" if none |
| 4 | added | int | nanoseconds since the Unix epoch |
| 5 | capabilities | int | bits as probed: 1 conditional put, 2 ranges, 4 versions, 8 object lock |

States: *ok*; *unavailable*: it did not answer, or nothing is there; *foreign*: another host answers at its URL. What is not ok is
tried again by `retry`.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar, TypeVarTuple, Unpack

import msgspec
import trio

from storage.errors import BadArgument, Corrupt, Exists, FusefsError, NotFound, Unavailable
from storage.hosts.identity import claim_identity, probe, read_identity
from storage.hosts.layout import Id, Nanoseconds, is_id
from storage.hosts.opening import open_host
from storage.hosts.urls import MAX_URL, HostURL, parse_url
from storage.interfaces import Batch, Host, HostCapabilities, MetadataStore
from storage.metadata.keys import HOST, prefix_end, read_u32, u32
from storage.pacing import Uplink
from storage.seams import Seams

log = logging.getLogger("fusefs.hosts")

A = TypeVarTuple("A")
R = TypeVar("R")

RECORD_VERSION = 1
#: Hosts of one volume at most: more than any replication needs, and all are opened at once.
MAX_HOSTS = 1024
#: Seconds a host has to say who it is.
OPEN_TIMEOUT = 10.0
#: Between two looks at what is not usable.
RETRY_SECONDS = 15.0

#: Of hosts that answer as this machine's own disks do.
LOCAL_SCHEMES = ("dir", "mem")

State = Literal["ok", "unavailable", "foreign"]


class Opener:
    """How URLs become hosts: `urls.open_host`. Tests put wrappers in between."""

    async def __call__(self, url: HostURL, seams: Seams, *, create: bool = False) -> Host:
        return await open_host(url, seams, create=create)

    def remote(self, url: HostURL) -> bool:
        """Is what goes there staged first, since it takes its time, or may be cut off?"""
        return url.scheme not in LOCAL_SCHEMES


@dataclass(frozen=True, slots=True)
class HostRecord:
    """A host as the volume knows it."""

    #: From 1, never reused in the volume.
    number: int
    #: 32 hexadecimal digits.
    host_id: str
    #: Canonical, without fragment.
    url: str
    domain: str
    added_ns: int
    #: As probed when it was added.
    capabilities: HostCapabilities


class _Record(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    version: int
    host_id: Id
    url: Annotated[str, msgspec.Meta(max_length=MAX_URL)]
    domain: Annotated[str, msgspec.Meta(max_length=64)]
    added_ns: Nanoseconds
    capabilities: Annotated[int, msgspec.Meta(ge=0, le=15)]


def encode_record(record: HostRecord) -> tuple[bytes, bytes]:
    """(key, value) for the metadata store."""
    stored = _Record(RECORD_VERSION, record.host_id, record.url, record.domain, record.added_ns, _bits(record.capabilities))
    return HOST + u32(record.number), msgspec.msgpack.encode(stored)


def decode_record(key: bytes, raw: bytes) -> HostRecord:
    """Corrupt if it is no record of a host."""
    if len(key) != 5 or key[:1] != HOST:
        raise Corrupt(f"metadata: {key[:16].hex()} is no key of a host")
    number = read_u32(key, 1)
    try:
        record = msgspec.msgpack.decode(raw, type=_Record)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise Corrupt(f"metadata: the record of host {number} is damaged: {error}") from None
    if record.version != RECORD_VERSION:
        raise Corrupt(f"metadata: the record of host {number} has version {record.version}, this fusefs reads {RECORD_VERSION}")
    bits = record.capabilities
    capabilities = HostCapabilities(bool(bits & 1), bool(bits & 2), bool(bits & 4), bool(bits & 8))
    return HostRecord(number, record.host_id, record.url, record.domain, record.added_ns, capabilities)


def _bits(capabilities: HostCapabilities) -> int:
    flags = (capabilities.conditional_put, capabilities.ranges, capabilities.versions, capabilities.object_lock)
    return sum(1 << place for place, flag in enumerate(flags) if flag)


class HostRegistry:
    """Hosts by number. `open_all` once; `retry` now and then; `aclose` at the end. Everything not async is atomic and quick."""

    def __init__(
        self,
        volume_id: bytes,
        store: MetadataStore,
        seams: Seams,
        *,
        opener: Opener | None = None,
        open_timeout: float = OPEN_TIMEOUT,
    ) -> None:
        self.volume_id = volume_id
        self._store = store
        self._seams = seams
        self._opener = opener or Opener()
        self._timeout = open_timeout
        #: Adding is one at a time: two URLs of one host must not slip in side by side. `retry` takes it too.
        self._lock = trio.Lock()
        self._records: dict[int, HostRecord] = {}
        # Invariant: a number is in exactly one of _hosts (usable) and _reasons, once it has been tried.
        self._hosts: dict[int, Host] = {}
        self._reasons: dict[int, tuple[State, str]] = {}
        self._suspects: set[int] = set()
        self._remote: dict[int, bool] = {}
        #: What is sent to any of them goes through it.
        self.uplink = Uplink(seams.clock)
        #: Told of requests besides those for shards: (number, bytes sent, received).
        self.requested: Callable[[int, int, int], None] = lambda _number, _sent, _received: None
        for key, raw in store.scan(HOST, prefix_end(HOST), MAX_HOSTS):
            record = decode_record(key, raw)
            self._records[record.number] = record

    # ----------------------------------------------------------------------------------------------------------------
    # What there is

    def numbers(self) -> list[int]:
        """Ascending."""
        return sorted(self._records)

    def records(self) -> list[HostRecord]:
        """By number."""
        return [record for _, record in sorted(self._records.items())]

    def record(self, number: int) -> HostRecord:
        """NotFound if the volume has no such host."""
        try:
            return self._records[number]
        except KeyError:
            raise NotFound(f"this volume has no host {number}; it has {self._names()}") from None

    def domain(self, number: int) -> str:
        """The failure domain it was given; "" without one, and where the volume has no such host."""
        record = self._records.get(number)
        return "" if record is None else record.domain

    def url(self, number: int) -> str:
        """For messages; never fails."""
        record = self._records.get(number)
        return f"{number}" if record is None else record.url

    def remote(self, number: int) -> bool:
        """See Opener. NotFound."""
        known = self._remote.get(number)
        if known is None:
            known = self._remote[number] = self._opener.remote(parse_url(self.record(number).url))
        return known

    def resolve(self, text: str) -> int:
        """The number of the host with this number, id or URL. NotFound names the ones there are."""
        if is_id(text):
            for number, record in self._records.items():
                if record.host_id == text:
                    return number
        elif text.isascii() and text.isdecimal():
            if len(text) < 10 and int(text) in self._records:
                return int(text)
        else:
            try:
                base = parse_url(text).base
            except BadArgument as error:
                raise NotFound(f"this volume has no host {text[:100]!r} ({error}); it has {self._names()}") from None
            for number, record in self._records.items():
                if record.url == base:
                    return number
        raise NotFound(f"this volume has no host {text[:100]!r}; it has {self._names()}")

    def _names(self) -> str:
        return ", ".join(f"{number} ({record.url})" for number, record in sorted(self._records.items())) or "none"

    # ----------------------------------------------------------------------------------------------------------------
    # What can be used

    def get(self, number: int) -> Host:
        """The open host. NotFound; Unavailable says why it cannot be used now."""
        host = self._hosts.get(number)
        if host is None:
            record = self.record(number)
            raise Unavailable(self._reasons.get(number, ("unavailable", f"host {record.url} has not been opened yet"))[1])
        return host

    def available(self, number: int) -> bool:
        """True if `get` would give it."""
        return number in self._hosts

    def state(self, number: int) -> State:
        """See the module's docstring."""
        if number in self._hosts:
            return "ok"
        return self._reasons.get(number, ("unavailable", ""))[0]

    def reason(self, number: int) -> str:
        """Why it cannot be used; "" if it can."""
        if number in self._hosts:
            return ""
        return self._reasons.get(number, ("unavailable", "not opened yet"))[1]

    def suspect(self, number: int) -> None:
        """It answered Unavailable: `retry` will look whether it is still there, and still itself."""
        if number in self._hosts:
            self._suspects.add(number)

    # ----------------------------------------------------------------------------------------------------------------

    async def add(self, url: str) -> int:
        """Take a host into the volume; its number. Its record is durable when it returns; the host has its `fusefs-host.json`.

        A missing directory is made. Exists, naming both URLs, if the host is one of the volume's already (by id, whatever the URL).
        BadArgument for a bad URL; Unavailable, NoSpace, Corrupt: the volume is as before. If it is the commit that fails, the
        host is in, and becomes durable with the next one.
        """
        parsed = parse_url(url)
        async with self._lock:
            for number, known in self._records.items():
                if known.url == parsed.base:
                    raise Exists(f"host {parsed.base} is host {number} of this volume already")
            if len(self._records) >= MAX_HOSTS:
                raise BadArgument(f"a volume has at most {MAX_HOSTS} hosts")
            host, record = await self._within_timeout(parsed.base, self._claim, parsed)
            number = record.number
            batch = Batch()
            batch.put(*encode_record(record))
            # Invariant: one host, one number. The lock is held since before the ids were compared.
            self._store.apply(batch)
            self._records[number] = record
            self._hosts[number] = host
            self._seams.failpoints.hit("registry.add.before_commit")
            await self._store.commit()
            return number

    async def _claim(self, parsed: HostURL) -> tuple[Host, HostRecord]:
        host = await self._opener(parsed, self._seams, create=True)
        try:
            identity = await claim_identity(host, self._seams)
            for number, known in self._records.items():
                if known.host_id == identity.id:
                    raise Exists(
                        f"host {parsed.base} is host {number} of this volume already, as {known.url}: both are host id {identity.id}; "
                        "copies need distinct hosts"
                    )
            capabilities = await probe(host, self._seams)
        except BaseException:
            await _close(host)
            raise
        now = self._seams.clock.time_ns()
        number = max(self._records, default=0) + 1
        return host, HostRecord(number, identity.id, parsed.base, parsed.domain, now, capabilities)

    async def open_all(self) -> None:
        """Open every host, all at the same time. Never fails for a host: `state` and `reason` say which cannot be used."""
        async with self._lock, trio.open_nursery() as nursery:
            for number in self._records:
                if number not in self._hosts:
                    nursery.start_soon(self._open, number)

    async def retry(self) -> None:
        """`retry_once` every RETRY_SECONDS, until cancelled."""
        while True:
            await self._seams.clock.sleep(RETRY_SECONDS)
            for number in await self.retry_once():
                log.info("host %s can be used again", self.url(number))

    async def retry_once(self) -> list[int]:
        """Look again at what is not usable, and at suspects. Returns the numbers that have become usable."""
        async with self._lock:
            suspects, self._suspects = self._suspects, set()
            before = set(self._hosts)
            async with trio.open_nursery() as nursery:
                for number in self._records:
                    if number not in self._hosts:
                        nursery.start_soon(self._open, number)
                    elif number in suspects:
                        nursery.start_soon(self._look_again, number)
            return sorted(set(self._hosts) - before)

    async def aclose(self) -> None:
        """Close every host."""
        hosts, self._hosts = self._hosts, {}
        for number, host in hosts.items():
            self._reasons[number] = ("unavailable", f"host {host.url} is closed")
            await _close(host)

    async def _open(self, number: int) -> None:
        record = self._records[number]
        try:
            host = await self._within_timeout(record.url, self._open_known, record)
        except FusefsError as error:
            self._reasons[number] = _why(error)
            return
        self._hosts[number] = host
        self._reasons.pop(number, None)

    async def _open_known(self, record: HostRecord) -> Host:
        host = await self._opener(parse_url(record.url), self._seams)
        try:
            await _check(host, record)
        except BaseException:
            await _close(host)
            raise
        return host

    async def _look_again(self, number: int) -> None:
        host, record = self._hosts[number], self._records[number]
        try:
            await self._within_timeout(record.url, _check, host, record)
        except FusefsError as error:
            log.warning("%s", error)
            # No await between these two: nobody finds it in neither.
            self._reasons[number] = _why(error)
            del self._hosts[number]
            await _close(host)
            # What is at its URL now may be the host again: a directory that was moved away and back.
            await self._open(number)

    async def _within_timeout(self, url: str, fn: Callable[[Unpack[A]], Awaitable[R]], *args: *A) -> R:
        with trio.move_on_after(self._timeout):
            return await fn(*args)
        raise Unavailable(f"host {url} did not answer within {self._timeout:g} s")


class _Foreign(Unavailable):
    """Another host answers at the URL."""


async def _check(host: Host, record: HostRecord) -> None:
    """Unavailable or _Foreign unless the host says it is the one on record."""
    try:
        identity = await read_identity(host)
    except (NotFound, Corrupt, BadArgument) as error:
        raise Unavailable(f"{error}; it was host id {record.host_id}") from error
    if identity.id != record.host_id:
        raise _Foreign(f"host {host.url} is another host now: id {identity.id} instead of {record.host_id}; it is not used")


def _why(error: FusefsError) -> tuple[State, str]:
    return ("foreign" if isinstance(error, _Foreign) else "unavailable", str(error))


async def _close(host: Host) -> None:
    with trio.CancelScope(shield=True):
        try:
            await host.aclose()
        except FusefsError:
            # It is not used any more; what could be lost was acknowledged as durable before.
            pass
