"""A host that fails on order: a wrapper around any Host, with the same Protocol. For tests, deterministic by its seed.

host = FaultyHost(MemoryHost(), seams); host.faults.fail_next = 2; host.faults.latency = 3.0
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import trio

from storage.errors import Corrupt, NoSpace, Unavailable
from storage.hosts.layout import HOST_FILE
from storage.interfaces import Buffer, Host, HostCapabilities, HostSpace, Level
from storage.seams import Seams

#: Older contents kept per name for `replay`.
_HISTORY = 8


@dataclass(slots=True)
class Faults:
    """What is wrong with the host now; change it at any time. All off at first."""

    #: Seconds before every answer, on the seams' clock.
    latency: float = 0.0
    #: Bytes per second, 0 for no limit.
    throughput: float = 0.0
    #: Share of calls that fail with Unavailable, before they have any effect.
    error_rate: float = 0.0
    #: That many of the next calls fail with Unavailable, before they have any effect.
    fail_next: int = 0
    #: That many of the next puts and deletions take effect and *then* fail with Unavailable: the answer is lost.
    lose_answer_next: int = 0
    #: Every call fails with Unavailable, giving this reason.
    gone: str | None = None
    #: No call ever returns.
    hang: bool = False
    #: Share of reads that come back with one bit flipped.
    lying: float = 0.0
    #: Puts are acknowledged and forgotten.
    losing: bool = False
    #: Bytes missing at the end of every read.
    truncating: int = 0
    #: Bytes all objects together may have; NoSpace beyond.
    quota: int | None = None
    #: Reads return the oldest content it remembers of a name that was replaced, or deleted, since.
    replay: bool = False
    #: Conditional puts are done without looking at the condition.
    ignores_conditions: bool = False
    #: Which calls the faults apply to: (operation, name) -> bool; None for all.
    only: Callable[[str, str], bool] | None = None


def shards_only(_operation: str, name: str) -> bool:
    """For `Faults.only`: leave the host's identity and contracts alone."""
    return "/sectors/" in name


class FaultyHost:
    """`inner`, with `faults`. Counts what it was asked in `calls`."""

    def __init__(self, inner: Host, seams: Seams, seed: int = 0) -> None:
        self.inner = inner
        self.faults = Faults()
        #: operation -> how often.
        self.calls: dict[str, int] = {}
        self._seams = seams
        self._random = random.Random(seed)  # noqa: S311 - faults, not secrets
        self._history: dict[str, list[bytes]] = {}

    @property
    def url(self) -> str:
        return self.inner.url

    @property
    def capabilities(self) -> HostCapabilities:
        return self.inner.capabilities

    async def get(self, name: str, limit: int) -> bytes:
        await self._before("get", name)
        data = self._old(name) if self._applies("get", name) and self.faults.replay else None
        if data is None:
            data = await self.inner.get(name, limit)
        if len(data) > limit:
            raise Corrupt(f"host {self.url}: {name} has {len(data)} bytes, more than the {limit} it can have")
        await self._transfer(len(data))
        return self._damage("get", name, data)

    async def get_range(self, name: str, offset: int, length: int) -> bytes:
        await self._before("get_range", name)
        old = self._old(name) if self._applies("get_range", name) and self.faults.replay else None
        data = old[offset : offset + length] if old is not None else await self.inner.get_range(name, offset, length)
        await self._transfer(len(data))
        return self._damage("get_range", name, data)

    async def put(self, name: str, data: Buffer) -> str:
        await self._before("put", name)
        await self._transfer(len(data))
        await self._check_quota(name, len(data))
        await self._remember(name)
        if self.faults.losing and self._applies("put", name):
            return "lost"
        tag = await self.inner.put(name, data)
        self._answer("put", name)
        return tag

    async def put_if(self, name: str, data: Buffer, expected: str | None) -> str:
        await self._before("put_if", name)
        await self._transfer(len(data))
        await self._check_quota(name, len(data))
        await self._remember(name)
        if self._applies("put_if", name):
            if self.faults.losing:
                return "lost"
            if self.faults.ignores_conditions:
                return await self.inner.put(name, data)
        tag = await self.inner.put_if(name, data, expected)
        self._answer("put_if", name)
        return tag

    async def tag(self, name: str) -> str | None:
        await self._before("tag", name)
        return await self.inner.tag(name)

    async def delete(self, name: str) -> None:
        await self._before("delete", name)
        await self._remember(name)
        await self.inner.delete(name)
        self._answer("delete", name)

    async def list(self, prefix: str) -> AsyncIterator[tuple[str, int]]:
        await self._before("list", prefix)
        async for entry in self.inner.list(prefix):
            yield entry

    async def level(self, prefix: str) -> Level:
        await self._before("list", prefix)
        return await self.inner.level(prefix)

    async def space(self) -> HostSpace | None:
        await self._before("space", "")
        quota = self.faults.quota
        return await self.inner.space() if quota is None else HostSpace(max(0, quota - await self._used()), quota)

    async def aclose(self) -> None:
        await self.inner.aclose()

    # ----------------------------------------------------------------------------------------------------------------

    def _applies(self, operation: str, name: str) -> bool:
        return self.faults.only is None or self.faults.only(operation, name)

    async def _before(self, operation: str, name: str) -> None:
        self.calls[operation] = self.calls.get(operation, 0) + 1
        if not self._applies(operation, name):
            return
        faults = self.faults
        if faults.hang:
            await trio.sleep_forever()
        if faults.latency:
            await self._seams.clock.sleep(faults.latency)
        if faults.gone is not None:
            raise Unavailable(f"host {self.url}: {faults.gone}")
        if faults.fail_next > 0:
            faults.fail_next -= 1
            raise Unavailable(f"host {self.url}: {operation} {name} failed, as ordered")
        if faults.error_rate and self._random.random() < faults.error_rate:
            raise Unavailable(f"host {self.url}: {operation} {name} failed, by chance")

    async def _transfer(self, size: int) -> None:
        if self.faults.throughput:
            await self._seams.clock.sleep(size / self.faults.throughput)

    def _answer(self, operation: str, name: str) -> None:
        if self.faults.lose_answer_next > 0 and self._applies(operation, name):
            self.faults.lose_answer_next -= 1
            raise Unavailable(f"host {self.url}: the answer to {operation} {name} was lost, as ordered")

    def _damage(self, operation: str, name: str, data: bytes) -> bytes:
        if not self._applies(operation, name):
            return data
        if self.faults.truncating:
            data = data[: max(0, len(data) - self.faults.truncating)]
        if data and self.faults.lying and self._random.random() < self.faults.lying:
            bit = self._random.randrange(8 * len(data))
            changed = bytearray(data)
            changed[bit // 8] ^= 1 << bit % 8
            data = bytes(changed)
        return data

    async def _check_quota(self, name: str, size: int) -> None:
        quota = self.faults.quota
        if quota is None or name == HOST_FILE or not self._applies("put", name):
            return
        if await self._used(without=name) + size > quota:
            raise NoSpace(f"host {self.url} is full: {size} bytes do not fit; free space or add a host")

    async def _used(self, without: str = "") -> int:
        used = 0
        async for name, size in self.inner.list(""):
            if name != without:
                used += size
        return used

    async def _remember(self, name: str) -> None:
        """What stands there now, before it is replaced or deleted."""
        if await self.inner.tag(name) is not None:
            versions = self._history.setdefault(name, [])
            if len(versions) < _HISTORY:
                versions.append(await self.inner.get(name, 2**62))

    def _old(self, name: str) -> bytes | None:
        versions = self._history.get(name)
        return versions[0] if versions else None

    def __repr__(self) -> str:
        return f"<FaultyHost {self.inner!r} {self.faults}>"
