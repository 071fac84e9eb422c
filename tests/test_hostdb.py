"""HostDB: learns from successes only, forgets failures with time, ranks the best first and keeps trying the others."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import Unavailable
from storage.hosts.hostdb import HALF_LIFE, STALE, HostDB
from storage.interfaces import Batch
from tests.fakes import ManualClock, MemoryStore, SeededRandom, make_seams

ERROR = Unavailable("away")
GB = 10**9


def make(seed: int = 0) -> tuple[HostDB, ManualClock]:
    clock = ManualClock()
    return HostDB(MemoryStore(), make_seams(clock=clock, random=SeededRandom(seed))), clock


def often_first(db: HostDB, numbers: list[int], times: int = 400) -> Counter[int]:
    return Counter(db.rank(numbers)[0] for _ in range(times))


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("success"), st.integers(0, 10**7), st.floats(0, 100)),
            st.tuples(st.just("failure"), st.just(0), st.floats(0, 100)),
        )
    )
)
def test_a_failed_call_never_changes_a_latency_or_improves_anything(events: list[tuple[str, int, float]]) -> None:
    db, clock = make()
    for what, size, seconds in events:
        before = db.stats(1)
        clock.advance(seconds)
        if what == "success":
            db.succeeded(1, "read", size, seconds)
        else:
            db.failed(1, ERROR)
            after = db.stats(1)
            assert (after.latency, after.throughput, after.reads) == (before.latency, before.throughput, before.reads)
            assert after.failures >= 1
            assert after.failed == before.failed + 1
        assert sorted(db.rank([1, 2])) == [1, 2]


@given(st.lists(st.floats(0.001, 10), min_size=1, max_size=30))
def test_an_average_lies_between_the_samples(samples: list[float]) -> None:
    db, _ = make()
    for seconds in samples:
        db.succeeded(1, "read", 1000, seconds)
    latency = db.stats(1).latency
    assert latency is not None
    assert min(samples) * 0.999 <= latency <= max(samples) * 1.001


def test_failures_decay_by_half_a_minute_after_minute() -> None:
    db, clock = make()
    for _ in range(4):
        db.failed(1, ERROR)
    assert db.stats(1).failures == pytest.approx(4)
    clock.advance(HALF_LIFE)
    assert db.stats(1).failures == pytest.approx(2)
    clock.advance(10 * HALF_LIFE)
    assert db.stats(1).failures < 0.01


def test_the_quickest_is_asked_first_and_a_failing_one_last_until_it_is_forgiven() -> None:
    db, clock = make()
    for number, seconds in ((1, 0.1), (2, 0.01), (3, 1.0)):
        db.succeeded(number, "read", 1000, seconds)
    assert db.rank([1, 2, 3]) == [2, 1, 3]
    db.failed(2, ERROR)
    assert db.rank([1, 2, 3]) == [1, 3, 2]
    # A host that fails fast does not climb.
    for _ in range(10):
        db.failed(2, ERROR)
        assert db.rank([1, 2, 3])[-1] == 2
    clock.advance(8 * HALF_LIFE)
    assert db.rank([3, 2, 1]) == [2, 1, 3]


def test_throughput_counts_for_what_is_large() -> None:
    db, _ = make()
    db.succeeded(1, "read", 1000, 0.001)
    db.succeeded(1, "read", 1_000_000, 10.0)
    db.succeeded(2, "read", 1000, 0.05)
    db.succeeded(2, "read", 100_000_000, 1.0)
    assert db.rank([1, 2]) == [2, 1]


def test_unknown_hosts_are_tried_now_and_then() -> None:
    db, _ = make()
    db.succeeded(1, "read", 1000, 0.1)
    first = often_first(db, [1, 2, 3])
    assert 5 < first[2] + first[3] < 60
    assert first[1] > 300
    # Once known, and slower, no more.
    db.succeeded(2, "read", 1000, 0.2)
    db.succeeded(3, "read", 1000, 0.2)
    assert often_first(db, [1, 2, 3]) == {1: 400}


def test_what_was_known_long_ago_is_tried_again() -> None:
    db, clock = make()
    db.succeeded(2, "read", 1000, 5.0)
    clock.advance(STALE + 1)
    db.succeeded(1, "read", 1000, 0.1)
    assert often_first(db, [1, 2])[2] > 5


def test_ranking_is_deterministic_by_the_seams_randomness() -> None:
    def ranks(seed: int) -> list[list[int]]:
        db, _ = make(seed)
        db.succeeded(1, "read", 1000, 0.1)
        return [db.rank([1, 2]) for _ in range(100)] + [db.rank_for_write([1, 2, 3], {1: GB}) for _ in range(100)]

    assert ranks(1) == ranks(1) != ranks(2)


@given(st.lists(st.integers(1, 9)), st.dictionaries(st.integers(1, 9), st.integers(0, 10**15)))
def test_a_ranking_has_everybody_once(numbers: list[int], space: dict[int, int]) -> None:
    db, _ = make()
    db.succeeded(1, "read", 1000, 0.1)
    db.succeeded(2, "write", 10**7, 0.1)
    db.failed(3, ERROR)
    assert sorted(db.rank(numbers)) == sorted(set(numbers))
    assert sorted(db.rank_for_write(numbers, space)) == sorted(set(numbers))


def test_writes_go_where_there_is_room_and_not_to_the_full_or_failing() -> None:
    db, _ = make()
    first = Counter(db.rank_for_write([1, 2], {1: 900 * GB, 2: 100 * GB})[0] for _ in range(1000))
    assert 850 < first[1] < 950
    for _ in range(50):
        assert db.rank_for_write([1, 2, 3], {1: 1000, 2: GB, 3: GB})[-1] == 1
    db.failed(2, ERROR)
    for _ in range(50):
        assert db.rank_for_write([1, 2, 3], {1: 1000, 2: GB, 3: GB}) == [3, 1, 2]


def test_a_slow_host_gets_less_but_something() -> None:
    db, _ = make()
    db.succeeded(1, "write", 4_000_000, 0.1)
    db.succeeded(2, "write", 4_000_000, 100.0)
    first = Counter(db.rank_for_write([1, 2], {})[0] for _ in range(1000))
    assert 40 < first[2] < 200


def test_a_full_host_still_reads_as_well_as_before() -> None:
    db, _ = make()
    db.succeeded(1, "read", 1000, 0.1)
    db.succeeded(2, "read", 1000, 0.2)
    db.failed(1, ERROR, ("write",))
    assert db.rank([1, 2]) == [1, 2]


async def test_experience_survives_and_is_saved_only_when_it_changed() -> None:
    db, _ = make()
    store = MemoryStore()
    db.succeeded(1, "read", 1000, 0.1)
    db.failed(2, ERROR)
    batch = Batch()
    db.save(batch)
    store.apply(batch)
    again = Batch()
    db.save(again)
    assert again.ops == []
    later = HostDB(store, make_seams(clock=ManualClock()))
    assert later.stats(1).latency == 0.1
    assert later.stats(2).last_error == "away"
    assert later.stats(3).latency is None
