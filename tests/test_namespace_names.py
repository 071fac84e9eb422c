"""Names, attributes, readdir, links, orphans, worm, replication, extended attributes."""

from __future__ import annotations

import stat

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import (
    BadArgument,
    Corrupt,
    Exists,
    IsADirectory,
    NameTooLong,
    NoSpace,
    NotADirectory,
    NotEmpty,
    NotFound,
    NotPermitted,
    TooManyLinks,
)
from storage.interfaces import Batch
from storage.metadata.keys import COOKIE, INODE, MAP, NAME, ORPHAN, VALUE, XATTR, u64
from storage.namespace.records import MAX_DIRECTORY_LINKS, MAX_LINKS, inode_key, name_key
from storage.replication import parse_replication
from tests.fakes import make_seams
from tests.namespace_rig import FILE, ROOT, Rig, make_rig, told

# ---- names


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"a\0b", b"/"])
async def test_what_cannot_be_a_name_is_refused(name: bytes) -> None:
    rig = make_rig()
    rig.file(b"x")
    for do in (
        lambda: rig.ns.lookup(ROOT, name),
        lambda: rig.file(name),
        lambda: rig.dir(name),
        lambda: rig.ns.symlink(ROOT, name, b"t", 0, 0),
        lambda: rig.ns.link(2, ROOT, name),
        lambda: rig.ns.unlink(ROOT, name),
        lambda: rig.ns.rmdir(ROOT, name),
    ):
        with pytest.raises(BadArgument):
            do()
    for pair in ((name, b"y"), (b"x", name)):
        with pytest.raises(BadArgument):
            await rig.ns.rename(ROOT, pair[0], ROOT, pair[1])
    assert rig.names() == [b"x"]


async def test_names_have_at_most_255_bytes_and_any_bytes() -> None:
    rig = make_rig()
    longest = bytes(range(1, 47)) + bytes(range(48, 256)) + b"x"
    assert len(longest) == 255
    ino = rig.file(longest)
    assert rig.ns.lookup(ROOT, longest) == ino
    assert rig.names() == [longest]
    with pytest.raises(NameTooLong):
        rig.file(b"x" * 256)
    with pytest.raises(NameTooLong):
        rig.ns.lookup(ROOT, b"x" * 256)
    with pytest.raises(NameTooLong):
        await rig.ns.rename(ROOT, longest, ROOT, b"x" * 256)


async def test_errors_name_the_path() -> None:
    rig = make_rig()
    deep = rig.dir(b"down", rig.dir(b"deep"))
    with pytest.raises(NotFound, match="deep/down/missing"):
        rig.ns.lookup(deep, b"missing")
    ino = rig.file(b"new\nline", deep)
    await rig.ns.append(ino, b"x")
    with pytest.raises(NotPermitted, match=r"deep/down/new\\nline: the byte at offset 0") as caught:
        await rig.ns.write(ino, 0, b"y")
    assert "\n" not in str(caught.value)


async def test_kinds_of_inodes() -> None:
    rig = make_rig()
    assert stat.S_ISREG(rig.ns.attributes(rig.ns.create(ROOT, b"plain", 0o640, 1, 2)).mode)
    pipe = rig.ns.create(ROOT, b"pipe", stat.S_IFIFO | 0o600, 1, 2)
    device = rig.ns.create(ROOT, b"null", stat.S_IFCHR | 0o666, 1, 2, rdev=0x103)
    link = rig.ns.symlink(ROOT, b"link", b"some/where", 1, 2)
    assert rig.ns.attributes(device).rdev == 0x103
    assert (rig.ns.readlink(link), rig.size(link)) == (b"some/where", 10)
    for mode in (stat.S_IFDIR, stat.S_IFLNK, 0o030000):
        with pytest.raises(BadArgument):
            rig.ns.create(ROOT, b"bad", mode | 0o644, 1, 2)
    with pytest.raises(BadArgument):
        await rig.ns.append(pipe, b"x")
    with pytest.raises(IsADirectory):
        await rig.ns.append(ROOT, b"x")
    with pytest.raises(BadArgument):
        rig.ns.readlink(pipe)
    with pytest.raises(NameTooLong):
        rig.ns.symlink(ROOT, b"bad", b"x" * 4096, 1, 2)
    with pytest.raises(NotADirectory):
        rig.ns.lookup(pipe, b"x")
    with pytest.raises(NotADirectory):
        rig.file(b"x", pipe)
    for bad in (-1, 1 << 32):
        with pytest.raises(BadArgument):
            rig.ns.create(ROOT, b"bad", FILE, bad, 0)
    assert len(rig.names()) == 4


async def test_setgid_directories_hand_down_their_group() -> None:
    rig = make_rig()
    top = rig.ns.mkdir(ROOT, b"shared", 0o2775, 1, 50)
    assert rig.ns.attributes(rig.file(b"x", top)).gid == 50
    below = rig.dir(b"sub", top)
    assert rig.ns.attributes(below).gid == 50
    assert rig.ns.attributes(below).mode & stat.S_ISGID
    assert not rig.ns.attributes(rig.dir(b"other")).mode & stat.S_ISGID


async def test_attributes_are_durable_with_the_next_commit_whoever_asks_for_it() -> None:
    rig = make_rig()
    ino, other = rig.file(b"x"), rig.file(b"y")
    await rig.values.commit_all()
    rig.clock.advance(3)
    rig.ns.set_attributes(ino, mode=0o7600, uid=7, gid=8, atime_ns=-5, mtime_ns=6)
    await rig.ns.commit(other)
    found = rig.after_crash().ns.attributes(ino)
    assert found == rig.ns.attributes(ino)
    assert (found.mode, found.uid, found.gid, found.atime_ns, found.mtime_ns) == (0o107600, 7, 8, -5, 6)
    assert found.ctime_ns == rig.clock.time_ns()
    with pytest.raises(BadArgument):
        rig.ns.set_attributes(ino, mode=0o777, mtime_ns=1 << 63)
    assert rig.ns.attributes(ino) == found


async def test_changes_in_a_directory_move_its_times() -> None:
    rig = make_rig()
    top = rig.dir(b"top")
    for step in (
        lambda: rig.file(b"f", top),
        lambda: rig.dir(b"d", top),
        lambda: rig.ns.link(rig.ns.lookup(top, b"f"), top, b"g"),
        lambda: rig.ns.unlink(top, b"f"),
        lambda: rig.ns.rmdir(top, b"d"),
    ):
        rig.clock.advance(1)
        step()
        found = rig.ns.attributes(top)
        assert found.mtime_ns == found.ctime_ns == rig.clock.time_ns()
        assert (await rig.committed()).ns.attributes(top) == found


async def test_too_many_links() -> None:
    rig = make_rig()
    ino, top = rig.file(b"f"), rig.dir(b"top")
    rig.ns._inodes.get(ino).rec.nlink = MAX_LINKS
    with pytest.raises(TooManyLinks):
        rig.ns.link(ino, ROOT, b"g")
    rig.ns._inodes.get(top).rec.nlink = MAX_DIRECTORY_LINKS
    with pytest.raises(TooManyLinks):
        rig.dir(b"sub", top)
    rig.dir(b"other")
    with pytest.raises(TooManyLinks):
        await rig.ns.rename(ROOT, b"other", top, b"other")
    assert rig.names(top) == []


async def test_links() -> None:
    rig = make_rig()
    ino = rig.file(b"f")
    top = rig.dir(b"top")
    rig.ns.link(ino, top, b"g")
    with pytest.raises(Exists):
        rig.ns.link(ino, top, b"g")
    with pytest.raises(IsADirectory):
        rig.ns.link(top, ROOT, b"h")
    await rig.ns.append(ino, b"shared")
    rig.ns.unlink(ROOT, b"f")
    # The remembered name is gone; a lookup by the other brings a path back.
    assert rig.ns.path_of(ino) is None
    assert rig.ns.lookup(top, b"g") == ino
    assert rig.ns.path_of(ino) == b"top/g"
    assert rig.ns.attributes(ino).nlink == 1
    assert await rig.content(ino) == b"shared"


async def test_inode_numbers_are_never_used_again() -> None:
    rig = make_rig()
    seen = set()
    for _ in range(5):
        for name in (b"a", b"b"):
            ino = rig.file(name)
            assert ino not in seen
            seen.add(ino)
            rig.ns.unlink(ROOT, name)
        rig = await rig.committed()


async def test_a_removed_directory_takes_nothing_in() -> None:
    rig = make_rig()
    top = rig.dir(b"top")
    ino = rig.file(b"f")
    rig.ns.pin(top)
    rig.ns.rmdir(ROOT, b"top")
    assert rig.ns.entries(top, 0, 10) == []
    for do in (lambda: rig.file(b"x", top), lambda: rig.dir(b"x", top), lambda: rig.ns.link(ino, top, b"x")):
        with pytest.raises(NotFound):
            do()
    with pytest.raises(NotFound):
        await rig.ns.rename(ROOT, b"f", top, b"x")
    rig.ns.unpin(top)
    with pytest.raises(NotFound):
        rig.ns.attributes(top)


async def test_damaged_metadata_is_said_to_be() -> None:
    rig = make_rig(cache_limit=1)
    ino, other = rig.file(b"f"), rig.file(b"g")
    await rig.values.commit_all()
    store = rig.store
    store._now[inode_key(ino)] = b"\1junk"
    store._now[name_key(ROOT, b"g")] = b"\2"
    with pytest.raises(Corrupt, match=f"inode {ino}"):
        rig.ns.attributes(ino)
    with pytest.raises(Corrupt):
        rig.ns.lookup(ROOT, b"g")
    assert rig.ns.attributes(other).nlink == 1


# ---- readdir

actions = st.sampled_from(["add", "remove", "move", "over", "swap", "read"])
listing = st.lists(st.tuples(actions, st.integers(0, 30), st.integers(0, 30)), max_size=60)


@given(listing)
@settings(max_examples=150, deadline=None)
def test_a_reader_meets_every_entry_that_stays_exactly_once(steps: list[tuple[str, int, int]]) -> None:
    """Breaks if a cookie is used twice, or if replacing or exchanging moves a name to another place."""

    async def body() -> None:
        rig = make_rig()
        for i in range(6):
            rig.file(b"stay%d" % i)
            rig.file(b"go%d" % i)
        stays = {b"stay%d" % i for i in range(6)}
        met: list[bytes] = []
        at = 0
        fresh = 0
        for what, m, n in steps:
            rest = sorted(set(rig.names()) - stays)
            if what == "add":
                fresh += 1
                rig.file(b"new%d" % fresh)
            elif what == "remove" and rest:
                rig.ns.unlink(ROOT, rest[m % len(rest)])
            elif what == "move" and rest:
                fresh += 1
                await rig.ns.rename(ROOT, rest[m % len(rest)], ROOT, b"new%d" % fresh)
            elif what == "over" and rest:
                await rig.ns.rename(ROOT, rest[m % len(rest)], ROOT, b"stay%d" % (n % 6))
            elif what == "swap":
                names = sorted(rig.names())
                await rig.ns.rename(ROOT, names[m % len(names)], ROOT, names[n % len(names)], exchange=True)
            elif what == "read":
                for entry in rig.ns.entries(ROOT, at, 1 + m % 3):
                    assert entry.cookie > at
                    at = entry.cookie
                    met.append(entry.name)
        while page := rig.ns.entries(ROOT, at, 4):
            met += [entry.name for entry in page]
            at = page[-1].cookie
        assert sorted(name for name in met if name in stays) == sorted(stays)
        assert len(set(met)) == len(met)

    trio.run(body)


# ---- orphans


async def test_a_pinned_inode_outlives_its_last_name_and_not_a_crash() -> None:
    rig = make_rig()
    ino = rig.file()
    await rig.ns.append(ino, b"still here")
    rig.ns.setxattr(ino, b"user.x", b"1")
    rig.ns.pin(ino)
    rig.ns.pin(ino)
    rig.ns.unlink(ROOT, b"file")
    assert rig.keys(ORPHAN) == 1
    await rig.ns.append(ino, b"!")
    assert await rig.content(ino) == b"still here!"
    assert await rig.ns.reap_orphans() == 0
    with pytest.raises(NotFound):
        rig.ns.link(ino, ROOT, b"again")

    after = await rig.committed()
    assert await after.content(ino) == b"still here!"
    assert await after.ns.reap_orphans() == 1
    for which in (rig, after):
        if which is rig:
            which.ns.unpin(ino)
            assert await which.content(ino) == b"still here!"
            which.ns.unpin(ino)
        with pytest.raises(NotFound):
            which.ns.attributes(ino)
        assert [which.keys(prefix) for prefix in (INODE, NAME, COOKIE, ORPHAN, MAP, VALUE, XATTR)] == [1, 0, 0, 0, 0, 0, 0]
        assert which.ns.counts() == (1, 0)


async def test_the_orphan_entry_is_in_the_batch_of_the_unlink() -> None:
    rig = make_rig()
    ino = rig.file()
    rig.ns.pin(ino)
    await rig.values.commit_all()
    rig.ns.unlink(ROOT, b"file")
    for keep in range(len(rig.store._pending) + 1):
        after = rig.after_crash(keep)
        assert (after.names() == []) == (after.keys(ORPHAN) == 1)


async def test_more_unpins_than_pins_are_refused() -> None:
    rig = make_rig()
    ino = rig.file()
    rig.ns.pin(ino)
    with pytest.raises(BadArgument):
        rig.ns.unpin(ino, 2)
    rig.ns.unpin(ino, 1)
    with pytest.raises(BadArgument):
        rig.ns.unpin(ino)
    with pytest.raises(NotFound):
        rig.ns.pin(99)


async def test_removing_frees_content_map_and_attributes() -> None:
    rig = make_rig()
    ino = rig.file()
    await rig.ns.write(ino, 100, b"x")
    rig.ns.setxattr(ino, b"user.x", b"1")
    rig.ns.unlink(ROOT, b"file")
    assert [rig.keys(prefix) for prefix in (INODE, NAME, COOKIE, ORPHAN, MAP, VALUE, XATTR)] == [1, 0, 0, 0, 0, 0, 0]


# ---- worm


async def worm_tree() -> tuple[Rig, int, int, int]:
    rig = make_rig()
    above = rig.dir(b"above")
    worm = rig.dir(b"worm", above)
    below = rig.dir(b"below", worm)
    kept = rig.file(b"kept", below)
    rig.dir(b"empty", below)
    await rig.ns.append(kept, b"kept")
    rig.file(b"outside")
    rig.dir(b"dir")
    rig.ns.set_worm(worm)
    return rig, worm, below, kept


@pytest.mark.parametrize("reopened", [False, True])
async def test_nothing_below_a_worm_directory_goes_away(reopened: bool) -> None:
    rig, worm, below, kept = await worm_tree()
    if reopened:
        rig = await rig.committed()
    above = rig.ns.lookup(ROOT, b"above")
    renames: list[tuple[int, bytes, int, bytes, bool]] = [
        (below, b"kept", below, b"other", False),
        (below, b"kept", ROOT, b"out", False),
        (ROOT, b"outside", below, b"kept", False),
        (ROOT, b"outside", below, b"kept", True),
        (below, b"kept", ROOT, b"outside", True),
        (ROOT, b"dir", below, b"empty", False),
        (worm, b"below", ROOT, b"below", False),
        (above, b"worm", ROOT, b"worm", False),
        (above, b"worm", ROOT, b"dir", True),
        (ROOT, b"dir", above, b"worm", True),
    ]
    for parent, name, new_parent, new, exchange in renames:
        with pytest.raises(NotPermitted, match="worm"):
            await rig.ns.rename(parent, name, new_parent, new, exchange=exchange)
    for do in (
        lambda: rig.ns.unlink(below, b"kept"),
        lambda: rig.ns.rmdir(below, b"empty"),
        lambda: rig.ns.rmdir(above, b"worm"),
        lambda: rig.ns.truncate(kept, 0),
    ):
        with pytest.raises(NotPermitted, match=r"above/worm"):
            do()
    assert await rig.content(kept) == b"kept"
    # What adds is fine.
    await rig.ns.append(kept, b"+")
    rig.ns.truncate(kept, 10)
    rig.ns.set_attributes(kept, mode=0o400)
    new = rig.file(b"new", below)
    rig.ns.link(new, below, b"newer")
    await rig.ns.rename(ROOT, b"outside", below, b"moved in")
    rig.dir(b"sub", worm)
    # A directory above keeps all of it, wherever it is called.
    await rig.ns.rename(ROOT, b"above", ROOT, b"higher")
    assert rig.ns.path_of(kept) == b"higher/worm/below/kept"
    # Outside nothing has changed.
    rig.ns.rmdir(ROOT, b"dir")


async def test_a_link_outside_does_not_open_a_worm_directory() -> None:
    rig, _, below, kept = await worm_tree()
    rig.ns.link(kept, ROOT, b"alias")
    outside = rig.ns.lookup(ROOT, b"outside")
    await rig.ns.append(outside, b"x")
    rig.ns.link(outside, below, b"linked in")
    await rig.ns.rename(ROOT, b"outside", ROOT, b"renamed")
    await rig.ns.rename(ROOT, b"alias", ROOT, b"alias2")
    for ino in (kept, outside):
        with pytest.raises(NotPermitted):
            rig.ns.truncate(ino, 0)
    rig.ns.unlink(ROOT, b"renamed")
    assert await rig.content(outside) == b"x"


async def test_only_directories_can_be_worm() -> None:
    rig = make_rig()
    with pytest.raises(NotADirectory):
        rig.ns.set_worm(rig.file())


# ---- replication


async def test_replication_comes_from_the_nearest_directory_that_says() -> None:
    rig = make_rig(replication="2")
    top = rig.dir(b"top")
    below = rig.dir(b"below", top)
    before = rig.file(b"before", below)
    rig.ns.set_replication(top, "3")
    rig = await rig.committed()
    assert rig.ns.replication_of(rig.file(b"x")) == "2"
    assert rig.ns.replication_of(rig.file(b"x", below)) == "3"
    assert rig.ns.replication_of(rig.ns.create(below, b"y", FILE, 0, 0, replication="04+02")) == "4+2"
    assert rig.ns.replication_of(before) == "2"
    assert [rig.ns.replication_of(ino) for ino in (ROOT, top, below)] == ["2", "3", "3"]
    ino = rig.ns.lookup(below, b"x")
    await rig.ns.append(ino, b"x")
    rig.ns.set_replication(top, "")
    rig.ns.truncate(ino, 0)
    assert rig.ns.replication_of(ino) == "3"
    with pytest.raises(BadArgument):
        rig.ns.create(below, b"z", FILE, 0, 0, replication="many")
    assert rig.keys(VALUE) == 4


async def test_the_volume_may_refuse_a_replication() -> None:
    rig = make_rig()

    def check(spec: str) -> None:
        if parse_replication(spec).hosts_needed > 2:
            raise BadArgument(f"{spec}: only two hosts")

    ns = type(rig.ns)(rig.store, rig.values, make_seams(clock=rig.clock), default_replication="1", check_replication=check)
    with pytest.raises(BadArgument, match="only two"):
        ns.create(ROOT, b"x", FILE, 0, 0, replication="3")
    with pytest.raises(BadArgument, match="only two"):
        ns.set_replication(ROOT, "3")
    ns.create(ROOT, b"x", FILE, 0, 0, replication="2")


# ---- extended attributes


async def test_xattrs() -> None:
    rig = make_rig()
    ino = rig.file()
    assert rig.ns.listxattr(ino) == []
    with pytest.raises(NotFound):
        rig.ns.getxattr(ino, b"user.a")
    rig.ns.setxattr(ino, b"user.b", b"2")
    rig.ns.setxattr(ino, b"user.a", b"\0\xff", create=True)
    with pytest.raises(Exists):
        rig.ns.setxattr(ino, b"user.a", b"1", create=True)
    with pytest.raises(NotFound):
        rig.ns.setxattr(ino, b"user.c", b"1", replace=True)
    rig.ns.setxattr(ino, b"user.b", b"", replace=True)
    rig = await rig.committed()
    assert rig.ns.listxattr(ino) == [b"user.a", b"user.b"]
    assert rig.ns.getxattr(ino, b"user.a") == b"\0\xff"
    assert rig.ns.getxattr(ino, b"user.b") == b""
    rig.ns.removexattr(ino, b"user.a")
    rig.ns.removexattr(ino, b"user.b")
    with pytest.raises(NotFound):
        rig.ns.removexattr(ino, b"user.b")
    assert rig.ns.listxattr(ino) == []
    for name, kind in ((b"", BadArgument), (b"a\0", BadArgument), (b"x" * 256, NameTooLong)):
        with pytest.raises(kind):
            rig.ns.setxattr(ino, name, b"")
    with pytest.raises(NoSpace):
        rig.ns.setxattr(ino, b"user.a", bytes(65_537))
    for i in range(256):
        rig.ns.setxattr(ino, b"%0255d" % i, b"")
    with pytest.raises(NoSpace):
        rig.ns.setxattr(ino, b"user.a", b"")


# ---- bounds


async def test_memory_does_not_grow_with_what_was_looked_at() -> None:
    rig = make_rig(cache_limit=10)
    for i in range(200):
        rig.file(b"%d" % i)
    await rig.values.commit_all()
    for entry in rig.ns.entries(ROOT, 0, 1000):
        rig.ns.attributes(entry.ino)
    table = rig.ns._inodes
    assert len(table._cache) <= 10
    assert len(table._live) <= 11
    assert len(table._dirty) == 0


async def test_too_many_dirty_records_go_to_the_store_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.namespace.inodes.DIRTY_LIMIT", 5)
    rig = make_rig()
    inos = [rig.file(b"%d" % i) for i in range(20)]
    for ino in inos:
        await rig.ns.append(ino, b"x")
        assert len(rig.ns._inodes._dirty) <= 6
    for offset in (1, 2):
        for ino in inos:
            assert rig.ns.write_now(ino, offset, b"x")
            assert len(rig.ns._inodes._dirty) <= 6


async def test_rmdir_needs_an_empty_directory() -> None:
    rig = make_rig()
    top = rig.dir(b"top")
    rig.file(b"x", top)
    with pytest.raises(NotEmpty):
        rig.ns.rmdir(ROOT, b"top")
    with pytest.raises(NotADirectory):
        rig.ns.rmdir(top, b"x")
    rig.ns.unlink(top, b"x")
    assert rig.ns.rmdir(ROOT, b"top") == top
    assert rig.ns.attributes(ROOT).nlink == 2


# ---- listing


async def test_what_lists_a_directory_drives_nothing_out_of_memory() -> None:
    rig = make_rig()
    for number in range(100):
        ino = rig.file(b"%03d" % number)
        await rig.ns.write(ino, 0, bytes(number))
    rig = await rig.committed()
    busy = [rig.ns.find(ROOT, b"%03d" % number) for number in range(10)]
    held = dict(rig.ns._inodes._cache)
    listed = rig.ns.listing(ROOT, 0, 1000)
    assert list(zip(listed.names, listed.sizes, strict=True)) == [(b"%03d" % number, number) for number in range(100)]
    assert dict(rig.ns._inodes._cache) == held
    assert set(held) >= set(busy)


async def test_what_is_listed_is_as_it_is_in_memory_where_it_is_newer() -> None:
    rig = make_rig()
    ino = rig.file(b"a")
    rig.ns.pin(ino)
    await rig.values.commit_all()
    await rig.ns.write(ino, 0, b"more")
    rig.ns.set_attributes(ino, mode=0o600, mtime_ns=77)
    listed = rig.ns.listing(ROOT, 0, 10)
    (attributes,) = told(listed)
    assert (listed.names, attributes) == ([b"a"], rig.ns.attributes(ino))
    assert (attributes.size, attributes.mtime_ns) == (4, 77)
    # Also one that left the cache while somebody holds it, and is not durable yet.
    for number in range(50):
        rig.file(b"%d" % number)
    assert ino not in rig.ns._inodes._cache
    assert rig.ns.listing(ROOT, 0, 1).sizes[0] == 4


async def test_a_listed_inode_without_a_record_is_damage_not_a_gap() -> None:
    rig = make_rig()
    ino = rig.file(b"a")
    value = rig.ns._inodes.get(ino).rec.value
    rig = await rig.committed()
    batch = Batch()
    batch.delete(VALUE + u64(value))
    rig.store.apply(batch)
    with pytest.raises(Corrupt, match="value"):
        rig.ns.listing(ROOT, 0, 10)
    batch = Batch()
    batch.delete(inode_key(ino))
    rig.store.apply(batch)
    # Not NotFound: that is what a directory says that was removed while it is listed, and then it is shown as empty.
    with pytest.raises(Corrupt, match=f"inode {ino}"):
        rig.ns.listing(ROOT, 0, 10)


async def test_forgetting_what_has_a_name_looks_at_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make_rig()
    ino = rig.file(b"a")
    rig = await rig.committed()
    rig.ns.pin_seen(ino)
    with monkeypatch.context() as context:
        context.setattr(rig.ns._inodes, "get", lambda ino: pytest.fail(f"inode {ino} was fetched"))
        rig.ns.unpin(ino)
    # One that lost its name is looked at, and goes.
    rig.ns.pin_seen(ino)
    rig.ns.unlink(ROOT, b"a")
    assert rig.ns.attributes(ino).nlink == 0
    rig.ns.unpin(ino)
    with pytest.raises(NotFound):
        rig.ns.attributes(ino)
    assert rig.keys(ORPHAN) == 0


async def test_an_orphan_of_an_earlier_process_that_is_pinned_again_goes_with_the_last_pin() -> None:
    rig = make_rig()
    ino = rig.file(b"a")
    rig.ns.pin(ino)
    rig.ns.unlink(ROOT, b"a")
    rig = await rig.committed()
    rig.ns.pin(ino)
    rig.ns.unpin(ino)
    assert rig.keys(ORPHAN) == 0
    assert rig.keys(INODE) == 1


async def test_looking_for_a_name_that_is_not_there_is_no_error() -> None:
    rig = make_rig()
    ino = rig.file(b"a")
    assert rig.ns.find(ROOT, b"a") == ino
    assert rig.ns.find(ROOT, b"b") is None
    with pytest.raises(NotADirectory):
        rig.ns.find(ino, b"b")
    with pytest.raises(NameTooLong):
        rig.ns.find(ROOT, b"x" * 256)
