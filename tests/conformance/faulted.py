"""The host suite through hosts that something is wrong with: what a fault may do to whoever uses the host as HostIO does, and no more.

    test            of the suite, unchanged: what it expects is what it must get
    Patient         notes what came of each call; asks again after what the fault may raise
    Recorded        for hosts that answer wrongly: bytes come through HostIO, which verifies them
    FaultyHost      the fault
    host            memory, a directory, a real server

The promise has three parts. *Each call* either does what the suite expects or raises what the fault may raise (`Fault.kinds`), naming
the host, in bounded time: wrong bytes are neither. *Asked again*, when the fault is over or what was lost was put again, it does what the
suite expects. *Afterwards* the host, looked at without the fault, has what was acknowledged and nothing else. A fault that is to strike and
does not fails the test, too: it would have shown nothing.

Every first try of every call meets the fault, the second does not: so no luck is needed, and no call of the suite is spared.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeVar

import trio

from storage.errors import Corrupt, FusefsError, NoSpace, NotFound, Unavailable
from storage.hosts.faults import Faults, FaultyHost
from storage.hosts.urls import HostURL
from storage.interfaces import Buffer, Host, HostCapabilities, HostSpace, Level
from storage.seams import Seams
from tests.host_rig import VOLUME_ID, FaultyOpener, Rig

T = TypeVar("T")

#: Seconds a call to a real server may take, and its share of a slow one's: far more than any takes, and yet an end.
BOUND = 60.0

#: Which try of a call of the suite's this task is in; None outside of any.
_attempt: ContextVar[int | None] = ContextVar("attempt", default=None)


def _first(_operation: str, _name: str) -> bool:
    return _attempt.get() == 0


def _any(_operation: str, _name: str) -> bool:
    return _attempt.get() is not None


@dataclass(frozen=True)
class Fault:
    """What is wrong, and what may come of it."""

    #: Gets whether the clock is virtual: where it is not, whoever waits waits for real.
    faults: Callable[[bool], Faults]
    #: What a call may raise because of it.
    kinds: tuple[type[FusefsError], ...]
    #: (operation, bytes of the object) -> does it strike? Of calls that did not raise what the suite expects.
    strikes: Callable[[str, int], bool]
    #: It makes answers wrong: on such a host bytes count only if they verify.
    wrong: bool = False


def _reads(operation: str, size: int) -> bool:
    return operation == "get" or (operation == "get_range" and size > 0)


FAULTS = {
    "slow": Fault(
        lambda virtual: Faults(latency=10.0, throughput=1e6, only=_first) if virtual else Faults(latency=0.02, throughput=1e8, only=_first),
        (),
        lambda operation, _: True,
    ),
    "failing": Fault(lambda _: Faults(gone="away, as ordered", only=_first), (Unavailable,), lambda operation, _: True),
    # What was asked for happens; the answer is lost.
    "unheard": Fault(
        lambda _: Faults(lose_answer_next=2**31, only=_first), (Unavailable,), lambda operation, _: operation in ("put", "put_if", "delete")
    ),
    "full": Fault(lambda _: Faults(quota=0, only=_first), (NoSpace,), lambda operation, size: operation in ("put", "put_if") and size > 0),
    "lying": Fault(lambda _: Faults(lying=1.0, only=_first), (Corrupt,), _reads, wrong=True),
    # By the least there is.
    "truncating": Fault(lambda _: Faults(truncating=1, only=_first), (Corrupt,), _reads, wrong=True),
    "losing": Fault(
        lambda _: Faults(losing=True, only=_first), (NotFound,), lambda operation, _: operation in ("put", "put_if"), wrong=True
    ),
}


class Patient:
    """A Host: `inner`, asked as `storage` asks hosts."""

    def __init__(self, inner: Host, fault: Fault, known: dict[str, bytes], *, virtual: bool) -> None:
        """`known`: what was acknowledged, shared by all who have the same host open."""
        self._inner = inner
        self._urls = [inner.url, inner.shards_url] if isinstance(inner, Recorded) else [inner.url]
        self._fault = fault
        self._faults = fault.faults(virtual)
        self._known = known
        self._virtual = virtual

    @property
    def url(self) -> str:
        return self._inner.url

    @property
    def capabilities(self) -> HostCapabilities:
        return self._inner.capabilities

    async def get(self, name: str, limit: int) -> bytes:
        return await self._asked("get", lambda: self._inner.get(name, limit), len, name)

    async def get_range(self, name: str, offset: int, length: int) -> bytes:
        return await self._asked("get_range", lambda: self._inner.get_range(name, offset, length), len, name)

    async def put(self, name: str, data: Buffer) -> str:
        stored = bytes(data)
        tag = await self._asked("put", lambda: self._inner.put(name, data), lambda _: len(stored))
        self._known[name] = stored
        return tag

    async def put_if(self, name: str, data: Buffer, expected: str | None) -> str:
        stored, tries = bytes(data), itertools.count()

        async def once() -> str:
            # After a try that may have happened: what is there says whether it has.
            if (
                next(tries)
                and Unavailable in self._fault.kinds
                and await self._there(name) == stored
                and (tag := await self._inner.tag(name)) is not None
            ):
                return tag
            return await self._inner.put_if(name, data, expected)

        tag = await self._asked("put_if", once, lambda _: len(stored))
        self._known[name] = stored
        return tag

    async def tag(self, name: str) -> str | None:
        return await self._asked("tag", lambda: self._inner.tag(name))

    async def delete(self, name: str) -> None:
        await self._asked("delete", lambda: self._inner.delete(name))
        self._known.pop(name, None)

    async def list(self, prefix: str) -> AsyncIterator[tuple[str, int]]:
        async def all_of_it() -> list[tuple[str, int]]:
            return [entry async for entry in self._inner.list(prefix)]

        for entry in await self._asked("list", all_of_it):
            yield entry

    async def level(self, prefix: str) -> Level:
        return await self._asked("level", lambda: self._inner.level(prefix))

    async def space(self) -> HostSpace | None:
        return await self._asked("space", self._inner.space)

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def _there(self, name: str) -> bytes | None:
        try:
            return await self._inner.get(name, 2**40)
        except NotFound:
            return None

    async def _asked(
        self, operation: str, call: Callable[[], Awaitable[T]], size_of: Callable[[T], int] = lambda _: 0, read: str = ""
    ) -> T:
        """`read`: the name of an object that is read."""
        began = trio.current_time()
        try:
            result = await self._tried(0, call)
        except self._fault.kinds as error:
            assert any(url in str(error) for url in self._urls), f"which host? {error}"
        else:
            passed = trio.current_time() - began
            struck = passed > 0.99 * self._faults.latency > 0
            assert struck or not self._fault.strikes(operation, size_of(result)), f"{operation} did not meet the fault"
            if self._virtual:
                # Nothing else takes time: the call was made once.
                assert passed < 1.01 * (self._faults.latency + size_of(result) / (self._faults.throughput or 1.0)) + 0.01, passed
            return result
        if read and isinstance(self._inner, Recorded):
            await self._inner.mend(read)
        return await self._tried(1, call)

    async def _tried(self, number: int, call: Callable[[], Awaitable[T]]) -> T:
        token = _attempt.set(number)
        try:
            with trio.fail_after(BOUND):
                return await call()
        finally:
            _attempt.reset(token)

    def __repr__(self) -> str:
        return f"<Patient {self._inner!r}>"


class _Opener(FaultyOpener):
    """Asks no bucket what it is for."""

    async def __call__(self, url: HostURL, seams: Seams, *, create: bool = False) -> Host:
        return await super().__call__(url, seams, create=create and url.scheme == "dir")


@dataclass
class Shard:
    """What metadata know of an object."""

    sector_id: int
    root: str
    #: As another host would have it.
    data: bytes
    #: The host acknowledged it, and has it not.
    lost: bool = False


@dataclass
class Shards:
    """The shards of a volume with one host, under a contract. Shared by all who have the host of the names open."""

    rig: Rig
    contract: str
    loses: bool
    by_name: dict[str, Shard] = field(default_factory=dict)
    reads: int = 0

    @classmethod
    async def on(cls, url: str, fault: Fault, seams: Seams, *, virtual: bool) -> Shards:
        """The fault begins when the volume has the host."""
        rig = Rig(seams=seams, opener=_Opener())
        contract = await rig.add(url)
        faults = fault.faults(virtual)
        if faults.losing:
            # All of them: what was put is missed only when it is read.
            faults.only = _any
        rig.host(contract).faults = faults
        return cls(rig, contract, faults.losing)

    async def hold(self) -> None:
        """The host has each shard that is on record, and no other."""
        there = {name.rpartition("/")[2] async for name, _ in self.rig.host(self.contract).list(f"volumes/{VOLUME_ID.hex()}/sectors/")}
        assert there == {shard.root for shard in self.by_name.values() if not shard.lost}
        for shard in self.by_name.values():
            if not shard.lost:
                assert await self.rig.io.read(self.contract, shard.root, shard.sector_id) == shard.data


class Recorded:
    """A Host: names, conditions and listings are `names`'s; bytes come from shards through HostIO, and from nowhere else."""

    def __init__(self, names: Host, shards: Shards) -> None:
        self._names = names
        self._shards = shards
        self.shards_url = shards.rig.host(shards.contract).url

    @property
    def url(self) -> str:
        return self._names.url

    @property
    def capabilities(self) -> HostCapabilities:
        """What both hosts, which are of one kind, have shown."""
        said, shown = self._names.capabilities, self._shards.rig.host(self._shards.contract).capabilities
        return HostCapabilities(said.conditional_put, said.ranges and shown.ranges, said.versions, said.object_lock)

    async def get(self, name: str, limit: int) -> bytes:
        shard = self._shards.by_name.get(name)
        if shard is None or len(shard.data) > limit:
            await self._names.get(name, limit)
            raise AssertionError(f"{name} is on no record, or too long, and was given out")
        shards = self._shards
        data = await shards.rig.io.read(shards.contract, shard.root, shard.sector_id)
        assert not shard.lost, "it was not lost"
        return data

    async def get_range(self, name: str, offset: int, length: int) -> bytes:
        shard = self._shards.by_name.get(name)
        if shard is None:
            await self._names.get_range(name, offset, length)
            raise AssertionError(f"{name} is on no record, and was given out")
        shards = self._shards
        shards.reads += 1
        # Both ways: one request, or the header first.
        size = len(shard.data) if shards.reads % 2 else None
        data = await shards.rig.io.insecure_read(shards.contract, shard.root, shard.sector_id, offset, length, plaintext_length=size)
        assert not (shard.lost and data), "it was not lost"
        return data

    async def put(self, name: str, data: Buffer) -> str:
        return await self._stored(name, bytes(data), await self._names.put(name, data))

    async def put_if(self, name: str, data: Buffer, expected: str | None) -> str:
        return await self._stored(name, bytes(data), await self._names.put_if(name, data, expected))

    async def tag(self, name: str) -> str | None:
        return await self._names.tag(name)

    async def delete(self, name: str) -> None:
        await self._names.delete(name)
        if (shard := self._shards.by_name.pop(name, None)) is not None:
            await self._shards.rig.io.delete(self._shards.contract, shard.root)

    def list(self, prefix: str) -> AsyncIterator[tuple[str, int]]:
        return self._names.list(prefix)

    async def level(self, prefix: str) -> Level:
        return await self._names.level(prefix)

    async def space(self) -> HostSpace | None:
        return await self._names.space()

    async def aclose(self) -> None:
        await self._names.aclose()

    async def _stored(self, name: str, data: bytes, tag: str) -> str:
        """NotFound where the host acknowledged what it has not: of what names stand for we read back what we put."""
        if await self._names.tag(name) != tag:
            raise NotFound(f"host {self.url}: {name} was acknowledged, and is not there")
        shards, old = self._shards, self._shards.by_name.get(name)
        sector = shards.rig.sector_id()
        if old is None:
            root = await shards.rig.io.write(shards.contract, data, sector)
        else:
            root = await shards.rig.io.replace(shards.contract, data, sector, old.root)
        shards.by_name[name] = Shard(sector, root, data, lost=shards.loses)
        return tag

    async def mend(self, name: str) -> None:
        """Put again what was found missing, as is done with what other hosts have."""
        shard = self._shards.by_name.get(name)
        if shard is not None and shard.lost:
            assert await self._shards.rig.io.write(self._shards.contract, shard.data, shard.sector_id) == shard.root
            shard.lost = False

    def __repr__(self) -> str:
        return f"<Recorded {self._names!r}>"


class Faulted:
    """One host with a fault, opened as often as anybody likes: `await Faulted.on(...)`, `faulted.wrap(host)`, `await faulted.settle()`."""

    def __init__(self, fault: Fault, seams: Seams, plain: Host, shards: Shards | None, *, virtual: bool) -> None:
        self._fault = fault
        self._seams = seams
        self._plain = plain
        self._shards = shards
        self._virtual = virtual
        self._known: dict[str, bytes] = {}

    @classmethod
    async def on(cls, plain: Host, shards_url: str, fault: str, seams: Seams, *, virtual: bool) -> Faulted:
        """`plain`: the host of the suite's names. `shards_url`: another of the same kind, for shards where they are needed."""
        chosen = FAULTS[fault]
        shards = await Shards.on(shards_url, chosen, seams, virtual=virtual) if chosen.wrong else None
        return cls(chosen, seams, plain, shards, virtual=virtual)

    def wrap(self, host: Host) -> Host:
        """`host`: the same host, opened."""
        faulty = FaultyHost(host, self._seams)
        faulty.faults = self._fault.faults(self._virtual)
        asked = faulty if self._shards is None else Recorded(faulty, self._shards)
        return Patient(asked, self._fault, self._known, virtual=self._virtual)

    async def settle(self) -> None:
        """What was acknowledged is there, and nothing else."""
        there = [name async for name, _ in self._plain.list("")]
        assert sorted(there) == sorted(self._known)
        for name, data in self._known.items():
            assert await self._plain.get(name, len(data)) == data
        if self._shards is not None:
            assert self._shards.by_name.keys() == self._known.keys()
            await self._shards.hold()
