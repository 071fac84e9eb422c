"""What may stand beyond the journal's limit, and how far (I7): commits that let go of what it is full of, where there is no other way."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.errors import NoSpace
from storage.interfaces import Batch
from storage.metadata import room
from storage.metadata.counters import Counter
from storage.metadata.store import Store
from tests.metadata_rig import SEGMENT, opened, piece, put, seal, tail_of, take_over

LIMIT = 10 * SEGMENT


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "ROOM_WAIT", 0.2)


def in_use(store: Store) -> int:
    return sum(segment.size for segment in store._journal.live)


async def fill(store: Store) -> int:
    """Tails of values 1, 2, ... in turn, a segment each, until the journal is full. How many values."""
    for value in itertools.count(1):
        seal(store, value, 0)
        try:
            store.apply(Batch(), [piece(value, 0, b"t" * 3000)])
            await store.commit()
        except NoSpace:
            # Not that one, which never got there.
            seal(store, value, 3000)
            return value - 1
    raise AssertionError


def others(size: int = 2000) -> Iterator[Batch]:
    """Changes that have nothing to do with tails."""
    for number in itertools.count():
        batch = Batch()
        batch.put(b"other%d" % number, bytes(size))
        yield batch


async def exhaust(store: Store) -> int:
    """Commits of very many other changes, each said to empty the journal, until one is refused. How many were not."""
    for number, batch in enumerate(others()):
        store.apply(batch)
        store.empties()
        try:
            # Who is patient waits a second for each.
            await store.commit(urgent=number != 2)
        except NoSpace:
            return number
        assert in_use(store) <= LIMIT + LIMIT // 2
    raise AssertionError


async def test_what_empties_nothing_never_stands_beyond_the_limit(tmp_path: Path) -> None:
    async with opened(tmp_path, limit=LIMIT) as store:
        values = await fill(store)
        for batch in others():
            store.apply(batch)
            try:
                await store.commit(urgent=True)
            except NoSpace:
                break
        assert LIMIT - 2 * SEGMENT < in_use(store) <= LIMIT
        for value in range(1, values + 1):
            seal(store, value, 3000)
        store.empties()
        await store.commit(urgent=True)


@pytest.mark.parametrize("tails_wait", [False, True])
async def test_what_stands_beyond_the_limit_is_bounded_and_the_commit_that_lets_go_of_as_much_is_still_taken(
    tmp_path: Path, tails_wait: bool
) -> None:
    """Else one could be refused for ever for the sake of those before it, which hardly emptied anything."""
    async with opened(tmp_path, limit=LIMIT) as store:
        values = await fill(store)
        assert await exhaust(store) > 3
        assert in_use(store) > LIMIT
        if tails_wait:
            # Of a file nobody has removed, and no host has taken.
            seal(store, 1000, 0)
            store.apply(Batch(), [piece(1000, 0, b"w" * 1000)])
        # All but the oldest: nothing is let go of yet.
        for value in range(2, values + 1):
            seal(store, value, 3000)
        store.empties()
        with pytest.raises(NoSpace):
            await store.commit(urgent=True)
        assert in_use(store) <= LIMIT + LIMIT // 2
        seal(store, 1, 3000)
        store.empties()
        await store.commit(urgent=True)
        assert in_use(store) <= 2 * LIMIT + LIMIT // 2
        await take_over(store)
        assert in_use(store) < LIMIT // 2
        put(store, b"and", b"on")
        await store.commit()
    async with opened(tmp_path, limit=LIMIT) as store:
        assert store.get(b"and") == b"on"
        if tails_wait:
            assert tail_of(store, 1000) == b"w" * 1000


async def test_a_journal_beyond_its_limit_is_opened_with_all_that_is_in_it_and_emptied(tmp_path: Path) -> None:
    async with opened(tmp_path, limit=LIMIT) as store:
        values = await fill(store)
        await exhaust(store)
        beyond = in_use(store)
        # What is pending cannot be committed, and the block ends with it.
        store.fence("on purpose")
    for opening in range(1, 4):
        # Each takes a segment of its own, of which the next one cuts off what it did not need: a page is left.
        async with opened(tmp_path, limit=LIMIT) as store:
            put(store, b"epoch", b"begun")
            await store.commit()
            assert LIMIT < in_use(store) <= beyond + opening * SEGMENT
            assert dict(store.recovered_tails()).keys() == set(range(1, values + 1))
            store.fence("on purpose")
    async with opened(tmp_path, limit=LIMIT) as store:
        for value in range(1, values + 1):
            seal(store, value, 3000)
        store.empties()
        await store.commit(urgent=True)
        await take_over(store)
        assert in_use(store) < LIMIT // 2
        store.apply(Batch(), [piece(1, 3000, b"g" * 500)])
        await store.commit()
    async with opened(tmp_path, limit=LIMIT) as store:
        assert tail_of(store, 1) == b"g" * 500


@pytest.mark.parametrize("before", [0, 1])
async def test_as_much_as_can_be_pending_is_taken_with_what_empties_the_journal(tmp_path: Path, before: int) -> None:
    """Also where others stand beyond the limit already: then if all that is in the journal goes by it."""
    async with opened(tmp_path, limit=LIMIT) as store:
        values = await fill(store)
        if before:
            await exhaust(store)
        batches = others(1000)
        while store._memtable.pending_bytes < LIMIT - 2 * SEGMENT:
            store.apply(next(batches))
        for value in range(1 + (not before), values + 1):
            seal(store, value, 3000)
        store.empties()
        await store.commit(urgent=True)
        assert in_use(store) > LIMIT + LIMIT // 2
        if not before:
            # The oldest segment is not let go of yet.
            seal(store, 1, 3000)
            store.empties()
            await store.commit(urgent=True)
        await take_over(store)
        # All is one commit's segment, which stays until another follows: that must not be refused for it.
        assert len(store._journal.live) == 1
        assert in_use(store) > LIMIT - 3 * SEGMENT
        put(store, b"and", bytes(3000))
        await store.commit()
        await take_over(store)
        assert in_use(store) <= 2 * SEGMENT


async def test_what_commit_hooks_add_counts_when_it_is_asked_whether_the_reserve_can_be_spared(tmp_path: Path) -> None:
    """Else the commit that was let in with it would be refused, or take what is kept for what lands."""
    async with opened(tmp_path, limit=LIMIT) as store:
        await fill(store)
        assert store.can_spare(100)
        dirty = True

        def emit() -> None:
            nonlocal dirty
            if dirty:
                dirty = False
                put(store, b"inodes", bytes(3 * SEGMENT))

        store.add_commit_hook(emit)
        assert not store.can_spare(100)
        store.fence("on purpose")


async def test_a_full_journal_does_not_refuse_the_numbers_under_which_it_is_emptied(tmp_path: Path) -> None:
    """Sectors are written under numbers whose reservation is durable (I1). Hosts that take nothing use them up, one for each attempt; when
    they took something again, there were none, until the next mount."""
    async with opened(tmp_path, limit=LIMIT) as store:
        values = await fill(store)
        with pytest.raises(NoSpace):
            # The reserve is taken.
            for batch in others():
                store.apply(batch)
                await store.commit(urgent=True)
        numbers = Counter(store, b"sector", 4)
        assert [await numbers.next_durable() for _ in range(20)] == list(range(1, 21))
        assert in_use(store) <= LIMIT + LIMIT // 2
        for value in range(1, values + 1):
            seal(store, value, 3000)
        store.empties()
        await store.commit(urgent=True)
