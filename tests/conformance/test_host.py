"""What every Host promises (storage.interfaces.Host), over every implementation, and over each with each fault (see `faulted`).

Each test has each server with one of the faults in turn, and memory and directory with all; FUSEFS_TEST_FAULTS=all, or scripts/torture
faults: every test with every server and every fault.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from storage.errors import BadArgument, Busy, Corrupt, NotFound
from storage.hosts.identity import probe
from storage.hosts.memory import MemoryContent, MemoryHost, forget_memory_hosts
from storage.hosts.memory_lock import Versions, locked_memory_host
from storage.hosts.opening import open_host
from storage.hosts.urls import parse_url
from storage.interfaces import Host, Level
from storage.seams import Seams
from tests.conformance.faulted import FAULTS, Faulted
from tests.engines.fixtures import Engine
from tests.fakes import make_seams

NAME = "volumes/0123/sectors/ab/abcdef"
LIMIT = 64 * 1024 * 1024

Reopen = Callable[[], Awaitable[Host]]


#: Real servers, in real time.
ENGINES = ["seaweedfs", "moto", "azurite", "rclone"]
HERE = ["memory", "directory"]
PLAIN = [*HERE, "directory in threads", "locked memory", *ENGINES]
#: Each host by itself, and with each fault: "moto", "moto, lying".
ALL = [*PLAIN, *(f"{kind}, {fault}" for kind in [*HERE, *ENGINES] for fault in FAULTS)]


def virtually(fn: Callable[[], Awaitable[object]], **options: Any) -> object:
    """As trio.run, with time that passes only where nothing else is left to do."""
    return trio.run(fn, **{**options, "clock": trio.testing.MockClock(autojump_threshold=0)})


def kinds(names: list[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.trio(run=virtually)) if name.split(", ")[0] in HERE else name for name in names]


#: What rclone cannot do it does not refuse: it puts without looking at the condition. So it is told from others by probing.
CONDITIONAL = [kind for kind in ALL if "rclone" not in kind]
conditional = pytest.mark.parametrize("reopen", kinds(CONDITIONAL), indirect=True)


@pytest.fixture(params=kinds(ALL))
async def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Reopen]:
    """Opens the same host, again and again. In the end it has what was acknowledged, and nothing else."""
    kind, _, fault = request.param.partition(", ")
    seams = Seams() if "threads" in kind or kind in ENGINES else make_seams()
    memory: Host = MemoryHost("mem:test")
    if kind == "locked memory":
        memory = locked_memory_host("mem:test", Versions(MemoryContent(), seams))
    engine: Engine | None = request.getfixturevalue(kind) if kind in ENGINES else None

    def a_url(name: str) -> str:
        if engine is not None:
            # With faults no bucket is asked each time what it is for: most of the time of opening a host.
            return engine.url() + ("&lock=off" if fault and engine.scheme == "s3" else "")
        return f"mem:{name}" if kind == "memory" else f"dir:{tmp_path}/{name}"

    url = a_url("host")

    async def plainly() -> Host:
        return memory if "memory" in kind else await open_host(parse_url(url), seams, create="directory" in kind)

    if not fault:
        yield plainly
        return
    forget_memory_hosts()
    first = await plainly()
    faulted = await Faulted.on(first, a_url("shards"), fault, seams, virtual=kind in HERE)
    unused = [first]

    async def opened() -> Host:
        return faulted.wrap(unused.pop() if unused else await plainly())

    yield opened
    await faulted.settle()


@pytest.fixture
async def host(reopen: Reopen) -> Host:
    return await reopen()


async def names(host: Host, prefix: str = "") -> dict[str, int]:
    return {name: size async for name, size in host.list(prefix)}


@pytest.mark.parametrize("size", [0, 1, 100, 70_000, 4 * 1024 * 1024 + 17])
async def test_what_is_put_is_got_also_by_the_next_to_open_it(host: Host, reopen: Reopen, size: int) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    data = data[:size]
    await host.put(NAME, data)
    assert await host.get(NAME, LIMIT) == data
    assert await (await reopen()).get(NAME, size) == data


@pytest.mark.parametrize("kind", [bytearray, memoryview])
async def test_any_buffer_can_be_put(host: Host, kind: Callable[[bytes], bytearray | memoryview]) -> None:
    data = kind(b"x" * 1000)
    await host.put(NAME, data)
    if isinstance(data, bytearray):
        data[:] = b"y" * 1000
    assert await host.get(NAME, LIMIT) == b"x" * 1000


async def test_a_put_replaces_the_whole(host: Host) -> None:
    await host.put(NAME, b"a long one" * 100)
    await host.put(NAME, b"short")
    assert await host.get(NAME, LIMIT) == b"short"
    assert await names(host) == {NAME: 5}


async def test_what_is_not_there_is_not_found(host: Host) -> None:
    await host.put("a/b", b"1")
    for name in (NAME, "a", "a/b/c", "a/bb", "fusefs-host.json"):
        with pytest.raises(NotFound, match=name):
            await host.get(name, LIMIT)
        with pytest.raises(NotFound, match=name):
            await host.get_range(name, 0, 1)
        assert await host.tag(name) is None


async def test_an_object_above_the_limit_is_not_read(host: Host) -> None:
    await host.put(NAME, b"x" * 1000)
    assert len(await host.get(NAME, 1000)) == 1000
    with pytest.raises(Corrupt, match="1000"):
        await host.get(NAME, 999)


@pytest.mark.parametrize(("offset", "length"), [(0, 10), (0, 0), (3, 4), (9, 1), (9, 100), (10, 1), (11, 5), (10**12, 3)])
async def test_ranges_are_clipped_to_the_end(host: Host, offset: int, length: int) -> None:
    await host.put(NAME, b"0123456789")
    assert await host.get_range(NAME, offset, length) == b"0123456789"[offset : offset + length]


async def test_the_tag_changes_with_the_content_and_only_then(host: Host) -> None:
    seen = set()
    for size in (1, 2, 2 * 1024 * 1024):
        for fill in (b"a", b"b", b"c"):
            tag = await host.put(NAME, fill * size)
            assert await host.tag(NAME) == tag
            assert await host.tag(NAME) == tag
            seen.add(tag)
    assert len(seen) == 9


@conditional
async def test_a_conditional_put_creates_only_what_is_not_there(host: Host) -> None:
    await host.put_if(NAME, b"first", None)
    with pytest.raises(Busy):
        await host.put_if(NAME, b"second", None)
    assert await host.get(NAME, LIMIT) == b"first"


@conditional
async def test_a_conditional_put_replaces_only_what_was_seen(host: Host) -> None:
    first = await host.put_if(NAME, b"1", None)
    second = await host.put_if(NAME, b"2", first)
    assert second == await host.tag(NAME)
    for stale in (first, "bogus", None):
        with pytest.raises(Busy):
            await host.put_if(NAME, b"3", stale)
    assert await host.get(NAME, LIMIT) == b"2"
    await host.delete(NAME)
    with pytest.raises(Busy):
        await host.put_if(NAME, b"3", second)
    with pytest.raises(NotFound):
        await host.get(NAME, LIMIT)


@conditional
async def test_of_many_who_put_on_one_condition_one_wins(reopen: Reopen) -> None:
    hosts = [await reopen() for _ in range(8)]
    won: list[int] = []

    async def try_it(number: int) -> None:
        try:
            await hosts[number].put_if(NAME, b"%d" % number, None)
        except Busy:
            return
        won.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(8):
            nursery.start_soon(try_it, number)
    assert len(won) == 1
    assert await hosts[0].get(NAME, LIMIT) == b"%d" % won[0]


async def test_deleting_is_for_good_and_idempotent(host: Host, reopen: Reopen) -> None:
    await host.put(NAME, b"1")
    await host.put(NAME + "2", b"2")
    await host.delete(NAME)
    await host.delete(NAME)
    await host.delete("never/was")
    assert await names(await reopen()) == {NAME + "2": 1}


async def test_list_gives_what_is_below_a_prefix(host: Host) -> None:
    for number, name in enumerate(["a", "b/1", "b/c/2", "bb/3", ".hidden/-_."]):
        await host.put(name, b"x" * number)
    assert await names(host) == {"a": 0, "b/1": 1, "b/c/2": 2, "bb/3": 3, ".hidden/-_.": 4}
    assert await names(host, "b/") == {"b/1": 1, "b/c/2": 2}
    assert await names(host, "b/c/") == {"b/c/2": 2}
    assert await names(host, "nothing/here/") == {}
    with pytest.raises(BadArgument):
        await names(host, "b")


@pytest.mark.parametrize(
    "name",
    ["", "/", "/a", "a/", "a//b", ".", "..", "a/..", "../a", "a/./b", "a b", "ä", "a\0b", "~tmp", "~lock", "x" * 201, "a/" * 300 + "a"],
)
async def test_what_is_no_name_is_refused_by_every_call(host: Host, name: str) -> None:
    with pytest.raises(BadArgument):
        await host.get(name, LIMIT)
    with pytest.raises(BadArgument):
        await host.get_range(name, 0, 1)
    with pytest.raises(BadArgument):
        await host.put(name, b"")
    with pytest.raises(BadArgument):
        await host.put_if(name, b"", None)
    with pytest.raises(BadArgument):
        await host.tag(name)
    with pytest.raises(BadArgument):
        await host.delete(name)
    assert await names(host) == {}


async def test_calls_at_the_same_time_do_not_mix(host: Host) -> None:
    async def one(number: int) -> None:
        data = bytes([number]) * (10_000 + number)
        for _ in range(3):
            await host.put(f"x/{number}", data)
            assert await host.get(f"x/{number}", LIMIT) == data

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(one, number)
    assert len(await names(host)) == 20


async def test_what_a_host_can_do_is_found_by_probing(host: Host, request: pytest.FixtureRequest) -> None:
    kind = request.node.callspec.params["reopen"]
    found = await probe(host, Seams())
    assert found.conditional_put == (kind in CONDITIONAL)
    assert found.ranges == ("rclone" not in kind)
    assert await names(host) == {}


async def test_what_is_directly_below_is_one_level(host: Host) -> None:
    for name in ("a", "b/1", "b/22", "b/c/3", "bb/4"):
        await host.put(name, b"x")
    assert await host.level("") == Level({"a": 1}, ["b", "bb"])
    assert await host.level("b/") == Level({"1": 1, "22": 1}, ["c"])
    assert await host.level("nothing/here/") == Level({}, [])


async def test_space_is_told_or_not(host: Host) -> None:
    space = await host.space()
    assert space is None or 0 <= space.free <= space.total


async def test_it_can_be_closed(host: Host) -> None:
    assert host.url
    await host.aclose()
