"""Rename: every case answers as the kernel's own filesystem does, and the new content is in the rename's commit."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from storage.errors import BadArgument, Exists, FusefsError, IsADirectory, NotADirectory, NotEmpty, NotFound
from storage.metadata.keys import NAME
from tests.namespace_rig import ROOT, Rig, make_rig

_libc = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD = -100
_FLAGS = {"": 0, "noreplace": 1, "exchange": 2}
_ERRNO: dict[int, type[FusefsError]] = {
    errno.ENOENT: NotFound,
    errno.EEXIST: Exists,
    errno.EINVAL: BadArgument,
    errno.ENOTEMPTY: NotEmpty,
    errno.ENOTDIR: NotADirectory,
    errno.EISDIR: IsADirectory,
}
#: What there is before each case; "=" is a hard link to the file after it.
TREE = ["f", "f2=f", "g", "empty/", "empty2/", "full/", "full/sub/", "full/x", "full/sub/deep/", "link>f", "pipe|"]
PLACES = ["f", "f2", "g", "empty", "empty2", "full", "full/sub", "full/x", "full/sub/deep", "link", "pipe"]
PLACES += ["new", "full/new", "full/sub/new", "none/x"]


def kernel_rename(old: Path, new: Path, flag: str) -> int:
    """errno of renameat2(2), or 0."""
    done = _libc.renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), _FLAGS[flag])
    return 0 if done == 0 else ctypes.get_errno()


def build(top: Path, rig: Rig) -> None:
    inos: dict[str, int] = {}
    for item in TREE:
        path, _, more = item.replace(">", "=").replace("|", "=").partition("=")
        place = top / path
        above, _, name = path.rstrip("/").rpartition("/")
        parent, raw = inos[above] if above else ROOT, name.encode()
        if item.endswith("/"):
            place.mkdir()
            inos[path.rstrip("/")] = rig.dir(raw, parent)
        elif "=" in item:
            os.link(top / more, place)
            rig.ns.link(inos[more], parent, raw)
        elif ">" in item:
            place.symlink_to(more)
            inos[path] = rig.ns.symlink(parent, raw, more.encode(), 0, 0)
        elif "|" in item:
            os.mkfifo(place)
            inos[path] = rig.ns.create(parent, raw, stat.S_IFIFO | 0o644, 0, 0)
        else:
            place.touch()
            inos[path] = rig.file(raw, parent)


def kernel_view(top: Path) -> dict[str, tuple[int, int, int]]:
    """path -> (type, links, number of the inode in order of appearance)."""
    found: dict[str, tuple[int, int, int]] = {}
    for base, dirs, files in os.walk(top):
        for name in dirs + files:
            path = Path(base) / name
            info = path.lstat()
            found[str(path.relative_to(top))] = (stat.S_IFMT(info.st_mode), info.st_nlink, info.st_ino)
    return numbered(found)


def our_view(rig: Rig) -> dict[str, tuple[int, int, int]]:
    found: dict[str, tuple[int, int, int]] = {}

    def walk(ino: int, prefix: str) -> None:
        for entry in rig.ns.entries(ino, 0, 1000):
            path = prefix + entry.name.decode()
            info = rig.ns.attributes(entry.ino)
            found[path] = (stat.S_IFMT(info.mode), info.nlink, entry.ino)
            assert entry.mode == stat.S_IFMT(info.mode)
            if stat.S_ISDIR(info.mode):
                assert rig.ns.parent_of(entry.ino) == ino
                walk(entry.ino, path + "/")

    walk(ROOT, "")
    return numbered(found)


def numbered(found: dict[str, tuple[int, int, int]]) -> dict[str, tuple[int, int, int]]:
    order: dict[int, int] = {}
    return {path: (kind, links, order.setdefault(ino, len(order))) for path, (kind, links, ino) in sorted(found.items())}


def locate(rig: Rig, path: str) -> tuple[int, bytes]:
    parts = path.encode().split(b"/")
    ino = ROOT
    for part in parts[:-1]:
        ino = rig.ns.lookup(ino, part)
    return ino, parts[-1]


@pytest.mark.parametrize("flag", ["", "noreplace", "exchange"])
async def test_every_case_is_as_the_kernels(tmp_path: Path, flag: str) -> None:
    for old in PLACES:
        for new in PLACES:
            top = tmp_path / f"{old}-{new}".replace("/", "_")
            top.mkdir()
            rig = make_rig()
            build(top, rig)
            expected = kernel_rename(top / old, top / new, flag)
            wrong: BaseException | None = None
            try:
                await rig.ns.rename(*locate(rig, old), *locate(rig, new), noreplace=flag == "noreplace", exchange=flag == "exchange")
            except FusefsError as error:
                wrong = error
            case = f"{old} -> {new} {flag}"
            if expected:
                # The kernel finds some cases wrong in more than one way; which it names first is its own affair.
                assert wrong is not None, f"{case}: should be {errno.errorcode[expected]}"
                if expected != errno.ENOTEMPTY or flag or not old.startswith(new + "/"):
                    assert type(wrong) is _ERRNO[expected], f"{case}: {errno.errorcode[expected]}, not {wrong!r}"
            else:
                assert wrong is None, f"{case}: {wrong!r}"
            assert our_view(rig) == kernel_view(top), case
            after = await rig.committed()
            assert our_view(after) == our_view(rig), case


async def test_the_new_content_is_in_the_commit_of_the_rename() -> None:
    """Breaks if the tails go with a later batch: then a crash between leaves an empty file under the old name."""
    rig = make_rig()
    old, new = rig.file(b"config"), rig.file(b"config.tmp")
    await rig.ns.append(old, b"old content")
    await rig.values.commit_all()
    await rig.ns.append(new, b"new content")
    await rig.ns.rename(ROOT, b"config.tmp", ROOT, b"config")
    pending = len(rig.store._pending)
    seen = set()
    for keep in range(pending + 1):
        after = rig.after_crash(keep)
        content = await after.content(after.ns.lookup(ROOT, b"config"))
        assert content in (b"old content", b"new content")
        seen.add(content)
    assert len(seen) == 2
    await rig.store.commit()  # Not the values: what the rename applied is enough.
    after = rig.after_crash()
    assert await after.content(after.ns.lookup(ROOT, b"config")) == b"new content"
    assert after.names() == [b"config"]
    assert after.ns.counts() == (2, len(b"new content"))


async def test_the_rename_waits_for_sectors_in_flight() -> None:
    rig = make_rig()
    rig.file(b"target")
    source = rig.file(b"source")
    await rig.ns.append(source, b"0123456789")
    value = rig.ns._inodes.get(source).rec.value
    rig.values.fly(value, 5)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.ns.rename, ROOT, b"source", ROOT, b"target")
        await wait_all_tasks_blocked()
        assert rig.names() == [b"target", b"source"]
        rig.values.land(value)
    assert rig.names() == [b"target"]
    await rig.store.commit()
    after = rig.after_crash()
    assert await after.content(after.ns.lookup(ROOT, b"target")) == b"0123456789"


async def test_an_exchange_has_the_bytes_of_the_one_that_took_off_while_the_other_was_awaited() -> None:
    """Breaks if both are settled first and handed over afterwards: what is gathered in between is in flight then, and misses the commit."""
    rig = make_rig()
    first, second = rig.file(b"first"), rig.file(b"second")
    await rig.ns.append(first, b"appended before")
    await rig.ns.append(second, b"0123456789")
    one, two = rig.ns._inodes.get(first).rec.value, rig.ns._inodes.get(second).rec.value
    rig.values.fly(two, 10)
    async with trio.open_nursery() as nursery:

        async def exchange() -> None:
            await rig.ns.rename(ROOT, b"first", ROOT, b"second", exchange=True)

        nursery.start_soon(exchange)
        await wait_all_tasks_blocked()
        rig.values.fly(one, rig.values.size_of(one))
        rig.values.land(two)
    await rig.store.commit()
    after = rig.after_crash()
    assert await after.content(after.ns.lookup(ROOT, b"second")) == b"appended before"
    assert await after.content(after.ns.lookup(ROOT, b"first")) == b"0123456789"


@pytest.mark.parametrize("what", ["source goes", "target becomes a directory", "source is another", "source is emptied"])
async def test_names_are_checked_again_after_the_wait(what: str) -> None:
    rig = make_rig()
    rig.file(b"target")
    source = rig.file(b"source")
    await rig.ns.append(source, b"0123456789")
    value = rig.ns._inodes.get(source).rec.value
    rig.values.fly(value, 5)
    wrong: list[FusefsError] = []

    async def rename() -> None:
        try:
            await rig.ns.rename(ROOT, b"source", ROOT, b"target")
        except FusefsError as error:
            wrong.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(rename)
        await wait_all_tasks_blocked()
        if what == "source goes":
            rig.ns.unlink(ROOT, b"source")
        elif what == "target becomes a directory":
            rig.ns.unlink(ROOT, b"target")
            rig.dir(b"target")
        elif what == "source is another":
            rig.ns.unlink(ROOT, b"source")
            await rig.ns.append(rig.file(b"source"), b"other")
        else:
            rig.ns.truncate(source, 0)
            await rig.ns.append(source, b"after")
        rig.values._flights.pop(value)[1].set()
    await rig.store.commit()
    after = rig.after_crash()
    if what == "source goes":
        assert [type(error) for error in wrong] == [NotFound]
    elif what == "target becomes a directory":
        assert [type(error) for error in wrong] == [IsADirectory]
    else:
        assert wrong == []
        assert await after.content(after.ns.lookup(ROOT, b"target")) == (b"other" if what == "source is another" else b"after")


async def test_a_rename_is_one_batch() -> None:
    """At every prefix of the batches there is exactly one of the names, and it has its inode."""
    rig = make_rig()
    a, b = rig.dir(b"a"), rig.dir(b"b")
    moved = rig.dir(b"moved", a)
    await rig.values.commit_all()
    await rig.ns.rename(a, b"moved", b, b"moved")
    await rig.ns.rename(b, b"moved", ROOT, b"back")
    for keep in range(len(rig.store._pending) + 1):
        after = rig.after_crash(keep)
        places = [parent for parent, name in ((a, b"moved"), (b, b"moved"), (ROOT, b"back")) if name in after.names(parent)]
        assert len(places) == 1
        assert after.ns.parent_of(moved) == places[0]
        subdirectories = sum(stat.S_ISDIR(entry.mode) for entry in after.ns.entries(places[0], 0, 9))
        assert after.ns.attributes(places[0]).nlink == 2 + subdirectories
    assert rig.keys(NAME) == 3


async def test_times_of_what_a_rename_touches() -> None:
    rig = make_rig()
    a, b = rig.dir(b"a"), rig.dir(b"b")
    ino = rig.file(b"x", a)
    before = rig.ns.attributes(ino)
    rig.clock.advance(5)
    await rig.ns.rename(a, b"x", b, b"y")
    now = rig.clock.time_ns()
    assert [rig.ns.attributes(d).mtime_ns for d in (a, b)] == [now, now]
    after = rig.ns.attributes(ino)
    assert (after.ctime_ns, after.mtime_ns) == (now, before.mtime_ns)
    assert rig.ns.path_of(ino) == b"b/y"


async def test_contradictory_flags_are_refused() -> None:
    rig = make_rig()
    rig.file(b"x")
    with pytest.raises(BadArgument):
        await rig.ns.rename(ROOT, b"x", ROOT, b"y", noreplace=True, exchange=True)
