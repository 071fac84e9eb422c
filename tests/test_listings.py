"""`fusefs.listings`: what readdir sends next is fetched ahead, and sent only if nothing has changed since."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pyfuse3
import pytest

from fusefs import listings as listings_module
from fusefs.entries import entry_of
from fusefs.listings import FETCH_FIRST, FETCH_LEAST, FETCH_MOST, NOTHING, Listings, Page
from fusefs.operations import Operations
from fusefs.receiver import Receiver
from storage.errors import Corrupt, FusefsError, NotFound
from tests.namespace_rig import ROOT, Rig, make_rig


class Watched:
    """A namespace that counts how often it was asked for a listing."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.asked: list[tuple[int, int, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def listing(self, ino: int, after: int, limit: int) -> Any:
        self.asked.append((ino, after, limit))
        return self._inner.listing(ino, after, limit)


def row(cookie: int, name: bytes, e: pyfuse3.EntryAttributes) -> tuple[object, ...]:
    """What the kernel is told."""
    return (
        *(cookie, name, e.st_ino, e.st_mode, e.st_nlink, e.st_uid, e.st_gid, e.st_size, e.st_blocks),
        *(e.st_atime_ns, e.st_mtime_ns, e.st_ctime_ns),
    )


def shown(page: Page) -> list[tuple[object, ...]]:
    """What a page says, which it does once."""
    return [row(cookie, name, e) for cookie, name, e in zip(page.cookies, page.names, page.entries, strict=True)]


def listed(rig: Rig, ino: int, after: int, count: int) -> list[tuple[object, ...]]:
    """What a page should say."""
    found = rig.ns.listing(ino, after, count)
    return [
        row(cookie, name, entry_of(rig.ns.attributes(number)))
        for name, number, cookie in zip(found.names, found.inos, found.cookies, strict=True)
    ]


def ahead(rig: Rig) -> tuple[Listings, Watched]:
    """Listings, and what they ask."""
    watched = Watched(rig.ns)
    return Listings(watched), watched


def filled(count: int) -> Rig:
    rig = make_rig()
    for number in range(count):
        rig.file(b"%03d" % number)
    return rig


async def test_where_a_reply_was_full_the_next_page_is_there_when_it_is_asked_for() -> None:
    rig = filled(100)
    listings, watched = ahead(rig)
    page = listings.first(ROOT, 0)
    assert list(page.names) == [b"%03d" % number for number in range(100)]
    listings.go_on(ROOT, page.cookies[39], 40)
    whole = shown(page)
    # As many as fitted, the dots of a first reply, and the one that shows that it is full.
    assert watched.asked == [(ROOT, 0, FETCH_FIRST), (ROOT, page.cookies[39], 43)]
    assert shown(listings.first(ROOT, page.cookies[39])) == whole[40:83]
    assert len(watched.asked) == 2
    # It is sent once.
    assert shown(listings.first(ROOT, page.cookies[39])) == whole[40:83]
    assert len(watched.asked) == 3


@pytest.mark.parametrize("beside", [True, False])
async def test_what_is_fetched_ahead_is_made_ready_where_the_program_is_at_work_meanwhile(
    monkeypatch: pytest.MonkeyPatch, beside: bool
) -> None:
    """Else the request fills it in, which is quicker. It says the same."""
    # The next request comes right away, or only after what a reply takes.
    monkeypatch.setattr(listings_module, "BESIDE", 1000.0 if beside else 0.0)
    rig = filled(200)
    listings, _ = ahead(rig)
    page = listings.first(ROOT, 0)
    whole = shown(page)
    at = 39
    for _ in range(3):
        listings.go_on(ROOT, page.cookies[at], 40)
        following = listings.first(ROOT, page.cookies[at])
        ready = isinstance(following.entries, list)
        assert shown(following) == whole[at + 1 : at + 44]
        at += 40
    assert ready is beside


@pytest.mark.parametrize("change", ["write", "chmod", "create", "unlink", "rename", "truncate", "link"])
async def test_what_was_fetched_ahead_is_not_sent_once_anything_has_changed(change: str) -> None:
    rig = filled(60)
    ino = rig.ns.lookup(ROOT, b"050")
    await rig.ns.write(rig.ns.lookup(ROOT, b"051"), 0, b"full")
    listings, watched = ahead(rig)
    page = listings.first(ROOT, 0)
    at = page.cookies[39]
    before = shown(page)[40:83]
    listings.go_on(ROOT, at, 40)
    if change == "write":
        await rig.ns.write(ino, 0, b"more")
    elif change == "chmod":
        rig.ns.set_attributes(ino, mode=0o600)
    elif change == "create":
        rig.file(b"new")
    elif change == "unlink":
        rig.ns.unlink(ROOT, b"050")
    elif change == "rename":
        await rig.ns.rename(ROOT, b"050", ROOT, b"renamed")
    elif change == "truncate":
        rig.ns.truncate(rig.ns.lookup(ROOT, b"051"), 0)
    else:
        rig.ns.link(ino, ROOT, b"another")
    asked = len(watched.asked)
    assert shown(listings.first(ROOT, at)) == listed(rig, ROOT, at, 43) != before
    # Not what was fetched before: some of that is as it is in memory, and changes with it.
    assert (ROOT, at, 43) in watched.asked[asked:]


async def test_another_place_is_fetched_when_it_is_asked_for() -> None:
    rig = filled(60)
    below = rig.dir(b"sub")
    rig.file(b"x", below)
    listings, _ = ahead(rig)
    page = listings.first(ROOT, 0)
    listings.go_on(ROOT, page.cookies[39], 40)
    assert list(listings.first(below, 0).names) == [b"x"]
    assert shown(listings.first(ROOT, page.cookies[9])) == listed(rig, ROOT, page.cookies[9], 43)


async def test_how_much_is_fetched_follows_how_much_fits_within_bounds() -> None:
    rig = filled(5)
    listings, watched = ahead(rig)
    for sent, wanted in ((0, FETCH_LEAST), (100, 103), (1_000_000, FETCH_MOST)):
        listings.go_on(ROOT, 1, sent)
        assert watched.asked[-1] == (ROOT, 1, wanted)


async def test_what_cannot_be_listed_is_said_when_it_is_asked_for_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = filled(60)
    listings, watched = ahead(rig)
    page = listings.first(ROOT, 0)
    whole = shown(page)
    with monkeypatch.context() as context:

        def broken(ino: int, after: int, limit: int) -> Any:
            raise ZeroDivisionError("a bug, on purpose")

        context.setattr(watched, "listing", broken)
        listings.go_on(ROOT, page.cookies[39], 40)
        with pytest.raises(ZeroDivisionError):
            listings.first(ROOT, page.cookies[39])
    assert shown(listings.first(ROOT, page.cookies[39])) == whole[40:]


async def test_the_end_is_known_when_it_is_reached_and_what_comes_after_it_is_seen() -> None:
    rig = filled(60)
    listings, watched = ahead(rig)
    page = listings.first(ROOT, 0)
    assert listings.ended
    listings.done(ROOT, page.cookies[-1])
    assert listings.first(ROOT, page.cookies[-1]) is NOTHING
    assert len(watched.asked) == 1
    listings.done(ROOT, page.cookies[-1])
    rig.file(b"later")
    assert list(listings.first(ROOT, page.cookies[-1]).names) == [b"later"]
    # A page as long as was asked for may be followed by others.
    listings.go_on(ROOT, 0, 27)
    assert len(listings.first(ROOT, 0).names) == FETCH_LEAST
    assert not listings.ended
    assert len(listings.more(ROOT, page.cookies[29]).names) == FETCH_LEAST
    assert not listings.ended
    assert listings.more(ROOT, page.cookies[59]).names[0] == b"later"
    assert listings.ended


async def test_of_two_that_list_the_later_has_its_page_and_the_other_loses_nothing() -> None:
    rig = filled(100)
    listings, watched = ahead(rig)
    page = listings.first(ROOT, 0)
    whole = shown(page)
    listings.go_on(ROOT, page.cookies[9], 30)
    listings.go_on(ROOT, page.cookies[49], 30)
    asked = len(watched.asked)
    assert shown(listings.first(ROOT, page.cookies[49])) == whole[50:83]
    assert len(watched.asked) == asked
    assert not listings.ended
    assert shown(listings.first(ROOT, page.cookies[9])) == whole[10:43]
    assert not listings.ended


# ---- readdir: what a reply takes is pinned, once for each entry, and nothing else is (R4)


class Replies:
    """Stands in for `pyfuse3.readdir_reply`: takes `room` entries, then none."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.took: list[tuple[bytes, int, int]] = []

    def __call__(self, token: object, name: bytes, entry: pyfuse3.EntryAttributes, cookie: int) -> bool:
        if len(self.took) == self.room:
            return False
        self.took.append((name, entry.st_ino, cookie))
        return True


def handlers(rig: Rig) -> Operations:
    operations = object.__new__(Operations)
    operations.namespace, operations.listings, operations.receiver = rig.ns, Listings(rig.ns), Receiver()
    return operations


async def read(operations: Operations, monkeypatch: pytest.MonkeyPatch, at: int, room: int) -> list[tuple[bytes, int, int]]:
    replies = Replies(room)
    with monkeypatch.context() as context:
        context.setattr(pyfuse3, "readdir_reply", replies)
        await operations.readdir(ROOT, at, None)  # type: ignore[arg-type]
    return replies.took


async def test_what_a_reply_took_is_pinned_once_for_each_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = filled(50)
    # Two names of one file stand in one reply, and are two look-ups to the kernel.
    rig.ns.link(rig.ns.lookup(ROOT, b"045"), ROOT, b"again")
    rig = await rig.committed()
    operations = handlers(rig)
    expected: Counter[int] = Counter()
    names: list[bytes] = []
    at = 0
    while took := await read(operations, monkeypatch, at, 20):
        at = took[-1][2]
        names += [name for name, _, _ in took]
        expected.update(ino for name, ino, _ in took if name not in (b".", b".."))
    assert names == [b".", b"..", *(b"%03d" % number for number in range(50)), b"again"]
    assert rig.ns._lifetime._pins == expected
    assert expected[rig.ns.lookup(ROOT, b"045")] == 2
    await read(operations, monkeypatch, 0, 12)
    expected.update(rig.ns.lookup(ROOT, b"%03d" % number) for number in range(10))
    assert rig.ns._lifetime._pins == expected


async def test_a_full_reply_leaves_the_next_page_to_be_fetched_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    operations = handlers(filled(100))
    watched = Watched(operations.namespace)
    operations.listings = Listings(watched)
    work: list[Callable[[], None]] = []
    monkeypatch.setattr(operations.receiver, "afterwards", work.append)
    took = await read(operations, monkeypatch, 0, 40)
    asked = len(watched.asked)
    for each in work:
        each()
    assert len(watched.asked) == asked + 1
    # It is at hand when it is asked for.
    assert len(await read(operations, monkeypatch, took[-1][2], 40)) == 40
    assert len(watched.asked) == asked + 1


async def test_a_reply_with_room_for_all_takes_no_longer_than_a_step_may(monkeypatch: pytest.MonkeyPatch) -> None:
    operations = handlers(filled(1000))
    names: list[bytes] = []
    at = 0
    while took := await read(operations, monkeypatch, at, 1_000_000):
        assert len(took) < 2 * FETCH_MOST
        at = took[-1][2]
        names += [name for name, _, _ in took]
    assert names == [b".", b"..", *(b"%03d" % number for number in range(1000))]


@pytest.mark.parametrize("error", [Corrupt("damaged, on purpose"), NotFound("gone, on purpose")])
async def test_entries_of_a_reply_that_ends_in_an_error_are_pinned_if_they_are_sent(
    monkeypatch: pytest.MonkeyPatch, error: FusefsError
) -> None:
    rig = filled(300)
    operations = handlers(rig)

    def broken(ino: int, after: int) -> Page:
        raise error

    # The reply takes more than was fetched at first.
    monkeypatch.setattr(operations.listings, "more", broken)
    if isinstance(error, NotFound):
        took = await read(operations, monkeypatch, 0, 10_000)
        assert rig.ns._lifetime._pins == {ino: 1 for name, ino, _ in took if name not in (b".", b"..")}
        assert len(took) == 2 + FETCH_FIRST
    else:
        with pytest.raises(pyfuse3.FUSEError):
            await read(operations, monkeypatch, 0, 10_000)
        assert rig.ns._lifetime._pins == {}
