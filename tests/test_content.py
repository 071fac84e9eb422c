"""Content under concurrency: writers take turns, what waits finds out that the world changed, all or nothing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from storage.errors import BadArgument, Busy, Fenced, FusefsError, NotFound, NotPermitted
from storage.metadata.keys import VALUE
from tests.namespace_rig import ROOT, Rig, make_rig


def caught(into: list[FusefsError], call: Callable[[], Awaitable[object]]) -> Callable[[], Awaitable[None]]:
    async def run() -> None:
        try:
            await call()
        except FusefsError as error:
            into.append(error)

    return run


async def held(rig: Rig, *calls: Callable[[], Awaitable[object]], meanwhile: Callable[[], object] | None = None) -> list[FusefsError]:
    """Run all at once, every one stopped in `reserve` (or behind one that is); then do `meanwhile`, then let them go."""
    wrong: list[FusefsError] = []
    rig.values.hold = trio.Event()
    async with trio.open_nursery() as nursery:
        for call in calls:
            nursery.start_soon(caught(wrong, call))
            await wait_all_tasks_blocked()
        if meanwhile is not None:
            meanwhile()
        rig.values.hold.set()
    rig.values.hold = None
    return wrong


async def test_writes_that_wait_for_memory_stay_in_order() -> None:
    """Breaks if the second write sees the first one's place as a hole."""
    rig = make_rig()
    ino = rig.file()
    assert not await held(rig, *(lambda i=i: rig.ns.write(ino, i * 2, b"%02d" % i) for i in range(5)))  # type: ignore[misc]
    assert await rig.content(ino) == b"0001020304"
    assert rig.ns._inodes.get(ino).rec.map == 0
    assert rig.ns._content._locks == {}


async def test_what_goes_on_is_written_at_once_and_nothing_else_is() -> None:
    """Breaks if something is stored that `write` would refuse, would have to wait for, or would put elsewhere."""
    rig = make_rig()
    ino, mapped = rig.file(), rig.file(b"mapped")
    now = rig.ns.write_now
    assert now(ino, 0, b"abc")
    assert now(ino, 3, b"def")
    assert now(ino, 2, b"cdefgh")  # a page sent again
    assert (await rig.content(ino), rig.size(ino)) == (b"abcdefgh", 8)
    await rig.ns.write(mapped, 2, b"cd")
    before = rig.values.appended
    rig.values.full = True
    assert not now(ino, 8, b"x")
    rig.values.full = False
    rig.values.hold_reads = trio.Event()
    assert not now(ino, 7, b"hx")
    rig.values.hold_reads = None
    # Beyond the end, other bytes, nothing new, nothing at all, before the beginning; not a straight file, no file, none any more.
    for target, offset, data in (
        (ino, 9, b"x"),
        (ino, 7, b"xx"),
        (ino, 6, b"gh"),
        (ino, 8, b""),
        (ino, -1, b"x"),
        (mapped, 4, b"x"),
        (ROOT, 0, b"x"),
        (999, 0, b"x"),
    ):
        assert not now(target, offset, data), (target, offset, data)
    # Somebody else's turn.
    outcome: list[bool] = []
    assert not await held(rig, lambda: rig.ns.write(ino, 8, b"ij"), meanwhile=lambda: outcome.append(now(ino, 8, b"ij")))
    assert outcome == [False]
    assert await rig.content(ino) == b"abcdefghij"
    assert rig.values.appended == before + 2


async def test_appends_at_once_stand_one_after_the_other() -> None:
    rig = make_rig()
    ino = rig.file()
    places: list[int] = []

    async def append(data: bytes) -> None:
        places.append(await rig.ns.append(ino, data))

    assert not await held(rig, lambda: append(b"aa"), lambda: append(b"b"), lambda: append(b"cc"))
    assert (places, await rig.content(ino)) == ([0, 2, 3], b"aabcc")


async def test_of_two_writers_of_one_byte_the_second_is_refused() -> None:
    rig = make_rig()
    ino = rig.file()
    wrong = await held(rig, lambda: rig.ns.write(ino, 0, b"aaaa"), lambda: rig.ns.write(ino, 2, b"bbbb"))
    assert [type(error) for error in wrong] == [NotPermitted]
    assert "offset 2 " in str(wrong[0])
    assert await rig.content(ino) == b"aaaa"


@pytest.mark.parametrize("mapped", [False, True])
async def test_a_file_emptied_while_a_write_waits(mapped: bool) -> None:
    rig = make_rig(cache_limit=2)
    ino = rig.file()
    await rig.ns.write(ino, 8 if mapped else 0, b"old")
    at = rig.size(ino)
    await rig.values.commit_all()

    def meanwhile() -> None:
        # The record leaves the cache first: who waits and who empties must still mean the same inode.
        for i in range(5):
            rig.file(b"other%d" % i)
        rig.ns.truncate(ino, 0)

    assert not await held(rig, lambda: rig.ns.write(ino, at, b"new"), meanwhile=meanwhile)
    assert await rig.content(ino) == bytes(at) + b"new"
    assert (await rig.content(ino), rig.keys(VALUE)) == (await (await rig.committed()).content(ino), 6)


async def test_a_file_made_longer_while_a_write_waits() -> None:
    rig = make_rig()
    ino = rig.file()
    await rig.ns.append(ino, b"abc")
    wrong = await held(
        rig, lambda: rig.ns.write(ino, 3, b"def"), lambda: rig.ns.append(ino, b"end"), meanwhile=lambda: rig.ns.truncate(ino, 10)
    )
    assert wrong == []
    assert await rig.content(ino) == b"abcdef\0\0\0\0end"


async def test_a_file_removed_while_a_write_waits() -> None:
    rig = make_rig()
    ino = rig.file()
    wrong = await held(
        rig, lambda: rig.ns.write(ino, 0, b"x"), lambda: rig.ns.append(ino, b"y"), meanwhile=lambda: rig.ns.unlink(ROOT, b"file")
    )
    assert [type(error) for error in wrong] == [NotFound, NotFound]
    assert rig.ns._content._locks == {}
    assert rig.keys(VALUE) == 0


async def test_a_write_that_is_cancelled_lets_the_next_one_through() -> None:
    rig = make_rig()
    ino = rig.file()
    rig.values.hold = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.ns.append, ino, b"never")
        await wait_all_tasks_blocked()
        nursery.start_soon(rig.ns.append, ino, b"never either")
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    rig.values.hold = None
    assert rig.ns._content._locks == {}
    await rig.ns.append(ino, b"this")
    assert await rig.content(ino) == b"this"


async def test_nothing_of_a_refused_write_is_stored() -> None:
    rig = make_rig()
    ino = rig.file()
    await rig.ns.write(ino, 2, b"cc")
    before = rig.ns.attributes(ino)
    rig.clock.advance(1)
    with pytest.raises(NotPermitted, match="offset 3 "):
        await rig.ns.write(ino, 0, b"aacXdd")
    rig.values.full = True
    with pytest.raises(Busy):
        await rig.ns.write(ino, 0, b"aaccdd")
    with pytest.raises(Busy):
        await rig.ns.append(ino, b"dd")
    assert rig.ns.attributes(ino) == before
    # Bytes that repeat what is stored need no room.
    await rig.ns.write(ino, 2, b"cc")
    rig.values.full = False
    await rig.ns.write(ino, 0, b"aaccdd")
    assert await rig.content(ino) == b"aaccdd"


@pytest.mark.parametrize("mapped", [False, True])
async def test_a_reader_of_a_file_that_is_emptied_gets_old_or_new_and_no_error(mapped: bool) -> None:
    rig = make_rig()
    ino = rig.file()
    await rig.ns.write(ino, 4 if mapped else 0, b"old")
    rig.values.hold_reads = trio.Event()
    got: list[bytes] = []

    async def read() -> None:
        got.append(await rig.ns.read(ino, 0, 100))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        rig.ns.truncate(ino, 0)
        await rig.ns.append(ino, b"new")
        rig.values.hold_reads.set()
    assert got == [b"new"]


async def test_a_comparison_with_a_file_that_is_emptied_starts_again() -> None:
    rig = make_rig()
    ino = rig.file()
    await rig.ns.append(ino, b"old")
    rig.values.hold_reads = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.ns.write, ino, 0, b"newer")
        await wait_all_tasks_blocked()
        rig.ns.truncate(ino, 0)
        rig.values.hold_reads.set()
    assert await rig.content(ino) == b"newer"


async def test_emptying_is_one_batch() -> None:
    rig = make_rig()
    ino = rig.file()
    await rig.ns.write(ino, 5, b"old")
    await rig.values.commit_all()
    rig.ns.truncate(ino, 0)
    contents = []
    for keep in range(len(rig.store._pending) + 1):
        after = rig.after_crash(keep)
        assert after.keys(VALUE) == 1
        contents.append(await after.content(ino))
    assert set(contents) == {b"\0\0\0\0\0old", b""}


@pytest.mark.parametrize("what", ["truncate", "unlink", "rename"])
async def test_a_store_that_refuses_loses_no_tail(what: str) -> None:
    """Breaks if values are told to free or hand over their bytes before it is known that the store takes the batch."""
    rig = make_rig()
    ino, other = rig.file(), rig.file(b"other")
    await rig.ns.append(ino, b"kept")
    await rig.ns.append(other, b"too")
    rig.store.failed = True
    told: list[str] = []
    rig.values.free = lambda batch, value: told.append("free")  # type: ignore[method-assign]
    rig.values.uncommitted_tail = lambda value: told.append("tail") or []  # type: ignore[method-assign,func-returns-value]

    async def do() -> None:
        if what == "truncate":
            rig.ns.truncate(ino, 0)
        elif what == "unlink":
            rig.ns.unlink(ROOT, b"file")
        else:
            await rig.ns.rename(ROOT, b"other", ROOT, b"file")

    with pytest.raises(Fenced):
        await do()
    assert told == []
    assert rig.names() == [b"file", b"other"]
    assert await rig.content(ino) == b"kept"


@pytest.mark.parametrize("mapped", [False, True])
async def test_fsync_keeps_content_attributes_and_names(mapped: bool) -> None:
    rig = make_rig()
    ino = rig.file(b"name", rig.dir(b"top"))
    await rig.ns.write(ino, 3 if mapped else 0, b"content")
    await rig.ns.commit(ino)
    after = rig.after_crash()
    assert await after.content(after.ns.lookup(after.ns.lookup(ROOT, b"top"), b"name")) == (b"\0\0\0" if mapped else b"") + b"content"
    assert after.ns.attributes(ino) == rig.ns.attributes(ino)
    rig.dir(b"other")
    await rig.ns.commit(ROOT)
    assert rig.after_crash().names() == [b"top", b"other"]


async def test_sizes_beyond_what_a_file_can_have_are_refused() -> None:
    rig = make_rig()
    ino = rig.file()
    top = 2**63 - 1
    await rig.ns.write(ino, top - 1, b"x")
    assert rig.size(ino) == top
    for call in (
        lambda: rig.ns.write(ino, top, b"x"),
        lambda: rig.ns.append(ino, b"x"),
        lambda: rig.ns.write(ino, -1, b"x"),
        lambda: rig.ns.read(ino, -1, 1),
    ):
        with pytest.raises(BadArgument):
            await call()
    for size in (-1, 2**63):
        with pytest.raises(BadArgument):
            rig.ns.truncate(ino, size)
    await rig.ns.write(ino, 0, b"")
    assert await rig.ns.read(ino, 0, 0) == b""
    assert await rig.ns.read(ino, top, 5) == b""


async def test_last_page_local() -> None:
    rig = make_rig()
    ino = rig.file()
    assert rig.ns.last_page_local(ino)
    await rig.ns.append(ino, bytes(5000))
    assert rig.ns.last_page_local(ino)
    rig.values.remote = {4999}
    assert not rig.ns.last_page_local(ino)
    rig.values.remote = {0, 4095}
    assert rig.ns.last_page_local(ino)
    rig.values.remote = {4999}
    rig.ns.truncate(ino, 20_000)
    assert rig.ns.last_page_local(ino)
    # A file that ends with its page: the next append begins another.
    rig.values.remote = set(range(5000))
    other = rig.file(b"other")
    await rig.ns.append(other, bytes(4096))
    assert rig.ns.last_page_local(other)
