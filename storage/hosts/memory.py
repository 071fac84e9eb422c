"""A host in memory, for tests: what `mem:name` URLs open. Gone with the process; everything else is as on a real host."""

from __future__ import annotations

from collections.abc import AsyncIterator

import trio
from blake3 import blake3

from storage.errors import Busy, Corrupt, NoSpace, NotFound
from storage.hosts.layout import check_name, check_prefix
from storage.interfaces import Buffer, HostCapabilities, HostSpace, Level


class MemoryContent:
    """The objects of one `mem:` host; outlives the Host values that are open on it."""

    def __init__(self, capacity: int | None = None) -> None:
        self.objects: dict[str, bytes] = {}
        #: Bytes it can hold, None for no limit.
        self.capacity = capacity

    def used(self) -> int:
        """Bytes in objects."""
        return sum(map(len, self.objects.values()))


_registry: dict[str, MemoryContent] = {}


def memory_content(name: str) -> MemoryContent:
    """The content behind `mem:name` in this process; empty at first."""
    return _registry.setdefault(name, MemoryContent())


def forget_memory_hosts() -> None:
    """Empty every `mem:` host of this process, between tests."""
    _registry.clear()


class MemoryHost:
    """See `interfaces.Host`. Every operation is one step: no await happens between its checks and its effect."""

    def __init__(self, url: str = "mem:", content: MemoryContent | None = None) -> None:
        self._url = url
        self.content = content if content is not None else MemoryContent()

    @property
    def url(self) -> str:
        return self._url

    @property
    def capabilities(self) -> HostCapabilities:
        return HostCapabilities(conditional_put=True, ranges=True)

    async def get(self, name: str, limit: int) -> bytes:
        await trio.lowlevel.checkpoint()
        data = self._get(name)
        if len(data) > limit:
            raise Corrupt(f"host {self._url}: {name} has {len(data)} bytes, more than the {limit} it can have")
        return data

    async def get_range(self, name: str, offset: int, length: int) -> bytes:
        await trio.lowlevel.checkpoint()
        return self._get(name)[offset : offset + length]

    async def put(self, name: str, data: Buffer) -> str:
        check_name(name)
        await trio.lowlevel.checkpoint()
        return self._put(name, data)

    async def put_if(self, name: str, data: Buffer, expected: str | None) -> str:
        check_name(name)
        await trio.lowlevel.checkpoint()
        if self._tag(name) != expected:
            raise Busy(f"host {self._url}: {name} was changed by somebody else; read it again")
        return self._put(name, data)

    async def tag(self, name: str) -> str | None:
        check_name(name)
        await trio.lowlevel.checkpoint()
        return self._tag(name)

    async def delete(self, name: str) -> None:
        check_name(name)
        await trio.lowlevel.checkpoint()
        self.content.objects.pop(name, None)

    async def list(self, prefix: str) -> AsyncIterator[tuple[str, int]]:
        check_prefix(prefix)
        await trio.lowlevel.checkpoint()
        for name, data in list(self.content.objects.items()):
            if name.startswith(prefix):
                yield name, len(data)

    async def level(self, prefix: str) -> Level:
        check_prefix(prefix)
        await trio.lowlevel.checkpoint()
        objects: dict[str, int] = {}
        folders: set[str] = set()
        for name, data in self.content.objects.items():
            if name.startswith(prefix):
                first, slash, _ = name[len(prefix) :].partition("/")
                if slash:
                    folders.add(first)
                else:
                    objects[first] = len(data)
        return Level(objects, sorted(folders))

    async def space(self) -> HostSpace | None:
        await trio.lowlevel.checkpoint()
        capacity = self.content.capacity
        return None if capacity is None else HostSpace(max(0, capacity - self.content.used()), capacity)

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()

    def _get(self, name: str) -> bytes:
        check_name(name)
        try:
            return self.content.objects[name]
        except KeyError:
            raise NotFound(f"host {self._url}: there is no {name}") from None

    def _put(self, name: str, data: Buffer) -> str:
        content = self.content
        if content.capacity is not None:
            free = content.capacity - content.used() + len(content.objects.get(name, b""))
            if len(data) > free:
                raise NoSpace(f"host {self._url} is full: {len(data)} bytes do not fit; free space or add a host")
        content.objects[name] = stored = bytes(data)
        return blake3(stored).hexdigest()

    def _tag(self, name: str) -> str | None:
        stored = self.content.objects.get(name)
        return None if stored is None else blake3(stored).hexdigest()

    def __repr__(self) -> str:
        return f"<MemoryHost {self._url}, objects={len(self.content.objects)}>"
