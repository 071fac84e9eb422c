"""Numbers are used once in a volume's history, whatever crashes; ids of sectors (nonces, I1) only from ranges that are durable."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import Corrupt, Fenced
from storage.interfaces import Batch
from storage.metadata.counters import Counter
from storage.metadata.keys import COUNTER, read_u64
from tests.fakes import MemoryStore
from tests.metadata_rig import copy, opened


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["now", "durable", "commit", "crash", "reserve"]), max_size=60), st.integers(1, 9))
def test_no_number_that_reached_the_disk_or_a_sector_is_given_out_again(plan: list[str], size: int) -> None:
    async def main() -> None:
        store = MemoryStore()
        counter = Counter(store, b"x", size)
        seen: set[int] = set()
        pending: set[int] = set()
        for step in plan:
            if step == "now":
                number = counter.next_now()
                assert number not in pending
                assert number > max(seen, default=0)
                pending.add(number)
            elif step == "durable":
                number = await counter.next_durable()
                # I1: used at once, whatever happens to the store.
                later = read_u64(store.crash().get(COUNTER + b"x") or bytes(8))
                assert number < later
                assert number not in seen | pending
                seen.add(number)
            elif step == "commit":
                await store.commit()
                seen |= pending
                pending.clear()
            elif step == "crash":
                store = store.crash()
                counter = Counter(store, b"x", size)
                assert counter.first > max(seen, default=0)
                pending.clear()
            elif step == "reserve":
                batch = Batch()
                counter.reserve(batch)
                store.apply(batch)

    trio.run(main)


async def test_numbers_begin_with_one_and_have_no_gaps_while_nothing_happens() -> None:
    counter = Counter(MemoryStore(), b"x", 10)
    assert [counter.next_now() for _ in range(35)] == list(range(1, 36))


async def test_a_durable_number_seldom_waits() -> None:
    store = MemoryStore()
    counter = Counter(store, b"x", 100)
    for _ in range(1000):
        await counter.next_durable()
        if _ % 40 == 0:
            await store.commit()
    assert store.commits <= 1 + 25 + 1


async def test_the_range_bound_into_the_first_batch_is_enough() -> None:
    store = MemoryStore()
    counter = Counter(store, b"x", 100)
    batch = Batch()
    counter.reserve(batch)
    store.apply(batch)
    await store.commit()
    assert await counter.next_durable() == counter.first == 1
    assert store.commits == 1


async def test_a_failed_store_gives_no_numbers_without_a_reservation() -> None:
    store = MemoryStore()
    counter = Counter(store, b"x", 1)
    assert counter.next_now() == 1
    store.failed = True
    for _ in range(2):
        with pytest.raises(Fenced):
            counter.next_now()


async def test_a_damaged_record_is_said() -> None:
    for raw in (b"", b"short", bytes(8), b"\xff" * 8):
        with pytest.raises(Corrupt, match="counter"):
            Counter(MemoryStore({COUNTER + b"x": raw}), b"x", 1)


async def test_numbers_go_on_over_crashes_of_the_real_store(tmp_path: Path) -> None:
    seen: list[int] = []
    directory = tmp_path / "0"
    directory.mkdir()
    for crash in range(4):
        async with opened(directory) as store:
            counter = Counter(store, b"sector", 16)
            for _ in range(20):
                seen.append(await counter.next_durable())
            directory = copy(directory, tmp_path / str(crash + 1))
    assert len(set(seen)) == len(seen)
    assert seen == sorted(seen)
