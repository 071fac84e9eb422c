"""What every implementation of `storage.interfaces.Files` promises. Each check gets an empty one.

@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_files(check): async with make_files() as files: await check(files)
"""

from __future__ import annotations

import pytest
import trio

from storage.errors import BadArgument, Exists, IsADirectory, NotADirectory, NotFound, NotPermitted
from storage.interfaces import Files


async def put(files: Files, name: str, data: bytes) -> None:
    fd = await files.open(name, write=True)
    await files.append(fd, data)
    await files.close(fd)


async def get(files: Files, name: str) -> bytes:
    fd = await files.open(name, existing=True)
    data = await files.read_at(fd, 0, 1 << 20)
    await files.close(fd)
    return data


async def what_is_appended_can_be_read(files: Files) -> None:
    fd = await files.open("a", write=True)
    for part in (b"one", bytearray(b"two"), memoryview(b"three"), b""):
        await files.append(fd, part)
    assert await files.size_of(fd) == 11
    assert await files.read_at(fd, 0, 100) == b"onetwothree"
    assert await files.read_at(fd, 3, 3) == b"two"
    assert await files.read_at(fd, 11, 5) == b""
    assert await files.read_at(fd, 500, 5) == b""
    assert await files.read_at(fd, 0, 0) == b""
    await files.close(fd)
    assert await get(files, "a") == b"onetwothree"


async def data_may_be_changed_by_the_caller_after_append(files: Files) -> None:
    fd = await files.open("a", write=True)
    data = bytearray(b"good")
    await files.append(fd, data)
    data[:] = b"evil"
    assert await files.read_at(fd, 0, 4) == b"good"


async def existing_says_what_must_be_there(files: Files) -> None:
    with pytest.raises(NotFound, match="missing"):
        await files.open("missing", existing=True)
    assert await files.list() == {}
    await files.close(await files.open("a", existing=False))
    with pytest.raises(Exists, match="'a'"):
        await files.open("a", existing=False)
    await files.close(await files.open("a", existing=True))
    await files.close(await files.open("a"))
    assert await files.list() == {"a": 0}


async def a_descriptor_allows_what_it_was_opened_for(files: Files) -> None:
    fd = await files.open("a", write=False)
    with pytest.raises(NotPermitted):
        await files.append(fd, b"x")
    await files.close(fd)
    fd = await files.open("a", write=True, read=False)
    await files.append(fd, b"x")
    with pytest.raises(NotPermitted):
        await files.read_at(fd, 0, 1)
    await files.close(fd)
    with pytest.raises(BadArgument):
        await files.open("b", write=False, read=False)
    assert await files.list() == {"a": 1}


async def a_closed_descriptor_is_of_no_use(files: Files) -> None:
    fd = await files.open("a", write=True)
    await files.close(fd)
    for unknown in (fd, 0, -1, 10**9):
        with pytest.raises(NotFound):
            await files.append(unknown, b"x")
        with pytest.raises(NotFound):
            await files.read_at(unknown, 0, 1)
        with pytest.raises(NotFound):
            await files.size_of(unknown)
        with pytest.raises(NotFound):
            await files.commit(unknown)
        with pytest.raises(NotFound):
            await files.close(unknown)
    assert await files.open("a") != fd


async def every_descriptor_sees_every_byte(files: Files) -> None:
    first, second = await files.open("a", write=True), await files.open("a", write=True)
    await files.append(first, b"1")
    assert await files.read_at(second, 0, 9) == b"1"
    await files.append(second, b"2")
    assert (await files.read_at(first, 0, 9), await files.size_of(first)) == (b"12", 2)


async def appends_from_many_tasks_stay_whole(files: Files) -> None:
    async def append(letter: bytes) -> None:
        fd = await files.open("shared", write=True)
        for _ in range(20):
            await files.append(fd, letter * 10)
        await files.close(fd)

    async with trio.open_nursery() as nursery:
        for letter in (b"a", b"b", b"c"):
            nursery.start_soon(append, letter)
    data = await get(files, "shared")
    pieces = [data[i : i + 10] for i in range(0, len(data), 10)]
    assert sorted(pieces) == sorted([b"a" * 10, b"b" * 10, b"c" * 10] * 20)


async def directories_are_made_and_stay(files: Files) -> None:
    await put(files, "logs/app/today", b"x")
    assert await files.list() == {"logs/app/today": 1}
    await files.delete("logs/app/today")
    assert await files.list() == {}
    with pytest.raises(IsADirectory):
        await files.open("logs/app")
    with pytest.raises(IsADirectory):
        await files.delete("logs")
    await put(files, "file", b"")
    with pytest.raises(NotADirectory):
        await files.open("file/below")
    with pytest.raises(NotFound):
        await files.open("none/below", existing=True)
    assert await files.list() == {"file": 0}


async def what_cannot_be_a_name_is_refused(files: Files) -> None:
    for name in ("", "/", "/a", "a/", "a//b", ".", "a/..", "a/./b", "a\0b", "x" * 256, "\ud800"):
        with pytest.raises(BadArgument):
            await files.open(name)
        with pytest.raises(BadArgument):
            await files.delete(name)
    assert await files.list() == {}


async def names_may_have_any_other_bytes(files: Files) -> None:
    names = ["space and\nline", "\u00e4/\u65e5\u672c", "bytes \udcff\udc80", "-", "..."]
    for name in names:
        await put(files, name, name.encode("utf-8", "surrogateescape"))
    assert sorted(await files.list()) == sorted(names)
    for name in names:
        assert await get(files, name) == name.encode("utf-8", "surrogateescape")


async def delete_removes_and_open_descriptors_go_on(files: Files) -> None:
    with pytest.raises(NotFound):
        await files.delete("a")
    await put(files, "a", b"old")
    fd = await files.open("a", write=True)
    await files.delete("a")
    assert await files.list() == {}
    with pytest.raises(NotFound):
        await files.delete("a")
    await files.append(fd, b"er")
    assert await files.read_at(fd, 0, 9) == b"older"
    await put(files, "a", b"new")
    assert await files.read_at(fd, 0, 9) == b"older"
    await files.close(fd)
    assert await get(files, "a") == b"new"


async def entries_with_a_prefix(files: Files) -> None:
    names = ["a", "ab", "a/x", "b/c/d", "b/c/e", "b/cc", "b/d"]
    names.remove("a/x")  # "a" is a file here
    for name in names:
        await put(files, name, name.encode())
    for prefix in ("", "a", "ab", "abc", "b", "b/", "b/c", "b/c/", "b/c/d", "b/c/d/", "c", "a/", "/", "b//", "../"):
        found = [entry async for entry in files.entries(prefix)]
        assert sorted(found) == [(name, len(name)) for name in sorted(names) if name.startswith(prefix)], prefix


async def entries_of_a_directory_that_changes(files: Files) -> None:
    for i in range(600):
        await put(files, f"d/stay{i:04}", b"x")
        await put(files, f"d/go{i:04}", b"")
    seen = []
    async for name, _ in files.entries():
        seen.append(name)
        if len(seen) % 7 == 0:
            await files.delete(f"d/go{599 - len(seen) // 7:04}")
            await put(files, f"d/stay-new{len(seen)}", b"")
    assert len(set(seen)) == len(seen)
    assert {f"d/stay{i:04}" for i in range(600)} <= set(seen)


async def replication_is_the_files_own(files: Files) -> None:
    fd = await files.open("a", write=True, replication="1")
    for same in ("1", "", None):
        await files.close(await files.open("a", replication=same))
    with pytest.raises(BadArgument, match="replication"):
        await files.open("a", replication="2")
    with pytest.raises(BadArgument):
        await files.open("b", replication="many")
    assert await files.list() == {"a": 0}
    await files.close(fd)


async def commit_returns(files: Files) -> None:
    fd = await files.open("a", write=True)
    await files.append(fd, b"x")
    await files.commit(fd)
    assert await files.read_at(fd, 0, 1) == b"x"


CHECKS = [
    what_is_appended_can_be_read,
    data_may_be_changed_by_the_caller_after_append,
    existing_says_what_must_be_there,
    a_descriptor_allows_what_it_was_opened_for,
    a_closed_descriptor_is_of_no_use,
    every_descriptor_sees_every_byte,
    appends_from_many_tasks_stay_whole,
    directories_are_made_and_stay,
    what_cannot_be_a_name_is_refused,
    names_may_have_any_other_bytes,
    delete_removes_and_open_descriptors_go_on,
    entries_with_a_prefix,
    entries_of_a_directory_that_changes,
    replication_is_the_files_own,
    commit_returns,
]
